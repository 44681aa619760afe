import hashlib
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from conftest import ROOT, call, run
from PIL import Image
from helpers import FULL_DISK, fork, hang, kill, names, wait_for

import data
from model import CONFIGS
from rope import VIEWS
from support.script import UserError, read_lines
from videos import pictures, toy
from videos.manifest import read_manifest
from videos.pictures import from_bytes, read_picture, to_bytes, to_image


RED = torch.tensor([1.0, 0.0, 1.0])  # a patch colour nothing else has


def person(**changes):
    """One identity with everything the patches could be mistaken for made grey."""
    one = {k: v.clone() for k, v in toy.draw_identities(1, 3).items()}
    for name in ("skin", "hair", "eyes", "lips", "patch_left", "patch_right", "patch_back"):
        one[name] = torch.full((1, 3), 0.5)
    return one | {k: torch.as_tensor(v)[None] for k, v in changes.items()}


def magenta(identity, yaw, size=64):
    """Number of pixels with the patch colour at a yaw."""
    pose = {"yaw": torch.tensor([float(yaw)]), **{k: torch.zeros(1) for k in ("pitch", "roll", "mouth", "y")},
            "scale": torch.tensor([0.6]), "light": torch.tensor([[0.0, 0.4, 1.0]]),
            "light_colour": torch.ones(1, 3), "shirt": torch.full((1, 3), 0.5)}
    rgb, _, _ = toy.render_heads(identity, pose, size)
    return int((rgb[0, 0] - rgb[0, 1] > 0.1).sum())


@pytest.mark.parametrize("patch", toy.PATCHES)
def test_a_patch_shows_in_its_own_view_only(patch):
    one = person(**{f"patch_{patch}": RED})
    seen = {view: magenta(one, toy.VIEW_YAW[view]) for view in VIEWS}
    assert seen[patch] > 40
    assert seen["front"] == 0
    opposite = {"left": "right", "right": "left"}.get(patch)
    assert opposite is None or seen[opposite] == 0


def test_colours_have_the_names_that_people_give_them():
    named = {"red": (1, 0.1, 0), "dim red": (0.6, 0, 0.05), "dark blue": (0, 0, 0.3), "green": (0, 0.8, 0),
             "yellow": (0.9, 0.9, 0), "cyan": (0, 0.9, 0.9), "magenta": (0.9, 0, 0.9), "rose": (1, 0, 0.5)}
    assert {toy.colour_name(rgb): rgb for rgb in named.values()} == named


def test_looks_in_words_tell_what_is_drawn():
    """Two people with the same words differ less in colour than two with other words, part by part."""
    people = toy.draw_identities(200, 4)
    words = [toy.describe(people, i) for i in range(200)]
    assert sum("a beard" in w for w in words) == int(people["beard"].sum())
    for part, name in (("skin", "skin"), ("hair", "hair"), ("eyes", "eyes"), ("left patch", "patch_left")):
        said = [re.search(rf"([\w ]+) {part}(?:,|$)|{part} ([\w ]+)", w) for w in words]
        said = [found[1] or found[2] for found in said]
        alike = torch.tensor([[a == b for b in said] for a in said])
        apart = torch.cdist(people[name], people[name])
        assert len(set(said)) >= 5 and apart[alike].mean() < 0.6 * apart[~alike].mean()


def test_a_share_of_the_captions_describes_and_clips_stay_alike():
    plain, described = (toy.training_samples(32, 2, (6, 6), "cross", toy.TRAIN_SEED, share)
                        for share in (0, 0.5))
    for n in (0, 11):
        assert torch.equal(plain[n].read_video(), described[n].read_video())
    pairs = [(a.caption, b.caption) for a, b in zip(plain, described, strict=True)]
    told = [b for a, b in pairs if a != b]
    assert 0 < len(told) < len(pairs) and all(" skin, " in words for words in told)
    assert all(re.sub(r"with \w+ skin.*? in a", "in a", b) == a for a, b in pairs)
    for people, some in ((1, pairs[:6]), (2, pairs[6:])):
        identities = toy.training_identities(6, people, toy.TRAIN_SEED)
        told = [(i, b) for i, (a, b) in enumerate(some) if a != b]
        assert told and all(re.findall(r"with (\w+ skin.*?) in a", words) == [
            toy.describe(identities, i + 6 * k) for k in range(people)] for i, words in told)


