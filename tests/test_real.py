"""The real benchmark on the toy world, whose truth a detector knows; on damaged and hostile files; with
kills. Its cases and its comparison."""

import http.server
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import threading
import time
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, WAN_SMALL
from helpers import free_port
from test_curate import Truth
from test_faces import save_aesthetic

import eval as evaluation
from measure import cases as real_cases, real
from measure.real import METRICS
from measure.report import by_case, mean, read_results
from model import DiTConfig, HarmoView
from networks.faces import ALIGNED, Aesthetic, Detection
from sample import SAMPLE_RECIPES
from support import processes
from support.checkpoints import save_checkpoint
from support.script import UserError, read_lines
from videos import curate
from videos.pictures import from_bytes, open_video, read_frames, to_image, write_video

FRAMES = 17
VIEW_YAWS = {"front": 4.0, "left": -62.0, "right": 62.0, "back": 175.0}
NEEDS_IDENTITY = ("mvrc", "mvrc_seen", "public", "best_view", "given", "not_given", "swaps", "margin",
                  "crossed", "steadiness")


class Known(Truth):
    """The toy's detector: an embedding is the identity and nothing else, and a picture that is unlike all
    that was rendered shows nobody."""

    strange = 3.0  # distance of thumbnails

    def detect(self, images):
        distance = torch.cdist(self.thumbnail(images), torch.cat(self.frames)).amin(1)
        return [[] if d > self.strange else found for d, found in zip(distance, super().detect(images))]

    def embed(self, crops):
        return F.one_hot(super().embed(crops).argmax(1), 512).float() if self.embeds else None


class World:
    """A folder with cases.jsonl, refs and videos of the toy's people."""

    def __init__(self, folder):
        self.folder, self.truth, self.lines = folder, Known(), []
        for name in ("refs", "videos", "faces"):
            (folder / name).mkdir(parents=True)

    def picture(self, who, view, light="soft light"):
        """A reference of one person -> its path."""
        path = f"refs/{who}_{view}_{light.split()[0]}.png"
        if not (self.folder / path).exists():
            yaw = {0: VIEW_YAWS[view]}
            video = self.truth.shoot([who], ["nods"], 1, yaw, light=light, wall="a pink wall")
            to_image(video[:, 0], 256).save(self.folder / path)
        return path

    def case(self, name, video, refs, views=("front", "left"), **more):
        """Add a case of these people; video: [3, F, H, W]"""
        write_video(self.folder / "videos" / f"{name}.mp4", video)
        eval_refs = [[self.picture(who, view, "warm light") for view in ("front", "right")] for who in refs]
        refs = [{view: self.picture(who, view) for view in views} for who in refs]
        self.lines.append({"id": name, "prompt": f"a person, {name}", "refs": refs, "eval_refs": eval_refs,
                           "seed": 0, **more})

    def write(self, lines=None):
        """-> the file of these cases"""
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines or self.lines]
        (self.folder / "cases.jsonl").write_text("\n".join(text), errors="surrogatepass")
        return self.folder / "cases.jsonl"

    def argv(self, out, *flags, lines=None):
        flags = ["--faces", self.folder / "faces", "--out", self.folder / out, *flags]
        return [*map(str, ["real", "--cases", self.write(lines), *flags])]

    def run(self, out="out", *flags, lines=None):
        """`python eval.py real` in this process -> {case: its result}"""
        argv = self.argv(out, "--videos", self.folder / "videos", "--fps", "16", *flags, lines=lines)
        evaluation.main(argv, detector=self.truth)
        return results_of(self.folder / out)


def results_of(out):
    return {line["case"]: line for line in read_results(out / "cases_measured.jsonl")}


def score(result, metric):
    """Mean of a metric over the people of a result."""
    return mean(by_case([result], METRICS[metric]).values())


