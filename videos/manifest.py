"""Manifests of real videos: who is in a clip, and which pictures show each of them from which side.

A manifest is DIR/manifest.jsonl: {"video": "clips/a.mp4", "caption": "...", "identities": [{"id": "ann",
"views": {"front": {"image": "refs/a_front.png", "cross": true}}}]} a line, people in the caption's order.
Other keys are kept and not read; cross: the picture is from another clip. Paths stay below DIR. curate.py
writes one, and `python data.py import`; `python data.py encode` reads it.
"""
import array
import collections
import contextlib
import csv
import functools
import io
import itertools
import json
import math
import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from rope import VIEWS
from support.script import (Lines, UserError, as_user_error, atomic_file, check_outputs, encoding_of,
                            fingerprint, is_text, probe_writable, read_text)
from videos.jobs import Job, contact_sheet
from videos.pictures import VIDEOS, from_bytes, read_frames, read_picture, watch_decoder


PEOPLE = 2  # most people of a clip, as many as a network here tells apart


class Sample(NamedTuple):
    """A training sample before it is encoded. Pictures and videos are in -1..1."""
    name: str  # a hash of what is encoded: caption, file names
    source: str  # what messages call it
    caption: str
    read_video: Callable  # () -> [3, F, H, W]
    people: list  # {view: () -> picture [3, h, w]} per person
    cross: list  # {view: is it from another clip} per person
    ids: list  # who the people are; None where nobody said
    stamp: str = ""  # of its files: another one where they were replaced


def lines_of(folder):
    """The Lines of a folder's manifest.jsonl."""
    path = Path(folder) / "manifest.jsonl"
    if not path.is_file():
        if (path.parent / "settings.json").is_file():
            raise UserError(f"{folder} is an encoded set, expected the folder of its manifest, by default "
                            f"{Path(os.path.abspath(folder)).parent}")
        raise UserError(f"{path}: no such file; curate.py writes one, and `python data.py import`")
    with open(path, "rb") as file:
        is_utf8 = encoding_of(file.read(2**16)) == "UTF-8"
    return Lines(path, None if is_utf8 else read_text(path))


def read_line(line, folder):
    """A line of a manifest, bytes -> its object. Raises ValueError with the reason why it cannot be used."""
    text = line.decode("utf-8-sig", "replace")
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"expected a JSON object, got {text.strip()[:60]!r}") from None
    check_entry(entry, Path(folder))
    return entry


def entries_of(folder):
    """Yield (place among the lines, object) of a manifest's lines that can be used; print the reason of each
    other one, and at the end how many."""
    lines, names, silent = lines_of(folder), {}, 0
    for place, line in enumerate(lines):
        try:
            entry = read_line(line, folder)
            first = names.setdefault(name_of(entry), place)
            if first < place:
                raise ValueError(f"it is line {lines.numbers[first]} again")
            silent += not entry["caption"].strip()
            yield place, entry
        except (ValueError, RecursionError) as error:
            reason = f"{lines.path} line {lines.numbers[place]} left out: {error}"
            print(printable(reason))
    if len(names) < len(lines):
        print(f"{lines.path}: {len(names)} lines read, {len(lines) - len(names)} left out")
    if silent:
        print(f"{lines.path}: {silent} of {len(names)} clips have no caption and will train without one")
    if not names:
        raise UserError(f"{lines.path} holds no line that can be used")


def printable(reason):
    """One line, not too long; a lone surrogate cannot be printed."""
    return " ".join(reason.split())[:300].encode(errors="replace").decode()


def read_manifest(folder):
    """The objects of a folder's manifest.jsonl; prints the reason of each line that is left out."""
    return [entry for _, entry in entries_of(folder)]


