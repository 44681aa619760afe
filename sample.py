"""Make videos from a caption and reference pictures.

  python sample.py          people the toy never saw, from the newest checkpoint
  python sample.py --refs a_front.png a_left.png --refs b_front.png --prompt "a close-up of two people, ..."
  python sample.py --ckpt ckpts/Wan2.1-T2V-1.3B --prompt "..."      a Wan checkpoint, plain text-to-video

One --refs per person, in the caption's order. A file's view is the word front, left, right or back in its
name, or view=path. Writes OUT.mp4 and OUT.png, a contact sheet with the references on the left and the frames
on the right.
"""
import argparse
import functools
import json
import math
import re
import textwrap
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import data
from encoders import UMT5, DINOv2, WanVAE, stream_blocks
from kernels import use_fused
from model import (CONFIGS, OWN, DiTConfig, HarmoView, autocast, find_checkpoint, load_checkpoint, load_wan,
                   peak_memory, random_inputs, read_meta, report_speed, save_checkpoint, uses_bf16,
                   wan_config)
from rope import VIEWS, UserError, run_script

SOLVERS = ("unipc", "dpm++", "euler")
# Defaults by kind of checkpoint; a pair of guidance scales is for high and low noise. The toy's were chosen
# on its benchmark (LOG.md), Wan's are its authors'.
RECIPES = {
    "toy": dict(steps=4, shift=100.0, solver="euler", guide_text=(1.0,), guide_refs=1.0, fps=4, negative=""),
    "wan2.1": dict(steps=50, shift=5.0, solver="unipc", guide_text=(5.0,), guide_refs=5.0, fps=16,
                   negative=data.NEGATIVE_PROMPT),
    "wan2.2": dict(steps=40, shift=12.0, solver="unipc", guide_text=(4.0, 3.0), guide_refs=4.0, fps=16,
                   negative=data.NEGATIVE_PROMPT),
}


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


def guide_weights(scale, seen):
    """Of the predictions with caption and references, with the caption alone, with neither."""
    return seen, scale - seen, 1 - scale


def guided(model, text, no_text, refs, vit, guide_text=(1.0,), guide_refs=1.0, boundary=0.0):
    """velocity(x, t) with two guidance scales: from nothing to the caption, and from the caption to
    caption and references.

    v = v(-, -) + guide_text * (v(text, -) - v(-, -)) + guide_refs * (v(text, refs) - v(text, -)), where "no
    references" is every slot as proxies and "no caption" the rows no_text. Written as one weighted sum, terms
    of weight 0 cost nothing. Of two scales in guide_text the first is for t >= 1000 * boundary. Without a
    single reference, or with refs None (plain Wan), it is Wan's guidance.
    """
    nobody, unseen = refs and [{} for _ in refs], vit and [None for _ in vit]

    def velocity(x, t):
        scale = guide_text[0] if t >= 1000 * boundary else guide_text[-1]
        weights = guide_weights(scale, guide_refs if any(refs or ()) else scale)
        terms = (text, refs, vit), (text, nobody, unseen), (no_text, nobody, unseen)
        return sum(weight * model(x, t.expand(len(x)), rows.expand(len(x), -1, -1), r, v)
                   for weight, (rows, r, v) in zip(weights, terms) if weight)
    return velocity


@torch.no_grad()
def encode_people(encoders, rows, device):
    """Each row's reference pictures, one dict per identity {view: [B, 3, H, W] in -1..1} or None for plain
    Wan -> (refs, vit) a row, as HarmoView.forward takes them. All latents first, so that each network loads
    once."""
    refs = [people and [{view: encoders.encode(image[:, :, None])[:, :, 0].to(device)
                         for view, image in views.items()} for views in people] for people in rows]
    vit = [people and [encoders.features(views["front"]).to(device) if "front" in views else None
                       for views in people] for people in rows]
    return list(zip(refs, vit))