@pytest.fixture
def made(tmp_path):
    return World(tmp_path / "set")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Videos whose score is known, one kind a case, and the results of measuring them."""
    made = World(tmp_path_factory.mktemp("benchmark") / "set")
    shoot, sweep, around = made.truth.shoot, "sweeps rightwards", "looks around"
    turned = shoot([0], [sweep], FRAMES)  # from -90 to 90 degrees, in steps of 11.25
    made.case("truth", turned, [0], asked_yaw=[[-80, 80]])
    made.case("still-head", shoot([0], ["nods"], FRAMES, {0: 4.0}, wall="a blue wall"), [0], asked_yaw=[80])
    left = shoot([6], ["nods"], FRAMES, {0: -62.0}, wall="a sunset")
    for name, asked in (("as-asked", -60), ("wrong-side", 60), ("one-side", [-62, 124])):
        made.case(name, left, [6], asked_yaw=[asked])
    pair = shoot([1, 2], [sweep, around], FRAMES, wall="a green wall")
    made.case("pair", pair, [1, 2])
    made.case("swapped", pair, [2, 1])
    made.case("anywhere", pair, [2, 1], places=False)
    trio = shoot([1, 2, 3], ["nods"] * 3, 3, wall="a green wall")
    for name, refs in (("trio", [1, 2, 3]), ("trio-two", [2, 1, 3]), ("trio-all", [2, 3, 1])):
        made.case(name, trio, refs)
    made.picture(3, "front")
    still = shoot([3], ["nods"], 1, {0: VIEW_YAWS["front"]}, wall="a pink wall").expand(-1, FRAMES, -1, -1)
    made.case("copy", still, [3])
    made.case("half", shoot([4], ["sweeps leftwards"], FRAMES, seen={0: 9}, wall="a sunset"), [4])
    noise = torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made.case("nobody", noise.expand(-1, FRAMES, -1, -1), [5], asked_yaw=[90])
    return made, made.run()


# -------------------------------------------------------------------------------------------- the toy's truth
KNOWN = {  # case: {metric: its value, None where it cannot be measured}
    "truth": dict.fromkeys(("mvrc", "mvrc_seen", "face_rate", "best_view", "public", "given", "not_given",
                            "coverage", "steadiness"), 1) | {"swaps": None, "margin": None},
    "still-head": {"coverage": 4 / 80}, "as-asked": {"coverage": 1}, "wrong-side": {"coverage": 0},
    "one-side": {"coverage": 0.5},
    **{name: {"swaps": swaps, "mvrc": 1, "margin": 1, "crossed": 0, "public": None}
       for name, swaps in (("pair", 0), ("swapped", 1), ("anywhere", None))},
    **{name: {"swaps": swaps} for name, swaps in (("trio", 0), ("trio-two", 2 / 3), ("trio-all", 1))},
    "copy": {"copied": 1, "coverage": None},  # nothing was asked
    "half": {"face_rate": 9 / 17, "mvrc": 9 / 17, "mvrc_seen": 1},
    "nobody": dict.fromkeys(METRICS) | dict.fromkeys(("mvrc", "face_rate", "coverage", "public"), 0),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_video_whose_score_is_known_has_it(name, world):
    for metric, value in KNOWN[name].items():
        found = score(world[1][name], metric)
        assert found == (None if value is None else pytest.approx(value, abs=1e-3)), metric


def test_a_copy_does_not_move_and_a_turning_head_is_none(world):
    assert score(world[1]["truth"], "copied") < 0.2
    assert score(world[1]["copy"], "amplitude") < 0.01 and score(world[1]["copy"], "roughness") < 0.01


def test_nothing_is_nan(world):
    def refuse(word):
        raise AssertionError(word)
    for line in (world[0].folder / "out" / "cases_measured.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["people"]


def test_the_aesthetic_score_is_there_with_its_weights(made, capsys):
    made.case("case", made.truth.shoot([0], ["nods"], 3), [0])
    assert score(made.run()["case"], "aesthetic") is None
    assert "no aesthetic score" in capsys.readouterr().err
    save_aesthetic(made.folder / "faces")
    found = score(made.run()["case"], "aesthetic")  # the same video, other networks: measured again
    rate, frames = Aesthetic.load(made.folder / "faces"), []
    for picture in read_frames(made.folder / "videos/case.mp4", 16):
        frames.append(rate(from_bytes(torch.from_numpy(picture)).permute(2, 0, 1)))
    assert found == pytest.approx(mean(frames), abs=1e-4) and found != 0
    (file,) = (made.folder / "faces").glob("sac*")
    # another training of the same name and size: measured again too
    torch.save({name: t + 1 for name, t in torch.load(file, weights_only=True).items()}, file)
    assert score(made.run()["case"], "aesthetic") != found


class Fading(Known):
    """Every face of somebody else looks like person 0 by a cosine of 0.3."""

    def embed(self, crops):
        return F.normalize(super().embed(crops) + 0.3145 * F.one_hot(torch.tensor(0), 512), dim=1)


def test_hiding_the_bad_half_lowers_mvrc_and_raises_the_public_rule(made):
    """A video that shows the right person and then another one; and the same with the other's face hidden."""
    made.truth.__class__ = Fading
    right = made.truth.shoot([0], ["looks around"], 9, wall="a sunset")
    wrong = made.truth.shoot([1], ["looks around"], 9, wall="a blue wall")
    empty = made.truth.shoot([1], ["looks around"], 9, seen={0: 0}, wall="a green wall")
    made.case("shown", torch.cat((right, wrong), dim=1), [0])
    made.case("hidden", torch.cat((right, empty), dim=1), [0])
    results = made.run()
    mvrc, public = ([score(results[name], metric) for name in ("shown", "hidden")]
                    for metric in ("mvrc", "public"))
    assert mvrc[0] == pytest.approx(0.65, abs=0.01) and mvrc[1] == pytest.approx(0.5, abs=0.01)
    assert public[0] == pytest.approx(0.65, abs=0.03) and public[1] == 1


def test_without_arcface_nothing_that_needs_identity_is_measured(world, made, capsys):
    made.truth.__dict__ |= world[0].truth.__dict__ | {"embeds": False}
    shutil.copytree(world[0].folder, made.folder, dirs_exist_ok=True)
    made.lines = [line for line in world[0].lines if line["id"] in ("truth", "swapped")]
    results = made.run("blind")
    assert "no identity was measured of 3 of 3 people" in capsys.readouterr().out
    for name in ("truth", "swapped"):
        assert all(score(results[name], metric) is None for metric in NEEDS_IDENTITY)
        assert score(results[name], "face_rate") == 1 and score(results[name], "copied") is not None
    assert score(results["truth"], "coverage") == pytest.approx(1, abs=1e-3)


# ------------------------------------------------------------------------------------------------- the rules
def face(x=0.0, yaw=0.0, pitch=0.0, pixels=torch.zeros(1), embedding=None, width=10.0):
    return real.SeenFace(torch.tensor([x, 0, x + width, width]), yaw, pitch, embedding, pixels)


def scored(k, refs, targets, faces, length):
    case = real_cases.Case("x", refs=refs, asked_yaw=[None] * len(refs))
    return real.score_person(k, case, {}, targets, faces, length)


def test_faces_go_to_those_whom_they_are_most_like_together():
    """Each is like person 0; two of three faces have to be somebody else's."""
    units = torch.eye(3)
    faces = [face(embedding=0.9 * units[0]), face(embedding=0.8 * units[0] + 0.7 * units[1]),
             face(embedding=0.7 * units[0] + 0.1 * units[2])]
    watched = real.Watched([faces, faces[1:2], [], faces[::-1]], [], [], 100)
    found = real.faces_by_person(watched, [[unit] for unit in units], 3)
    assert [list(of_person) for of_person in found] == [[0, 1, 3], [0, 3], [0, 3]]
    assert found[0][0] is faces[0] and found[0][1] is faces[1] and found[1][3] is faces[1]


