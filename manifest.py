"""Manifests of real videos: who is in a clip, and which pictures show each of them from which side.

A manifest is DIR/manifest.jsonl: {"video": "clips/a.mp4", "caption": "...", "identities": [{"id": "ann",
"views": {"front": {"image": "refs/a_front.png", "cross": true}}}]} a line, people in the caption's order.
Other keys are kept and not read; cross: the picture is from another clip. Paths stay below DIR. curate.py
writes one, and `python data.py import`; `python data.py encode` reads it.
"""
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

from checkpoint import (UserError, as_user_error, atomic_file, check_outputs, fingerprint, is_text,
                        probe_writable)
from pictures import Job, contact_sheet, from_bytes, read_frames, read_picture, watch_decoder
from rope import VIEWS


PEOPLE = 2  # most people of a clip, as many as a network here tells apart
SIDE = 16  # least side of a reference in pixels


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


def read_manifest(folder):
    """Lines of a folder's manifest.jsonl; prints the reason of each that is left out, and how many."""
    path = Path(folder) / "manifest.jsonl"
    if not path.is_file():
        if (path.parent / "settings.json").is_file():
            raise UserError(f"{folder} is an encoded set, expected the folder of its manifest, by default "
                            f"{Path(os.path.abspath(folder)).parent}")
        raise UserError(f"{path}: no such file; curate.py writes one, and `python data.py import`")
    entries, skipped, lines = [], 0, {}
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    for n, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                raise ValueError(f"expected a JSON object, got {line[:60]!r}") from None
            check_entry(entry, path.parent)
            first = lines.setdefault(name_of(entry), n)
            if first < n:
                raise ValueError(f"it is line {first} again")
            entries.append(entry)
        except (ValueError, RecursionError) as error:
            reason = " ".join(f"{path} line {n} left out: {error}".split())[:300]
            print(reason.encode(errors="replace").decode())  # a lone surrogate cannot be printed
            skipped += 1
    if skipped:
        print(f"{path}: {len(entries)} lines read, {skipped} left out")
    if silent := sum(not entry["caption"].strip() for entry in entries):
        print(f"{path}: {silent} of {len(entries)} clips have no caption and will train without one")
    if not entries:
        raise UserError(f"{path} holds no line that can be used")
    return entries


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
    people, paths = entry.get("identities"), [entry["video"]]
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
            paths.append(picture["image"])
    for path in paths:
        if os.path.isabs(path) or ".." in Path(path).parts:
            raise ValueError(f"{path[:99]} leaves the folder")
        if not os.path.isfile(folder / path):  # unlike Path's, False for any name
            raise ValueError(f"{path[:99]}: no such file")


def name_of(entry):
    """A name for what is encoded of a line; what else it says, as of similarity, may change."""
    pictures = [sorted((view, picture["image"]) for view, picture in person["views"].items())
                for person in entry["identities"]]
    return fingerprint(entry["video"], entry["caption"], pictures)


def samples_of(folder, sizes, frames, fps):
    """A manifest's lines as Samples of the nearest of `sizes` [(H, W)] and the most of `frames` that fit."""
    return [sample_of(entry, Path(folder), sizes, sorted(frames), fps) for entry in read_manifest(folder)]


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
        return lambda: read_picture(folder / image, size(), SIDE)
    people, cross = [], []
    for person in entry["identities"]:
        people.append({view: reader(picture["image"]) for view, picture in person["views"].items()})
        cross.append({view: bool(picture.get("cross")) for view, picture in person["views"].items()})
    files = [path, *(folder / who["views"][view]["image"] for who in entry["identities"]
                     for view in sorted(who["views"]))]
    stamp = ", ".join(f"{found.st_size} {found.st_mtime_ns}" for found in map(os.stat, files))
    ids = [person.get("id") for person in entry["identities"]]
    return Sample(name_of(entry), entry["video"], entry["caption"], read_video, people, cross, ids, stamp)


def show(folder, number, out):
    """Print what a manifest's set holds, and write a contact sheet of one of its clips to `out`; returns the
    lines."""
    real = out.resolve()
    if real.suffix != ".png" or out.suffix != ".png":
        raise UserError(f"--out {out}: expected a file name that ends in .png")
    for base in (Path(folder), Path(folder) / "source"):
        if real.is_relative_to(base.resolve()):
            raise UserError(f"--out {out} lies in {base}, among the set's own files: choose another --out")
    entries = read_manifest(folder)
    if number >= len(entries):
        raise UserError(f"--index {number}: the set has {len(entries)} clips, from 0 on")
    views, identities, pictures = collections.Counter(), set(), []
    for entry in entries:
        for person in entry["identities"]:
            identities.add(str(person.get("id")))
            views.update(person["views"].keys())
            pictures += person["views"].values()
    people = collections.Counter(len(entry["identities"]) for entry in entries)
    cross = sum(bool(picture.get("cross")) for picture in pictures)
    print(f"{len(entries)} clips, {len(identities)} identities; clips by number of people: {dict(people)}\n"
          f"references: {', '.join(f'{views[view]} {view}' for view in VIEWS)}; {cross} of {len(pictures)} "
          "from another clip than theirs")
    entry = entries[number]
    path = Path(folder) / entry["video"]
    probe_writable(out.parent)
    check_outputs([out], [path])
    with as_user_error(path), watch_decoder():
        frames = np.stack(list(itertools.islice(read_frames(path, 16, 480), 81)))
    video = from_bytes(torch.from_numpy(frames)).permute(3, 0, 1, 2)
    references = []
    for person in entry["identities"]:
        references.append({view: read_picture(Path(folder) / picture["image"], video.shape[2:], SIDE)
                           for view, picture in person["views"].items()})
    names = ", ".join(str(person.get("id")) for person in entry["identities"])
    job = Job(entry["caption"], references, video=video, note=f" ({entry['video']}; {names})")
    with atomic_file(out) as temporary:
        contact_sheet([job], 224).save(temporary, "PNG")
    print(f"{entry['video']}: {entry['caption']}\n{out}")
    return entries
