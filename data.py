"""What a training step is made of: which views it gets, region masks, and batches from a cache of latents;
pictures, videos and contact sheets.

Clips are encoded once by frozen networks that are handed in (encoders.WanEncoders or toy.ToyEncoders), so
the training loop reads latents only. The toy and Wan have the same cache.
"""
import json
import math
import re
import textwrap
import warnings
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import safetensors.torch
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from checkpoint import (UserError, atomic_file, atomic_folder, is_seed, is_text, lock, save_tensors,
                        source_hash)
from rope import VIEWS


# ------------------------------------------------------------------------------------ which views a step gets
def draw_views(stage, progress, rng, available=VIEWS):
    """Which reference views each person of this step gets.

    stage      a row of train.STAGES
    progress   0..1 through the stage, which moves the dropout from drop[0] to drop[1]
    available  the views that the training set has
    returns    one tuple of view names per person; all samples of a step share it, so shapes and work are
               equal on all ranks. A person is without views only where all are (all_drop).
    """
    if stage.views == "none" or rng.random() < stage.all_drop:
        return ((),) * rng.choice(stage.people)
    candidates = ("front",) if stage.views == "front" else available
    drop = stage.drop[0] + (stage.drop[1] - stage.drop[0]) * progress

    def one_person():
        views = tuple(v for v in candidates
                      if rng.random() >= (stage.drop_front if v == "front" else drop))
        return views or (rng.choice(candidates),)
    return tuple(one_person() for _ in range(rng.choice(stage.people)))


