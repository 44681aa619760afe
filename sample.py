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
import json
import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL.PngImagePlugin import PngInfo
from torch.utils.data import default_collate

import data
from kernels import use_fused
from model import DiTConfig, load_checkpoint, load_wan, on_meta
from networks.encoders import NEGATIVE_PROMPT, WanEncoders, stream_blocks
from networks.lora import apply_lora, check_loras, read_lora_argument
from networks.weights import ROLES, boundary_of, check_base, expert_folders, find_wan, role_of, wan_files
from rope import VIEWS
from support.checkpoints import check_files, find_checkpoint, read_meta, save_checkpoint
from support.processes import Ulysses, World, compile_blocks
from support.script import (ROOT, Parser, UserError, atomic_file, autocast, check_outputs, count, fingerprint,
                            frame_rate, in_range, lock, nonempty, probe_writable, progress, run_script,
                            seed_number, source_hash, uses_bf16)
from videos import toy
from videos.pictures import (Job, check_ours, contact_sheet, frame_count, from_bytes, name_references,
                             notes_in, picture_size, read_frames, read_jobs, read_references, view_of,
                             write_video)

SOLVERS = ("unipc", "dpm++", "euler")
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
VIDEO_CODE = ("data", "kernels", "model", "networks/encoders", "networks/lora", "networks/text", "rope",
              "sample", "videos/pictures", "videos/toy")
ROUND = 16  # videos that are made together, one network after the other, and written before the next ones


# --------------------------------------------------------------------------------------- solvers and guidance
def schedule(steps, shift, solver):
    """Noise levels [steps + 1], the last one 0, and times [steps] in 0..1000, both float64.
    UniPC and DPM++ ask the network at whole times, as Wan's do."""
    if solver not in SOLVERS:
        raise UserError(f"unknown solver {solver!r}; expected one of {', '.join(SOLVERS)}")
    if steps < 1:
        raise UserError(f"{steps} steps; expected at least 1")
    sigma = torch.linspace(0.999 if solver == "unipc" else 1, 0, steps + 1, dtype=torch.float64)
    sigma = data.shifted(sigma, shift)
    times = 1000 * sigma[:-1]
    return sigma, times if solver == "euler" else times.floor()


def solve(velocity, x, steps, shift, solver):
    """Integrate dx/dsigma = velocity from noise x at sigma 1 to x0 at sigma 0.

    velocity  function (x, t) -> noise - x0, t a float32 scalar tensor in 0..1000
    shift     as data.shifted: more than 1 spends more steps at high noise
    solver    "euler"; "dpm++", DPM-Solver++(2M) (Lu et al. 2022); "unipc", UniPC of order 2 with
              B(h) = e^h - 1 (Zhao et al. 2023): the predictor of dpm++, then a corrector that uses the
              network's answer at the predicted point. Both work on x0 over lambda = log((1 - sigma) / sigma),
              at first order in the first and the last step, as in diffusers.
    Raises UserError for an unknown solver or less than one step.
    """
    solution = solving(x, steps, shift, solver)
    x, t = next(solution)
    while t is not None:
        x, t = solution.send(velocity(x, t))
    return x


def solving(x, steps, shift, solver):
    """`solve` as a generator, so that several videos can take turns: yields (x, t), is sent the velocity
    there, and ends with (x0, None)."""
    sigma, times = schedule(steps, shift, solver)
    lam = ((1 - sigma) / sigma).log().tolist()  # -inf at sigma 1, inf at 0
    sigma, times = sigma.tolist(), times.float().to(x.device)

    def step(x, i, x0, slope):
        """From level i to i + 1 where x0 is expected to move by `slope`: exact for a constant x0 + slope."""
        growth = (1 - sigma[i + 1]) * math.expm1(lam[i] - lam[i + 1])
        return sigma[i + 1] / sigma[i] * x - growth * (x0 + slope)
    older = old = before = None  # x0 at levels i - 2 and i - 1, x at level i - 1
    for i in range(steps):
        velocity = yield x, times[i]
        if solver == "euler":
            x = x + (sigma[i + 1] - sigma[i]) * velocity
            continue
        x0 = x - sigma[i] * velocity
        if i and solver == "unipc":
            x = step(before, i - 1, old, corrector(i - 1, lam, older, old, x0))
        slope = 0 if i in (0, steps - 1) else (x0 - old) * ((lam[i + 1] - lam[i]) / (lam[i] - lam[i - 1]) / 2)
        older, old, before = old, x0, x
        x = step(x, i, x0, slope)
    yield x, None


