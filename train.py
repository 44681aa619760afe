"""Train HarmoView, stage by stage (Progressive View Curriculum).

  python train.py --stage all                      the toy world, all four stages
  torchrun --nproc-per-node 8 train.py --stage 2   one stage on several processes;
                                                   it starts from the stage before

A run writes OUT/stageN/step-NNNNNN/ folders (model, EMA, optimizer, checkpoint.json), metrics.jsonl and a
sample sheet per stage. Everything random in a step comes from (seed, stage, step, sample), so a resumed run
repeats the uninterrupted one bit for bit, and any split of the global batch into ranks and micro-batches sees
the same samples.
"""
import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# before torch starts its threads: beside another busy process, spinning ones made a toy step ten times longer
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from kernels import use_fused
from model import (CONFIGS, HarmoView, autocast, find_checkpoint, load_checkpoint, load_tensors, load_wan,
                   random_inputs, read_meta, report_speed, save_checkpoint, uses_bf16)
from rope import LAYOUTS, VIEWS, UserError, run_script


@dataclass(frozen=True)
class Stage:
    name: str
    people: tuple  # how many people a clip shows, drawn per step
    views: str  # references: "none", "front" or "all"
    drop: tuple  # probability that a non-frontal view is left out, at the stage's start and end
    drop_front: float  # the same for the front; the last view left is never dropped
    all_drop: float  # probability of a step without any reference: the null condition of guidance
    lr: tuple  # times the recipe's learning rate, at the stage's start and end


STAGES = {
    1: Stage("t2v", (1, 2), "none", (0, 0), 0, 0, (1, 1)),
    2: Stage("single", (1,), "front", (0, 0), 0, 0.1, (1, 1)),
    3: Stage("multi", (1,), "all", (0.5, 0.2), 0.1, 0.1, (1, 1)),
    4: Stage("harmony", (1, 2), "all", (0.1, 0.1), 0.1, 0.1, (0.8, 0.02)),
}
RECIPES = {  # per config: steps of each stage, global batch, peak learning rates, timestep shift
    # shift 100 for the toy: less noise still shows how the head is turned, so the caption is not read (+1 dB)
    "tiny": dict(steps=(2, 2, 2, 2), batch=4, muon_lr=16e-3, adamw_lr=3e-3, shift=100.0),
    "toy": dict(steps=(30, 40, 600, 500), batch=16, muon_lr=16e-3, adamw_lr=4e-3, shift=100.0),
    "toy64": dict(steps=(1000, 1500, 2500, 5000), batch=32, muon_lr=8e-3, adamw_lr=1e-3, shift=100.0),
    # full fine-tuning from --wan; what others use for Wan, not measured here
    "1.3b": dict(steps=(500, 2000, 4000, 4000), batch=8, muon_lr=2e-4, adamw_lr=1e-5, shift=5.0),
    "14b": dict(steps=(500, 2000, 4000, 4000), batch=8, muon_lr=2e-4, adamw_lr=1e-5, shift=5.0),
}


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run = p.add_argument_group("run").add_argument
    run("--stage", default="all", help="1, 2, 3, 4 or all (default)")
    run("--config", default="toy", choices=CONFIGS, help="a preset of model.CONFIGS and its recipe")
    run("--out", default=None, help="folder of the run (default out/CONFIG)")
    run("--data", default="cache", help="folder for rendered or encoded training data")
    run("--clips", type=int, nargs=2, metavar=("ONE", "TWO"),
        help="toy clips to render, with one person and with two (default: the config's)")
    run("--wan", metavar="DIR", help="a Wan checkpoint's folder: the first stage trained starts from its "
        "transformer, and the configs 1.3b and 14b use its encoders")
    run("--resume", action="store_true", help="go on from the newest checkpoint of each stage")
    run("--overwrite", action="store_true", help="start the stages afresh where checkpoints exist")
    run("--seed", type=int, default=0)
    opt = p.add_argument_group("optimization").add_argument
    opt("--steps", type=int, nargs="+", help="steps of each stage: one number for all, or four")
    opt("--batch", type=int, help="global batch size: all ranks, all micro-steps")
    opt("--micro-batch", type=int,
        help="samples per forward on a rank (default: its whole share, half of it on a CPU)")
    opt("--muon-lr", type=float, help="peak learning rate of Muon")
    opt("--adamw-lr", type=float, help="peak learning rate of AdamW")
    opt("--optimizer", choices=("muon", "adamw"),
        help="muon: on the blocks' matrices, AdamW on the rest (default; adamw for Wan's networks)")
    opt("--warmup", type=int, default=30, help="steps of linear warm-up per stage")
    opt("--weight-decay", type=float, default=0.01)
    opt("--clip", type=float, default=1.0, help="largest gradient norm")
    opt("--ema", type=float, default=0.995, help="decay of the averaged weights, reached gradually")
    opt("--shift", type=float, help="timestep shift: more than 1 trains more on noisy steps")
    opt("--precision", choices=("auto", "bf16", "fp32"), default="auto",
        help="matmuls under autocast; auto: bf16 if fast here")
    opt("--recompute", action="store_true",
        help="of a block hold attention's output alone, the rest is made again going backward")
    opt("--no-fused", action="store_true", help="PyTorch's operations in the place of the Triton kernels")
    opt("--compile", action="store_true", help="torch.compile every block (needs a C++ compiler or a GPU)")
    method = p.add_argument_group("method").add_argument
    method("--no-mfi", action="store_true", help="without Multi-level Feature Injection")
    method("--rope-layout", choices=LAYOUTS, help="positions of references (default jump)")
    method("--rope-jump", type=int, help="Jump-RoPE's gap between identities, in frames")
    method("--proxy-tokens", type=int, help="learnable tokens for a missing view; 0 leaves it out")
    method("--pairs", choices=("cross", "in"), default="cross",
           help="references from elsewhere or from the clip itself")
    method("--no-curriculum", action="store_true",
           help="stage 4's clips and references from the first step on; steps as in the stages")
    method("--front-only", action="store_true", help="no view but the front is ever given")
    method("--mask", type=float, default=0.0,
           help="region masking: fraction of each reference hidden (Mv2ID: 0.6)")
    speed = p.add_argument_group("speed").add_argument
    speed("--bench", action="store_true",
          help="time steps on random latents, one person with all views, and stop")
    speed("--bench-frames", type=int, help="frames of its clips (default: the config's)")
    speed("--bench-size", type=int, nargs=2, metavar=("H", "W"),
          help="pixels of its clips (default: the config's)")
    log = p.add_argument_group("logging").add_argument
    log("--save-every", type=int, default=500,
        help="steps between checkpoints; the stage's last step is always saved")
    log("--keep", type=int, default=2, help="checkpoints kept per stage")
    log("--log-every", type=int, default=10, help="steps between lines of metrics.jsonl")
    log("--no-samples", action="store_true", help="no sample sheet at the end of a stage")
    return p.parse_args(argv)


