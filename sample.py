"""Make videos from a caption and reference pictures.

  python sample.py          people the toy never saw, from the newest checkpoint
  python sample.py --refs a_front.png a_left.png --refs b_front.png --prompt "a close-up of two people, ..."
  python sample.py --ckpt ckpts/Wan2.1-T2V-1.3B --prompt "..."      a Wan checkpoint, plain text-to-video

One --refs per person, in the caption's order. A file's view is the word front, left, right or back in its
name, or view=path. Writes OUT.mp4 and OUT.png, a contact sheet with the references on the left and the frames
on the right.
"""
import functools
import json
import math
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import data
import toy
from checkpoint import (Parser, UserError, atomic_file, check_outputs, count, find_checkpoint, frame_rate,
                        in_range, nonempty, positive, probe_writable, read_meta, run_script,
                        save_checkpoint, seed_number)
from data import Job
from encoders import NEGATIVE_PROMPT, WanEncoders, stream_blocks
from kernels import use_fused
from model import (DiTConfig, HarmoView, autocast, check_checkpoint, load_checkpoint, load_wan, match_wan,
                   uses_bf16, wan_config)
from rope import VIEWS

SOLVERS = ("unipc", "dpm++", "euler")
# Defaults by kind of checkpoint; a pair of guidance scales is for high and low noise. The toy's were chosen
# on its benchmark (LOG.md), Wan's are its authors'.
SAMPLE_RECIPES = {
    "toy": dict(steps=4, shift=100.0, solver="euler", guide_text=(1.0,), guide_refs=1.0, fps=4, negative=""),
    "wan2.1": dict(steps=50, shift=5.0, solver="unipc", guide_text=(5.0,), guide_refs=5.0, fps=16,
                   negative=NEGATIVE_PROMPT),
    "wan2.2": dict(steps=40, shift=12.0, solver="unipc", guide_text=(4.0, 3.0), guide_refs=4.0, fps=16,
                   negative=NEGATIVE_PROMPT),
}
BOUNDARY = {"wan2.2": 0.875}  # where its experts change, as a share of t's range
ROUND = 16  # videos that are made together, one network after the other, and written before the next ones


# --------------------------------------------------------------------------------------- solvers and guidance
def schedule(steps, shift, solver):
    """Noise levels [steps + 1], the last one 0, and times [steps] in 0..1000, both float64.
    UniPC and DPM++ ask the network at whole times, as Wan's do."""
    sigma = torch.linspace(0.999 if solver == "unipc" else 1, 0, steps + 1, dtype=torch.float64)
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    times = 1000 * sigma[:-1]
    return sigma, times if solver == "euler" else times.floor()


def solve(velocity, x, steps, shift, solver):
    """Integrate dx/dsigma = velocity from noise x at sigma 1 to x0 at sigma 0.

    velocity  function (x, t) -> noise - x0, t a float32 scalar tensor in 0..1000
    shift     sigma -> shift * sigma / (1 + (shift - 1) * sigma): more than 1 spends more steps at high noise
    solver    "euler"; "dpm++", DPM-Solver++(2M) (Lu et al. 2022); "unipc", UniPC of order 2 with
              B(h) = e^h - 1 (Zhao et al. 2023), which is the same predictor and then, with the network's
              answer at the predicted point, a corrector. Both work on x0 over
              lambda = log((1 - sigma) / sigma).
    Raises UserError for an unknown solver or less than one step.
    """
    if solver not in SOLVERS:
        raise UserError(f"unknown solver {solver!r}; expected one of {', '.join(SOLVERS)}")
    if steps < 1:
        raise UserError(f"{steps} steps; expected at least 1")
    sigma, times = schedule(steps, shift, solver)
    times = times.float().to(x.device)
    if solver == "euler":
        for now, then, t in zip(sigma.tolist(), sigma[1:].tolist(), times):
            x = x + (then - now) * velocity(x, t)
        return x

    lam = [math.inf if s == 0 else -math.inf if s == 1 else math.log((1 - s) / s) for s in sigma.tolist()]
    sigma = sigma.tolist()

    def step(x, i, x0, slope):
        """From level i to i + 1 where x0 is expected to move by `slope`: exact for a constant x0 + slope."""
        growth = (1 - sigma[i + 1]) * math.expm1(lam[i] - lam[i + 1])
        return sigma[i + 1] / sigma[i] * x - growth * (x0 + slope)
    older = old = before = None  # x0 two levels before and one; x one level before
    for i in range(steps):
        x0 = x - sigma[i] * velocity(x, times[i])
        if i and solver == "unipc":
            x = step(before, i - 1, old, corrector(i - 1, lam, older, old, x0))
        slope = 0 if i in (0, steps - 1) else (x0 - old) * ((lam[i + 1] - lam[i]) / (lam[i] - lam[i - 1]) / 2)
        older, old, before = old, x0, x
        x = step(x, i, x0, slope)
    return x


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
    """Weights of v(text, refs), v(text, -) and v(-, -) in `guided`."""
    return guide_refs, guide_text - guide_refs, 1 - guide_text


