"""Train HarmoView, stage by stage (Progressive View Curriculum).

  python train.py --stage all                      the toy world, all four stages
  torchrun --nproc-per-node 2 train.py --stage 2   one stage on several processes (several GPUs, or two halves
                                                   of a CPU); it starts from the stage before
  torchrun --nproc-per-node 8 train.py --stage all --config 14b --expert high --shard --recompute --compile
           --wan ckpts/Wan2.2-T2V-A14B --data DATA

A run writes OUT/stageN/step-NNNNNN/ folders (model, EMA, optimizer, checkpoint.json), for each stage
metrics.jsonl and a sample sheet, and loss.svg. Everything random in a step comes from (seed, stage, step,
sample), so a resumed run repeats the uninterrupted one bit for bit, and any split of the global batch into
ranks and micro-batches sees the same samples.
"""
import contextlib
import gc
import hashlib
import math
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

# before torch starts its threads: beside another busy process, spinning ones made a toy step ten times longer
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# in some steps every parameter is used, and DDP would warn that it need not look for unused ones
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from kernels import use_fused
from model import (CHOICES, CONFIGS, HarmoView, load_base, load_checkpoint, load_trained, load_wan,
                   stored_config)
from networks.lora import TRAINS, new_names, set_trained
from networks.weights import (ROLES, expert_folders, moved_base, read_frozen, release_folder, role_of,
                              wan_files)
from rope import LAYOUTS
from support.checkpoints import (check_replaceable, compare, delete_checkpoint, find_checkpoint, load_tensors,
                                 newest_undamaged, pack_optimizers, parent_of, read_meta, save_checkpoint,
                                 steps_in, unpack_optimizers)
from support.monitor import VALID_CLIPS, Metrics, Validation, averaged, draw_losses, write_sheet
from support.optimizers import make_optimizers
from support.processes import (CORES, World, compile_blocks, gathered, load_shards, local, replicate,
                               save_shards, shard, synchronized, whole)
from support.script import (ROOT, Parser, UserError, as_user_error, autocast, count, fingerprint, fraction,
                            in_range, lock, nonempty, not_negative, positive, probe_writable, progress,
                            run_script, seed_number, sha256_of, temporary_name, uses_bf16)
from videos import toy
from videos.encode import prefetch
from videos.jobs import name_references, read_jobs


@dataclass(frozen=True)
class Stage:
    name: str
    people: tuple  # numbers of people to draw from, each step
    views: str  # references: "none", "front" or "all"
    drop: tuple  # probability that a non-frontal view is left out, at the stage's start and end
    drop_front: float  # the same for the front; the last view left is never dropped
    all_drop: float  # probability of a step without any reference: the null condition of guidance
    cross: float  # probability of a step with references from other clips only, where there are any
    lr: tuple  # times the recipe's learning rate, at the stage's start and end


STAGES = {  # name, people, views, drop, drop_front, all_drop, cross, lr
    1: Stage("t2v", (1, 2), "none", (0, 0), 0, 0, 0, (1, 1)),
    2: Stage("single", (1,), "front", (0, 0), 0, 0.1, 0.5, (1, 1)),
    3: Stage("multi", (1,), "all", (0.5, 0.2), 0.1, 0.1, 0.5, (1, 1)),
    4: Stage("harmony", (1, 2), "all", (0.1, 0.1), 0.1, 0.1, 0.9, (0.8, 0.02)),
}
# per config: steps of each stage, global batch, peak learning rates, timestep shift, what it starts from
TRAIN_RECIPES = {
    # shift 100 for the toy: with less noise the clip itself shows how the head is turned, and the network
    # does not learn to read the caption (+1 dB)
    "tiny": dict(steps=(2, 2, 2, 2), batch=4, muon_lr=16e-3, adamw_lr=3e-3, shift=100.0),
    "toy": dict(steps=(30, 40, 600, 500), batch=16, muon_lr=16e-3, adamw_lr=4e-3, shift=100.0, base="base"),
    "toy64": dict(steps=(30, 40, 900, 600), batch=16, muon_lr=16e-3, adamw_lr=4e-3, shift=100.0,
                  base="base64"),
    # from --wan; what others use for Wan, not measured here. new_lr is for what Wan lacks: proxies, MFI, LoRA
    "1.3b": dict(steps=(500, 2000, 4000, 4000), batch=8, muon_lr=2e-4, adamw_lr=1e-5, new_lr=1e-4,
                 shift=5.0),
    "14b": dict(steps=(500, 2000, 4000, 4000), batch=8, muon_lr=2e-4, adamw_lr=1e-5, new_lr=1e-4,
                shift=5.0),
}
MV2ID = dict(reference_attention="joint", rope_layout="rd", proxy_tokens=0, no_mfi=True, mask=0.6, pairs="in")

# more would not fit into memory, which is seen only when a step's samples are drawn
batch_size = in_range(int, 1, 2**14, f"1 to {2**14} samples; more does not fit into memory")


