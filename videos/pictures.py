"""Reading and writing pictures and videos: files of a user, whatever they are, and contact sheets; and jobs,
which say what to make of them. Pictures and videos are tensors in -1..1, [3, H, W] and [3, F, H, W].
"""
import argparse
import contextlib
import io
import itertools
import json
import math
import os
import re
import textwrap
import warnings
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps

from rope import VIEWS
from support.script import UserError, atomic_file, in_range, is_seed, is_text, read_text


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
SIDE = 16  # least side of a picture that can show somebody, in pixels


@contextlib.contextmanager
def open_picture(path):
    """Yield a file's PIL image, its header read; whatever goes wrong meanwhile is a UserError."""
    formats = f"a {', '.join(PICTURE_FORMATS)} file"
    if not Path(path).is_file():  # a pipe might never end
        problem = "not a file" if Path(path).exists() else "no such file"
        raise UserError(f"{path}: {problem}; expected {formats}")
    try:
        with warnings.catch_warnings(action="ignore"):
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=PICTURE_FORMATS) as file:  # of others, some start programs
                if min(file.size) < SIDE:
                    raise UserError(f"{path}: {file.width} x {file.height} pixels, expected at least "
                                    f"{SIDE} a side")
                yield file
    except UserError:
        raise
    except Exception as error:  # Pillow's readers raise a dozen kinds
        raise UserError(f"{path}: not a readable picture ({error}); expected {formats}") from None


def read_picture(path, size):
    """A picture file of at least SIDE pixels a side -> [3, H, W] in -1..1, size (H, W): EXIF orientation,
    colours in sRGB, alpha on white, Lanczos fit, white padding."""
    with open_picture(path) as file:
        image = ImageOps.exif_transpose(file)
        image.load()
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would cut at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    clear = image.convert("RGBA")
    image = to_srgb(image if image.mode in ("L", "CMYK") else clear.convert("RGB"), image.info)
    image.putalpha(clear.getchannel("A"))
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image = ImageOps.pad(image, size[::-1], Image.Resampling.LANCZOS, color="white")
    return from_bytes(torch.from_numpy(np.array(image))).permute(2, 0, 1)


def to_srgb(image, info):
    """PIL image -> the same in RGB, its colours as its profile says (telephones' are in Display P3)."""
    if profile := info.get("icc_profile"):
        with contextlib.suppress(ImageCms.PyCMSError):  # rubbish, or of other channels: as if it were sRGB
            return ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"),
                                             outputMode="RGB")
    return image.convert("RGB")


def wrap(degrees):
    """Degrees into -180..180."""
    return (degrees + 180) % 360 - 180


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


