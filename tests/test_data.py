"""data.py: which views a step gets, region masks, encoding whatever happens meanwhile, and batches of it."""

import collections
import itertools
import json
import os
import random
import shutil
import threading
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import ROOT, WAN_SMALL, run
from helpers import content, fork, generators, one_line, wait_for

import data
import train
from model import CONFIGS
from networks.encoders import WanEncoders
from rope import VIEWS
from support.script import Lines, UserError, read_lines
from train import STAGES, World
from videos import manifest, toy
from videos.encode import encode, mask_regions, names_in, pack, prefetch, read_sample, sample_path, unpack
from videos.manifest import Sample


# ------------------------------------------------------------------------------------ which views a step gets
def draws(number, available, n=2000):
    return [data.draw_views(STAGES[number], i / n, random.Random(i), available) for i in range(n)]


def test_view_dropout_is_the_stages():
    assert set(draws(1, (VIEWS,))) == {((),)} and set(draws(1, (VIEWS, VIEWS))) == {((), ())}
    single = draws(2, (VIEWS,))
    assert set(single) == {((),), (("front",),)} and 0.07 < single.count(((),)) / 2000 < 0.13
    multi = draws(3, (VIEWS,))

    def dropped(some):
        given = [x[0] for x in some if x[0]]
        return sum("back" not in views for views in given) / len(given)

    assert 0.44 < dropped(multi[:500]) < 0.54 and 0.17 < dropped(multi[-500:]) < 0.30
    assert any("front" not in x[0] and x[0] for x in multi)
    harmony = draws(4, (VIEWS, VIEWS))
    assert {len(x) for x in harmony} == {2} and 0.07 < sum(not any(x) for x in harmony) / 2000 < 0.13


@pytest.mark.parametrize("available", [(("front",),), (toy.IN_PAIR_VIEWS,), (VIEWS, ("right",)),
                                       (("left", "back"), ("front", "right"))])
@pytest.mark.parametrize("number", [2, 3, 4])
def test_nobody_loses_the_last_view_alone(number, available):
    """Who has a view keeps one, in all steps but those in which nobody has any."""
    steps = draws(number, available)
    given = [[person for person, views in zip(people, available) if number > 2 or "front" in views]
             for people in steps]
    assert all(any(people) == all(people) for people in given)
    if any(given):
        assert 0.07 < sum(not any(people) for people in given) / len(steps) < 0.13  # all_drop is 0.1
    for k, views in enumerate(available):
        shown = {view for people in steps for view in people[k]}
        assert shown == (set(views) if number > 2 else {"front"} & set(views))


# -------------------------------------------------------------------------------------------- masks and noise
def squares_of(image, block):
    """[3, H, W] -> [squares, 3 * block * block]"""
    squares = image.unfold(1, block, block).unfold(2, block, block)  # [3, rows, columns, block, block]
    return squares.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)


@pytest.mark.parametrize("height, width, block", [(32, 32, 8), (16, 48, 8), (64, 32, 16)])
def test_region_masking_hides_its_share_in_whole_blocks(height, width, block):
    image = torch.ones(3, height, width)
    masked = mask_regions(image, 0.6, block, torch.Generator().manual_seed(0))
    squares = squares_of(masked, block)
    assert ((squares == 0).all(-1) | (squares == 1).all(-1)).all()
    assert (squares[:, 0] == 0).sum() == round(0.6 * len(squares))
    assert torch.equal(image, torch.ones(3, height, width))
    assert not torch.equal(masked, mask_regions(image, 0.6, block, torch.Generator().manual_seed(1)))


def test_noise_is_its_samples_own():
    three = data.noise_of((2, 5), generators(1, 2, 3))
    assert three.shape == (3, 2, 5) and torch.equal(three[1:2], data.noise_of((2, 5), generators(2)))


# ------------------------------------------------------------------------------------------ what networks say
SIZES = {"toy": (32, 2), "wan": (48, 5)}  # pixels and frames


@pytest.fixture(scope="module", params=SIZES)
def clips(request, tmp_path_factory):
    """A function that gives clips by kind of pairs, two with one person and two with two, and encoders."""
    size, frames = SIZES[request.param]

    def samples_of(pairs):
        return toy.training_samples(size, frames, (2, 2), pairs, toy.TRAIN_SEED, 0.0)
    if request.param == "toy":
        return samples_of, toy_encoders(size)
    wan = request.getfixturevalue("wan")
    return samples_of, WanEncoders(wan / "2.1", torch.device("cpu"))


def toy_encoders(size):
    return toy.ToyEncoders(ROOT / "assets/base", size)


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


@pytest.mark.parametrize("mask, variants, pairs", [(0.0, 1, "in"), (0.5, 3, "cross")])
def test_a_set_is_what_the_networks_say(mask, variants, pairs, clips, tmp_path):
    """Latents, text and features one by one; with a mask, both networks get the masked picture, the same."""
    samples_of, encoders = clips
    recorder, samples = Recorder(encoders), samples_of(pairs)
    encode(samples, tmp_path, recorder, {}, mask, variants=3)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["variants"] == variants and settings["vit"] == encoders.vit_shape
    pictures, for_features = iter(recorder.for_latents), iter(recorder.for_features)

    def as_stored(latent):
        return pack(latent, encoders.latent_dtype)

    index = read_lines(tmp_path / "index.jsonl")
    for entry, sample in zip(index, samples, strict=True):
        tensors = safetensors.torch.load_file(sample_path(tmp_path, entry["name"]))
        assert entry["views"] == [dict.fromkeys(person, pairs == "cross") for person in sample.people]
        assert entry["source"] == sample.source and entry["people"] == sample.ids
        assert torch.equal(tensors["latents"], as_stored(encoders.encode(sample.read_video()[None])[0]))
        assert list(tensors["latents"].shape) == entry["shape"]
        text = encoders.text([sample.caption])[0].half()
        assert torch.equal(tensors["text"], text)
        expected = {"latents", "text"}
        for k, person in enumerate(sample.people):
            expected |= {f"vit.{k}", *(f"refs.{k}.{view}" for view in person)}
            for view, read in person.items():
                stored = tensors[f"refs.{k}.{view}"]
                assert len(stored) == variants
                shown = [next(pictures) for _ in range(variants)]
                for picture, latent in zip(shown, stored, strict=True):
                    squares, original = (squares_of(p, encoders.mask_block) for p in (picture, read()))
                    hidden = (squares == 0).all(-1)
                    assert hidden.sum() == round(mask * len(squares))
                    assert torch.equal(squares[~hidden], original[~hidden])
                    assert torch.equal(latent, as_stored(encoders.encode(picture[None, :, None])[0, :, 0]))
                if view == "front":
                    assert all(torch.equal(next(for_features), picture) for picture in shown)
                    assert torch.equal(tensors[f"vit.{k}"], encoders.features(torch.stack(shown)).half())
                assert len({picture.numpy().tobytes() for picture in shown}) > (1 if mask else 0)
        assert tensors.keys() == expected
    assert not list(pictures) and not list(for_features)
    assert torch.equal(data.Dataset(tmp_path).empty, encoders.text([""])[0].half())