def arguments(argv=None):
    first = Parser(add_help=False)  # what decides the defaults of the others
    first.add_argument("--config", default="toy")
    first.add_argument("--mv2id", action="store_true")
    decisive, _ = first.parse_known_args(argv)
    p = Parser(description=__doc__)
    run = p.add_argument_group("run").add_argument
    run("--stage", default="all", choices=[*map(str, STAGES), "all"], help="one stage, or all (default)")
    run("--config", default="toy", choices=CONFIGS, help="a preset of model.CONFIGS and its recipe")
    run("--out", type=nonempty, help="folder of the run (default: out/CONFIG)")
    run("--data", type=nonempty, default="cache", help="an encoded set (`python data.py encode`), or the "
        "folder to render and encode the toy in")
    run("--clips", type=count, nargs=2, metavar=("ONE", "TWO"),
        help="toy clips to render, with one person and with two (default: the config's)")
    run("--wan", type=nonempty, metavar="DIR", help="a Wan checkpoint's folder: the first stage trained "
        "starts from its transformer, and sampling takes its encoders (the toy's default: assets/base)")
    run("--scratch", action="store_true", help="start the toy from random weights instead")
    run("--expert", choices=ROLES, help="train this one of Wan2.2's experts, on its own noise "
        "levels; sample.py expects both in one folder, as high_noise_model and low_noise_model")
    run("--resume", action="store_true", help="go on from the newest checkpoint of each stage")
    run("--overwrite", action="store_true", help="start the stages afresh where checkpoints exist")
    run("--seed", type=seed_number, default=0, help="of all that is random")
    opt = p.add_argument_group("optimization (defaults by --config: TRAIN_RECIPES)").add_argument
    opt("--train", choices=TRAINS, default="all", help="all; new: proxies and MFI; lora: these and adapters "
        "of the blocks' matrices, on a frozen network")
    opt("--rank", type=in_range(int, 1, 1024, "1 to 1024"), default=32, help="rank of the adapters")
    opt("--steps", type=count, nargs="+", help="steps of each stage: one number for all, or one a stage")
    opt("--batch", type=batch_size, help="global batch size: all ranks, all micro-steps")
    opt("--micro-batch", type=batch_size,
        help="samples per forward on a rank (default: its share, for Wan 1)")
    opt("--muon-lr", type=positive, help="peak learning rate of Muon")
    opt("--adamw-lr", type=positive, help="peak learning rate of AdamW")
    opt("--new-lr", type=positive, help="the same of what Wan lacks: proxies, MFI, adapters (default: for "
        "Wan the recipe's, else --adamw-lr)")
    opt("--optimizer", choices=("muon", "adamw"),
        help="muon: on the blocks' matrices, AdamW on the rest (default; adamw for Wan's networks)")
    opt("--lr-span", type=not_negative, nargs=2, metavar=("START", "END"), help="factors of the peak "
        "learning rates at every stage's start and end (default: those of STAGES)")
    opt("--warmup", type=count, default=30, help="steps of linear warm-up per stage")
    opt("--weight-decay", type=not_negative, default=0.01, help="of both optimizers")
    opt("--clip", type=positive, default=1.0, help="largest gradient norm")
    opt("--ema", type=fraction, default=0.995, help="decay of the averaged weights, reached gradually")
    opt("--timesteps", choices=("logit-normal", "uniform"), default="logit-normal",
        help="how noise levels are drawn, before the shift")
    opt("--shift", type=positive, help="timestep shift: more than 1 trains more on noisy steps")
    opt("--boundary", type=fraction, default=0.875, help="shifted noise level where the experts meet, 0..1")
    opt("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where it is fast")
    opt("--shard", action="store_true", help="FSDP2: split weights, averages and optimizer over processes")
    opt("--recompute", action="store_true",
        help="activation checkpointing: store attention's output only, recompute the rest of a block")
    opt("--no-fused", action="store_true", help="PyTorch's operations instead of the Triton kernels")
    opt("--compile", action="store_true", help="torch.compile every block (needs a C++ compiler or a GPU)")
    method = p.add_argument_group("method").add_argument
    method("--no-mfi", action="store_true", help="without Multi-level Feature Injection")
    method("--rope-layout", choices=LAYOUTS, help="positions of references (default: jump)")
    method("--rope-jump", type=count, help="Jump-RoPE's gap between identities, in frames")
    method("--proxy-tokens", type=in_range(int, 0, 10**4, "0 to 10000"),
           help="learnable tokens for a missing view; 0 leaves it out")
    method("--reference-attention", choices=CHOICES["reference_attention"],
           help="one-way: references do not read the video, so sampling computes them once (default); "
           "joint: they do, as in the papers")
    method("--described", type=fraction, default=0.0,
           help="share of the toy's captions that tell the people's looks too (for a base: 0.66)")
    method("--pairs", choices=("cross", "in"), default="cross",
           help="references from elsewhere or from the clip itself")
    method("--no-curriculum", action="store_true",
           help="the last stage's clips and references from the first step on; steps as in the stages")
    method("--front-only", action="store_true", help="no view but the front is ever given")
    method("--mask", type=fraction, default=0.0,
           help="region masking: share of a reference hidden (Mv2ID: 0.6)")
    method("--mv2id", action="store_true", help="the defaults of Mv2ID (train.MV2ID), and no step that "
           "asks for references from other clips; an encoded set must be masked already")
    log = p.add_argument_group("logging").add_argument
    log("--save-every", type=count, default=500, help="steps between checkpoints; also at a stage's end")
    log("--keep", type=count, default=2, help="checkpoints kept per stage")
    log("--log-every", type=count, default=10, help="steps between lines of metrics.jsonl")
    log("--valid", type=nonempty, metavar="DIR", help="an encoded set of people that training does not see "
        "(default: the toy's own; none for Wan)")
    log("--valid-every", type=count, default=500, help="steps between validations; also at a stage's end")
    log("--sample-prompts", type=nonempty, metavar="FILE", help="jobs of sample sheets, as sample.py's "
        "--prompts (default: for the toy people it never saw, for Wan none)")
    log("--sample-saves", action="store_true", help="sheets at all checkpoints, not only a stage's last")
    log("--no-samples", action="store_true", help="no sample sheets")
    recipe = TRAIN_RECIPES.get(decisive.config, {})
    p.set_defaults(**{name: value for name, value in recipe.items() if name != "base"})
    if decisive.mv2id:
        p.set_defaults(**MV2ID)
    return p.parse_args(argv)