def guided(model, text, no_text, refs, vit, guide_text=(1.0,), guide_refs=1.0, boundary=0.0):
    """velocity(x, t) with two guidance scales: from nothing to the caption, and from the caption to
    caption and references.

    v = v(-, -) + guide_text * (v(text, -) - v(-, -)) + guide_refs * (v(text, refs) - v(text, -)), where "no
    references" is every slot as proxies and "no caption" the text tokens no_text. Written as one weighted
    sum, terms of weight 0 cost nothing. Of two scales in guide_text the first is for t >= 1000 * boundary.
    Without a single reference, or with refs None (plain Wan), it is Wan's guidance.
    """
    no_refs = None if refs is None else [{} for _ in refs]
    no_vit = None if vit is None else [None for _ in vit]
    terms = (text, refs, vit), (text, no_refs, no_vit), (no_text, no_refs, no_vit)

    def velocity(x, t):
        scale = guide_text[0] if t >= 1000 * boundary else guide_text[-1]
        weights = guidance_weights(scale, guide_refs if any(refs or ()) else scale)
        return sum(weight * model(x, t.expand(len(x)), tokens.expand(len(x), -1, -1), r, v)
                   for weight, (tokens, r, v) in zip(weights, terms) if weight)
    return velocity


class Experts:
    """One network, or Wan2.2's two: the first for t >= 1000 * boundary, the second below. Each is loaded when
    it is first asked and only one is held. Called like HarmoView.

    load  one function a network, () -> HarmoView on the device
    """

    def __init__(self, load, config, device, boundary=0.0, precision="auto"):
        self.load, self.config, self.device = load, config, device
        self.boundary, self.precision = boundary, precision
        self.current = self.network = None
        self.loading = self.stepping = 0.0  # seconds, so far

    def __call__(self, x, t, text, refs=None, vit=None):
        needed = 0 if float(t[0]) >= 1000 * self.boundary else 1
        if needed != self.current:
            self.drop()
            start = time.perf_counter()
            self.network, self.current = self.load[needed](), needed
            self.loading += time.perf_counter() - start
        return self.network(x, t, text, refs, vit)

    def drop(self):
        self.current = self.network = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


# ----------------------------------------------------------------------------------------------- the pipeline
def stack_references(jobs):
    """The references of jobs with the same views: one {view: pictures [B, 3, h, w]} per identity, or None."""
    if jobs[0].references is None:
        return None
    stacked = []
    for k, views in enumerate(jobs[0].references):
        stacked.append({view: torch.stack([job.references[k][view] for job in jobs]) for view in views})
    return stacked


def encode_references(encoders, batches, device):
    """For each batch of jobs with the same views (refs, vit) as HarmoView.forward takes them.
    All latents first, then all features, so that each network loads once."""
    pictures = [stack_references(jobs) for jobs in batches]
    refs, vit = [], []
    for identities in pictures:
        latents = [{view: encoders.encode(picture[:, :, None])[:, :, 0].to(device)
                    for view, picture in views.items()} for views in identities or ()]
        refs.append(None if identities is None else latents)
    for identities in pictures:
        features = [encoders.features(views["front"]).to(device) if "front" in views else None
                    for views in identities or ()]
        vit.append(None if identities is None else features)
    return list(zip(refs, vit))