def seed_of(*key):
    """A number for seeding generators from a tuple of numbers: equal keys, equal draws, on any machine."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, made orthogonal, for matrices. The updates of torch.optim.Muon
    with adjust_lr_fn="match_rms_adamw", but all matrices of a shape at once, and on a CPU in their own dtype:
    torch takes them one by one in bf16, 34 % of a toy step without bf16 hardware, where this takes 8 %."""

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, same in shapes.items():
                for p in same:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                grads, momenta = [p.grad for p in same], [self.state[p]["momentum_buffer"] for p in same]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
                updates = orthogonalize(torch.stack(nesterov)).unbind()
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(same, updates, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonalize(x, iterations=5):
    """The nearest semi-orthogonal matrix of each of x [n, A, B], roughly: Newton-Schulz, Muon's quintic."""
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT, iterations).mT
    y = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    y = y.bfloat16() if x.is_cuda else y  # a GPU multiplies it an order of magnitude faster than float32
    for _ in range(iterations):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), y, beta=3.4445)
    return y.to(x.dtype)


def make_optimizers(model, args):
    """Muon on the blocks' matrices where asked (AdamW's loss in a third of the steps), AdamW on the rest."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and p.requires_grad]
    matrices = matrices if args.optimizer == "muon" else []
    chosen = {id(p) for p in matrices}
    rest = [p for p in trained if id(p) not in chosen]
    rest = {"params": rest, "peak_lr": args.adamw_lr}
    adamw = torch.optim.AdamW([rest], args.adamw_lr, betas=(0.9, 0.95), weight_decay=args.weight_decay,
                              fused=True)
    if not matrices:
        return [adamw]
    matrices = {"params": matrices, "peak_lr": args.muon_lr}
    return [adamw, Muon([matrices], args.muon_lr, args.weight_decay)]


def pack_optimizers(optimizers):
    """The optimizers' states as a flat dict of tensors, for safetensors; unpack_optimizers puts them back."""
    return {f"{o}.{p}.{name}": value for o, optimizer in enumerate(optimizers)
            for p, state in optimizer.state_dict()["state"].items() for name, value in state.items()}


