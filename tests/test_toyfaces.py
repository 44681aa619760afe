"""toyfaces.py against what was rendered, and all commands on own data with it, from videos to a report."""

import functools
import json
import random

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from model import CONFIGS
from networks.faces import Faces, align, crop_faces, find_faces
from support.script import UserError, read_lines
from videos import toy
from videos.pictures import to_bytes, wrap
from videos.toyfaces import ToyFaces, is_toy, load_faces
from test_readme import walk


@pytest.fixture(scope="module")
def detector():
    return ToyFaces()


def test_heads_are_found_known_and_turned_as_they_were_rendered(detector):
    """In films of all walls and lights, of one person and of two side by side."""
    rng, found, known, errors, overlaps = random.Random(0), [], [], [], []
    for n in (1, 1, 1, 1, 2, 2, 2):
        clip = toy.draw_clip(rng, n, toy.SWEEPS)
        who = rng.sample(range(toy.FILM_PEOPLE), n)
        videos, masks = toy.render_clips([clip], [toy.pick(toy.film_people(), k) for k in who], 9, 64)
        for f in range(0, 9, 2):
            picture = to_bytes(F.interpolate(videos[:, :, f], scale_factor=4)[0]).permute(1, 2, 0).numpy()
            faces = sorted(find_faces(detector, picture, f, 0.65), key=lambda face: face.box[0].item())
            found.append(len(faces) / n)
            for face in faces:
                k = int((face.box[0] + face.box[2]) / 2 // 256)
                y, x = (masks[0, k, f] > 0.5).nonzero().float().T
                overlaps.append(abs((face.box[0] + face.box[2]) / 2 - 4 * x.mean()) / 256)
                known.append(face.embedding[:toy.FILM_PEOPLE].argmax().item() == who[k])
                yaw = toy.clip_pose([clip], k, 9)["yaw"][0, f].item()
                errors.append(abs(wrap(face.yaw - yaw)))
    assert max(found) == 1 and np.mean(found) > 0.9 and np.mean(known) > 0.9
    assert np.median(errors) < 8 and np.percentile(errors, 90) < 30 and np.mean(overlaps) < 0.05


def test_walls_noise_and_white_show_nobody(detector):
    noise = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    walls = [toy.background([wall], (256, 400)) * 2 - 1 for wall in toy.BACKGROUNDS]
    for image in (noise, *walls, torch.ones(1, 3, 64, 64), torch.ones(1, 3, 1, 900), -torch.ones(1, 3, 9, 9)):
        assert detector.detect(image) == [[]]


@pytest.mark.parametrize("edge", [(0, 0), (60, 0), (0, 80)])
def test_white_edges_move_a_box_and_nothing_else(edge, detector):
    """As read_picture pads a reference that is no square."""
    clip = toy.draw_clip(random.Random(1), 1, toy.SWEEPS)
    video, _ = toy.render_clips([clip], [toy.pick(toy.film_people(), 3)], 9, 64)
    image = F.interpolate(video[0, :, 4][None], scale_factor=4)
    down, across = edge
    padded = F.pad(image, (across, across, down, down), value=1.0)
    (((face,),), ((moved,),)) = detector.detect(image), detector.detect(padded)
    assert torch.allclose(moved.box - torch.tensor([across, down, across, down]), face.box, atol=1)
    points = [(image, face), (padded, moved)]
    first, second = (detector.embed(align(picture[0], one.landmarks[None])) for picture, one in points)
    assert (first @ second.T).item() > 0.98
    first, second = (detector.pose(crop_faces(picture[0], one.box[None])) for picture, one in points)
    assert (first - second).abs().max() < 5


def test_a_folder_called_toy_with_networks_is_that_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "toy"
    assert is_toy(folder.relative_to(tmp_path)) and not is_toy(folder)
    folder.mkdir()
    assert isinstance(load_faces(folder.relative_to(tmp_path), "cpu", Faces), ToyFaces)
    (folder / "detection_x_Final.pth").write_text("no weights")
    assert not is_toy(folder.relative_to(tmp_path))
    with pytest.raises(UserError, match="detection_x_Final.pth"):
        load_faces(folder.relative_to(tmp_path), "cpu", Faces)


def test_from_films_to_the_real_benchmark_without_a_download(tmp_path):
    """README's commands, with fewer videos, steps and cases."""
    call = functools.partial(conftest.call, cwd=tmp_path)
    fewer, commands = {"48": "18", "24": "4", "10": "1", "50": "1", "8": "1"}, walk()
    assert len(commands) == 8
    for _, script, *rest in commands:
        more = ["--batch", "2"] if script == "train.py" else []
        said = call(script, *(fewer.get(word, word) for word in rest), *more)
    assert "1 of 1 videos measured" in said and (tmp_path / "out/real/report.html").exists()
    with pytest.raises(UserError, match="film0000.mp4 exists: choose another --out"):
        call("data.py", "toy", "--out", "films/test", "--films", 4)
    rows = read_lines(tmp_path / "people/manifest.jsonl")
    people = {}
    for row in rows:  # nobody is taken for another
        people.setdefault(row["identities"][0]["id"], set()).add(int(row["source"][4:8]) % 16)
    assert len(rows) > 8 and all(len(who) == 1 for who in people.values())
    views = rows[0]["identities"][0]["views"]
    refs = [f"{view}=people/{picture['image']}" for view, picture in views.items()]
    call("sample.py", "--ckpt", "out/people", "--prompt", rows[0]["caption"], "--refs", *refs,
         "--out", "video")
    assert Image.open(tmp_path / "video.png").width > 600
    case, = read_lines(tmp_path / "cases.jsonl")  # a film of the person itself is like its pictures
    source = next(row for row in read_lines(tmp_path / "others/manifest.jsonl")
                  if row["identities"][0]["id"] == case["people"][0])
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/case-001.mp4").write_bytes((tmp_path / "others" / source["video"]).read_bytes())
    call("eval.py", "real", "--cases", "cases.jsonl", "--videos", "videos", "--faces", "toy",
         "--out", "truth")
    person, = json.loads((tmp_path / "truth/cases_measured.jsonl").read_text())["people"]
    assert np.mean(person["face"]) > 0.7 and np.mean([a for a in person["alike"] if a is not None]) > 0.6


def test_captions_of_films_are_cut_where_the_toys_network_ends():
    assert toy.TEXT_LEN == CONFIGS["toy"].text_len
