"""Videos of people -> clips, reference views of each identity, and the manifest that training reads.

  python curate.py --videos DIR --out DIR --faces DIR

1. extract  is a function of one video: shots, face tracks, clips, and each track's best picture in each view.
   It fills one folder rows/NAME, whole or not at all; a restart goes on with the next video. Spread it with
   torchrun, or over machines with --shard i/n and one --out.
2. group    reads the rows only, where none is missing: tracks become identities across videos, clips get
   references, and what is new of clips/, refs/, manifest.jsonl, report.json and report.png is written.
   What a hand has changed there or put there stays, and is said.

Views are named as the viewer sees them. A back view is a frame for which the detector still gives a head, as
RetinaFace rarely does. Without ArcFace's weights an identity is one track, and references come from the clip
itself. Read beside a video: <stem>.txt, its caption (or columns file_name|video|video_path|path and
caption|prompt|text|cap of metadata.csv, .tsv, .json or .jsonl in --videos), and <stem>_mask.mp4, white where
the people are. Captions are mended there; those that --caption-url gave, in OUT/captions.jsonl.
"""
import base64
import bisect
import collections
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from networks.faces import MOST_FACES, Faces, find_faces, iou
from rope import VIEWS
from support.script import (Parser, UserError, as_user_error, atomic_file, atomic_folder, content_of,
                            fingerprint, frame_rate, in_range, is_text, lock, nonempty, not_negative,
                            probe_writable, progress, read_lines, read_text, save_tensors, sha256_of,
                            temporary_name)
from videos.jobs import draw_person
from videos.manifest import PEOPLE, Names, check_columns, find_tables, find_videos, read_rows, value_of
from videos.pictures import (VIDEOS, from_bytes, on_white, read_frames, read_picture, watch_decoder,
                             write_video)
from videos.toyfaces import is_toy, load_faces, toy_code

degrees = in_range(float, 0, 180, "0 to 180 degrees")
cosine = in_range(float, -1, 1, "a cosine from -1 to 1")
EXTRACT = {  # flag: type, default, meaning; rows are made anew where one changes
    "fps": (frame_rate, 16, "frames a second of a clip"),
    "frames": (in_range(int, 5, 10001, "5 to 10001 frames"), 81, "of a clip, 4n+1"),
    "short-side": (in_range(int, 32, 4320, "32 to 4320 pixels"), 720, "larger videos are shrunk to it"),
    "score": (in_range(float, 0.5, 1, "0.5 to 1"), 0.65, "least score of a detection"),
    "face-side": (not_negative, 128, "least face side in pixels at 480p, a track's median"),
    "sharpness": (not_negative, 40, "least variance of a face's Laplacian, a track's median"),
    "pitch": (degrees, 35, "largest |pitch| of a reference"),
    "front": (degrees, 15, "a front view has less |yaw|"),
    "side": (degrees, 35, "a left or right view has at least this |yaw|"),
    "side-end": (degrees, 90, "and at most this"),
    "margin": (not_negative, 0.6, "of a reference around the face, in face sides"),
    "crf": (in_range(int, 0, 51, "0 to 51"), 19, "x264's for the clips; 19 is hard to tell from the source"),
}
GROUP = {
    "people": (in_range(int, 1, PEOPLE, f"1 to {PEOPLE}"), PEOPLE, "most people of a clip"),
    "same-identity": (cosine, 0.5, "tracks become one identity where their cosine, on average, is this"),
    "front-similarity": (cosine, 0.5, "least cosine of a front view with its identity's mean"),
    "side-similarity": (cosine, 0.35, "the same for left and right views"),
    "near-copy": (cosine, 0.97, "a track that is more alike is a copy of this take: no cross-pair"),
    "gap": (not_negative, 10, "seconds from a clip to a cross-pair in another shot of its video"),
}
ROWS = 6  # to be raised where a change of the code changes rows
STEP = 4  # frames from one detection to the next, so that windows of 4n+1 frames begin and end on one
GAP = 2  # detections that a track may miss in a row: half a second, as long as a hand before a face
IOU = 0.3  # least overlap of a face with itself a quarter of a second before
SAME_TRACK = 0.1  # overlapping faces of a lower cosine are two people (OpenS2V's limit)
JUMPED = 0.5  # a face that is so much like a track is its person, wherever it is
CUT = 0.1  # share of full contrast by which the picture changes where a shot ends
BACK = 150  # a back view has more |yaw|: below it, some of the face shows
MIDDLE = {"front": 0, "left": -62, "right": 62, "back": 180}  # yaw that a view is best at
TRIES = 100  # pictures that are looked at for one of another take: a person may have a hundred thousand
PROMPT = ("Four frames of a video. Describe it in one sentence: the people from left to right ({people} in "
          "all, called the first, the second), what they wear and do, the place and the light.")


@dataclass(eq=False)
class Track:
    """One person without interruption in one shot."""
    faces: list = field(default_factory=list)
    best: dict = field(default_factory=dict)  # view -> (quality, Face, picture as a PNG file)
    fault: str | None = None  # why it is dropped


# ---------------------------------------------------------------------------------------------------- extract
def extract(path, detector, args, folder):
    """One video -> its row in `folder`: row.json, embeddings.safetensors, clips and candidate references. Of
    a video that is of no use, row.json has the reason only."""
    try:
        with watch_decoder():
            tracks, row = find_tracks(path, detector, args)
            kept = [track for track in tracks if not track.fault]
            row["sha256"] = sha256_of(path)
            row["dropped"] = collections.Counter(sorted(track.fault for track in tracks if track.fault))
            row |= store_tracks(kept, folder)
            row["clips"] = [{"start": start, "tracks": [kept.index(track) for track in people]}
                            for start, people in find_windows(tracks, args.frames)]
            store_clips(path, row["clips"], args, folder)
    except UserError as error:
        row = {"reason": str(error)}
        print(f"{path} is left out: {error}", file=sys.stderr)
    write_row(folder, row)