def seed_of(*key):
    """A number for seeding generators from a tuple of numbers: equal keys, equal draws, on any machine."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def resolve(args, world):
    """Fill in what flags leave open and check what must fit together -> stages to train, DiTConfig."""
    args.data = Path(args.data)
    args.precision = "bf16" if uses_bf16(world.device, args.precision) else "fp32"
    resolve_start(args)
    config = resolve_config(args)
    resolve_data(args, config)
    resolve_optimizers(args, config)
    resolve_steps(args, config, world)
    if args.resume and args.overwrite:
        raise UserError("--resume goes on, --overwrite starts afresh: give one of them")
    if args.expert and args.sample_prompts:
        raise UserError("--sample-prompts needs both experts, and this run trains one: leave it out")
    if args.sample_prompts:
        for job in read_jobs(Path(args.sample_prompts), args.seed):  # refused now, not after a stage
            name_references(job, config.max_identities)
    stages = list(STAGES)
    return stages if args.stage == "all" else [int(args.stage)], config


def resolve_start(args):
    """--wan, --expert and --out."""
    if args.scratch and args.wan:
        raise UserError("--wan says what to start from, --scratch from nothing: give one of them")
    base = TRAIN_RECIPES[args.config].get("base")
    if base and not args.scratch and args.stage in ("1", "all"):
        args.wan = args.wan or str(ROOT / "assets" / base)
    name = args.config
    if args.expert:
        name += f"/{args.expert}_noise_model"
        args.wan = args.wan and choose_expert(args.wan, args.expert)
    args.out = Path(args.out or f"out/{name}")


def resolve_config(args):
    """A preset as the flags of the method change it."""
    config = CONFIGS[args.config]
    if args.no_mfi:
        config = replace(config, vit_dim=0, vit_levels=0)
    for name in ("rope_layout", "rope_jump", "proxy_tokens", "reference_attention"):
        if getattr(args, name) is not None:
            config = replace(config, **{name: getattr(args, name)})
    if args.train == "new" and not (config.proxy_tokens and config.vit_dim):
        raise UserError("--train new trains proxies, in steps that lack a view, and MFI, in those with all: "
                        "leave --proxy-tokens 0 and --no-mfi out, or give --train lora")
    if not config.is_wan:
        toy.check_config(config)
    return config


def resolve_data(args, config):
    """--data, --valid, and the toy's --clips."""
    encoded = encoded_set(args.data)
    of_toy = args.clips or args.described or not args.mv2id and (args.mask or args.pairs != "cross")
    if encoded and of_toy:
        raise UserError("--mask, --clips, --described and --pairs are for the toy; "
                        f"{args.data} was encoded with its own")
    if config.is_wan and not (args.wan and encoded):
        raise UserError(f"--config {args.config} needs --wan DIR, the folder of a Wan checkpoint, and --data "
                        "DIR, a set that `python data.py encode` made; "
                        f"came --wan {args.wan} --data {args.data}")
    if (args.data / "manifest.jsonl").is_file() and not encoded:
        raise UserError(f"--data {args.data} is not encoded yet: `python data.py encode` does it")
    if args.valid:
        asked, args.valid = args.valid, encoded_set(args.valid)
        if not args.valid:
            raise UserError(f"--valid {asked} holds no encoded set: `python data.py encode` makes one")
        if encoded and fingerprint(encoded / "index.jsonl") == fingerprint(args.valid / "index.jsonl"):
            raise UserError(f"--valid {asked} is the training set: give a set of other people")
    args.clips = list(args.clips or toy.WORLDS[args.config]["clips"])