def check_entry(entry, folder):
    """Raise ValueError where a line of a manifest cannot be used: what was expected, and what came."""
    def expect(holds, expected, *keys):
        if not holds:
            came = entry
            for key in keys:
                came = came.get(key, ...) if isinstance(came, dict) else came[key]
            came = "nothing" if came is ... else json.dumps(came)[:60]
            raise ValueError(f"{' '.join(map(str, keys))}: expected {expected}, got {came}")

    if not isinstance(entry, dict):
        raise ValueError(f"expected a JSON object, got {json.dumps(entry)[:60]}")
    for key in ("video", "caption"):
        expect(is_text(entry.get(key)), "text", key)
    expect(not re.search("[\0\ufffd]", entry["caption"]), "text in UTF-8", "caption")
    people = entry.get("identities")
    expect(isinstance(people, list) and 1 <= len(people) <= PEOPLE, f"a list of 1 to {PEOPLE} people",
           "identities")
    for k, person in enumerate(people):
        expect(isinstance(person, dict), "an object", "identities", k)
        views = person.get("views")
        expect(isinstance(views, dict) and views, "pictures of a person", "identities", k, "views")
        for view, picture in views.items():
            if view not in VIEWS:
                raise ValueError(f"view {view!r}; expected {', '.join(VIEWS)}")
            at = "identities", k, "views", view
            expect(isinstance(picture, dict), "an object", *at)
            expect(is_text(picture.get("image")), "a file name", *at, "image")
            expect(isinstance(picture.get("cross", False), bool), "true or false", *at, "cross")
    for path in paths_of(entry):
        if os.path.isabs(path) or ".." in Path(path).parts:
            raise ValueError(f"{path[:99]} leaves the folder")
        if not os.path.isfile(folder / path):  # unlike Path's, False for any name
            raise ValueError(f"{path[:99]}: no such file")


def paths_of(entry):
    """The files of a manifest's entry: its video, and its pictures by person and view."""
    return [entry["video"], *(person["views"][view]["image"] for person in entry["identities"]
                              for view in sorted(person["views"]))]


def name_of(entry):
    """A name for what is encoded of a line; what else it says, as of similarity, may change."""
    pictures = [sorted((view, picture["image"]) for view, picture in person["views"].items())
                for person in entry["identities"]]
    return fingerprint(entry["video"], entry["caption"], pictures)


class Samples:
    """A manifest's lines as Samples of the nearest of `sizes` [(H, W)] and the most of `frames` that fit. A
    line is read, and its files are looked for, when it is asked for; UserError where it cannot be used."""

    def __init__(self, folder, sizes, frames, fps):
        self.lines, self.how = lines_of(folder), (sizes, sorted(frames), fps)
        found = os.stat(self.lines.path)
        self.key = [found.st_size, found.st_mtime_ns]  # of the manifest as it is now

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, place):
        path, line = self.lines.path, self.lines[place]
        try:
            return sample_of(read_line(line, path.parent), path.parent, *self.how)
        except ValueError as error:
            raise UserError(printable(f"{path} line {self.lines.numbers[place]}: {error}")) from None


# ------------------------------------------------------------------------------------------- tables of a user
TABLES = (".csv", ".tsv", ".jsonl", ".json")
COLUMNS = {"video": ("video", "file_name", "video_path", "path"),
           "caption": ("caption", "prompt", "text", "cap"),
           "references": ("references", "refs", "reference_image", "image_path", "control_path")}


def find_tables(folder):
    return [path for path in sorted(folder.iterdir()) if path.suffix.lower() in TABLES
            and path.name[0] != "." and path.is_file()]


def read_rows(path):
    """A table of a user -> [(what messages call a row, the row or why it is none)]. A row is {column: value},
    its columns in small letters with _ for spaces. .csv and .tsv have any separator; .json is a list of rows
    or {video: its row or caption}."""
    kind = path.suffix.lower()
    with as_user_error(path):
        text = read_text(path)
        if kind in (".csv", ".tsv"):
            rows = read_columns(text)
        elif kind == ".jsonl":
            rows = [line for line in text.split("\n") if line.strip()]
        else:
            rows = json.loads(text)
            if isinstance(rows, dict) and rows and all(map(is_of_a_video, rows, rows.values())):
                rows = [{"caption": row, "video": name} if isinstance(row, str) else
                        row if set(COLUMNS["video"]) & set(map(fold, row)) else row | {"video": name}
                        for name, row in rows.items()]
            if not isinstance(rows, list):
                raise ValueError("not a list of rows")
    named = []
    for n, row in enumerate(rows, 1):
        try:
            row = json.loads(row) if kind == ".jsonl" else row
            if not isinstance(row, dict):
                raise ValueError("not an object")
            row = {fold(key): value for key, value in row.items()}
        except (ValueError, RecursionError) as error:
            row = ValueError(f"not a JSON object, perhaps cut short ({error})")
        named.append((f"{path.name} row {n}", row))
    return named


def is_of_a_video(name, row):
    """Do a key and its value in a .json say something of a video, and are not settings of a program."""
    of_its_own = isinstance(row, dict) and set(COLUMNS["video"]) & set(map(fold, row))
    return bool(of_its_own) or isinstance(row, (dict, str)) and Path(name).suffix.lower() in VIDEOS


