"""pictures.py: files of a user, whatever they are: pictures, videos, jobs files; and contact sheets."""

import contextlib
import io
import json
import os
import random
import resource
import signal
import struct
import subprocess
import time
import warnings
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from helpers import FULL_DISK, fork, kill, names, one_line, wait_for, write_sound
from PIL import Image

from rope import VIEWS
from support.script import UserError, lock
from videos import pictures
from videos.jobs import Job, contact_sheet, name_references, read_jobs, read_references
from videos.pictures import (from_bytes, picture_size, read_frames, read_picture, to_bytes, to_image, view_of,
                             watch_decoder, write_video)


@pytest.fixture
def no_hang():
    """What waits for ever, on a pipe for example, fails."""

    def fail(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------------------- reading pictures
@pytest.mark.parametrize(
    "argument, view",
    [("anna_front.png", "front"), ("a/left/anna-BACK.2.png", "back"), ("left=a_front.png", "left"),
     ("right=x.png", "right"), ("Left 3.jpg", "left"), ("a=b/front.png", "front")],
)
def test_views_come_from_names(argument, view):
    assert view_of(argument)[0] == view


@pytest.mark.parametrize("argument",
                         ["anna.png", "backwards.png", "front_left.png", "side=anna.png", "", "="])
def test_a_view_must_be_named_once(argument):
    with pytest.raises(UserError, match="which view is it"):
        view_of(argument)


def test_a_person_has_each_view_once(tmp_path):
    for name in ("a_front.png", "b_front.png", "b_left.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    files = [[str(tmp_path / "a_front.png")], [str(tmp_path / "b_front.png"), str(tmp_path / "b_left.png")]]
    people = read_references(name_references(Job("x", None, files=files), 2), (16, 8))
    assert [tuple(views) for views in people] == [("front",), ("front", "left")]
    assert people[1]["left"].shape == (3, 16, 8)
    with pytest.raises(UserError, match="b_front.png: a second front view of the same person"):
        name_references(Job("x", None, files=[[files[0][0], files[1][0]]]), 2)
    with pytest.raises(UserError, match="2 people .* holds at most 1"):
        name_references(Job("x", None, files=files), 1)


def test_pictures_are_turned_flattened_and_fitted(tmp_path):
    image = Image.new("RGBA", (40, 20), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 20, 20))  # the left half is transparent
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right: its left edge becomes the top
    image.save(tmp_path / "a.png", exif=exif)
    picture = read_picture(tmp_path / "a.png", (20, 20))
    assert picture.shape == (3, 20, 20)
    assert (picture[:, :, 0] == 1).all()  # a white border
    assert (picture[:, 4, 10] == 1).all()  # white where transparent
    assert picture[:, 15, 10].tolist() == [1, -1, -1]


def grey16(order):
    return Image.frombytes("I;16", (3, 2), np.array([0, 32768, 65535] * 2, order).tobytes())


@pytest.mark.parametrize(
    "image, options, colours",
    [(grey16("<u2"), {}, [-1, 0.004, 1]),
     (Image.frombytes("L", (3, 2), bytes([0, 128, 255] * 2)), {}, [-1, 0.004, 1]),
     (Image.frombytes("L", (3, 2), bytes([0, 128, 255] * 2)), {"transparency": 0}, [1, 0.004, 1]),
     (Image.frombytes("LA", (3, 2), bytes([0, 255, 128, 255, 0, 0] * 2)), {}, [-1, 0.004, 1]),
     (Image.frombytes("1", (3, 2), bytes([0b01100000] * 2)), {}, [-1, 1, 1]),
     (Image.frombytes("L", (3, 2), bytes([0, 128, 255] * 2)).convert("P"), {}, [-1, 0.004, 1]),
     (Image.frombytes("RGB", (3, 2), bytes(3 * [0] + 3 * [128] + 3 * [255]) * 2), {}, [-1, 0.004, 1])],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_kind_of_png_reads_right(image, options, colours, tmp_path):
    image.resize((30, 20), Image.Resampling.NEAREST).save(tmp_path / "a.png", **options)
    picture = read_picture(tmp_path / "a.png", (20, 30))[:, ::10, ::10]
    truth = torch.tensor(colours, dtype=torch.float32).expand(3, 2, 3)
    torch.testing.assert_close(picture, truth, atol=0.003, rtol=0)


def test_cmyk_jpeg_reads_right(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    mean = read_picture(tmp_path / "a.jpg", (8, 8)).mean((1, 2))
    torch.testing.assert_close(mean, torch.tensor([1.0, -1, -1]), atol=0.03, rtol=0)


def icc_profile(primaries):
    """An ICC profile of version 2, by its specification: D50 colorants in the columns [3, 3], gamma 2.2."""
    def fixed(value):
        return round(value * 65536).to_bytes(4, "big", signed=True)

    white = [0.9642, 1.0, 0.8249]
    tags = [(b"desc", b"desc" + bytes(4) + (2).to_bytes(4, "big") + b"P\0" + bytes(79)),
            (b"cprt", b"text" + bytes(4) + b"-\0"),
            (b"wtpt", b"XYZ " + bytes(4) + b"".join(map(fixed, white)))]
    for k, name in enumerate((b"r", b"g", b"b")):
        tags.append((name + b"XYZ", b"XYZ " + bytes(4) + b"".join(map(fixed, primaries[:, k]))))
        gamma = (1).to_bytes(4, "big") + round(2.2 * 256).to_bytes(2, "big")
        tags.append((name + b"TRC", b"curv" + bytes(4) + gamma))
    table, body, start = len(tags).to_bytes(4, "big"), b"", 132 + 12 * len(tags)
    for name, content in tags:
        table += name + (start + len(body)).to_bytes(4, "big") + len(content).to_bytes(4, "big")
        body += content + bytes(-len(content) % 4)
    header = bytearray(128)
    header[8:12], header[12:24] = b"\2\x40\0\0", b"mntrRGB XYZ "
    header[36:40], header[68:80] = b"acsp", b"".join(map(fixed, white))
    header[:4] = (128 + len(table) + len(body)).to_bytes(4, "big")
    return bytes(header) + table + body


# D50 colorants of Display P3 and sRGB, as their profiles state them
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


@pytest.mark.parametrize("format, mode", [
    ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "RGB"), ("WEBP", "RGB"), ("WEBP", "RGBA")])
def test_a_pictures_profile_says_what_its_colours_are(format, mode, tmp_path):
    """Telephones take photos in Display P3: read as sRGB, a red coat is 20 levels too pale."""
    colours = np.array([[160, 90, 70], [190, 140, 120], [90, 150, 60], [128, 128, 128]], np.uint8)
    picture = Image.fromarray(colours.repeat(16, 0)[None].repeat(16, 0))
    picture = picture.quantize(4) if mode == "P" else picture.convert(mode)
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "PNG": {}}[format]
    picture.save(tmp_path / "a", format, icc_profile=icc_profile(P3), **options)
    linear = (np.linalg.inv(SRGB) @ P3 @ (colours / 255).T ** 2.2).clip(0, 1)
    expected = 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear).T
    read = ((read_picture(tmp_path / "a", (16, 64))[:, 8, 8::16] + 1) * 127.5).T.numpy()
    assert np.abs(read - expected).max() < 4 < 15 < np.abs(expected - colours).max()


