"""Jobs: what videos to make, from prompts and pictures of a user, and files that say what they were made of.

A reference is called job.files (what --refs gives), then job.references (pictures, or the files that hold
them). A video's comment and a contact sheet's text hold notes: JSON of how each video was made.
"""
import json
import os
import re
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from rope import VIEWS
from support.script import (UserError, atomic_file, check_outputs, fingerprint, is_seed, is_text,
                            probe_writable, read_text)
from videos.pictures import (from_bytes, open_picture, open_video, read_frames, read_picture, to_image,
                             view_of, write_video)


@dataclass
class Job:
    """A video to make, and then the video. Pictures and videos are in -1..1."""
    prompt: str
    # {view: picture [3, h, w], or the file that holds it} per identity, {} for one without; None: plain Wan
    references: list | None
    seed: int = 0
    size: tuple = None  # (H, W) in pixels
    files: list = ()  # the references' file names, a list per identity
    note: str = ""  # printed behind the prompt
    truth: torch.Tensor | None = None  # [3, F, H, W]
    video: torch.Tensor | None = None  # [3, F, H, W]


def read_jobs(path, seed):
    """A JSONL file, one video a line: {"prompt": ..., "refs": [[files of person 1], ...], "seed": ...}, the
    last two optional -> Jobs, their pictures not read yet. Files are relative to the JSONL's folder; where
    one is not there, to the working folder, as it once was. seed: of lines without one."""
    jobs, elsewhere = [], []
    for n, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                job = read_job(line, seed)
                found = [[beside(path.parent, file) for file in files] for files in job.files]
                job.files = [[file for file, _ in files] for files in found]
                elsewhere += [file for files in found for file, working in files if working]
                jobs.append(job)
            except (ValueError, TypeError, RecursionError) as error:
                raise UserError(f'{path} line {n}: expected {{"prompt": "...", "refs": [["front.png", ...], '
                                f'...], "seed": 0}}, the last two optional; got {line[:60]} ({error})'
                                ) from None
    if not jobs:
        raise UserError(f"{path} holds no prompt; expected one JSON object a line")
    if elsewhere:
        print(f"{path}: references are looked for beside it; {len(elsewhere)} are not there and are taken "
              f"from the working folder, {elsewhere[0]} first")
    return jobs


def beside(folder, file):
    """A reference of a JSONL file in this folder -> where it is, as read_jobs says, and whether that is the
    working folder."""
    view, equals, name = file.partition("=")
    view, name = (f"{view}=", name) if equals and view in VIEWS else ("", file)
    elsewhere = not os.path.exists(folder / name) and os.path.exists(name)
    return view + (name if elsewhere else str(folder / name)), elsewhere


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


def name_references(job, most):
    """A Job's files -> [{view: path}], of at most so many people. Each is a picture that can be read; its
    pixels are not kept, as those of thousands of jobs would not fit into memory."""
    if len(job.files) > most:
        raise UserError(f"{len(job.files)} people (one --refs each) for {job.prompt[:40]!r}: "
                        f"this checkpoint holds at most {most}")
    references = []
    for files in job.files:
        views = {}
        for view, path in map(view_of, files):
            if view in views:
                raise UserError(f"{path}: a second {view} view of the same person; "
                                "give one picture a view, and one --refs a person")
            with open_picture(path) as file:
                file.load()
            views[view] = path
        references.append(views)
    return references


def read_references(references, size):
    """[{view: path, or a picture that is there}] -> [{view: picture [3, H, W]}]. size: (H, W)"""
    return [{view: picture if torch.is_tensor(picture) else read_picture(picture, size)
             for view, picture in views.items()} for views in references]


def swapped(jobs):
    """Each job of two people, and once more with their references exchanged."""
    result = []
    for job in jobs:
        if len(job.references or ()) != 2:
            raise UserError("--swap exchanges two people: give --refs twice, or a prompt of two people")
        first, note = replace(job, note="", truth=None), " (references exchanged)"
        result += [first, replace(first, references=job.references[::-1], files=job.files[::-1], note=note)]
    return result


def output_files(args, jobs, per_round):
    """Names of the MP4s, one a job, and of the sheets, one a round. UserError for one that may not be."""
    out = args.out = args.out.removesuffix(".mp4").removesuffix(".png")
    if os.path.basename(out) in ("", ".", ".."):
        raise UserError(f"--out {out!r}: expected the name of a file to write, without suffix")
    names = [f"{out}-{n}" for n in range(1, len(jobs) + 1)]
    if len(jobs) == 1:
        names = [out]
    sheets = [f"{name}.png" for name in names[::per_round]]
    if len(sheets) == 1:
        sheets = [f"{out}.png"]
    videos = [f"{name}.mp4" for name in names]
    inputs = [view_of(file)[1] for job in jobs for files in job.files for file in files]
    probe_writable(os.path.dirname(out))
    check_outputs([*videos, *sheets], [*inputs, *filter(None, [args.prompts])])
    check_ours([*videos, *sheets])
    return videos, sheets


def note_of(job, recipe, frames, path, made):
    """What a video's file says of how it was made, as JSON: what a person can read, and the fingerprint of
    all that it depends on. path: the checkpoint's; made: made_with's"""
    refs = [sorted((view, content(picture)) for view, picture in views.items())
            for views in job.references or ()]
    names = [[Path(view_of(file)[1]).name for file in files] for files in job.files]
    how = {"prompt": job.prompt, "seed": job.seed, "refs": names, "frames": frames, "size": job.size,
           "ckpt": Path(os.path.abspath(path)).name, **recipe,  # not this machine's folders
           "made_of": fingerprint(job.prompt, job.seed, job.size, job.references is None, refs, made)}
    return json.dumps(how, ensure_ascii=False)


def content(picture):
    """Of a reference, for a fingerprint: a file counts with its bytes, a picture with its values."""
    return picture.tolist() if torch.is_tensor(picture) else Path(picture)


def notes_in(path):
    """What a video or contact sheet of ours says of how each video was made; nothing, or something else, of
    any other file."""
    try:
        if Path(path).suffix == ".png":
            with Image.open(path, formats=["PNG"]) as sheet:
                return list(sheet.text.values())
        with open_video(path) as (container, _):
            return [container.metadata.get("comment", "")]
    except Exception:  # a dozen kinds, and none that we wrote
        return []


def check_ours(paths):
    """UserError where a file that would be replaced is none that we made."""
    for path in filter(os.path.exists, paths):
        notes = notes_in(path)
        # or a hash, as eval.py once wrote
        if not notes or not all(re.match(r'\{"prompt": |[0-9a-f]{64}$', note) for note in notes):
            raise UserError(f"{path} was not made by this program and would be replaced: move it away, or "
                            "choose another --out")


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
    """{view: picture} as 2 x 2 on the PIL image `sheet`, with an empty square for a missing view; each says
    which view it is."""
    w, h, font = width // 2, height // 2, ImageFont.load_default(9)
    for v, view in enumerate(VIEWS):
        corner = (x + v % 2 * w, y + v // 2 * h)
        if view in views:
            sheet.paste(to_image(views[view], h, w), corner)
        draw, at = ImageDraw.Draw(sheet), (corner[0] + 3, corner[1] + h - 12)
        word = view if font.getlength(view) < w - 6 else view[0]
        draw.rectangle((at[0] - 2, at[1], at[0] + font.getlength(word) + 1, at[1] + 11), fill="white")
        draw.text(at, word, "#444444", font)
        draw.rectangle((*corner, corner[0] + w - 1, corner[1] + h - 1), outline="#cccccc")