def read_columns(text):
    """Text in columns -> rows. Its separator is the one that gives the first line most columns of COLUMNS, or
    else most columns: Excel takes what the language of its user writes numbers with."""
    text = re.sub(r"^[ \n]*(sep=.\n)?[ \n]*", "", text)  # a tab may be an empty first header, as of pandas

    def columns(separator):
        return next(csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True), [])
    known = set(itertools.chain(*COLUMNS.values()))
    best = max(",;\t|", key=lambda mark: (len(known & set(map(fold, columns(mark)))), len(columns(mark))))
    return list(csv.DictReader(io.StringIO(text, newline=""), restkey="further", delimiter=best,
                               skipinitialspace=True))


def fold(column):
    return re.sub(r"[\s_-]+", "_", column.strip().lower()) if isinstance(column, str) else column


def value_of(row, kind):
    """What a row says in the first of its COLUMNS of a kind that says anything, or None."""
    return next((row[key] for key in COLUMNS[kind] if row.get(key) not in (None, "")), None)


def check_columns(path, rows, *kinds):
    """UserError where a table of read_rows has no column of one of these kinds."""
    found = set().union(*(row.keys() for _, row in rows if isinstance(row, dict)))
    for kind in kinds:
        if found and not found & set(COLUMNS[kind]):
            there = ascii(", ".join(sorted(map(str, found))))[1:-1][:150]
            raise UserError(f"{path} has no column of {kind}s: it has {there}, expected one called "
                            f"{', '.join(COLUMNS[kind])}")


def find_videos(folder):
    """-> the relative paths of all videos below a folder, in order, and {why others are passed over: how
    many}. A mask, <stem>_mask beside <stem>, is none."""
    names, passed = [], collections.Counter()
    for here, below, files in os.walk(folder):
        passed["hidden"] += sum(name[0] == "." for name in (*below, *files))
        below[:] = [name for name in below if name[0] != "."]
        passed["links to folders"] += sum(os.path.islink(os.path.join(here, name)) for name in below)
        paths = [Path(here, name) for name in files if name[0] != "."]
        stems = {path.stem for path in paths if path.suffix.lower() in VIDEOS}
        for path in paths:
            suffix = path.suffix.lower()
            if suffix not in VIDEOS:
                if suffix not in TABLES and not (suffix == ".txt" and path.stem in stems):
                    passed[suffix or "without a suffix"] += 1
            elif not path.is_file():
                passed["broken links, pipes"] += 1
            elif not (path.stem.endswith("_mask") and path.stem.removesuffix("_mask") in stems):
                names.append(path.relative_to(folder).as_posix())
    return sorted(names), +passed


class Names:
    """Names in a user's table -> those that files below a folder have. Where no file has a name to the
    letter, it may have the separators of Windows, another Unicode form (macOS's) or other capitals, if one
    alone is alike."""

    def __init__(self, folder):
        self.folder, self.listed = Path(folder), {}

    @staticmethod
    def plain(name):
        return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())

    def listing(self, below):
        """{plain name: names} of what is in a folder below."""
        if below not in self.listed:
            found = self.listed[below] = {}
            with contextlib.suppress(OSError):
                for name in os.listdir(self.folder / below):
                    found.setdefault(self.plain(name), []).append(name)
        return self.listed[below]

    def find(self, name):
        """-> the file's name from the folder on, of a full path too; where there is none, as it came."""
        path = Path(name)
        for base in (self.folder.absolute(), self.folder.resolve()):
            path = path.relative_to(base) if path.is_relative_to(base) else path
        if os.path.lexists(self.folder / path):
            return path.as_posix()
        found = ""
        for part in re.split(r"[/\\]", path.as_posix().removeprefix(".\\")):
            alike = self.listing(found).get(self.plain(part), [])
            if part not in alike and len(alike) != 1:
                return path.as_posix()
            found = os.path.join(found, part if part in alike else alike[0])
        return found


