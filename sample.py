"""Make videos from a caption and reference pictures.

  python sample.py          people the toy never saw, from the newest checkpoint
  python sample.py --refs a_front.png a_left.png --refs b_front.png --prompt "a close-up of two people, ..."
  python sample.py --ckpt ckpts/Wan2.1-T2V-1.3B --prompt "..."      a Wan checkpoint, plain text-to-video
  torchrun --nproc-per-node 8 sample.py --prompts prompts.jsonl     the prompts split over 8 GPUs

One --refs per person, in the caption's order. A file's view is the word front, left, right or back in its
name, or view=path. Writes OUT.mp4 and OUT.png, a contact sheet with the references on the left and the frames
on the right.
"""
import contextlib
import functools
import itertools
import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import default_collate

import data
from kernels import use_fused
from model import DiTConfig, load_checkpoint, load_wan, on_meta
from networks.encoders import NEGATIVE_PROMPT, WanEncoders, stream_blocks
from networks.lora import apply_lora, check_loras, read_lora_argument
from networks.solvers import SOLVERS, solver_steps
from networks.weights import ROLES, boundary_of, check_base, expert_folders, find_wan, role_of, wan_files
from rope import VIEWS
from support.checkpoints import check_files, find_checkpoint, read_meta, save_checkpoint
from support.processes import Ulysses, World, compile_blocks
from support.script import (ROOT, Parser, UserError, autocast, count, fingerprint, frame_rate, in_range, lock,
                            nonempty, probe_writable, progress, run_script, seed_number, source_hash,
                            uses_bf16)
from videos import toy
from videos.jobs import (Job, name_references, note_of, notes_in, output_files, read_jobs, read_references,
                         swapped, write_round)
from videos.pictures import frame_count, picture_size

# Defaults by kind of checkpoint: of two guidance scales the first is for high noise, and guide_refs None is
# the caption's scale. The toy's were chosen on its benchmark (LOG.md), Wan's are its authors'.
SAMPLE_RECIPES = {
    "toy": dict(steps=4, shift=100.0, solver="euler", guide_text=(1.0,), guide_refs=1.0, fps=4, negative=""),
    "wan2.1": dict(steps=50, shift=5.0, solver="unipc", guide_text=(5.0,), guide_refs=None, fps=16,
                   negative=NEGATIVE_PROMPT),
    "wan2.2": dict(steps=40, shift=12.0, solver="unipc", guide_text=(4.0, 3.0), guide_refs=None, fps=16,
                   negative=NEGATIVE_PROMPT),
}
BOUNDARY = 0.875  # where Wan2.2's experts change, as a share of t's range
# what a video depends on, besides what it is made of: a change of these files may change it
VIDEO_CODE = ("data", "kernels", "model", "networks/encoders", "networks/lora", "networks/solvers",
              "networks/text", "rope", "sample", "videos/jobs", "videos/pictures", "videos/toy")
ROUND = 16  # videos that are made together, one network after the other, and written before the next ones


# -------------------------------------------------------------------------------------------------- guidance
def guided(model, text, no_text, references, recipe, boundary=0.0):
    """velocity(x, t) with two guidance scales: from nothing to the caption, and from the caption to
    caption and references.

    v = v(-, -) + guide_text * (v(text, -) - v(-, -)) + guide_refs * (v(text, refs) - v(text, -)), where "no
    references" is every view missing and "no caption" the text tokens no_text. Written as one weighted
    sum, terms of weight 0 cost nothing. Without a single reference, or with refs None (plain Wan), v(text, -)
    gets weight 0: Wan's guidance.

    text, no_text  [B, S, E], [1, S, E]          references  refs and vit, as HarmoView.forward takes them
    recipe         guide_text and guide_refs; of two scales in guide_text the first is for high noise
    """
    refs, vit = references
    no_refs = refs and [{} for _ in refs]
    no_vit = vit and [None for _ in vit]
    # each with a cache of its own, since references read the caption too
    terms = (text, refs, vit, {}), (text, no_refs, no_vit, {}), (no_text, no_refs, no_vit, {})

    def velocity(x, t):
        high_noise = t >= 1000 * boundary
        guide_text = recipe["guide_text"][0] if high_noise else recipe["guide_text"][-1]
        guide_refs = recipe["guide_refs"]
        if guide_refs is None or not any(refs or ()):
            guide_refs = guide_text
        weights = guide_refs, guide_text - guide_refs, 1 - guide_text
        return sum(weight * model(x, t.expand(len(x)), tokens.expand(len(x), -1, -1), *others)
                   for weight, (tokens, *others) in zip(weights, terms) if weight)
    return velocity