def corrector(i, lam, older, old, new):
    """UniPC's slope for the step from level i to i + 1, once x0 at i + 1 is known."""
    if i == 0:
        return (new - old) / 2
    h = lam[i] - lam[i + 1]
    ratio = (lam[i - 1] - lam[i]) / (lam[i + 1] - lam[i])  # where the older one lies, in steps
    phi1 = math.expm1(h)
    phi2 = phi1 / h - 1
    phi3 = phi2 / h - 0.5
    first = (phi2 - 2 * phi3) / phi1 / (1 - ratio)
    return first * (older - old) / ratio + (phi2 / phi1 - first) * (new - old)


def guidance_weights(guide_text, guide_refs):
    """Weights of v(text, refs), v(text, -) and v(-, -) in `guided`; guide_refs None: that of the caption."""
    guide_refs = guide_text if guide_refs is None else guide_refs
    return guide_refs, guide_text - guide_refs, 1 - guide_text


def expert_at(t, boundary):
    """Which of two networks works at time t: 0, the one for high noise, or 1."""
    return int(float(t) < 1000 * boundary)


def guided(model, text, no_text, refs, vit, guide_text=(1.0,), guide_refs=1.0, boundary=0.0):
    """velocity(x, t) with two guidance scales: from nothing to the caption, and from the caption to
    caption and references.

    v = v(-, -) + guide_text * (v(text, -) - v(-, -)) + guide_refs * (v(text, refs) - v(text, -)), where "no
    references" is every view missing and "no caption" the text tokens no_text. Written as one weighted
    sum, terms of weight 0 cost nothing. Of two scales in guide_text the first is for t >= 1000 * boundary.
    Without a single reference, or with refs None (plain Wan), v(text, -) gets weight 0: Wan's guidance.
    """
    no_refs = None if refs is None else [{} for _ in refs]
    no_vit = None if vit is None else [None for _ in vit]
    # each with a cache of its own, since references read the caption too
    terms = (text, refs, vit, {}), (text, no_refs, no_vit, {}), (no_text, no_refs, no_vit, {})

    def velocity(x, t):
        scale = guide_text[-expert_at(t, boundary)]
        weights = guidance_weights(scale, guide_refs if any(refs or ()) else None)
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

    def __call__(self, x, t, text, refs=None, vit=None, kv_cache=None):
        needed = expert_at(t[0], self.boundary)
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
# A reference is called job.files (what --refs gives), then job.references (pictures), then refs and vit: its
# latents, and the ViT features of a frontal one, as the network takes them.
def encode_references(encoders, batches, with_vit, device):
    """refs and vit of each batch of jobs with the same views.
    All latents first, then all features, so that each encoder loads once."""
    if batches[0][0].references is None:  # plain Wan
        return [(None, None) for _ in batches]
    # of each batch: one {view: pictures [B, 3, h, w]} per person
    stacked = [default_collate([job.references for job in jobs]) for jobs in batches]

    def latents(pictures):
        return encoders.encode(pictures[:, :, None])[:, :, 0].to(device)
    refs = [[{view: latents(p) for view, p in views.items()} for views in people] for people in stacked]
    vit = [[encoders.features(views["front"]).to(device) if with_vit and "front" in views else None
            for views in people] for people in stacked]
    return list(zip(refs, vit))


@torch.no_grad()
def generate(model, encoders, jobs, recipe, frames, batch=1):
    """The videos of these jobs, [3, frames, H, W] in -1..1 each. Captions, references, denoising, decoding:
    one network after the other is in memory. A video's noise depends on its own seed only.
    model is an Experts, recipe a row of SAMPLE_RECIPES. All jobs have one size, and every `batch` neighbours
    have the same views and share a forward."""
    parts = [jobs[i:i + batch] for i in range(0, len(jobs), batch)]
    # on their own: padded to a longer neighbour's length, a short caption's last digits would differ
    text = [encoders.text([job.prompt for job in part]).to(model.device) for part in parts]
    no_text = encoders.text([recipe["negative"]]).to(model.device)
    encoded = encode_references(encoders, parts, model.config.vit_dim > 0, model.device)
    shape = encoders.latent_shape(frames, jobs[0].size)
    noise = data.noise_of(shape, [torch.Generator().manual_seed(job.seed) for job in jobs]).to(model.device)
    solutions = [solving(x, recipe["steps"], recipe["shift"], recipe["solver"]) for x in noise.split(batch)]
    states = [next(solution) for solution in solutions]  # x and t of each part
    bar = progress(None, "sampling", "steps", total=len(jobs) * recipe["steps"])

    def denoise(i, expert):
        """The steps of part i that an expert makes; what references keep for them goes when it ends."""
        velocity = guided(model, text[i], no_text, *encoded[i], recipe["guide_text"], recipe["guide_refs"],
                          model.boundary)
        x, t = states[i]
        while t is not None and expert_at(t, model.boundary) == expert:
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
class Found:
    """What --ckpt names. No weights are read for it."""
    ckpt: str
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