def test_batches_are_what_is_stored_and_all_variants_are_drawn(clips, tmp_path):
    samples_of, encoders = clips
    samples = samples_of("cross")
    encode(samples, tmp_path, encoders, {}, 0.5, variants=3)
    dataset = data.Dataset(tmp_path, text_dropout=0)
    views, numbers = (("front", "back"), ("left",)), [2, 3] * 20
    x0, text, refs, vit = batch(dataset, views, numbers, *range(40))
    assert [list(person) for person in refs] == [["front", "back"], ["left"]] and vit[1] is None
    assert x0.dtype == text.dtype == vit[0].dtype == refs[1]["left"].dtype == torch.float32
    drawn = set()
    for i, number in enumerate(numbers):
        tensors = safetensors.torch.load_file(sample_path(tmp_path, dataset.entry(number)["name"]))
        assert torch.equal(x0[i], unpack(tensors["latents"]))
        length = len(tensors["text"])
        assert torch.equal(text[i, :length], tensors["text"].float()) and not text[i, length:].any()
        fits = [v for v in range(3) if torch.equal(refs[0]["front"][i],
                                                   unpack(tensors["refs.0.front"][v]))]
        assert len(fits) == 1  # and all of the sample is of that variant
        assert torch.equal(refs[0]["back"][i], unpack(tensors["refs.0.back"][fits[0]]))
        assert torch.equal(refs[1]["left"][i], unpack(tensors["refs.1.left"][fits[0]]))
        assert torch.equal(vit[0][i], tensors["vit.0"][fits[0]].float())
        drawn.add((number, fits[0]))
    assert len(drawn) == 2 * 3


# --------------------------------------------------------------------------------- encoding, without networks
class Plain:
    """Encoders without networks. A picture of one value comes back as latents of that value."""

    latent_dtype, mask_block, vit_shape = torch.float32, 8, [2, 3]

    def __init__(self, seconds=0, vit=True):
        self.seconds, self.vit_shape, self.dropped, self.encoded = seconds, [2, 3] if vit else None, 0, 0

    def text(self, captions):
        rows = [torch.tensor([[len(word), sum(map(ord, word)) % 997, 1.0] for word in f"{text} </s>".split()])
                for text in captions]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def features(self, image):
        return F.adaptive_avg_pool2d(image, 2).flatten(2).mT[:, None].expand(-1, 2, -1, -1)

    def encode(self, video):
        time.sleep(self.seconds)
        self.encoded += video.shape[2] > 1
        return F.avg_pool3d(video, (1, 4, 4))

    def drop(self):
        self.dropped += 1


def sample(number, *people, size=(16, 16), frames=2, cross=False, error=None, broken_picture=False):
    """A Sample whose clip is of the value number / 100, its person k's views number / 100 + k / 1000."""

    def read_video():
        if error:
            raise UserError(error)
        return torch.full((3, frames, *size), number / 100)

    def reader(k):
        def read():
            if broken_picture:
                raise UserError("refs/a.png: not a readable picture")
            return torch.full((3, 16, 16), number / 100 + k / 1000)

        return read

    cast = [{view: reader(k) for view in views} for k, views in enumerate(people)]
    of_others = [{view: cross if isinstance(cross, bool) else view in cross for view in v} for v in people]
    ids = [f"{number}-{k}" for k in range(len(people))]
    return Sample(f"{number:04d}", f"clips/{number}.mp4", f"caption of {number}", read_video, cast, of_others,
                  ids)


def make(folder, *samples, encoders=None, **options):
    encode(samples, folder, encoders or Plain(), {}, **options)
    return data.Dataset(folder)


def numbers_of(x0):
    return [round(100 * value) for value in x0[:, 0, 0, 0, 0].tolist()]


def batch(dataset, views, numbers, *seeds):
    """Dataset.batch of these clips, with those of as many people and at least these views to stand in."""
    return dataset.batch(views, numbers, dataset.sampler.having(views), generators(*seeds), "cpu")


def sources(folder, name="index"):
    return [Path(line["source"]).stem for line in read_lines(folder / f"{name}.jsonl")]


def path_of(folder, number):
    """The file of `sample(number, ...)` in a set."""
    [name] = [line["name"] for line in read_lines(folder / "index.jsonl")
              if line["source"] == f"clips/{number}.mp4"]
    return sample_path(folder, name)


def test_a_set_is_files_by_name_and_two_lists(tmp_path):
    make(tmp_path, sample(1, ("front",)), sample(205, ("front",)))
    files = {path_of(tmp_path, n).relative_to(tmp_path).as_posix() for n in (1, 205)}
    assert content(tmp_path).keys() == files | {"settings.json", "index.jsonl", "failed.jsonl",
                                                "em/empty.safetensors"}
    for file in files:  # as readable for others
        assert (tmp_path / file).stat().st_mode == (tmp_path / "index.jsonl").stat().st_mode


def test_text_is_stored_at_its_true_length(tmp_path):
    make(tmp_path, *(sample(n, ("front",))._replace(caption="a " * words) for n, words in ((1, 2), (2, 9))))
    names = ["empty", path_of(tmp_path, 1).stem, path_of(tmp_path, 2).stem]
    assert [len(read_sample(tmp_path, name, ["text"])["text"]) for name in names] == [1, 3, 10]


def test_captions_keep_the_people_in_order(tmp_path):
    """Person k of a caption is person k of the references."""
    dataset = make(tmp_path, sample(7, ("front",), ("left", "front")))
    _, _, refs, _ = batch(dataset, (("front",), ("front", "left")), [0], 0)
    for k, person in enumerate(refs):
        assert all(torch.allclose(latent, torch.tensor(0.07 + k / 1000)) for latent in person.values())
    entry, = read_lines(tmp_path / "index.jsonl")
    assert entry["people"] == ["7-0", "7-1"] and [list(v) for v in entry["views"]] == [["front"],
                                                                                     ["left", "front"]]


def test_what_cannot_be_read_has_a_reason_and_the_rest_is_encoded(tmp_path):
    samples = [sample(1, ("front",)), sample(2, ("front",), error="damaged, as the decoder says (x)"),
               sample(3, ("front",), broken_picture=True), sample(4, ("left",), broken_picture=True),
               sample(5, ("front",))]
    make(tmp_path, *samples)
    assert sources(tmp_path) == ["1", "5"]
    failed = read_lines(tmp_path / "failed.jsonl")
    reason = "refs/a.png: not a readable picture"
    assert [(line["source"], line["error"]) for line in failed] == [
        ("clips/2.mp4", "damaged, as the decoder says (x)"), ("clips/3.mp4", reason), ("clips/4.mp4", reason)]
    # what failed is tried again, what was encoded is not
    encoders = Plain()
    mended = [sample(2, ("front",)) if s.name == "0002" else s for s in samples]
    make(tmp_path, *mended, encoders=encoders)
    assert sources(tmp_path) == ["1", "2", "5"] and encoders.encoded == 1
    assert sources(tmp_path, "failed") == ["3", "4"]