def unpack_optimizers(optimizers, packed):
    states = [{} for _ in optimizers]
    for key, value in packed.items():
        o, p, name = key.split(".")
        states[int(o)].setdefault(int(p), {})[name] = value
    for optimizer, state in zip(optimizers, states):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


@dataclass(frozen=True)
class World:
    """This process among the others."""
    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls):
        """Under torchrun the process group of its environment (nccl on GPUs, gloo else), alone without it."""
        size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if size > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return cls(int(os.environ.get("RANK", 0)), size, device)

    def barrier(self):
        if self.size > 1:
            dist.barrier()


def resolve(args, world):
    """Fill in what the recipe decides and check what must fit together -> stages to train, DiTConfig."""
    recipe = RECIPES[args.config]
    wan_sized = CONFIGS[args.config].in_dim == 16
    args.optimizer = args.optimizer or ("adamw" if args.wan or wan_sized else "muon")
    args.out = Path(args.out or f"out/{args.config}")
    for name in ("batch", "muon_lr", "adamw_lr", "shift", "warmup", "save_every", "keep", "log_every"):
        if getattr(args, name) is None:
            setattr(args, name, recipe[name])
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected more than 0")
    args.steps = list(args.steps or recipe["steps"])
    args.steps = args.steps * len(STAGES) if len(args.steps) == 1 else args.steps
    if len(args.steps) != len(STAGES) or min(args.steps) < 1:
        raise UserError(f"--steps {' '.join(map(str, args.steps))}: "
                        "expected one positive number, or four, one a stage")
    args.clips = list(args.clips or data.WORLDS[args.config]["clips"])
    if min(args.clips) < 1:
        raise UserError(f"--clips {' '.join(map(str, args.clips))}: expected two positive numbers")
    if not data.is_seed(args.seed):
        raise UserError(f"--seed {args.seed}: expected 0 to 2**63 - 1")
    if args.micro_batch is None:
        halves = side_by_side(world) and args.batch % 2 == 0
        args.micro_batch = args.batch // world.size // (2 if halves else 1)
    if args.micro_batch < 1 or args.batch % (world.size * args.micro_batch):
        raise UserError(f"--batch {args.batch} is no multiple of {world.size} process(es) x "
                        f"--micro-batch {args.micro_batch}")
    if not 0 <= args.mask < 1:
        raise UserError(f"--mask {args.mask}: expected a fraction from 0 to below 1")
    if args.resume and args.overwrite:
        raise UserError("--resume goes on, --overwrite starts afresh: give one of them")
    if args.stage != "all" and args.stage not in map(str, STAGES):
        raise UserError(f"--stage {args.stage}: expected {', '.join(map(str, STAGES))} or all")
    changes = {name: getattr(args, name) for name in ("rope_layout", "rope_jump", "proxy_tokens")}
    changes |= {"vit_dim": 0, "vit_levels": 0} if args.no_mfi else {}
    config = replace(CONFIGS[args.config], **{k: v for k, v in changes.items() if v is not None})
    if wan_sized and not args.wan and not args.bench:
        raise UserError(f"--config {args.config} trains on Wan's latents: "
                        "give --wan DIR, the folder of a Wan checkpoint")
    return list(STAGES) if args.stage == "all" else [int(args.stage)], config


def refuse_to_lose(stages, args):
    """UserError where a stage's checkpoint would be lost unasked, or would go on beside one before it that is
    yet to train."""
    later = None
    for number in reversed(stages):
        own = find_checkpoint(args.out / f"stage{number}")
        if own and not (args.resume or args.overwrite):
            raise UserError(f"{own} exists: --resume goes on from it, --overwrite starts the stage afresh, "
                            "--out chooses another folder")
        if args.resume and later and (own is None or read_meta(own)["step"] < args.steps[number - 1]):
            raise UserError(f"{later} started from stage {number} before its {args.steps[number - 1]} steps: "
                            "give the --steps it had, or --overwrite, or another --out")
        later = own or later