@pytest.mark.parametrize("profile", [b"rubbish", icc_profile(P3)[:300]])
@pytest.mark.parametrize("mode", ["RGB", "L", "LA"])
def test_a_profile_of_other_channels_or_none_at_all_changes_nothing(profile, mode, tmp_path):
    Image.new("LA", (16, 16), (100, 255)).convert(mode).save(tmp_path / "a.png", icc_profile=profile)
    Image.new("L", (16, 16), 100).save(tmp_path / "b.png", icc_profile=icc_profile(P3))
    for name in "ab":
        assert (to_bytes(read_picture(tmp_path / f"{name}.png", (16, 16))) == 100).all()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, more=b""):
    """A PNG file that claims this size, with no pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


BAD_PICTURES = {
    "empty": b"",
    "text": b"not a picture",
    "cut": saved(Image.effect_noise((32, 32), 99), "PNG")[:300],
    "float tiff": saved(Image.new("F", (8, 8), 0.5), "TIFF"),
    "gif": saved(Image.new("RGB", (8, 8)), "GIF"),
    "bmp": saved(Image.new("RGB", (8, 8)), "BMP"),
    "bomb": png(60_000, 60_000),
    "smaller bomb": png(12_000, 12_000),  # of which Pillow only warns
    "endless": png(2**31 - 1, 2**31 - 1),
    "no pixels": png(0, 0),
    "text bomb": png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))),
    "folder": None,
    "pipe": None,
    "nothing": None,
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_a_bad_picture_is_one_line(kind, tmp_path, no_hang, capfd):
    path = tmp_path / "a_front.png"
    if BAD_PICTURES[kind] is not None:
        path.write_bytes(BAD_PICTURES[kind])
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(UserError, match="a_front.png: ") as error:
            read_picture(path, (32, 32))
    assert one_line(error) and "expected a PNG, JPEG, WEBP file" in str(error.value)
    assert not told and capfd.readouterr() == ("", "")


POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
(owned) print
showpage
%%EOF
"""


@pytest.mark.parametrize("size", [(1, 1), (15, 400), (400, 15)])
def test_a_picture_too_small_to_show_somebody_is_one_line(size, tmp_path):
    Image.new("RGB", size).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=f"{size[0]} x {size[1]} pixels, expected at least 16") as error:
        read_picture(tmp_path / "a.png", (32, 32))
    assert one_line(error)


def test_postscript_starts_no_program(tmp_path, monkeypatch):
    """Pillow hands what begins with %!PS to Ghostscript, whatever the file is called."""
    started = []
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **options: started.append(arguments))
    monkeypatch.setattr(os, "system", started.append)
    for name in ("a_front.png", "a_front.jpg", "a_front.eps"):
        (tmp_path / name).write_bytes(POSTSCRIPT)
        with pytest.raises(UserError, match="not a readable picture"):
            read_picture(tmp_path / name, (32, 32))
    assert not started and not (tmp_path / "started").exists()


def test_pillows_warnings_stay_its_own(tmp_path, capfd):
    """A picture that reads well says nothing, even where Pillow has something to say."""
    junk = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x0e\x01\x02\0\xff\0\0\0\xff\0\0\0"  # cut short
    Image.new("RGB", (16, 16)).save(tmp_path / "a.jpg", exif=junk)
    Image.new("P", (16, 16)).save(tmp_path / "a.png", transparency=bytes(range(256)))
    Image.effect_noise((16, 16), 99).convert("RGBA").quantize(8).save(tmp_path / "b.png")
    for filter in ("always", "error"):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter(filter)
            for name in ("a.jpg", "a.png", "b.png"):
                assert read_picture(tmp_path / name, (8, 8)).shape == (3, 8, 8)
        assert not told
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_fuzzed_pictures_survive_with_reasons(kind, tmp_path, no_hang):
    """Any exception but UserError would come through, and a picture that is read is a picture."""
    rng, path, reasons, read = random.Random(kind), tmp_path / "a_front.png", set(), 0
    noise = torch.randint(0, 256, (24, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3
    whole = saved(Image.fromarray(noise.numpy()), kind, exif=exif)
    for _ in range(int(os.environ.get("FUZZ", 60))):
        content = bytearray(whole)
        for _ in range(rng.choice((0, 1, 4, 64))):
            end = rng.choice((60, 200, len(content)))  # most of them in the headers
            content[rng.randrange(min(end, len(content)))] = rng.randrange(256)
        path.write_bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])
        signal.alarm(20)  # no_hang's, for every picture anew
        try:
            picture = read_picture(path, (16, 16))
            assert picture.shape == (3, 16, 16) and picture.abs().max() <= 1
            read += 1
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            reasons.add(str(error))
    assert reasons and (read > 0) == (kind in ("PNG", "JPEG", "WEBP"))