def test_without_references_people_are_told_apart_by_the_middle_of_their_faces():
    """A large face that begins left of the picture's middle, most of which is right of it."""
    large, small = face(40.0, width=40.0), face(30.0)
    watched = real.Watched([[large], [large, small], [small]], [], [], 100)
    assert real.faces_by_person(watched, None, 2) == [{1: small, 2: small}, {0: large, 1: large}]


def test_of_several_others_the_nearest_one_counts():
    """A case may show four people: with two, the nearest other is the farthest."""
    units = torch.eye(4)
    faces = {0: face(embedding=units[0] * 0.8 + units[1] * 0.5 + units[2] * 0.1),
             1: face(embedding=units[0] * 0.4 + units[3] * 0.6)}
    person = scored(0, [{"front": None}] * 4, [[unit] for unit in units], faces, 3)
    assert person["margin"] == pytest.approx((0.8 + 0.4) / 2 - (0.5 + 0.6) / 2, abs=1e-4)
    assert person["crossed"] == [False, True, None]


def test_the_back_is_near_on_either_side_of_180_degrees():
    """Faces at 172 and -172 degrees are 16 apart: nearest to the back, and copies of each other."""
    pixels = F.normalize(torch.randn(50, generator=torch.Generator().manual_seed(0)), dim=0)
    yaws = (-172.0, 172.0, -125.0, 125.0, -115.0, 115.0, -40.0, 20.0)
    faces = {f: face(yaw=yaw, pixels=pixels) for f, yaw in enumerate(yaws)}
    for view, given in (("back", [1, 1, 1, 1, 0, 0, 0, 0]), ("left", [0, 0, 0, 0, 1, 0, 1, 0])):
        assert scored(0, [{view: None}], None, faces, len(yaws))["seen"] == [bool(value) for value in given]
    for yaw, copy in ((-178.0, True), (-175.0, True), (-173.0, False), (171.0, True), (169.0, False)):
        assert real.is_copy(face(yaw=yaw, pixels=pixels), [face(yaw=178.0, pixels=pixels)]) == copy


def test_similarities_are_means_over_references_and_pictures():
    """Two unlike evaluation references, faces unlike each other, and a picture without one."""
    e = torch.eye(4)
    vectors = {0: 0.8 * e[0] + 0.2 * e[1], 1: 0.4 * e[1] - 0.2 * e[0], 3: 0.6 * e[0] + 0.5 * e[3]}
    faces = {f: face(embedding=vector) for f, vector in vectors.items()}
    result = {"case": "x", "people": [scored(0, [{"front": None}], [[e[0], e[1]]], faces, 5)]}
    expected = {"mvrc": (0.5 + 0.1 + 0.3) / 5, "mvrc_seen": 0.9 / 3, "best_view": (0.8 + 0.4 + 0.6) / 3,
                "face_rate": 0.6, "steadiness": float(vectors[0] @ vectors[1]), "margin": None}
    for name, value in expected.items():
        assert score(result, name) == (None if value is None else pytest.approx(value, abs=1e-4)), name


def test_the_public_rule_takes_32_pictures_the_first_reference_and_nothing_below_zero():
    rng, units = np.random.default_rng(0), torch.eye(3)
    refs = {"front": None, "left": face(embedding=units[0]), "right": face(embedding=units[1])}
    for length in (20, 32, 100):
        faces = [face(embedding=torch.tensor(rng.normal(size=3)).float()) for _ in range(length)]
        half = length // 2  # the others are found with a border only, the last four not at all
        bordered = [[]] * half + [[one] for one in faces[half:-4]] + [[]] * 4
        watched = real.Watched([[one] for one in faces[:half]] + [[]] * (length - half), bordered, [])
        chosen = [round(k * (length - 1) / 31) for k in range(32)]  # a short video's more than once
        values = [max(0.0, faces[f].embedding[0].item()) for f in chosen if f < length - 4]
        assert real.public_rule(watched, refs) == pytest.approx(np.mean(values), abs=1e-4)
    assert real.public_rule(real.Watched([[]], [[]], []), refs) == 0
    assert real.public_rule(watched, {"front": None}) is None


class Crowd:
    """A detector that sees three faces, the smallest first, and knows nobody; it keeps what it was shown."""

    def detect(self, images):
        self.shown = images
        boxes = torch.tensor([[0.0, 0, 20, 20], [30, 0, 70, 40], [80, 0, 110, 30]])
        points = [box[:2] + torch.tensor(ALIGNED) / 112 * (box[2:] - box[:2]) for box in boxes]
        return [[Detection(box, 0.9, five) for box, five in zip(boxes, points)]]

    def embed(self, crops):
        return None

    def pose(self, crops, landmarks=None):
        return torch.zeros(len(crops), 3)


def test_the_largest_faces_count():
    picture = np.random.default_rng(0).integers(0, 255, (120, 120, 3), dtype=np.uint8)
    for most, expected in ((1, [30]), (2, [30, 80]), (4, [30, 80, 0])):
        found = real.largest_faces(picture, Crowd(), most)
        assert [face.box[0].item() for face in found] == expected
    assert found[0].pixels.norm() == pytest.approx(1, abs=1e-4) and abs(found[0].pixels.mean()) < 1e-4


def test_the_border_is_grey_and_a_quarter_of_each_side():
    """As in the public code: a detector misses faces that fill the picture."""
    picture = np.random.default_rng(0).integers(0, 255, (100, 60, 3), dtype=np.uint8)
    bordered = real.with_border(picture)
    assert bordered.shape == (150, 90, 3) and (bordered[25:125, 15:75] == picture).all()
    bordered[25:125, 15:75] = 128
    assert (bordered == 128).all()