def noise_of(shape, seeds):
    """[B, *shape], each sample's from its own seed."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def denoise(velocity, shape, seeds, recipe, device):
    """Latents [B, *shape], float32; a video's noise depends on its own seed alone.
    recipe: steps, shift and solver as in RECIPES."""
    noise = noise_of(shape, seeds)
    with autocast(device):
        return solve(velocity, noise.to(device), recipe["steps"], recipe["shift"], recipe["solver"])


def generate(model, encoders, captions, people, frames, size, seeds, recipe):
    """Videos [B, 3, frames, H, W] in -1..1 of B captions, all with the same views.

    people  one dict per identity, {view: reference pictures [B, 3, H, W] in -1..1}; None: plain Wan
    size    (H, W)
    seeds   B ints
    recipe  a row of RECIPES
    """
    text = encoders.text([*captions, recipe["negative"]]).to(model.device)
    (refs, vit), = encode_people(encoders, [people], model.device)
    velocity = guided(model, text[:-1], text[-1:], refs, vit, recipe["guide_text"], recipe["guide_refs"],
                      model.boundary)
    shape = data.latent_shape(model.config.in_dim, frames, size)
    latent = denoise(velocity, shape, seeds, recipe, model.device)
    return encoders.decode(latent.cpu())


class Experts:
    """One network, or Wan2.2's two: the first for t >= 1000 * boundary, the second below. Each is loaded when
    it is first asked and only one is held. Called like HarmoView.

    load  one function a network, () -> HarmoView on the device
    """

    def __init__(self, load, config, device, boundary=0.0):
        self.load, self.config, self.device, self.boundary = load, config, device, boundary
        self.at = self.network = None
        self.loading = 0.0  # seconds, so far

    def __call__(self, x, t, text, refs=None, vit=None):
        at = 0 if float(t[0]) >= 1000 * self.boundary else 1
        if at != self.at:
            self.drop()
            start = time.perf_counter()
            self.network, self.at = self.load[at](), at
            self.loading += time.perf_counter() - start
        return self.network(x, t, text, refs, vit)

    def drop(self):
        self.at = self.network = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------- reading and writing
def view_of(argument):
    """"left=path" or a path with one view's word in its name -> (view, path)."""
    name, found, path = argument.partition("=")
    if found and name in VIEWS:
        return name, path
    words = [word for word in re.findall("[a-z]+", Path(argument).stem.lower()) if word in VIEWS]
    if len(words) != 1:
        raise UserError(f"{argument}: which view is it? Its name says {' and '.join(words) or 'none'}; "
                        f"name the file or write view=path with one of {', '.join(VIEWS)}, "
                        f"for example front={argument}")
    return words[0], argument


def read_picture(path, size):
    """A picture file -> [3, H, W] in -1..1, size (H, W): EXIF orientation, alpha on white, Lanczos fit,
    white padding."""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGBA")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --refs expects picture files") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable picture ({error}); "
                        "--refs expects PNG, JPEG or WebP files") from None
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image = ImageOps.pad(image, size[::-1], Image.Resampling.LANCZOS, color="white")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*size, 3)
    return data.from_bytes(pixels).permute(2, 0, 1)


def read_people(arguments, size):
    """--refs values, one list of files per person -> [{view: [1, 3, H, W]}]."""
    people = []
    for files in arguments:
        views = {}
        for view, path in map(view_of, files):
            if view in views:
                raise UserError(f"{path}: a second {view} view of the same person; "
                                "give one picture a view, and one --refs a person")
            views[view] = read_picture(path, size)[None]
        people.append(views)
    return people


def read_jobs(path):
    """A JSONL file, one video a line: {"prompt": ..., "refs": [[files of person 1], ...], "seed": ...},
    the last two optional."""
    jobs = []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable text file ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            job = json.loads(line)
            prompt, refs, seed = job["prompt"], job.get("refs") or [], job.get("seed")
            good = (isinstance(prompt, str) and prompt.strip()
                    and (seed is None or data.is_seed(seed))
                    and all(isinstance(files, list) and files for files in refs)
                    and all(isinstance(file, str) for files in refs for file in files))
        except (ValueError, KeyError, TypeError, AttributeError):
            good = False
        if not good:
            raise UserError(f'{path} line {number}: expected {{"prompt": "...", "refs": [["front.png", ...], '
                            f'...], "seed": 0}}, the last two optional; got {line[:60]}')
        jobs.append({"prompt": prompt, "refs": refs, "seed": seed})
    if not jobs:
        raise UserError(f"{path} holds no prompt; expected one JSON object a line")
    return jobs