# ------------------------------------------------------------------------------------------------ read_frames
def encode(path, frames, codec="libx264", pix_fmt="yuv420p", times=None, rate=16, options=None, matrix=None,
           settings=None, **tags):
    """uint8 pictures [H, W, 3 or 4] -> a video; times in seconds for a variable rate; settings of the codec;
    matrix: of its colours; tags: what the file says of them."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = new_stream(container, frames, codec, pix_fmt, rate, settings, **tags)
        write_pictures(container, stream, frames, times, matrix)


def new_stream(container, frames, codec="libx264", pix_fmt="yuv420p", rate=16, settings=None, **tags):
    stream = container.add_stream(codec, rate=rate, options=settings or {})
    stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
    for tag, value in tags.items():
        setattr(stream if tag == "disposition" else stream.codec_context, tag, value)
    return stream


def write_pictures(container, stream, frames, times=None, matrix=None):
    for k, picture in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(picture, format="rgba" if picture.shape[2] == 4 else "rgb24")
        if times:
            frame.pts, frame.time_base = round(times[k] * 1000), Fraction(1, 1000)
        container.mux(stream.encode(frame.reformat(format=stream.pix_fmt, dst_colorspace=matrix)))
    container.mux(stream.encode())


def gradient(n, height, width):
    """n pictures, red to the right and green downwards, that get bluer."""
    x, y = np.linspace(0, 200, width), np.linspace(0, 200, height)
    return [np.stack((*np.meshgrid(x, y), np.full((height, width), 8 * k)), 2).astype(np.uint8)
            for k in range(n)]


def noise(n, side=64):
    return [np.random.default_rng(k).integers(0, 255, (side, side, 3), np.uint8) for k in range(n)]


def frames_of(path, fps=16, short_side=None):
    with watch_decoder():
        return list(read_frames(path, fps, short_side))


KINDS = {  # of 16 frames a second, one second long
    "24 fps.mp4": dict(frames=gradient(24, 64, 96), rate=24),
    "8 fps.mp4": dict(frames=gradient(8, 64, 96), rate=8),
    "10 bit.mp4": dict(frames=gradient(16, 64, 96), pix_fmt="yuv420p10le"),
    "odd.mp4": dict(frames=gradient(16, 65, 97), pix_fmt="yuv444p"),
    "gelb und grün 黄.mp4": dict(frames=gradient(16, 64, 96)),
    "fragments.mp4": dict(frames=gradient(16, 64, 96), options={"movflags": "frag_keyframe+empty_moov"}),
    "matroska.mkv": dict(frames=gradient(16, 64, 96)),
    "stream.ts": dict(frames=gradient(16, 64, 96)),
    "old.avi": dict(frames=gradient(16, 64, 96), codec="mpeg4"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_video_reads_right(name, tmp_path):
    encode(tmp_path / name, **KINDS[name])
    frames = frames_of(tmp_path / name)
    assert len(frames) == 16
    assert all(f.shape == (64, 96, 3) and f.dtype == np.uint8 and f.flags.c_contiguous for f in frames)
    for frame in frames:
        assert frame[:, -4:, 0].mean() > 150 > 60 > frame[:, :4, 0].mean()
        assert frame[-4:, :, 1].mean() > 150 > 60 > frame[:4, :, 1].mean()
    assert frames[0][..., 2].mean() < 25 and frames[-1][..., 2].mean() > 45


def test_larger_videos_shrink_to_the_short_side_and_smaller_ones_stay(tmp_path):
    encode(tmp_path / "a.mp4", gradient(4, 64, 96))
    assert frames_of(tmp_path / "a.mp4", short_side=32)[0].shape == (32, 48, 3)
    assert frames_of(tmp_path / "a.mp4", short_side=480)[0].shape == (64, 96, 3)


def test_a_variable_rate_is_resampled(tmp_path):
    encode(tmp_path / "a.mp4", gradient(4, 64, 64), rate=1000, times=[0, 0.5, 0.6, 2])
    blue = [round(frame[..., 2].mean() / 8) for frame in frames_of(tmp_path / "a.mp4")]
    assert blue[:33] == [0] * 8 + [1] * 2 + [2] * 22 + [3] and set(blue[33:]) <= {3}


def test_jumping_time_stamps_do_not_fill_the_memory(tmp_path):
    encode(tmp_path / "a.mp4", gradient(3, 64, 64), rate=1000, times=[0, 0.1, 9999])
    with pytest.raises(UserError, match="time stamps jump"):
        frames_of(tmp_path / "a.mp4")


STANDING = {  # how a picture lies in the file -> (what turns it back: a, b, c, d of the display matrix)
    "as it is": (lambda p: p, (1, 0, 0, 1)),
    "90": (lambda p: np.rot90(p, 1), (0, 1, -1, 0)),
    "180": (lambda p: np.rot90(p, 2), (-1, 0, 0, -1)),
    "270": (lambda p: np.rot90(p, 3), (0, -1, 1, 0)),
    "mirrored": (lambda p: p[:, ::-1], (-1, 0, 0, 1)),
    "on its head": (lambda p: p[::-1], (1, 0, 0, -1)),
    "transposed": (lambda p: p.swapaxes(0, 1), (0, 1, 1, 0)),
    "mirrored and turned": (lambda p: np.rot90(p, 2).swapaxes(0, 1), (0, -1, -1, 0)),
}


@pytest.mark.parametrize("kind", STANDING)
def test_videos_stand_upright_and_are_not_mirrored(tmp_path, kind):
    """As phones write them: the pictures lie on a side and the header says how to turn and mirror them."""
    picture, (lay, (a, b, c, d)) = gradient(1, 64, 96)[0], STANDING[kind]
    encode(tmp_path / "a.mp4", [np.ascontiguousarray(lay(picture))] * 4)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    matrix = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    at = content.index(b"tkhd") + 44
    content[at : at + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in matrix)
    (tmp_path / "a.mp4").write_bytes(content)
    upright = frames_of(tmp_path / "a.mp4")[0]
    assert upright.shape == picture.shape
    assert np.abs(upright.astype(float) - picture).mean() < 12


@pytest.mark.parametrize("name", ["a.avi", "a.mp4", "a.mkv", "a.ts"])
def test_pictures_come_in_their_order_where_they_are_stored_in_another(name, tmp_path):
    """H.264 with B-frames. AVI keeps no times of its own for them."""
    encode(tmp_path / name, gradient(24, 64, 96), rate=24, settings={"bf": "3", "b-adapt": "0", "qp": "8"})
    frames = frames_of(tmp_path / name, 24)
    assert [round(frame[..., 2].mean() / 8) for frame in frames] == list(range(24))


def test_where_times_fall_back_pictures_are_counted(tmp_path):
    """Two recordings in one file, the second one's clock begun anew."""
    for n in (0, 1):
        encode(tmp_path / f"{n}.ts", gradient(20, 64, 96)[10 * n : 10 * n + 10])
    (tmp_path / "both.ts").write_bytes(b"".join((tmp_path / f"{n}.ts").read_bytes() for n in (0, 1)))
    blue = [round(frame[..., 2].mean() / 8) for frame in frames_of(tmp_path / "both.ts")]
    assert blue == list(range(20))


