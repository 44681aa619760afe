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

import av
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from PIL import Image
from test_checkpoint import FULL_DISK, fork, kill, names, wait_for

import data
import toy
from checkpoint import lock
from encoders import WanEncoders
from pictures import (PICTURE_FORMATS, Job, contact_sheet, from_bytes, read_jobs, read_picture,
                      read_references, to_bytes, to_image, view_of, write_video)
from rope import VIEWS, UserError
from train import STAGES


def one_line(error):
    return "\n" not in str(error.value) and len(str(error.value)) < 500


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


# ------------------------------------------------------------------------------------ which views a step gets
def draws(number, n=2000, **options):
    return [data.draw_views(STAGES[number], i / n, random.Random(i), **options) for i in range(n)]


def test_view_dropout_is_the_stages():
    assert set(draws(1)) == {((),), ((), ())}
    single = draws(2)
    assert set(single) == {((),), (("front",),)} and 0.07 < single.count(((),)) / 2000 < 0.13
    multi = draws(3)
    assert {len(x) for x in multi} == {1}

    def dropped(some):
        given = [x[0] for x in some if x[0]]
        return sum("back" not in views for views in given) / len(given)

    assert 0.44 < dropped(multi[:500]) < 0.54 and 0.17 < dropped(multi[-500:]) < 0.30
    assert any("front" not in x[0] and x[0] for x in multi)
    harmony = draws(4)
    assert {len(x) for x in harmony} == {1, 2} and 0.07 < sum(not any(x) for x in harmony) / 2000 < 0.13


@pytest.mark.parametrize("available", [("front",), toy.IN_PAIR_VIEWS, VIEWS])
@pytest.mark.parametrize("number", [2, 3, 4])
def test_nobody_loses_the_last_view_alone(number, available):
    """A person is without views only where all are, whatever views the training set has: dropout must not
    take the only view of --front-only."""
    steps = draws(number, available=available)
    assert all(any(people) == all(people) for people in steps)
    assert 0.07 < sum(not any(people) for people in steps) / len(steps) < 0.13  # all_drop is 0.1
    views = {view for people in steps for person in people for view in person}
    assert views == (set(available) if number > 2 else {"front"})


def views_of_commit_0814555(stage, progress, rng):
    """What draw_views was before it was told which views there are."""
    if stage.views == "none" or rng.random() < stage.all_drop:
        return ((),) * rng.choice(stage.people)
    views = ("front",) if stage.views == "front" else VIEWS
    drop = stage.drop[0] + (stage.drop[1] - stage.drop[0]) * progress
    people = []
    for _ in range(rng.choice(stage.people)):
        kept = tuple(v for v in views if rng.random() >= (stage.drop_front if v == "front" else drop))
        people.append(kept or (rng.choice(views),))
    return tuple(people)


@pytest.mark.parametrize("number", STAGES)
def test_with_all_views_the_draws_are_those_of_old_runs(number):
    a, b = random.Random(7), random.Random(7)
    for i in range(1000):
        old = views_of_commit_0814555(STAGES[number], i / 1000, a)
        assert data.draw_views(STAGES[number], i / 1000, b) == old
    assert a.getstate() == b.getstate()


# -------------------------------------------------------------------------------------------- masks and noise
def squares_of(image, block):
    """[3, H, W] -> [squares, 3 * block * block]"""
    squares = image.unfold(1, block, block).unfold(2, block, block)  # [3, rows, columns, block, block]
    return squares.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)


@pytest.mark.parametrize("height, width, block", [(32, 32, 8), (16, 48, 8), (64, 32, 16)])
def test_region_masking_hides_its_share_in_whole_blocks(height, width, block):
    image = torch.ones(3, height, width)
    masked = data.mask_regions(image, 0.6, block, torch.Generator().manual_seed(0))
    squares = squares_of(masked, block)
    assert ((squares == 0).all(-1) | (squares == 1).all(-1)).all()
    assert (squares[:, 0] == 0).sum() == round(0.6 * len(squares))
    assert torch.equal(image, torch.ones(3, height, width))
    assert not torch.equal(masked, data.mask_regions(image, 0.6, block, torch.Generator().manual_seed(1)))