def find(ckpt):
    """--ckpt -> Found. The folder of a checkpoint, of a run (its newest one), or of a Wan release; each of
    two experts may be either. Raises UserError where a file's names or shapes do not fit."""
    folder = Path(ckpt)
    if folder.is_file() and is_trained(folder.parent):
        raise UserError(f"--ckpt {ckpt} is a file of a checkpoint: give its folder, {folder.parent}")
    pair = expert_folders(folder)
    networks = [find_checkpoint(part) or part for part in pair or [folder]]
    metas = [read_meta(network) for network in networks if is_trained(network)]
    if not pair and not metas and not find_wan(folder):
        raise UserError(f"no checkpoint at {ckpt}: make one with `python train.py --stage all`, about ten "
                        "minutes on a laptop, or give the folder of a Wan checkpoint")
    if not pair and not metas and role_of(folder):
        raise UserError(f"{ckpt} is one of Wan2.2's two experts: give the folder that holds both")
    config, *others = [on_meta(network).config for network in networks]
    if others and others[0] != config:
        raise UserError(f"{ckpt}: its two experts are not of one size and kind")
    meta = metas[0] if metas else {}
    boundary = check_experts(networks, boundary_of(folder)) if pair or "expert" in meta else 0.0
    if config.is_wan:
        return Found(ckpt, networks, config, "wan2.2" if pair else "wan2.1", meta, boundary)
    toy.check_config(config)
    check_files(networks[0], [toy.ToyEncoders.TOKENIZER])
    toy_world = meta.get("world", {})
    known = [{name: row[name] for name in ("size", "frames")} for row in toy.WORLDS.values()]
    if toy_world not in known or not all(type(value) is int for value in toy_world.values()):
        raise UserError(f"{networks[0]}/checkpoint.json: its world {toy_world!r:.60} is none of toy.WORLDS")
    size = toy_world["size"], toy_world["size"]
    return Found(ckpt, networks, config, "toy", meta, boundary, toy_world["frames"], size)


def check_experts(networks, released=None):
    """UserError where checkpoints of train.py are not what their folders say, the expert for high noise and
    the one for low; returns the boundary between them: that of a release, where it says one, or Wan2.2's."""
    stamps = []
    for network, role in zip(networks, ROLES):
        if not is_trained(network):
            continue
        stamp = read_meta(network).get("expert", {})
        if len(networks) == 1:
            raise UserError(f"{network} is the expert for {stamp.get('role')} noise only: put both into one "
                            "folder, as high_noise_model and low_noise_model")
        if stamp.get("role") != role:
            how = f"with --expert {stamp['role']}" if "role" in stamp else "without --expert"
            raise UserError(f"{network} was trained {how}, its folder is that of the expert for {role} noise")
        stamps.append(stamp)
    if len(stamps) == 1:
        raise UserError(f"only one of the experts {' and '.join(map(str, networks))} was trained: the other "
                        "has never seen references")
    boundaries = {stamp["boundary"] for stamp in stamps} or {released or BOUNDARY}
    if len(boundaries) > 1:
        raise UserError(f"the two experts were trained with --boundary {' and '.join(map(str, boundaries))}")
    return boundaries.pop()


def is_trained(network):
    """Is this folder a checkpoint of train.py."""
    return (network / "checkpoint.json").is_file()


def default_checkpoint():
    """The toy run of this folder, or else the toy that comes with the code."""
    return "out/toy" if find_checkpoint("out/toy") else str(ROOT / "assets/toy")


