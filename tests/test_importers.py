"""Sets of others become manifests: trees of their layouts, made here, and what is wrong with them."""

import errno
import json
import math
import os
import random

import av
import numpy as np
import pytest
import torch
from helpers import content, names, write_sound
from PIL import Image

import data
from support.script import UserError
from videos import importers
from videos.pictures import write_video

SHADES = {"front": 0.0, "left_60": -0.8, "left_30": -0.4, "right_60": 0.8, "right_30": 0.4, "top": -1.0}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Tiny MP4s, one a shade of grey; to be linked into a test's tree."""
    folder = tmp_path_factory.mktemp("videos")
    for name, shade in SHADES.items():
        write_video(folder / f"{name}.mp4", torch.full((3, 5, 32, 48), shade), 25)
    return folder


def put(video, *paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(video, path)


def picture(path, size=(16, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


def lines(out):
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


@pytest.fixture
def one(videos, tmp_path):
    """A set root/ with a.mp4, a.txt and a picture; tests write out/ beside it."""
    put(videos / "front.mp4", tmp_path / "root/a.mp4")
    (tmp_path / "root/a.txt").write_text("a man")
    picture(tmp_path / "root/refs/a/front.png")
    return tmp_path


def entry(video, caption, *identities, frames=5, fps=25):
    return {"video": f"source/{video}", "caption": caption, "fps": fps, "frames": frames, "source": video,
            "identities": list(identities)}


def person(name, **views):
    """front="a.png" is what is known of a picture that a user gave."""
    plain = {"yaw": None, "cross": False}
    views = {v: {"image": f"source/{x}"} | plain if isinstance(x, str) else x for v, x in views.items()}
    return {"id": name, "views": views}


# ------------------------------------------------------------------------------------------------------- MEAD
def mead_tree(videos, root, cameras, takes=("happy/level_2/001", "neutral/level_1/001"), actor="M003"):
    for take in takes:
        for camera in cameras:
            put(videos / f"{camera}.mp4", root / actor / "video" / camera / f"{take}.mp4")


def frame(camera, take, yaw, actor="M003"):
    image = f"refs/{actor}_video_{camera}_{take.replace('/', '_')}.png"
    return {"image": image, "yaw": yaw, "cross": True}


def shade(path):
    return np.asarray(Image.open(path)).mean() / 127.5 - 1


@pytest.mark.parametrize("mirror", [False, True])
def test_mead_is_every_camera_of_a_take_with_pictures_of_another(videos, tmp_path, mirror, capsys):
    root, out, cameras = (tmp_path / "root", tmp_path / "out",
                          ("front", "left_60", "left_30", "right_30", "top"))
    mead_tree(videos, root, cameras)
    assert importers.import_set("mead", root, out, mirror) == 10
    happy, neutral = "happy/level_2/001", "neutral/level_1/001"
    left, right = ("right", "left") if mirror else ("left", "right")
    sign = -1 if mirror else 1
    seen = {"front": "seen from the front", "left_30": f"turned 30 degrees to the {left}",
            "left_60": f"turned 60 degrees to the {left}", "right_30": f"turned 30 degrees to the {right}",
            "top": "seen from above"}
    expected = []
    for take, other, words in ((happy, neutral, "happy, level 2"), (neutral, happy, "neutral, level 1")):
        views = {"front": frame("front", other, 0), left: frame("left_60", other, -60 * sign),
                 right: frame("right_30", other, 30 * sign)}
        views = {view: views[view] for view in ("front", "left", "right")}
        expected += [
            entry(f"M003/video/{c}/{take}.mp4", f"a person speaks, {words}, {seen[c]}",
                  person("M003", **views))
            for c in sorted(cameras)
        ]
    assert lines(out) == expected
    said = capsys.readouterr().out
    assert f"with{'out' if mirror else ''} --mirror: {out}/refs/*{left}_60*.png" in said
    assert "10 videos, 0 rows left out" in said
    pictures = {path.name: path for path in (out / "refs").iterdir()}
    assert len(pictures) == 6 and (out / "source").resolve() == root
    for name, path in pictures.items():
        camera = name.removeprefix("M003_video_").split("_happy")[0].split("_neutral")[0]
        assert shade(path) == pytest.approx(SHADES[camera], abs=0.05)


def test_mead_references_come_from_a_few_takes_far_from_their_row(videos, tmp_path):
    takes = [f"happy/level_1/{n:03d}" for n in range(40)]
    mead_tree(videos, tmp_path / "root", ["front"], takes)
    importers.import_set("mead", tmp_path / "root", tmp_path / "out")
    views = [line["identities"][0]["views"]["front"]["image"] for line in lines(tmp_path / "out")]
    assert len(set(views)) == 8 == len(names(tmp_path / "out/refs"))
    for n, image in enumerate(views):
        giver = int(image[-7:-4])
        assert min((n - giver) % 40, (giver - n) % 40) >= 15


def test_mead_leaves_out_what_has_no_pair_or_is_damaged(videos, tmp_path, capsys):
    root, out = tmp_path / "root", tmp_path / "out"
    mead_tree(videos, root, ["front"], ["sad/level_1/001", "sad/level_1/002", "sad/level_1/003"])
    mead_tree(videos, root, ["front"], ["sad/level_1/001"], "W009")
    mead_tree(videos, root, ["top"], ["sad/level_1/001", "sad/level_1/002"], "W010")
    put(videos / "front.mp4", root / "M003/video/behind/sad/level_1/001.mp4")
    broken = root / "M003/video/front/sad/level_1/002.mp4"
    broken.unlink()
    broken.write_bytes((videos / "front.mp4").read_bytes()[:300])
    (root / "M003/video/front/sad/level_1/._001.mp4").write_text("of a Mac")
    assert importers.import_set("mead", root, out) == 2
    assert [
        (line["source"][-7:], line["identities"][0]["views"]["front"]["image"][-7:]) for line in lines(out)
    ] == [("001.mp4", "003.png"), ("003.mp4", "001.png")]
    said = capsys.readouterr().err.splitlines()
    assert "no camera is called behind" in said[0] and "damaged or no video" in said[1]
    assert len(said) == 5 and all("no front view in another take" in line for line in said[2:])


# -------------------------------------------------------------------------------------------------- NeRSemble
def pose(azimuth, elevation=0, tilt=np.eye(3)):
    """World to OpenCV camera [4, 4] of one that looks at (1, 2, 3) from 2 units away; azimuth > 0 is to the
    right of one who looks at the head."""
    a, e = math.radians(azimuth), math.radians(elevation)
    away = np.array([math.sin(a) * math.cos(e), math.sin(e), math.cos(a) * math.cos(e)])
    right = np.array([math.cos(a), 0, -math.sin(a)])
    rotation = np.stack([right, np.cross(-away, right), -away]) @ tilt
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation, -rotation @ (tilt.T @ (2 * away) + [1, 2, 3])
    return matrix.tolist()


TILT = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
TILT *= np.linalg.det(TILT)


@pytest.mark.parametrize("tilt", [np.eye(3), TILT])
def test_a_camera_on_the_right_sees_the_head_look_left(tilt):
    places = (-90, 10), (-60, -10), (0, 20), (0.0, -20), (60, 10), (90, -10)
    rig = {str(a): pose(a, e, tilt) for a, e in places}
    for serial, yaw in importers.camera_angles(rig)[0].items():
        assert yaw == pytest.approx(-float(serial), abs=1)
    angles = importers.camera_angles({str(a): pose(a, 25, tilt) for a in (-40, 0, 40)})
    assert angles == [{"-40": 40, "0": 0, "40": -40}, {"-40": -25, "0": -25, "40": -25}]


def nersemble_tree(videos, root, rig, takes=("EMO-1-shout+laugh", "SEN-04-two_plus_seven"), who="030"):
    for take in takes:
        for serial in rig:
            put(videos / "front.mp4", root / who / "sequences" / take / f"images/cam_{serial}.mp4")
    (root / who / "calibration").mkdir()
    rig = {"world_2_cam": {serial: pose(*np.atleast_1d(angles)) for serial, angles in rig.items()}}
    (root / who / "calibration/camera_params.json").write_text(json.dumps(rig))


RIG = {"10": (0, 30), "11": -78, "12": -65, "13": -20, "14": 0, "15": 20, "16": 65, "17": 78}


def test_nersemble_takes_its_views_from_the_calibration(videos, tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    nersemble_tree(videos, root, RIG)
    (root / "metadata_sequences.csv").write_text("ID,wears_glasses,EMO-1-shout+laugh\n30,x,x\n")
    assert importers.import_set("nersemble", root, out) == 16
    emo, sen = "EMO-1-shout+laugh", "SEN-04-two_plus_seven"

    def views(take):
        return {
            view: {"image": f"refs/030_sequences_{take}_images_cam_{serial}.png", "yaw": -float(RIG[serial]),
                   "pitch": 0.0, "cross": True}
            for view, serial in (("front", "14"), ("left", "16"), ("right", "12"))
        }

    got = lines(out)
    for line in got:
        for facts in line["identities"][0]["views"].values():
            facts["yaw"], facts["pitch"] = float(round(facts["yaw"])), abs(facts["pitch"])
    assert got[4] == entry(f"030/sequences/{emo}/images/cam_14.mp4",
                           "a person acts: shout and laugh, with glasses, seen from the front",
                           person("030", **views(sen)))
    assert got[10] == entry(f"030/sequences/{sen}/images/cam_12.mp4",
                            'a person says "two plus seven", with glasses, turned 65 degrees to the right',
                            person("030", **views(emo)))


BAD_CALIBRATIONS = {
    "missing": None,
    "half a file": '{"world_2_cam": {"11": [[1, 0',
    "a list": "[]",
    "no cameras": '{"world_2_cam": {}}',
    "text": '{"world_2_cam": {"14": "x"}}',
    "wrong shape": '{"world_2_cam": {"14": [[1, 2], [3, 4]]}}',
    "zeros": json.dumps({"world_2_cam": {s: np.zeros((4, 4)).tolist() for s in RIG}}),
    "nan": json.dumps({"world_2_cam": {s: np.full((4, 4), math.nan).tolist() for s in RIG}}),
    "one camera": json.dumps({"world_2_cam": {"14": pose(0)}}),
    "another camera": json.dumps({"world_2_cam": {"98": pose(0), "99": pose(60)}}),
    "one above the other": json.dumps({"world_2_cam": {"14": pose(0, 20), "15": pose(0, -20)}}),
    "all around": json.dumps({"world_2_cam": {str(10 + n): pose(45 * n) for n in range(8)}}),
}


@pytest.mark.parametrize("text", BAD_CALIBRATIONS.values(), ids=BAD_CALIBRATIONS)
def test_a_bad_calibration_costs_its_participant_only(videos, tmp_path, text, capsys):
    root, out = tmp_path / "root", tmp_path / "out"
    nersemble_tree(videos, root, {"14": 0, "15": 60, "16": -60})
    nersemble_tree(videos, root, {"14": 0, "15": 60, "16": -60}, who="031")
    calibration = root / "031/calibration/camera_params.json"
    calibration.unlink() if text is None else calibration.write_text(text)
    assert importers.import_set("nersemble", root, out) == 6
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("participant 031 is left out: its calibration is of no use")


# ---------------------------------------------------------------------------------------------------- folders
ROWS = [
    {"video": "a.mp4", "prompt": "one", "reference_image": "x/left.png;x/front.png"},
    {"file_name": "b.mp4", "text": "two", "references": '[["x/front.png"], ["y/right.png", "y/back.jpg"]]'},
    {"video_path": "c/ü 你.mp4", "cap": "three", "control_path": "x/1.png; y/right.png"},
    {"path": "d.mp4", "caption": ""},
]
EXPECTED = [
    entry("a.mp4", "one", person("a_1", left="x/left.png", front="x/front.png")),
    entry("b.mp4", "two", person("b_1", front="x/front.png"),
          person("b_2", right="y/right.png", back="y/back.jpg")),
    entry("c/ü 你.mp4", "three", person("c/ü 你_1", front="x/1.png", right="y/right.png")),
    entry("d.mp4", "of the .txt", person("d_1", front="refs/d/1/front.webp"),
          person("d_2", left="refs/d/2/left.png")),
]


@pytest.fixture
def trainers(videos, tmp_path):
    root = tmp_path / "root"
    put(videos / "front.mp4", *(root / f"{name}.mp4" for name in ("a", "b", "c/ü 你", "d")))
    (root / "d.txt").write_bytes("\ufeffof  the\r\n.txt\r\n".encode())
    for name in ("x/left.png", "x/front.png", "x/1.png", "y/right.png", "y/back.jpg"):
        picture(root / name)
    picture(root / "refs/d/1/front.webp")
    picture(root / "refs/d/2/left.png")
    return root


def write_rows(root, form, rows):
    if form in ("csv", "csv with BOM and CRLF"):
        import csv

        bom = "utf-8-sig" if "BOM" in form else "utf-8"
        with open(root / "metadata.csv", "w", newline="", encoding=bom) as file:
            keys = list(dict.fromkeys(key for row in rows for key in row))
            table = csv.DictWriter(file, keys, lineterminator="\r\n" if "BOM" in form else "\n")
            table.writeheader()
            table.writerows(rows)
    elif form == "json":
        (root / "metadata.json").write_text(json.dumps(rows))
    else:
        end, name = ("\r\n", "any.jsonl") if form == "jsonl with CRLF" else ("\n", "metadata.jsonl")
        text = end.join(json.dumps(row, ensure_ascii=False) for row in rows) + end
        (root / name).write_bytes(("\ufeff" * (end != "\n") + text).encode())


@pytest.mark.parametrize("form", ["csv", "csv with BOM and CRLF", "json", "jsonl", "jsonl with CRLF"])
def test_tables_of_the_trainers(trainers, tmp_path, form, capsys):
    write_rows(trainers, form, ROWS)
    if "CRLF" not in form:
        (trainers / "dataset_info.json").write_text("{}")
    assert importers.import_set("folders", trainers, tmp_path / "out") == 4
    assert lines(tmp_path / "out") == EXPECTED
    said = capsys.readouterr()
    assert not said.err and "count as front: metadata" in said.out.replace("any", "metadata")


def test_lists_and_full_paths_are_as_good(trainers, tmp_path):
    full = [str(trainers / "x/left.png"), "./x/front.png"]
    rows = [{"video": str(trainers / "a.mp4"), "caption": "one", "references": full}]
    rows += [
        {"video": "b.mp4", "caption": "two", "references": [["x/front.png"], ["y/right.png", "y/back.jpg"]]}
    ]
    write_rows(trainers, "jsonl", rows)
    importers.import_set("folders", trainers, tmp_path / "out")
    assert lines(tmp_path / "out") == EXPECTED[:2]


def test_videos_with_texts_need_no_table(trainers, tmp_path, capsys):
    put(trainers / "a.mp4", trainers / "sub/e.mp4", trainers / "a_mask.mp4", trainers / ".hidden.mp4")
    (trainers / "sub/e.txt").write_text("five")
    picture(trainers / "sub/refs/e/front.png")
    picture(trainers / "sub/refs/e/my_left.jpg")
    (trainers / "sub/refs/e/notes.txt").write_text("no picture")
    assert importers.import_set("folders", trainers, tmp_path / "out") == 2
    views = {"front": "sub/refs/e/front.png", "left": "sub/refs/e/my_left.jpg"}
    assert lines(tmp_path / "out") == [EXPECTED[3], entry("sub/e.mp4", "five", person("sub/e_1", **views))]
    assert capsys.readouterr().err == "".join(
        f"{n}.mp4 is left out: no caption\n" for n in ("a", "b", "c/ü 你")
    )


BAD_ROWS = {
    "not an object": ("[1, 2]", "not a JSON object"),
    "half a line": ('{"video": "b.mp4", "capt', "perhaps cut short"),
    "deep": ("[" * 100000, "not a JSON object"),
    "no video": ({"caption": "x"}, "no video; expected one of the columns video, "),
    "no caption": ({"video": "b.mp4"}, "no caption"),
    "blank caption": ({"video": "b.mp4", "caption": " \n "}, "no caption"),
    "a number as caption": ({"video": "b.mp4", "caption": 5}, "its caption is not text"),
    "half a character": ({"video": "b.mp4", "caption": "\ud83d"}, "its caption is not text"),
    "a number as video": ({"video": 5, "caption": "x"}, "5 is not a file name"),
    "NUL": ({"video": "b\0.mp4", "caption": "x"}, "is not a file name"),
    "half a character in a name": ({"video": "\ud83d.mp4", "caption": "x"}, "is not a file name"),
    "missing": ({"video": "e.mp4", "caption": "x"}, "source/e.mp4: no such file"),
    "a long name": ({"video": "e" * 5000, "caption": "x"}, "File name too long"),
    "an address": ({"video": "https://x.org/a.mp4", "caption": "x"}, "no such file"),
    "a folder": ({"video": "x", "caption": "x"}, "not a file"),
    "the set itself": ({"video": ".", "caption": "x"}, "not a file"),
    "a pipe": ({"video": "pipe.mp4", "caption": "x"}, "not a file"),
    "traversal": ({"video": "../secret.mp4", "caption": "x"}, "leads out of the folder"),
    "there and back": ({"video": "../root/b.mp4", "caption": "x"}, "leads out of the folder"),
    "full path": ({"video": "/etc/passwd", "caption": "x"}, "leads out of the folder"),
    "a link out": ({"video": "link.mp4", "caption": "x"}, "leads out of the folder"),
    "caption through a link": ({"video": "linked/secret.mp4"}, "no caption"),
    "text": ({"video": "text.mp4", "caption": "x"}, "damaged or no video"),
    "empty file": ({"video": "empty.mp4", "caption": "x"}, "damaged or no video"),
    "cut video": ({"video": "cut.mp4", "caption": "x"}, "damaged or no video"),
    "damaged payload": ({"video": "damaged.mp4", "caption": "x"}, "damaged.mp4: damaged, as the decoder"),
    "a picture as video": ({"video": "x/left.png", "caption": "x"}, "damaged or no video"),
    "a playlist": ({"video": "list.mp4", "caption": "x"}, "damaged or no video"),
    "sound": ({"video": "sound.mp4", "caption": "x"}, "sound.mp4: no video in it"),
    "again": ({"video": "a.mp4", "caption": "x", "refs": ["x/left.png"]},
              "its video is that of metadata.jsonl row 1"),
    "again by a link": ({"video": "same.mp4", "caption": "x", "refs": ["x/left.png"]},
                        "its video is that of metadata.jsonl row 1"),
    "reference missing": ({"video": "b.mp4", "caption": "x", "refs": ["front.png"]},
                          "front.png: no such file"),
    "reference out": ({"video": "b.mp4", "caption": "x", "refs": ["../front.png"]}, "leads out"),
    "reference by a link": ({"video": "b.mp4", "caption": "x", "refs": ["out_front.png"]}, "leads out"),
    "reference is text": ({"video": "b.mp4", "caption": "x", "refs": ["text.mp4"]}, "not a readable picture"),
    "reference is cut": ({"video": "b.mp4", "caption": "x", "refs": ["cut_front.png"]},
                         "not a readable picture"),
    "reference is a video": ({"video": "b.mp4", "caption": "x", "control_path": "b.mp4"},
                             "not a readable picture"),
    "references are a number": ({"video": "b.mp4", "caption": "x", "refs": 5}, "no list of file names"),
    "numbers": ({"video": "b.mp4", "caption": "x", "refs": [1]}, "no list of file names"),
    "lists and names": ({"video": "b.mp4", "caption": "x", "refs": [["x/left.png"], "x"]},
                        "no list of file names"),
    "half a list": ({"video": "b.mp4", "caption": "x", "refs": '["x/left.png"'}, "no JSON list"),
    "a view twice": ({"video": "b.mp4", "caption": "x", "refs": ["x/left.png"] * 2}, "a second left view"),
    "the second without a view": ({"video": "b.mp4", "caption": "x", "refs": ["x/left.png", "x/1.png"]},
                                  "view is it"),
}


@pytest.mark.parametrize("row, reason", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_left_out_with_its_reason(trainers, tmp_path, row, reason, capsys):
    put(trainers / "a.mp4", tmp_path / "secret.mp4")
    (tmp_path / "secret.txt").write_text("a secret")
    picture(tmp_path / "front.png")
    os.mkfifo(trainers / "pipe.mp4")
    (trainers / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (trainers / "linked").symlink_to(tmp_path)
    (trainers / "same.mp4").symlink_to("a.mp4")
    (trainers / "out_front.png").symlink_to(tmp_path / "front.png")
    (trainers / "text.mp4").write_text("no video")
    (trainers / "empty.mp4").touch()
    # which decodes without an exception: only the log tells
    noise = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    write_video(trainers / "damaged.mp4", noise, 25)
    payload = (trainers / "damaged.mp4").read_bytes()
    start = payload.index(b"mdat") + 2000
    (trainers / "damaged.mp4").write_bytes(payload[:start] + bytes(range(256)) * 4 + payload[start + 1024 :])
    (trainers / "cut.mp4").write_bytes((trainers / "a.mp4").read_bytes()[:700])
    (trainers / "cut_front.png").write_bytes((trainers / "x/left.png").read_bytes()[:45])
    (trainers / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{trainers}/a.mp4'\n")
    write_sound(trainers / "sound.mp4")
    text = row if isinstance(row, str) else json.dumps(row)
    good = {"video": "a.mp4", "caption": "one", "refs": ["x/front.png"]}
    (trainers / "metadata.jsonl").write_text(f"{json.dumps(good)}\n{text}")
    assert importers.import_set("folders", trainers, tmp_path / "out") == 1
    assert lines(tmp_path / "out") == [entry("a.mp4", "one", person("a_1", front="x/front.png"))]
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("metadata.jsonl row 2 is left out: ") and reason in line and len(line) < 6000
    assert "1 videos, 1 rows left out" in said.out


def test_rows_of_any_kind_are_lines_or_have_a_reason(trainers, tmp_path, capsys):
    rng = random.Random(0)
    atoms = [None, True, -1, 1.5, math.nan, 10**400, "", "a.mp4", "x/front.png", "..", "[", "[[]]", "a;b",
             "\ud8ff"]
    keys = [key for names in importers.COLUMNS.values() for key in names]
    keys += ["control_path_1", "control_path_²", "actor_id", "view", "angle", "region", "metadata"]

    def value(depth=0):
        kind = rng.random()
        if depth < 3 and kind < 0.2:
            return [value(depth + 1) for _ in range(rng.randrange(3))]
        if depth < 3 and kind < 0.4:
            return {rng.choice(keys): value(depth + 1) for _ in range(rng.randrange(5))}
        return rng.choice(atoms)

    refs = {"refs": ["x/front.png"]}
    rows = [{"video": "a.mp4", "caption": "x"} | refs]
    for n in range(500):
        (trainers / f"x/{n}.mp4").write_bytes((trainers / "b.mp4").read_bytes())
        changes = {k: value() for k in rng.sample(keys, 2)}
        rows.append({"video": f"x/{n}.mp4", "caption": "x"} | refs | changes)
    write_rows(trainers, "json", rows)
    kept = importers.import_set("folders", trainers, tmp_path / "out")
    assert len(lines(tmp_path / "out")) == kept > 20
    assert len(capsys.readouterr().err.splitlines()) == 501 - kept > 20


def test_bytes_that_are_no_utf8(one, capsys):
    (one / "root/metadata.csv").write_bytes("video,caption\na.mp4,ein grüner\n".encode("latin-1"))
    with pytest.raises(UserError, match="line 2 is not UTF-8; .* 'a.mp4,ein grüner', .* iconv -f") as error:
        importers.import_set("folders", one / "root", one / "out")
    assert "metadata.csv: not a readable text file" in str(error.value) and len(str(error.value)) < 500
    (one / "root/metadata.csv").unlink()
    (one / "root/a.txt").write_bytes("женщина".encode("cp1251"))
    with pytest.raises(UserError, match="no video of .* is of use, 1 rows are left out"):
        importers.import_set("folders", one / "root", one / "out")
    assert "a.txt: not a readable text file" in (said := capsys.readouterr().err) and "женщина" in said
    (one / "root/a.txt").write_bytes("женщина\r\n".encode("utf-16"))
    assert importers.import_set("folders", one / "root", one / "out") == 1
    assert lines(one / "out")[0]["caption"] == "женщина"
    assert "a.txt: read as UTF-16" in capsys.readouterr().out
    os.rename(one / "root/a.mp4", os.fsencode(one / "root") + b"/\xff.mp4")
    with pytest.raises(UserError):
        importers.import_set("folders", one / "root", one / "out")
    assert "'\\udcff.mp4' is left out" in capsys.readouterr().err


@pytest.mark.parametrize("name, content", [
    ("metadata.csv", "video;caption\r\na.mp4;one, two\r\n".encode()),
    ("metadata.csv", "sep=;\r\nFile_Name; Text\r\na.mp4;one, two\r\n".encode("utf-8-sig")),
    ("metadata.csv", "File Name\tCAP\na.mp4\tone, two\n".encode("utf-16")),
    ("Metadata.TSV", "Video Path\tPrompt\na.mp4\tone, two\n".encode("utf-16-le")),
    ("metadata.csv", b'id, path, caption\n1, a.mp4, "one, two"\n'),
    ("metadata.json", json.dumps([{"video": "a.mp4", "cap": "one, two"}]).encode("utf-8-sig")),
    ("metadata.json", json.dumps({"a.mp4": "one, two"}).encode()),
    ("metadata.json", json.dumps({"a.mp4": {"Caption": "one, two"}}).encode("utf-16-be")),
    ("metadata.json", json.dumps({"7": {"file_name": "a.mp4", "Caption": "one, two"}}).encode()),
    ("metadata.jsonl", '\ufeff{"Video": "a.mp4", "caption": "one, two"}\r\n'.encode()),
    ("metadata.jsonl", '{"video": ".\\\\A.MP4", "caption": "one, two"}'.encode()),
])
def test_tables_as_other_programs_save_them(one, name, content):
    (one / "root/a.txt").unlink()
    (one / "root" / name).write_bytes(content)
    assert importers.import_set("folders", one / "root", one / "out") == 1
    assert lines(one / "out") == [entry("a.mp4", "one, two", person("a_1", front="refs/a/front.png"))]


@pytest.mark.parametrize("given, reason", [
    ({"1": [], "2": ["front"]}, "no picture of 1 of its 2 people"),
    ({"2": ["front"]}, "no picture of 1 of its 2 people"),
    ({"0": ["front"], "1": []}, "no picture of 1 of its 2 people"),
    ({"1": ["front"], "3": ["front"]}, "no picture of 1 of its 3 people"),
    ({"0": ["front"], "1": ["left"]}, None), ({"1": []}, "no reference; expected refs/a/front.png"),
    ("[[], [\"refs/b/front.png\"]]", "no picture of 1 of its 2 people"),
    ("[[\"refs/b/front.png\"], [\"refs/b/left.png\"]]", None),
])
def test_a_person_without_pictures_costs_the_row(one, given, reason, capsys):
    """Else the second person of a clip would be taken for the first."""
    root = one / "root"
    (root / "refs/a/front.png").rename(root / "refs/front.png")
    for n, views in given.items() if isinstance(given, dict) else {"": ["front", "left"]}.items():
        (root / "refs/a" / n).mkdir(exist_ok=True)
        for view in views:
            picture(root / "refs/a" / n / f"{view}.png")
    if isinstance(given, str):
        (root / "refs/a").rename(root / "refs/b")
        row = {"video": "a.mp4", "caption": "x", "references": given}
        (root / "metadata.jsonl").write_text(json.dumps(row))
    if reason:
        with pytest.raises(UserError, match=reason):
            importers.import_set("folders", root, one / "out")
    else:
        assert importers.import_set("folders", root, one / "out") == 1
        assert len(lines(one / "out")[0]["identities"]) == 2


def test_what_a_folder_of_videos_passes_over_is_counted(one, capsys):
    root = one / "root"
    for name in (".trash/b.mp4", "elsewhere/c.mp4", "d", "e.wmv", "woman_with_mask.mp4", "a_mask.mp4"):
        put(root / "a.mp4", one / name if name.startswith("else") else root / name)
    (root / "linked").symlink_to(one / "elsewhere")
    (root / "woman_with_mask.txt").write_text("a woman with a mask")
    picture(root / "refs/woman_with_mask/front.png")
    assert importers.import_set("folders", root, one / "out") == 2
    assert [line["source"] for line in lines(one / "out")] == ["a.mp4", "woman_with_mask.mp4"]
    said = capsys.readouterr()
    assert "passed over: 1 .wmv, 1 hidden, 1 links to folders, 1 without a suffix\n" in said.out


BAD_TABLES = {
    "empty": ("metadata.csv", b"", "no video of"),
    "no column of videos": ("metadata.csv", b"Datei;cap\na.mp4;x\n", "it has cap, datei, expected one"),
    "an object of settings": ("metadata.json", b'{"fps": 16}', "not a list of rows"),
    "an object of other things": ("metadata.jsonl", b'{"fps": 16}', "it has fps, expected one called video"),
    "a huge field": ("metadata.csv", b"video,caption\na.mp4," + b"x" * 200000, "metadata.csv cannot be read"),
    "an object": ("metadata.json", b"{}", "not a list of rows"),
    "half": ("metadata.json", b'[{"video": "a.mp4", "capt', "metadata.json cannot be read"),
    "two tables": ("b.jsonl", b'{"video": "a.mp4"}', "which of b.jsonl, c.csv lists its videos"),
}


@pytest.mark.parametrize("name", ["config.json", "list.json", "numbers.csv", "log.jsonl"])
def test_files_of_programs_are_no_tables(one, name):
    content = {"config.json": "{}", "list.json": "[1, 2", "numbers.csv": "a,b\n1,2\n", "log.jsonl": "x\n{}\n"}
    (one / "root" / name).write_text(content[name])
    assert importers.import_set("folders", one / "root", one / "out") == 1
    (one / "root/any.csv").write_text("video,caption\na.mp4,of the table\n")
    importers.import_set("folders", one / "root", one / "out")
    assert lines(one / "out")[0]["caption"] == "of the table"


def test_what_encode_would_refuse_is_left_out(one, capsys):
    for k in range(1, 4):
        picture(one / f"root/refs/b/{k}/front.png")
    picture(one / "root/refs/c/front.png", (15, 16))
    for name in "bc":
        os.link(one / "root/a.mp4", one / f"root/{name}.mp4")
        (one / f"root/{name}.txt").write_text("x")
    assert importers.import_set("folders", one / "root", one / "out") == 1
    said = capsys.readouterr().err.splitlines()
    assert "b.mp4 is left out: identities: expected a list of 1 to 2 people" in said[0]
    assert "15 x 16 pixels, expected at least 16 a side" in said[1]


@pytest.mark.parametrize("name, content, reason", BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_bad_table_is_one_line(one, name, content, reason):
    (one / "root" / name).write_bytes(content)
    if name == "b.jsonl":
        (one / "root/c.csv").write_text("path,x\na.mp4,1\n")
    with pytest.raises(UserError, match=reason) as error:
        importers.import_set("folders", one / "root", one / "out")
    assert "\n" not in str(error.value) and not (one / "out/manifest.jsonl").exists()


# ------------------------------------------------------------------------------------------------------- all
@pytest.mark.parametrize("form", ["fragmented", "mkv", "ts", "avi"])
def test_frames_and_rate_of_other_containers(one, form):
    name = "b.mp4" if form == "fragmented" else f"b.{form}"
    options = {"movflags": "frag_keyframe+empty_moov"} if form == "fragmented" else {}
    with av.open(str(one / "root" / name), "w", options=options) as container:
        stream = container.add_stream("mpeg4" if form == "avi" else "libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for n in range(9):
            pixels = np.full((32, 64, 3), 20 * n, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    (one / "root/b.txt").write_text("b")
    picture(one / "root/refs/b/front.png")
    assert importers.import_set("folders", one / "root", one / "out") == 2
    front = person("b_1", front="refs/b/front.png")
    assert lines(one / "out")[1] == entry(name, "b", front, frames=9, fps=30)


def test_a_second_import_replaces_the_first_and_cleans_up(videos, tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    mead_tree(videos, root, ["front"], [f"sad/level_1/{n:03d}" for n in range(3)])
    importers.import_set("mead", root, out)
    before, pictures = (out / "manifest.jsonl").read_bytes(), names(out / "refs")
    (out / "refs" / pictures[0]).unlink()
    (out / "refs/old.png").touch()
    importers.import_set("mead", root, out)
    assert (out / "manifest.jsonl").read_bytes() == before and names(out / "refs") == pictures
    (root / "M003/video/front/sad/level_1/002.mp4").unlink()
    assert importers.import_set("mead", root, out) == 2


@pytest.mark.parametrize("kind", ["mead", "folders"])
def test_a_full_disk_keeps_the_last_manifest(kind, videos, one, monkeypatch):
    """What cannot be written is no fault of a row."""
    root, out, real = one / "root", one / "out", importers.atomic_file
    mead_tree(videos, root, ["front"], [f"sad/level_1/{n:03d}" for n in range(3)])
    importers.import_set(kind, root, out)
    before = (out / "manifest.jsonl").read_bytes()
    for path in (out / "refs").iterdir():
        path.unlink()

    def full(path):
        if path.suffix == ".png":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path)

    monkeypatch.setattr(importers, "atomic_file", full)
    if kind == "folders":  # it writes the manifest only
        monkeypatch.setattr(importers.json, "dumps", lambda line: full(out / "x.png"))
    with pytest.raises(OSError, match="No space left"):
        importers.import_set(kind, root, out)
    assert (out / "manifest.jsonl").read_bytes() == before


def test_an_import_that_fails_leaves_the_folder_to_the_right_root(one):
    (one / "empty").mkdir()
    with pytest.raises(UserError, match="no video of"):
        importers.import_set("folders", one / "empty", one / "out")
    assert [name for name in names(one / "out") if name[0] != "."] == []
    assert importers.import_set("folders", one / "root", one / "out") == 1
    (one / "out/encoded").mkdir()  # as data.py encode leaves it
    assert importers.import_set("folders", one / "root", one / "out") == 1
    (one / "root/a.txt").write_text("")
    with pytest.raises(UserError, match="the first: a.mp4 is left out: no caption; is the set laid out"):
        importers.import_set("folders", one / "root", one / "out")
    assert len(lines(one / "out")) == 1 and (one / "out/source").is_symlink()


def test_ctrl_c_in_a_first_import_keeps_what_is_made_for_the_next_start(videos, tmp_path, monkeypatch):
    """What is made is not made again, and a start from another root is refused."""
    root, out, middle_frame = tmp_path / "root", tmp_path / "out", importers.middle_frame
    mead_tree(videos, root, ["front"], [f"sad/level_1/{n:03d}" for n in range(3)])
    importers.import_set("mead", root, tmp_path / "whole")

    def stopped(*arguments):
        if len(list((out / "refs").iterdir())) == 2:
            raise KeyboardInterrupt
        return middle_frame(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(importers, "middle_frame", stopped)
        importers.import_set("mead", root, out)
    assert (out / "source").resolve() == root and not (out / "manifest.jsonl").exists()
    made = {path: path.stat().st_mtime_ns for path in (out / "refs").iterdir()}
    assert len(made) == 2
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="holds what is from elsewhere, expected nothing or an import of"):
        importers.import_set("mead", tmp_path / "other", out)
    assert importers.import_set("mead", root, out) == 3
    assert content(out) == content(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == when for path, when in made.items())


def test_a_video_without_a_reference_is_left_out(one, capsys):
    os.link(one / "root/a.mp4", one / "root/b.mp4")
    (one / "root/b.txt").write_text("b")
    assert importers.import_set("folders", one / "root", one / "out") == 1
    assert capsys.readouterr().err == (
        "b.mp4 is left out: no reference; expected refs/b/front.png or a column references\n"
    )


def test_damage_is_reported_before_what_it_causes(videos, tmp_path, capsys):
    root = tmp_path / "root"
    mead_tree(videos, root, ["top"])
    for take in ("happy/level_2/001", "neutral/level_1/001"):
        path = root / f"M003/video/front/{take}.mp4"
        path.parent.mkdir(parents=True)
        path.touch()
    mead_tree(videos, root, ["front"], ["sad/level_1/001"], "W009")
    with pytest.raises(UserError, match="5 rows are left out; the first: .* damaged or no video"):
        importers.import_set("mead", root, tmp_path / "out")
    said = capsys.readouterr().err.splitlines()
    assert "001.mp4: damaged or no video" in said[0]
    assert "no front view in another take: M003/video/front/neutral/level_1/001.mp4 is damaged" in said[1]
    assert "the only take of W009, and a person needs two" in said[4]


def test_the_middle_frame_is_the_middle_one(tmp_path):
    levels = torch.linspace(-0.9, 0.9, 31)
    (tmp_path / "root").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/source").symlink_to(tmp_path / "root")
    (tmp_path / "out/refs").mkdir()
    write_video(tmp_path / "root/a.mp4", levels[None, :, None, None].expand(3, 31, 256, 1100), 25)
    name = importers.middle_frame(tmp_path / "out", "a.mp4")
    assert shade(tmp_path / "out" / name) == pytest.approx(levels[15].item(), abs=0.07)
    assert Image.open(tmp_path / "out" / name).size == (1024, 238)


def test_other_folders_are_refused(one):
    def fails(reason, root="root", out="out", kind="folders", mirror=False):
        with pytest.raises(UserError, match=reason) as error:
            importers.import_set(kind, one / root, one / out, mirror)
        assert "\n" not in str(error.value)

    fails("no such folder", root="none")
    fails("not a folder", root="root/a.mp4")
    fails("one lies in the other", out="root")
    fails("one lies in the other", out="root/out")
    fails("one lies in the other", out=".")
    fails("calibration says", kind="nersemble", mirror=True)
    (one / "file").write_text("x")
    fails("cannot write to", out="root/../file/out")
    for kind in importers.KINDS:
        (one / "empty").mkdir(exist_ok=True)
        fails("no video of .* is of use, 0 rows are left out", root="empty", out=f"out_{kind}", kind=kind)
    (one / "mine").mkdir()
    (one / "mine/letter.txt").write_text("dear")
    fails("holds letter.txt", out="mine")
    (one / "other").mkdir()
    importers.import_set("folders", one / "root", one / "out")
    elsewhere = "holds what is from elsewhere, expected nothing or an import of"
    fails(f"{elsewhere} {one}/other: delete it, or choose another$", root="other")
    (one / "out/letter.txt").write_text("dear")
    fails(f"holds letter.txt, expected nothing or an import of {one}/root: delete it, or choose another$")
    assert names(one / "mine") == ["letter.txt"] and len(lines(one / "out")) == 1


def test_a_manifest_reads_only_what_is_below_it(one):
    importers.import_set("folders", one / "root", one / "out")
    (one / "root/secret").symlink_to("/etc")
    assert importers.file_in(one / "out", "source/a.mp4") == one / "root/a.mp4"
    for name in ("../root/a.mp4", "/etc/passwd", "source/secret/passwd", "source/../root/a.mp4",
                 f"{one}/root/a.mp4", f"{one}/out/source/a.mp4", "", None, "a\0"):
        with pytest.raises(ValueError):
            importers.file_in(one / "out", name)


def test_the_command_imports(one):
    data.main(["import", "folders", "--root", str(one / "root"), "--out", str(one / "out")])
    assert lines(one / "out") == [entry("a.mp4", "a man", person("a_1", front="refs/a/front.png"))]