class Experts:
    """One network, or Wan2.2's two: the first for t >= 1000 * boundary, the second below. Each is loaded when
    it is first asked, and only one is in memory. Called like HarmoView; a kv_cache holds what the network in
    memory has computed.
    load: one function a network, () -> HarmoView on the device."""

    def __init__(self, load, config, device, boundary=0.0, precision="auto"):
        self.load, self.config, self.device = load, config, device
        self.boundary, self.precision = boundary, precision
        self.current = self.network = None

    def at(self, t):
        """Which network works at time t: 0, the one for high noise, or 1."""
        return int(float(t) < 1000 * self.boundary)

    def __call__(self, x, t, text, refs=None, vit=None, kv_cache=None):
        needed = self.at(t[0])
        if needed != self.current:
            self.drop()
            self.network, self.current = self.load[needed](), needed
        if kv_cache is not None:
            if needed not in kv_cache:
                kv_cache.clear()
            kv_cache = kv_cache.setdefault(needed, {})
        return self.network(x, t, text, refs, vit, kv_cache)

    def drop(self):
        self.current = self.network = None
        torch.cuda.empty_cache()


# ----------------------------------------------------------------------------------------------- the pipeline
def encode_references(encoders, batches, with_vit, device):
    """refs and vit, as HarmoView.forward takes them, of each batch of jobs with the same views. All latents
    first, then all features, so that each encoder loads once."""
    if batches[0][0].references is None:  # plain Wan
        return [(None, None) for _ in batches]
    # of each batch: one {view: pictures [B, 3, h, w]} per person
    stacked = [default_collate([job.references for job in jobs]) for jobs in batches]
    refs, vit = [], []
    for people in stacked:
        refs.append([{view: encoders.encode(pictures[:, :, None])[:, :, 0].to(device)
                      for view, pictures in views.items()} for views in people])
    for people in stacked:
        vit.append([None for _ in people])
        for k, views in enumerate(people):
            if with_vit and "front" in views:
                vit[-1][k] = encoders.features(views["front"]).to(device)
    return list(zip(refs, vit))


