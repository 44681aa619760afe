"""manifest.py: which lines are used and why others are not; clips as samples; what `data.py show` shows."""

import contextlib
import json
import random
import re

import av
import numpy as np
import pytest
import torch
from helpers import one_line
from PIL import Image
from test_pictures import damage, encode, gradient, noise

from rope import VIEWS
from support.script import UserError, read_text
from videos import manifest, toy
from videos.jobs import read_jobs
from videos.manifest import Names, Samples, find_videos, read_columns, read_manifest
from videos.pictures import read_frames, read_picture, to_bytes


def entry(**changes):
    person = {"id": "ann", "views": {"front": {"image": "refs/a.png", "cross": True}}}
    return {"video": "clips/a.mp4", "caption": "a woman nods", "identities": [person]} | changes


def views(**pictures):
    return entry(identities=[{"id": "ann", "views": pictures}])


@pytest.fixture
def folder(tmp_path):
    """Files of the names that entry() has; what is in them does not matter to read_manifest."""
    for name in ("clips/a.mp4", "refs/a.png", "clips/gelb und grün 黄.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def write(folder, *lines, end="\n"):
    text = end.join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "manifest.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))


# --------------------------------------------------------------------------------------- which lines are used
@pytest.mark.parametrize("text", [
    "{0}\n{1}\n", "{0}\n{1}", "\ufeff{0}\n{1}\n", "{0}\r\n{1}\r\n", "\ufeff{0}\r\n\r\n  \r\n{1}",
    "\n\n{0}\n\n{1}\n\n"])
def test_lines_are_read_whatever_ends_them(text, folder, capsys):
    entries = [entry(caption="one\u2028line\x85of \u00fc"), entry(fps=16, frames=81, sha256="x", source="y")]
    write(folder, text.format(*(json.dumps(e, ensure_ascii=False) for e in entries)))
    assert read_manifest(folder) == entries == read_manifest(str(folder))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("escaped", [True, False])
def test_names_in_any_language_are_found(escaped, folder):
    named = entry(video="clips/gelb und grün 黄.mp4", caption="Bär")
    write(folder, json.dumps(named, ensure_ascii=escaped))
    assert read_manifest(folder) == [named]


def test_other_keys_are_kept_and_people_may_be_many(folder):
    person = entry()["identities"][0]
    rich = entry(identities=[person | {"age": 3}, person], note=[1, {}])
    rich["identities"][0]["views"] = {v: {"image": "refs/a.png", "yaw": 3.0, "cross": False} for v in VIEWS}
    write(folder, rich)
    assert read_manifest(folder) == [rich]


def test_a_half_written_last_line_is_left_out_and_counted(folder, capsys):
    whole = json.dumps(entry())
    for length in range(1, len(whole), 7):
        write(folder, whole, whole[:length])
        assert read_manifest(folder) == [entry()]
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith(f"{folder}/manifest.jsonl line 2 left out: expected a JSON object, got ")
        assert said[1] == f"{folder}/manifest.jsonl: 1 lines read, 1 left out"


JUNK = {line: "expected a JSON object, got " for line in (
    "null", "[]", "3", '"x"', "x", '{"video": "clips/a.mp4"', "\0", "[" * 100_000,
    '{"video": 1' + "0" * 5000 + "}", "\ud800", json.dumps(entry()) + " {}")}
BAD = [  # a line, its reason
    ({}, "video: expected text, got nothing"), (entry(video=None), "video: expected text, got null"),
    (entry(video=3), "text, got 3"), (entry(video=["clips/a.mp4"]), r"text, got \[.clips/a.mp4"),
    (entry(video=""), "no such file"), (entry(video="clips"), "no such file"),
    (entry(video="clips/b.mp4"), "clips/b.mp4: no such file"),
    (entry(video="\ud800.mp4"), "video: expected text"), (entry(video="a\0b"), "no such file"),
    (entry(video="x" * 300), "too long|no such file"), (entry(video="x/" * 5000), "too long|no such file"),
    (entry(video="../a.mp4"), "leaves the folder"), (entry(video="clips/../../a.mp4"), "leaves the folder"),
    (entry(video="clips/../clips/a.mp4"), "leaves the folder"),
    (entry(video="/etc/passwd"), "leaves the folder"),
    (entry(video="//etc/passwd"), "leaves the folder"), (entry(video="~/a.mp4"), "no such file"),
    (entry(video="file:///etc/passwd"), "no such file"), (entry(video="http://x/a.mp4"), "no such file"),
    (entry(caption=None), "caption: expected text, got null"),
    (entry(caption=["x"]), "caption: expected text"), (entry(caption="\udcff"), "caption: expected text"),
    (entry(caption="a\0b"), "caption: expected text in UTF-8, got .a.u0000b"),
    ({"video": "clips/a.mp4", "identities": []}, "caption: expected text, got nothing"),
    ({"video": "clips/a.mp4", "caption": "x"}, "identities: expected a list of 1 to 2 people, got nothing"),
    *((entry(identities=x), "identities: expected a list of 1 to 2 people, got ") for x in (
        None, 3, "ann", {"ann": {}}, [], entry()["identities"] * 3)),
    (entry(identities=[None]), "identities 0: expected an object, got null"),
    *((entry(identities=[x]), "identities 0 views: expected pictures of a person, got ") for x in (
        {}, {"views": None}, {"views": []}, {"views": {}})),
    (views(side={"image": "refs/a.png"}), "view 'side'; expected front, left, right, back"),
    (views(**{"\ud800": {"image": "refs/a.png"}}), r"view '\\ud800'"),
    (views(front=None), "views front: expected an object, got null"),
    (views(front="refs/a.png"), "expected an object, got \"refs/a.png\""),
    *((views(front=x), "views front image: expected a file name, got ") for x in (
        {}, {"image": None}, {"image": 3}, {"image": ["refs/a.png"]})),
    (views(front={"image": "refs/a.png", "cross": "false"}), "cross: expected true or false, got .false"),
    (views(front={"image": ""}), "no such file"), (entry(), "it is line 1 again"),
    (dict(reversed(entry().items())), "it is line 1 again"),
    (views(front={"image": "refs/b.png"}), "refs/b.png: no such file"),
    (views(front={"image": "refs/\ud83d.png"}), "expected a file name"),
    (views(front={"image": "../a.png"}), "leaves the folder"),
    (views(front={"image": "/a.png"}), "leaves the folder"),
    (views(front={"image": "x" * 300}), "too long|no such file"),
    (views(front={"image": "refs/a.png"}, left={"image": "/etc/passwd"}), "leaves the folder"),
]


@pytest.mark.parametrize("line, reason", [*JUNK.items(), *BAD], ids=lambda value: ascii(value)[:60])
def test_a_line_that_cannot_be_used_has_a_reason_and_the_rest_is_read(line, reason, folder, capsys):
    write(folder, entry(), line, entry(caption="last"))
    assert [e["caption"] for e in read_manifest(folder)] == ["a woman nods", "last"]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and re.search(f"^{folder}/manifest.jsonl line 2 left out: .*({reason})", said[0])
    assert len(said[0]) <= 300 and said[1].endswith("manifest.jsonl: 2 lines read, 1 left out")
    "".join(said).encode()  # it can be printed


def test_bytes_that_are_no_text_cost_their_line_alone(folder, capsys):
    good, other = (json.dumps(line).encode() for line in (entry(), entry(caption="other")))
    (folder / "manifest.jsonl").write_bytes(good + b"\n\xff\xfe\0\n" + other + b"\n" + good[:-3] + b"\xff")
    assert read_manifest(folder) == [entry(), entry(caption="other")]
    assert "2 lines read, 2 left out" in capsys.readouterr().out


def test_fuzzed_manifests_never_surprise(folder, capsys):
    rng, whole = random.Random(0), json.dumps(entry()).encode()
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 2, 8))):
            content[rng.randrange(len(content))] = rng.choice(b'"{}[],:0/.\\\xff\nun')
        (folder / "manifest.jsonl").write_bytes(content + b"\n" + whole + b"\n")
        found = read_manifest(folder)
        assert manifest.name_of(found[-1]) == manifest.name_of(entry())
        Samples(folder, [(32, 32)], [5], 16)  # no key that it reads may be missing
    capsys.readouterr().out.encode()


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"x\ny\n", b"{}\n[]\nnull\n"])
def test_all_lines_bad_is_one_line(content, folder):
    (folder / "manifest.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="manifest.jsonl holds no line that can be used") as error:
        read_manifest(folder)
    assert one_line(error)


@pytest.mark.parametrize("there", ["nothing", "folder"])
def test_no_manifest_is_one_line_that_says_who_writes_one(there, tmp_path):
    if there == "folder":
        (tmp_path / "manifest.jsonl").mkdir()
    with pytest.raises(UserError, match="manifest.jsonl: no such file; curate.py writes one") as error:
        read_manifest(tmp_path)
    assert one_line(error)


def test_the_folder_of_an_encoded_set_is_told_from_its_manifests(tmp_path):
    (tmp_path / "encoded").mkdir()
    (tmp_path / "encoded/settings.json").write_text("{}")
    says = f"encoded is an encoded set, expected the folder of its manifest, by default {tmp_path}$"
    with pytest.raises(UserError, match=says) as error:
        read_manifest(tmp_path / "encoded")
    assert one_line(error)


# ---------------------------------------------------------------------------------------------------- samples
def videos(folder, **kinds):
    """A manifest of videos: name -> (frames, height, width)."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (20, 40), "red").save(folder / "front.png")
    lines = []
    for name, (frames, height, width) in kinds.items():
        encode(folder / f"{name}.mp4", gradient(frames, height, width))
        lines.append(views(front={"image": "front.png"}, left={"image": "front.png", "cross": True}))
        lines[-1] |= {"video": f"{name}.mp4", "caption": name}
    write(folder, *lines)


def test_a_clip_gets_the_nearest_size_and_the_most_frames(tmp_path):
    videos(tmp_path, wide=(16, 64, 112), square=(9, 64, 64), tall=(21, 112, 64), almost=(8, 64, 76))
    sizes = [(32, 56), (48, 48), (56, 32)]
    found = {s.caption: s for s in Samples(tmp_path, sizes, [13, 5, 9], 16)}
    shapes = {name: tuple(sample.read_video().shape) for name, sample in found.items()}
    assert shapes == {"wide": (3, 13, 32, 56), "square": (3, 9, 48, 48), "tall": (3, 13, 56, 32),
                      "almost": (3, 5, 48, 48)}
    for name, sample in found.items():  # its pictures have its size
        (person,), (cross,) = sample.people, sample.cross
        assert list(person) == list(cross) == ["front", "left"] and cross == {"front": False, "left": True}
        assert person["front"]().shape[1:] == shapes[name][2:]
        assert sample.source == f"{name}.mp4" and re.fullmatch("[0-9a-f]{20}", sample.name)
    assert len({sample.name for sample in found.values()}) == 4


def test_shapes_are_compared_as_ratios(tmp_path):
    """Twice as wide is as far from a square as twice as high is."""
    videos(tmp_path, wide=(5, 32, 44), tall=(5, 44, 32))
    for sizes in ([(32, 32), (32, 64)], [(32, 32), (64, 32)]):
        assert [s.read_video().shape[2:] for s in Samples(tmp_path, sizes, [5], 16)] == [(32, 32)] * 2


def test_frames_and_pictures_are_those_of_the_files(tmp_path):
    videos(tmp_path, a=(9, 64, 96))
    sample, = Samples(tmp_path, [(64, 96)], [5], 16)
    video = sample.read_video()
    assert video.abs().max() <= 1 and video.dtype == torch.float32
    for f, frame in zip(range(5), read_frames(tmp_path / "a.mp4", 16)):
        assert np.array_equal(to_bytes(video[:, f]).permute(1, 2, 0).numpy(), frame)
    assert torch.equal(sample.people[0]["front"](), read_picture(tmp_path / "front.png", (64, 96)))
    # half the rate, every second frame; and where the shape differs, the middle
    half, = Samples(tmp_path, [(64, 96)], [5], 8)
    assert torch.equal(half.read_video()[:, 1], video[:, 2])
    middle = Samples(tmp_path, [(64, 64)], [5], 16)[0].read_video()
    assert float((middle - video[..., 16:80]).abs().mean()) < 0.01


def test_a_name_is_its_lines_own(tmp_path):
    videos(tmp_path, a=(5, 32, 32))
    line = read_manifest(tmp_path)[0]
    again = dict(reversed(line.items()))  # the same in another order
    write(tmp_path, line, again, line | {"caption": "b"})
    names = [sample.name for sample in Samples(tmp_path, [(32, 32)], [5], 16)]
    assert names[0] == names[1] != names[2]
    write(tmp_path, again)
    assert Samples(tmp_path, [(32, 32)], [5], 16)[0].name == names[0]


@pytest.mark.parametrize("kind, says", [
    ("short", "8 frames at 16 a second, expected at least 9"), ("damaged", "damaged, as the decoder says"),
    ("text", "damaged or no video"), ("tiny", "too small"), ("picture", "front.png: not a readable picture"),
    ("small picture", "front.png: 15 x 40 pixels, expected at least 16 a side")])
def test_what_cannot_be_read_is_an_error_when_it_is_read(kind, says, tmp_path):
    videos(tmp_path, a=(8 if kind == "short" else 17, 64, 64))
    path = tmp_path / "a.mp4"
    if kind == "damaged":
        encode(path, noise(17))
        damage(path)
    if kind == "text":
        path.write_text("x")
    if kind == "tiny":
        encode(path, gradient(9, 8, 8))
    if kind == "picture":
        (tmp_path / "front.png").write_text("x")
    if kind == "small picture":
        Image.new("RGB", (15, 40)).save(tmp_path / "front.png")
    sample, = Samples(tmp_path, [(64, 64)], [9, 17], 16)
    with pytest.raises(UserError, match=says) as error:
        sample.people[0]["front"]()
        sample.read_video()
    assert one_line(error)


# ---------------------------------------------------------------------------------------------------- showing
def test_show_counts_and_writes_a_sheet(tmp_path, capsys):
    (tmp_path / "world").mkdir()
    toy.write_samples(tmp_path / "world", 32, 9, 8)
    capsys.readouterr()
    manifest.show(tmp_path / "world", 2, tmp_path / "show.png")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "4 clips, 4 identities; clips by number of people: {1: 2, 2: 2}"
    assert said[1] == "references: 6 front, 6 left, 6 right, 6 back; 24 of 24 from another clip than theirs"
    assert said[2:] == [str(tmp_path / "show.png")]
    with Image.open(tmp_path / "show.png") as sheet:  # two people, eight frames of them, and words
        assert sheet.format == "PNG" and sheet.width > 2 * 224 + 8 * 448 and sheet.height > 224
        for x in (6, 6 + 448 + 6, sheet.width - 448):
            assert len(sheet.crop((x, 6, x + 448, 230)).convert("P").getcolors()) > 20


def test_show_makes_a_page_of_clips_spread_over_the_set(tmp_path, capsys):
    """Twenty of 39, the first and the last among them; one of those cannot be read."""
    world = tmp_path / "world"
    videos(world, a=(5, 32, 32), b=(5, 32, 64))
    pair = read_manifest(world)
    lines = [pair[0] | {"caption": f"clip {n}"} for n in range(38)] + [pair[1]]
    (world / "text.mp4").write_text("no video")
    write(world, *lines[:2], pair[0] | {"video": "text.mp4"}, "no line", *lines[3:])
    groups = manifest.show(world, None, tmp_path / "show.png")
    (key, places), = groups.items()
    assert key == (None, ((("front", False), ("left", True)),)) and list(places) == list(range(39))
    said = capsys.readouterr().out.splitlines()
    assert "line 4 left out" in said[0] and said[2].startswith("39 clips, 1 identities")
    assert said[-2] == f"clip 2 cannot be shown: {world}/text.mp4: damaged or no video (InvalidDataError)"
    with Image.open(tmp_path / "show.png") as sheet:
        assert sheet.height == 19 * (112 + 17 + 12) + 6 and sheet.width >= 6 + 112 + 5 * 224


def test_show_counts_people_of_any_name(tmp_path, capsys):
    videos(tmp_path, a=(5, 32, 32), b=(5, 32, 32), c=(5, 32, 32), d=(5, 32, 32))
    lines = read_manifest(tmp_path)
    for line, name in zip(lines, (["list"], {"a": 1}, None, ["list"]), strict=True):
        line["identities"][0]["id"] = name
    del lines[2]["identities"][0]["views"]["left"]
    write(tmp_path, *lines)
    manifest.show(tmp_path, 0, tmp_path.with_name("show.png"))
    said = capsys.readouterr().out
    assert said.startswith("4 clips, 3 identities; clips by number of people: {1: 4}\n")
    assert "4 front, 3 left, 0 right, 0 back; 3 of 7 from another clip" in said


@pytest.mark.parametrize("kind, says", [
    ("index", "--index 1: the set has 1 clips, from 0 on"),
    ("damaged", "a.mp4: damaged, as the decoder says"), ("text", "a.mp4: damaged or no video"),
    ("picture", "front.png: not a readable picture"),
    ("video as out", "a.mp4: expected a file name that ends in .png"),
    ("picture as out", "front.png lies in .*, among the set's own files"),
    ("manifest as out", "manifest.jsonl: expected a file name that ends in .png"),
    ("link as out", "link.png lies in .*, among the set's own files"),
    ("new as out", "new.png lies in .*, among the set's own files"),
    ("linked as out", "front.png is one of the inputs and would be overwritten"),
    ("source as out", "b.png lies in .*source, among the set's own files"),
    ("text as out", "x.png: expected a file name that ends in .png")])
def test_what_cannot_be_shown_is_one_line_that_names_it(kind, says, tmp_path):
    world, linked = tmp_path / "world", tmp_path / "linked"
    videos(world, a=(17, 64, 64))
    linked.mkdir()
    (linked / "b.png").write_text("x")
    (world / "source").symlink_to(linked)
    if kind == "linked as out":  # a reference behind a link, which the sheet would replace
        (world / "front.png").rename(tmp_path / "front.png")
        (world / "front.png").symlink_to(tmp_path / "front.png")
    if kind == "damaged":
        encode(world / "a.mp4", noise(17))
        damage(world / "a.mp4")
    if kind in ("text", "picture"):
        (world / {"text": "a.mp4", "picture": "front.png"}[kind]).write_text("x")
    (tmp_path / "link.png").symlink_to(world / "front.png")
    (tmp_path / "x.png").symlink_to(tmp_path / "x.txt")
    out = {"video": "world/a.mp4", "picture": "world/front.png", "manifest": "world/manifest.jsonl",
           "link": "link.png", "new": "world/new.png", "source": "linked/b.png", "text": "x.png",
           "linked": "front.png"}
    out = out[kind.split()[0]] if kind.endswith("as out") else "show.png"

    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = files()
    with pytest.raises(UserError, match=says) as error:
        manifest.show(world, int(kind == "index"), tmp_path / out)
    assert one_line(error) and files() == before


def test_clips_without_a_caption_are_read_and_counted(folder, capsys):
    write(folder, entry(), entry(caption=""), entry(caption=" "))
    assert [e["caption"] for e in read_manifest(folder)] == [entry()["caption"], "", " "]
    assert "2 of 3 clips have no caption and will train without one" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- texts, tables, names
WORDS = {"Latin": "a woman nods, über", "Cyrillic": "женщина кивает", "Chinese": "一个女人 点头\n在笑",
         "one": "x"}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
@pytest.mark.parametrize("form", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_text_is_read_as_it_was_written(words, form, tmp_path, capsys):
    for text in (words, f"{words}\n"):
        (tmp_path / "a.txt").write_bytes(text.replace("\n", "\r\n").encode(form))
        assert read_text(tmp_path / "a.txt") == text
    assert capsys.readouterr().out == ("" if "8" in form else f"{tmp_path}/a.txt: read as {form.upper()}\n")


@pytest.mark.parametrize("data, says", [
    ("женщина".encode("cp1251"), "line 1 is not UTF-8; .*CP1251: 'женщина'.* iconv -f CP1251 -t UTF-8 a.txt"),
    ("one\nün".encode("cp1252"), "line 2 is not UTF-8"),
    ("女人在笑".encode("gb18030"), "GB18030: '女人在笑'"),
    ("a woman".encode("utf-16")[:-1], "UTF-16, cut short"), (bytes(range(256)), "is not UTF-8"),
    (b"\xff\xd8\xff\xe0\0\x10JFIF\0\x01", "is not UTF-8")])
def test_a_text_that_cannot_be_told_is_refused_in_one_line(data, says, tmp_path):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=f"a.txt: not a readable text file.*{says}") as error:
        read_text(tmp_path / "a.txt")
    assert one_line(error)


@pytest.mark.parametrize("form", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_a_manifest_that_an_editor_saved_is_read(form, folder):
    lines = "\r\n".join(json.dumps(entry(caption=words), ensure_ascii=False) for words in WORDS.values())
    (folder / "manifest.jsonl").write_bytes(lines.encode(form))
    assert [e["caption"] for e in read_manifest(folder)] == list(WORDS.values())


def test_a_caption_in_an_old_code_page_costs_its_line(folder, capsys):
    lines = [json.dumps(entry(caption="женщина"), ensure_ascii=False).encode("cp1251"),
             json.dumps(entry()).encode()]
    (folder / "manifest.jsonl").write_bytes(b"\n".join(lines))
    assert read_manifest(folder) == [entry()]
    assert "line 1 left out: caption: expected text in UTF-8" in capsys.readouterr().out


NAMES = {  # in the table, on disk, is it found
    "NFC of NFD": ("J\u00f6rg.mp4", "Jo\u0308rg.mp4", True),
    "NFD of NFC": ("Jo\u0308rg.mp4", "J\u00f6rg.mp4", True),
    "Windows": ("sub\\a.mp4", "sub/a.mp4", True), "Windows' own folder": (".\\a.mp4", "a.mp4", True),
    "capitals": ("Sub/A.mp4", "sub/a.MP4", True), "a dot": ("./a.mp4", "a.mp4", True),
    "a backslash on disk": ("a\\b.mp4", "a\\b.mp4", True), "elsewhere": ("b/a.mp4", "a.mp4", False),
    "above": ("..\\a.mp4", "a.mp4", False), "another": ("b.mp4", "a.mp4", False),
    "NUL": ("a\0.mp4", "a.mp4", False),
    "a drive": ("C:\\a.mp4", "a.mp4", False), "empty": ("", "a.mp4", True)}


@pytest.mark.parametrize("given, there, found", NAMES.values(), ids=NAMES)
def test_names_in_tables_find_their_files(given, there, found, tmp_path):
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).touch()
    if found:
        assert (tmp_path / Names(tmp_path).find(given)).exists()
        full = f"{tmp_path}/{given}"
        assert (tmp_path / Names(tmp_path).find(full)).exists()
    else:
        assert Names(tmp_path).find(given) == given


def test_of_two_that_are_alike_none_is_taken(tmp_path):
    for name in ("A.mp4", "a.MP4", "b.mp4", "B.mp4"):
        (tmp_path / name).touch()
    names = Names(tmp_path)
    assert names.find("a.mp4") == "a.mp4" and names.find("B.mp4") == "B.mp4"


def test_columns_that_are_known_decide_on_the_separator():
    text = "a,b,c;video,x;text\n1;v.mp4;one, two\n"
    assert read_columns(text) == [{"a,b,c": "1", "video,x": "v.mp4", "text": "one, two"}]
    assert read_columns("video\tx;y;z\na.mp4\t1\n") == [{"video": "a.mp4", "x;y;z": "1"}]
    assert read_columns("") == [] and read_columns("video\na.mp4\n") == [{"video": "a.mp4"}]


def test_a_folder_of_videos(tmp_path):
    for name in ("b.mp4", "a/C.MP4", "x.m2ts", "y.3gp", "b_mask.mp4", "only_mask.mov", ".h/a.mp4", "._b.mp4",
                 "readme", "b.txt", "metadata.csv", "notes.txt", "p.jpg", "q.jpg", "z.mp4/in.mts", "v.vob"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "same.mp4").symlink_to("b.mp4")
    (tmp_path / "broken.mp4").symlink_to("nothing")
    names, passed = find_videos(tmp_path)
    assert names == sorted(("b.mp4", "a/C.MP4", "x.m2ts", "y.3gp", "only_mask.mov", "z.mp4/in.mts", "v.vob",
                            "same.mp4"))
    assert passed == {"hidden": 2, "links to folders": 1, "without a suffix": 1, ".jpg": 2, ".txt": 1,
                      "broken links, pipes": 1}


@pytest.mark.parametrize("form", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_prompts_that_an_editor_saved_are_read(form, tmp_path):
    lines = [json.dumps({"prompt": words, "seed": 3}, ensure_ascii=False) for words in WORDS.values()]
    (tmp_path / "jobs.jsonl").write_bytes("\r\n".join(lines).encode(form))
    assert [job.prompt for job in read_jobs(tmp_path / "jobs.jsonl", 0)] == list(WORDS.values())


@pytest.mark.parametrize("suffix, form, codec", [
    (".3gp", "3gp", "h264"), (".MTS", "mpegts", "h264"), (".m2ts", "mpegts", "h264"),
    (".VOB", "vob", "mpeg2video"), (".mpeg", "mpeg", "mpeg1video"), (".m4v", "mp4", "mpeg4")])
def test_videos_of_cameras_and_discs_are_seen_and_read(suffix, form, codec, tmp_path):
    path = tmp_path / f"take:1{suffix}"  # a name that FFmpeg takes for an address
    with av.open(f"file:{path}", "w", format=form) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for n in range(10):
            picture = np.full((48, 64, 3), 20 * n, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    assert find_videos(tmp_path) == ([path.name], {})
    assert len(list(read_frames(path, 25))) in (9, 10)
    with contextlib.chdir(tmp_path):
        assert len(list(read_frames(path.name, 25))) in (9, 10)


def test_a_first_header_may_be_empty():
    """As pandas writes its row numbers."""
    rows = read_columns("\tvideo\tcaption\n0\ta.mp4\ta man walks\n")
    assert rows == [{"": "0", "video": "a.mp4", "caption": "a man walks"}]


@pytest.mark.parametrize("settings", [
    {"train": {"steps": 3}, "model": {}}, {"name": "my set", "author": "x"}])
def test_settings_of_a_program_are_no_table(settings, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="not a list of rows"):
        manifest.read_rows(tmp_path / "config.json")
    rows = {"a.mp4": "one", "b.MOV": {"caption": "two"}, "c": {"video": "c.mp4"}}
    (tmp_path / "metadata.json").write_text(json.dumps(rows))
    videos = [row["video"] for _, row in manifest.read_rows(tmp_path / "metadata.json")]
    assert videos == ["a.mp4", "b.MOV", "c.mp4"]