def resolve_optimizers(args, config):
    """--optimizer, its learning rates (None: not used), and the noise levels."""
    if not args.optimizer:  # Muon needs whole, large matrices
        plain = config.is_wan or args.shard or args.train != "all"
        args.optimizer = "adamw" if plain else "muon"
    if args.shard and args.optimizer == "muon":
        raise UserError("--shard splits matrices, and Muon needs them whole: give --optimizer adamw")
    if args.shard and "RANK" not in os.environ:
        raise UserError("--shard splits a network over processes: start with torchrun --nproc-per-node N")
    if args.train != "all" and args.adamw_lr != TRAIN_RECIPES[args.config]["adamw_lr"]:
        args.new_lr = args.adamw_lr  # all that trains is new
    args.new_lr = args.new_lr or args.adamw_lr
    if args.optimizer == "adamw":
        args.muon_lr = None
    if args.train != "all":
        args.adamw_lr = None
    slices = {"high": (args.boundary, math.inf), "low": (0, args.boundary), None: (0, math.inf)}
    low, high = slices[args.expert]
    args.levels = data.NoiseLevels(args.shift, args.timesteps, low, high)
    if args.levels.share() < 0.001:
        raise UserError(f"--expert {args.expert} with --boundary {args.boundary} and --shift {args.shift}: "
                        "of 1,000 noise levels less than one is its own; give another --shift or --boundary")


def resolve_steps(args, config, world):
    """--steps of each stage, --batch and --micro-batch."""
    if args.steps is TRAIN_RECIPES[args.config]["steps"]:  # a stage that was added: as many as the last one
        args.steps = [args.steps[min(n, len(args.steps)) - 1] for n in STAGES]
    if len(args.steps) == 1:
        args.steps *= len(STAGES)
    if len(args.steps) != len(STAGES):
        raise UserError(f"--steps {' '.join(map(str, args.steps))}: "
                        f"expected one number, or {len(STAGES)}, one a stage")
    if args.batch % world.size:
        fits = max(n for n in range(1, world.size) if args.batch % n == 0)
        raise UserError(f"--batch {args.batch} does not split over {world.size} processes: "
                        f"give a multiple of {world.size}, or torchrun --nproc-per-node {fits}")
    share = args.batch // world.size
    if not args.micro_batch:
        args.micro_batch = 1 if config.is_wan else share
    if share % args.micro_batch:
        raise UserError(f"--batch {args.batch} is not a multiple of {world.size} process(es) x "
                        f"--micro-batch {args.micro_batch}")


def check_existing(stages, args):
    """Refuse to overwrite what is there, or to resume a stage whose predecessor is unfinished or was trained
    again."""
    later = None
    for number in reversed(stages):
        folder = args.out / f"stage{number}"
        own = find_checkpoint(folder)
        if own and not (args.resume or args.overwrite):
            raise UserError(f"{own} exists: --resume goes on from it, --overwrite starts the stage afresh, "
                            "--out chooses another folder")
        before = find_checkpoint(args.out / f"stage{number - 1}")
        if args.resume and own and before and read_meta(own).get("parent") not in (None, parent_of(before)):
            raise UserError(f"{own} did not grow from {before}: give --stage {number} --overwrite")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is not a folder: move it away")
        for step in range(args.save_every, args.steps[number - 1] + args.save_every, args.save_every):
            check_replaceable(folder / f"step-{min(step, args.steps[number - 1]):06d}")
        if args.resume and later and (own is None or read_meta(own)["step"] < args.steps[number - 1]):
            raise UserError(f"{later} grew from fewer steps of stage {number} than {args.steps[number - 1]}: "
                            "give the --steps it had, or --overwrite, or another --out")
        later = own or later


def stage_of(number, args):
    """A row of STAGES as the flags change it."""
    stage = STAGES[number]
    if args.no_curriculum:
        stage = replace(STAGES[len(STAGES)], lr=stage.lr)
    if args.lr_span:
        stage = replace(stage, lr=tuple(args.lr_span))
    return replace(stage, cross=0) if args.mv2id else stage


def step_flags(args, number):
    """The flags that decide what a step does; they must not change when a stage resumes."""
    names = ("seed", "batch", "muon_lr", "adamw_lr", "new_lr", "optimizer", "warmup", "weight_decay", "clip",
             "ema", "shift", "timesteps", "expert", "boundary", "train", "rank", "shard", "precision",
             "clips", "pairs", "described", "mask", "front_only")
    flags = {name: getattr(args, name) for name in names} | {"steps": args.steps[number - 1]}
    for name, value in asdict(stage_of(number, args)).items():
        flags[f"stage {name}"] = list(value) if isinstance(value, tuple) else value  # as JSON has it
    if folder := encoded_set(args.data):
        flags["data"] = sha256_of(folder / "index.jsonl")[:16]
    return flags