def test_the_left_patch_is_invisible_from_the_whole_right():
    one = person(patch_left=RED)
    assert [magenta(one, yaw) for yaw in range(0, 100, 10)] == [0] * 10
    assert all(magenta(one, yaw) > 20 for yaw in (-60, -90, -120))


def test_yaw_turns_to_the_named_side():
    """In the left view the nose points to the picture's left edge; pitch > 0 looks up."""
    one = person()
    one["nose"] = torch.tensor([0.4])
    pose = {k: torch.zeros(3) for k in ("roll", "mouth", "y")}
    pose |= {"yaw": torch.tensor([-85.0, 85, 0]), "pitch": torch.tensor([0.0, 0, 30]),
             "scale": torch.full((3,), 0.6), "light": torch.ones(3, 3), "light_colour": torch.ones(3, 3),
             "shirt": torch.zeros(3, 3)}
    one["eyes"] = RED[None]
    three = toy.pick(one, torch.zeros(3, dtype=torch.int64))
    rgb, _, head = toy.render_heads(three, pose, 64)
    column = torch.arange(64.0)
    middle = (head * column).sum((1, 2, 3)) / head.sum((1, 2, 3))
    assert middle[0] < 31.5 < middle[1]
    eyes = rgb[2, 0] - rgb[2, 1] > 0.1
    level = toy.render_heads(
        toy.pick(one, 0),
        {k: v[:1] for k, v in (pose | {"yaw": torch.zeros(3), "pitch": torch.zeros(3)}).items()},
        64,
    )[0]
    assert (
        eyes.nonzero()[:, 0].float().mean() < (level[0, 0] - level[0, 1] > 0.1).nonzero()[:, 0].float().mean()
    )


def test_identities_differ_and_training_never_sees_the_held_out():
    held = toy.draw_identities(52, toy.BENCHMARK_SEED)
    trained = toy.draw_identities(500, toy.TRAIN_SEED + 1)
    again = toy.draw_identities(52, toy.BENCHMARK_SEED)
    assert all(torch.equal(held[k], again[k]) for k in held)
    looks = torch.cat([held[f"patch_{p}"] for p in toy.PATCHES] + [held["skin"], held["hair"]], 1)
    others = torch.cat([trained[f"patch_{p}"] for p in toy.PATCHES] + [trained["skin"], trained["hair"]], 1)
    assert torch.cdist(looks, others).min() > 0.02
    assert (torch.cdist(looks, looks) + 10 * torch.eye(52)).min() > 0.05


@pytest.mark.parametrize("people", [1, 2])
def test_captions_say_every_parameter_and_nothing_else(people):
    """Two clips have the same caption exactly if they are the same; every name stands in it word for word."""
    clips = toy.draw_clips(300, people, "captions")
    assert len({toy.caption(c) for c in clips}) == len(set(clips))
    for clip in clips[:50]:
        words = toy.caption(clip)
        assert all(
            name in words for name in (*clip.motions, *clip.mouths, clip.zoom, clip.light, clip.background)
        )
        assert all(f"a {shirt} shirt" in words for shirt in clip.shirts)
        assert words.index(clip.motions[0]) <= words.rindex(clip.motions[-1])


@pytest.mark.parametrize(
    "change",
    [{"zoom": "a slow zoom in"}, {"light": "warm light"}, {"background": "a sunset"}, {"motions": ("nods",)},
     {"mouths": ("the mouth open",)}, {"shirts": ("blue",)}],
)
def test_what_the_caption_says_is_what_the_renderer_shows(change):
    one = toy.draw_identities(1, 5)
    base = toy.Clip(("tilts the head",), ("the mouth closed",), ("red",), "a close-up", "soft light",
                    "a grey wall")
    other = replace(base, **change)
    (a, b), _ = toy.render_clips([base, other], [toy.pick(one, [0, 0])], 6, 32)
    assert (a - b).abs().max() > 0.1 and toy.caption(base) != toy.caption(other)


