"""Reading and writing pictures and videos: files of a user, whatever they are, and contact sheets; and jobs,
which say what to make of them. Pictures and videos are tensors in -1..1, [3, H, W] and [3, F, H, W].
"""
import argparse
import contextlib
import io
import itertools
import math
import re
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image, ImageCms, ImageOps

from rope import VIEWS
from support.script import UserError, atomic_file, in_range


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