class Start(NamedTuple):
    """What a stage starts from."""
    model: HarmoView
    ema: dict  # averaged weights by name
    optimizers: list
    step: int  # steps that are done
    parent: str | None  # fingerprint of the checkpoint before the stage, or of the toy's base
    base: dict | None  # the frozen network of --train new and lora: train, rank, path, sha256

    def trained(self):
        """The parameters that train, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def prepare(number, args, config, world):
    """The Start of a stage: from its own checkpoint with --resume, from the stage before's EMA, from --wan,
    or from nothing. Raises UserError where the stage before is missing or not finished, and where a
    checkpoint was trained with other flags."""
    same_run = f"--config {args.config} --out {args.out}"
    own = None
    if args.resume:  # process 0 alone reads it through
        own = world.agree(newest_undamaged(args.out / f"stage{number}") if world.rank == 0 else None)
    if args.resume and not own and steps_in(args.out / f"stage{number}"):
        raise UserError(f"{args.out}/stage{number}: none of its checkpoints is whole; "
                        "--overwrite starts the stage afresh")
    before = find_checkpoint(args.out / f"stage{number - 1}")
    source = own or before
    meta = read_meta(source) if source else {}
    if own:
        flags = meta.get("flags", {})
        compare(own, stored_config(meta) | flags, asdict(config) | step_flags(args, number))
    elif before:
        if not meta.get("finished"):
            raise UserError(f"stage {number} needs stage {number - 1}, which stopped at step {meta['step']}: "
                            f"`python train.py --stage {number - 1} {same_run} --resume` finishes it")
        compare(before, stored_config(meta), asdict(config))
    elif number > 1 and not args.wan:
        raise UserError(f"stage {number} starts from stage {number - 1}, and {args.out}/stage{number - 1} "
                        f"holds no checkpoint: run `python train.py --stage {number - 1} {same_run}`")
    for folder in (source, args.wan):
        if not config.is_wan and folder and Path(folder, "checkpoint.json").is_file():
            toy.check_world(folder, read_meta(folder))
    start = before or args.wan
    parent = parent_of(start) if start and Path(start, "checkpoint.json").is_file() else None
    release = config.is_wan and not before and not parent
    if release:
        parent = fingerprint(wan_files(args.wan))
    # find_base compares a base; one older than 2026-12-01 does not say from which release it started
    compared = not (release and (meta.get("base") or not meta.get("parent")))
    if own and number == 1 and compared and meta.get("parent") != parent:
        had = f" ({meta['wan']}, not {args.wan})" if release else ""
        raise UserError(f"{own} started from other weights: give the --wan that it had{had}, or --scratch")
    parent = meta.get("parent") if own else parent
    torch.manual_seed(args.seed)  # for what is new in the model
    base = None if args.train == "all" else find_base(source, args)
    model = make_network(source, bool(own), base, args, config, world)
    ema = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if own and not args.shard:  # until here it had the averaged weights, as a stage starts from those
        load_trained(model, own, "model")
    optimizers = make_optimizers(model, args, new_names(model))
    if own and args.shard:
        with as_user_error(own):
            load_shards(own, model, optimizers, ema)
    elif own:
        with as_user_error(own / "optimizer.safetensors"):
            unpack_optimizers(optimizers, load_tensors(own, "optimizer"))
    return Start(model, ema, optimizers, meta["step"] if own else 0, parent, base)


def make_network(source, resumed, base, args, config, world):
    """The network of a stage with its weights, on this process's device: the averaged ones of the checkpoint
    `source`, or --wan's, or new ones; of --train new and lora its frozen base, see find_base. It is on the
    meta device at first, so that with --shard a process never holds more than its part and one tensor."""
    meta = read_meta(source) if source else {}
    merged = "base" in meta and not base  # adapters of an earlier stage: from now on all of it trains
    if merged:
        model = load_checkpoint(source)[0]
    else:
        with torch.device("meta" if source or args.wan else "cpu"):
            model = HarmoView(config)
    if base:
        frozen = torch.bfloat16 if args.precision == "bf16" and not args.shard else torch.float32
        set_trained(model, args.train, args.rank, frozen)
    if not merged and (source or args.wan):
        model.make_new()  # a file may replace them
    model.recompute = args.recompute
    if args.compile:
        compile_blocks(model)
    if args.shard:
        shard(model, world, args.precision == "bf16")
    if base:
        load_base(model, read_frozen(base))
    if resumed and args.shard:  # load_shards fills what trains
        if not base:
            model.to_empty(device=world.device)
    elif source and not merged and (not base or "base" in meta):
        load_trained(model, source, "ema")
    elif args.wan and not source and not base:
        try:
            load_wan(model, args.wan)
        except UserError as error:
            advice = "" if config.is_wan else "; --scratch starts from random weights"
            raise UserError(f"{error}{advice}") from None
    return model.to(world.device)


def find_base(source, args):
    """The frozen network of --train new or lora, as model.load_base takes it: that of the checkpoint
    `source`, or that checkpoint itself where all of it was trained, or --wan."""
    base = read_meta(source).get("base") if source else None
    if base and (base["train"], base["rank"]) != (args.train, args.rank):
        raise UserError(f"{source} was trained with --train {base['train']} --rank {base['rank']}: "
                        "give the same")
    if not (source or args.wan):
        raise UserError(f"--train {args.train} adds to a trained network: give --wan, or train a stage first")
    if base:
        return moved_base(source, base, os.path.abspath(args.wan)) if args.wan else base
    return {"train": args.train, "rank": args.rank, "path": os.path.abspath(source or args.wan),
            "sha256": parent_of(source) if source else None,
            "content": None if source else fingerprint(wan_files(args.wan))}


def loss_of(model, batch, sigma, noise):
    """Mean squared error of velocity noise - x0 at x_t = (1 - sigma) x0 + sigma noise; sigma [B] in 0..1."""
    x0, text, refs, vit = batch
    s = sigma.view(-1, 1, 1, 1, 1)
    return F.mse_loss(model((1 - s) * x0 + s * noise, 1000 * sigma, text, refs, vit), noise - x0)


def draw_noise(x0, generators, levels):
    """Each sample's sigma, from data.NoiseLevels, and noise, both from its own generator."""
    sigma = torch.stack([levels.draw(g) for g in generators])
    return sigma.to(x0.device), data.noise_of(x0.shape[1:], generators).to(x0.device)