def flags_of(args):
    """The flags that decide what a step does."""
    names = ("seed", "batch", "muon_lr", "adamw_lr", "optimizer", "warmup", "weight_decay", "clip", "ema",
             "shift", "clips", "pairs", "mask", "no_curriculum", "front_only")
    return {name: getattr(args, name) for name in names}


def prepare(number, args, config, world):
    """Model, EMA, optimizers and first step of a stage: from its own checkpoint with --resume, from the stage
    before's EMA, from --wan, or from nothing. Raises UserError where the stage before is missing or not
    finished, and where a checkpoint was trained with other flags."""
    again = f"--config {args.config} --out {args.out}"
    own = find_checkpoint(args.out / f"stage{number}") if args.resume else None
    before, start = find_checkpoint(args.out / f"stage{number - 1}"), 0
    if number > 1 and not (own or before or args.wan):
        raise UserError(f"stage {number} starts from stage {number - 1}, and {args.out}/stage{number - 1} "
                        f"holds no checkpoint: run `python train.py --stage {number - 1} {again}` first")
    if before and not own and not (meta := read_meta(before))["finished"]:
        raise UserError(f"stage {number} needs stage {number - 1}, which stopped at step {meta['step']}: "
                        f"`python train.py --stage {number - 1} {again} --resume` finishes it")
    torch.manual_seed(args.seed)  # for what is new in the model
    if own or before:
        model, meta = load_checkpoint(own or before, "model" if own else "ema")
        start = meta["step"] if own else 0
        there, here = meta["config"], asdict(config)
        if own:  # a stage may have flags of its own, but not two halves of one stage
            there, here = there | meta.get("flags", {}), here | flags_of(args)
        differ = [f"{name} {value} there, {here[name]} here" for name, value in there.items()
                  if name in here and here[name] != value]
        if differ:
            raise UserError(f"{own or before} was trained otherwise ({'; '.join(differ)}): "
                            "give the same flags, or another --out")
    elif args.wan:
        with torch.device("meta"):
            model = HarmoView(config)
        absent = load_wan(model, args.wan)
        if world.rank == 0:
            print(f"{args.wan}: loaded; new are {', '.join(absent) or 'no parameters'}")
    else:
        model = HarmoView(config)
    model.to(world.device)
    optimizers = make_optimizers(model, args)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    if own:
        unpack_optimizers(optimizers, load_tensors(own, "optimizer"))
        for name, saved in load_tensors(own, "ema").items():
            ema[name].copy_(saved)
    return model, ema, optimizers, start


def loss_of(model, batch, sigma, noise):
    """Mean squared error of the velocity noise - x0 at x_t = (1 - sigma) x0 + sigma noise,
    sigma [B] in 0..1."""
    x0, text, refs, vit = batch
    s = sigma.view(-1, 1, 1, 1, 1)
    return F.mse_loss(model((1 - s) * x0 + s * noise, 1000 * sigma, text, refs, vit), noise - x0)


def noise_of(x0, generators, shift):
    """Each sample's sigma (logit-normal, shifted) and noise from its own generator."""
    u = torch.stack([torch.randn((), generator=g) for g in generators]).sigmoid()
    noise = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators])
    return (shift * u / (1 + (shift - 1) * u)).to(x0.device), noise.to(x0.device)


def side_by_side(world):
    """On CPUs two micro-batches in two threads are faster than one after the other on all cores, whose
    threads wait for each other in every small operation (a toy step then takes 0.7 to 0.8 of the time)."""
    return world.size == 1 and world.device.type == "cpu" and torch.get_num_threads() > 1


def speed_up(model, args):
    """What --recompute and --compile ask of the blocks; their parameters keep their names."""
    model.recompute = args.recompute
    if args.compile:
        model.compile_blocks()


