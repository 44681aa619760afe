"""Public multi-view sets and the folders of other trainers become manifests, without any face network.

  mead        one actor, seven cameras at once: identity and view are in the path
  nersemble   sixteen calibrated cameras: the view is a camera's azimuth
  folders     a table of videos, captions and references, or these beside each video
`python data.py import` runs it.
"""
import json
import math
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

from rope import VIEWS
from support.script import Parser, UserError, atomic_file, is_text, lock, nonempty, read_text, remove
from videos.manifest import (COLUMNS, Names, check_columns, check_entry, find_tables, find_videos, read_rows,
                             value_of)
from videos.pictures import open_video, read_picture, view_of, watch_decoder

# -------------------------------------------------------------------------------------------- sets of others
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
SWAP = {"left": "right", "right": "left"}


def import_set(kind, root, out, mirror=False):
    """Write out/manifest.jsonl for a set of one of KINDS in the folder `root`; returns the number of lines.

    Nothing of the set is copied: out/source is a link to it and the manifest's paths begin there, so sets on
    another disk and read-only ones will do. Of MEAD and NeRSemble, out/refs holds one frame of a take for
    each reference. A row with any fault is left out, with its reason.
    mirror  exchange left and right, for sets where they are the person's own
    """
    root, out = Path(root), Path(out)
    if not root.is_dir():
        raise UserError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}")
    if mirror and kind == "nersemble":
        raise UserError("--mirror: NeRSemble's calibration says what is left")
    inner, outer = out.resolve(), root.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise UserError(f"--out {out} and --root {root}: one lies in the other; choose another --out")
    held = {f.name for f in out.iterdir() if f.name[0] != "."} if out.is_dir() else set()
    others = sorted(held - {"manifest.jsonl", "refs", "source", "encoded"})
    if others or (held and (out / "source").resolve() != outer):
        what = others[0] if others else "what is from elsewhere"
        raise UserError(f"--out {out} holds {what}, expected nothing or an import of {root}: delete it, or "
                        "choose another")
    with lock(out):
        if not held:
            os.symlink(outer, out / "source", target_is_directory=True)
        try:
            return write_manifest(kind, root, out, mirror)
        except Exception:  # not Ctrl-C: what is made serves the next start
            if not held:  # else the right --root would be refused
                remove(out / "refs")
                remove(out / "source")
            raise