def test_rendering_is_exact_ground_truth_for_anybody():
    """Re-rendering a clip with another identity changes that person's pixels and nothing else."""
    people = toy.draw_identities(4, 6)
    clip = toy.draw_clips(1, 2, "truth")[0]
    (a,), mask = toy.render_clips([clip], [toy.pick(people, 0), toy.pick(people, 1)], 6, 32)
    (again,), _ = toy.render_clips([clip], [toy.pick(people, 0), toy.pick(people, 1)], 6, 32)
    (b,), other = toy.render_clips([clip], [toy.pick(people, 2), toy.pick(people, 1)], 6, 32)
    assert torch.equal(a, again) and a.shape == (3, 6, 32, 64) and mask.shape == (1, 2, 6, 32, 64)
    right = torch.zeros(64, dtype=torch.bool)
    right[34:] = True
    assert torch.equal(a[..., right], b[..., right]) and not torch.equal(a[..., ~right], b[..., ~right])
    assert torch.equal(mask[0, 1][..., right], other[0, 1][..., right])


def test_references_are_cross_pair_or_from_the_clip():
    who = toy.draw_identities(2, 8)
    cross = toy.render_references(who, 1, 32)
    assert cross.shape == (2, 4, 3, 32, 32) and (cross[:, :, :, 0, 0] == 1).all()  # on white
    assert torch.equal(cross, toy.render_references(who, 1, 32))
    assert not torch.equal(cross, toy.render_references(who, 2, 32))
    clip = toy.Clip(("sweeps rightwards",), ("the mouth open",), ("red",), "a close-up", "warm light",
                    "a sunset")
    a, b = (toy.render_references(who, 1, 32, [replace(clip, shirts=(s,))] * 2) for s in ("red", "blue"))
    assert (a - b)[:, :3].abs().amax() > 0.5  # in-pair references wear the clip's shirt


def test_view_distance_wraps_around():
    yaw = torch.tensor([[-180.0, 0.0, 190.0, -85.0]])
    distance = toy.view_distance(yaw)[0]
    assert distance[VIEWS.index("back")].tolist() == [0, 180, 10, 95]
    assert distance[VIEWS.index("left")].tolist()[3] == 0


def test_the_benchmark_is_fixed():
    cases = toy.benchmark_cases()
    assert [len(who) for _, who in cases] == [1] * 60 + [2] * 40
    assert all(set(clip.motions) <= set(toy.SWEEPS) and len(set(who)) == len(who) for clip, who in cases)
    assert cases == toy.benchmark_cases()
    assert len({i for _, who in cases for i in who}) > 40


@pytest.mark.parametrize("motion", toy.IN_PAIR_MOTIONS)
def test_in_pair_motions_show_the_in_pair_views(motion):
    clip = replace(toy.draw_clips(1, 1, 0)[0], motions=(motion,))
    distance = toy.view_distance(toy.clip_pose([clip], 0, 6)["yaw"])[0].amin(dim=1)
    assert all(distance[VIEWS.index(view)] < 25 for view in toy.IN_PAIR_VIEWS)
    assert distance[VIEWS.index("back")] > 60


# ------------------------------------------------------------------------------------------------ every pixel
def fingerprint(picture):
    """Of the bytes that a file would hold: the floats' last bits differ from CPU to CPU."""
    return hashlib.sha256(to_bytes(picture).numpy().tobytes()).hexdigest()[:12]