def train_stage(number, prepared, args, dataset, world, stop):
    """One stage from its first to its last step, unless stop() ends it early, after saving.
    prepared: what prepare(number, ...) gave."""
    stage, steps, folder = STAGES[number], args.steps[number - 1], args.out / f"stage{number}"
    if args.no_curriculum:
        stage = replace(STAGES[len(STAGES)], lr=stage.lr)
    model, ema, optimizers, start = prepared
    if start >= steps:
        return
    share = args.batch // world.size  # samples per rank and step
    metrics = open_metrics(folder, start) if world.rank == 0 else None

    def save(step):
        meta = {"config": asdict(model.config), "preset": args.config,
                "world": {k: data.WORLDS[args.config][k] for k in ("size", "frames")}, "stage": number,
                "name": stage.name, "step": step, "finished": step == steps, "command": " ".join(sys.argv),
                "flags": flags_of(args)}
        if model.config.in_dim == 16:
            meta["wan"] = str(wan_root(args))
        tensors = {"model": model.state_dict(), "ema": ema, "optimizer": pack_optimizers(optimizers)}
        save_checkpoint(folder / f"step-{step:06d}", tensors, meta, dataset.files, keep=args.keep)

    speed_up(model, args)
    wrapped = model  # DDP wraps last, so that no saved key carries its prefix
    if world.size > 1:  # a step's layout leaves some proxies or MFI unused, the same on all ranks
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=f"stage {number} {stage.name}",
               disable=None if world.rank == 0 else True,
               bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
                          "[{elapsed}, {remaining} left, {rate_fmt}{postfix}]")
    parameters, threads = list(model.parameters()), None
    if side_by_side(world) and args.micro_batch < share:
        threads = ThreadPoolExecutor(2, initializer=torch.set_num_threads,
                                     initargs=(max(1, torch.get_num_threads() // 2),))
    skipped, began = 0, time.perf_counter()
    for step in bar:
        # learning rate
        progress = step / steps
        factor = min(1, (step + 1) / args.warmup) * (stage.lr[0] + (stage.lr[1] - stage.lr[0]) * progress)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        # micro-steps
        layout = data.draw_layout(stage, progress, random.Random(seed_of(args.seed, number, step)))
        starts = range(world.rank * share, (world.rank + 1) * share, args.micro_batch)

        def micro_step(first, step=step, layout=layout, last=starts[-1]):
            """Loss of the samples from `first` on; its gradients go to .grad, or are returned to a thread's
            caller."""
            generators = [torch.Generator().manual_seed(seed_of(args.seed, number, step, i))
                          for i in range(first, first + args.micro_batch)]
            batch = dataset.batch(layout, generators, world.device)
            sigma, noise = noise_of(batch[0], generators, args.shift)
            synchronize = world.size == 1 or first == last
            with contextlib.nullcontext() if synchronize else wrapped.no_sync():
                with autocast(world.device, args.precision):
                    loss = loss_of(wrapped, batch, sigma, noise) * (args.micro_batch / share)
                if threads:
                    return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)
                loss.backward()
            return loss.detach(), ()
        total = torch.zeros((), device=world.device)
        for loss, grads in (threads.map if threads else map)(micro_step, starts):
            total += loss
            for p, g in zip(parameters, grads):
                if g is not None:
                    p.grad = g if p.grad is None else p.grad + g
        # clip, step, EMA
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        if torch.isfinite(norm):
            skipped = 0
            for optimizer in optimizers:
                optimizer.step()
            decay = min(args.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(ema.values()), [p.detach() for p in model.parameters()], 1 - decay)
        else:  # every rank sees the same summed gradient, so every rank skips
            skipped += 1
            tqdm.write(f"stage {number} step {step}: gradient norm {float(norm)}; "
                       "step skipped, no weight changed")
            if skipped == 10:
                raise UserError(f"stage {number}: 10 steps in a row without a finite gradient, "
                                f"the last one {step}; try smaller learning rates")
        for optimizer in optimizers:
            optimizer.zero_grad()
        # log and save
        if (step + 1) % args.log_every == 0 or step + 1 == steps:
            if world.size > 1:
                dist.all_reduce(total)
            if metrics:
                row = dict(stage=number, step=step + 1, loss=float(total) / world.size,
                           grad_norm=float(norm), lr_factor=factor)
                print(json.dumps(row), file=metrics, flush=True)
                bar.set_postfix_str(f"loss {row['loss']:.4f}")
        stopping = stop()
        if (step + 1) % args.save_every == 0 or step + 1 == steps or stopping:
            if world.rank == 0:
                save(step + 1)
            world.barrier()
        if stopping:
            return
    if world.rank == 0:
        minutes = (time.perf_counter() - began) / 60
        print(f"stage {number} {stage.name}: steps {start + 1} to {steps} in {minutes:.1f} min, "
              f"loss {float(total) / world.size:.4f}", flush=True)


def open_metrics(folder, start):
    """metrics.jsonl of a stage, open for appending; lines after step `start`, from a run that went further,
    are dropped."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))
    return open(path, "a")


def stop_on_sigterm(world):
    """A function that says whether any rank has been asked to end; all ranks must call it together."""
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))

    def stop():
        flag = torch.tensor(float(bool(asked)), device=world.device)
        if world.size > 1:
            dist.all_reduce(flag)
        return bool(flag)
    return stop


def bench(args, config, world):
    """Training steps on random latents: forward, backward, clipping and optimizers."""
    clip = data.WORLDS[args.config]
    shape = data.latent_shape(config.in_dim, args.bench_frames or clip["frames"],
                              args.bench_size or (clip["size"], clip["size"]))
    with world.device:
        model = HarmoView(config)
    speed_up(model, args)
    optimizers = make_optimizers(model, args)
    x, t, text, refs, vit = random_inputs(config, shape, args.micro_batch, world.device)
    noise = torch.randn_like(x)

    def step():
        with autocast(world.device, args.precision):
            loss_of(model, (x, text, refs, vit), t / 1000, noise).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    report_speed(step, model, shape, args.micro_batch, 3, world.device)


def wan_root(args):
    """Where --wan's encoders are: beside the transformer, or a folder up where it is one of two experts."""
    folder = Path(args.wan).resolve()
    return folder if any(folder.glob("models_t5*")) else folder.parent


def main(argv=None):
    args = arguments(argv)
    kernels_in_use = use_fused(False if args.no_fused else None)
    world = World.join()
    stages, config = resolve(args, world)
    if args.bench:
        print(kernels_in_use)
        return bench(args, config, world)
    # what can be refused is refused here, before minutes of rendering
    refuse_to_lose(stages, args)
    prepared = prepare(stages[0], args, config, world)
    data.probe_writable(args.out)
    data.probe_writable(args.data)
    views = VIEWS[:1] if args.front_only else VIEWS if args.pairs == "cross" else data.IN_PAIR_VIEWS
    encoders = None
    if config.in_dim == 16:
        dtype = torch.bfloat16 if uses_bf16(world.device) else torch.float32
        encoders = data.WanEncoders(wan_root(args), world.device, dtype)

    def load_data():
        toy = data.WORLDS[args.config] | {"clips": args.clips}
        folder = data.build_cache(args.data, **toy, pairs=args.pairs)
        if encoders:
            return data.LatentData(data.encode_cache(folder, encoders, args.mask), views)
        return data.ToyData(folder, toy["size"], views, args.mask)
    if world.rank == 0:
        print(f"{args.config}: {config}\n"
              f"steps {args.steps} (stages {stages}), batch {args.batch} = {world.size} process(es) x "
              f"{args.micro_batch} x {args.batch // world.size // args.micro_batch} micro-steps, "
              f"clips {args.clips}, "
              f"{args.optimizer} {args.muon_lr}, adamw {args.adamw_lr}, shift {args.shift}, {args.precision} "
              f"on {world.device}, {kernels_in_use}")
        load_data()  # what it renders and encodes, it leaves for the other ranks
    world.barrier()
    dataset = load_data()
    stop = stop_on_sigterm(world)
    for number in stages if args.overwrite and world.rank == 0 else ():  # all now: they would pass for newer
        shutil.rmtree(args.out / f"stage{number}", ignore_errors=True)
    for number in stages:
        train_stage(number, prepared or prepare(number, args, config, world), args, dataset, world, stop)
        prepared = None
        if stop():
            break
        # what a user would run; a process of its own, since sample.py is above this file
        if world.rank == 0 and not args.no_samples and config.in_dim != 16:  # Wan's need a prompt
            sheet = args.out / f"stage{number}"
            subprocess.run([sys.executable, Path(__file__).with_name("sample.py"),
                            "--ckpt", sheet, "--out", sheet / "sample"], check=False)
    if world.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
