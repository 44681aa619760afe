"""Manifests of real videos: who is in a clip, and which pictures show each of them from which side.

A manifest is DIR/manifest.jsonl: {"video": "clips/a.mp4", "caption": "...", "identities": [{"id": "ann",
"views": {"front": {"image": "refs/a_front.png", "cross": true}}}]} a line, people in the caption's order.
Other keys are kept and not read; cross: the picture is from another clip. Paths stay below DIR. curate.py
writes one, and `python data.py import`; `python data.py encode` reads it.
"""
import array
import collections
import functools
import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from checkpoint import (Lines, UserError, as_user_error, atomic_file, check_outputs, fingerprint, is_text,
                        probe_writable)
from pictures import Job, contact_sheet, from_bytes, read_frames, read_picture, watch_decoder
from rope import VIEWS


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
    return Lines(path)


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

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, place):
        path, line = self.lines.path, self.lines[place]
        try:
            return sample_of(read_line(line, path.parent), path.parent, *self.how)
        except ValueError as error:
            raise UserError(printable(f"{path} line {self.lines.numbers[place]}: {error}")) from None


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