@pytest.mark.parametrize(
    "people, words, videos, heads, cross_pair, in_pair",
    [(1, "d664d59b0eab", "03ff1f5212bc", "0b240c0d53a5", "7675fb8d7edf", "d842e4b3f854"),
     (2, "0618a4b3d5a6", "5662241809ee", "39226877b84f", "5b78620bcbb2", "57b070783bae")],
)
def test_the_world_stays_as_it_was(people, words, videos, heads, cross_pair, in_pair):
    """Captions and pixels as commit 0814555 made them. Another world would make every number in README.md and
    every checkpoint stale."""
    clips, identities = toy.draw_clips(12, people, "pixels"), toy.draw_identities(12 * people, 5)
    captions = "\n".join(map(toy.caption, clips))
    assert hashlib.sha256(captions.encode()).hexdigest()[:12] == words
    cast = [toy.pick(identities, range(12 * k, 12 * k + 12)) for k in range(people)]
    video, masks = toy.render_clips(clips, cast, 6, 32)
    assert (fingerprint(video), fingerprint(masks)) == (videos, heads)
    assert fingerprint(toy.render_references(identities, 3, 32)) == cross_pair
    assert fingerprint(toy.render_references(cast[-1], 3, 32, clips, people - 1, 6)) == in_pair


def test_a_pose_of_ones_own_replaces_the_clips():
    base = toy.draw_clips(1, 1, "pose")[0]
    away, nods = (replace(base, motions=(motion,)) for motion in ("turns away", "nods"))
    one = [toy.draw_identities(1, 1)]
    pose = {angle: toy.clip_pose([away], 0, 4)[angle] for angle in ("yaw", "pitch", "roll")}
    posed, _ = toy.render_clips([nods], one, 4, 32, {0: pose})
    assert torch.equal(posed, toy.render_clips([away], one, 4, 32)[0])
    assert not torch.equal(posed, toy.render_clips([nods], one, 4, 32)[0])


def test_nobody_is_the_background():
    clips = toy.draw_clips(3, 2, "empty")
    video, masks = toy.render_clips(clips, [None, None], 2, 32)
    walls = toy.background([clip.background for clip in clips], (32, 64)) * 2 - 1
    assert not masks.any() and torch.equal(video, walls[:, :, None].expand(-1, -1, 2, -1, -1))


def test_held_out_jobs_show_benchmark_cases():
    for views in (None, ("left", "back"), ()):
        jobs = toy.held_out(views, 3, 32)
        shown = toy.SHOWN if views is None else [toy.SHOWN[0], *toy.SHOWN[2:]]  # no case twice
        for job, (case, default) in zip(jobs, shown, strict=True):
            clip, indices = toy.benchmark_cases()[case]
            assert job.prompt == toy.caption(clip) and job.size == (32, 32 * len(indices))
            assert torch.equal(job.truth, toy.benchmark_truth(case, 3, 32))
            for person, index in zip(job.references, indices, strict=True):
                assert tuple(person) == (default if views is None else views)
                for view, picture in person.items():
                    assert torch.equal(picture, toy.benchmark_references(32)[index, VIEWS.index(view)])


# -------------------------------------------------------------------------------------------- frozen networks
@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    toy.train_tokenizer(folder / toy.ToyEncoders.TOKENIZER)
    return toy.ToyEncoders(folder, 32)


def test_latents_are_pixels_and_come_back_as_such(encoders):
    video = from_bytes(torch.randint(256, (2, 3, 5, 32, 64), dtype=torch.uint8))
    latent = encoders.encode(video)
    assert latent.shape[1:] == encoders.latent_shape(5, (32, 64))
    assert torch.equal(encoders.decode(latent), video) and encoders.decode(3 * latent).abs().max() <= 1


def test_the_frozen_networks_stay_as_they_were(encoders):
    """As commit 3db879b made them: every checkpoint was trained on what these see."""
    tokens = encoders.text(["a close-up of one person in a red shirt nods with the mouth closed"])
    features = encoders.features(toy.benchmark_references(32)[:2, 0])
    found = torch.stack([tokens[0, 5, :4], tokens[0, 16, :4], features[1, 0, 3, :4], features[1, 1, 3, :4]])
    were = torch.tensor([[-0.1047, 1.3020, -1.2301, -0.3002], [-0.4067, 0.6951, 1.6271, -1.6642],
                         [1.3225, -0.4802, 3.3102, 1.8405], [1.1702, -0.7805, 3.3034, 0.5060]])
    torch.testing.assert_close(found, were, atol=1e-3, rtol=0)