@torch.no_grad()
def generate(model, encoders, jobs, recipe, frames, batch=1):
    """The videos of these jobs, [3, frames, H, W] in -1..1 each. Captions, references, denoising, decoding:
    one network after the other is in memory. A video's noise depends on its own seed only.
    model is an Experts, recipe a row of SAMPLE_RECIPES. All jobs have one size, and every `batch` neighbours
    have the same views and share a forward."""
    parts = [jobs[i:i + batch] for i in range(0, len(jobs), batch)]
    # each part alone: padded to a longer caption's length, a short one's last digits would differ
    text = [encoders.text([job.prompt for job in part]).to(model.device) for part in parts]
    no_text = encoders.text([recipe["negative"]]).to(model.device)
    encoded = encode_references(encoders, parts, model.config.vit_dim > 0, model.device)
    shape = encoders.latent_shape(frames, jobs[0].size)
    noise = data.noise_of(shape, [torch.Generator().manual_seed(job.seed) for job in jobs]).to(model.device)
    path = recipe["steps"], recipe["shift"], recipe["solver"]
    solutions = [solver_steps(x, *path) for x in noise.split(batch)]
    states = [next(solution) for solution in solutions]  # x and t of each part
    bar = progress(None, "sampling", "steps", total=len(jobs) * recipe["steps"])

    def denoise(i, expert):
        """The steps of part i that an expert makes; what references keep for them goes when it ends."""
        velocity = guided(model, text[i], no_text, encoded[i], recipe, model.boundary)
        x, t = states[i]
        while t is not None and model.at(t) == expert:
            x, t = solutions[i].send(velocity(x, t))
            bar.update(len(x))
        if t is None:
            solutions[i].close()  # it holds six latents
        states[i] = x, t
    with bar, autocast(model.device, model.precision):
        for expert in range(len(model.load)):  # each loads once
            for i in range(len(parts)):
                denoise(i, expert)
    latents = torch.cat([x for x, _ in states]).cpu()
    if not isinstance(encoders, toy.ToyEncoders):
        model.drop()  # room for the VAE
    videos = [encoders.decode(latent[None])[0].cpu() for latent in latents]
    if not all(values.isfinite().all() for values in (latents, *videos)):  # decode clamps an infinite latent
        raise UserError("the video is not finite: a network's weights are damaged or have diverged, "
                        "or guidance is too strong")
    return videos


# ------------------------------------------------------------------------------------------------ checkpoints
@dataclass
class Checkpoint:
    """What --ckpt names. No weights are read for it."""
    path: str
    networks: list  # folders, each a checkpoint of train.py or a Wan transformer; two for Wan2.2
    config: DiTConfig
    kind: str  # a key of SAMPLE_RECIPES
    meta: dict  # checkpoint.json of train.py; empty for a Wan release, which has never seen references
    boundary: float = 0.0  # noise level where the first of two networks hands over to the second
    frames: int = 81  # of the videos, unless --frames and --size say something else
    size: tuple = (480, 832)

    @property
    def roles(self):
        return ROLES if len(self.networks) > 1 else (None,)


def find(path):
    """--ckpt -> Checkpoint. The folder of a checkpoint, of a run (its newest one), or of a Wan release; each
    of two experts may be either. UserError where a file's names or shapes do not fit."""
    folder = Path(path)
    if folder.is_file() and is_trained(folder.parent):
        raise UserError(f"--ckpt {path} is a file of a checkpoint: give its folder, {folder.parent}")
    pair = expert_folders(folder)
    networks = [find_checkpoint(part) or part for part in pair or [folder]]
    metas = [read_meta(network) for network in networks if is_trained(network)]
    if not pair and not metas and not find_wan(folder):
        raise UserError(f"no checkpoint at {path}: make one with `python train.py --stage all`, about ten "
                        "minutes on a laptop, or give the folder of a Wan checkpoint")
    if not pair and not metas and role_of(folder):
        raise UserError(f"{path} is one of Wan2.2's two experts: give the folder that holds both")
    config, *others = [on_meta(network).config for network in networks]
    if others and others[0] != config:
        raise UserError(f"{path}: its two experts are not of one size and kind")
    ckpt = Checkpoint(path, networks, config, "wan2.1", {})
    if metas:
        ckpt.meta = metas[0]
    if pair or "expert" in ckpt.meta:
        ckpt.kind, ckpt.boundary = "wan2.2", check_experts(networks, boundary_of(folder))
    if not config.is_wan:
        toy.check_config(config)
        check_files(networks[0], [toy.ToyEncoders.TOKENIZER])
        world = toy.check_world(networks[0], ckpt.meta)
        ckpt.kind, ckpt.frames, ckpt.size = "toy", world["frames"], (world["size"], world["size"])
    return ckpt