def test_noise_is_its_samples_own():
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    three = data.noise_of((2, 5), generators(1, 2, 3))
    assert three.shape == (3, 2, 5) and torch.equal(three[1:2], data.noise_of((2, 5), generators(2)))


# -------------------------------------------------------------------------------------------------- the cache
SIZES = {"toy": (32, 2), "wan": (48, 5)}  # pixels and frames


@pytest.fixture(scope="module", params=SIZES)
def clips(request, tmp_path_factory):
    """A folder with rendered clips, two with one person and two with two, and the encoders for it."""
    size, frames = SIZES[request.param]
    folder = toy.render_cache(tmp_path_factory.mktemp(request.param), size, frames, (2, 2))
    if request.param == "toy":
        return folder, toy.ToyEncoders(folder, size)
    wan = request.getfixturevalue("wan")
    return folder, WanEncoders(wan / "2.1", torch.device("cpu"))


class Recorder:
    """Encoders that remember the pictures they were given."""

    def __init__(self, encoders):
        self.encoders, self.for_features, self.for_latents = encoders, [], []

    def __getattr__(self, name):
        return getattr(self.encoders, name)

    def features(self, image):
        self.for_features += image
        return self.encoders.features(image)

    def encode(self, video):
        if video.shape[2] == 1:
            self.for_latents += video[:, :, 0]
        return self.encoders.encode(video)