def test_the_frozen_networks_tell_captions_and_pictures_apart(encoders):
    clips = toy.draw_clips(20, 1, 0) + toy.draw_clips(20, 2, 0)
    tokens = encoders.text([toy.caption(clip) for clip in clips])
    assert tokens.shape[::2] == (40, toy.TEXT_DIM) and tokens.shape[1] <= 512
    assert (torch.cdist(tokens.flatten(1), tokens.flatten(1)) + torch.eye(40)).min() > 0.01
    features = encoders.features(toy.benchmark_references(32)[:20, 0])
    assert features.shape[::3] == (20, toy.VIT_DIM) and features.shape[1] == len(toy.VIT_LEVELS)
    assert (torch.cdist(features.flatten(1), features.flatten(1)) + torch.eye(20)).min() > 0.01


# ---------------------------------------------------------------------------------------------- training sets
TWO_CLIPS = (32, 2, (2, 2))  # size, frames, clips


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("root")


def samples_of(pairs, clips=(2, 2)):
    return toy.training_samples(32, 2, clips, pairs, toy.TRAIN_SEED, 0.0)


@pytest.mark.parametrize("pairs", ["cross", "in"])
def test_training_samples_are_the_clips_that_their_captions_say(pairs):
    views, motions = VIEWS, (*toy.MOTIONS, *toy.SWEEPS)
    if pairs == "in":
        views, motions = toy.IN_PAIR_VIEWS, toy.IN_PAIR_MOTIONS
    samples = samples_of(pairs)
    assert len({sample.name for sample in samples}) == 4 and len({i for s in samples for i in s.ids}) == 6
    for people, some in ((1, samples[:2]), (2, samples[2:])):
        clips = toy.draw_clips(2, people, toy.TRAIN_SEED, motions)
        assert [sample.caption for sample in some] == [toy.caption(clip) for clip in clips]
        identities = toy.draw_identities(2 * people, toy.TRAIN_SEED + people)
        cast = [toy.pick(identities, range(2 * k, 2 * k + 2)) for k in range(people)]
        videos = to_bytes(toy.render_clips(clips, cast, 2, 32)[0])
        for sample, video in zip(some, videos):
            assert torch.equal(sample.read_video(), from_bytes(video))
            assert sample.cross == [dict.fromkeys(views, pairs == "cross")] * people
        for k, identities in enumerate(cast):  # each person's own, with a light and a pose of their own
            of_clip = (clips, k, 2) if pairs == "in" else ()
            refs = toy.render_references(identities, 10**6 * people + 10**5 * k, 32, *of_clip)
            for sample, shown in zip(some, from_bytes(to_bytes(refs))):
                assert tuple(sample.people[k]) == views
                for view, read in sample.people[k].items():
                    assert torch.equal(read(), shown[VIEWS.index(view)])


def test_clips_past_a_chunk_are_their_own(monkeypatch):
    first = [samples_of("cross", (5, 0))[n] for n in range(5)]
    monkeypatch.setattr(toy, "CHUNK", 2)
    for one, other in zip(first, samples_of("cross", (5, 0))):
        assert torch.equal(one.read_video(), other.read_video())


def test_a_sweep_is_drawn_twice_as_often_where_references_are_cross_pair():
    said = [sample.caption for sample in samples_of("cross", (4000, 0))]
    share = sum(any(motion in words for motion in toy.SWEEPS) for words in said) / len(said)
    assert 0.77 < share < 0.83  # 8 of 10


def render(root, log):
    """training_set, with a line in `log` for everything that is computed."""
    for name in ("encode", "train_tokenizer"):
        function = getattr(toy, name)

        def logging(*arguments, function=function, name=name):
            with open(log, "a") as file:
                file.write(f"{name}\n")
            time.sleep(0.2)  # so that the others come meanwhile
            return function(*arguments)

        setattr(toy, name, logging)
    toy.training_set(root, *TWO_CLIPS)