def check_experts(networks, released):
    """The noise level between two experts: that of their training or release, or Wan2.2's. UserError where
    checkpoints of train.py are not what their folders say."""
    trained = {role: read_meta(network).get("expert", {}) for role, network in zip(ROLES, networks)
               if is_trained(network)}
    if len(networks) == 1:
        raise UserError(f"{networks[0]} is the expert for {trained[ROLES[0]].get('role')} noise only: put "
                        "both into one folder, as high_noise_model and low_noise_model")
    for role, stamp in trained.items():
        if stamp.get("role") != role:
            network = networks[ROLES.index(role)]
            raise UserError(f"{network} was trained for {stamp.get('role', 'all')} noise, its folder is that "
                            f"of the expert for {role} noise")
    if len(trained) == 1:
        raise UserError(f"only one of the experts {' and '.join(map(str, networks))} was trained: the other "
                        "has never seen references")
    boundaries = {stamp["boundary"] for stamp in trained.values()} or {released or BOUNDARY}
    if len(boundaries) > 1:
        raise UserError(f"the two experts were trained with --boundary {' and '.join(map(str, boundaries))}")
    return boundaries.pop()


def is_trained(network):
    """Is this folder a checkpoint of train.py."""
    return (network / "checkpoint.json").is_file()


def default_checkpoint():
    """The toy run of this folder, or else the toy that comes with the code."""
    return "out/toy" if find_checkpoint("out/toy") else str(ROOT / "assets/toy")


def export(path, folder):
    """The averaged weights of a checkpoint of train.py in bf16, and what sampling needs with them."""
    ckpt, folder = find(path), Path(os.path.abspath(folder))
    if len(ckpt.networks) > 1 or not ckpt.meta:
        raise UserError(f"--export: {path} is not one checkpoint of train.py")
    if os.path.lexists(folder):
        raise UserError(f"--export {folder} exists: remove it or choose another folder")
    probe_writable(folder.parent)
    source = ckpt.networks[0]
    weights = load_checkpoint(source, dtype=torch.bfloat16)[0].state_dict()
    meta = {name: value for name, value in ckpt.meta.items() if name != "base"}  # it is merged
    save_checkpoint(folder, {"ema": weights}, meta, sorted(source.glob("*.model")))
    print(f"{folder} from {source}")


class Hardware(NamedTuple):
    """How networks are held and run; flags as in `arguments`."""
    precision: str = "auto"
    offload: bool = False
    tile: int | None = None
    compile: bool = False
    ulysses: Ulysses | None = None


def load(ckpt, wan=None, hardware=Hardware(), loras=(), need_vit=False):
    """A Checkpoint -> model (an Experts) and its encoders; says which checkpoint it takes.
    wan: the folder of Wan's encoders; loras: check_loras'; need_vit: a missing ViT is an error"""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # World.join chose among GPUs
    for network in filter(is_trained, ckpt.networks):
        meta = read_meta(network)
        print(f"checkpoint {network} (stage {meta.get('stage')} {meta.get('name')}, step {meta.get('step')})")
    dtype = torch.float32
    if ckpt.kind == "toy":
        if wan or hardware.tile:
            raise UserError(f"{ckpt.path} is a toy, which has its own encoders: leave --wan and --tile out")
        encoders = toy.ToyEncoders(ckpt.networks[0], ckpt.size[0])
    else:
        if uses_bf16(device, hardware.precision):
            dtype = torch.bfloat16
        wan = wan or ckpt.meta.get("wan") or ckpt.path
        encoders = WanEncoders(wan, device, dtype, hardware.offload, hardware.tile, need_vit)
    encoders.tokenizer.max_len = ckpt.config.text_len

    def load_expert(network, role):
        encoders.drop()
        model = load_network(network, dtype)
        if not hardware.offload:
            model = model.to(device)  # where LoRAs are merged
        for file, scale, roles in loras:
            if role in roles:
                changed, unknown = apply_lora(model, file, scale, role)
                print(f"{file}: {changed} weights of {network} changed, {len(unknown)} keys fit nothing "
                      f"{', '.join(unknown[:5])}".rstrip())
        if hardware.ulysses:
            hardware.ulysses.spread(model)
        if hardware.compile:
            compile_blocks(model)
        if hardware.offload:
            stream_blocks(model, device)
        return model
    experts = [functools.partial(load_expert, *expert) for expert in zip(ckpt.networks, ckpt.roles)]
    return Experts(experts, ckpt.config, device, ckpt.boundary, hardware.precision), encoders