def test_amplitude_and_roughness_are_as_said():
    found = real.path_of({f: face(10.0 * (f % 2)) for f in range(10)})  # from side to side, one face side
    assert found["amplitude"] == pytest.approx(0.5) and found["roughness"] == pytest.approx(2)
    assert real.path_of({f: face(3.0 * f) for f in range(5)})["roughness"] == pytest.approx(0, abs=1e-5)
    assert real.path_of({0: face(), 2: face()}) == {"amplitude": 0, "roughness": None}
    assert real.path_of({}) == {"amplitude": None, "roughness": None}
    # a face side is the longer one, of the face that is larger than half of them
    boxes = torch.tensor([[0.0, 0, 10, 20], [30, 0, 40, 20], [0, 0, 60, 30]])
    found = real.path_of({f: face()._replace(box=box) for f, box in enumerate(boxes)})
    centres = np.array([[5, 10], [35, 10], [30, 15]]) / 20
    spread = ((centres - centres.mean(0)) ** 2).sum(1).mean() ** 0.5
    assert found["amplitude"] == pytest.approx(spread, abs=1e-4)
    bend = np.linalg.norm(centres[0] - 2 * centres[1] + centres[2])
    assert found["roughness"] == pytest.approx(bend, abs=1e-4)


def test_a_copy_needs_pose_and_pixels_of_one_and_the_same_reference():
    a, b = F.normalize(torch.randn(2, 50, generator=torch.Generator().manual_seed(0)), dim=1)
    refs = [face(yaw=0.0, pixels=a), face(yaw=60.0, pixels=b)]
    assert real.is_copy(face(yaw=3.0, pitch=4.0, pixels=a), refs)
    assert not real.is_copy(face(yaw=3.0, pixels=b), refs)  # the other one's pixels
    assert not real.is_copy(face(yaw=9.0, pixels=a), refs)
    assert not real.is_copy(face(pixels=F.normalize(a + 0.5 * b, dim=0)), refs)
    assert real.is_copy(face(pixels=a), []) is None
    assert real.is_copy(face(yaw=float("nan"), pixels=a), refs) is None


def test_coverage():
    assert real.coverage([-45.0, -45.0, None], True, -90) == 0.5
    assert real.coverage([-45.0, 10.0, None], True, 90) == pytest.approx(0.95 * 55 / 90 - 0.5, abs=1e-5)
    assert real.coverage([120.0], True, 90) == 1 and real.coverage([None], False, -90) == 0
    assert real.coverage([10.0], True, None) is None and real.coverage([10.0], True, 0) is None
    assert real.coverage([None], True, [-90, 90]) is None  # seen, but no yaw could be read
    assert real.coverage([-30.0] * 9 + [60.0] * 9, True, [-60, 60]) == 0.75
    for pictures, expected in ((1, 0), (2, 0.05), (3, 1)):  # of forty that look the right way
        assert real.coverage([90.0] * pictures + [0.0] * (40 - pictures), True, 90) == expected


# ------------------------------------------------------------------------------------ restarts, damage, text
@pytest.mark.usefixtures("no_gpu")
def test_kills_and_restarts_leave_the_same_report(world):
    made = world[0]
    path = made.folder / "killed" / "cases_measured.jsonl"
    fork, ends = multiprocessing.get_context("fork"), []
    for written in (0, 4):  # so many results are there before the kill
        process = fork.Process(target=made.run, args=("killed",))
        process.start()
        while process.is_alive() and len(read_lines(path)) < written:
            time.sleep(0.01)
        time.sleep(0.1)
        process.kill()
        process.join()
        ends.append(process.exitcode)
    assert -signal.SIGKILL in ends and set(ends) <= {-signal.SIGKILL, 0} and read_lines(path)
    with open(path, "a") as file:
        file.write('{"case": "truth", "rule": "cut off')
    assert made.run("killed") == world[1]
    killed, whole = (made.folder / name / "report.html" for name in ("killed", "out"))
    assert killed.read_bytes() == whole.read_bytes()
    cases = [line["case"] for line in read_results(path)]
    assert sorted(cases) == sorted(set(cases))  # nothing was measured twice


def test_a_restart_measures_only_what_changed(world, monkeypatch):
    made, measured = world[0], []
    shutil.copytree(made.folder / "out", made.folder / "again")

    def again(lines=None):
        measured.clear()
        made.run("again", lines=lines)
        return measured

    def record(case, *rest):
        measured.append(case.id)
        return {"reason": "recorded"}
    monkeypatch.setattr(real, "measure_case", record)
    assert again() == []
    changes = {"pair": {"prompt": "another"}, "truth": {"asked_yaw": [0]}}
    assert again([line | changes.get(line["id"], {}) for line in made.lines]) == ["truth", "pair"]
    videos = made.folder / "videos"
    os.rename(videos / "copy.mp4", videos / "kept")
    shutil.copy(videos / "truth.mp4", videos / "copy.mp4")
    assert again() == ["copy"]
    os.replace(videos / "kept", videos / "copy.mp4")
    picture, other = (made.folder / made.lines[n]["eval_refs"][0][1] for n in (0, 2))
    before = picture.read_bytes()
    picture.write_bytes(other.read_bytes())
    assert again() == ["truth", "still-head"]  # those whose evaluation reference it is
    picture.write_bytes(before)


def test_names_are_found_as_other_systems_write_them(made):
    """case-001.MP4 was not seen, nor references in another Unicode form or with Windows' separators."""
    made.case("case-001", made.truth.shoot([0], ["nods"], 3), [0])
    os.rename(made.folder / "videos/case-001.mp4", made.folder / "videos/case-001.MP4")
    named = made.lines[0]["refs"][0]["front"]
    os.rename(made.folder / named, made.folder / "refs/Jo\u0308rg.PNG")
    changed = json.dumps(made.lines[0]).replace(json.dumps(named), json.dumps("refs\\J\u00f6rg.png"))
    (result,) = made.run(lines=[changed]).values()
    assert "people" in result