def write_video(path, video, fps=16, comment="", crf=19):
    """video [3, F, H, W] in -1..1 -> H.264 MP4, yuv420p; frames under 256 pixels are enlarged to that. crf:
    x264's quality from 0, lossless, to 51."""
    _, frames, height, width = video.shape
    grow = max(1, math.ceil(256 / height))
    with atomic_file(path) as temporary, av.open(f"file:{temporary}", "w") as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = grow * width, grow * height, "yuv420p"
        # without tags a player guesses, and not all guess alike
        matrix, context = colorspace(stream.height), stream.codec_context
        context.colorspace, context.color_range = matrix, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        # with mbtree, this x264 writes the same pictures in different bits now and then
        stream.options = {"crf": str(crf), "x264-params": "mbtree=0"}
        for f in range(frames):
            picture = to_image(video[:, f], grow * height, grow * width)
            frame = av.VideoFrame.from_image(picture).reformat(
                format="yuv420p", dst_colorspace=matrix, dst_color_range=ColorRange.MPEG, threads=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


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


VIDEOS = (".mp4", ".mov", ".m4v", ".3gp", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg",
          ".vob", ".flv")
FORMATS = "mov,matroska,avi,mpegts,mpeg,flv"  # of others, playlists open further files and addresses
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own leave the alpha out
HDR = {ColorTrc.ARIB_STD_B67: "HLG", ColorTrc.SMPTE2084: "PQ"}
WIDE = {ColorPrimaries.BT2020: "BT.2020", ColorPrimaries.SMPTE431: "P3", ColorPrimaries.SMPTE432: "P3"}
opened = {}  # of the videos that watch_decoder watches: {name of the decoder: number of its stream}


@contextlib.contextmanager
def open_video(path):
    """Yield a file's PyAV container and its video, the largest one that is no cover; whatever goes wrong
    meanwhile is a UserError."""
    try:
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        with av.open(f"file:{path}", options=options) as container:  # or "take:1.mp4" is of a protocol "take"
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise UserError("no video in it")
            stream = max(streams, key=lambda stream: stream.width * stream.height)
            stream.codec_context.thread_count = 1
            opened[stream.codec_context.name] = stream.index
            yield container, stream
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # PyAV raises a dozen kinds
        raise UserError(f"damaged or no video ({type(error).__name__})") from None


@contextlib.contextmanager
def watch_decoder():
    """Raise UserError at the end where a video's decoder noted an error meanwhile: a damaged mp4 decodes
    without an exception. What it only warns of, and what is said of sound or a cover, is no damage to its
    pictures. For one thread and one video, with its mask, at a time."""
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # or the second of two videos with one complaint would look sound
    opened.clear()
    try:
        with av.logging.Capture(local=False) as log:
            yield
        for _, name, text in log:
            stream = re.search(r"stream (\d+)", text)
            is_container = name.split(",")[0] in FORMATS.split(",")
            if name in opened or is_container and (not stream or int(stream[1]) in opened.values()):
                raise UserError(f"damaged, as the decoder says ({' '.join(text.split())[:80]})")
    finally:
        av.logging.set_level(None)


def read_frames(path, fps, short_side=None):
    """Yield a video's pictures uint8 [H, W, 3], fps a second: each is the last frame that began by then,
    whatever the source's rate; upright, of even sides, alpha on white, interlaced ones made whole, larger
    ones shrunk to short_side. Raises UserError with the reason where it cannot be read to its end."""
    with open_video(path) as (container, stream):
        rate = min(float(stream.guessed_rate or 25), 240)
        first = shape = None
        due = 0  # pictures so far
        frames = timed_frames(container, stream, rate)
        for (frame, began), after in itertools.pairwise(itertools.chain(frames, [None])):
            first = began if first is None else first
            end = after[1] if after else began + 1 / rate
            total = math.ceil((end - first - 1e-3) * fps)  # pictures that are due before its end
            if total > due + 60 * fps:
                raise UserError("its time stamps jump")
            if total > due:
                picture = to_picture(frame, stream, short_side)
                shape = shape or picture.shape
                if picture.shape != shape:
                    raise UserError("its pictures change size")
                yield from itertools.repeat(picture, total - due)
                due = total
        if not due:
            raise UserError("no frames in it")


def timed_frames(container, stream, rate):
    """Yield a video's frames in the decoder's order, each with its beginning in seconds. Where a file's times
    do not rise, or there are none, frames are counted."""
    began = None
    for frame in whole_frames(container, stream):
        counted = 0 if began is None else began + 1 / rate
        # AVI keeps the order of decoding only, which is no time where frames are stored before they are due
        time = None if container.format.name == "avi" else frame.time
        began = counted if time is None or began is not None and time <= began else time
        yield frame, began


def whole_frames(container, stream):
    """Yield a stream's frames. From the first interlaced one on, FFmpeg's yadif completes one of the two
    half pictures, which were taken at different times."""
    decoder, graph = stream.codec_context, None
    if stream.metadata.get("alpha_mode") == "1" and decoder.name in ALPHA_DECODERS:
        decoder = av.CodecContext.create(ALPHA_DECODERS[decoder.name], "r")
    for frame in itertools.chain.from_iterable(map(decoder.decode, container.demux(stream))):
        if graph is None and frame.interlaced_frame:
            graph = av.filter.Graph()
            graph.link_nodes(graph.add_buffer(template=stream), graph.add("yadif", "deint=interlaced"),
                             graph.add("buffersink")).configure()
        if graph is None:
            yield frame
        else:
            graph.vpush(frame)
            yield from pull(graph)
    if graph is not None:
        graph.vpush(None)
        yield from pull(graph)


def pull(graph):
    """Yield the frames that a filter has ready."""
    with contextlib.suppress(av.BlockingIOError, av.EOFError):
        while True:
            yield graph.vpull()


def to_picture(frame, stream, short_side=None):
    """A decoded frame -> uint8 [H, W, 3] in sRGB. Raises UserError where its colours are others."""
    height, width = frame.height, frame.width * float(stream.sample_aspect_ratio or 1)
    if min(height, width) < 16 or max(height, width) > 16384:
        raise UserError(f"too small or too large ({frame.width} x {frame.height} pixels)")
    if kind := HDR.get(frame.color_trc) or WIDE.get(frame.color_primaries):
        raise UserError(f"its colours are {kind}, expected those of a common screen: convert it to BT.709")
    scale = min(1, (short_side or math.inf) / min(height, width))
    height, width = (max(2, round(n * scale / 2) * 2) for n in (height, width))
    has_alpha = any(component.is_alpha for component in frame.format.components)
    untagged = frame.colorspace == 2
    picture = frame.to_ndarray(format="rgba" if has_alpha else "rgb24", width=width, height=height, threads=1,
                               src_colorspace=colorspace(frame.height) if untagged else None)
    if has_alpha:
        picture = on_white(picture[..., :3], picture[..., 3:])
    for data in frame.side_data:
        if data.type == SideData.DISPLAYMATRIX:
            picture = upright(picture, np.frombuffer(data, np.int32).reshape(3, 3))
    return np.ascontiguousarray(picture)


def colorspace(height):
    """The matrix between a video's RGB and what it stores: by its lines, as players guess."""
    return Colorspace.ITU709 if height >= 720 else Colorspace.ITU601


def upright(picture, matrix):
    """A picture [H, W, 3] as its file's display matrix [3, 3] says: turned by quarters, mirrored, or both."""
    (a, b, _), (c, d, _), _ = matrix
    if abs(a) < abs(b):
        picture, a, d = picture.swapaxes(0, 1), c, b
    return picture[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]


def on_white(picture, alpha):
    alpha = alpha.astype(np.float32) / 255
    return (picture * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


def picture_size(text):
    """A type for add_argument: "480x832", or one side of a square -> (H, W)."""
    sides = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text, re.ASCII)
    size = sides and (int(sides[1]), int(sides[2] or sides[1]))
    if not size or max(size) > 8192:
        raise argparse.ArgumentTypeError(f"got {text[:40]!r}, expected HEIGHTxWIDTH, such as 480x832, "
                                         "at most 8192 a side")
    return size


frame_count = in_range(int, 1, 10001, "1 to 10001 frames")


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