def mask_regions(image, fraction, block, generator):
    """Mv2ID's region masking: image [3, H, W] in -1..1, sides multiples of block, with a random `fraction` of
    its block x block squares painted grey (0)."""
    _, H, W = image.shape
    squares = (H // block) * (W // block)
    mask = torch.randperm(squares, generator=generator) < round(fraction * squares)
    mask = mask.view(H // block, W // block).repeat_interleave(block, 0).repeat_interleave(block, 1)
    return torch.where(mask, torch.zeros(()), image)


def noise_of(shape, generators):
    """Normal noise [B, *shape], each sample's from its own torch.Generator."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


# -------------------------------------------------------------------------------------------------- the cache
def pack(latent, dtype):
    """A latent as a cache stores it; uint8 is for latents that are pixels in -1..1."""
    return to_bytes(latent) if dtype == torch.uint8 else latent.to(dtype)


def unpack(latent):
    return from_bytes(latent) if latent.dtype == torch.uint8 else latent.float()


@torch.no_grad()
def encode_cache(folder, encoders, mask=0.0, variants=4):
    """Encode a folder of clips once; returns the folder inside it with what Dataset reads.

    folder    holds one.safetensors and two.safetensors (clips with one person and with two: video uint8
              [n, 3, F, H, W], refs uint8 [n, people, V, 3, h, w]) and captions.txt, a line a clip
    encoders  WanEncoders or ToyEncoders
    mask      region masking: this fraction of each reference is hidden before any network sees it
    variants  differently masked versions of each reference; 1 where nothing is masked
    Both files then hold latents [n, C, T, H, W] and refs [n, people, variants, V, C, h, w] in the encoders'
    latent_dtype, vit float16 [n, people, variants, levels, tokens, width] of the frontal references, and
    text float16 [n + 1, S, E], whose last row is the empty caption.
    """
    folder, variants = Path(folder), variants if mask else 1
    result = folder / f"{encoders.name}-mask{mask:g}x{variants}-{source_hash('data', 'encoders')}"
    if result.exists():
        return result
    with lock(folder, wait=True):
        if result.exists():  # by now, of another process
            return result
        one, two = (load_cached(folder / f"{name}.safetensors", ("video", "refs")) for name in ("one", "two"))
        n, captions = len(one["video"]), load_cached(folder / "captions.txt")
        if len(captions) != n + len(two["video"]):
            raise damaged(folder / "captions.txt", f"{len(captions)} lines")
        with atomic_folder(result) as build:
            for name, clips, words in (("one", one, captions[:n]), ("two", two, captions[n:])):
                save_tensors(build / f"{name}.safetensors",
                             encode_clips(clips, words, encoders, mask, variants))
    encoders.drop()
    return result


def encode_clips(clips, captions, encoders, mask, variants):
    """{"video", "refs"} of encode_cache and a caption a clip -> {"latents", "refs", "vit", "text"}.
    One network after the other, since the real ones do not fit into memory together."""
    def references():
        """The pictures [V, 3, h, w] of every person and variant, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        for pictures in clips["refs"].flatten(0, 1):
            for _ in range(variants):
                views = from_bytes(pictures)
                if mask:
                    views = torch.stack([mask_regions(p, mask, block, generator) for p in views])
                yield views
    dtype, block, shape = encoders.latent_dtype, encoders.mask_block, (*clips["refs"].shape[:2], variants)
    text = encoders.text([*captions, ""])
    front = VIEWS.index("front")
    vit = torch.cat([encoders.features(views[front, None]).half() for views in references()])
    refs = []
    for views in references():
        refs.append(torch.cat([pack(encoders.encode(p[None, :, None])[:, :, 0], dtype) for p in views]))
    bar = tqdm(clips["video"], desc="encoding", unit=" clips", disable=None)
    latents = torch.cat([pack(encoders.encode(from_bytes(video)[None]), dtype) for video in bar])
    return {"latents": latents, "refs": torch.stack(refs).unflatten(0, shape),
            "vit": vit.unflatten(0, shape), "text": text.half()}


def damaged(path, cause):
    return UserError(f"{path} is damaged ({cause}): delete its folder, it is made again")


def load_cached(path, names=()):
    """What a file of a cache holds: the lines of a .txt, or tensors of these names."""
    try:
        if not path.is_file():  # a pipe would never end
            raise FileNotFoundError("no such file")
        if path.suffix == ".txt":
            return path.read_text(encoding="utf-8").split("\n")[:-1]
        tensors = safetensors.torch.load_file(path)
        return {name: tensors[name] for name in names}
    except (OSError, UnicodeError, KeyError, safetensors.SafetensorError) as error:
        raise damaged(path, error) from None


class Dataset:
    """Batches from a folder of encode_cache. Every sample is drawn from a generator of its own, so batches
    are the same for any number of ranks and micro-batches.

    text_dropout  share of the samples that lose their caption
    """

    def __init__(self, folder, text_dropout=0.1):
        names = ("latents", "refs", "vit", "text")
        self.clips = [load_cached(Path(folder) / f"{people}.safetensors", names) for people in ("one", "two")]
        self.text_dropout = text_dropout
        for clips in self.clips:
            n = len(clips["latents"])
            if not n or [len(clips[name]) for name in ("refs", "vit", "text")] != [n, n, n + 1]:
                raise damaged(folder, "its tensors are of different lengths")

    def batch(self, views, generators, device):
        """views from draw_views, one torch.Generator a sample -> latents x0 [B, C, T, H, W],
        text [B, S, E], refs, vit, the last two as HarmoView.forward takes them."""
        clips = self.clips[len(views) - 1]  # those with as many people
        n, variants = len(clips["latents"]), clips["refs"].shape[2]
        index = torch.tensor([int(torch.randint(n, (), generator=g)) for g in generators])
        no_text = torch.tensor([torch.rand((), generator=g) < self.text_dropout for g in generators])
        text = clips["text"][torch.where(no_text, n, index)].float()  # the last one is empty
        variant = torch.zeros_like(index)
        if variants > 1:
            variant = torch.tensor([int(torch.randint(variants, (), generator=g)) for g in generators])
        refs, vit = [], []
        for k, names in enumerate(views):
            person = clips["refs"][index, k, variant]  # [B, V, C, h, w]
            refs.append({v: unpack(person[:, VIEWS.index(v)]).to(device) for v in names})
            vit.append(clips["vit"][index, k, variant].float().to(device) if "front" in names else None)
        return unpack(clips["latents"][index]).to(device), text.to(device), refs, vit


# ---------------------------------------------------------------------------------------- pictures and videos
@dataclass
class Job:
    """A video to make, and then the video. Pictures and videos are in -1..1."""
    prompt: str
    references: list | None  # {view: picture [3, h, w]} per identity, {} for one without; None: plain Wan
    seed: int = 0
    size: tuple = None  # (H, W) in pixels
    files: list = ()  # the references' file names, a list per identity
    note: str = ""  # printed behind the prompt
    truth: torch.Tensor | None = None  # [3, F, H, W]
    video: torch.Tensor | None = None  # [3, F, H, W]


def to_bytes(video):
    return ((video + 1) * 127.5).round().clamp(0, 255).byte().contiguous()


def from_bytes(video):
    return video.float() / 127.5 - 1


def to_image(picture, height, width=None):
    """[3, H, W] in -1..1 -> PIL image of height x width (default: square); nearest where it grows, so that
    the toy's pixels stay pixels."""
    image = Image.fromarray(to_bytes(picture).permute(1, 2, 0).numpy())
    resample = Image.Resampling.NEAREST if height >= image.height else Image.Resampling.LANCZOS
    return image.resize((width or height, height), resample)


PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")


def read_picture(path, size):
    """A picture file -> [3, H, W] in -1..1, size (H, W): EXIF orientation, alpha on white, Lanczos fit,
    white padding."""
    formats = f"a {', '.join(PICTURE_FORMATS)} file"
    if not Path(path).is_file():  # a pipe might never end
        problem = "not a file" if Path(path).exists() else "no such file"
        raise UserError(f"{path}: {problem}; expected {formats}")
    try:
        with warnings.catch_warnings(action="ignore"):
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=PICTURE_FORMATS) as file:  # of others, some start programs
                image = ImageOps.exif_transpose(file)
                image.load()
    except Exception as error:  # Pillow's readers raise a dozen kinds
        raise UserError(f"{path}: not a readable picture ({error}); expected {formats}") from None
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would cut at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image = ImageOps.pad(image, size[::-1], Image.Resampling.LANCZOS, color="white")
    return from_bytes(torch.from_numpy(np.array(image))).permute(2, 0, 1)


def view_of(argument):
    """"left=path" or a path with one view's word in its name -> (view, path)."""
    view, equals, path = argument.partition("=")
    if equals and view in VIEWS:
        return view, path
    words = [word for word in re.findall("[a-z]+", Path(argument).stem.lower()) if word in VIEWS]
    if len(words) != 1:
        raise UserError(f"{argument}: which view is it? Its name says {' and '.join(words) or 'none'}; "
                        f"name the file or write view=path with one of {', '.join(VIEWS)}, "
                        f"for example front={argument}")
    return words[0], argument


def read_references(people, size):
    """Picture files, a list per person -> [{view: [3, H, W]}]. size: (H, W)"""
    references = []
    for files in people:
        views = {}
        for view, path in map(view_of, files):
            if view in views:
                raise UserError(f"{path}: a second {view} view of the same person; "
                                "give one picture a view, and one --refs a person")
            views[view] = read_picture(path, size)
        references.append(views)
    return references


def read_jobs(path, seed):
    """A JSONL file, one video a line: {"prompt": ..., "refs": [[files of person 1], ...], "seed": ...}, the
    last two optional -> Jobs, their pictures not read yet. seed: of lines without one."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("a pipe or folder")
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable text file ({error})") from None
    jobs = []
    for n, line in enumerate(lines, 1):
        if line.strip():
            try:
                jobs.append(read_job(line, seed))
            except (ValueError, TypeError, RecursionError) as error:
                raise UserError(f'{path} line {n}: expected {{"prompt": "...", "refs": [["front.png", ...], '
                                f'...], "seed": 0}}, the last two optional; got {line[:60]} ({error})'
                                ) from None
    if not jobs:
        raise UserError(f"{path} holds no prompt; expected one JSON object a line")
    return jobs


def read_job(line, seed):
    """A line of read_jobs -> Job. Raises ValueError or TypeError where it is anything else."""
    entry = json.loads(line)
    if not isinstance(entry, dict):
        raise ValueError("not an object")
    if unknown := sorted(entry.keys() - {"prompt", "refs", "seed"}):
        raise ValueError(f"unknown key {unknown[0]!r}")
    if not is_text(entry.get("prompt")) or not entry["prompt"].strip():
        raise ValueError("no prompt")
    entry = {"refs": [], "seed": seed} | {key: value for key, value in entry.items() if value is not None}
    if not is_seed(entry["seed"]):
        raise ValueError("seed is not a whole number from 0 to 2**63 - 1")
    if not isinstance(entry["refs"], list):
        raise ValueError("refs is not a list")
    for files in entry["refs"]:
        if not isinstance(files, list) or not files or not all(map(is_text, files)):
            raise ValueError("refs is not a list of lists of file names")
    return Job(entry["prompt"], None, entry["seed"], files=entry["refs"])


def write_video(path, video, fps=16, comment=""):
    """video [3, F, H, W] in -1..1 -> H.264 MP4, yuv420p; frames under 256 pixels are enlarged to that."""
    _, frames, height, width = video.shape
    grow = max(1, math.ceil(256 / height))
    with atomic_file(path) as temporary, av.open(str(temporary), "w") as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = grow * width, grow * height, "yuv420p"
        for f in range(frames):
            picture = to_image(video[:, f], grow * height, grow * width)
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def contact_sheet(jobs, tile=112):
    """Jobs with their videos -> one PIL image, a strip a job.

    Each person is a block of 2 x 2 views on the left, with an empty square for a view that was not given.
    At most eight evenly spaced frames are on the right, the truth's below them, and the prompt is under both.
    """
    font, gap, line_height, max_frames = ImageFont.load_default(13), 6, 17, 8

    def width_of(picture):  # [3, H, W], when it is `tile` high
        return round(tile * picture.shape[2] / picture.shape[1])
    people = sum((list(job.references or ()) for job in jobs), [])
    # the width of a person's 2 x 2, whose pictures have one size
    block = max((width_of(next(iter(views.values()))) for views in people if views), default=tile)
    left = max(len(job.references or ()) for job in jobs) * (block + gap) + gap
    total = left + gap + max(min(max_frames, job.video.shape[1]) * width_of(job.video[:, 0]) for job in jobs)
    strips = []  # (videos, prompt in lines, height)
    for job in jobs:
        videos = [job.video] if job.truth is None else [job.video, job.truth]
        prompt = textwrap.wrap(job.prompt + job.note, (total - 2 * gap) // 7)
        strips.append((videos, prompt, tile * len(videos) + line_height * max(1, len(prompt)) + 2 * gap))
    sheet = Image.new("RGB", (total, sum(height for *_, height in strips) + gap), "white")
    draw, y = ImageDraw.Draw(sheet), gap
    for job, (videos, prompt, height) in zip(jobs, strips):
        for k, views in enumerate(job.references or ()):
            draw_person(sheet, views, gap + k * (block + gap), y, block, tile)
        for i, video in enumerate(videos):
            n, step = min(max_frames, video.shape[1]), width_of(video[:, 0])
            for column, f in enumerate(torch.linspace(0, video.shape[1] - 1, n).round().long()):
                frame = to_image(video[:, f], tile - 1, step - 1)
                sheet.paste(frame, (left + column * step, y + i * tile))
        if job.truth is not None:
            draw.text((gap, y + tile + tile // 2 - 8), "ground truth", fill="#666666", font=font)
        draw.multiline_text((gap, y + tile * len(videos)), "\n".join(prompt), fill="black", font=font)
        y += height
    return sheet


def draw_person(sheet, views, x, y, width, height):
    """{view: picture} as 2 x 2 on the PIL image `sheet`, with an empty square for a missing view."""
    w, h = width // 2, height // 2
    for v, view in enumerate(VIEWS):
        corner = (x + v % 2 * w, y + v // 2 * h)
        if view in views:
            sheet.paste(to_image(views[view], h, w), corner)
        ImageDraw.Draw(sheet).rectangle((*corner, corner[0] + w - 1, corner[1] + h - 1), outline="#cccccc")