def export(ckpt, folder):
    """The averaged weights of a checkpoint of train.py in bf16, and what sampling needs with them."""
    found, folder = find(ckpt), Path(os.path.abspath(folder))
    if len(found.networks) > 1 or not found.meta:
        raise UserError(f"--export: {ckpt} is not one checkpoint of train.py")
    if os.path.lexists(folder):
        raise UserError(f"--export {folder} exists: remove it or choose another folder")
    probe_writable(folder.parent)
    source = found.networks[0]
    weights = load_checkpoint(source, dtype=torch.bfloat16)[0].state_dict()
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise UserError(f"{source}: its weights are not finite, the training has diverged")
    meta = {name: value for name, value in found.meta.items() if name != "base"}  # it is merged
    save_checkpoint(folder, {"ema": weights}, meta, sorted(source.glob("*.model")))
    print(f"{folder} from {source}")


def load(found, wan=None, offload=False, tile=None, compiled=False, precision="auto", need_vit=False,
         loras=(), ulysses=None):
    """A Found -> model (an Experts) and its encoders; says which checkpoint it takes.
    Flags as in `arguments`; need_vit: a missing ViT is an error now."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # World.join chose among GPUs
    for network in filter(is_trained, found.networks):
        meta = read_meta(network)
        print(f"checkpoint {network} (stage {meta.get('stage')} {meta.get('name')}, step {meta.get('step')})")
    if found.kind == "toy":
        if wan or tile:
            raise UserError(f"{found.ckpt} is a toy, which has its own encoders: leave --wan and --tile out")
        dtype, encoders = torch.float32, toy.ToyEncoders(found.networks[0], found.size[0])
    else:
        dtype = torch.bfloat16 if uses_bf16(device, precision) else torch.float32
        wan = wan or found.meta.get("wan") or found.ckpt
        encoders = WanEncoders(wan, device, dtype, offload, tile, need_vit)
    encoders.tokenizer.max_len = found.config.text_len

    def load_expert(network, role):
        encoders.drop()
        if is_trained(network):
            model = load_checkpoint(network, dtype=dtype)[0]
        else:
            model = on_meta(network).to(dtype)
            load_wan(model, network)
        model.eval().requires_grad_(False)
        model = model if offload else model.to(device)  # where LoRAs are merged
        for file, scale, roles in loras:
            if role in roles:
                changed, unknown = apply_lora(model, file, scale, role)
                print(f"{file}: {changed} weights of {network} changed"
                      + (f", {len(unknown)} keys fit nothing: {', '.join(unknown[:5])}" if unknown else ""))
        if ulysses:
            ulysses.spread(model)
        if compiled:
            compile_blocks(model)
        if offload:
            stream_blocks(model, device)
        return model
    experts = [functools.partial(load_expert, *expert) for expert in zip(found.networks, found.roles)]
    return Experts(experts, found.config, device, found.boundary, precision), encoders


# --------------------------------------------------------------------------------------------------- the jobs
def make_jobs(args, found, frames, size):
    """What --prompts, --prompt, --refs, --views and --swap ask for, as Jobs whose references are files, or
    the toy's pictures."""
    is_toy = found.kind == "toy"
    # a base model or the stage t2v has never seen a reference
    views = args.views or (() if found.meta.get("name") == "t2v" else None)
    if args.views and (args.refs or args.prompts or not is_toy):
        raise UserError("--views chooses among the toy's own references: "
                        "leave it out with --refs, with --prompts and for Wan")
    if args.prompts:
        jobs = read_jobs(args.prompts, args.seed)
    elif args.prompt:
        jobs = [Job(args.prompt, None, args.seed, files=args.refs or [])]
    elif is_toy:
        jobs = [replace(job, seed=args.seed) for job in toy.held_out(views, frames, size[0])]
        if args.swap:
            jobs = [job for job in jobs if len(job.references) == 2]
    else:
        raise UserError("--prompt is missing: say what happens")
    for job in jobs:
        if job.files and not found.meta:
            raise UserError("this checkpoint is plain Wan, which has never seen references: "
                            "give one that train.py made, or leave --refs out")
        if job.files:
            job.references = name_references(job, found.config.max_identities)
        elif job.references is None and is_toy:  # people that training never saw
            cast = (0, 1) if "two people" in job.prompt else (0,)
            job.references = toy.held_out_references(cast, VIEWS if views is None else views, size[0])
        elif job.references is None and found.meta:
            job.references = [{}]  # one person's proxies
        job.size = toy.frame_size(size[0], len(job.references)) if is_toy else size
    return swapped(jobs) if args.swap else jobs


def swapped(jobs):
    """Each job of two people, and once more with their references exchanged."""
    result = []
    for job in jobs:
        if len(job.references or ()) != 2:
            raise UserError("--swap exchanges two people: give --refs twice, or a prompt of two people")
        first, note = replace(job, note="", truth=None), " (references exchanged)"
        result += [first, replace(first, references=job.references[::-1], files=job.files[::-1], note=note)]
    return result