def micro_batches(stage, number, first_step, args, dataset, world):
    """For each step from first_step on, the numbers of all its clips, and the batches of this rank's
    micro-steps, each with its samples' generators."""
    share, steps = args.batch // world.size, args.steps[number - 1]  # samples per rank and step
    for step in range(first_step, steps):
        rng = random.Random(seed_of(args.seed, number, step))
        views, clips, bucket = dataset.sampler.draw(stage, step / steps, rng, args.batch)
        batches = []
        for first in range(world.rank * share, (world.rank + 1) * share, args.micro_batch):
            generators = [torch.Generator().manual_seed(seed_of(args.seed, number, step, i))
                          for i in range(first, first + args.micro_batch)]
            some = clips[first:first + args.micro_batch]
            batches.append((dataset.batch(views, some, bucket, generators, world.device), generators))
        yield clips, batches


def diverged(number, step, steps, entries):
    """What to say of so many steps in a row without a finite gradient, the last one on these clips."""
    sources = ", ".join(sorted({entry["source"] for entry in entries})[:20])
    return (f"stage {number}: {steps} steps in a row without a finite gradient, the last one {step + 1} with "
            f"{sources}; try smaller learning rates, or leave out what is wrong")


def save(step, start, meta, files, args, world):
    """A checkpoint of a stage, of all processes' parts. meta: stage_meta's; files: further ones it needs."""
    number, steps = meta["stage"], args.steps[meta["stage"] - 1]
    everything = [*start.trained().values(), *start.ema.values()]
    if not world.all(all(bool(local(p).isfinite().all()) for p in everything)):
        raise UserError(f"stage {number} step {step}: the weights are no longer finite and not saved; "
                        "try smaller learning rates")
    folder, shards = args.out / f"stage{number}", None
    tensors = {"model": start.trained(), "ema": start.ema, "optimizer": pack_optimizers(start.optimizers)}
    if args.shard:
        shards = Path(world.agree(str(temporary_name(folder / "shards"))))
        save_shards(shards, start.model, start.optimizers, start.ema)
        tensors = {"ema": gathered(start.ema, world)} if step == steps else {}
    if world.rank == 0:
        meta = meta | {"step": step, "finished": step == steps}
        save_checkpoint(folder / f"step-{step:06d}", tensors, meta, files, args.keep, shards)


def stage_meta(number, start, args):
    """What checkpoint.json says of a stage."""
    meta = {"config": asdict(start.model.config), "preset": args.config, "stage": number,
            "name": STAGES[number].name, "command": " ".join(sys.argv), "flags": step_flags(args, number),
            "parent": start.parent}
    if args.no_curriculum:
        meta["name"] = STAGES[len(STAGES)].name
    if start.base:
        meta["base"] = start.base
    if args.expert:
        meta["expert"] = {"role": args.expert, "boundary": args.boundary, "share": args.levels.share()}
    if start.model.config.is_wan:
        meta["wan"] = os.path.abspath(release_folder(args.wan))
    else:
        meta["world"] = toy.world_of(toy.WORLDS[args.config])
    return meta