def test_all_unreadable_is_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no encoded sample") as error:
        make(tmp_path, sample(1, ("front",), error="x"), sample(2, ("front",), error="x"))
    assert one_line(error) and len(read_lines(tmp_path / "failed.jsonl")) == 2


def test_networks_are_dropped_after_a_bounded_number_of_samples(tmp_path):
    encoders = Plain()
    make(tmp_path, *(sample(n, ("front",)) for n in range(130)), encoders=encoders)
    assert encoders.dropped == 3 and encoders.encoded == 130


def test_a_grown_or_shrunk_list_of_samples_is_followed(tmp_path, capsys):
    """What is new is encoded, what is gone leaves the index, what is reordered is reordered there. Files of
    what is gone for good go; of what was gone once only, they are still there."""
    samples, encoders = [sample(n, ("front",)) for n in range(6)], Plain()
    make(tmp_path, *samples[:4])
    make(tmp_path, *samples[:1:-1], encoders=encoders)
    assert sources(tmp_path) == ["5", "4", "3", "2"] and encoders.encoded == 2
    assert "2 files are of no sample any more (unused.txt), the next run removes" in capsys.readouterr().out
    make(tmp_path, *samples[1:], encoders=encoders)
    assert encoders.encoded == 2 and len(names_in(tmp_path)) == 6 and not (tmp_path / "unused.txt").exists()
    make(tmp_path, *samples[2:])
    make(tmp_path, *samples[2:])
    assert len(names_in(tmp_path)) == 5 and not (tmp_path / "unused.txt").exists()


@pytest.mark.parametrize("other, says", [
    ({"mask": 0.5}, "mask 0.0 there, 0.5 here; variants 1 there, 4 here"),
    ({"settings": {"size": [[32, 32]]}}, r"size \[\[16, 16\]\] there, \[\[32, 32\]\] here"),
    ({"settings": {"size": [[16, 16]], "networks": {"a": 2}}}, "networks .* there, .* here"),
    ({"encoders": Plain(vit=False)}, r"vit \[2, 3\] there, None here"),
])
def test_other_settings_are_refused_and_named(other, says, tmp_path):
    def again(encoders=None, settings=None, mask=0.0, variants=4):
        settings = {"networks": {"a": 1}} | (settings or {"size": [[16, 16]]})
        encode([sample(1, ("front",))], tmp_path, encoders or Plain(), settings, mask, variants)

    again()
    whole = content(tmp_path)
    again()
    with pytest.raises(UserError, match=f"other settings .*{says}.*: give the same, or") as error:
        again(**other)
    assert one_line(error) and content(tmp_path) == whole


@pytest.mark.parametrize("settings", ["", "{}", "[]", "null", '{"version": 2, "variants": 1}', "\xff" * 9,
                                      '// a comment', '{"editor": 4}'])
def test_settings_of_another_version_or_program_are_one_line_and_stay(settings, tmp_path):
    make(tmp_path, sample(1, ("front",)))
    (tmp_path / "settings.json").write_text(settings, encoding="latin-1")
    before = content(tmp_path)
    for attempt in (data.Dataset, lambda folder: encode([sample(1, ("front",))], folder, Plain(), {})):
        with pytest.raises(UserError, match="is not an encoded set of this version") as error:
            attempt(tmp_path)
        assert one_line(error) and content(tmp_path) == before
    (tmp_path / "settings.json").unlink()
    with pytest.raises(UserError, match="is not an encoded set of this version"):
        data.Dataset(tmp_path)


def test_a_damaged_empty_caption_is_one_line_that_names_it(tmp_path):
    make(tmp_path, sample(1, ("front",)))
    path = sample_path(tmp_path, "empty")
    path.write_bytes(path.read_bytes()[:50])
    for _ in range(2):
        with pytest.raises(UserError, match="empty.safetensors is damaged") as error:
            data.Dataset(tmp_path)
        assert one_line(error)
        path.unlink(missing_ok=True)
    make(tmp_path, sample(1, ("front",)))


def test_replaced_files_are_encoded_again(tmp_path):
    """Another video and another picture of the same names; the same files give the same bits."""
    def again():
        make(tmp_path / "set", *manifest.Samples(tmp_path, [(16, 16)], [1], 8), mask=0.5)
        return {line["source"]: line["name"] for line in read_lines(tmp_path / "set/index.jsonl")}

    toy.write_samples(tmp_path, 16, 1, 8)
    before, files = again(), content(tmp_path / "set")
    assert again() == before and content(tmp_path / "set") == files
    os.replace(tmp_path / "clip2.mp4", tmp_path / "clip1.mp4")
    shutil.copy(tmp_path / "clip1.mp4", tmp_path / "clip2.mp4")
    shutil.copy(tmp_path / "ann_left.png", tmp_path / "dan_front.png")
    after = again()
    assert {source for source in after if after[source] != before[source]} == {"clip1.mp4", "clip2.mp4",
                                                                             "clip4.mp4"}


def test_what_does_not_change_the_latents_does_not_change_their_files(tmp_path):
    """Further videos change a person's number, the similarity of her pictures and what is a cross-pair."""
    toy.write_samples(tmp_path, 16, 1, 8)
    encoders, path = Plain(), tmp_path / "manifest.jsonl"

    def again():
        samples = manifest.Samples(tmp_path, [(16, 16)], [1], 8)
        return encode(samples, tmp_path / "set", encoders, {}), sources(tmp_path / "set")

    assert again() == ((4, 0), ["clip1", "clip2", "clip3", "clip4"]) and encoders.encoded == 0
    files = content(tmp_path / "set")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        for person in line["identities"]:
            person["id"] += "_2"
            person["views"] = {view: picture | {"cross": False, "similarity": 0.5}
                               for view, picture in reversed(person["views"].items())}
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert again()[0] == (4, 0)
    changed = {name for name, data in content(tmp_path / "set").items() if files.get(name) != data}
    assert changed == {"index.jsonl"} and "ann_2" in data.Dataset(tmp_path / "set").ids


@pytest.mark.parametrize("file", ["empty", "settings.json", "index.jsonl", "sample"])
def test_a_missing_part_is_made_again(file, tmp_path):
    samples = [sample(n, ("front",)) for n in range(3)]
    make(tmp_path, *samples)
    whole = content(tmp_path)
    paths = {"empty": sample_path(tmp_path, "empty"), "sample": path_of(tmp_path, 1)}
    paths.get(file, tmp_path / file).unlink()
    make(tmp_path, *samples)
    assert content(tmp_path) == whole


@pytest.mark.parametrize("change", [{"views": None}, {"views": [3]}, {"shape": 3}, {"people": None}, None],
                         ids=str)