@torch.no_grad()
def generate(model, encoders, jobs, recipe, frames, batch=1):
    """The videos of these jobs, [3, frames, H, W] in -1..1 each. Captions, references, denoising, decoding:
    one network after the other is in memory. A video's noise depends on its own seed only.

    model   an Experts
    jobs    of one size; every `batch` neighbours have the same views and share a forward
    recipe  a row of SAMPLE_RECIPES
    """
    text = encoders.text([*(job.prompt for job in jobs), recipe["negative"]]).to(model.device)
    text, no_text = text[:-1], text[-1:]
    parts = [slice(i, i + batch) for i in range(0, len(jobs), batch)]
    encoded = encode_references(encoders, [jobs[part] for part in parts], model.device)
    velocities = [guided(model, text[part], no_text, refs, vit, recipe["guide_text"], recipe["guide_refs"],
                         model.boundary) for part, (refs, vit) in zip(parts, encoded)]
    shape = encoders.latent_shape(frames, jobs[0].size)
    noise = data.noise_of(shape, [torch.Generator().manual_seed(job.seed) for job in jobs])
    start, loading = time.perf_counter(), model.loading
    with tqdm(total=len(jobs) * recipe["steps"], desc="sampling", unit=" steps", disable=None) as bar:
        def velocity(x, t):  # all jobs step together, so that each expert loads once
            bar.update(len(jobs))
            return torch.cat([v(x[part], t) for part, v in zip(parts, velocities)])
        with autocast(model.device, model.precision):
            latents = solve(velocity, noise.to(model.device), recipe["steps"], recipe["shift"],
                            recipe["solver"]).cpu()
    model.stepping += time.perf_counter() - start - (model.loading - loading)
    if not latents.isfinite().all():
        raise UserError("the video is not finite: the checkpoint has diverged, or guidance is too strong")
    if not isinstance(encoders, toy.ToyEncoders):
        model.drop()  # room for the VAE
    return [encoders.decode(latent[None])[0].cpu() for latent in latents]


# ------------------------------------------------------------------------------------------------ checkpoints
@dataclass
class Found:
    """What --ckpt names; no weights are read for it."""
    networks: list  # (folder, checkpoint of train.py in it, or None for a Wan release); two for Wan2.2
    config: DiTConfig
    kind: str  # a key of SAMPLE_RECIPES
    meta: dict  # checkpoint.json; empty for a Wan release

    @property
    def has_references(self):
        return bool(self.meta)


def find(ckpt):
    """--ckpt -> Found. A folder of a checkpoint, of a run (its newest one), or of a Wan release; each of two
    experts may be either. Raises UserError where a file's names or shapes do not fit."""
    folder = Path(ckpt)
    pair = (folder / "high_noise_model").is_dir()
    parts = [folder / "high_noise_model", folder / "low_noise_model"] if pair else [folder]
    networks = [(part, find_checkpoint(part)) for part in parts]
    release = pair or (folder / "transformer").is_dir() or any(folder.glob("*diffusion*.safetensors*"))
    if not release and not networks[0][1]:
        raise UserError(f"no checkpoint at {ckpt}: make one with `python train.py --stage all`, about ten "
                        "minutes on a laptop, or give the folder of a Wan checkpoint")
    configs, meta = [], {}
    for part, trained in networks:
        with torch.device("meta"):
            if trained:
                meta = meta or read_meta(trained)
                network = check_checkpoint(trained)
            else:
                network = HarmoView(wan_config(part))
                match_wan(network, part)
        configs.append(network.config)
    if any(config != configs[0] for config in configs):
        raise UserError(f"{ckpt}: its two experts are not of one size and kind")
    kind = "wan2.2" if pair else "wan2.1"
    return Found(networks, configs[0], kind if configs[0].is_wan else "toy", meta)


def default_checkpoint():
    """The toy run of this folder, or else the toy that comes with the code."""
    shipped = Path(__file__).with_name("assets") / "toy"
    return "out/toy" if find_checkpoint("out/toy") or not shipped.exists() else str(shipped)


def export(ckpt, folder):
    """The averaged weights of a checkpoint of train.py in bf16, and what sampling needs with them."""
    source, folder = find_checkpoint(ckpt), Path(folder)
    if not source:
        raise UserError(f"--export: no checkpoint of train.py at {ckpt}")
    if folder.exists():
        raise UserError(f"--export {folder} exists: remove it or choose another folder")
    probe_writable(folder.parent)
    network, meta = load_checkpoint(source)
    tokenizer = source / toy.ToyEncoders.TOKENIZER
    if not network.config.is_wan and not tokenizer.is_file():  # Wan's is in its own folder
        raise UserError(f"{tokenizer}: no such file, and without it nothing can be sampled: "
                        "use another checkpoint")
    weights = {name: value.bfloat16() for name, value in network.state_dict().items()}
    save_checkpoint(folder, {"ema": weights}, meta, [] if network.config.is_wan else [tokenizer])
    print(f"{folder}: {sum(f.stat().st_size for f in folder.iterdir()) / 2**20:.1f} MiB from {source}")