def train_stage(number, start, args, loaded, world, stop):
    """One stage from its Start to its last step, unless stop() ends it early, after saving."""
    stage, steps, folder = stage_of(number, args), args.steps[number - 1], args.out / f"stage{number}"
    model, optimizers, trained, ema = start.model, start.optimizers, start.trained(), start.ema
    if start.step >= steps:
        return
    meta = stage_meta(number, start, args)
    metrics = Metrics(folder, start.step, model, world, passes=3 if args.train == "all" else 2)
    network = model if args.shard else replicate(model, world)
    bar = progress(range(start.step, steps), f"stage {number} {stage.name}", "steps", steps, start.step,
                   show=world.rank == 0, every=math.inf)
    skipped, began = 0, time.perf_counter()
    batches = prefetch(micro_batches(stage, number, start.step, args, loaded.dataset, world))
    for step in bar:
        clips, micro_steps = metrics.next(batches)
        # learning rate
        factor = min(1, (step + 1) / args.warmup) * (stage.lr[0] + (stage.lr[1] - stage.lr[0]) * step / steps)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak_lr"] * factor
        # micro-steps
        total = torch.zeros((), device=world.device)  # this step's loss
        for i, (batch, generators) in enumerate(micro_steps, 1):
            sigma, noise = draw_noise(batch[0], generators, args.levels)
            with synchronized(network, last=i == len(micro_steps)):
                with autocast(world.device, args.precision):
                    loss = loss_of(network, batch, sigma, noise) / len(micro_steps)
                loss.backward()
            total += loss.detach()
            metrics.count(batch[0], batch[2])
        # clip, step, EMA
        norm = whole(nn.utils.clip_grad_norm_(trained.values(), args.clip))
        if torch.isfinite(norm):
            skipped = 0
            for optimizer in optimizers:
                optimizer.step()
            decay = min(args.ema, (step + 1) / (step + 10))  # a short memory at first
            torch._foreach_lerp_(list(ema.values()), [p.detach() for p in trained.values()], 1 - decay)
        else:  # every rank sees the same summed gradient, so every rank skips
            skipped += 1
            if world.rank == 0:
                progress.write(f"stage {number} step {step + 1}: gradient norm {float(norm)}; "
                               "step skipped, no weight changed")
            if skipped == min(10, steps - start.step):
                raise UserError(diverged(number, step, skipped, map(loaded.dataset.entry, clips)))
        for optimizer in optimizers:
            optimizer.zero_grad()
        metrics.step_ends()
        # log, validate, save
        last = step + 1 == steps
        if (step + 1) % args.log_every == 0 or last:
            loss = world.mean(total)
            bar.tell(f"loss {loss:.4f}")
            metrics.write(stage=number, step=step + 1, loss=loss, grad_norm=float(norm), lr_factor=factor,
                          **metrics.speed())
        stopping = stop()
        if loaded.validation and ((step + 1) % args.valid_every == 0 or last):
            with averaged(model, trained, ema):
                losses = loaded.validation.losses(loss_of, model, args.levels, args.precision)
            metrics.write(stage=number, step=step + 1, valid=losses)
        if (step + 1) % args.save_every == 0 or last or stopping:
            save(step + 1, start, meta, loaded.files, args, world)
            if world.rank == 0:
                draw_losses(args.out, number)
                if (last or args.sample_saves) and not stopping:
                    shape = loaded.dataset.commonest_shape()
                    write_sheet(folder, step + 1, last, args, model.config, shape)
            world.barrier()
        if stopping:
            return
    minutes = (time.perf_counter() - began) / 60
    if world.rank == 0:
        print(f"stage {number} {stage.name}: steps {start.step + 1} to {steps} in {minutes:.1f} min, "
              f"loss {loss:.4f}: {find_checkpoint(folder)}", flush=True)


def stop_on_signal(world):
    """A function that says whether any rank was sent SIGTERM or Ctrl-C; all ranks must call it together. Its
    .received are the signals that came here."""
    received = []

    def receive(sent, _):
        if received and sent == signal.SIGINT:  # a second Ctrl-C does not wait for the step to end
            raise KeyboardInterrupt
        received.append(sent)
    signal.signal(signal.SIGTERM, receive)
    signal.signal(signal.SIGINT, receive)

    def stop():
        return not world.all(not received)
    stop.received = received
    return stop


def choose_expert(wan, expert):
    """That expert's folder in a Wan2.2 checkpoint; where --wan is one network, that."""
    folders = expert_folders(wan)
    if folders:
        return folders[ROLES.index(expert)]
    if role_of(wan) not in (None, expert):
        raise UserError(f"--expert {expert} with --wan {wan}: that is the other expert")
    return wan


def encoded_set(folder):
    """The encoded set that a folder is or holds, or None."""
    return next((f for f in (Path(folder), Path(folder, "encoded")) if (f / "index.jsonl").is_file()), None)


class Loaded(NamedTuple):
    """What all stages train on."""
    dataset: data.Dataset
    validation: Validation | None
    files: list  # that sampling needs besides the network