def write_manifest(kind, root, out, mirror):
    (out / "refs").mkdir(exist_ok=True)
    kept, left_out, notes, used, first = {}, 0, {}, set(), ""
    with atomic_file(out / "manifest.jsonl") as temporary, open(temporary, "w") as file:
        for name, row in KINDS[kind](root, out, mirror, notes):
            try:
                line = check_row(row, out, used)
                video = os.path.realpath(out / line["video"])
                if video in kept:
                    raise ValueError(f"its video is that of {kept[video]}")
            except ValueError as error:  # not OSError: that is of writing, as where the disk is full
                reason = f"{name if name.isprintable() else ascii(name)} is left out: {one_line(error)}"
                print(reason, file=sys.stderr)
                first, left_out = first or reason, left_out + 1
                continue
            kept[video] = name
            used |= {view["image"] for who in line["identities"] for view in who["views"].values()}
            file.write(f"{json.dumps(line)}\n")
        if not kept:
            raise UserError(f"no video of {root} is of use, {left_out} rows are left out"
                            f"{first and '; the first: '}{first[:300]}; is the set laid out like this? "
                            f"{one_line(KINDS[kind].__doc__)}")
    for old in (out / "refs").iterdir():
        if f"refs/{old.name}" not in used:
            remove(old)
    for note, names in notes.items():
        print(f"{note}: {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else ""))
    print(f"{len(kept)} videos, {left_out} rows left out: {out}/manifest.jsonl")
    return len(kept)


def one_line(text):
    return " ".join(str(text).split())


def check_row(row, out, seen):
    """A row of a KINDS function -> a line of the manifest. Raises ValueError with what is wrong with it.
    seen: pictures that are known to be sound"""
    if isinstance(row, Exception):
        raise row
    if not is_text(row["caption"]) or re.search("[\0\ufffd]", row["caption"]):
        raise ValueError("its caption is not text in UTF-8")
    if not row["caption"].strip():
        raise ValueError("no caption")
    video = file_in(out, row["video"])
    try:
        with watch_decoder(), open_video(video) as (container, stream):
            next(container.decode(stream))
            frames, fps = stream.frames, round(float(stream.average_rate or stream.guessed_rate), 3)
        if not frames:  # not known before the end, as in a fragmented mp4
            with watch_decoder(), open_video(video) as (container, stream):
                frames = sum(packet.size > 0 for packet in container.demux(stream))
    except UserError as error:
        raise ValueError(f"{video.name}: {error}") from None
    if row["lacks"]:
        raise ValueError(row["lacks"])
    for who in row["identities"]:
        for image in {view["image"] for view in who["views"].values()} - seen:
            read_picture(file_in(out, image), (16, 16))
    line = {"video": row["video"], "caption": " ".join(row["caption"].split()),
            "fps": int(fps) if fps.is_integer() else fps, "frames": frames,
            "source": row["video"].removeprefix("source/"), "identities": row["identities"]}
    check_entry(line, out)
    return line


def file_in(folder, name):
    """A path of the manifest in `folder` -> Path. Raises ValueError where it leads out of this folder and of
    the one that its link "source" leads to, also through other links, or where no file is."""
    try:
        real = Path(os.path.realpath(folder / as_name(name)))
        found, is_file = real.exists(), real.is_file()
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from None
    bases = (os.path.realpath(folder), os.path.realpath(folder / "source"))
    if ".." in Path(name).parts or os.path.isabs(name) or not any(map(real.is_relative_to, bases)):
        raise ValueError(f"{name} leads out of the folder")
    if not is_file:
        raise ValueError(f"{name}: {'not a file' if found else 'no such file'}")
    return real


def as_name(value):
    if not is_text(value) or re.search("[\0\ufffd]", value):  # \ufffd was no UTF-8
        raise ValueError(f"{ascii(value)[:80]} is not a file name")
    return value


# ------------------------------------------------------------------------------------- MEAD and NeRSemble
def middle_frame(out, video):
    """Write the middle frame of source/<video>, at most 1024 pixels, into refs/ once; returns its name."""
    name = f"refs/{video.removesuffix('.mp4').replace('/', '_')}.png"
    if not (out / name).is_file():
        with watch_decoder(), open_video(file_in(out, f"source/{video}")) as (container, stream):
            middle = (container.start_time or 0) + (container.duration or 0) // 2  # microseconds
            container.seek(middle)
            for frame in container.decode(stream):
                if frame.time is None or frame.time * 1e6 >= middle:
                    break
            image = frame.to_image().rotate(frame.rotation, expand=True)
        image.thumbnail((1024, 1024))
        with atomic_file(out / name) as temporary:
            image.save(temporary, "PNG")
    return name


def takes_of(person, takes, angles, side, caption, out, pitches, most=8):
    """Rows of a person whom several cameras saw at once: each take by each camera, with references from
    other takes. `most` takes, evenly spaced, give pictures; of them the farthest from a row's own is used.

    takes    {take: {camera: video in the set}}
    angles   {camera: its yaw of a face that looks ahead}; None gives no reference
    pitches  {camera: pitch}, where known
    side     least |yaw| of a left or right view; the best is 60
    caption  function of take and camera
    """
    names, n = sorted(takes), len(takes)
    givers, cameras = {k * n // most for k in range(most)}, {}
    for view, (low, best, high) in {"front": (-25, 0, 25), "left": (-90, -60, -side), "right": (side, 60, 90),
                                    "back": (150, 180, 180)}.items():
        turns = {c: abs(yaw) if view == "back" else yaw for c, yaw in angles.items() if yaw is not None}
        cameras[view] = sorted((c for c in turns if low <= turns[c] <= high),
                               key=lambda c: (math.hypot(turns[c] - best, pitches.get(c, 0)), c))
    for i, take in enumerate(names):
        others, views = sorted(givers - {i}, key=lambda k: (k - i - n // 2) % n), {}
        lacks = "no front view in another take"
        if n == 1:
            lacks += f": this is the only take of {person}, and a person needs two"
        for view, camera, k in ((v, c, k) for v in VIEWS for c in cameras[v] for k in others):
            if view not in views and camera in takes[names[k]]:
                try:
                    image = middle_frame(out, takes[names[k]][camera])
                except ValueError as error:
                    if view == "front":
                        lacks += f": {takes[names[k]][camera]} is {error}"
                    continue
                known = {fact: facts[camera] for fact, facts in (("yaw", angles), ("pitch", pitches))
                         if camera in facts}
                views[view] = {"image": image, **known, "cross": True}
        for camera, video in sorted(takes[take].items()):
            row = {"video": f"source/{video}", "caption": caption(take, camera),
                   "identities": [{"id": person, "views": views}], "lacks": lacks * ("front" not in views)}
            yield video, row


def turned(yaw):
    if abs(yaw) < 15:
        return "seen from the front"
    return f"turned {abs(yaw):.0f} degrees to the {'left' if yaw < 0 else 'right'}"


def mead(root, out, mirror, notes):
    """<actor>/video/<front|left_60|...>/<emotion>/level_<n>/<nnn>.mp4"""
    sign, people = -1 if mirror else 1, {}
    angles = {"front": 0, "left_30": -30 * sign, "left_60": -60 * sign, "right_30": 30 * sign,
              "right_60": 60 * sign, "top": None, "down": None}
    for path in sorted(root.glob("*/video/*/*/level_*/[!.]*.mp4")):
        name = path.relative_to(root).as_posix()
        person, _, camera, emotion, level, take = name.split("/")
        if camera in angles:
            people.setdefault(person, {}).setdefault((emotion, level, take), {})[camera] = name
        else:
            yield name, ValueError(f"no camera is called {camera}; expected {', '.join(angles)}")

    def caption(take, camera):
        view = {"top": "seen from above", "down": "seen from below"}.get(camera) or turned(angles[camera])
        return f"a person speaks, {take[0]}, {take[1].replace('_', ' ')}, {view}"
    for person, takes in people.items():
        yield from takes_of(person, takes, angles, 30, caption, out, {})
    notes[f"look at one: heads should look to the picture's left, else import again with{'out' * mirror} "
          "--mirror"] = [f"{out}/refs/*{'right' if mirror else 'left'}_60*.png"]


@np.errstate(all="ignore")
def camera_angles(world_2_cam):
    """{serial: 4 x 4, world to OpenCV camera} -> {serial: yaw}, {serial: pitch} in degrees, as cameras see a
    head where all optical axes nearly meet. Up is across the rows of all pictures, as no camera is tilted.
    Ahead is the cameras' mean direction from the head, as NeRSemble's rig is an arc around the face. For one
    who looks at the head, a camera on the right of that direction sees it look to the picture's left, which
    is yaw < 0, and one above it sees it look down, which is pitch < 0."""
    poses = np.array(list(world_2_cam.values()), float).reshape(-1, 4, 4)
    rotation, forward = poses[:, :3, :3], poses[:, 2, :3]
    centres = -np.einsum("nji,nj->ni", rotation, poses[:, :3, 3])
    across = np.eye(3) - forward[:, :, None] * forward[:, None]
    head = np.linalg.solve(across.sum(0), np.einsum("nij,nj->i", across, centres))
    away = centres - head
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    _, spread, axes = np.linalg.svd(rotation[:, 0])
    up = axes[2] * -np.sign(rotation[:, 1].mean(0) @ axes[2])
    ahead = away.mean(0) - away.mean(0) @ up * up
    if not (np.linalg.norm(ahead) > 0.1 and spread[1] > 0.1):  # or nan
        raise ValueError("its cameras stand in one place or all around: what is in front?")
    ahead /= np.linalg.norm(ahead)
    yaw = -np.degrees(np.arctan2(away @ np.cross(up, ahead), away @ ahead))
    pitch = -np.degrees(np.arcsin(np.clip(away @ up, -1, 1)))
    return [dict(zip(world_2_cam, (angles.round(1) + 0).tolist())) for angles in (yaw, pitch)]


def nersemble(root, out, mirror, notes):
    """<participant>/sequences/<sequence>/images/cam_<serial>.mp4 and, beside sequences/,
    calibration/camera_params.json"""
    glasses = {}
    if (root / "metadata_sequences.csv").is_file():
        glasses = {str(row.get("id")).zfill(3): str(row.get("wears_glasses") or "").strip().lower() not in
                   ("", "0", "no", "false", "nan") for _, row in read_rows(root / "metadata_sequences.csv")}
    says = {"EMO": "a person acts: {}", "EXP": "a person moves the {}", "SEN": 'a person says "{}"',
            "HAIR": "a person shakes the hair", "FREE": "a person moves freely"}
    people = {}
    for path in sorted(root.glob("*/sequences/*/images/cam_*.mp4")):
        name = path.relative_to(root).as_posix()
        people.setdefault(path.parts[-5], {}).setdefault(path.parts[-3], {})[path.stem[4:]] = name
    for person, takes in people.items():
        calibration = root / person / "calibration/camera_params.json"
        try:
            angles, pitches = camera_angles(json.loads(read_text(calibration))["world_2_cam"])
            if missing := {serial for videos in takes.values() for serial in videos} - angles.keys():
                raise ValueError(f"not of camera {min(missing)}")
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            yield f"participant {person}", ValueError(f"its calibration is of no use ({error})")
            continue

        def caption(take, camera):
            kind, _, words = take.partition("-")
            words = re.sub(r"^\d+-|-\d+$", "", words).replace("_", " ").replace("+", " and ")
            said = says.get(kind, f"a person, {take}").format(words)
            return f"{said}{', with glasses' * glasses.get(person, False)}, {turned(angles[camera])}"
        yield from takes_of(person, takes, angles, 35, caption, out, pitches)


# -------------------------------------------------------------------------------------- folders of trainers
def lists_videos(path):
    """Is it a table with a column of videos, and not the settings of a program."""
    with suppress(UserError):
        return any(isinstance(row, dict) and set(COLUMNS["video"]) & row.keys() for _, row in read_rows(path))


def folders(root, out, mirror, notes):
    """metadata.csv, .jsonl or .json with columns video, caption and perhaps references; or videos, each with
    <stem>.txt and perhaps refs/<stem>/front.png, or refs/<stem>/<n>/front.png for several people. What a row
    lacks is looked for beside its video."""
    tables, names = find_tables(root), Names(root)
    tables = [f for f in tables if f.stem.lower() == "metadata"] or [f for f in tables if lists_videos(f)]
    if len(tables) > 1:
        raise UserError(f"{root}: which of {', '.join(f.name for f in tables)} lists its videos? "
                        "Name it metadata, and no other")
    if tables:
        rows = read_rows(tables[0])
        check_columns(tables[0], rows, "video")
    else:
        videos, passed = find_videos(root)
        rows = ((name, {"video": name}) for name in videos)
        if other := {why: n for why, n in passed.items() if why not in PICTURES}:
            notes["passed over"] = [", ".join(f"{n} {why}" for why, n in sorted(other.items()))]
    for name, row in rows:
        try:
            yield name, row if isinstance(row, Exception) else read_row(names, row, name, mirror, notes)
        except (ValueError, OSError) as error:
            yield name, ValueError(error)


def read_row(names, row, name, mirror, notes):
    """A row of a table -> one for check_row. Raises ValueError or OSError."""
    def inside(path):
        """As the manifest names it."""
        return ("source" / Path(names.find(as_name(path)))).as_posix()
    if value_of(row, "video") is None:
        raise ValueError(f"no video; expected one of the columns {', '.join(COLUMNS['video'])}")
    video, root = inside(value_of(row, "video")), names.folder
    path, caption = root / video.removeprefix("source/"), value_of(row, "caption")
    people, identities = read_people(value_of(row, "references")), []
    if path.resolve().is_relative_to(root.resolve()):
        beside = root / names.find(path.with_suffix(".txt").relative_to(root))
        if caption is None and beside.is_file():
            caption = read_text(beside)
        people = people or people_beside(root, path)
    for k, pictures in enumerate(people, 1):
        views, who = {}, f"{video.removeprefix('source/').removesuffix(path.suffix)}_{k}"
        for n, picture in enumerate(pictures):
            view, image = read_reference(picture, n, name, notes)
            if mirror:
                view = SWAP.get(view, view)
            if view in views:
                raise ValueError(f"{image}: a second {view} view of one person; write a list for each person")
            views[view] = {"image": inside(image), "yaw": None, "cross": False}
        if views:
            identities.append({"id": who, "views": views})
    lacks = f"no picture of {len(people) - len(identities)} of its {len(people)} people"
    if not identities:
        lacks = f"no reference; expected refs/{path.stem}/front.png or a column {COLUMNS['references'][0]}"
    lacks *= len(identities) < max(1, len(people))
    return {"video": video, "caption": caption or "", "identities": identities, "lacks": lacks}


def read_people(value):
    """A row's references -> a list of file names for each person. A flat list is one person; text is a JSON
    list or names separated by ";"."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"its references are no JSON list: {value[:60]}") from None
    elif isinstance(value, str):
        value = [name.strip() for name in value.split(";") if name.strip()]
    people = value if isinstance(value, list) and value and isinstance(value[0], list) else [value or []]
    if not all(isinstance(person, list) and all(isinstance(name, str) for name in person)
               for person in people):
        raise ValueError("its references are no list of file names, nor one list for each person")
    return people if any(people) else []


def read_reference(picture, n, name, notes):
    """The n-th picture of a person -> its view and its file's name."""
    try:
        return view_of(picture)
    except UserError:
        if n:
            raise
    notes.setdefault("references have no view in their names and count as front", []).append(name)
    return "front", picture


def people_beside(root, video):
    """The pictures in refs/<stem> beside a video, or at the top of the set, as read_people gives them."""
    for folder in (video.parent / "refs" / video.stem, root / "refs" / video.stem):
        if folder.is_dir():
            numbered = {int(f.name): f for f in folder.iterdir()
                        if re.fullmatch(r"\d{1,4}", f.name, re.ASCII) and f.is_dir()} or {1: folder}
            people = [[] for _ in range(min(1, *numbered), max(numbered) + 1)]  # who has none keeps a place
            for number, person in numbered.items():
                people[number - min(1, *numbered)] = sorted(
                    f.relative_to(root).as_posix() for f in person.iterdir()
                    if f.suffix.lower() in PICTURES and f.name[0] != ".")
            return people if any(people) else []
    return []


KINDS = {"mead": mead, "nersemble": nersemble, "folders": folders}


def main(argv=None):
    p = Parser(prog="data.py import", description="a public set's folders, or a trainer's, as a manifest")
    add = p.add_argument
    add("kind", choices=sorted(KINDS))
    add("--root", required=True, type=nonempty, help="the set's folder; nothing in it is changed")
    add("--out", required=True, type=nonempty, help="folder to write to")
    add("--mirror", action="store_true", help="exchange left and right: the set's are the person's own")
    args = p.parse_args(argv)
    import_set(args.kind, args.root, args.out, args.mirror)