# -------------------------------------------------------------------------------------------------------- CLI
guidance = in_range(float, -100, 100, "a number from -100 to 100")
solver_steps = in_range(int, 1, 1000, "1 to 1000 steps")
time_shift = in_range(float, 1e-3, 1e6, "a number from 0.001 to a million")


def recipe_flags(add):
    """Flags that override SAMPLE_RECIPES; eval.py has them too."""
    add("--steps", type=solver_steps, help="solver steps")
    add("--shift", type=time_shift, help="timestep shift: more than 1 spends more steps at high noise")
    add("--guide-refs", type=guidance, help="guidance to the references, 1 is none (Wan: --guide-text's)")
    add("--guide-text", type=guidance, nargs="+", help="guidance to the caption; two: at high, low noise")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where it is fast")


def override(recipe, args):
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


def check_wan_size(frames, size):
    """UserError where Wan cannot make a video of that many frames, of size (H, W)."""
    if frames % 4 != 1 or not all(side and side % 16 == 0 for side in size):
        raise UserError(f"{frames} frames of {size[0]}x{size[1]}: expected 4n+1 frames (81) and sides that "
                        "are multiples of 16 (480x832)")


def frames_and_size(args, found):
    """What --frames and --size ask of a checkpoint, or its own; UserError where it cannot make that."""
    frames, size = args.frames or found.frames, args.size or found.size
    if found.kind != "toy":
        check_wan_size(frames, size)
    elif (frames, size) != (found.frames, found.size):
        raise UserError(f"{frames} frames of {size[0]}x{size[1]}: this checkpoint makes "
                        f"{found.frames} frames of {found.size[0]}x{found.size[1]}")
    return frames, size


def output_files(args, jobs, per_round=ROUND):
    """Names of the MP4s, one a job, and of the sheets, one a round. UserError for one that may not be."""
    out = args.out.removesuffix(".mp4").removesuffix(".png")
    if os.path.basename(out) in ("", ".", ".."):
        raise UserError(f"--out {args.out!r}: expected the name of a file to write, without suffix")
    args.out = out
    names = [out] if len(jobs) == 1 else [f"{out}-{n}" for n in range(1, len(jobs) + 1)]
    videos = [f"{name}.mp4" for name in names]
    sheets = [f"{name}.png" for name in (names[::per_round] if len(jobs) > per_round else [out])]
    inputs = [view_of(file)[1] for job in jobs for files in job.files for file in files]
    inputs += [args.prompts] if args.prompts else []
    probe_writable(os.path.dirname(out))
    check_outputs([*videos, *sheets], inputs)
    check_ours([*videos, *sheets])
    return videos, sheets


def made_with(found, encoders, recipe, frames, bf16, tile=None, loras=()):
    """A name for what all videos of a call depend on: networks by their contents, settings, code."""
    trained = [read_meta(network) for network in filter(is_trained, found.networks)]
    for meta in trained:
        if meta.get("base"):  # by what checkpoint.json says; so that must be true
            check_base(meta["base"])
    networks = [(meta["sha256"], meta["config"], meta.get("base")) for meta in trained]
    networks += [wan_files(network) for network in found.networks if not is_trained(network)]
    networks += [encoders.contents()] if found.config.is_wan else []  # the toy's are in its code
    loras = [(Path(file), scale, only) for file, scale, only in loras]
    return fingerprint(networks, found.boundary, loras, recipe, frames, bf16, tile, source_hash(*VIDEO_CODE))


def note_of(job, recipe, frames, ckpt, made):
    """What a video's file says of how it was made, as JSON: what a person can read, and the fingerprint of
    all that it depends on. made: made_with's"""
    refs = [{view: picture.tolist() if torch.is_tensor(picture) else Path(picture)
             for view, picture in views.items()} for views in job.references or ()]
    names = [[Path(view_of(file)[1]).name for file in files] for files in job.files]
    how = {"prompt": job.prompt, "seed": job.seed, "refs": names, "frames": frames, "size": job.size,
           "ckpt": Path(os.path.abspath(ckpt)).name, **recipe,  # not this machine's folders
           "made_of": fingerprint(job.prompt, job.seed, job.size, job.references is None, refs, made)}
    return json.dumps(how, ensure_ascii=False)