def load_data(args, config, world):
    """-> Loaded. The toy's clips are rendered and encoded where that was not done yet, by one process on all
    cores."""
    folder, valid = encoded_set(args.data), args.valid
    if not folder:
        size, frames = (toy.WORLDS[args.config][name] for name in ("size", "frames"))
        theirs, ours = Path(args.wan or "", toy.ToyEncoders.TOKENIZER), toy.tokenizer_of(args.data)
        if args.wan and theirs.is_file() and theirs.read_bytes() != ours.read_bytes():
            raise UserError(f"--wan {args.wan} reads captions with another tokenizer than this toy world's: "
                            "train a base for it, as measure/README.md says")
        threads = torch.get_num_threads()
        if world.size > 1 and world.device.type == "cpu":
            torch.set_num_threads(CORES)
        folder = toy.training_set(args.data, size, frames, args.clips, args.pairs, args.mask,
                                  described=args.described)
        valid = valid or toy.training_set(args.data, size, frames, (VALID_CLIPS,) * 2, seed=toy.VALID_SEED)
        torch.set_num_threads(threads)
    files = list(folder.glob(toy.ToyEncoders.TOKENIZER))  # which sampling needs
    dataset = data.Dataset(folder, front_only=args.front_only)
    dataset.check(config)
    if args.mv2id and dataset.settings["mask"] != args.mask:
        raise UserError(f"{folder} was encoded with --mask {dataset.settings['mask']}, not {args.mask}")
    validation = valid and load_validation(valid, config, world, dataset)
    return Loaded(dataset, validation, files)


def load_validation(folder, config, world, training):
    """The Validation on an encoded set. training: the Dataset that is trained on"""
    dataset = data.Dataset(folder, text_dropout=0)
    dataset.check(config)
    return Validation(dataset, data.GIVEN, world, training)


def main(argv=None):
    args = arguments(argv)
    kernels_in_use = use_fused(False if args.no_fused else None)
    world = World.join()
    with world.one_voice():  # what can be refused is refused here, before minutes of rendering
        stages, config = resolve(args, world)
        check_existing(stages, args)
        start = prepare(stages[0], args, config, world)
        probe_writable(args.out)
        if not args.data.is_dir():
            probe_writable(args.data)
    with lock(args.out) if world.rank == 0 else contextlib.nullcontext():
        if world.rank == 0:
            values = {name: value for name, value in vars(args).items()
                      if value is not None and value is not False}
            print(f"{config}\n{', '.join(f'{name} {value}' for name, value in values.items())}\n{world.size} "
                  f"process(es) x {args.batch // world.size // args.micro_batch} micro-steps on "
                  f"{world.device}, {kernels_in_use}", flush=True)
            if args.expert:
                print(f"{args.expert} expert: {args.levels.share():.0%} of all noise levels are its own, "
                      f"{'from' if args.expert == 'high' else 'below'} t = {1000 * args.boundary:g}")
            if world.size == 1 and world.device.type == "cpu" and CORES > 1 and args.batch % 2 == 0:
                print("two processes would be faster here: torchrun --nproc-per-node 2 train.py ...")
            loaded = load_data(args, config, world)  # it renders and encodes first, for the other ranks too
            for number in stages:
                stage = stage_of(number, args)
                print(f"stage {number}: {args.steps[number - 1]} steps, {stage}\n"
                      f"  {loaded.dataset.sampler.describe(stage, args.batch)}", flush=True)
            if args.overwrite:  # all now: a later stage of the old run would pass for newer
                for number in reversed(stages):
                    for step in reversed(steps_in(args.out / f"stage{number}")):
                        delete_checkpoint(step)  # its log goes too; all else may be the user's
                    (args.out / f"stage{number}" / "metrics.jsonl").unlink(missing_ok=True)
        world.barrier()
        if world.rank:
            loaded = load_data(args, config, world)
        stop = stop_on_signal(world)
        for number in stages:
            start = start or prepare(number, args, config, world)
            train_stage(number, start, args, loaded, world, stop)
            start = None
            gc.collect()  # sharded networks hold references to themselves
            if stop():
                break
    world.leave()
    newest = find_checkpoint(args.out) if world.rank == 0 else None
    if signal.SIGINT in stop.received:  # then what was to follow, as `train.py && sample.py`, does not
        if world.rank:
            sys.exit(130)
        raise KeyboardInterrupt(f"stopped: {newest} is saved, --resume goes on")
    if newest and stop.received:
        print(f"stopped: {newest} is saved, --resume goes on")
    elif newest:
        print(f"the newest checkpoint is {newest}; {following(args, config)}")


def following(args, config):
    """What to type after a training that ended."""
    if args.expert:
        return f"`python sample.py --ckpt {args.out.parent}` needs the other expert beside it"
    what = ' --refs ann_front.png ann_left.png --prompt "..."' if config.is_wan else ""
    return f"now `python sample.py --ckpt {args.out}{what}`"


if __name__ == "__main__":
    run_script(main, "--recompute or --micro-batch 1")