def load_network(network, dtype):
    """A checkpoint of train.py or a Wan transformer -> HarmoView for sampling."""
    if is_trained(network):
        model, _ = load_checkpoint(network, dtype=dtype)
    else:
        model = on_meta(network).to(dtype)
        load_wan(model, network)
    return model.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------- the jobs
def make_jobs(args, ckpt, frames, size):
    """What --prompts, --prompt, --refs, --views and --swap ask for, as Jobs whose references are files, or
    the toy's pictures."""
    views = args.views
    if views and (args.refs or args.prompts or ckpt.kind != "toy"):
        raise UserError("--views chooses among the toy's own references: "
                        "leave it out with --refs, with --prompts and for Wan")
    if ckpt.meta.get("name") == "t2v":  # a base model, or the stage, has never seen a reference
        views = views or ()
    if args.prompts:
        jobs = read_jobs(args.prompts, args.seed)
    elif args.prompt:
        jobs = [Job(args.prompt, None, args.seed, files=args.refs or [])]
    elif ckpt.kind == "toy":
        jobs = [replace(job, seed=args.seed) for job in toy.held_out(views, frames, size[0])]
        jobs = [job for job in jobs if len(job.references) == 2 or not args.swap]
    else:
        raise UserError("--prompt is missing: say what happens")
    for job in jobs:
        if job.files and not ckpt.meta:
            raise UserError("this checkpoint is plain Wan, which has never seen references: "
                            "give one that train.py made, or leave --refs out")
        job.size = size
        if job.files:
            job.references = name_references(job, ckpt.config.max_identities)
        elif job.references is None and ckpt.kind == "toy":  # people that training never saw
            cast = range(1 + ("two people" in job.prompt))
            job.references = toy.held_out_references(cast, VIEWS if views is None else views, size[0])
        elif job.references is None and ckpt.meta:
            job.references = [{}]  # one person's proxies
        if ckpt.kind == "toy":
            job.size = toy.frame_size(size[0], len(job.references))
    return swapped(jobs) if args.swap else jobs


# -------------------------------------------------------------------------------------------------------- CLI
guidance = in_range(float, -100, 100, "a number from -100 to 100")
step_count = in_range(int, 1, 1000, "1 to 1000 steps")
time_shift = in_range(float, 1e-3, 1e6, "a number from 0.001 to a million")


def recipe_flags(add):
    """Flags that override SAMPLE_RECIPES; eval.py has them too."""
    add("--steps", type=step_count, help="solver steps")
    add("--shift", type=time_shift, help="timestep shift: more than 1 spends more steps at high noise")
    add("--guide-refs", type=guidance, help="guidance to the references, 1 is none (Wan: --guide-text's)")
    add("--guide-text", type=guidance, nargs="+", help="guidance to the caption; two: at high, low noise")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where it is fast")


def with_flags(recipe, args):
    """A row of SAMPLE_RECIPES with the flags that were given."""
    given = {name: value for name, value in vars(args).items() if name in recipe and value is not None}
    if len(given.get("guide_text", ())) > len(recipe["guide_text"]):
        raise UserError(f"--guide-text got {len(args.guide_text)} numbers; "
                        "expected one, or two for a pair of experts")
    return recipe | given