def contact_sheet(rows, tile=112):
    """A PIL image. rows: dicts of people (list of {view: [3, S, S]}), video [3, F, S, S], prompt,
    and perhaps truth, a second video, and a note to go behind the prompt.

    Each person is a block of 2 x 2 views on the left, a view that was not given an empty square; at most
    eight frames are on the right, evenly spaced, the prompt is below.
    """
    font, gap, line, most = ImageFont.load_default(13), 6, 17, 8

    def wide(picture):  # [3, H, W] at that height
        return round(tile * picture.shape[2] / picture.shape[1])
    ref = max((wide(picture) for row in rows for views in row["people"] for picture in views.values()),
              default=tile)
    left = max(len(row["people"]) for row in rows) * (ref + gap) + gap
    total = left + max(min(most, v.shape[1]) * wide(v[:, 0]) for v in (row["video"] for row in rows)) + gap
    prompts = [textwrap.fill(row["prompt"] + row.get("note", ""), (total - 2 * gap) // 7) for row in rows]
    heights = [tile * (1 + ("truth" in row)) + line * (text.count("\n") + 1) + 2 * gap
               for row, text in zip(rows, prompts)]
    sheet = Image.new("RGB", (total, sum(heights) + gap), "white")
    draw, y = ImageDraw.Draw(sheet), gap
    for row, text, high in zip(rows, prompts, heights):
        for k, views in enumerate(row["people"]):
            for v, view in enumerate(VIEWS):
                at = (gap + k * (ref + gap) + v % 2 * (ref // 2), y + v // 2 * (tile // 2))
                if view in views:
                    sheet.paste(data.to_image(views[view], tile // 2, ref // 2), at)
                draw.rectangle((*at, at[0] + ref // 2 - 1, at[1] + tile // 2 - 1), outline="#cccccc")
        for i, video in enumerate((row["video"], row["truth"]) if "truth" in row else (row["video"],)):
            step = wide(video[:, 0])
            frames = torch.linspace(0, video.shape[1] - 1, min(most, video.shape[1])).round().long()
            for c, f in enumerate(frames):
                sheet.paste(data.to_image(video[:, f], tile - 1, step - 1), (left + c * step, y + i * tile))
        if "truth" in row:
            draw.text((gap, y + tile + tile // 2 - 8), "ground truth", fill="#666666", font=font)
        draw.multiline_text((gap, y + tile * (1 + ("truth" in row))), text, fill="black", font=font)
        y += high
    return sheet


# ------------------------------------------------------------------------------------------------ checkpoints
def describe(ckpt, named=False):
    """--ckpt -> its networks, two for Wan2.2: [(folder, the checkpoint of train.py in it, or None where it is
    Wan's)]; their DiTConfig; its meta, with kind, a key of RECIPES, and for the toy the world it was trained
    on. Reads no weights. named: ckpt may be a config's name, which has no networks."""
    if named and ckpt in CONFIGS:
        config = CONFIGS[ckpt]
        return [], config, {"kind": "wan2.1" if config.in_dim == 16 else "toy", "world": data.WORLDS[ckpt]}
    folder = Path(ckpt)
    pair = (folder / "high_noise_model").is_dir()
    parts = [folder / "high_noise_model", folder / "low_noise_model"] if pair else [folder]
    networks = [(part, find_checkpoint(part)) for part in parts]
    wan = pair or (folder / "transformer").is_dir() or any(folder.glob("*diffusion*.safetensors*"))
    if not wan and not networks[0][1]:
        raise UserError(f"no checkpoint at {ckpt}: make one with `python train.py --stage all`, about ten "
                        "minutes on a laptop, or give the folder of a Wan checkpoint"
                        + f", or one of {', '.join(CONFIGS)}" * named)
    metas = [read_meta(trained) if trained else {} for _, trained in networks]
    config = DiTConfig(**metas[0]["config"]) if metas[0] else wan_config(parts[0])
    meta = metas[0] or metas[-1]
    kind = "toy" if meta and not meta.get("wan") else "wan2.2" if pair else "wan2.1"
    return networks, config, meta | {"kind": kind}


def default_checkpoint():
    """The toy run of this folder, or else the toy that comes with the code."""
    shipped = Path(__file__).with_name("assets") / "toy"
    return "out/toy" if find_checkpoint("out/toy") or not shipped.exists() else str(shipped)


def export(ckpt, folder):
    """The averaged weights of a checkpoint of train.py in bf16, and what sampling needs beside them."""
    source, folder = find_checkpoint(ckpt), Path(folder)
    if not source:
        raise UserError(f"--export: no checkpoint of train.py at {ckpt}")
    if folder.exists():
        raise UserError(f"--export {folder} exists: remove it or choose another folder")
    data.probe_writable(folder.parent)
    network, meta = load_checkpoint(source)
    tokenizer = source / data.ToyEncoders.TOKENIZER
    files = [tokenizer] if tokenizer.exists() else []  # Wan's is in its own folder
    save_checkpoint(folder, {"ema": {k: v.bfloat16() for k, v in network.state_dict().items()}}, meta, files)
    print(f"{folder}: {sum(f.stat().st_size for f in folder.iterdir()) / 2**20:.1f} MiB from {source}")


def load(ckpt, wan=None, offload=False, tile=None, compiled=False):
    """--ckpt -> model (an Experts), its encoders, its meta as in `describe`; says which checkpoint it took.

    ckpt  a checkpoint folder of train.py, a run's folder, or a Wan checkpoint's; of two experts each may be
          either
    wan   where umT5 and the VAE are; default: ckpt, or the folder that training started from
    offload, tile, compiled   as --offload, --tile and --compile
    """
    networks, config, meta = describe(ckpt)
    ours = next((trained for _, trained in networks if trained), None)
    if ours:
        print(f"checkpoint {ours} (stage {meta['stage']} {meta['name']}, step {meta['step']})")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if meta["kind"] == "toy":
        encoders, dtype = data.ToyEncoders(ours, meta["world"]["size"]), torch.float32
    else:
        dtype = torch.bfloat16 if uses_bf16(device) else torch.float32
        encoders = data.WanEncoders(wan or meta.get("wan") or ckpt, device, dtype, offload, tile)

    def load_network(part, trained):
        if meta["kind"] != "toy":
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
    loaders = [functools.partial(load_network, *network) for network in networks]
    boundary = 0.875 if meta["kind"] == "wan2.2" else 0.0
    return Experts(loaders, config, device, boundary), encoders, meta


def dry_run(args):
    """Print modules, parameters, memory by phase and FLOPs a step, from shapes alone."""
    parts, config, meta = describe(args.ckpt, named=True)
    trained = parts[0][1] if parts else args.refs
    if config.in_dim != 16:
        raise UserError(f"{args.ckpt}: --dry-run is for Wan's sizes; the toy runs in seconds")
    recipe, frames, (H, W) = resolve(args, config, meta)
    with torch.device("meta"):
        networks = {"transformer": HarmoView(config), "umT5": UMT5(), "VAE": WanVAE(), "ViT": DINOv2()}
    count = {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items()}
    own = sum(p.numel() for name, p in networks["transformer"].named_parameters() if name.startswith(OWN))
    more = {"transformer": f", {own:,} of them HarmoView's own; x {len(parts) or 1} expert(s)"}
    for name, n in count.items():
        print(f"{name:12}{n:>16,} parameters{more.get(name, '')}")

    people = [[view_of(file)[0] for file in files] for files in args.refs or ([[]] if trained else [])]
    latent = (H // 16) * (W // 16)  # tokens of one latent frame or reference
    video = (frames + 3) // 4 * latent
    given = sum(map(len, people))
    nobody = video + len(people) * len(VIEWS) * config.proxy_tokens
    tokens = nobody + given * (latent - config.proxy_tokens)
    scale = recipe["guide_text"][0]
    weights = guide_weights(scale, recipe["guide_refs"] if people else scale)
    flops = [networks["transformer"].flops(n) / 1e12
             for weight, n in zip(weights, (tokens, nobody, nobody)) if weight]
    print(f"{frames} frames of {H}x{W}: {video:,} tokens, with references {tokens:,}")

    gib = 2**30
    streamed = {name: args.offload * sum(p.numel() for p in networks[name].blocks[1:].parameters())
                for name in ("transformer", "umT5")}
    hidden = tokens * (3 * 4 * config.dim + 2 * (4 * config.dim + 2 * config.ffn_dim))
    # four frames at the VAE's full width, of which it holds 10 and 12.5 (measured on a CPU)
    pixels = 4 * 4 * 96 * min(H, args.tile or H) * min(W, args.tile or W)
    phases = {"umT5, bf16": 2 * (count["umT5"] - streamed["umT5"]),
              "VAE encode, float32": 4 * count["VAE"] + 10 * pixels, "ViT, bf16": 2 * count["ViT"],
              "denoising, bf16": 2 * (count["transformer"] - streamed["transformer"]) + hidden,
              "VAE decode, float32": 4 * count["VAE"] + 12.5 * pixels}
    print("expected memory, one phase after the other (weights exact, activations estimated):")
    for phase, size in phases.items():
        print(f"  {phase:22}{size / gib:6.1f} GiB")
    print(f"{flops[0]:,.0f} TFLOP a forward, {len(flops)} forwards a step with guidance, "
          f"{sum(flops):,.0f} TFLOP a step, {recipe['steps']} steps")


@torch.no_grad()
def bench(args):
    """Forwards on random latents, with random weights in the sizes of --ckpt."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _, config, meta = describe(args.ckpt, named=True)
    with device:
        model = HarmoView(config).to(torch.bfloat16 if uses_bf16(device) else torch.float32)
    if args.compile:
        model.compile_blocks()
    _, frames, size = resolve(args, config, meta)
    shape = data.latent_shape(model.config.in_dim, frames, size)
    inputs = random_inputs(model.config, shape, 1, device)
    with autocast(device):
        report_speed(lambda: model(*inputs), model, shape, 1, 1, device)


# -------------------------------------------------------------------------------------------------------- CLI
def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what to show").add_argument
    what("--refs", nargs="+", action="append", metavar="PICTURE",
         help="one person's views; give it once per person")
    what("--prompt", help="the caption (toy, without --refs: of people it never saw)")
    what("--prompts", metavar="FILE",
         help='JSONL, one video a line: {"prompt": "...", "refs": [[...], ...], "seed": 0}')
    what("--views", nargs="+", choices=VIEWS, help="toy, without --refs: the views that are given")
    what("--swap", action="store_true",
         help="again below with the two people's references exchanged, same noise")
    what("--ckpt", help="folder of a checkpoint or of a run (its newest one), or of a Wan checkpoint "
         "(default out/toy, or where that is empty the toy that comes with the code)")
    what("--wan", metavar="DIR", help="where umT5, the VAE and the ViT are (default: the Wan folder that "
         "--ckpt is or started from)")
    what("--out", default="out/sample", help="where to write, without suffix (default out/sample)")
    how = p.add_argument_group("how (defaults by kind of checkpoint: RECIPES)").add_argument
    how("--frames", type=int, help="frames, for Wan 4n+1 (default: as trained; Wan 81)")
    how("--size", help="HEIGHTxWIDTH in pixels (default: as trained; Wan 480x832)")
    how("--fps", type=int, help="frames per second of the MP4")
    how("--steps", type=int, help="solver steps")
    how("--shift", type=float, help="timestep shift")
    how("--solver", choices=SOLVERS)
    how("--guide-text", type=float, nargs="+",
        help="guidance towards the caption; 1 is none; two numbers: at high noise, at low noise")
    how("--guide-refs", type=float, help="guidance towards the references; 1 is none")
    how("--negative", help="what the video should not be")
    how("--seed", type=int, default=0)
    how("--bench", action="store_true", help="time the transformer on random latents, one person with all "
        "views, and stop; --ckpt may be the name of a config")
    how("--export", metavar="DIR",
        help="write the checkpoint there in bf16, with what sampling needs, and stop")
    card = p.add_argument_group("speed and memory").add_argument
    card("--offload", action="store_true", help="weights stay in CPU memory, block by block on the GPU")
    card("--tile", type=int, help="pixels a side that the VAE works on at a time, for example 256")
    card("--no-fused", action="store_true", help="PyTorch's operations in the place of the Triton kernels")
    card("--compile", action="store_true",
         help="torch.compile every block (needs a C++ compiler or a GPU, and a minute once)")
    card("--dry-run", action="store_true", help="print parameters, memory and FLOPs and stop")
    args = p.parse_args(argv)
    args.ckpt = args.ckpt or default_checkpoint()
    return args


def parse_size(text):
    """"480x832", or one side of a square -> (H, W)."""
    sides = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not sides:
        raise UserError(f"--size {text}: expected HEIGHTxWIDTH, for example 480x832, or one side")
    return int(sides[1]), int(sides[2] or sides[1])


def resolve(args, config, meta):
    """Fill in what the kind of checkpoint decides and check the rest -> recipe, frames, (H, W)."""
    recipe = {name: default if (given := getattr(args, name)) is None else given
              for name, default in RECIPES[meta["kind"]].items()}
    if recipe["fps"] < 1:
        raise UserError(f"--fps {recipe['fps']}: expected at least 1 frame a second")
    if len(recipe["guide_text"]) > len(RECIPES[meta["kind"]]["guide_text"]):
        raise UserError(f"--guide-text got {len(recipe['guide_text'])} numbers; "
                        "expected one, or two for a pair of experts")
    if recipe["steps"] < 1 or recipe["shift"] <= 0:
        raise UserError(f"--steps {recipe['steps']} --shift {recipe['shift']}: "
                        "expected at least 1 step and a shift above 0")
    if args.refs and len(args.refs) > config.max_identities:
        raise UserError(f"{len(args.refs)} people (--refs given {len(args.refs)} times): "
                        f"this checkpoint holds at most {config.max_identities}")
    toy = meta["kind"] == "toy"
    usual, (H, W) = (meta["world"]["frames"], (meta["world"]["size"],) * 2) if toy else (81, (480, 832))
    frames, size = usual if args.frames is None else args.frames, args.size or (H, W)
    if toy and (frames, size) != (usual, (H, W)):
        raise UserError(f"{frames} frames of {size[0]}x{size[1]}: "
                        f"this checkpoint makes {usual} frames of {H}x{W}")
    if not toy and (frames < 1 or frames % 4 != 1 or min(size) < 16 or size[0] % 16 or size[1] % 16):
        raise UserError(f"{frames} frames of {size[0]}x{size[1]}: expected 4n+1 frames (81) and sides that "
                        "are multiples of 16 (480x832)")
    return recipe, frames, size


# what `python sample.py` shows: benchmark cases whose heads turn all the way, and the views given
SHOWN = ((50, VIEWS), (50, ("front",)), (55, VIEWS), (98, VIEWS))


def held_out(prompt, views, frames, size):
    """Rows of people that training never saw: [{people, prompt, truth}], those of SHOWN, or one with the
    prompt given. views: what is given, None: all, or what SHOWN says."""
    pictures = data.benchmark_references(size)

    def given(who, usual=VIEWS):
        return [{v: pictures[i:i + 1, VIEWS.index(v)] for v in views or usual} for i in who]
    if prompt is not None:
        return [{"people": given(range(2 if "two people" in prompt else 1)), "prompt": prompt}]
    rows = []
    for number, usual in SHOWN:
        clip, who = data.benchmark_cases()[number]
        truth = data.benchmark_truth(number, frames, size)
        rows.append({"people": given(who, usual), "prompt": data.caption(clip), "truth": truth,
                     "note": f" (given: {', '.join(views or usual)})"})
    return rows


def rows_of(args, model, meta, frames, size):
    """What to make: [{people, prompt, seed, files, size}], people as for `generate`, None for plain Wan."""
    jobs, rows = read_jobs(args.prompts) if args.prompts else [], []
    if args.prompt is not None:
        jobs = [{"prompt": args.prompt, "refs": args.refs or [], "seed": None}]
    elif not jobs and meta["kind"] != "toy":
        raise UserError("--prompt is missing: say what happens")
    for job in jobs:
        if len(job["refs"]) > model.config.max_identities:
            raise UserError(f"{len(job['refs'])} people for {job['prompt'][:40]!r}: "
                            f"this checkpoint holds at most {model.config.max_identities}")
        if job["refs"] and "stage" not in meta:
            raise UserError(f"{args.ckpt} is plain Wan, which has never seen references: "
                            "give a checkpoint that train.py made, or leave --refs out")
        seed = args.seed if job["seed"] is None else job["seed"]
        row = {"prompt": job["prompt"], "seed": seed, "files": job["refs"]}
        if meta["kind"] == "toy" and not job["refs"]:
            row |= held_out(job["prompt"], args.views, frames, size[0])[0]
        else:  # a HarmoView network without references sees one person's proxies
            row["people"] = read_people(job["refs"], size) or ([{}] if "stage" in meta else None)
        rows.append(row)
    if not jobs:
        rows = [row | {"seed": args.seed, "files": []}
                for row in held_out(None, args.views, frames, size[0])]
    for row in rows:
        row["size"] = data.frame_size(size[0], len(row["people"])) if meta["kind"] == "toy" else size
    if not args.swap:
        return rows
    pairs = [row for row in rows if row["people"] and len(row["people"]) == 2]
    if not pairs or jobs and len(pairs) < len(rows):
        raise UserError("--swap exchanges two people: give --refs twice, or a prompt of two people")
    return [{"prompt": row["prompt"], "seed": row["seed"], "people": row["people"][::order],
             "files": row["files"][::order], "size": row["size"],
             "note": " (references exchanged)" * (order < 0)}
            for row in pairs for order in (1, -1)]


@torch.no_grad()
def make(rows, model, encoders, recipe, frames):
    """Add "video" to every row; all have one size. All captions first, then all references, all denoising and
    all decoding, so that one network after the other is in memory."""
    text = encoders.text([*(row["prompt"] for row in rows), recipe["negative"]]).to(model.device)
    seen = encode_people(encoders, [row["people"] for row in rows], model.device)
    velocities = [guided(model, text[i:i + 1], text[-1:], refs, vit, recipe["guide_text"],
                         recipe["guide_refs"], model.boundary) for i, (refs, vit) in enumerate(seen)]
    bar = tqdm(total=len(rows) * recipe["steps"], desc="sampling", unit=" steps", disable=None)
    start, loaded = time.perf_counter(), model.loading

    def velocity(x, t):  # all rows step together, so that each expert loads once
        bar.update(len(rows))
        return torch.cat([v(x[i:i + 1], t) for i, v in enumerate(velocities)])
    shape = data.latent_shape(model.config.in_dim, frames, rows[0]["size"])
    latents = denoise(velocity, shape, [row["seed"] for row in rows], recipe, model.device).cpu()
    bar.close()
    loading = model.loading - loaded
    print(f"{(time.perf_counter() - start - loading) / bar.total:.3g} seconds a step, "
          f"and {loading:.3g} to load the transformer")
    model.drop()
    for row, latent in zip(rows, latents):
        row["video"] = encoders.decode(latent[None])[0].cpu()


def main(argv=None):
    args = arguments(argv)
    args.size = args.size and parse_size(args.size)
    if not data.is_seed(args.seed):
        raise UserError(f"--seed {args.seed}: expected 0 to 2**63 - 1")
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt is empty: say what happens, "
                        "for example \"a close-up of one person in a red shirt nods ...\"")
    if args.prompts and (args.refs or args.prompt is not None):
        raise UserError("--prompts FILE holds prompts and references: leave --prompt and --refs out")
    if args.refs and args.prompt is None:
        raise UserError("--refs needs --prompt: say what the people do")
    if args.compile and args.offload:
        raise UserError("--compile needs its blocks to stay on the GPU: give it without --offload")
    if args.dry_run:
        return dry_run(args)
    if args.export:
        return export(args.ckpt, args.export)
    print(use_fused(False if args.no_fused else None))
    if args.bench:
        return bench(args)
    out = Path(args.out.removesuffix(".mp4").removesuffix(".png"))
    data.probe_writable(out.parent)
    model, encoders, meta = load(args.ckpt, args.wan, args.offload, args.tile, args.compile)
    recipe, frames, size = resolve(args, model.config, meta)
    print(f"{frames} frames of {size[0]}x{size[1]}, "
          + ", ".join(f"{name} {value}" for name, value in recipe.items() if value))
    rows = rows_of(args, model, meta, frames, size)
    start = time.perf_counter()
    for size in dict.fromkeys(row["size"] for row in rows):
        make([row for row in rows if row["size"] == size], model, encoders, recipe, frames)
    names = [out.with_name(f"{out.name}-{i}.mp4" if len(rows) > 1 else f"{out.name}.mp4")
             for i in range(1, len(rows) + 1)]
    sheet = out.with_name(f"{out.name}.png")
    notes = [json.dumps({"prompt": row["prompt"], "seed": row["seed"], "refs": row["files"],
                         "ckpt": args.ckpt, "frames": frames, "size": row["size"], **recipe},
                        ensure_ascii=False)
             for row in rows]
    for name, row, note in zip(names, rows, notes):
        data.write_video(name, row["video"], recipe["fps"], note)
        row["people"] = [{view: picture[0] for view, picture in views.items()}
                         for views in row["people"] or ()]
    info = PngInfo()
    for i, note in enumerate(notes, 1):
        info.add_itxt(f"video {i}", note)
    contact_sheet(rows).save(sheet, pnginfo=info)
    print(f"{', '.join(map(str, names))} and {sheet} in {time.perf_counter() - start:.1f} s, "
          f"peak memory {peak_memory():.1f} GiB")


if __name__ == "__main__":
    run_script(main)