def test_a_bad_line_of_the_index_is_left_out(change, tmp_path, capsys):
    make(tmp_path, *(sample(n, ("front",)) for n in range(3)))
    lines = read_lines(tmp_path / "index.jsonl")
    lines[1] = change and lines[1] | change
    (tmp_path / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = data.Dataset(tmp_path)
    assert "index.jsonl: 1 of 3 lines are damaged, left out: encode again" in capsys.readouterr().out
    assert numbers_of(batch(dataset, (("front",),), [0, 2], 1, 2)[0]) == [0, 2]


# -------------------------------------------------------------------------------------------- kills and ranks
def encoding(kind, request):
    """Samples and encoders: slow ones without networks, the toy's, and Wan's own, small and random."""
    if kind == "plain":
        return [sample(n, ("front", "left"), ("front",)) for n in range(70)], lambda: Plain(0.0003)
    root = request.getfixturevalue("tmp_path_factory").mktemp(kind)
    samples = toy.training_samples(32, 1, {"toy": (30, 20), "wan": (2, 1)}[kind], "in", toy.TRAIN_SEED, 0.0)
    if kind == "toy":
        return samples, lambda: toy_encoders(32)
    wan = request.getfixturevalue("wan") / "2.1"
    # here once, or each forked process would import and compile for seconds
    encode(samples[:1], root / "once", WanEncoders(wan, torch.device("cpu")), {})
    return samples, lambda: WanEncoders(wan, torch.device("cpu"))


def encode_here(samples, folder, encoders, mask, rank=0, size=1):
    torch.set_num_threads(1)
    encode(samples, folder, encoders(), {}, mask, 2, rank, size)


@pytest.mark.parametrize("kind, mask", [("plain", 0.5), ("toy", 0.0), ("wan", 0.0)])
def test_kills_leave_the_bytes_of_an_undisturbed_run(kind, mask, request, tmp_path):
    samples, encoders = encoding(kind, request)
    process = fork(encode_here, samples, tmp_path / "whole", encoders, mask)
    process.join(60)
    assert process.exitcode == 0
    rng, kills = random.Random(kind), 0
    for _ in range(5):
        before = len(names_in(tmp_path / "killed"))
        process = fork(encode_here, samples, tmp_path / "killed", encoders, mask)
        # however busy the machine is, some samples get done
        wait_for(lambda before=before, process=process: len(names_in(tmp_path / "killed")) > before + 1
                 or not process.is_alive())
        time.sleep(rng.uniform(0, 0.02))
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills > 2 or kind == "wan"
    process = fork(encode_here, samples, tmp_path / "killed", encoders, mask)
    process.join(60)
    assert process.exitcode == 0
    assert content(tmp_path / "killed") == content(tmp_path / "whole")  # and no leftovers


@pytest.mark.parametrize("kind", ["plain", "toy", "wan"])
def test_two_processes_encode_what_one_does(kind, request, tmp_path):
    samples, encoders = encoding(kind, request)
    processes = [fork(encode_here, samples, tmp_path / "one", encoders, 0.5)]
    processes += [fork(encode_here, samples, tmp_path / "two", encoders, 0.5, rank, 2) for rank in (0, 1)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert content(tmp_path / "two") == content(tmp_path / "one")


@pytest.mark.parametrize("ranks", [(0, 1, 2), (2, 0, 1)])
def test_processes_cut_the_samples_alike_whatever_is_there(ranks, tmp_path):
    """Each leaves out what others have made meanwhile, and no sample falls between them."""
    samples = [sample(n, ("front",), error="bad" if n == 3 else None) for n in range(9)]
    encoders, size = Plain(), len(ranks)
    encode(samples[4:6], tmp_path, encoders, {})
    found = [encode(samples, tmp_path, encoders, {}, rank=rank, size=size) for rank in ranks]
    assert found == [None, None, (8, 1)] and encoders.encoded == 8
    assert sources(tmp_path) == [str(n) for n in range(9) if n != 3] and sources(tmp_path, "failed") == ["3"]


class Asked(list):
    """Samples that note which of them are asked for; one of None cannot be had."""

    def __init__(self, *samples):
        super().__init__(samples)
        self.places = []

    def __getitem__(self, place):
        self.places.append(place)
        if super().__getitem__(place) is None:
            raise UserError(f"line {place}: no such file")
        return super().__getitem__(place)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_process_asks_for_its_own_samples_once_and_in_order(size, tmp_path):
    """At the size of a set of millions, what every process reads of all clips is hours and memory."""
    samples = [None if n == 4 else sample(n, ("front",)) for n in range(10)]
    for rank in range(size):
        asked = Asked(*samples)
        found = encode(asked, tmp_path, Plain(), {}, rank=rank, size=size)
        assert asked.places == list(range(rank, 10, size)) and (found is None) == (rank < size - 1)
    assert found == (9, 1) and sources(tmp_path) == [str(n) for n in range(10) if n != 4]
    failed, = read_lines(tmp_path / "failed.jsonl")
    assert failed == {"source": "sample 5", "error": "line 4: no such file"}
    assert not list(tmp_path.glob("part-*"))


def test_a_part_that_a_killed_run_left_is_not_taken_for_this_runs(tmp_path):
    """The first process of two ended, the second was killed; then the list of samples grew."""
    encode([sample(n, ("front",)) for n in range(4)], tmp_path, Plain(), {}, rank=0, size=2)
    grown = [sample(n, ("front",)) for n in range(6)]
    assert encode(grown, tmp_path, Plain(), {}, rank=0, size=2) is None
    assert encode(grown, tmp_path, Plain(), {}, rank=1, size=2) == (6, 0)
    assert sources(tmp_path) == list("012345")
    encode(grown[:2], tmp_path, Plain(), {}, rank=0, size=3)
    assert encode(grown, tmp_path, Plain(), {}) == (6, 0) and not list(tmp_path.glob("part-*"))


def test_an_old_part_is_not_merged_where_the_other_process_comes_later(tmp_path):
    """The second process of two ended, the first was killed, and the list changed; now the first is first."""
    old, grown = ([sample(n, ("front",)) for n in range(count)] for count in (2, 4))
    encode(old, tmp_path, Plain(), {}, rank=1, size=2)
    assert encode(grown, tmp_path, Plain(), {}, rank=0, size=2) is None
    assert encode(grown, tmp_path, Plain(), {}, rank=1, size=2) == (4, 0)
    assert sources(tmp_path) == list("0123") and not list(tmp_path.glob("part-*"))


def test_samples_that_cannot_be_had_for_once_cost_no_latents(tmp_path):
    whole, without = [sample(n, ("front",)) for n in range(3)], Asked(sample(0, ("front",)), None, None)
    encode(whole, tmp_path, Plain(), {})
    for _ in range(3):
        assert encode(without, tmp_path, Plain(), {}) == (1, 2)
    encoders = Plain()
    assert encode(whole, tmp_path, encoders, {}) == (3, 0) and encoders.encoded == 0


def test_a_list_that_is_replaced_meanwhile_is_read_as_it_was(tmp_path):
    """As curate.py replaces a manifest while it is encoded."""
    (tmp_path / "a").write_text("one\n\ntwo\nthree\n")
    lines = Lines(tmp_path / "a")
    (tmp_path / "b").write_text("a longer line than before\n" * 5)
    os.replace(tmp_path / "b", tmp_path / "a")
    assert list(lines) == [b"one\n", b"two\n", b"three\n"] and lines[1] == b"two\n" and len(lines) == 3


def test_a_sample_that_is_there_twice_is_encoded_once_and_the_second_has_that_reason(tmp_path):
    for rank in (0, 1):
        samples = [sample(n, ("front",)) for n in (1, 2, 2, 1)]
        found = encode(samples, tmp_path, Plain(), {}, rank=rank, size=2)
    assert found == (2, 2) and sources(tmp_path) == ["1", "2"]
    assert [(line["source"], line["error"]) for line in read_lines(tmp_path / "failed.jsonl")] == [
        (f"clips/{n}.mp4", "the same clip, caption and pictures again") for n in (2, 1)]


def test_the_next_clip_is_read_while_one_is_encoded(tmp_path):
    """Or a GPU would wait for a decoder."""
    begun = [threading.Event() for _ in range(4)]

    def watched(n):
        plain = sample(n, ("front",))

        def read_video():
            begun[n].set()
            return plain.read_video()
        return plain._replace(read_video=read_video)

    class Waiting(Plain):
        def encode(self, video):
            if video.shape[2] > 1:
                number = numbers_of(video)[0]
                assert number == 3 or begun[number + 1].wait(20)
            return super().encode(video)

    assert numbers_of(batch(make(tmp_path, *map(watched, range(4)), encoders=Waiting()), (("front",),),
                            range(4), 1, 2, 3, 4)[0]) == [0, 1, 2, 3]


def test_a_folder_with_other_files_becomes_no_set(tmp_path):
    """As of a run: its files and the set's would mix."""
    (tmp_path / "checkpoint.json").write_text("{}")
    with pytest.raises(UserError, match="holds files, and is no encoded set: give another --out") as error:
        make(tmp_path, sample(1, ("front",)))
    assert one_line(error) and content(tmp_path).keys() == {"checkpoint.json"}


# ------------------------------------------------------------------------------------------ what a step draws
ALL = train.Stage("all", (1,), "all", (0, 0), 0, 0, 0, (1, 1))  # all views of one person, always


def draw(dataset, stage=ALL, batch=1, steps=1, seed=0):
    """[(views, numbers)] of some steps."""
    return [dataset.sampler.draw(stage, step / steps, random.Random(f"{seed}-{step}"), batch)[:2]
            for step in range(steps)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Samples of one and of two people, of different views, shapes and lengths, cross-pairs and others."""
    samples = [*(sample(n, VIEWS) for n in range(8)),
               *(sample(n, ("front", "left"), cross=True) for n in range(8, 14)),
               *(sample(n, ("front",), cross=n % 2 == 0) for n in range(14, 20)),
               *(sample(n, ("front", "right"), size=(16, 32)) for n in range(20, 24)),
               *(sample(n, ("front", "right"), frames=5) for n in range(24, 28)),
               *(sample(n, ("front",), ("front", "left")) for n in range(28, 36))]
    folder = tmp_path_factory.mktemp("mixed")
    make(folder, *samples)
    return folder


@pytest.mark.parametrize("number", STAGES)
def test_every_sample_of_a_step_has_the_drawn_views_and_one_shape(number, mixed):
    dataset, seen = data.Dataset(mixed), set()
    for step in range(300):
        views, numbers, bucket = dataset.sampler.draw(STAGES[number], step / 300, random.Random(step), 3)
        entries = [dataset.entry(n) for n in numbers]
        assert all(len(entry["views"]) == len(views) for entry in entries) and len(set(numbers)) == 3
        assert all(set(names) <= set(person) for entry in entries
                   for names, person in zip(views, entry["views"], strict=True))
        assert len({tuple(entry["shape"]) for entry in entries}) == 1 and set(numbers) <= set(bucket.clips)
        seen |= set(numbers)
        if step % 10 == 0:
            x0, _, refs, vit = dataset.batch(views, numbers, bucket, generators(1, 2, 3), "cpu")
            assert numbers_of(x0) == numbers and [tuple(person) for person in refs] == list(views)
            assert [features is not None for features in vit] == ["front" in names for names in views]
    shown = {n for n in range(36) if len(dataset.entry(n)["views"]) in STAGES[number].people}
    assert seen == shown  # sooner or later all of them


def some_clips(n, rng):
    """A third has both sides, one in a hundred the back, one in a hundred two people, one a cross-pair."""
    groups = {}
    for number in range(n):
        def person():
            views = ["front", *rng.choices([["left"], ["right"], ["left", "right"]])[0]]
            return tuple((view, number == 0) for view in (*views, *["back"] * (rng.random() < 0.01)))
        shape = rng.choice([(3, 21, 60, 104), (3, 13, 104, 60)])
        people = tuple(person() for _ in range(1 + (rng.random() < 0.01)))
        groups.setdefault((shape, people), []).append(number)
    return groups


UNEVEN = {
    "few have a back or a partner": lambda: some_clips(700, random.Random(1)),
    "all alike": lambda: {(None, ((("front", True), ("left", True)),)): range(40)},
    "one clip": lambda: {(None, ((("front", False),),)): range(1)},
    "nobody has the same views": lambda: {
        (None, (tuple((view, bool(n % 3)) for view in VIEWS if n >> VIEWS.index(view) & 1),)): [n - 1]
        for n in range(1, 16)},
    "no front": lambda: {(None, ((("left", True),),)): range(7), (None, ((("back", False),),)): range(7, 30)},
    "two people only": lambda: {(None, ((("front", n % 2 == 0),), (("front", True), ("left", False)))):
                                range(9 * n, 9 * n + 9) for n in range(3)},
}


@pytest.mark.parametrize("name", UNEVEN)
@pytest.mark.parametrize("number", [1, 2, 4])
def test_every_clip_of_a_stage_is_drawn_equally_often(name, number):
    """Whatever views, people and cross-pairs the others have."""
    groups, stage = UNEVEN[name](), STAGES[number]
    clips = [n for (_, persons), numbers in groups.items() if len(persons) in stage.people for n in numbers]
    sampler, counts = data.Sampler(groups), collections.Counter()
    if not clips:
        with pytest.raises(UserError, match="stage single shows 1 people, and the set has no clip of as"):
            sampler.describe(stage, 4)
        return
    mean = 60 if len(clips) > 100 else 240
    steps = mean // 4 * len(clips)
    for step in range(steps):
        counts.update(sampler.draw(stage, step / steps, random.Random(f"{name}{step}"), 4)[1])
    assert set(counts) == set(clips)
    # chance spreads counts as Poisson's; twice as far where a clip has steps of its own, which take it four
    # times each
    spread = 2 * mean**0.5
    assert mean - 6 * spread < min(counts.values()) and max(counts.values()) < mean + 6 * spread
    often = f"{4000 / len(clips):.3g}"
    assert f"{len(clips):,} clips, each {often} to {often} times in 1,000" in sampler.describe(stage, 4)


def test_a_small_bucket_joins_one_with_fewer_views_and_takes_no_view_from_a_large_one():
    def buckets(batch, **people):
        """people: how many clips with these views of one person"""
        groups, n = {}, 0
        for views, count in people.items():
            groups[None, (tuple((view, True) for view in views.split("_")),)] = range(n, n + count)
            n += count
        found = data.Sampler(groups).buckets("all", (1,), False, batch)
        return {"_".join(bucket.views[0]): len(bucket.clips) for bucket in found}

    assert buckets(8, front=20, front_left=20, front_left_right=3) == {"front": 20, "front_left": 23}
    assert buckets(8, front=20, left_right=3) == {"front": 20, "left_right": 3}  # nothing in common
    assert buckets(8, front_left=3, front_left_right=20) == {"front_left": 3, "front_left_right": 20}
    assert buckets(8, front_left=3, front_right=3, front=2) == {"front": 8}
    assert buckets(2, front_left=3, front_right=3, front=2) == {"front_left": 3, "front_right": 3, "front": 2}


def test_references_from_other_clips_are_preferred_by_person():
    """With probability stage.cross; who has none gives what there is."""
    stage = train.Stage("half", (2,), "all", (0, 0), 0, 0, 0.25, (1, 1))
    sampler = data.Sampler({(None, ((("front", True), ("left", False)), (("front", False),))): range(9)})
    drawn = collections.Counter(sampler.draw(stage, 0, random.Random(n), 2)[0] for n in range(2000))
    assert drawn.keys() == {(("front",), ("front",)), (("front", "left"), ("front",))}
    assert 0.22 < drawn[("front",), ("front",)] / 2000 < 0.28


def test_front_only_gives_nothing_else_whatever_a_clip_has():
    groups = UNEVEN["nobody has the same views"]()
    sampler = data.Sampler(groups, front_only=True)
    drawn = {sampler.draw(STAGES[3], 0, random.Random(n), 4)[0] for n in range(100)}
    assert drawn == {(("front",),), ((),)} and sampler.views == {"front"}


@pytest.mark.parametrize("n", [10**3, 10**5])
def test_a_draw_takes_no_longer_from_a_large_set(n):
    """As a ratio, since machines differ. LOG.md has milliseconds, and of 10^6 clips."""
    def seconds(n):
        sampler = data.Sampler(some_clips(n, random.Random(0)))
        sampler.draw(STAGES[4], 0, random.Random(0), 8)
        taken = []
        for step in range(200):
            began = time.perf_counter()
            sampler.draw(STAGES[4], 0, random.Random(step), 8)
            taken.append(time.perf_counter() - began)
        return np.median(taken)
    assert seconds(n) < 5 * seconds(100)


# ----------------------------------------------------------------------------------------- order and resuming
def test_stages_and_seeds_draw_in_orders_of_their_own(mixed):
    """Of a large set, every stage sees other clips: the stage belongs to the seed."""
    dataset = data.Dataset(mixed)

    def numbers(stage, seed):
        args = Namespace(batch=4, steps=[12] * 4, seed=seed, micro_batch=4)
        world = World(0, 1, torch.device("cpu"))
        return [clips for clips, _ in train.micro_batches(STAGES[4], stage, 0, args, dataset, world)]
    orders = [numbers(stage, seed) for stage in (1, 4) for seed in (0, 1)]
    assert numbers(1, 0) == orders[0] and all(a != b for a, b in itertools.combinations(orders, 2))


def of_steps(dataset, first_step, rank=0, size=1, micro=4, steps=12):
    """Tensors of what train.py's micro-steps get from first_step on, sample by sample: [step][sample]."""
    args = Namespace(batch=4, steps=[steps] * 4, seed=3, micro_batch=micro)
    world, found = World(rank, size, torch.device("cpu")), []
    for _, step in train.micro_batches(STAGES[4], 4, first_step, args, dataset, world):
        found.append([])
        for (x0, text, refs, vit), own in step:
            for i, generator in enumerate(own):
                tensors = [x0[i], text[i][text[i].any(1)], *(p[view][i] for p in refs for view in p)]
                tensors += [features[i] for features in vit if features is not None]
                # what is drawn next is the step's noise
                found[-1].append([*tensors, torch.rand((), generator=generator)])
    return found


def assert_same(a, b):
    for step, other in zip(a, b, strict=True):
        for tensors, others in zip(step, other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(tensors, others, strict=True))


@pytest.mark.parametrize("first", [1, 5, 11, 12])
def test_resuming_goes_on_with_the_same_batches(first, mixed):
    whole = of_steps(data.Dataset(mixed), 0)
    assert len(whole) == 12
    assert_same(of_steps(data.Dataset(mixed), first), whole[first:])
    dataset = data.Dataset(mixed)  # and a stage after others
    of_steps(dataset, 0)
    assert_same(of_steps(dataset, first), whole[first:])


@pytest.mark.parametrize("size, micro", [(1, 1), (1, 2), (2, 2), (2, 1), (4, 1)])
def test_any_split_of_the_batch_has_the_same_samples(size, micro, mixed):
    whole = of_steps(data.Dataset(mixed), 0)
    ranks = [of_steps(data.Dataset(mixed), 0, rank, size, micro) for rank in range(size)]
    assert_same([list(itertools.chain(*step)) for step in zip(*ranks, strict=True)], whole)


def test_a_sample_is_the_same_in_any_batch_and_text_dropout_takes_the_caption_alone(mixed):
    dataset, views = data.Dataset(mixed), (("front", "back"),)
    numbers = [5, 2, 7]
    x0, text, refs, vit = batch(dataset, views, numbers, 1, 2, 3)
    alone = batch(dataset, views, [2], 2)
    for whole, one in ((x0, alone[0]), (text, alone[1]), (refs[0]["back"], alone[2][0]["back"]),
                       (vit[0], alone[3][0])):
        assert torch.equal(whole[1:2], one)
    nothing = batch(data.Dataset(mixed, text_dropout=1), views, numbers, 1, 2, 3)
    assert torch.equal(nothing[1], dataset.empty.float().expand(3, -1, -1)) and nothing[1].shape != text.shape
    assert torch.equal(nothing[0], x0) and torch.equal(nothing[2][0]["front"], refs[0]["front"])
    assert torch.equal(nothing[3][0], vit[0])
    often = batch(data.Dataset(mixed, text_dropout=0.3), views, [1] * 500, *range(500))[1]
    assert 0.22 < float((often[:, 1] == 0).all(-1).float().mean()) < 0.38


def test_training_drops_some_captions_unless_told_otherwise(mixed):
    """Guidance subtracts what the network does without a caption, so it must have trained without one: for
    most samples that would cost what captions teach."""
    assert 0.05 <= data.Dataset(mixed).text_dropout <= 0.2


def test_a_set_without_a_vit_has_no_features(tmp_path):
    dataset = make(tmp_path, sample(1, ("front",), ("front",)), encoders=Plain(vit=False))
    _, _, refs, vit = batch(dataset, (("front",), ("front",)), [0], 1)
    assert vit == [None, None] and len(refs) == 2


# -------------------------------------------------------------------------------------------- damaged samples
def harm(path, damage):
    stored = path.read_bytes()
    path.unlink()
    if damage == "flipped bit":
        path.write_bytes(stored[:-5] + bytes([stored[-5] ^ 4]) + stored[-4:])
    if damage == "truncated":
        path.write_bytes(stored[:-9])
    if damage == "empty":
        path.touch()
    if damage == "folder":
        path.mkdir()
    if damage == "other tensors":
        safetensors.torch.save_file({"latents": torch.zeros(1)}, path)


DAMAGES = ("flipped bit", "truncated", "empty", "missing", "folder", "other tensors")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_sample_is_replaced_by_the_next_and_named_once(damage, tmp_path, capsys):
    """The next one that has the views and the shape; of all processes the same, whatever they have read."""
    samples = [sample(0, ("front",)), sample(1, ("front", "left")), sample(2, ("front",)),
               sample(3, ("front", "left"), size=(16, 32)), sample(4, ("front", "left"))]
    make(tmp_path, *samples)
    paths = [path_of(tmp_path, n) for n in (1, 4)]
    harm(paths[0], damage)
    capsys.readouterr()
    dataset, views = data.Dataset(tmp_path), (("front", "left"),)
    for _ in range(3):
        assert numbers_of(batch(dataset, views, [1, 4], 0, 1)[0]) == [4, 4]
    assert numbers_of(batch(dataset, (("front",),), [1], 0)[0]) == [2]
    said = capsys.readouterr()
    lines = (said.out + said.err).strip().splitlines()
    assert len(lines) == 1 and paths[0].stem in lines[0] and "clips/1.mp4" in lines[0]
    assert "is damaged" in lines[0]
    harm(paths[1], damage)
    assert numbers_of(batch(data.Dataset(tmp_path), (("front",),), [4], 0)[0]) == [0]
    with pytest.raises(UserError, match="no whole sample is left for views") as error:
        batch(data.Dataset(tmp_path), views, [1], 0)
    assert one_line(error)
    # and encoding again mends it, where the file is gone
    for path in paths:
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    assert numbers_of(batch(make(tmp_path, *samples), views, [1, 4], 0, 1)[0]) == [1, 4]


def test_a_bit_that_flips_in_any_tensor_is_seen_wherever_it_is_read(tmp_path):
    dataset = make(tmp_path, sample(1, ("front", "left"), ("right",)))
    path, views = path_of(tmp_path, 1), (("front", "left"), ("right",))
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in range(start, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1:])
        dataset.broken.clear()
        with pytest.raises(UserError, match="no whole sample"):
            batch(dataset, views, [0], 0)


def test_all_ranks_replace_a_damaged_sample_alike(tmp_path):
    make(tmp_path, *(sample(n, ("front",)) for n in range(8)))
    for n in (1, 5, 6):
        harm(path_of(tmp_path, n), "truncated")
    rng, orders = random.Random(0), [[*range(8)] for _ in range(6)]
    for order in orders:  # each rank meets them in an order of its own
        rng.shuffle(order)
        x0 = batch(data.Dataset(tmp_path), (("front",),), order, *range(8))[0]
        assert numbers_of(x0) == [{1: 2, 5: 7, 6: 7}.get(n, n) for n in order]


# --------------------------------------------------------------------------------------------------- prefetch
def test_prefetched_items_are_the_same_and_one_ahead():
    made = []

    def items():
        for n in range(20):
            made.append((n, threading.get_ident()))
            yield n

    for n in prefetch(items()):
        end = time.monotonic() + 5
        while len(made) < min(n + 2, 20):
            assert time.monotonic() < end
        assert len(made) <= n + 3
    assert [n for n, _ in made] == list(range(20))
    assert threading.get_ident() not in {thread for _, thread in made}
    assert list(prefetch(iter([]))) == [] and list(prefetch(iter([None, 0]))) == [None, 0]


@pytest.mark.parametrize("error", [UserError("no whole sample is left"), KeyError("x"), KeyboardInterrupt()])
def test_what_goes_wrong_in_the_thread_comes_through(error):
    def items():
        yield 1
        yield 2
        raise error

    got, found = [], prefetch(items())
    with pytest.raises(type(error), match=str(error) or None):
        got += [next(found), next(found)]
        next(found)
    assert got == [1, 2]


def test_what_stops_early_leaves_no_thread():
    before = threading.active_count()
    for n in prefetch(iter(range(1000))):
        if n == 3:
            break
    items = prefetch(iter(range(1000)))
    next(items)
    items.close()
    end = time.monotonic() + 5
    while threading.active_count() > before:
        assert time.monotonic() < end


# ----------------------------------------------------------------------------------- networks that do not fit
@pytest.mark.parametrize("config, says", [
    (dict(in_dim=16), "in_dim 3, the network has 16"),
    (dict(text_dim=96), "text_dim 3, the network has 96"),
    (dict(vit_levels=1), "vit_levels 2, the network has 1"),
    (dict(in_dim=16, vit_dim=8), "in_dim 3, the network has 16; vit_dim 3, the network has 8"),
])
def test_a_network_that_does_not_fit_is_named(config, says, tmp_path):
    dataset = make(tmp_path, sample(1, ("front",)))
    fits = dict(in_dim=3, text_dim=3, vit_dim=3, vit_levels=2)
    dataset.check(Namespace(**fits))
    dataset.check(Namespace(**fits | dict(vit_dim=0, vit_levels=0)))  # without MFI no features are needed
    with pytest.raises(UserError, match=f"is encoded with {says}: encode with other networks") as error:
        dataset.check(Namespace(**fits | config))
    assert one_line(error)


def test_a_network_with_mfi_needs_a_set_with_a_vit(tmp_path):
    dataset = make(tmp_path, sample(1, ("front",)), encoders=Plain(vit=False))
    dataset.check(Namespace(in_dim=3, text_dim=3, vit_dim=0, vit_levels=0))
    with pytest.raises(UserError, match="vit_levels 0, the network has 2; vit_dim 0, the network has 3"):
        dataset.check(Namespace(in_dim=3, text_dim=3, vit_dim=3, vit_levels=2))


def test_the_names_that_are_checked_are_those_of_a_network(mixed):
    with pytest.raises(UserError, match="in_dim 3, .* text_dim 3, .* vit_dim 3, "):
        data.Dataset(mixed).check(CONFIGS["1.3b"])


# ----------------------------------------------------------------------------------------------- command line
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The toy world as files, with a manifest."""
    folder = tmp_path_factory.mktemp("world")
    toy.write_samples(folder, 48, 9, 8)
    return folder


def test_a_manifest_is_encoded_with_wans_networks(world, wan, tmp_path, capsys):
    """9 frames at 8 a second are 17 or 18 at 16; the pictures of two people are twice as wide."""
    lines = (world / "manifest.jsonl").read_text().splitlines()
    (world / "bad.mp4").write_text("x")
    entries = [json.loads(lines[0]) | {"video": "bad.mp4"}, *map(json.loads, lines)]
    (world / "manifest.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    try:
        data.main(["encode", "--data", str(world), "--wan", str(wan / "2.1"), "--out", str(tmp_path / "set"),
                   "--size", "48x48", "48x96", "--frames", "5", "9", "81"])
    finally:
        (world / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    said = capsys.readouterr()
    assert f"{tmp_path}/set: 4 clips encoded, 1 left out (failed.jsonl has" in said.out
    assert "bad.mp4 is left out: damaged or no video" in said.err
    dataset = data.Dataset(tmp_path / "set")
    assert [dataset.entry(n)["shape"] for n in range(4)] == [[16, 3, 6, 6]] * 2 + [[16, 3, 6, 12]] * 2
    assert dataset.ids == {"ann", "ben", "cho", "dan"} and dataset.entry(3)["people"] == ["cho", "dan"]
    assert dataset.settings["size"] == [[48, 48], [48, 96]] and dataset.settings["frames"] == [5, 9, 81]
    dataset.check(Namespace(in_dim=16, **{name: WAN_SMALL[name] for name in ("text_dim", "vit_dim",
                                                                            "vit_levels")}))
    views, numbers, bucket = dataset.sampler.draw(STAGES[4], 0, random.Random(0), 2)
    assert dataset.batch(views, numbers, bucket, generators(0, 1), "cpu")[0].shape[:3] == (2, 16, 3)
    failed, = read_lines(tmp_path / "set/failed.jsonl")
    assert failed["source"] == "bad.mp4" and failed["error"].startswith("damaged or no video")


@pytest.mark.parametrize("arguments, says", [
    ("", "the following arguments are required"),
    ("encode --data world", "required: --wan"),
    ("encode --data world --wan wan --size 48x50", "--size 48x50: expected multiples of 16"),
    ("encode --data world --wan wan --size 48x48 0x16", "--size 0x16: expected multiples of 16"),
    ("encode --data world --wan wan --size 48*48", "expected HEIGHTxWIDTH"),
    ("encode --data world --wan wan --frames 16", r"--frames 16: expected 4n\+1"),
    ("encode --data world --wan wan --fps 0", "--fps: got '0'"),
    ("encode --data world --wan wan --mask 1", "--mask: got '1'"),
    ("encode --data world --wan wan --mask-variants 0", "--mask-variants: got '0', expected 1 to 100"),
    ("encode --data world --wan none", "^none/google/umt5-xxl/spiece.model: no such file$"),
    ("encode --data none --wan wan", "manifest.jsonl: no such file"),
    ("encode --data world --wan wan --out file", "cannot write to file"),
    ("encode --data world --wan wan --tile 99", "^VAE tile 99: expected a multiple of 8 pixels, 32 or more$"),
    ("show --data none", "manifest.jsonl: no such file"),
    ("show --data world --index 4", "--index 4: the set has 4 clips"),
    ("show --data world --index -1", "--index: got '-1'"),
    ("show --data world --out world", "ends in .png"),
    ("show --data world --out world/manifest.jsonl", "ends in .png"),
    ("show --data world --out world/new.png", "new.png lies in world, among the set's own files"),
    ("show --data world --out world/ann_front.png", "lies in world, among the set's own files"),
    ("list --data world", "invalid choice: 'list'"),
])
def test_bad_arguments_are_one_line(arguments, says, world, wan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(world, "world")
    os.symlink(wan / "2.1", "wan")
    (tmp_path / "file").touch()
    before = content(world)
    with pytest.raises(UserError, match=says) as error:
        data.main(arguments.split())
    assert one_line(error) and content(world) == before


def test_what_changes_the_latents_is_of_the_settings(world, wan, tmp_path):
    """Tiles and precision, too; how many processes there are, and where weights wait, is not."""
    common = ["encode", "--data", str(world), "--wan", str(wan / "2.1"), "--size", "48x48", "--frames", "5",
              "--out", str(tmp_path / "set"), "--precision"]
    data.main([*common, "fp32", "--tile", "32"])
    data.main([*common, "fp32", "--tile", "32", "--offload"])
    for flags, says in ((["fp32"], "tile 32 there, None here"),
                        (["bf16", "--tile", "32"], "precision torch.float32 there, torch.bfloat16 here")):
        with pytest.raises(UserError, match=says):
            data.main([*common, *flags])


def test_more_processes_than_gpus_encode_on_those_there_are(world, wan, tmp_path, monkeypatch):
    """A process without a GPU leaves, and the others share all clips."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    asked = []
    monkeypatch.setattr("videos.encode.WanEncoders", lambda wan, device, *rest: asked.append(device))
    for rank in range(4):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 4), ("LOCAL_WORLD_SIZE", 4)):
            monkeypatch.setenv(name, str(value))
        with pytest.raises((AttributeError, SystemExit)):
            data.main(["encode", "--data", str(world), "--wan", str(wan / "2.1"), "--size", "48x48"])
    assert asked == [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_where_nothing_can_be_encoded_it_fails(world, wan, tmp_path, capsys):
    line = json.loads((world / "manifest.jsonl").read_text().splitlines()[0])
    (tmp_path / "manifest.jsonl").write_text(json.dumps(line))
    for name in ("clip1.mp4", *(view["image"] for view in line["identities"][0]["views"].values())):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match="no clip is encoded, 1 left out .failed.jsonl") as error:
        data.main(["encode", "--data", str(tmp_path), "--wan", str(wan / "2.1"), "--size", "48x48"])
    assert one_line(error) and "clip1.mp4 is left out: " in capsys.readouterr().err


def test_torchrun_spreads_the_clips(world, wan, tmp_path, monkeypatch):
    common = ["encode", "--data", str(world), "--wan", str(wan / "2.1"), "--size", "48x48", "--frames", "5",
              "--mask", "0.5", "--mask-variants", "2", "--out"]
    data.main([*common, str(tmp_path / "one")])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads() + 1))  # no torchrun: threads stay
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        data.main([*common, str(tmp_path / "two")])
        assert len(read_lines(tmp_path / "two/index.jsonl")) == 4 * rank  # once all are done
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_the_script_exits_with_that_line(wan, tmp_path):
    line = run(ROOT / "data.py", "encode", "--data", "none", "--wan", wan / "2.1", cwd=tmp_path, fails=True)
    assert line.startswith("data.py: none/manifest.jsonl: no such file")


def test_real_data_knows_no_toy():
    """Nothing of the toy's is in these files; data.py is the door to both."""
    for name in ("manifest", "pictures", "importers"):
        assert "videos.toy" not in (ROOT / f"videos/{name}.py").read_text()