def arguments(argv=None):
    p = Parser(description=__doc__)
    what = p.add_argument_group("what to show").add_argument
    what("--refs", nargs="+", action="append", type=nonempty, help="pictures of one person; once per person")
    what("--prompt", type=nonempty, help="the caption (toy, without --refs: of people it never saw)")
    what("--prompts", type=Path, help='JSONL of {"prompt": "...", "refs": [["a_front.png"]], "seed": 0}')
    what("--views", nargs="+", choices=VIEWS, help="toy, without --refs: the views that are given")
    what("--swap", action="store_true", help="again with two people's references exchanged, same noise")
    what("--ckpt", type=nonempty, help="a checkpoint, a run or a Wan release (default: out/toy, else ours)")
    what("--wan", type=nonempty, help="folder of umT5, VAE and ViT (default: --ckpt's own)")
    what("--out", default="out/sample", help="where to write, without suffix")
    how = p.add_argument_group("how (defaults by kind of checkpoint: SAMPLE_RECIPES)").add_argument
    how("--frames", type=frame_count, help="frames, for Wan 4n+1 (default: as trained; Wan 81)")
    how("--size", type=picture_size, help="HEIGHTxWIDTH in pixels (default: as trained; Wan 480x832)")
    how("--fps", type=frame_rate, help="frames per second of the MP4")
    how("--solver", choices=SOLVERS, help="of the path from noise to video")
    recipe_flags(how)
    how("--negative", help="what the video should not be")
    how("--lora", type=read_lora_argument, action="append", default=[], metavar="FILE[:SCALE]",
        help="a Wan LoRA to merge; once per file; high=FILE or low=FILE for one of two experts")
    how("--seed", type=seed_number, default=0, help="of the noise")
    how("--export", metavar="DIR", type=nonempty, help="write the checkpoint there in bf16, and stop")
    card = p.add_argument_group("speed and memory").add_argument
    card("--offload", action="store_true", help="weights stay in CPU memory, block by block on the GPU")
    card("--tile", type=count, help="pixels a side that the VAE works on at a time, for example 256")
    card("--ulysses", action="store_true", help="all processes of torchrun on one video (else on one each)")
    card("--no-fused", action="store_true", help="PyTorch's operations instead of the Triton kernels")
    card("--compile", action="store_true", help="torch.compile every block (needs a C++ compiler or a GPU)")
    args = p.parse_args(argv)
    if args.prompts and (args.refs or args.prompt):
        raise UserError("--prompts FILE holds prompts and references: leave --prompt and --refs out")
    if args.refs and not args.prompt:
        raise UserError("--refs needs --prompt: say what the people do")
    if args.compile and args.offload:
        raise UserError("--compile needs its blocks to stay on the GPU: give it without --offload")
    if args.compile and args.ulysses:  # lengths would be constants: a compilation a layout, at most eight
        raise UserError("--ulysses exchanges tokens inside a block: give it without --compile")
    args.ckpt = args.ckpt or default_checkpoint()
    return args


def frames_and_size(args, ckpt):
    """What --frames and --size ask of a checkpoint, or its own; UserError where it cannot make that."""
    frames, size = args.frames or ckpt.frames, args.size or ckpt.size
    if ckpt.kind != "toy":
        WanEncoders.latent_shape(frames, size)
    elif (frames, size) != (ckpt.frames, ckpt.size):
        raise UserError(f"{frames} frames of {size[0]}x{size[1]}: this checkpoint makes "
                        f"{ckpt.frames} frames of {ckpt.size[0]}x{ckpt.size[1]}")
    return frames, size


def made_with(ckpt, encoders, *settings):
    """A name for what all videos of a call depend on: networks by their contents, settings, code."""
    trained = [read_meta(network) for network in filter(is_trained, ckpt.networks)]
    for meta in trained:
        if meta.get("base"):  # by what checkpoint.json says; so that must be true
            check_base(meta["base"])
    networks = [(meta["sha256"], meta["config"], meta.get("base")) for meta in trained]
    networks += [wan_files(network) for network in ckpt.networks if not is_trained(network)]
    if ckpt.config.is_wan:  # the toy's are in its code
        networks.append(encoders.contents())
    return fingerprint(networks, ckpt.boundary, settings, source_hash(*VIDEO_CODE))