def make_round(model, encoders, jobs, recipe, frames):
    """These jobs' videos, into their .video."""
    for size in dict.fromkeys(job.size for job in jobs):
        same = [job for job in jobs if job.size == size]
        for job, video in zip(same, generate(model, encoders, same, recipe, frames)):
            job.video = video


def write_round(jobs, notes, videos, sheet, fps):
    """Write the videos of those jobs that have one, and the sheet of all, if it is not there. The sheet comes
    first: had a kill left videos without it, it would be drawn from their files, in other bits."""
    made = [job.video is not None for job in jobs]
    if notes_in(sheet) != notes:
        info = PngInfo()
        for n, (job, note, path) in enumerate(zip(jobs, notes, videos), 1):
            info.add_itxt(f"video {n}", note)
            if job.video is None:
                pictures = [from_bytes(torch.from_numpy(picture)) for picture in read_frames(path, fps)]
                job.video = torch.stack(pictures).permute(3, 0, 1, 2)
        with atomic_file(sheet) as path:
            contact_sheet(jobs).save(path, "PNG", pnginfo=info)
    for job, note, path, new in zip(jobs, notes, videos, made):
        if new:
            write_video(path, job.video, fps, note)


def main(argv=None):
    world, held = World.join(), contextlib.ExitStack()
    with world.one_voice():
        args = arguments(argv)
        if args.export:
            return export(args.ckpt, args.export) if world.rank == 0 else None
        print("kernels:", use_fused(False if args.no_fused else None))
        found = find(args.ckpt)
        recipe = override(SAMPLE_RECIPES[found.kind], args)
        recipe["lora"] = [f"{Path(file).name}:{scale:g}" for file, scale, _ in args.lora]
        frames, size = frames_and_size(args, found)
        ulysses = Ulysses(world, found.config.num_heads) if args.ulysses else None
        jobs = make_jobs(args, found, frames, size)
        ranks = 1 if ulysses else world.size  # those that share the prompts
        per_round = min(ROUND, math.ceil(len(jobs) / ranks))  # so that every rank has a round
        videos, sheets = output_files(args, jobs, per_round)
        loras = check_loras(args.lora, found.roles, [functools.partial(on_meta, n) for n in found.networks])
        need_vit = any(job.files for job in jobs) and found.config.vit_dim > 0
        model, encoders = load(found, args.wan, args.offload, args.tile, args.compile, args.precision,
                               need_vit, loras, ulysses)
        encoders.tokenizer([*(job.prompt for job in jobs), recipe["negative"]])  # says what it cuts
        if world.rank == 0:
            held.enter_context(lock(os.path.dirname(args.out), name=os.path.basename(args.out)))
        print(f"{frames} frames of {size[0]}x{size[1]}, "
              + ", ".join(f"{name} {value}" for name, value in recipe.items() if value), flush=True)
    bf16 = uses_bf16(model.device, args.precision)
    made = made_with(found, encoders, recipe, frames, bf16, args.tile, loras)
    writes = world.rank == 0 or not ulysses
    mine = range(world.rank % ranks, len(sheets), ranks)
    parts = [slice(n * per_round, (n + 1) * per_round) for n in mine]
    total = sum(len(jobs[part]) for part in parts)
    with held, progress(None, "sampling", "videos", total, show=world.rank == 0) as bar:
        for n, part in zip(mine, parts):
            start = time.perf_counter()
            with world.one_voice():
                notes = [note_of(job, recipe, frames, args.ckpt, made) for job in jobs[part]]
                missing = [notes_in(path) != [note] for path, note in zip(videos[part], notes)]
                missing = world.agree(missing) if ulysses else missing
                # with pictures only now: those of thousands of jobs fit into no memory
                if any(missing) or notes_in(sheets[n]) != notes:
                    shown = [replace(job, references=job.references and read_references(job.references, size))
                             for job in jobs[part]]
                    todo = [job for job, new in zip(shown, missing) if new]
                    make_round(model, encoders, todo, recipe, frames)
                    if writes:
                        write_round(shown, notes, videos[part], sheets[n], recipe["fps"])
            took = time.perf_counter() - start
            how = (f"in {took:.1f} s, {took / sum(missing) / recipe['steps']:.3g} seconds a step"
                   if any(missing) else "kept: made of the same before")
            if writes:
                progress.write(f"{', '.join(videos[part])} and {sheets[n]} {how}")
            bar.update(len(jobs[part]))
    world.leave()


if __name__ == "__main__":
    run_script(main, "--offload or --tile 256")