def test_processes_that_share_a_cache_wait_for_one_another(tmp_path):
    processes = [fork(render, tmp_path / "root", tmp_path / "log") for _ in range(3)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text().split() == ["train_tokenizer", "encode"]
    assert not list(tmp_path.rglob(".unfinished-*"))


def test_a_set_is_made_once_and_other_masks_pairs_and_code_are_other_sets(root, monkeypatch):
    first, masked = toy.training_set(root, *TWO_CLIPS), toy.training_set(root, *TWO_CLIPS, mask=0.5)
    assert len({first, masked}) == 2 and data.Dataset(masked).settings["variants"] == 4
    assert data.Dataset(first).settings["variants"] == 1 and len(read_lines(first / "index.jsonl")) == 4
    monkeypatch.setattr(toy, "encode", None)
    assert toy.training_set(root, *TWO_CLIPS) == first
    assert toy.training_set(root, *TWO_CLIPS, mask=0.5) == masked
    for other in (dict(mask=0.25), dict(pairs="in"), dict(seed=5), dict(described=0.5)):
        with pytest.raises(TypeError):
            toy.training_set(root, *TWO_CLIPS, **other)
    monkeypatch.setattr(toy, "source_hash", lambda *modules: "newcode")
    with pytest.raises(TypeError):
        toy.training_set(root, *TWO_CLIPS)


def encode_some(root, clips):
    """training_set, but it never comes to an end of the clip after these."""
    encode, left = toy.ToyEncoders.encode, [None] * clips

    def some(self, video):
        if video.shape[2] > 1:  # a clip, no reference
            left.pop() if left else hang()
        return encode(self, video)

    toy.ToyEncoders.encode = some
    toy.training_set(root, 32, 2, (60, 40))


def test_a_killed_encoding_goes_on(tmp_path):
    """And the next one leaves nothing behind of it."""
    process = fork(encode_some, tmp_path, 70)
    wait_for(lambda: len(list(tmp_path.glob("toy-*/??/[!.]*"))) == 71)  # with the empty caption
    assert process.is_alive()
    kill(process)
    assert not list(tmp_path.glob("toy-*/index.jsonl"))
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("toy-*/*/*") if path.stem != "empty"}
    result = toy.training_set(tmp_path, 32, 2, (60, 40))
    assert len(read_lines(result / "index.jsonl")) == 100
    assert len(made) == 70 and all(path.stat().st_mtime_ns == when for path, when in made.items())
    there = names(result)
    assert len(there) == len(list(result.iterdir())) - 1 + 101  # folders and lists, a file a sample, "empty"
    assert not [name for name in there if "/." in name or name.startswith(".")]


@pytest.mark.parametrize("pairs", ["cross", "in"])
def test_a_training_set_is_one_that_the_presets_train_on(pairs, root, encoders):
    dataset = data.Dataset(toy.training_set(root, *TWO_CLIPS, pairs))
    dataset.check(CONFIGS["toy"])
    assert dataset.sampler.views == set(VIEWS if pairs == "cross" else toy.IN_PAIR_VIEWS)
    assert len(dataset.ids) == 6
    for n, sample in enumerate(samples_of(pairs)):
        views = (("left", "front"),) * len(sample.people)
        bucket = dataset.sampler.having(views)
        x0, _, refs, vit = dataset.batch(views, [n], bucket, [torch.Generator().manual_seed(n)], "cpu")
        assert torch.equal(encoders.decode(x0)[0], sample.read_video())  # pixels come back as they were
        for k, person in enumerate(sample.people):
            assert torch.equal(encoders.decode(refs[k]["left"][:, :, None])[0, :, 0], person["left"]())
            assert torch.equal(vit[k], encoders.features(person["front"]()[None]).half().float())


def test_a_caption_reads_the_same_in_any_batch(encoders):
    """Which captions are encoded together depends on what an earlier run had done."""
    captions = [toy.caption(clip) for clip in toy.draw_clips(20, 1, 0) + toy.draw_clips(20, 2, 0)]
    together = encoders.text(captions)
    for caption, tokens in zip(captions, together, strict=True):
        alone = encoders.text([caption])[0]
        assert torch.equal(tokens[: len(alone)].half(), alone.half()) and not tokens[len(alone) :].any()