def make_round(model, encoders, jobs, recipe, frames):
    """These jobs' videos, into their .video."""
    for size in dict.fromkeys(job.size for job in jobs):
        same = [job for job in jobs if job.size == size]
        for job, video in zip(same, generate(model, encoders, same, recipe, frames)):
            job.video = video


def main(argv=None):
    world, held = World.join(), contextlib.ExitStack()
    with world.one_voice():
        args = arguments(argv)
        if args.export:
            return export(args.ckpt, args.export) if world.rank == 0 else None
        print("kernels:", use_fused(False if args.no_fused else None))
        ckpt = find(args.ckpt)
        recipe = with_flags(SAMPLE_RECIPES[ckpt.kind], args)
        recipe["lora"] = [f"{Path(file).name}:{scale:g}" for file, scale, _ in args.lora]
        frames, size = frames_and_size(args, ckpt)
        ulysses, ranks = None, world.size  # ranks that share the prompts
        if args.ulysses:
            ulysses, ranks = Ulysses(world, ckpt.config.num_heads), 1
        jobs = make_jobs(args, ckpt, frames, size)
        per_round = min(ROUND, math.ceil(len(jobs) / ranks))  # so that every rank has a round
        videos, sheets = output_files(args, jobs, per_round)
        loras = check_loras(args.lora, ckpt.roles, [functools.partial(on_meta, n) for n in ckpt.networks])
        hardware = Hardware(args.precision, args.offload, args.tile, args.compile, ulysses)
        need_vit = any(job.files for job in jobs) and ckpt.config.vit_dim > 0
        model, encoders = load(ckpt, args.wan, hardware, loras, need_vit)
        encoders.tokenizer([*(job.prompt for job in jobs), recipe["negative"]])  # says what it cuts
        if world.rank == 0:
            held.enter_context(lock(os.path.dirname(args.out), name=os.path.basename(args.out)))
        print(f"{frames} frames of {size[0]}x{size[1]}, "
              + ", ".join(f"{name} {value}" for name, value in recipe.items() if value), flush=True)
    bf16 = uses_bf16(model.device, args.precision)
    loras = [(Path(file), *others) for file, *others in loras]
    made = made_with(ckpt, encoders, recipe, frames, bf16, args.tile, loras)
    parts = [slice(n, n + per_round) for n in range(0, len(jobs), per_round)]
    mine = range(world.rank % ranks, len(sheets), ranks)
    total = sum(len(jobs[parts[n]]) for n in mine)
    with held, progress(None, "sampling", "videos", total, show=world.rank == 0) as bar:
        for n in mine:
            part, start = jobs[parts[n]], time.perf_counter()
            with world.one_voice():
                notes = [note_of(job, recipe, frames, args.ckpt, made) for job in part]
                missing = [notes_in(path) != [note] for path, note in zip(videos[parts[n]], notes)]
                if ulysses:
                    missing = world.agree(missing)
                if any(missing) or notes_in(sheets[n]) != notes:
                    # with pictures only now: those of thousands of jobs fit into no memory
                    part = [replace(job, references=job.references and read_references(job.references, size))
                            for job in part]
                    make_round(model, encoders, list(itertools.compress(part, missing)), recipe, frames)
                    if world.rank == 0 or not ulysses:
                        write_round(part, notes, videos[parts[n]], sheets[n], recipe["fps"])
            how = "kept: made of the same before"
            if any(missing):
                took = time.perf_counter() - start
                how = f"in {took:.1f} s, {took / sum(missing) / recipe['steps']:.3g} seconds a step"
            if world.rank == 0 or not ulysses:
                progress.write(f"{', '.join(videos[parts[n]])} and {sheets[n]} {how}")
            bar.update(len(part))
    world.leave()


if __name__ == "__main__":
    run_script(main, "--offload or --tile 256")