def load(ckpt, wan=None, offload=False, tile=None, compiled=False, precision="auto", need_vit=False):
    """--ckpt -> model (an Experts), its encoders, Found; says which checkpoint it took.

    wan        where umT5 and the VAE are; default: ckpt, or the folder that training started from
    need_vit   a missing ViT is an error
    offload, tile, compiled, precision   as --offload, --tile, --compile and --precision
    """
    found = find(ckpt)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for _, trained in found.networks:
        if trained:
            meta = read_meta(trained)
            print(f"checkpoint {trained} (stage {meta.get('stage')} {meta.get('name')}, "
                  f"step {meta.get('step')})")
    if found.kind == "toy":
        if wan:
            raise UserError(f"--wan {wan}: {ckpt} is a toy, which has encoders of its own: leave --wan out")
        dtype = torch.float32
        encoders = toy.ToyEncoders(found.networks[0][1], found.meta["world"]["size"])
    else:
        dtype = torch.bfloat16 if uses_bf16(device, precision) else torch.float32
        encoders = WanEncoders(wan or found.meta.get("wan") or ckpt, device, dtype, offload, tile, need_vit)

    def load_network(part, trained):
        encoders.drop()
        if trained:
            network = load_checkpoint(trained)[0].to(dtype)
        else:
            with torch.device("meta"):
                network = HarmoView(wan_config(part)).to(dtype)
            load_wan(network, part)
        network = network.eval().requires_grad_(False)
        if offload:
            stream_blocks(network, device)
            return network
        if compiled:
            network.compile_blocks()
        return network.to(device)
    loaders = [functools.partial(load_network, *network) for network in found.networks]
    boundary = BOUNDARY.get(found.kind, 0.0)
    return Experts(loaders, found.config, device, boundary, precision), encoders, found


# --------------------------------------------------------------------------------------------------- the jobs
def make_jobs(args, found, frames, size):
    """What --prompts, --prompt, --refs, --views and --swap ask for, as Jobs with their pictures."""
    if args.prompts:
        jobs = data.read_jobs(args.prompts, args.seed)
    elif args.prompt is not None:
        jobs = [Job(args.prompt, None, args.seed, files=args.refs or [])]
    elif found.kind == "toy":
        jobs = [replace(job, seed=args.seed) for job in toy.held_out(args.views, frames, size[0])]
    else:
        raise UserError("--prompt is missing: say what happens")
    for job in jobs:
        if job.references is None:
            add_references(job, args, found, size)
        job.size = toy.frame_size(size[0], len(job.references)) if found.kind == "toy" else size
    if not args.swap:
        return jobs
    pairs = [job for job in jobs if job.references and len(job.references) == 2]
    if not pairs or args.prompts and len(pairs) < len(jobs) or args.prompt and not pairs:
        raise UserError("--swap exchanges two people: give --refs twice, or a prompt of two people")
    swapped = []
    for job in pairs:
        exchanged = replace(job, references=job.references[::-1], files=job.files[::-1],
                            note=" (references exchanged)", truth=None)
        swapped += [replace(job, note="", truth=None), exchanged]
    return swapped


def add_references(job, args, found, size):
    """Read a job's pictures; a toy's prompt without any shows people that training never saw."""
    if len(job.files) > found.config.max_identities:
        raise UserError(f"{len(job.files)} people (one --refs each) for {job.prompt[:40]!r}: "
                        f"this checkpoint holds at most {found.config.max_identities}")
    if job.files and not found.has_references:
        raise UserError(f"{args.ckpt} is plain Wan, which has never seen references: "
                        "give a checkpoint that train.py made, or leave --refs out")
    if job.files:
        job.references = data.read_references(job.files, size)
    elif found.kind == "toy":
        people = 2 if "two people" in job.prompt else 1
        job.references = toy.held_out_references(range(people), args.views or VIEWS, size[0])
    elif found.has_references:
        job.references = [{}]  # one person's proxies