@pytest.mark.parametrize("form", ["utf-8-sig", "utf-16"])
def test_cases_are_read_as_an_editor_saves_them(form, made):
    made.case("a", made.truth.shoot([0], ["nods"], 3), [0])
    lines = [json.dumps(made.lines[0] | {"prompt": "женщина"}, ensure_ascii=False)] * 2
    (made.folder / "cases.jsonl").write_bytes("\r\n".join(lines).encode(form))
    first, second = real_cases.read_cases(made.folder / "cases.jsonl")
    assert first.prompt == "женщина" and not first.fault and second.fault == "a second case a"
    (made.folder / "cases.jsonl").write_bytes(lines[0].encode("cp1251"))
    (case,) = real_cases.read_cases(made.folder / "cases.jsonl")
    assert case.fault == "no prompt, or none that is text in UTF-8"


WRONG = [{"id": "../x"}, {"id": None}, {"prompt": " "}, {"prompt": 7}, {"refs": []}, {"refs": [{}]},
         {"refs": [{"top": "refs/a.png"}]}, {"refs": [{"front": "/etc/passwd"}]}, {"refs": 3},
         {"refs": [{"front": "../outside.png"}]}, {"refs": [{"front": "refs/none.png"}]},
         {"refs": [["refs/a.png"]]}, {"refs": [{"front": 7}]}, {"eval_refs": [[]]},
         {"eval_refs": [["refs/\0"]]}, {"seed": -1}, {"asked_yaw": [float("nan")]}, {"asked_yaw": [181]},
         {"asked_yaw": [-180.5]}, {"asked_yaw": [[]]}, {"asked_yaw": [[45, None]]},
         {"asked_yaw": [[-45, 190]]}, {"asked_yaw": [True]}, {"asked_yaw": ["90"]}, {"asked_yaw": [1, 2]},
         {"places": 1}, {"id": "good"}, {"prompt": "\ud800"}]