def sample_of(entry, folder, sizes, frames, fps):
    path = folder / entry["video"]

    @functools.cache
    def size():
        """The size whose shape is nearest to the video's."""
        height, width = next(read_frames(path, fps)).shape[:2]
        return min(sizes, key=lambda hw: abs(math.log(hw[0] / hw[1] * width / height)))

    def read_video():
        target = size()[::-1]
        with watch_decoder():  # fitted one by one: 81 frames of 4K are 2 GB
            pictures = [np.asarray(ImageOps.fit(Image.fromarray(picture), target, Image.Resampling.LANCZOS))
                        for picture in itertools.islice(read_frames(path, fps), frames[-1])]
        most = max((n for n in frames if n <= len(pictures)), default=None)
        if most is None:
            raise UserError(f"{len(pictures)} frames at {fps} a second, expected at least {frames[0]}")
        return from_bytes(torch.from_numpy(np.stack(pictures[:most]))).permute(3, 0, 1, 2)

    def reader(image):
        return lambda: read_picture(folder / image, size())
    people, cross = [], []
    for person in entry["identities"]:
        people.append({view: reader(picture["image"]) for view, picture in person["views"].items()})
        cross.append({view: bool(picture.get("cross")) for view, picture in person["views"].items()})
    files = [os.stat(folder / name) for name in paths_of(entry)]
    stamp = ", ".join(f"{found.st_size} {found.st_mtime_ns}" for found in files)
    ids = [person.get("id") for person in entry["identities"]]
    return Sample(name_of(entry), entry["video"], entry["caption"], read_video, people, cross, ids, stamp)


def show(folder, number, out):
    """Print what a manifest's set holds, and write a contact sheet to `out`: of clip `number`, from 0 on, or
    where that is None, of 20 spread evenly over the set. Returns {(None, the views of each person): places
    of such lines}, as data.Sampler takes them."""
    real = out.resolve()
    if real.suffix != ".png" or out.suffix != ".png":
        raise UserError(f"--out {out}: expected a file name that ends in .png")
    for base in (Path(folder), Path(folder) / "source"):
        if real.is_relative_to(base.resolve()):
            raise UserError(f"--out {out} lies in {base}, among the set's own files: choose another --out")
    groups, identities, people, views, cross = {}, set(), collections.Counter(), collections.Counter(), 0
    places = array.array("q")
    for place, entry in entries_of(folder):
        persons = tuple(tuple((view, bool(picture.get("cross"))) for view, picture in person["views"].items())
                        for person in entry["identities"])
        groups.setdefault((None, persons), array.array("q")).append(len(places))
        places.append(place)
        people[len(persons)] += 1
        identities.update(fingerprint(person.get("id")) for person in entry["identities"])
        views.update(view for person in persons for view, _ in person)
        cross += sum(is_cross for person in persons for _, is_cross in person)
    if number is not None and number >= len(places):
        raise UserError(f"--index {number}: the set has {len(places)} clips, from 0 on")
    print(f"{len(places)} clips, {len(identities)} identities; clips by number of people: {dict(people)}\n"
          f"references: {', '.join(f'{views[view]} {view}' for view in VIEWS)}; {cross} of {views.total()} "
          "from another clip than theirs")
    probe_writable(out.parent)
    spread = dict.fromkeys(np.linspace(0, len(places) - 1, 20).round().astype(int).tolist())
    lines, jobs, reasons = lines_of(folder), [], []
    for index in spread if number is None else [number]:
        entry = read_line(lines[places[index]], folder)
        check_outputs([out], [Path(folder) / path for path in paths_of(entry)])
        try:
            jobs.append(job_of(entry, Path(folder), 112 if number is None else 480))
            jobs[-1].note = f" ({index}: {entry['video']}{jobs[-1].note})"
        except UserError as error:
            reasons.append(f"clip {index} cannot be shown: {error}")
    if not jobs:
        raise UserError(reasons[0])
    with atomic_file(out) as temporary:
        contact_sheet(jobs, 112 if number is None else 224).save(temporary, "PNG")
    print("\n".join([*reasons, str(out)]))
    return groups


def job_of(entry, folder, short_side):
    """A manifest's entry as a Job to show: at most 81 pictures of its clip, the people's names as note."""
    path = folder / entry["video"]
    with as_user_error(path), watch_decoder():
        frames = np.stack(list(itertools.islice(read_frames(path, 16, short_side), 81)))
    video = from_bytes(torch.from_numpy(frames)).permute(3, 0, 1, 2)
    references = [{view: read_picture(folder / picture["image"], video.shape[2:])
                   for view, picture in person["views"].items()} for person in entry["identities"]]
    names = ", ".join(str(person.get("id")) for person in entry["identities"])
    return Job(entry["caption"], references, video=video, note=f"; {names}")