# -------------------------------------------------------------------------------------------------------- CLI
PICTURES = [f"{name}_{view}.png" for name in toy.NAMES for view in VIEWS]
SAMPLES = sorted([*PICTURES, "captions.txt", "manifest.jsonl", *(f"clip{n}.mp4" for n in (1, 2, 3, 4))])


def test_samples_are_files_to_look_at(tmp_path):
    said = call("data.py", "toy", "--out", "x", "--size", 32, "--frames", 3, "--fps", 5, cwd=tmp_path)
    assert names(tmp_path / "x") == SAMPLES
    captions = (tmp_path / "x" / "captions.txt").read_text().splitlines()
    assert [line.partition(": ")[2] for line in said.splitlines()] == captions
    for n, caption in enumerate(captions, 1):
        with av.open(str(tmp_path / "x" / f"clip{n}.mp4")) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert container.streams.video[0].average_rate == 5
        assert len(frames) == 3 and frames[0].shape == (256, 512 if "two people" in caption else 256, 3)
    four = toy.pick(toy.benchmark_people(), range(4))
    references = toy.render_references(four, toy.BENCHMARK_SEED, 32).flatten(0, 1)
    for name, picture in zip(PICTURES, references, strict=True):
        read = read_picture(tmp_path / "x" / name, (32, 32))
        assert torch.equal(to_bytes(read), to_bytes(picture))


def test_samples_come_with_a_manifest(tmp_path, capsys):
    """As real videos: the caption's people in its order, on whom every reference is a cross-pair."""
    toy.main(["--out", str(tmp_path), "--size", "32", "--frames", "3"])
    said = capsys.readouterr().out.splitlines()
    lines = read_manifest(tmp_path)
    assert not capsys.readouterr().out
    assert [line["caption"] for line in lines] == (tmp_path / "captions.txt").read_text().splitlines()
    for n, (line, words) in enumerate(zip(lines, said, strict=True), 1):
        people = [person["id"] for person in line["identities"]]
        assert line["video"] == f"clip{n}.mp4" and f"clip{n}.mp4, {' and '.join(people)}: " in words
        assert ("two people" in line["caption"]) == (len(people) == 2)
        for person in line["identities"]:
            assert person["views"] == {v: {"image": f"{person['id']}_{v}.png", "cross": True} for v in VIEWS}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """What toy.py writes, whatever the size."""
    folder = tmp_path_factory.mktemp("samples")
    toy.write_samples(folder, 16, 1, 8)
    return (folder / "manifest.jsonl").read_bytes()


@pytest.mark.parametrize("foreign", ['{"video": "a.mp4"}\n', "", "cut", "folder", "dangling link"])
def test_a_manifest_of_somebody_else_is_never_replaced(foreign, manifest, tmp_path):
    path = tmp_path / "manifest.jsonl"
    if foreign == "folder":
        path.mkdir()
    elif foreign == "dangling link":
        path.symlink_to("none")
    else:
        path.write_bytes(manifest[:-9] if foreign == "cut" else foreign.encode())
    with pytest.raises(UserError, match="manifest.jsonl is not of the toy: choose another --out"):
        toy.main(["--out", str(tmp_path), "--size", "32", "--frames", "3"])
    assert names(tmp_path) == ["manifest.jsonl"]


@pytest.mark.parametrize("name", ["clip1.mp4", "captions.txt", "ben_left.png"])
def test_a_file_of_somebody_else_is_never_replaced(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} is not of the toy: choose another --out"):
        toy.main(["--out", str(tmp_path), "--size", "32", "--frames", "3"])
    assert names(tmp_path) == [name] and (tmp_path / name).read_text() == "mine"


def test_the_toys_own_manifest_may_be_written_again(manifest, tmp_path):
    for size in ("16", "32"):
        toy.main(["--out", str(tmp_path), "--size", size, "--frames", "1"])
    assert (tmp_path / "manifest.jsonl").read_bytes() == manifest