def test_damaged_videos_references_and_lines_have_a_reason_each(made, capsys):
    rng = random.Random(0)
    for name, who in (("good", 0), ("bad", 1)):
        made.case(name, made.truth.shoot([who], ["nods"], 3), [who])
    good, bad = made.lines
    (made.folder / bad["eval_refs"][0][0]).write_bytes(b"no picture")
    whole = (made.folder / "videos/good.mp4").read_bytes()
    shutil.copy(made.folder / good["refs"][0]["left"], made.folder.parent / "outside.png")
    for k in range(40):
        data = bytearray(whole)
        for _ in range(rng.choice((0, 3, 200))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        end = rng.randrange(len(data) * 9 // 10)  # the last bytes are metadata, which nobody misses
        (made.folder / f"videos/video-{k}.mp4").write_bytes(data[:end])
        made.lines.append(good | {"id": f"video-{k}"})
    wrong = [*WRONG, {"eval_refs": [[good["eval_refs"][0][0]] * 11]}]
    wrong = [json.dumps(good | {"id": f"line-{k}"} | change) for k, change in enumerate(wrong)]
    wrong += ["[" * 50_000, "7", "null", '"x"', "{}", '{"id": "x"', "\x00", json.dumps(good)[:-9]]
    results = made.run(lines=[*made.lines, *wrong])
    assert "people" in results.pop("good") and "not a readable picture" in results["bad"]["reason"]
    reasons = {result["reason"] for result in results.values()}
    assert len(results) == 41 + len(wrong) and len(reasons) > 20
    assert "'../outside.png' leaves the folder" in reasons
    assert all(reason.strip() and "Traceback" not in reason for reason in reasons)
    assert f"1 of {len(results) + 1} videos measured" in capsys.readouterr().out
    page = (made.folder / "out/report.html").read_text()
    assert page.count("<h3>") == len(results) + 1 and page.count("not measured:") == len(results)


def test_no_text_becomes_markup(tmp_path):
    evil = '"><script>alert(1)</script><img src=x onerror=alert(1)>&'
    out = evil.replace("/", "")
    made = World(tmp_path / out)
    made.case("good", made.truth.shoot([0], ["nods"], 3), [0], people=[evil])
    made.lines[0]["prompt"] = f"</h3>{evil}"
    wrong = ({"id": evil}, {"id": "b", "refs": [{"front": evil}]}, {"id": "missing"})
    made.run(out, lines=[*made.lines, *(made.lines[0] | change for change in wrong)])
    shutil.copytree(made.folder / out, made.folder / "second")
    compare(made, out, "second")
    for page in (made.folder / out / "report.html", made.folder / "both/compare.html"):
        page = page.read_text()
        assert "<script" not in page and "<img src=x" not in page and "&lt;script&gt;" in page
        assert "http" not in page


# ------------------------------------------------------------------------------------------- several systems
def compare(made, *systems):
    folders = [str(made.folder / name) for name in systems]
    evaluation.main(["compare", *folders, "--out", str(made.folder / "both")])


def test_systems_are_compared_case_by_case(made, capsys):
    def shoot(k, wall):
        return made.truth.shoot([k], ["looks around"], 5, wall=wall)
    for k in range(4):
        made.case(f"case-{k}", shoot(k, "a sunset"), [k], asked_yaw=[60])
    made.run("ours")
    for k in range(2):  # theirs shows somebody else in two of the cases, and one video is missing
        write_video(made.folder / f"videos/case-{k}.mp4", shoot(k + 8, "a dark room"))
    os.remove(made.folder / "videos/case-3.mp4")
    made.run("theirs")
    capsys.readouterr()
    compare(made, "ours", "theirs")
    printed = capsys.readouterr().out
    page = (made.folder / "both" / "compare.html").read_text()
    assert "3 cases that all systems measured" in printed and "results: ours 4, theirs 3" in printed
    (mvrc,) = (line for line in printed.splitlines() if line.startswith("1 person, 3 cases: mvrc "))
    assert "1.00 [1.00, 1.00]" in mvrc and "0.33 [" in mvrc and "-0.67 [" in mvrc
    assert "*" not in mvrc  # three cases decide nothing
    assert "theirs - ours" in page and page.count("<svg") == 2
    for text in (printed, page):
        assert "* the interval of the difference, paired by case, is without 0" in text
    made.run("ours", "--fps", "8", lines=made.lines[:1])
    made.run("blurry", "--fps", "4", lines=made.lines[:1])
    with pytest.raises(UserError, match="no case was measured in all of them by the same rules"):
        compare(made, "ours", "blurry")
    made.run("ours", "--fps", "4", lines=made.lines[:1])
    compare(made, "ours", "blurry")
    for _ in range(2):
        made.run("ours", "--fps", "8", lines=made.lines[:1])  # it is known, and what counts again
        ours = read_results(made.folder / "ours/cases_measured.jsonl")
    assert len(ours) == 4 + 1 + 1 + 1  # not again
    with pytest.raises(UserError, match="no case was measured in all of them by the same rules"):
        compare(made, "ours", "blurry")


def test_answers_of_two_judges_are_not_compared(tmp_path, capsys):
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        line = {"case": "a", "rule": "r", "video": name, "people": [{"natural": 4}], "judge": name}
        real.Results(tmp_path / name / "cases_measured.jsonl", ("case",)).add(line)
    systems = real.read_systems([tmp_path / "ours", tmp_path / "theirs"])
    assert "natural is left out, judged by ours and theirs" in capsys.readouterr().out
    assert all(found["a", "r"]["people"] == [{"natural": None}] for found in systems.values())


def test_a_difference_of_six_cases_or_more_is_decided():
    def results(value):
        person = {"alike": [value], "face": [True]} | dict.fromkeys(("best", "crossed", "next"))
        person |= {"yaw": [0.0], "seen": [True], "copied": None}
        return [{"case": f"{n}", "people": [person]} for n in range(6)]
    groups = {name: {"1 person": results(value)} for name, value in (("ours", 0.5), ("theirs", 0.75))}
    lines = {line[0]: line for line in real.compare_table(groups)}
    assert lines["1 person: mvrc"][1:] == ["0.50 [0.50, 0.50]", "0.75 [0.75, 0.75]", "+0.25 [0.25, 0.25] *"]
    assert lines["1 person: face_rate %"][3] == "+0 [-50, 50]"


# ------------------------------------------------------------------------------------------------- sampling
def as_rank(rank, size, port, argv, detector):
    processes.CORES = 1  # as many threads as one process has, so that the bits are the same
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
                   "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    evaluation.main(argv, detector=detector)


@pytest.mark.usefixtures("no_gpu")
def test_videos_are_sampled_first_over_ranks_and_not_again(made):
    """The toy that comes with the code, one step, alone and as two processes."""
    for k in range(3):
        made.case(f"case-{k}", made.truth.shoot([k], ["nods"], 2), [k])
    made.lines.append(made.lines[0] | {"id": "long", "prompt": "a person " * 500})
    made.truth.strange = 100

    def sample(out, steps="1"):
        return made.argv(out, "--ckpt", ROOT / "assets/toy", "--steps", steps, "--precision", "fp32")
    evaluation.main(sample("alone"), detector=made.truth)
    results, folder = results_of(made.folder / "alone"), made.folder / "alone/videos"
    assert [len(result["people"]) for result in results.values()] == [1] * 4  # the long prompt is cut
    videos = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(videos) == ["case-0.mp4", "case-1.mp4", "case-2.mp4", "long.mp4"]
    with open_video(folder / "case-0.mp4") as (_, stream):
        assert stream.average_rate == SAMPLE_RECIPES["toy"]["fps"]  # whatever --fps it is looked at with
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    evaluation.main(sample("alone"), detector=made.truth)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    evaluation.main(sample("alone", "2"), detector=made.truth)
    assert all(path.stat().st_mtime_ns > before[path] for path in before)
    port, fork = str(free_port()), multiprocessing.get_context("fork")
    ranks = [fork.Process(target=as_rank, args=(rank, 2, port, sample("ranks"), made.truth))
             for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    assert {path.name: path.read_bytes() for path in (made.folder / "ranks/videos").iterdir()} == videos
    assert results_of(made.folder / "ranks") == results


@pytest.mark.parametrize("theirs", [b"no video", None])
def test_a_video_of_the_users_is_refused_before_sampling_and_stays(theirs, made):
    for k in range(3):
        made.case(f"case-{k}", made.truth.shoot([k], ["nods"], 2), [k])
    own = made.folder / "out/videos/case-1.mp4"
    own.parent.mkdir(parents=True)
    write_video(own, torch.zeros(3, 2, 32, 32), 4, '{"title": "holiday"}')
    own.write_bytes(theirs or own.read_bytes())
    before = own.read_bytes()
    with pytest.raises(UserError, match="case-1.mp4 was not made by this program and would be replaced"):
        evaluation.main(made.argv("out", "--ckpt", ROOT / "assets/toy", "--steps", 1), detector=made.truth)
    assert own.read_bytes() == before and [path.name for path in own.parent.iterdir()] == ["case-1.mp4"]


def test_videos_of_wan_are_sampled_as_they_are_of_the_toy(wan, made, tmp_path):
    """A small random network with references, as train.py leaves it beside its Wan folder."""
    for name, who in (("one", [0]), ("two", [1, 2]), ("three", [1, 2, 3])):
        made.case(name, made.truth.shoot(who, ["nods"] * len(who), 2), who)
    made.truth.strange = 1000
    config = DiTConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=2, **WAN_SMALL)
    shutil.copytree(wan / "2.1", tmp_path / "wan")
    meta = {"config": asdict(config), "wan": str(tmp_path / "wan")}
    save_checkpoint(tmp_path / "ckpt", {"ema": HarmoView(config).state_dict()}, meta)
    flags = ["--steps", 1, "--frames", 5, "--size", "32x48", "--precision", "fp32", "--fps", 16, "--ckpt"]
    evaluation.main(made.argv("out", *flags, tmp_path / "ckpt"), detector=made.truth)
    results = results_of(made.folder / "out")
    assert [len(results[name]["people"]) for name in ("one", "two")] == [1, 2]
    assert len(results["one"]["people"][0]["face"]) == 5
    assert results["three"]["reason"].endswith("this checkpoint holds at most 2")
    with pytest.raises(UserError, match="plain Wan, which has never seen references"):
        evaluation.main(made.argv("out", *flags, wan / "2.1"), detector=made.truth)
    video, vae = made.folder / "out/videos/one.mp4", tmp_path / "wan" / "Wan2.1_VAE.pth"
    before, tensors = video.read_bytes(), torch.load(vae, weights_only=True)
    torch.save({name: -t if name == "decoder.head.2.bias" else t for name, t in tensors.items()}, vae)
    evaluation.main(made.argv("out", *flags, tmp_path / "ckpt"), detector=made.truth)
    assert video.read_bytes() != before  # another VAE of the same name and size: sampled again


class Endpoint(http.server.BaseHTTPRequestHandler):
    answers, asked = [], []  # what to say, an int being a status; "4" when none is left

    def do_POST(self):
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        say = self.answers.pop(0) if self.answers else "4"
        self.send_response(say if isinstance(say, int) else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": say}}]}).encode())

    def log_message(self, *_):
        pass


def test_a_judge_is_asked_three_times_and_again_where_it_failed(made, monkeypatch):
    monkeypatch.setattr(curate.time, "sleep", lambda seconds: None)
    for k in range(2):
        made.case(f"case-{k}", made.truth.shoot([k], ["nods"], 20), [k])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = ("--judge-url", f"http://127.0.0.1:{server.server_port}/v1")
    assert score(made.run()["case-0"], "natural") is None and not Endpoint.asked
    Endpoint.answers[:] = [500, "no idea", "Rating: 5/5", "3", "4.0 of 5", 500, "10", "?"]
    results = made.run("out", *url)
    assert score(results["case-0"], "natural") == 4 and score(results["case-0"], "mvrc") == 1
    assert score(results["case-1"], "natural") is None and results["case-1"]["judge_failed"]
    content = Endpoint.asked[0]["messages"][0]["content"]
    assert len(content) == 17 and content[1]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert len(Endpoint.asked) == 8
    results = made.run("out", *url)
    assert [score(result, "natural") for result in results.values()] == [4, 4] and len(Endpoint.asked) == 11
    made.run("out", *url)
    assert len(Endpoint.asked) == 11
    server.shutdown()
    server.server_close()
    judge = real.Judge("http://nowhere", "x")
    judge.in_a_row = 10
    result = judge(results["case-0"], made.folder / "videos/case-0.mp4", 8)
    assert result["judge"] is None and result["judge_failed"] == "not asked after ten failures in a row"


# ------------------------------------------------------------------------------------------------ make-cases
def curated(folder, people=60, pictures=3):
    """A curated set: one clip a person, with so many pictures of each view over two lines."""
    (folder / "refs").mkdir(parents=True)
    (folder / "clip.mp4").write_bytes(b"a clip")
    lines = []
    for k, n in itertools.product(range(people), range(pictures)):
        views = {}
        for view in ("front", "left"):
            views[view] = {"image": f"refs/{k}_{view}_{n}.png"}
            (folder / views[view]["image"]).write_bytes(f"{k} {view} {n}".encode())
        lines.append(json.dumps({"video": "clip.mp4", "caption": "", "sha256": f"{k} {n}",
                                 "identities": [{"id": f"person_{k:04d}", "views": views}]}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder


def make(data, out, *flags):
    evaluation.main(["make-cases", "--data", str(data), "--out", str(out), *map(str, flags)])
    return read_lines(out)


def people_of(lines):
    return {int(who.removeprefix("person_")) for line in lines for who in line["people"]}


def test_made_cases_are_the_papers_kind_and_can_be_read(tmp_path):
    data = curated(tmp_path / "data")
    lines = make(data, tmp_path / "set" / "cases.jsonl")
    assert len(lines) == 100 and [len(line["refs"]) for line in lines] == [1] * 60 + [2] * 40
    assert len(people_of(lines)) == 52
    assert all(len(set(line["people"])) == len(line["people"]) for line in lines)
    assert len({tuple(line["people"]) for line in lines[60:]}) == 40
    asked = []
    for line in lines:
        clauses = line["prompt"].split(", the one on the right ")
        for words, yaw in zip(clauses, line["asked_yaw"], strict=True):
            turn = re.search("to the (left|right) of the picture|to the other", words)
            expected = {"left": {-1}, "right": {1}, None: {-1, 1}}[turn[1]] if turn else {0}
            assert {np.sign(side) for side in (yaw if isinstance(yaw, list) else [yaw or 0])} == expected
            asked.append(yaw)
    assert len(asked) == 140 and sum(yaw is not None for yaw in asked) > 70 and None in asked
    found = real_cases.read_cases(tmp_path / "set" / "cases.jsonl")
    assert not any(case.fault for case in found)
    for case in found:
        for views, files in zip(case.refs, case.eval_refs):
            assert list(views) == ["front", "left"] and len(files) == 4
            texts = {path.read_text() for path in [*views.values(), *files]}
            assert len(texts) == 6 and len({text.split()[0] for text in texts}) == 1  # one person, none twice


def test_made_cases_are_equal_bits_whatever_the_order_of_the_manifest_and_are_never_replaced(tmp_path):
    first, made = curated(tmp_path / "a", 10), []
    shutil.copytree(first, tmp_path / "b")
    lines = (first / "manifest.jsonl").read_text().splitlines()
    random.Random(1).shuffle(lines)
    (tmp_path / "b/manifest.jsonl").write_text("\n".join(lines))
    for name in "ab":
        out = tmp_path / name / "out"
        make(tmp_path / name, out / "cases.jsonl", "--n", 10)
        made.append({path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()})
        with pytest.raises(UserError, match="cases.jsonl exists and would be replaced: choose another --out"):
            make(tmp_path / name, out / "cases.jsonl", "--n", 10)
    assert made[0] == made[1]


def encoded(folder, *lines):
    """An encoded set's index, of lines with these people."""
    folder.mkdir(parents=True)
    lines = [{"name": f"{n}", "source": f"{n}.mp4", "sha256": f"{n} 0", "views": [{"front": True}]} | people
             for n, people in enumerate(lines)]
    (folder / "index.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_whom_an_encoded_set_beside_the_data_shows_is_left_out(tmp_path, capsys):
    """Training reads DATA/encoded. A line that does not say whom it shows is counted; its sha256 is that of
    another file than a manifest's."""
    data = curated(tmp_path / "data", 12)
    everybody = people_of(make(data, tmp_path / "none.jsonl", "--n", 20))
    said = capsys.readouterr().out
    assert f"{data}/encoded: no training set to look at, so nobody is left out" in said
    assert len(everybody) == 10
    encoded(data / "encoded", {"people": ["person_0001"]}, {"people": ["person_0004", None]}, {},
            {"people": ["person_0007", "stranger"]})
    assert people_of(make(data, tmp_path / "cases.jsonl", "--n", 17)) == set(range(12)) - {1, 4, 7}
    said = capsys.readouterr().out
    assert "2 clips of training do not say whom they show" in said and "names 3 others" in said
    assert "no training set" not in said


def test_training_is_manifests_by_id_and_by_clip_and_encoded_sets_as_files_or_folders(tmp_path, capsys):
    data = curated(tmp_path / "data", 12)
    encoded(data / "encoded", {"people": [f"person_{k:04d}" for k in range(12)]})  # not what was trained on
    first = encoded(tmp_path / "a", {"people": ["person_0001"]})
    second = encoded(tmp_path / "b", {"people": ["person_0002", "person_0003"]})
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text('{"sha256": "5 0", "identities": [{"id": "person_0004"}, {}]}\n')
    training = first, second / "index.jsonl", manifest
    lines = make(data, tmp_path / "cases.jsonl", "--n", 13, "--training", *training)
    assert people_of(lines) == {0, 6, 7, 8, 9, 10, 11}
    assert "1 clips of training do not say" in capsys.readouterr().out
    message = "12 identities, of which training names 5 and 7 others .* --n 100 needs 52; --n 13 would do"
    with pytest.raises(UserError, match=message):
        make(data, tmp_path / "more.jsonl", "--training", *training)
    with pytest.raises(UserError, match="/data/index.jsonl: no such file; .* a manifest.jsonl or an encoded"):
        make(data, tmp_path / "more.jsonl", "--training", data)
    with pytest.raises(UserError, match="index.jsonl is one of the inputs and would be overwritten"):
        make(data, first / "index.jsonl", "--training", first)


@pytest.mark.parametrize("n, people", [(1, 1), (2, 2), (3, 2), (10, 5), (100, 52)])
def test_a_smaller_set_keeps_the_proportions(tmp_path, n, people):
    lines = make(curated(tmp_path / "data", 52, 1), tmp_path / "cases.jsonl", "--n", n)
    assert [len(line["people"]) for line in lines].count(1) == round(0.6 * n)
    assert len(people_of(lines)) == people
    assert lines[0]["eval_refs"] == [list(lines[0]["refs"][0].values())]  # there are no other pictures


# ------------------------------------------------------------------------------------------------ error lines
ARGUMENTS = [
    ("real --cases c.jsonl --faces v", "one of the arguments --videos --ckpt is required"),
    ("real --cases c.jsonl --videos v --ckpt x --faces v", "not allowed with argument"),
    ("real --cases c.jsonl --videos none --faces v", "--videos none: no such folder"),
    ("real --cases none --videos v --faces v", "none: no such file; .*make-cases"),
    ("real --cases c.jsonl --videos v --faces v", "none of 1 videos could be measured; the first: "),
    ("real --cases c.jsonl --videos v --faces v --steps=3", "--steps is for sampling"),
    ("real --cases c.jsonl --videos v --faces v --judge-url ftp://x", "expected http"),
    ("real --cases c.jsonl --ckpt none --faces v", "no checkpoint at none"),
    ("compare v", "v holds no cases_measured.jsonl"), ("compare measured measured", "two or more different"),
    ("make-cases --data v --out x.jsonl", "no such file; curate.py writes one"),
    ("make-cases --data v --out x.jsonl --training none", "--training none: no such file"),
    ("make-cases --data v --out x.jsonl --training empty", "holds no line of a manifest"),
    ("make-cases --data v --out old.jsonl", "old_refs exists and would be replaced"),
]


@pytest.mark.parametrize("argv, message", ARGUMENTS)
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    for name in ("v", "old_refs"):
        (tmp_path / name).mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "measured").mkdir()
    real.Results(tmp_path / "measured/cases_measured.jsonl", ()).add({"case": "a", "reason": "none"})
    (tmp_path / "c.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=message):
        evaluation.main(argv.split(), **({"detector": Known()} if argv.startswith("real") else {}))