def check_prompts(jobs, encoders, text_len):
    """UserError for a prompt that this checkpoint cannot read to its end."""
    for job in jobs:
        length = encoders.tokenizer([job.prompt])[0].shape[1]
        if length > text_len:
            raise UserError(f"the prompt {job.prompt[:40]!r}... has {length} tokens or more; "
                            f"this checkpoint reads at most {text_len}")


# -------------------------------------------------------------------------------------------------------- CLI
guidance = in_range(float, -100, 100, "a number from -100 to 100")


def recipe_flags(add):
    """Flags that override SAMPLE_RECIPES; eval.py has them too."""
    add("--steps", type=count, help="solver steps")
    add("--shift", type=positive, help="timestep shift: more than 1 spends more steps at high noise")
    add("--guide-text", type=guidance, nargs="+",
        help="guidance towards the caption; 1 is none; two numbers: at high noise, at low noise")
    add("--guide-refs", type=guidance, help="guidance towards the references; 1 is none")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto",
        help="matmuls under autocast; auto: bf16 if fast here")


def override(recipe, args):
    """A row of SAMPLE_RECIPES with the flags that were given."""
    recipe = dict(recipe)
    if args.guide_text and len(args.guide_text) > len(recipe["guide_text"]):
        raise UserError(f"--guide-text got {len(args.guide_text)} numbers; "
                        "expected one, or two for a pair of experts")
    for name in recipe:
        if getattr(args, name, None) is not None:
            recipe[name] = getattr(args, name)
    return recipe


def arguments(argv=None):
    p = Parser(description=__doc__)
    what = p.add_argument_group("what to show").add_argument
    what("--refs", nargs="+", action="append", metavar="PICTURE", type=nonempty,
         help="one person's views; give it once per person")
    what("--prompt", type=nonempty, help="the caption (toy, without --refs: of people it never saw)")
    what("--prompts", metavar="FILE", type=Path,
         help='JSONL, one video a line: {"prompt": "...", "refs": [[...], ...], "seed": 0}')
    what("--views", nargs="+", choices=VIEWS, help="toy, without --refs: the views that are given")
    what("--swap", action="store_true",
         help="again below with the two people's references exchanged, same noise")
    what("--ckpt", type=nonempty, help="folder of a checkpoint or of a run (its newest one), or of a Wan "
         "checkpoint (default out/toy, or where that is empty the toy that comes with the code)")
    what("--wan", metavar="DIR", type=nonempty, help="where umT5, the VAE and the ViT are (default: the Wan "
         "folder that --ckpt is or started from)")
    what("--out", default="out/sample", help="where to write, without suffix (default out/sample)")
    how = p.add_argument_group("how (defaults by kind of checkpoint: SAMPLE_RECIPES)").add_argument
    how("--frames", type=count, help="frames, for Wan 4n+1 (default: as trained; Wan 81)")
    how("--size", type=picture_size, help="HEIGHTxWIDTH in pixels (default: as trained; Wan 480x832)")
    how("--fps", type=frame_rate, help="frames per second of the MP4")
    how("--solver", choices=SOLVERS)
    recipe_flags(how)
    how("--negative", help="what the video should not be")
    how("--seed", type=seed_number, default=0)
    how("--export", metavar="DIR", type=nonempty,
        help="write the checkpoint there in bf16, with what sampling needs, and stop")
    card = p.add_argument_group("speed and memory").add_argument
    card("--offload", action="store_true", help="weights stay in CPU memory, block by block on the GPU")
    card("--tile", type=count, help="pixels a side that the VAE works on at a time, for example 256")
    card("--no-fused", action="store_true", help="PyTorch's operations instead of the Triton kernels")
    card("--compile", action="store_true",
         help="torch.compile every block (needs a C++ compiler or a GPU, and a minute once)")
    args = p.parse_args(argv)
    if args.prompts and (args.refs or args.prompt is not None):
        raise UserError("--prompts FILE holds prompts and references: leave --prompt and --refs out")
    if args.refs and args.prompt is None:
        raise UserError("--refs needs --prompt: say what the people do")
    if args.views and (args.refs or args.prompts):
        raise UserError("--views chooses among the toy's own references: "
                        "leave it out with --refs or --prompts")
    if args.compile and args.offload:
        raise UserError("--compile needs its blocks to stay on the GPU: give it without --offload")
    args.ckpt = args.ckpt or default_checkpoint()
    return args