WRITTEN = ["manifest.jsonl", "captions.txt", *PICTURES, *(f"clip{n}.mp4" for n in (1, 2, 3, 4))]  # in order


@pytest.mark.parametrize("broken", ["captions.txt", "ann_front.png", "ben_left.png", "dan_back.png",
                                    "clip1.mp4", "clip4.mp4"])
def test_samples_never_overwrite_half_a_file(broken, tmp_path, monkeypatch):
    """The disk is full in the middle of a file: what was there stays, what came before is whole."""
    whole, folder = tmp_path / "whole", tmp_path / "out"
    for place in (whole, folder):
        place.mkdir()
        toy.write_samples(place, 32, 3, 8)
    for name in WRITTEN[1:]:
        (folder / name).write_bytes(b"old")
    write_text, save, write_video, broke = Path.write_text, Image.Image.save, toy.write_video, []

    def cut(path):
        """Half of the broken file is there. A temporary name ends with its own."""
        if path.name.endswith(broken):
            os.truncate(path, path.stat().st_size // 2)
            broke.append(path.name)
            raise FULL_DISK

    def text(path, content):
        write_text(path, content)
        cut(path)

    def picture(image, path):
        save(image, path)
        cut(path)

    def video(path, frames, fps):
        """The broken one is so long that much of it is in the file before the last frame is too much."""
        def frame(*arguments):
            if not left:
                broke.append(path.name)
                raise FULL_DISK
            return left.pop()(*arguments)

        left = [to_image] * (119 if path.name == broken else 3)
        with monkeypatch.context() as patch:
            patch.setattr(pictures, "to_image", frame)
            write_video(path, frames.repeat(1, 40, 1, 1) if path.name == broken else frames, fps)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "write_text", text)
        patch.setattr(Image.Image, "save", picture)
        patch.setattr(toy, "write_video", video)
        toy.write_samples(folder, 32, 3, 8)
    assert len(broke) == 1 and names(folder) == SAMPLES
    for name in WRITTEN[: WRITTEN.index(broken)]:
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
        if name.endswith("png"):
            with Image.open(folder / name) as image:
                image.load()
        if name.endswith("mp4"):
            with av.open(str(folder / name)) as container:
                assert len(list(container.decode(video=0))) == 3
    for name in WRITTEN[WRITTEN.index(broken):]:
        assert (folder / name).read_bytes() == b"old"


@pytest.mark.parametrize(
    "arguments, says",
    [("", "the following arguments are required: --out"),
     ("--out x --size 33", "--size 33: expected an even number"),
     ("--out x --size 8", "--size: got '8', expected 16 to 1024 pixels"),
     ("--out x --size 1e3", "--size: got '1e3'"), ("--out x --size nan", "--size: got 'nan'"),
     ("--out x --frames 0", "--frames: got '0', expected 1 to 1000 frames"),
     ("--out x --frames 100000000000000000000", "--frames: got"),
     ("--out x --fps 0", "--fps: got '0', expected 1 to 240 frames a second"),
     ("--out x --fps 2147483648", "--fps: got"), ("--out file", "cannot write to file"),
     ("--out file/below", "cannot write to file/below"), ("--out x --siz 32", "unrecognized arguments"),
     ("--out x toy", "unrecognized arguments: toy")],
)
def test_bad_input_gets_one_line(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        toy.main(arguments.split())
    assert re.search(says, str(error.value)) and "\n" not in str(error.value)
    assert names(tmp_path) == ["file"]


def test_the_script_exits_with_that_line(tmp_path):
    line = run(ROOT / "data.py", "toy", "--size", 33, "--out", "x", cwd=tmp_path, fails=True)
    assert line.startswith("data.py: --size 33")
    (tmp_path / "x" / "clip1.mp4").mkdir(parents=True)
    line = run(ROOT / "data.py", "toy", "--size", 16, "--frames", 1, "--out", "x", cwd=tmp_path, fails=True)
    assert line.startswith("data.py: ") and "clip1.mp4" in line