def write_row(folder, row):
    """Write row.json: what is known of a video, sizes and hashes of the other files, and a checksum."""
    row = row | {"files": {file.name: [file.stat().st_size, sha256_of(file)]
                           for file in sorted(folder.iterdir())}}
    row["checksum"] = hashlib.sha256(json.dumps(row).encode()).hexdigest()
    (folder / "row.json").write_text(json.dumps(row))


def read_row(folder):
    """What write_row wrote, or None where it or a file of it is missing or damaged: to be extracted again.
    What is younger than row.json, which came last, is read to know."""
    def is_whole(file, size, sha256):
        found = file.stat()
        return found.st_size == size and (found.st_mtime_ns <= written or sha256_of(file) == sha256)
    try:
        row, written = json.loads((folder / "row.json").read_text()), (folder / "row.json").stat().st_mtime_ns
        checksum = row.pop("checksum")
        whole = all(is_whole(folder / name, *known) for name, known in row["files"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return row if whole and checksum == hashlib.sha256(json.dumps(row).encode()).hexdigest() else None


def find_tracks(path, detector, args):
    """-> the Tracks of a video's faces, and {"shots": the frames where they begin and the video ends, "yaw":
    histogram of the faces, "crowded": pictures that may have had more} for its row.

    A shot ends between two detections where 16 x 9 thumbnails differ, on average, by more than CUT and four
    times the median of the last 16 differences: fast motion goes on, a cut comes once."""
    tracks, live, last, crowded = [], [], None, 0
    shots, yaws, changes = [0], [0] * 36, collections.deque(maxlen=16)
    for number, (picture, mask) in enumerate(read_with_mask(path, args)):
        if number % STEP:
            continue
        small = np.float32(Image.fromarray(picture).resize((16, 9), Image.Resampling.BOX)) / 255
        changes.append(0 if last is None else np.abs(small - last).mean())
        last = small
        if changes[-1] > max(CUT, 4 * np.median(changes)):
            live = []
            shots.append(number)
        live = [track for track in live if track.faces[-1].frame >= number - STEP * (GAP + 1)]
        faces = find_faces(detector, picture, number, args.score)
        crowded += len(faces) == MOST_FACES
        for face, track in zip(faces, follow(tracks, live, faces)):
            if not math.isnan(face.yaw):
                yaws[int((face.yaw + 180) % 360 // 10)] += 1
            keep_best(track, face, [other for other in faces if other is not face], picture, mask, args)
    for track in tracks:
        track.fault = fault_of(track, args)
    if crowded:
        print(f"{path}: {crowded} pictures with {MOST_FACES} faces or more, of which the largest count",
              file=sys.stderr)
    return tracks, {"shots": [*shots, number + 1], "yaw": yaws, "crowded": crowded}


def read_with_mask(path, args):
    """Yield (picture, mask); mask from <stem>_mask.mp4, white where the people are, or None."""
    mask = mask_of(path)
    if not mask:
        yield from ((picture, None) for picture in read_frames(path, args.fps, args.short_side))
        return
    both = (read_frames(file, args.fps, args.short_side) for file in (path, mask))
    for picture, covered in itertools.zip_longest(*both):
        if picture is None or covered is None or picture.shape != covered.shape:
            raise UserError("its mask is of another size or length")
        yield picture, covered


def mask_of(path):
    """<stem>_mask beside a video, of any format, or None."""
    names = (f"{path.stem}_mask{form}" for suffix in VIDEOS for form in (suffix, suffix.upper()))
    return next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)


def follow(tracks, live, faces):
    """Add the faces of a frame to the live tracks that go on with them, best pairs first by overlap plus
    cosine, or to new ones, which join both lists; returns each face's track."""
    pairs, owners = [], [None] * len(faces)
    for track in live if faces else ():
        last = track.faces[-1]
        overlaps = iou(last.box, torch.stack([face.box for face in faces])).tolist()
        for f, (face, overlap) in enumerate(zip(faces, overlaps)):
            alike = 0 if face.embedding is None else float(last.embedding @ face.embedding)
            same = face.embedding is None or alike >= SAME_TRACK
            if alike >= JUMPED or (overlap >= IOU and same):
                pairs.append((overlap + alike, track, f))
    for _, track, f in sorted(pairs, key=lambda pair: -pair[0]):
        if owners[f] is None and track not in owners:
            owners[f] = track
    for f, face in enumerate(faces):
        if owners[f] is None:
            owners[f] = Track()
            tracks.append(owners[f])
            live.append(owners[f])
        owners[f].faces.append(face)
    return owners


def keep_best(track, face, others, picture, mask, args):
    """Crop the face as a reference where it is the track's best of its view so far: by sharpness times the
    squared cosine of what its yaw is off the view's middle. Head and shoulders, on white where there is a
    mask, with nobody else's face in it."""
    view = view_of(face, args)
    if not view:
        return
    turned = math.cos(math.radians(face.yaw - MIDDLE[view]))
    quality = face.sharpness * turned**2
    if view in track.best and quality <= track.best[view][0]:
        return
    low, high = face.box.double().view(2, 2).numpy()
    half = (0.5 + args.margin) * (high - low).max()
    centre = (low + high) / 2 + (0, 0.2 * (high - low)[1])
    alone = all((abs(other.box.view(2, 2).mean(0).numpy() - centre) >= half).any() for other in others)
    columns, rows = (slice(max(0, round(c - half)), max(0, round(c + half))) for c in centre)
    crop = picture[rows, columns]
    if crop.size and alone:
        file = io.BytesIO()
        Image.fromarray(crop if mask is None else on_white(crop, mask[rows, columns])).save(file, "PNG")
        track.best[view] = quality, face, file.getvalue()


def view_of(face, args):
    """The view that a face shows, or None where it is of no use."""
    yaw = abs(face.yaw)
    if face.sharpness < args.sharpness or not abs(face.pitch) <= args.pitch:  # angles may be nan
        return None
    if yaw < args.front:
        return "front"
    if args.side <= yaw <= args.side_end:
        return "left" if face.yaw < 0 else "right"
    return "back" if yaw > BACK else None


def fault_of(track, args):
    """Why a track is dropped, or None."""
    if len(track.faces) < 3:
        return "seen less than three times"
    if np.median([face.side for face in track.faces]) < args.face_side:
        return "small"
    if np.median([face.sharpness for face in track.faces]) < args.sharpness:
        return "blurred"
    return None


def find_windows(tracks, frames):
    """Clips, [(first frame, its tracks from left to right)], without common frames. A clip's tracks last from
    its first frame to its last, so no cut is in it. No other large face is in it, even for a part: it would
    have no reference."""
    large = [track for track in tracks if track.fault in (None, "blurred")]
    firsts = np.array([track.faces[0].frame for track in large])
    lasts = np.array([track.faces[-1].frame for track in large])
    windows, start = [], 0
    while start + frames - 1 <= lasts.max(initial=-1):
        end = start + frames - 1
        seen = np.flatnonzero((firsts <= end) & (lasts >= start))
        throughout = (firsts[seen] <= start).all() and (lasts[seen] >= end).all()
        people = [large[i] for i in seen]
        if people and throughout and not any(track.fault for track in people):
            people.sort(key=lambda t: next(face for face in t.faces if face.frame >= start).box[0].item())
            windows.append((start, people))
            start = end
        start += STEP
    return windows


def store_tracks(tracks, folder):
    """Write the references and embeddings of tracks -> what row.json says of them."""
    entries, references, means, embeddings = [], [], [], []
    for number, track in enumerate(tracks):
        entries.append({"start": track.faces[0].frame, "end": track.faces[-1].frame})
        if track.faces[0].embedding is not None:
            means.append(sum(face.embedding for face in track.faces))
        for view, (quality, face, file) in sorted(track.best.items()):
            (folder / f"{number}_{view}.png").write_bytes(file)
            references.append({"track": number, "view": view, "frame": face.frame, "yaw": round(face.yaw, 1),
                               "pitch": round(face.pitch, 1), "quality": round(quality, 1)})
            embeddings.append(face.embedding)
    if means:
        units = F.normalize(torch.stack(means + embeddings), dim=1).half()
        save_tensors(folder / "embeddings.safetensors", {"embeddings": units})
    return {"tracks": entries, "references": references}


def store_clips(path, clips, args, folder):
    """Decode the video once more, for the clips, and add each one's sha256."""
    pictures, passed = read_frames(path, args.fps, args.short_side), 0
    for clip in clips:
        shot = itertools.islice(pictures, clip["start"] - passed, clip["start"] - passed + args.frames)
        passed = clip["start"] + args.frames
        halves = [from_bytes(torch.from_numpy(picture)).half() for picture in shot]  # exact for 256 values
        video, file = torch.stack(halves), folder / f"{clip['start']}.mp4"
        write_video(file, video.permute(3, 0, 1, 2), args.fps, crf=args.crf)
        clip["sha256"] = sha256_of(file)


# ------------------------------------------------------------------------------------------------------ group
class Reference(NamedTuple):
    tier: float  # 0 where its score is at least half of the best one's, 1 where it is a quarter, ...
    row: int
    frame: int
    track: int  # among those of all rows
    path: Path
    facts: dict  # image, yaw, pitch, similarity


def group(names, folders, args, captions, passed):
    """Rows -> clips, references, manifest and report in args.out; returns the report. passed: {why files of
    --videos are passed over: how many}"""
    rows, reasons, first = [], {}, 0
    for name, folder in zip(names, folders):
        row = read_row(folder)
        if row is None:
            raise UserError(f"{folder} (of {name}) is damaged: run its --shard again, or delete it")
        if "reason" in row:
            reasons[name] = row["reason"]
        else:
            rows.append(row | {"name": name, "folder": folder, "first": first})
            first += len(row["tracks"])
    identity, names, references, embeddings, unlike = find_references(rows, args)
    entries, files, shown = [], {}, collections.defaultdict(dict)
    dropped, lost, unused, yaws = (*(collections.Counter() for _ in range(3)), np.zeros(36, int))
    for n, row in enumerate(rows):
        lost.update(row["dropped"])
        unused.update(tracks_without_clip(row, args.frames))
        yaws += row["yaw"]
        for clip in row["clips"]:
            video = f"clips/{below(row['folder'])}_{clip['start']}.mp4"
            tracks = [row["first"] + number for number in clip["tracks"]]
            people = [names[identity[track]] for track in tracks]
            chosen = [choose(row | clip, n, track, references[identity[track]], embeddings, args)
                      for track in tracks]
            reason = objection(people, chosen, args)
            if reason:
                dropped[reason] += 1
                continue
            identities = []
            for person, views in zip(people, chosen):
                facts = {view: best.facts | {"cross": cross} for view, (best, cross) in views.items()}
                identities.append({"id": person, "views": facts})
                shown[person] |= {view: best.path for view, (best, _) in views.items()}
                files |= {best.facts["image"]: (best.path, rows[best.row]["files"][best.path.name][1])
                          for best, _ in views.values()}
            files[video] = row["folder"] / f"{clip['start']}.mp4", clip["sha256"]
            entries.append({"video": video, "caption": captions.get(row["name"], ""), "fps": args.fps,
                            "frames": args.frames, "sha256": clip["sha256"], "source": row["name"],
                            "identities": identities})
    if entries:  # else what an earlier run made stays
        written = read_written(args.out)
        theirs = publish(args.out, files, written)
    failed = ask_captions(entries, args)
    kinds = collections.Counter(reason.split(" (")[0] for reason in reasons.values())
    report = {
        "videos": funnel(len(rows), kinds) | {"passed over": passed},
        "tracks": funnel(first, lost) | {"in no clip": unused},
        "clips": funnel(len(entries), dropped) | {"without caption": sum(not e["caption"] for e in entries)},
        "identities": {"found": len(references), "kept": len(shown), "by embedding": embeddings is not None,
                       "with a view": {view: sum(view in v for v in shown.values()) for view in VIEWS},
                       "by number of views": collections.Counter(sorted(map(len, shown.values())))},
        "references unlike their identity": unlike, "shots": sum(len(row["shots"]) - 1 for row in rows),
        "seconds": sum(row["shots"][-1] for row in rows) / args.fps,
        f"pictures with {MOST_FACES} faces or more": sum(row["crowded"] for row in rows),
        "yaw, in steps of 10 degrees from -180": yaws.tolist(),
        "settings": {flag: getattr(args, flag.replace("-", "_")) for flag in EXTRACT | GROUP},
        "videos left out": reasons, "captions that failed": failed}
    if entries:
        text = "".join(f"{json.dumps(entry)}\n" for entry in entries)
        finish(args.out, text.encode(), files, written, theirs)
    sheet = io.BytesIO()
    draw_report(report, shown).save(sheet, "PNG")
    write_changed(args.out / "report.json", json.dumps(report, indent=1).encode())
    write_changed(args.out / "report.png", sheet.getvalue())
    return report


def below(folder):
    """Where in clips/ and refs/ the files of a row are: two digits of its hash cut each into 256 folders."""
    return f"{folder.name[:2]}/{folder.name}"


def tracks_without_clip(row, frames):
    """Yield the reason of each track of a row that is in none of its clips."""
    used = {number for clip in row["clips"] for number in clip["tracks"]}
    for number, track in enumerate(row["tracks"]):
        if number not in used:
            short = track["end"] - track["start"] + 1 < frames
            yield f"seen for less than {frames} frames" if short else "beside others who come and go"


def funnel(kept, left_out):
    return {"all": kept + left_out.total(), "left out": left_out, "kept": kept}


def read_embeddings(folder):
    """Unit vectors of a row's tracks, then of its references [n + m, D]; None without ArcFace."""
    path = folder / "embeddings.safetensors"
    with as_user_error(path):
        return safetensors.torch.load_file(path)["embeddings"] if path.exists() else None


def find_references(rows, args):
    """-> the identity of every track [n]; for every identity its name, and {view: [Reference, sorted]}; the
    tracks' embeddings [n, D] or None; how many references were unlike their identity."""
    parts, embeddings = [], None
    for row in rows:
        vectors = read_embeddings(row["folder"])
        if vectors is not None:
            parts.append(vectors[:len(row["tracks"])].clone())
    identity = np.arange(sum(len(row["tracks"]) for row in rows))
    if parts:
        embeddings = torch.cat(parts)
        identity = cluster(embeddings, args.same_identity, device=args.device)
        means = torch.zeros(identity.max() + 1, embeddings.shape[1])
        means = F.normalize(means.index_add_(0, torch.from_numpy(identity), embeddings.float()))
    least = {"front": args.front_similarity, "left": args.side_similarity, "right": args.side_similarity}
    references, unlike = [collections.defaultdict(list) for _ in range(identity.max(initial=-1) + 1)], 0
    # from the content of each one's first track, by the videos' names: further videos and other sets leave it
    names = {}  # alone; of 8 digits two of 100,000 people would share a name
    for n, row in enumerate(rows):
        for number in range(len(row["tracks"])):
            word = hashlib.sha256(f"{row['sha256']} {number}".encode()).hexdigest()[:12]
            names.setdefault(identity[row["first"] + number], f"person_{word}")
        vectors = read_embeddings(row["folder"])
        for k, entry in enumerate(row["references"], len(row["tracks"])):
            view, track, score, alike = entry["view"], row["first"] + entry["track"], entry["quality"], None
            person = identity[track]
            if vectors is not None:
                alike = round(float(vectors[k].float() @ means[person]), 3)
                score *= max(alike, 0)
                if alike < least.get(view, -1):
                    unlike += 1
                    continue
            path = row["folder"] / f"{entry['track']}_{view}.png"
            facts = {"image": f"refs/{below(row['folder'])}_{path.name}", "yaw": entry["yaw"],
                     "pitch": entry["pitch"], "similarity": alike}
            references[person][view].append(Reference(score, n, entry["frame"], track, path, facts))
    for found in (found for views in references for found in views.values()):
        best = max(one.tier for one in found)  # so far it is the score
        found[:] = sorted(one._replace(tier=next((k for k in range(9) if one.tier * 2**(k + 1) >= best), 9))
                          for one in found)
    return identity, names, references, embeddings, unlike


def cluster(tracks, least, cells=2**24, device="cpu"):
    """Agglomerative clustering with average linkage, in rounds: unit vectors [n, D] -> identities [n].

    A round finds for each cluster the eight later ones that are most alike. Best first, two clusters merge
    where the cosine of their tracks, on average over all pairs as they have grown by then, is at least
    `least`. The end is when no two clusters are so alike. Memory: a few times the tracks, and `cells` numbers
    of the matrix of all pairs. The order of the tracks decides ties only."""
    total, size = tracks.float().numpy().copy(), np.ones(len(tracks), np.float32)
    root = np.arange(len(tracks))  # of a cluster: its first track

    def find(i):
        while root[i] != i:
            root[i] = i = root[root[i]]
        return i
    merged = True
    while merged:
        merged, alive = False, np.flatnonzero(root == np.arange(len(root)))
        means = torch.from_numpy(total[alive] / size[alive, None]).to(device)
        values, first, second = alike_pairs(means, least, cells)
        for k in np.lexsort((second, first, -values)):
            a, b = sorted((find(alive[first[k]]), find(alive[second[k]])))
            if a != b and total[a] @ total[b] >= least * size[a] * size[b]:
                total[a] += total[b]
                size[a] += size[b]
                root[b], merged = a, True
    return np.unique([find(i) for i in range(len(root))], return_inverse=True)[1]


def alike_pairs(means, least, cells, most=8):
    """Rows i < j whose product is at least `least`, the `most` best of each i -> values, i, j."""
    found, height = [], max(64, cells // len(means))  # a flatter product waits for memory
    for i in range(0, len(means), height):
        alike = means[i:i + height] @ means[i:].T
        n = len(alike)
        alike[:, :n].masked_fill_(torch.ones(n, n, dtype=torch.bool, device=means.device).tril(), -torch.inf)
        row = (alike.amax(1) >= least).nonzero()[:, 0]  # to spare the others the topk
        value, column = alike[row].topk(min(most, alike.shape[1]))
        fits = value >= least
        first = (row + i)[:, None].expand_as(value)
        found.append([x[fits].cpu().numpy() for x in (value, first, column + i)])
    return [np.concatenate(parts) for parts in zip(*found)]


def choose(clip, n, track, found, embeddings, args):
    """The references of a clip's person, {view: (Reference, is it from elsewhere)}. Elsewhere is another
    video, or another shot `gap` seconds away, and no track so alike that it is a copy of this take. Of the
    best tier from there the hash decides, so that a person's clips get many pictures. Where there is none:
    this track's own, or one of the clip's moment. clip: with what its row, the n-th, says."""
    gap, shot = math.ceil(args.gap * args.fps), bisect.bisect(clip["shots"], clip["start"])
    low = min(clip["shots"][shot - 1], clip["start"] - gap + 1)  # from here to below `high` is no elsewhere
    high, chosen = max(clip["shots"][shot], clip["start"] + args.frames - 1 + gap), {}
    for view in filter(found.get, VIEWS):
        at = int(hashlib.sha256(f"{clip['sha256']} {view}".encode()).hexdigest()[:15], 16)
        every, here = found[view], []
        for tier in range(every[-1].tier + 1):
            first, i, j, last = (bisect.bisect_left(every, (tier, *place))
                                 for place in ((), (n, low), (n, high), (math.inf,)))
            here, away = here + every[i:j], last - first - (j - i)
            tries = min(away, TRIES)  # evenly apart, as copies stand side by side
            places = (first + (at + k * away // tries) % away for k in range(tries))
            others = (every[place if place < i else place + j - i] for place in places)
            best = next((one for one in others if embeddings[one.track].float()
                         @ embeddings[track].float() <= args.near_copy), None)
            if best:
                chosen[view] = best, True
                break
        else:
            if here:
                chosen[view] = min(here, key=lambda one: (one.track != track, one)), False
    return chosen


def objection(people, chosen, args):
    """Why a clip is dropped, or None."""
    if len(people) > args.people:
        return f"more than {args.people} people"
    if len(set(people)) < len(people):
        return "one identity twice"
    if not all("front" in views for views in chosen):
        return "no front view"
    if not args.front_only and not all("left" in views or "right" in views for views in chosen):
        return "no side view"
    return None


# {path in --out: sha256s of what curate.py wrote, two while one replaces the other}; all else is somebody's
WRITTEN = "written.json"


def read_written(out):
    with contextlib.suppress(OSError, ValueError, AttributeError):
        written = json.loads((out / WRITTEN).read_text())
        return {path: list(hashes) for path, hashes in written.items()}
    return {}


def write_changed(path, content):
    """Write a file, but not where it has this content."""
    if not path.is_file() or path.read_bytes() != content:
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)


def is_ours(path, hashes):
    return path.is_file() and sha256_of(path) in hashes


def publish(out, files, written):
    """Make files {path in `out`: (a file of a row, its sha256)} of those that are not there yet, as links.
    -> the paths that are as nobody of us wrote them, and stay. written: of read_written, with what may be
    there from now on, wherever a kill comes"""
    for path, (_, sha256) in files.items():
        written[path] = sorted({*written.get(path, ()), sha256})
    write_changed(out / WRITTEN, json.dumps(written, sort_keys=True).encode())
    theirs, folders = [], set()
    for path, (source, sha256) in files.items():
        target, row = out / path, source.stat()
        if os.path.lexists(target):
            found = target.stat() if target.is_file() else None
            if found and (found.st_size, found.st_mtime_ns) == (row.st_size, row.st_mtime_ns):
                continue  # the row's file, or a copy
            if not is_ours(target, written[path]):
                theirs.append(path)
                continue
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(out / target.parts[-3] / target.name)  # where lock() sweeps
        try:
            os.link(source, temporary)  # its content is on the disk since it became a row
        except OSError:  # a file system without links
            shutil.copy2(source, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
        folders |= {target.parent, target.parent.parent}
    for folder in folders:
        with contextlib.suppress(OSError):  # not everywhere can a folder be opened
            number = os.open(folder, os.O_RDONLY)
            os.fsync(number)
            os.close(number)
    return theirs


def finish(out, manifest, files, written, theirs):
    """Write manifest.jsonl, take away what it no longer names, say what stays because it is somebody's."""
    path, name = out / "manifest.jsonl", "manifest.jsonl"
    sha256 = hashlib.sha256(manifest).hexdigest()
    mended = path.exists() and path.read_bytes() != manifest and not is_ours(path, written.get(name, ()))
    new = path.with_name("manifest.new.jsonl")
    if mended:
        print(f"{path} is not as curate.py wrote it and stays; {new.name} has what this run makes. Captions "
              f"are mended for good beside the videos, or in {out}/captions.jsonl", file=sys.stderr)
        if not new.exists() or is_ours(new, written.get(new.name, ())):
            written[new.name] = sorted({*written.get(new.name, ()), sha256})
            write_changed(out / WRITTEN, json.dumps(written, sort_keys=True).encode())
            write_changed(new, manifest)
        elif new.read_bytes() != manifest:
            print(f"{new} was changed by hand and stays too: move it away to get what this run makes",
                  file=sys.stderr)
    else:
        written[name] = sorted({*written.get(name, ()), sha256})
        write_changed(out / WRITTEN, json.dumps(written, sort_keys=True).encode())
        write_changed(path, manifest)
        if is_ours(new, written.get(new.name, ())):
            new.unlink()
        for old in written.keys() - files.keys() - {name, new.name}:
            if is_ours(out / old, written[old]):
                (out / old).unlink()
                with contextlib.suppress(OSError):  # others are in it
                    (out / old).parent.rmdir()
    known = files.keys() | (written.keys() if mended else ())
    for folder in ("clips", "refs"):
        for here, _, names in os.walk(out / folder):
            theirs += [path for path in (os.path.relpath(os.path.join(here, name), out) for name in names
                                          if name[0] != ".") if path not in known]
    record = {path: [sha256] for path, (_, sha256) in files.items()}
    record |= {old: hashes for old, hashes in written.items() if mended and old not in record}
    record |= {new.name: [sha256]} if mended else {name: [sha256]}
    write_changed(out / WRITTEN, json.dumps(record, sort_keys=True).encode())
    if theirs:
        print(f"{len(theirs)} files in {out} are not as curate.py wrote them and stay: {theirs[0]}"
              + (" and others" if len(theirs) > 1 else ""), file=sys.stderr)


# --------------------------------------------------------------------------------------------------- captions
def read_captions(folder, names):
    """{video: its caption}, from the files that the top of this file names."""
    found, captions, refused = Names(folder), {}, []
    for table in (path for path in find_tables(folder) if path.stem.lower() == "metadata"):
        rows, bad = read_rows(table), []
        check_columns(table, rows, "video", "caption")
        for name, row in rows:
            video, words = (None if isinstance(row, Exception) else value_of(row, kind)
                            for kind in ("video", "caption"))
            if is_text(video) and is_text(words or ""):
                captions[os.path.normpath(found.find(video))] = words or ""
            else:
                bad.append(f"{name}, {row}"[:200])
        if bad:
            print(f"{table}: {len(bad)} rows are of no use: {bad[0]}", file=sys.stderr)
    for name in names:
        beside = folder / found.find(Path(name).with_suffix(".txt"))
        if beside.is_file():
            try:
                captions[name] = read_text(beside)
            except UserError as error:
                refused.append(str(error))
    refused += [f"{name}: its caption holds zero bytes" for name, words in captions.items() if "\0" in words]
    if refused:
        raise UserError(refused[0] + (f"; {len(refused) - 1} more are like it" if refused[1:] else ""))
    return {name: " ".join(words.split()) for name, words in captions.items()}


def ask_captions(entries, args):
    """Fill missing captions from captions.jsonl, which keeps all answers, or by a vision endpoint, if there
    is one. Returns {clip: why it has none}; ten failures in a row end the asking."""
    store, failed, in_a_row = args.out / "captions.jsonl", {}, 0
    known = {Path(line["video"]).name: line["caption"] for line in read_lines(store)
             if is_text(line.get("video")) and is_text(line.get("caption"))}
    for entry in progress(entries, "captions", "clips", show=bool(args.caption_url)):
        video = entry["video"]
        entry["caption"] = entry["caption"] or known.get(Path(video).name) or ""
        if entry["caption"] or in_a_row == 10 or not args.caption_url:
            continue
        try:
            entry["caption"], in_a_row = ask_caption(args.out / video, len(entry["identities"]), args), 0
            with open(store, "a") as file:  # the first \n ends what a kill cut off
                file.write(f'\n{json.dumps({"video": video, "caption": entry["caption"]})}\n')
        except Exception as error:  # a network and what it answers raise a dozen kinds
            failed[video], in_a_row = f"{type(error).__name__}: {error}"[:200], in_a_row + 1
            print(f"{video} gets no caption: {failed[video]}", file=sys.stderr)
    return failed


def ask_caption(path, people, args, frames=4):
    """A caption of a clip from an OpenAI-compatible endpoint that sees `frames` of its frames."""
    pictures = list(read_frames(path, args.fps, args.short_side))
    seen = [pictures[k] for k in np.linspace(0, len(pictures) - 1, frames).round().astype(int)]

    def read(words):
        if not words.split():
            raise ValueError("an empty answer")
        return " ".join(words.split())
    return ask(args.caption_url, args.caption_model, PROMPT.format(people=people), seen, read)


def ask(url, model, words, pictures, read, tries=3):
    """What an OpenAI-compatible endpoint answers to words and pictures [H, W, 3], at most 512 pixels a side.
    read: the answer's text -> what it says. Where it raises, as where the network fails, the question is put
    again; after the last of `tries` the exception comes through."""
    content = [{"type": "text", "text": words}]
    for picture in pictures:
        image, file = ImageOps.contain(Image.fromarray(picture), (512, 512)), io.BytesIO()
        image.save(file, "JPEG")
        data = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        content.append({"type": "image_url", "image_url": {"url": data}})
    body = {"model": model, "messages": [{"role": "user", "content": content}]}
    request = urllib.request.Request(
        f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY')}"})
    for attempt in range(tries):
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return read(json.load(answer)["choices"][0]["message"]["content"])
        except Exception:
            if attempt == tries - 1:
                raise
            time.sleep(2**attempt)


# ------------------------------------------------------------------------------------------------- report.png
INK, GREY, BLUE, RED, PALE = "#222222", "#999999", "#4477aa", "#cc6677", "#bbddcc"


def draw_report(report, shown):
    """The funnel, the yaw histogram and the first identities by view as one PIL image.
    shown: {identity: {view: picture file}}"""
    people, bars = list(shown.items())[:30], []  # a bar: label, how many, of how many, colour
    for kind in ("videos", "tracks", "clips"):
        part = report[kind]
        bars.append((f"{kind}, all", part["all"], part["all"], BLUE))
        bars += [(f"   {reason}", n, part["all"], RED) for reason, n in part["left out"].items()]
        bars.append((f"{kind}, kept", part["kept"], part["all"], BLUE))
    below = 114 + max(22 * len(bars), 286)
    sheet = Image.new("RGB", (1280, below + 40 + 226 * math.ceil(len(people) / 6)), "white")
    draw = ImageDraw.Draw(sheet)

    def write(x, y, text, size=13, colour=INK, anchor="la"):
        draw.text((x, y), text, colour, ImageFont.load_default(size), anchor)
    write(24, 14, f"{report['clips']['kept']:,} clips of {len(shown):,} people, "
          f"from {report['seconds'] / 60:,.1f} minutes of video", 24)
    write(24, 54, "What is kept, and why the rest is not", 15)
    for k, (label, n, whole, colour) in enumerate(bars):
        y, end = 84 + 22 * k, 290 + round(260 * n / max(whole, 1))
        write(24, y, label[:40], colour=RED if colour == RED else INK)
        draw.rectangle((290, y + 1, end, y + 15), colour if n else None)
        write(end + 8, y, f"{n:,}")
    yaws, limits = report["yaw, in steps of 10 degrees from -180"], report["settings"]
    write(690, 54, f"Yaw of all {sum(yaws):,} faces, in degrees", 15)
    front, side, end = limits["front"], limits["side"], limits["side-end"]
    for view, low, high in (("front", -front, front), ("left", -end, -side), ("right", side, end)):
        draw.rectangle((960 + 1.5 * low, 104, 960 + 1.5 * high, 330), PALE)
        write(960 + 1.5 * (low + high) / 2, 98, view, 12, anchor="ms")
    for angle, n in zip(range(-180, 180, 10), yaws):
        if n:
            x = 960 + 1.5 * angle
            draw.rectangle((x + 2, 330 - math.ceil(210 * n / max(yaws)), x + 13, 330), INK)
    for angle in range(-180, 181, 90):
        write(960 + 1.5 * angle, 334, f"{angle}", 12, anchor="ma")
    write(24, below, f"Identities, {len(people)} of {len(shown):,}: front, left / right, back", 15)
    for k, (person, views) in enumerate(people):
        x, y = 24 + k % 6 * 206, below + 30 + k // 6 * 226
        pictures = {view: read_picture(path, (95, 95)) for view, path in views.items()}
        draw_person(sheet, pictures, x, y, 190, 190)
        write(x, y + 192, person, 12, GREY)
    return sheet


# -------------------------------------------------------------------------------------------------------- CLI
def read_arguments(argv):
    p = Parser(prog="data.py curate", description=__doc__)
    add = p.add_argument
    add("--videos", required=True, type=Path, help="folder of videos, searched in depth")
    add("--out", required=True, type=Path, help="folder to write to")
    add("--faces", required=True, type=Path, help="folder with the weights that faces.py names, or toy")
    cards = torch.cuda.device_count()
    own = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % cards}" if cards else "cpu"
    add("--device", default=own, help="cpu, cuda:0, cuda:1, ... (default: one for each process)")
    add("--shard", default="0/1", help="i/n, from 0/n to n-1/n: extract every n-th video, from the i-th on")
    add("--front-only", action="store_true", help="also keep clips of people without a side view")
    add("--caption-url", type=nonempty, help="OpenAI-compatible endpoint for clips without a caption")
    add("--caption-model", type=nonempty, default="default", help="its model; OPENAI_API_KEY may hold a key")
    for flag, (kind, default, meaning) in (EXTRACT | GROUP).items():
        add(f"--{flag}", type=kind, default=default, help=meaning)
    args = p.parse_args(argv)
    if args.frames % STEP != 1:
        raise UserError(f"--frames {args.frames}: expected 4n+1, for example {args.frames // 4 * 4 + 1}")
    if not args.front <= args.side <= args.side_end <= BACK:
        raise UserError(f"expected --front <= --side <= --side-end <= {BACK}")
    part = re.fullmatch(r"(\d{1,6})/(\d{1,6})", args.shard)
    if not part or int(part[1]) >= int(part[2]):
        raise UserError(f"--shard {args.shard[:40]}: expected one of 0/n to n-1/n")
    args.shard = int(part[1]), int(part[2])
    check_url("--caption-url", args.caption_url)
    for flag, folder in (("videos", args.videos), ("faces", args.faces)):
        if not folder.is_dir() and not (flag == "faces" and is_toy(folder)):
            raise UserError(f"--{flag} {folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", args.device):
        raise UserError(f"--device {args.device[:40]}: expected cpu, cuda or cuda:0, cuda:1, ...")
    if args.device != "cpu" and int(args.device[5:] or 0) >= cards:
        raise UserError(f"--device {args.device}: expected cpu or one of this machine's {cards} usable GPUs")
    check_folders(args.videos, args.out)
    return args


def check_folders(videos, out):
    """UserError where an output would be read as a video, or would replace what is not curate.py's own."""
    if out.resolve().is_relative_to(videos.resolve()):
        raise UserError(f"--out {out} lies in --videos: its clips would be read as videos")
    for name in ("clips", "refs", "rows"):
        if videos.resolve().is_relative_to((out / name).resolve()):
            raise UserError(f"--videos {videos} lies in {out / name}, which is made anew: choose another "
                            "--out")
    foreign = [name for name in ("clips", "refs", "manifest.jsonl", "report.json", "report.png")
               if os.path.lexists(out / name)]
    if foreign and not (out / "rows").is_dir():
        raise UserError(f"--out {out} holds {foreign[0]} but no rows/, so it is not of curate.py and would "
                        "be replaced: choose another --out")


def check_url(flag, url):
    if url and not re.match(r"https?://[^/\s]", url):
        raise UserError(f"{flag} {url}: expected http://... or https://...")


def row_names(names, args):
    """A hash for every video: of its path, its content and its mask's, the settings and the networks."""
    networks = [fingerprint(file) for pattern in Faces.FILES.values()
                for file in sorted(args.faces.glob(pattern))[:1]]  # those that Faces reads
    settings = [ROWS, networks + toy_code(args.faces),
                [getattr(args, flag.replace("-", "_")) for flag in EXTRACT]]

    def name_of(name):
        files = filter(None, (args.videos / name, mask_of(args.videos / name)))
        with contextlib.suppress(OSError):  # extract() says why it cannot be read
            # eight small parts, as all videos are read at each start
            return fingerprint(name, [content_of(file, 2**16, 6) for file in files], settings)[:16]
        return fingerprint(name, settings)[:16]
    return list(map(name_of, names))


def in_words(counts):
    return ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))


def main(argv=None, detector=None):
    """detector: an object with the methods of faces.Faces, instead of the networks in --faces."""
    args = read_arguments(argv)
    probe_writable(args.out)
    names, passed = find_videos(args.videos)
    over = f"; passed over in {args.videos}: {in_words(passed)}" if passed else ""
    if not names:
        raise UserError(f"{args.videos} holds no videos ({' '.join(VIDEOS)}){over}")
    captions = read_captions(args.videos, names)
    if captions:
        strange = sorted(captions.keys() - set(names))
        print(f"captions for {sum(bool(captions.get(name)) for name in names)} of {len(names)} videos; "
              f"{len(strange)} rows of metadata match no video" + (f", as {strange[0]!r}" if strange else ""))
    folders = [args.out / "rows" / row for row in row_names(names, args)]
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    mine = list(zip(names, folders))[args.shard[0] * ranks + rank::args.shard[1] * ranks]
    worked = False
    for name, folder in progress(mine, "extract", "videos"):
        if read_row(folder) is None:
            worked = True
            detector = detector or load_faces(args.faces, args.device, Faces)
            try:
                with atomic_folder(folder) as build:
                    extract(args.videos / name, detector, args, build)
            except OSError:
                if read_row(folder) is None:  # else another process made the same row meanwhile
                    raise
    missing = sum(not folder.exists() for folder in folders)
    if missing:
        print(f"{missing} of {len(names)} videos are left to other shards; the last of them groups all")
    if missing or not worked and rank:  # where nobody had work the first process groups
        return
    with lock(args.out, wait=True):
        report = group(names, folders, args, captions, passed)
    if not report["clips"]["kept"]:
        counts = {kind: report[kind] for kind in ("videos", "tracks", "clips")}
        raise UserError(f"no clip is left of {len(names)} videos: {json.dumps(counts)}; see report.png and "
                        f"report.json in {args.out}")
    unused = report["tracks"]["in no clip"]
    print(f"{report['clips']['kept']} clips of {report['identities']['kept']} people from {len(names)} "
          f"videos: {args.out}/manifest.jsonl, report.png"
          + (f"; faces in no clip: {in_words(unused)}" if unused else "") + over)