def picture_size(text):
    """A type for add_argument: "480x832", or one side of a square -> (H, W)."""
    sides = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if not sides:
        raise UserError(f"--size {text[:40]}: expected HEIGHTxWIDTH, for example 480x832, or one side")
    return int(sides[1]), int(sides[2] or sides[1])


def video_size(args, found):
    """Frames and (H, W) to make, checked."""
    default_frames, default_size = 81, (480, 832)
    if found.kind == "toy":
        default_frames, default_size = found.meta["world"]["frames"], (found.meta["world"]["size"],) * 2
    frames, size = args.frames or default_frames, args.size or default_size
    if found.kind == "toy" and (frames, size) != (default_frames, default_size):
        raise UserError(f"{frames} frames of {size[0]}x{size[1]}: this checkpoint makes "
                        f"{default_frames} frames of {default_size[0]}x{default_size[1]}")
    if found.kind != "toy" and (frames % 4 != 1 or min(size) < 16 or size[0] % 16 or size[1] % 16):
        raise UserError(f"{frames} frames of {size[0]}x{size[1]}: expected 4n+1 frames (81) and sides that "
                        "are multiples of 16 (480x832)")
    return frames, size


def describe(job, args, frames, recipe):
    """How to make a video again, as JSON for its file; without the folders of this machine."""
    names = [[Path(data.view_of(file)[1]).name for file in files] for files in job.files]
    return json.dumps({"prompt": job.prompt, "seed": job.seed, "refs": names, "ckpt": Path(args.ckpt).name,
                       "frames": frames, "size": job.size, **recipe}, ensure_ascii=False)


def write(jobs, files, sheet, descriptions, fps):
    """An MP4 a job, and their contact sheet."""
    info = PngInfo()
    for n, (job, file, description) in enumerate(zip(jobs, files, descriptions), 1):
        data.write_video(file, job.video, fps, description)
        info.add_itxt(f"video {n}", description)
    with atomic_file(sheet) as path:
        data.contact_sheet(jobs).save(path, pnginfo=info)


def main(argv=None):
    args = arguments(argv)
    if args.export:
        return export(args.ckpt, args.export)
    print(use_fused(False if args.no_fused else None))
    out = Path(args.out.removesuffix(".mp4").removesuffix(".png"))
    if out.name in ("", ".."):
        raise UserError(f"--out {args.out}: expected the name of a file to write, without suffix")
    model, encoders, found = load(args.ckpt, args.wan, args.offload, args.tile, args.compile, args.precision,
                                  need_vit=bool(args.refs))
    recipe = override(SAMPLE_RECIPES[found.kind], args)
    frames, size = video_size(args, found)
    jobs = make_jobs(args, found, frames, size)
    check_prompts(jobs, encoders, found.config.text_len)
    numbers = range(1, len(jobs) + 1)
    videos = [out.with_name(f"{out.name}-{n}.mp4" if len(jobs) > 1 else f"{out.name}.mp4") for n in numbers]
    sheets = [out.with_name(f"{out.name}-{n}.png" if len(jobs) > ROUND else f"{out.name}.png")
              for n in numbers[::ROUND]]
    inputs = [data.view_of(file)[1] for job in jobs for files in job.files for file in files]
    probe_writable(out.parent)
    check_outputs([*videos, *sheets], inputs + [args.prompts or __file__])
    print(f"{frames} frames of {size[0]}x{size[1]}, "
          + ", ".join(f"{name} {value}" for name, value in recipe.items() if value), flush=True)
    for first, sheet in zip(range(0, len(jobs), ROUND), sheets):
        start, some = time.perf_counter(), jobs[first:first + ROUND]
        before = model.stepping, model.loading
        for size in dict.fromkeys(job.size for job in some):
            same = [job for job in some if job.size == size]
            for job, video in zip(same, generate(model, encoders, same, recipe, frames)):
                job.video = video
        files = videos[first:first + ROUND]
        write(some, files, sheet, [describe(job, args, frames, recipe) for job in some], recipe["fps"])
        stepping, loading = model.stepping - before[0], model.loading - before[1]
        print(f"{', '.join(map(str, files))} and {sheet} in {time.perf_counter() - start:.1f} s: "
              f"{stepping / len(some) / recipe['steps']:.3g} seconds a step, {loading:.3g} to load the "
              "transformer", flush=True)
        for job in some:
            job.video = None  # 10,000 videos do not fit into memory


if __name__ == "__main__":
    run_script(main, "--offload or --tile 256")