@pytest.mark.parametrize("mask, variants", [(0.0, 1), (0.5, 3)])
def test_a_cache_is_what_the_networks_say(mask, variants, clips):
    """Latents, text and features one by one; with a mask, both networks get the masked picture, the same."""
    folder, encoders = clips

    def in_cache(latent):
        return data.pack(latent, encoders.latent_dtype)

    recorder = Recorder(encoders)
    cache = data.encode_cache(folder, recorder, mask, variants=3)
    captions = (folder / "captions.txt").read_text().splitlines()
    for n_people, name in ((1, "one"), (2, "two")):
        raw = safetensors.torch.load_file(folder / f"{name}.safetensors")
        tensors = safetensors.torch.load_file(cache / f"{name}.safetensors")
        assert tensors["refs"].shape[:4] == (2, n_people, variants, len(VIEWS))
        assert tensors["vit"].shape[:3] == (2, n_people, variants)
        assert tensors["refs"].dtype == tensors["latents"].dtype == encoders.latent_dtype
        text = encoders.text([*captions[2 * n_people - 2 : 2 * n_people], ""]).half()
        torch.testing.assert_close(tensors["text"], text)
        for i in range(2):
            latent = encoders.encode(from_bytes(raw["video"][i : i + 1]))[0]
            assert torch.equal(tensors["latents"][i], in_cache(latent))
        persons = list(raw["refs"].flatten(0, 1))
        latents, vit = tensors["refs"].flatten(0, 2), tensors["vit"].flatten(0, 2)
        assert len(latents) == len(persons) * variants
        for j, features in enumerate(vit):
            pictures = torch.stack(recorder.for_latents[4 * j : 4 * j + 4])
            whole = from_bytes(persons[j // variants])
            assert torch.equal(recorder.for_features[j], pictures[0])
            for picture, original in zip(pictures, whole, strict=True):
                squares = squares_of(picture, encoders.mask_block)
                hidden = (squares == 0).all(-1)
                assert hidden.sum() == round(mask * len(squares))
                assert torch.equal(squares[~hidden], squares_of(original, encoders.mask_block)[~hidden])
            assert torch.equal(features, encoders.features(pictures[:1])[0].half())
            latent = encoders.encode(pictures[:1, :, None])[0, :, 0]
            torch.testing.assert_close(latents[j, 0], in_cache(latent))
        del recorder.for_features[: len(vit)], recorder.for_latents[: 4 * len(vit)]
    assert not recorder.for_features and not recorder.for_latents


def test_masked_variants_differ_and_all_are_drawn(clips):
    folder, encoders = clips
    dataset = data.Dataset(data.encode_cache(folder, encoders, 0.5, variants=3))
    generators = [torch.Generator().manual_seed(i) for i in range(60)]
    x0, _, refs, vit = dataset.batch((("front",),), generators, "cpu")
    whole, _, whole_refs, _ = data.Dataset(data.encode_cache(folder, encoders)).batch(
        (("front",),), [torch.Generator().manual_seed(i) for i in range(60)], "cpu"
    )
    assert torch.equal(x0, whole)  # the clip itself is never masked
    assert len(refs[0]["front"].unique(dim=0)) == len(vit[0].unique(dim=0)) == 2 * 3  # clips x variants
    assert len(whole_refs[0]["front"].unique(dim=0)) == 2
    pairs = {(r.sum().item(), v.sum().item()) for r, v in zip(refs[0]["front"], vit[0], strict=True)}
    assert len(pairs) == 6  # latents and features are of one variant


def test_a_cache_is_encoded_once(clips, monkeypatch):
    folder, encoders = clips
    first = data.encode_cache(folder, encoders)
    monkeypatch.setattr(data, "encode_clips", None)
    assert data.encode_cache(folder, encoders) == first
    with pytest.raises(TypeError):
        data.encode_cache(folder, encoders, mask=0.25)  # another mask is another cache
    assert not list(folder.glob(".unfinished-*"))


@pytest.mark.parametrize("file", ["one", "two"])
@pytest.mark.parametrize("damage", ["cut", "junk", "missing", "other names"])
def test_a_damaged_encoded_cache_says_that_deleting_it_mends_it(file, damage, tmp_path):
    for name in ("one", "two"):
        tensors = {key: torch.zeros(2, 1, 1, 1, 1) for key in ("latents", "refs", "vit", "text")}
        if name == file and damage == "other names":
            tensors["ref"] = tensors.pop("refs")
        safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors")
    path = tmp_path / f"{file}.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    if damage == "junk":
        path.write_bytes(b"\xff" * 99)
    if damage == "missing":
        path.unlink()
    with pytest.raises(UserError, match="is damaged .*: delete its folder, it is made again") as error:
        data.Dataset(tmp_path)
    assert str(path) in str(error.value) and one_line(error)


# ------------------------------------------------------------------------------------------------ the Dataset
def test_batches_belong_to_their_samples(tiny):
    """A sample is the same whatever batch it is drawn in, and text dropout takes the caption alone."""
    (folder,) = (tiny / "cache").glob("toy-*/toy-mask0x1-*")
    dataset = data.Dataset(folder)

    def generators(*seeds):
        return [torch.Generator().manual_seed(s) for s in seeds]

    views = (("front", "back"), ())
    x0, text, refs, vit = dataset.batch(views, generators(1, 2, 3), "cpu")
    alone = dataset.batch(views, generators(2), "cpu")
    assert torch.equal(x0[1:2], alone[0]) and torch.equal(text[1:2], alone[1])
    assert torch.equal(refs[0]["back"][1:2], alone[2][0]["back"]) and refs[1] == {} and vit[1] is None
    assert torch.equal(vit[0][1:2], alone[3][0])
    nothing = data.Dataset(folder, text_dropout=1).batch(views, generators(1), "cpu")
    assert torch.equal(nothing[1][0].half(), dataset.clips[1]["text"][-1])
    assert not torch.equal(nothing[1], text[:1])


def test_a_batch_has_the_views_that_were_drawn(tiny):
    (folder,) = (tiny / "cache").glob("toy-*/toy-mask0x1-*")
    dataset = data.Dataset(folder)
    for views in (((),), (VIEWS,), (("left",), ("front", "right")), ((), ())):
        x0, text, refs, vit = dataset.batch(views, [torch.Generator().manual_seed(1)], "cpu")
        assert [tuple(person) for person in refs] == list(views)
        assert [features is not None for features in vit] == ["front" in names for names in views]
        assert x0.shape == (1, *toy.ToyCodec.latent_shape(3, (32, 32 * len(views)))) and text.ndim == 3


# ------------------------------------------------------------------------------------------- reading pictures
@pytest.mark.parametrize(
    "argument, view",
    [
        ("anna_front.png", "front"),
        ("a/left/anna-BACK.2.png", "back"),
        ("left=a_front.png", "left"),
        ("right=x.png", "right"),
        ("Left 3.jpg", "left"),
        ("a=b/front.png", "front"),
    ],
)
def test_views_come_from_names(argument, view):
    assert view_of(argument)[0] == view


@pytest.mark.parametrize(
    "argument", ["anna.png", "backwards.png", "front_left.png", "side=anna.png", "", "="]
)
def test_a_view_must_be_named_once(argument):
    with pytest.raises(UserError, match="which view is it"):
        view_of(argument)


def test_a_person_has_each_view_once(tmp_path):
    for name in ("a_front.png", "b_front.png", "b_left.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    files = [[str(tmp_path / "a_front.png")], [str(tmp_path / "b_front.png"), str(tmp_path / "b_left.png")]]
    people = read_references(files, (16, 8))
    assert [tuple(views) for views in people] == [("front",), ("front", "left")]
    assert people[1]["left"].shape == (3, 16, 8)
    with pytest.raises(UserError, match="b_front.png: a second front view of the same person"):
        read_references([[files[0][0], files[1][0]]], (8, 8))


def test_pictures_are_turned_flattened_and_fitted(tmp_path):
    image = Image.new("RGBA", (20, 10), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 10, 10))  # the left half is transparent
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
    [
        (grey16("<u2"), {}, [-1, 0.004, 1]),
        (Image.frombytes("L", (3, 2), bytes([0, 128, 255] * 2)), {}, [-1, 0.004, 1]),
        (Image.frombytes("L", (3, 2), bytes([0, 128, 255] * 2)), {"transparency": 0}, [1, 0.004, 1]),
        (Image.frombytes("LA", (3, 2), bytes([0, 255, 128, 255, 0, 0] * 2)), {}, [-1, 0.004, 1]),
        (Image.frombytes("1", (3, 2), bytes([0b01100000] * 2)), {}, [-1, 1, 1]),
        (Image.frombytes("L", (3, 2), bytes([0, 128, 255] * 2)).convert("P"), {}, [-1, 0.004, 1]),
        (Image.frombytes("RGB", (3, 2), bytes(3 * [0] + 3 * [128] + 3 * [255]) * 2), {}, [-1, 0.004, 1]),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_kind_of_png_reads_right(image, options, colours, tmp_path):
    image.save(tmp_path / "a.png", **options)
    picture = read_picture(tmp_path / "a.png", (2, 3))
    truth = torch.tensor(colours, dtype=torch.float32).expand(3, 2, 3)
    torch.testing.assert_close(picture, truth, atol=0.003, rtol=0)


def test_cmyk_jpeg_reads_right(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    mean = read_picture(tmp_path / "a.jpg", (8, 8)).mean((1, 2))
    torch.testing.assert_close(mean, torch.tensor([1.0, -1, -1]), atol=0.03, rtol=0)


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
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=junk)
    Image.new("P", (8, 8)).save(tmp_path / "a.png", transparency=bytes(range(256)))
    for filter in ("always", "error"):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter(filter)
            for name in ("a.jpg", "a.png"):
                assert read_picture(tmp_path / name, (8, 8)).shape == (3, 8, 8)
        assert not told
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("format", PICTURE_FORMATS)
def test_mutated_pictures_never_surprise(format, tmp_path, no_hang):
    rng = random.Random(format)
    image = Image.effect_noise((24, 24), 60).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 3
    whole = saved(image, format, exif=exif)
    path = tmp_path / "a_front.png"
    for _ in range(20):
        content = bytearray(whole)
        for _ in range(rng.randrange(1, 8)):
            end = rng.choice([200, len(content)])  # half of them in the headers
            content[rng.randrange(min(end, len(content)))] = rng.randrange(256)
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            picture = read_picture(path, (16, 16))
            assert picture.shape == (3, 16, 16) and picture.abs().max() <= 1
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)


# ------------------------------------------------------------------------------------------------- jobs files
def jobs_file(folder, text):
    path = folder / "jobs.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return path


def test_a_jobs_file_is_a_video_a_line(tmp_path):
    lines = [
        {"prompt": "a dog"},
        {"prompt": "ein Bär", "seed": 5, "refs": [["a_front.png", "left=b.png"], ["c_back.png"]]},
        {"prompt": "two\u2028lines\x85and\u2029more", "seed": None, "refs": None},
    ]
    text = "\ufeff" + "\r\n\n  \n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    jobs = read_jobs(jobs_file(tmp_path, text), 9)
    assert [job.prompt for job in jobs] == [line["prompt"] for line in lines]
    assert [job.seed for job in jobs] == [9, 5, 9]
    assert [job.files for job in jobs] == [[], lines[1]["refs"], []]
    assert all(job.references is None for job in jobs)


SEED = "seed is not a whole number"
REFS = "refs is not a list"


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"prompt": "x", "ref": []}', "unknown key 'ref'"),
        ('{"prompt": "x", "\\ud800": []}', "unknown key"),
        ('{"prompt": "x", "seed": true}', SEED),
        ('{"prompt": "x", "seed": false}', SEED),
        ('{"prompt": "x", "seed": -1}', SEED),
        ('{"prompt": "x", "seed": 1.0}', SEED),
        ('{"prompt": "x", "seed": "1"}', SEED),
        ('{"prompt": "x", "seed": NaN}', SEED),
        ('{"prompt": "x", "seed": [1]}', SEED),
        ('{"prompt": "x", "seed": 9223372036854775808}', SEED),
        ('{"prompt": "x", "seed": 1' + "0" * 5000 + "}", ""),
        ('{"prompt": ""}', "no prompt"),
        ('{"prompt": " \\n"}', "no prompt"),
        ('{"prompt": null}', "no prompt"),
        ('{"prompt": ["x"]}', "no prompt"),
        ('{"prompt": "\\ud83d"}', "no prompt"),
        ('{"refs": []}', "no prompt"),
        ('{"prompt": "x", "refs": "a_front.png"}', REFS),
        ('{"prompt": "x", "refs": ""}', REFS),
        ('{"prompt": "x", "refs": {}}', REFS),
        ('{"prompt": "x", "refs": 0}', REFS),
        ('{"prompt": "x", "refs": false}', REFS),
        ('{"prompt": "x", "refs": ["a_front.png"]}', REFS),
        ('{"prompt": "x", "refs": [[]]}', REFS),
        ('{"prompt": "x", "refs": [[["a_front.png"]]]}', REFS),
        ('{"prompt": "x", "refs": [["\\udcff.png"]]}', REFS),
        ('["x"]', "not an object"),
        ('"x"', "not an object"),
        ("null", "not an object"),
        ("a dog", ""),
        ('{"prompt": "x"', ""),
        ('{"prompt": "x"} {"prompt": "y"}', ""),
        ("[" * 100_000, ""),
        ('{"prompt":' * 100_000, ""),
        ('{"prompt": "x", "seed": ' + "[" * 900 + "]" * 900 + "}", SEED),
        ("\0", ""),
    ],
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


def write_slowly(path, video):
    real = to_image

    def slow(*arguments):
        time.sleep(0.01)
        return real(*arguments)

    to_image = slow
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

        monkeypatch.setattr(data, "to_image", full)
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


def test_data_py_knows_no_world():
    """Real data comes through the same door: nothing of the toy's is in there."""
    text = (ROOT / "data.py").read_text()
    assert "import toy" not in text and "import encoders" not in text