def luma(colour, kr, kb):
    """What is stored of R'G'B' in 0..255, of limited range, by the definition of BT.601 and BT.709."""
    r, g, b = np.array(colour) / 255
    y = kr * r + (1 - kr - kb) * g + kb * b
    return 16 + 219 * y, 128 + 112 * (b - y) / (1 - kb), 128 + 112 * (r - y) / (1 - kr)


BT601, BT709 = (0.299, 0.114), (0.2126, 0.0722)
SKIN, LEAF = (224, 172, 140), (30, 160, 50)


@pytest.mark.parametrize("height, weights", [(480, BT601), (718, BT601), (720, BT709), (1080, BT709)])
def test_a_written_video_says_what_its_colours_are(height, weights, tmp_path):
    video = from_bytes(torch.tensor([SKIN, LEAF], dtype=torch.uint8)).T.reshape(3, 1, 1, 2)
    write_video(tmp_path / "v.mp4", video.repeat_interleave(height // 2, 3).expand(-1, 3, height, -1))
    with av.open(str(tmp_path / "v.mp4")) as container:
        context, frame = container.streams.video[0].codec_context, next(container.decode(video=0))
        tags = context.colorspace, context.color_primaries, context.color_trc, context.color_range
    assert tags == (1 if weights == BT709 else 5, 1, 1, 1)
    planes = [np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size) for plane in frame.planes]
    for x, colour in ((0.25, SKIN), (0.75, LEAF)):
        stored = [plane[len(plane) // 2, int(x * width)] for plane, width in zip(
            planes, (height // 2 * 2, height // 2, height // 2))]
        assert np.abs(np.array(stored) - luma(colour, *weights)).max() < 2
        picture = frames_of(tmp_path / "v.mp4")[0]
        assert np.abs(picture[height // 2, int(x * picture.shape[1])].astype(float) - colour).max() <= 3


@pytest.mark.parametrize("height, matrix, tags", [
    (480, 5, {}), (480, 1, {"colorspace": 1}), (480, 5, {"colorspace": 6}), (720, 1, {}),
    (720, 1, {"colorspace": 1}), (720, 5, {"colorspace": 6}), (720, 9, {"colorspace": 9})])
def test_colours_are_read_by_the_files_tag_or_as_players_guess(height, matrix, tags, tmp_path):
    picture = np.full((height, 96, 3), SKIN, np.uint8)
    picture[:, 48:] = LEAF
    encode(tmp_path / "a.mp4", [picture] * 2, matrix=matrix, **tags)
    frame = frames_of(tmp_path / "a.mp4")[0].astype(float)
    assert np.abs(frame - picture)[:, [8, 88]].max() <= 3


@pytest.mark.parametrize("tags, says", [
    ({"color_trc": 18, "color_primaries": 9, "colorspace": 9}, "HLG"),
    ({"color_trc": 16, "color_primaries": 9, "colorspace": 9}, "PQ"),
    ({"color_trc": 14, "color_primaries": 9, "colorspace": 9}, "BT.2020"),
    ({"color_trc": 1, "color_primaries": 12, "colorspace": 1}, "P3")])
def test_colours_that_common_screens_do_not_show_are_a_reason(tags, says, tmp_path):
    encode(tmp_path / "a.mov", gradient(4, 64, 96), pix_fmt="yuv420p10le", **tags)
    with pytest.raises(UserError, match=f"{says}.*BT.709") as error:
        frames_of(tmp_path / "a.mov")
    assert one_line(error)


COVER = dict(codec="mjpeg", pix_fmt="yuvj420p", disposition=av.stream.Disposition.attached_pic)


@pytest.mark.parametrize("first, pictures", [
    (dict(codec="mpeg4"), noise(2)), (COVER, noise(1, 512))], ids=["preview", "cover"])
def test_the_video_is_read_and_not_its_preview_or_cover(first, pictures, tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        streams = new_stream(container, pictures, **first), new_stream(container, gradient(16, 64, 96))
        for stream, frames in zip(streams, (pictures, gradient(16, 64, 96))):
            write_pictures(container, stream, frames)
    frames = frames_of(tmp_path / "a.mp4")
    assert len(frames) == 16 and np.abs(frames[3].astype(float) - gradient(4, 64, 96)[3]).mean() < 12


def test_a_cover_alone_is_no_video(tmp_path):
    encode(tmp_path / "a.mp4", noise(1), **COVER)
    with pytest.raises(UserError, match="no video in it"):
        frames_of(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    "codec, name", [("libvpx", "a.webm"), ("libvpx-vp9", "a.webm"), ("libvpx-vp9", "a.mkv")])
def test_what_is_transparent_in_webm_is_white(codec, name, tmp_path):
    alpha = np.where(np.arange(96) < 48, 0, 255)[None].repeat(64, 0)
    pictures = [np.dstack((picture, alpha)).astype(np.uint8) for picture in gradient(6, 64, 96)]
    encode(tmp_path / name, pictures, codec, "yuva420p", settings={"auto-alt-ref": "0"})
    frames = frames_of(tmp_path / name)
    assert len(frames) == 6
    assert frames[3][:, :44].min() > 250 and np.abs(
        frames[3].astype(float) - gradient(4, 64, 96)[3])[:, 52:].mean() < 12


def test_interlaced_videos_have_no_combs(tmp_path):
    """A square that moves by 4 pixels from one half picture to the next, so that combs have teeth of 4."""
    square = np.zeros((24, 64, 160, 3), np.uint8)
    for k in range(24):
        square[k, 20:44, 4 + 4 * k : 36 + 4 * k] = 255
    comb = np.stack([np.where(np.arange(64)[:, None, None] % 2 == 0, square[k], square[k + 1])
                     for k in range(0, 24, 2)])
    encode(tmp_path / "a.mp4", list(comb), rate=12, settings={"x264-params": "tff=1:qp=8"})
    frames = np.stack(frames_of(tmp_path / "a.mp4", 12)).astype(float)
    assert frames.shape == comb.shape
    wrong = [np.abs(frames[1:-1] - square[half::2][1:-1]).mean() for half in (0, 1)]
    assert min(wrong) < 0.6 < 2 < max(wrong)  # which half, the file says


def test_a_damaged_sound_track_is_no_damage_to_the_pictures(tmp_path):
    """A file whose end, all of it sound, is missing."""
    with av.open(str(tmp_path / "a.mp4"), "w", options={"movflags": "faststart"}) as container:
        video, sound = new_stream(container, gradient(16, 64, 96)), container.add_stream("aac", 48000)
        sound.layout = "mono"
        write_pictures(container, video, gradient(16, 64, 96))
        for k in range(140):
            noise = np.random.default_rng(k).random((1, 1024), np.float32)
            frame = av.AudioFrame.from_ndarray(noise, "fltp", "mono")
            frame.rate = 48000
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    (tmp_path / "a.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:-3000])
    assert len(frames_of(tmp_path / "a.mp4")) == 16


@pytest.mark.parametrize("level, name, text, is_damage", [
    (av.logging.WARNING, "h264", "Video uses a wasteful way to store B-frames", False),  # as of packed Xvid
    (av.logging.ERROR, "aac", "Number of bands exceeds limit", False),
    (av.logging.ERROR, "mjpeg", "the cover's error", False),
    (av.logging.ERROR, "mov,mp4,m4a,3gp,3g2,mj2", "stream 1, offset 0x10: partial file", False),
    (av.logging.ERROR, "mov,mp4,m4a,3gp,3g2,mj2", "stream 0, offset 0x10: partial file", True),
    (av.logging.ERROR, "matroska,webm", "Read error", True),
    (av.logging.ERROR, "h264", "error while decoding MB 1 2", True)])
def test_only_errors_of_a_videos_own_decoder_are_damage(level, name, text, is_damage, tmp_path):
    encode(tmp_path / "a.mp4", gradient(4, 64, 96))
    with pytest.raises(UserError, match="damaged") if is_damage else contextlib.nullcontext():
        with watch_decoder():
            assert len(list(read_frames(tmp_path / "a.mp4", 16))) == 4
            av.logging.log(level, name, text)


def test_a_name_with_a_colon_is_a_files(tmp_path, monkeypatch):
    """FFmpeg reads "take:" as a protocol where it stands alone."""
    monkeypatch.chdir(tmp_path)
    write_video("take:1.mp4", torch.zeros(3, 4, 64, 96))
    assert len(list(read_frames("take:1.mp4", 16))) == 4


def test_what_is_transparent_in_a_video_is_white(tmp_path):
    alpha = np.where(np.arange(96) < 48, 0, 255)[None].repeat(64, 0)
    clear = [np.dstack((picture, alpha)).astype(np.uint8) for picture in gradient(4, 64, 96)]
    encode(tmp_path / "clear.mov", clear, "qtrle", "argb")
    frame = frames_of(tmp_path / "clear.mov")[0]
    assert frame[:, :47].min() == 255 and frame[:, 49:].max() < 210
    pale = [np.dstack((picture, np.full((64, 96), 51))).astype(np.uint8) for picture in gradient(4, 64, 96)]
    encode(tmp_path / "pale.mov", pale, "qtrle", "argb")
    frame = frames_of(tmp_path / "pale.mov")[2].astype(float)  # a fifth of it, four fifths white
    assert np.abs(frame - (0.2 * gradient(4, 64, 96)[2] + 0.8 * 255)).max() <= 1


@pytest.mark.parametrize("ratio, width", [(Fraction(2), 192), (Fraction(1, 2), 48), (Fraction(12, 11), 104)])
def test_pixels_that_are_no_squares_become_squares(ratio, width, tmp_path):
    """As on DVDs and tapes: the header says how wide a pixel is. The height stays."""
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.sample_aspect_ratio = ratio
        for picture in gradient(4, 64, 96):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    frame = frames_of(tmp_path / "a.mp4")[0]
    assert frame.shape == (64, width, 3)
    assert np.abs(frame.astype(float) - gradient(1, 64, width)[0]).mean() < 12
    assert min(frames_of(tmp_path / "a.mp4", short_side=32)[0].shape[:2]) == 32


def damage(path, seed=0):
    """Flip 40 bits of a mp4's pictures."""
    content, rng = bytearray(path.read_bytes()), random.Random(seed)
    first = content.index(b"mdat") + 4
    size = int.from_bytes(content[first - 8 : first - 4], "big") - 8
    for _ in range(40):
        content[first + rng.randrange(size * 3 // 10, size * 9 // 10)] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def test_damaged_pictures_are_found_though_they_decode(tmp_path):
    """Twice, as the decoder's second complaint in the same words is easily lost."""
    silent, path = 0, tmp_path / "a.mp4"
    for seed in range(6):
        encode(path, noise(17))
        assert len(frames_of(path)) == 17
        damage(path, seed)
        with contextlib.suppress(UserError):
            silent += len(list(read_frames(path, 16))) == 17  # all frames without an exception
        for _ in range(2):
            with pytest.raises(UserError, match="damaged") as error:
                frames_of(path)
            assert one_line(error)
    assert silent >= 3


def test_a_cut_file_with_its_header_first_is_found(tmp_path):
    encode(tmp_path / "a.mp4", noise(33), options={"movflags": "faststart"})
    (tmp_path / "a.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:-20000])
    with pytest.raises(UserError, match="damaged"):
        frames_of(tmp_path / "a.mp4")


def bad_video(kind, folder):
    path = folder / "a.mp4"
    encode(folder / "good.mp4", gradient(4, 64, 64))
    good = (folder / "good.mp4").read_bytes()
    if kind == "folder":
        path.mkdir()
    if kind == "tiny":
        encode(path, gradient(3, 8, 8))
    if kind == "sound":
        write_sound(path)
    if kind == "no frames":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=16)
            stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
            container.start_encoding()
            container.mux(stream.encode())
    encode(folder / "good.mkv", gradient(4, 64, 64))
    matroska = (folder / "good.mkv").read_bytes()
    content = {
        "empty": b"",
        "a header alone": matroska[: matroska.index(b"\x1f\x43\xb6\x75")],
        "half": good[: len(good) // 2],
        "text": b"not a video\n" * 100,
        "junk": bytes(range(256)) * 99,
        "a list of files": f"ffconcat version 1.0\nfile {folder}/good.mp4\n".encode(),
        "a playlist": f"#EXTM3U\n#EXTINF:1,\n{folder}/good.mp4\n#EXT-X-ENDLIST\n".encode(),
        "a session": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
    }
    if kind in content:
        path.write_bytes(content[kind])
    return path


BAD_VIDEOS = {kind: "damaged or no video" for kind in (
    "missing", "folder", "empty", "half", "text", "junk", "a list of files", "a playlist", "a session")}
BAD_VIDEOS |= {"tiny": "too small", "no frames": "no (video|frames) in it", "sound": "no video in it",
               "a header alone": "(damaged or no video|no frames in it)"}


@pytest.mark.parametrize("kind", BAD_VIDEOS)
def test_a_bad_video_is_one_line(kind, tmp_path, no_hang):
    path = bad_video(kind, tmp_path)
    with pytest.raises(UserError, match=BAD_VIDEOS[kind]) as error:
        frames_of(path)
    assert one_line(error)


def test_what_a_container_merely_warns_of_is_no_damage(tmp_path):
    """A sound video after a damaged one; and the decoder's log is left as it was."""
    encode(tmp_path / "a.mp4", noise(9))
    encode(tmp_path / "good.mp4", noise(9))
    damage(tmp_path / "a.mp4")
    with pytest.raises(UserError):
        frames_of(tmp_path / "a.mp4")
    assert len(frames_of(tmp_path / "good.mp4")) == 9
    with av.logging.Capture() as log:
        list(read_frames(tmp_path / "a.mp4", 16))
    assert not log


def test_fuzzed_videos_survive_with_reasons(tmp_path):
    """Any exception but UserError would come through."""
    rng, reasons = random.Random(1), set()
    encode(tmp_path / "source.mp4", gradient(8, 32, 32))
    whole, path = (tmp_path / "source.mp4").read_bytes(), tmp_path / "fuzzed.mp4"
    for _ in range(int(os.environ.get("FUZZ", 40))):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 4, 64))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])
        try:
            frames = frames_of(path)
            assert frames and frames[0].ndim == 3
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 200
            reasons.add(str(error).split(" (")[0])
    assert reasons


@pytest.mark.parametrize("text, size", [("480x832", (480, 832)), ("32", (32, 32)), ("1x8192", (1, 8192))])
def test_a_size_is_height_and_width(text, size):
    assert picture_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "480x", "x832", "480X832", "480x832x3", "-1", "4.5", "٣", "1" * 6,
                                  "99999", "480x8193", "1000000x1"])
def test_anything_else_is_no_size(text):
    with pytest.raises(Exception, match="expected HEIGHTxWIDTH"):
        picture_size(text)


# ------------------------------------------------------------------------------------------------- jobs files
def jobs_file(folder, text):
    path = folder / "jobs.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return path


def test_a_jobs_file_is_a_video_a_line(tmp_path):
    lines = [{"prompt": "a dog"},
             {"prompt": "ein Bär", "seed": 5, "refs": [["a_front.png", "left=b.png"], ["c_back.png"]]},
             {"prompt": "two\u2028lines\x85and\u2029more", "seed": None, "refs": None}]
    text = "\ufeff" + "\r\n\n  \n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    jobs = read_jobs(jobs_file(tmp_path, text), 9)
    assert [job.prompt for job in jobs] == [line["prompt"] for line in lines]
    assert [job.seed for job in jobs] == [9, 5, 9]
    beside = [[f"{tmp_path}/a_front.png", f"left={tmp_path}/b.png"], [f"{tmp_path}/c_back.png"]]
    assert [job.files for job in jobs] == [[], beside, []]
    assert all(job.references is None for job in jobs)


SEED = "seed is not a whole number"
REFS = "refs is not a list"


@pytest.mark.parametrize(
    "line, says",
    [('{"prompt": "x", "ref": []}', "unknown key 'ref'"), ('{"prompt": "x", "\\ud800": []}', "unknown key"),
     ('{"prompt": "x", "seed": true}', SEED), ('{"prompt": "x", "seed": false}', SEED),
     ('{"prompt": "x", "seed": -1}', SEED), ('{"prompt": "x", "seed": 1.0}', SEED),
     ('{"prompt": "x", "seed": "1"}', SEED), ('{"prompt": "x", "seed": NaN}', SEED),
     ('{"prompt": "x", "seed": [1]}', SEED), ('{"prompt": "x", "seed": 9223372036854775808}', SEED),
     ('{"prompt": "x", "seed": 1' + "0" * 5000 + "}", ""), ('{"prompt": ""}', "no prompt"),
     ('{"prompt": " \\n"}', "no prompt"), ('{"prompt": null}', "no prompt"),
     ('{"prompt": ["x"]}', "no prompt"), ('{"prompt": "\\ud83d"}', "no prompt"),
     ('{"refs": []}', "no prompt"), ('{"prompt": "x", "refs": "a_front.png"}', REFS),
     ('{"prompt": "x", "refs": ""}', REFS), ('{"prompt": "x", "refs": {}}', REFS),
     ('{"prompt": "x", "refs": 0}', REFS), ('{"prompt": "x", "refs": false}', REFS),
     ('{"prompt": "x", "refs": ["a_front.png"]}', REFS), ('{"prompt": "x", "refs": [[]]}', REFS),
     ('{"prompt": "x", "refs": [[["a_front.png"]]]}', REFS),
     ('{"prompt": "x", "refs": [["\\udcff.png"]]}', REFS), ('["x"]', "not an object"),
     ('"x"', "not an object"), ("null", "not an object"), ("a dog", ""), ('{"prompt": "x"', ""),
     ('{"prompt": "x"} {"prompt": "y"}', ""), ("[" * 100_000, ""), ('{"prompt":' * 100_000, ""),
     ('{"prompt": "x", "seed": ' + "[" * 900 + "]" * 900 + "}", SEED), ("\0", "")],
    ids=lambda value: value[:40],
)
def test_a_line_that_is_no_job_is_one_line_that_counts_it(line, says, tmp_path):
    path = jobs_file(tmp_path, '{"prompt": "good"}\n\n' + line + "\n")
    with pytest.raises(UserError, match="jobs.jsonl line 3: expected .*" + says) as error:
        read_jobs(path, 0)
    assert one_line(error)
    str(error.value).encode()  # it can be printed


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "holds no prompt"),
        (b"\n \r\n", "holds no prompt"),
        (b'{"prompt": "\xff"}', "not a readable text file"),
        (b'{"prompt": "\xed\xa0\x80"}', "not a readable text file"),  # a lone surrogate in UTF-8
        ("nothing", "not a readable text file"),
        ("folder", "not a readable text file"),
        ("pipe", "not a readable text file"),
    ],
)
def test_a_file_without_jobs_is_one_line(content, says, tmp_path, no_hang):
    path = tmp_path / "jobs.jsonl"
    if isinstance(content, bytes):
        path.write_bytes(content)
    if content == "folder":
        path.mkdir()
    if content == "pipe":
        os.mkfifo(path)
    with pytest.raises(UserError, match=f"jobs.jsonl:? {says}") as error:
        read_jobs(path, 0)
    assert one_line(error)


# ---------------------------------------------------------------------------------------------------- writing
def test_bytes_and_floats_are_the_same_pictures():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(from_bytes(pixels)), pixels)
    assert to_bytes(torch.tensor([-9.0, -1, 1, 9])).tolist() == [0, 0, 255, 255]


def test_pixels_stay_pixels_where_a_picture_grows():
    picture = torch.rand(3, 4, 6) * 2 - 1
    image = torch.from_numpy(np.array(to_image(picture, 8, 12)))
    assert torch.equal(image[::2, ::2].permute(2, 0, 1), to_bytes(picture))
    assert torch.equal(image[::2, ::2], image[1::2, 1::2])


def test_writing_a_video_and_reading_it_back(tmp_path):
    video = torch.full((3, 5, 32, 48), -1.0)
    video[0, 3:] = 1
    write_video(tmp_path / "v.mp4", video, fps=4, comment='{"prompt": "Bär"}')
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert container.streams.video[0].average_rate == 4
        assert container.metadata["comment"] == '{"prompt": "Bär"}'
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(frames) == 5 and frames[0].shape == (256, 384, 3)
    assert frames[0].max() < 20 and frames[4][..., 0].mean() > 230 and frames[4][..., 1].mean() < 20


def test_a_smaller_crf_is_a_larger_and_truer_video(tmp_path):
    """19 is what a video is written with where nothing is said."""
    pictures, sizes, errors = gradient(9, 256, 320), [], []
    video = from_bytes(torch.from_numpy(np.stack(pictures))).permute(3, 0, 1, 2)
    video += 0.03 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    for crf in (10, 19, 23, 35):
        write_video(tmp_path / "v.mp4", video, crf=crf)
        written = (tmp_path / "v.mp4").read_bytes()
        frames = np.stack(frames_of(tmp_path / "v.mp4")).astype(float)
        sizes.append(len(written))
        errors.append(((frames - to_bytes(video).permute(1, 2, 3, 0).numpy()) ** 2).mean())
        for _ in range(8 * (crf == 19)):  # and every time the same bits
            write_video(tmp_path / "v.mp4", video)
            assert (tmp_path / "v.mp4").read_bytes() == written
    assert sizes == sorted(sizes, reverse=True) and errors == sorted(errors)
    assert len(set(sizes)) == len(set(errors)) == 4


def write_slowly(path, video):
    def slow(*arguments):
        time.sleep(0.01)
        return to_image(*arguments)

    pictures.to_image = slow
    write_video(path, video)


def write_on_a_full_disk(path, video):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        write_video(path, video)
    except OSError:  # which run_script makes a line of
        os._exit(7)


@pytest.mark.parametrize("end", ["error", "kill", "full disk"])
def test_a_video_is_written_whole_or_not_at_all(end, tmp_path, monkeypatch):
    noise = torch.rand(3, 200, 16, 16, generator=torch.Generator().manual_seed(0))
    path, video = tmp_path / "v.mp4", noise * 2 - 1
    path.write_text("old")
    if end == "error":
        images = [to_image(video[:, 0], 256)] * 99

        def full(*arguments):
            if not images:
                raise FULL_DISK
            return images.pop()

        monkeypatch.setattr(pictures, "to_image", full)
        with pytest.raises(OSError, match="No space left"):
            write_video(path, video)
    if end == "kill":
        process = fork(write_slowly, path, video)
        wait_for(lambda: len(names(tmp_path)) > 1)
        kill(process)
        assert len(names(tmp_path)) == 2
        with lock(tmp_path):
            pass
    if end == "full disk":
        process = fork(write_on_a_full_disk, path, video)
        process.join(60)
        assert process.exitcode == 7
    assert names(tmp_path) == ["v.mp4"] and path.read_text() == "old"


def test_the_contact_sheet_shows_everything():
    black, white = torch.full((3, 32, 32), -1.0), torch.full((3, 32, 32), 1.0)
    video = torch.zeros(3, 2, 32, 32)

    def sheet(*prompts, truth=None, **views):
        people = [views or {"front": black}, {}]
        return contact_sheet([Job(p, people, video=video, truth=truth) for p in prompts])

    small, long, two = sheet("short"), sheet("long " * 60), sheet("short", "short")
    assert long.width == small.width and long.height > small.height  # a long prompt goes on in further lines
    assert two.width == small.width and two.height > 1.8 * small.height  # a strip a job
    assert sheet("short", truth=video).height == small.height + 112
    corners = {"front": (20, 20), "left": (76, 20), "right": (20, 76), "back": (76, 76)}
    for view, corner in corners.items():
        image = sheet("short", **{view: black})
        assert [image.getpixel(c) == (0, 0, 0) for c in corners.values()] == [v == view for v in corners]
    assert sheet("short", front=white).getpixel((20, 20)) == (255, 255, 255)
    assert small.getpixel((small.width - 20, 20)) == (128, 128, 128)  # the last frame


@pytest.mark.parametrize("height, width", [(32, 32), (48, 16), (16, 64)])
@pytest.mark.parametrize("colour", [-1.0, 1.0])
def test_the_contact_sheet_says_which_square_is_which_view(height, width, colour):
    """Also where none was given; on a narrow one with the word's first letter."""
    def squares(*views):
        w = round(112 * width / height) // 2
        people = [dict.fromkeys(views, torch.full((3, height, width), colour)), {}]
        sheet = contact_sheet([Job("", people, video=torch.zeros(3, 1, height, width))])
        sheet = sheet.crop((6, 6, 6 + 2 * w, 118) if views else (6, 6, 118, 118)).convert("L")
        w = sheet.width // 2
        words = [sheet.crop((x + 1, y + 44, x + w - 1, y + 55)) for y in (0, 56) for x in (0, w)]
        assert all((np.asarray(word)[:, :-2] < 128).sum() > 4 for word in words)  # dark letters
        return {word.tobytes() for word in words}
    assert len(squares(*VIEWS)) == len(squares()) == 4


@pytest.mark.parametrize(
    "references, frames, size",
    [
        (None, 1, (32, 32)),  # plain Wan
        ([{}], 9, (32, 64)),
        ([{"back": torch.zeros(3, 16, 48)}], 81, (16, 48)),
        ([{"front": torch.zeros(3, 48, 16)}, {}], 3, (48, 16)),
    ],
)
@pytest.mark.parametrize("prompt", ["", "x" * 3000, "a\n\nb\0\u2028\U0001f600", "Bär " * 400])
def test_any_job_fits_on_a_contact_sheet(references, frames, size, prompt):
    video = torch.zeros(3, frames, *size)
    image = contact_sheet([Job(prompt, references, video=video, note=" (given: none)")])
    assert image.height > 112 and image.width > min(frames, 8) * 112 * size[1] // size[0]
