"""Videos of people -> clips, reference views of each identity, and the manifest that training reads.

  python curate.py --videos DIR --out DIR --faces DIR

1. extract  is a function of one video: shots, face tracks, clips, and each track's best picture in each view.
   It fills one folder rows/NAME, whole or not at all; a restart goes on with the next video. Spread it with
   torchrun, or over machines with --shard i/n and one --out.
2. group    reads the rows only, where none is missing: tracks become identities across videos, clips get
   references, and clips/, refs/, manifest.jsonl, report.json and report.png are written.

Views are named as the viewer sees them. A back view has no face to detect: it is a frame for which the
detector still gives a head and a |yaw| above --back. RetinaFace rarely does, so real videos have hardly any.
Pictures between front and side stay in the rows as "spare". Without ArcFace's weights an identity is one
track, and references come from the clip itself. Read beside a video: <stem>.txt, its caption (or columns
file_name|video|video_path|path and caption|prompt|text of metadata.csv or .jsonl in --videos), and
<stem>_mask.mp4, white where the people are.
"""
import base64
import collections
import csv
import hashlib
import http.client
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

import av
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from checkpoint import (Parser, UserError, as_user_error, atomic_file, atomic_folder, count, fraction,
                        frame_rate, in_range, is_text, lock, nonempty, not_negative, probe_writable,
                        read_lines, remove, run_script, save_tensors, sha256_of)
from pictures import VIEWS, from_bytes, write_video
from faces import Faces, align, crop_faces, iou

VIDEOS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".flv")
FORMATS = "mov,matroska,avi,mpegts,mpeg,flv"  # of others, playlists open further files and addresses
ROWS = 1  # to be raised where a change of the code changes rows
STEP = 4  # frames from one detection to the next, so that windows of 4n+1 frames begin and end on one
MIDDLE = {"front": 0, "left": -62, "right": 62, "back": 180}  # yaw that a view is best at
PROMPT = ("Four frames of a video. Describe it in one sentence: the people from left to right ({people} in "
          "all, called the first, the second), what they wear and do, the place and the light.")

degrees = in_range(float, 0, 180, "0 to 180 degrees")
cosine = in_range(float, -1, 1, "a cosine from -1 to 1")
EXTRACT = {  # flag: type, default, meaning; rows are made anew where one changes
    "fps": (frame_rate, 16, "frames a second of a clip"),
    "frames": (in_range(int, 5, 10001, "5 to 10001 frames"), 81, "of a clip, 4n+1"),
    "short-side": (in_range(int, 32, 4320, "32 to 4320 pixels"), 720, "larger videos are shrunk to it"),
    "cut": (fraction, 0.1, "a shot ends where the picture changes by this share of full contrast"),
    "score": (fraction, 0.65, "least score of a detection"),
    "iou": (fraction, 0.3, "least overlap of a face with itself four frames before"),
    "same-track": (cosine, 0.1, "least cosine of a face with its track's mean"),
    "gap": (in_range(int, 0, 1000, "0 to 1000"), 2, "detections that a track may miss in a row"),
    "face-side": (not_negative, 128, "least face side in pixels at 480p, a track's median"),
    "sharpness": (not_negative, 40, "least variance of a face's Laplacian, a track's median"),
    "pitch": (degrees, 35, "largest |pitch| of a reference"),
    "front": (degrees, 15, "a front view has less |yaw|"),
    "side": (degrees, 35, "a left or right view has at least this |yaw|"),
    "side-end": (degrees, 90, "and at most this"),
    "back": (degrees, 150, "a back view has more |yaw|"),
    "margin": (not_negative, 0.6, "of a reference around the face, in face sides"),
}
GROUP = {
    "people": (count, 2, "most people of a clip"),
    "same-identity": (cosine, 0.5, "tracks become one identity where their cosine, on average, is this"),
    "front-similarity": (cosine, 0.5, "least cosine of a front view with its identity's mean"),
    "side-similarity": (cosine, 0.35, "the same for left and right views"),
    "near-copy": (cosine, 0.97, "a track that is more alike is a copy of this take: no cross-pair"),
}


class Unusable(Exception):
    """Why a video is left out."""


# --------------------------------------------------------------------------------------------------- decoding
def read_frames(path, args):
    """Yield a video's pictures uint8 [H, W, 3], --fps a second: each is the last frame that began by then,
    whatever the source's rate; upright, of even sides, alpha on white. Raises Unusable."""
    try:
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        with av.open(str(path), options=options) as container:
            if not container.streams.video:
                raise Unusable("no video in it")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            rate = min(max(float(stream.guessed_rate or 25), 1), 240)
            start = last = None
            due = passed = seconds = 0
            for frame in container.decode(stream):
                seconds = passed / rate if frame.time is None else frame.time
                start, passed = (seconds if start is None else start), passed + 1
                if seconds - start > due / args.fps + 60:
                    raise Unusable("its time stamps jump")
                while last and due / args.fps < seconds - start - 1e-3:
                    yield to_picture(last, stream, args.short_side)
                    due += 1
                last = frame
            if not last:
                raise Unusable("no frames in it")
            while not due or due / args.fps < seconds - start + 1 / rate - 1e-3:
                yield to_picture(last, stream, args.short_side)
                due += 1
    except Unusable:
        raise
    except Exception as error:  # PyAV raises a dozen kinds
        raise Unusable(f"damaged or no video ({type(error).__name__})") from None


def to_picture(frame, stream, short_side):
    """A decoded frame -> uint8 [H, W, 3]."""
    aspect = float(stream.sample_aspect_ratio or 1)
    height, width = frame.height, frame.width * (aspect if 0.1 < aspect < 10 else 1)
    if min(height, width) < 16 or max(height, width) > 16384:
        raise Unusable(f"too small or too large ({frame.width} x {frame.height} pixels)")
    scale = min(1, short_side / min(height, width))
    height, width = (max(2, round(n * scale / 2) * 2) for n in (height, width))
    has_alpha = any(component.is_alpha for component in frame.format.components)
    picture = frame.to_ndarray(format="rgba" if has_alpha else "rgb24", width=width, height=height)
    picture = on_white(picture[..., :3], picture[..., 3:]) if has_alpha else picture
    return np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90)))


def on_white(picture, alpha):
    alpha = alpha.astype(np.float32) / 255
    return (picture * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


def read_with_mask(path, args):
    """Yield (picture, mask); mask from <stem>_mask.mp4, white where the people are, or None."""
    mask, shape = path.with_name(f"{path.stem}_mask.mp4"), None
    masks = read_frames(mask, args) if mask.is_file() else itertools.repeat(None)
    for picture in read_frames(path, args):
        covered, shape = next(masks, None), shape or picture.shape
        if picture.shape != shape:
            raise Unusable("its pictures change size")
        if mask.is_file() and (covered is None or covered.shape != shape):
            raise Unusable("its mask is of another size or length")
        yield picture, covered


def mark_cuts(frames, limit):
    """(picture, mask) -> (picture, mask, whether a shot begins with it).

    The measure is the mean absolute difference of 16 x 9 thumbnails. A shot begins where a picture differs
    from both before it, and the next one from the one before it (a flash is gone by then), by more than
    `limit` and four times the median of the last 16 changes (fast motion goes on; a cut comes once)."""
    waiting, old, last, now = None, None, None, None
    changes = collections.deque(maxlen=16)
    for frame in itertools.chain(frames, [None]):
        after = frame and np.float32(Image.fromarray(frame[0]).resize((16, 9), Image.Resampling.BOX)) / 255
        if waiting:
            pairs = [(a, b) for a, b in ((now, last), (now, old), (after, last))
                     if a is not None and b is not None]
            changes.append(min((np.abs(a - b).mean() for a, b in pairs if last is not None), default=0))
            yield *waiting, bool(changes[-1] > max(limit, 4 * np.median(changes)))
        waiting, old, last, now = frame, last, now, after


# ------------------------------------------------------------------------------------------- faces and tracks
class Face(NamedTuple):
    frame: int
    box: torch.Tensor  # left, top, right, bottom in pixels
    yaw: float
    pitch: float
    side: float  # pixels at 480p
    sharpness: float
    embedding: torch.Tensor | None


@dataclass(eq=False)
class Track:
    shot: int
    faces: list = field(default_factory=list)  # without their embeddings
    total: torch.Tensor | None = None  # sum of the embeddings
    best: dict = field(default_factory=dict)  # view -> (quality, Face, picture as a PNG file)

    def covers(self, first, last):
        return self.faces[0].frame <= first and self.faces[-1].frame >= last

    def median(self, name):
        return float(np.median([getattr(face, name) for face in self.faces]))


def find_faces(detector, pictures, numbers, args):
    """uint8 pictures [H, W, 3] -> a list of Faces for each. Sharpness: variance of the Laplacian of the face
    with its margin at 112 pixels, brightness in 0..255, so that it does not depend on the source's size."""
    images = from_bytes(torch.from_numpy(np.stack(pictures))).permute(0, 3, 1, 2)
    found = [[f for f in one if f.score >= args.score] for one in detector.detect(images)]
    seen = [(image, f) for image, one in zip(images, found) for f in one]
    if not seen:
        return found
    squares = torch.cat([crop_faces(image, f.box[None]) for image, f in seen])
    embeddings = detector.embed(torch.cat([align(image, f.landmarks[None]) for image, f in seen]))
    angles = detector.pose(squares, torch.stack([f.landmarks for _, f in seen])).tolist()
    grey = F.interpolate(squares, (112, 112), mode="area").mean(1, keepdim=True) * 127.5
    laplacian = torch.tensor([[[[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]]])
    sharpness = F.conv2d(grey, laplacian).flatten(1).var(1).tolist()
    scale, order = 480 / min(images.shape[2:]), itertools.count()
    return [[Face(number, f.box, *angles[i][:2], scale * (f.box[2:] - f.box[:2]).max().item(), sharpness[i],
                  None if embeddings is None else embeddings[i].float())
             for f, i in zip(one, order)] for number, one in zip(numbers, found)]


def follow(live, faces, shot, args):
    """Give each face of a frame to one of the live tracks or to a new one; returns the tracks in that order.
    Best pairs first, by overlap plus cosine; a face whose cosine is at least 0.5 may have jumped."""
    pairs, owner = [], {}
    for t, track in enumerate(live):
        for f, face in enumerate(faces):
            overlap, alike = iou(track.faces[-1].box, face.box[None]).item(), None
            if face.embedding is not None:
                alike = float(F.normalize(track.total, dim=0) @ face.embedding)
            if overlap >= args.iou and (alike is None or alike >= args.same_track) or (alike or 0) >= 0.5:
                pairs.append((-overlap - (alike or 0), t, f))
    for _, t, f in sorted(pairs):
        if f not in owner and live[t] not in owner.values():
            owner[f] = live[t]
    for f, face in enumerate(faces):
        track = owner.setdefault(f, Track(shot))
        if face.embedding is not None:
            track.total = face.embedding + (0 if track.total is None else track.total)
        track.faces.append(face._replace(embedding=None))
    return [owner[f] for f in range(len(faces))]


def view_of(face, args):
    """The view that a face shows, or None where it is of no use."""
    yaw = abs(face.yaw)
    if not (abs(face.pitch) <= args.pitch and face.sharpness >= args.sharpness and yaw <= 180):  # or nan
        return None
    if args.side <= yaw <= args.side_end:
        return "left" if face.yaw < 0 else "right"
    if yaw < args.side:
        return "front" if yaw < args.front else "spare"
    return "back" if yaw > args.back else None


def keep_best(track, face, others, picture, mask, args):
    """Crop the face as a reference where it is the track's best of its view so far: sharp, and turned as the
    view is. Head and shoulders, on white where there is a mask, with nobody else's face in it."""
    view = view_of(face, args)
    turned = math.cos(math.radians(face.yaw - MIDDLE.get(view, face.yaw))) if view else 0
    quality = face.sharpness * turned**2
    if not view or quality <= track.best.get(view, (0,))[0]:
        return
    low, high = face.box.double().view(2, 2).numpy()
    half = (0.5 + args.margin) * (high - low).max()
    centre = (low + high) / 2 + (0, 0.2 * (high - low)[1])
    alone = all((abs(f.box.view(2, 2).mean(0).numpy() - centre) >= half).any() for f in others)
    columns, rows = (slice(max(0, round(c - half)), max(0, round(c + half))) for c in centre)
    crop = picture[rows, columns]
    if crop.size and alone:
        file = io.BytesIO()
        Image.fromarray(crop if mask is None else on_white(crop, mask[rows, columns])).save(file, "PNG")
        track.best[view] = quality, face, file.getvalue()


def find_windows(tracks, kept, frames):
    """Clips among one shot's tracks, [(first frame, its tracks from left to right)], without common frames.
    A clip's tracks last from its first frame to its last. No other large face is in it, even for a part: it
    would have no reference."""
    windows, start = [], min((t.faces[0].frame for t in tracks), default=0)
    while any(t.faces[-1].frame >= start + frames - 1 for t in tracks):
        end = start + frames - 1
        inside = [t for t in tracks if t.faces[0].frame <= end and t.faces[-1].frame >= start]
        if inside and all(t in kept and t.covers(start, end) for t in inside):
            inside.sort(key=lambda t: next(face for face in t.faces if face.frame >= start).box[0].item())
            windows.append((start, inside))
            start = end
        start += STEP
    return windows


# ---------------------------------------------------------------------------------------------------- extract
def extract(path, detector, args, folder):
    """One video -> its row in `folder`: row.json, embeddings.safetensors, clips and candidate references.
    A video that is of no use has a row with the reason only."""
    def empty(reason=None):
        return {"reason": reason, "frames": 0, "shots": 1, "dropped": {}, "yaw": [0] * 36, "tracks": [],
                "clips": []}
    row = empty()
    av.logging.set_level(av.logging.WARNING)
    av.logging.set_skip_repeated(False)  # or the second of two videos with one complaint would look sound
    try:
        with av.logging.Capture(local=False) as log:  # a damaged mp4 decodes without an exception
            tracks = find_tracks(path, detector, args, row)
            # what a container or swscaler warns of is harmless; what a decoder warns of is a damaged picture
            bad = [" ".join(text.split())[:80] for level, name, text in log if level <= av.logging.ERROR or
                   name.split(",")[0] not in (*FORMATS.split(","), "swscaler")]
            if bad:
                raise Unusable(f"damaged, as the decoder says ({bad[0]})")
            store_tracks(path, tracks, args, row, folder)
    except Unusable as error:
        row = empty(str(error))
    finally:
        av.logging.set_level(None)
    (folder / "row.json").write_text(json.dumps(row))


def find_tracks(path, detector, args, row):
    """The tracks of a video's faces; counts its frames, shots and yaws in `row`."""
    tracks, live = [], []
    frames = enumerate(mark_cuts(read_with_mask(path, args), args.cut))
    while batch := list(itertools.islice(frames, 8 * STEP)):
        looked = []
        for number, (picture, mask, cut) in batch:
            row["frames"], row["shots"] = number + 1, row["shots"] + cut
            if number % STEP == 0:
                looked.append((number, row["shots"], picture, mask))
        found = find_faces(detector, [x[2] for x in looked], [x[0] for x in looked], args)
        for (number, shot, picture, mask), faces in zip(looked, found):
            oldest = number - STEP * (args.gap + 1)
            live = [t for t in live if t.shot == shot and t.faces[-1].frame >= oldest]
            for face, track in zip(faces, follow(live, faces, shot, args)):
                if len(track.faces) == 1:
                    tracks.append(track)
                    live.append(track)
                if not math.isnan(face.yaw):
                    row["yaw"][int((face.yaw + 180) % 360 // 10)] += 1
                keep_best(track, face, [f for f in faces if f is not face], picture, mask, args)
    return tracks


def store_tracks(path, tracks, args, row, folder):
    """Filter tracks, and write those that are kept, their references and clips."""
    reasons, views = {}, []
    for track in tracks:
        reasons[track] = ("seen less than three times" if len(track.faces) < 3 else
                          "small" if track.median("side") < args.face_side else
                          "blurred" if track.median("sharpness") < args.sharpness else "")
    kept = [track for track, reason in reasons.items() if not reason]
    row["dropped"] = dict(sorted(collections.Counter(filter(None, reasons.values())).items()))
    for number, track in enumerate(kept):
        row["tracks"].append({"start": track.faces[0].frame, "end": track.faces[-1].frame, "views": {}})
        for view, (quality, face, file) in sorted(track.best.items()):
            (folder / f"{number}_{view}.png").write_bytes(file)
            facts = {"yaw": face.yaw, "pitch": face.pitch, "quality": quality}
            row["tracks"][-1]["views"][view] = {name: round(fact, 1) for name, fact in facts.items()}
            views.append(face.embedding)
    if kept and kept[0].total is not None:
        means = torch.stack([F.normalize(track.total, dim=0) for track in kept]).half()
        save_tensors(folder / "embeddings.safetensors",
                     {"tracks": means, "views": torch.stack([*views, means[0].float()])[:-1].half()})
    for shot in range(1, row["shots"] + 1):
        large = [t for t, reason in reasons.items() if t.shot == shot and reason in ("", "blurred")]
        row["clips"] += [{"start": start, "tracks": [kept.index(track) for track in people]}
                         for start, people in find_windows(large, kept, args.frames)]
    clips, clip, frames = {clip["start"]: clip for clip in row["clips"]}, None, []
    for number, picture in enumerate(read_frames(path, args) if clips else ()):
        clip = clips.get(number, clip)
        if clip:
            frames.append(from_bytes(torch.from_numpy(picture)).half())  # which holds all 256 values
        if len(frames) == args.frames:
            file = folder / f"{clip['start']}.mp4"
            write_video(file, torch.stack(frames).permute(3, 0, 1, 2), args.fps)
            clip["sha256"], clip, frames = sha256_of(file), None, []


# ------------------------------------------------------------------------------------------------- identities
def cluster(tracks, least, block=4096, device="cpu"):
    """Agglomerative clustering with average linkage, in rounds: unit vectors [n, D] -> identities [n].

    A round finds for each cluster the eight later ones that are most alike, block by block of the matrix of
    all pairs. Best first, two clusters merge where the cosine of their tracks, on average over all pairs as
    they have grown by then, is at least `least`. The end is when no two clusters are so alike. Memory: a few
    times the tracks, and a block. The order of the tracks decides ties only."""
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
        values, first, second = alike_pairs(means, least, block)
        for k in np.lexsort((second, first, -values)):
            a, b = sorted((find(alive[first[k]]), find(alive[second[k]])))
            if a != b and total[a] @ total[b] >= least * size[a] * size[b]:
                total[a] += total[b]
                size[a] += size[b]
                root[b], merged = a, True
    return np.unique([find(i) for i in range(len(root))], return_inverse=True)[1]


def alike_pairs(means, least, block, most=8):
    """Rows i < j whose product is at least `least`, the `most` best of each i -> values, i, j."""
    found = [(np.zeros(0, np.float32), np.zeros(0, int), np.zeros(0, int))]
    for i in range(0, len(means), block):
        rows = means[i:i + block]
        best = means.new_full((len(rows), most), -torch.inf)
        where = torch.zeros_like(best, dtype=torch.long)
        for j in range(i, len(means), block):
            tile = rows @ means[j:j + block].T
            if i == j:
                tile.masked_fill_(torch.ones_like(tile, dtype=torch.bool).tril_(), -torch.inf)
            some = (tile.amax(1) >= least).nonzero()[:, 0]
            value, column = tile[some].topk(min(most, tile.shape[1]))
            best[some], order = torch.cat((best[some], value), 1).topk(most)
            where[some] = torch.cat((where[some], column + j), 1).gather(1, order)
        row, k = (best >= least).nonzero(as_tuple=True)
        found.append([x.cpu().numpy() for x in (best[row, k], row + i, where[row, k])])
    return [np.concatenate(parts) for parts in zip(*found)]


class Reference(NamedTuple):
    score: float  # sharpness and yaw, times similarity
    track: int  # among those of all rows
    path: Path
    facts: dict  # yaw, pitch, similarity


def read_row(folder):
    with as_user_error(f"{folder} (delete it, it is made again)"):
        return json.loads((folder / "row.json").read_text())


def read_embeddings(folder):
    """{"tracks": [n, D], "views": [m, D]} of a row, or {} where it has none."""
    path = folder / "embeddings.safetensors"
    with as_user_error(f"{folder} (delete it, it is made again)"):
        return safetensors.torch.load_file(path) if path.exists() else {}


def find_references(folders, rows, args):
    """-> the identity of every track [n]; for every identity {view: [Reference, best first]}; the tracks'
    embeddings or None; how many references were unlike their identity."""
    identity, embeddings = np.arange(sum(len(row["tracks"]) for row in rows)), None
    if parts := [e["tracks"] for folder in folders if (e := read_embeddings(folder))]:
        embeddings = torch.cat(parts)
        identity = cluster(embeddings, args.same_identity, device=args.device)
        means = torch.zeros(identity.max() + 1, embeddings.shape[1])
        means = F.normalize(means.index_add_(0, torch.from_numpy(identity), embeddings.float()))
    references = [collections.defaultdict(list) for _ in range(identity.max(initial=-1) + 1)]
    least = {"front": args.front_similarity, "left": args.side_similarity, "right": args.side_similarity}
    unlike, track = 0, itertools.count()
    for folder, row in zip(folders, rows):
        views, n = read_embeddings(folder).get("views"), itertools.count()
        for (number, entry), t in zip(enumerate(row["tracks"]), track):
            for view, facts in entry["views"].items():
                alike = None
                if views is not None:
                    alike = round(float(views[next(n)].float() @ means[identity[t]]), 3)
                seen = {"yaw": facts["yaw"], "pitch": facts["pitch"], "similarity": alike}
                if alike is not None and alike < least.get(view, -1):
                    unlike += 1
                elif view in VIEWS:
                    score = facts["quality"] * (1 if alike is None else max(alike, 0))
                    references[identity[t]][view].append(
                        Reference(score, t, folder / f"{number}_{view}.png", seen))
    for found in itertools.chain.from_iterable(views.values() for views in references):
        found.sort(key=lambda r: (-r.score, r.track))
    return identity, references, embeddings, unlike


# ------------------------------------------------------------------------------------------------------ group
def references_of(track, found, embeddings, near_copy):
    """A clip's person -> {view: (Reference, cross)}: the best picture of another track (cross-pair), but not
    of one so alike that it is a copy of this take, or else this track's own."""
    chosen = {}
    for view in VIEWS:
        cross = (r for r in found.get(view, ()) if r.track != track and
                 float(embeddings[r.track].float() @ embeddings[track].float()) <= near_copy)
        own = (r for r in found.get(view, ()) if r.track == track)
        if best := next(cross, None) or next(own, None):
            chosen[view] = best, best.track != track
    return chosen


def group(names, folders, args, captions):
    """Rows -> clips, references, manifest and report in args.out; returns the report."""
    rows = [read_row(folder) for folder in folders]
    identity, references, embeddings, unlike = find_references(folders, rows, args)
    dropped, entries, files, shown, first = collections.Counter(), [], {}, {}, 0
    for name, folder, row in zip(names, folders, rows):
        for clip in row["clips"]:
            tracks = [first + number for number in clip["tracks"]]
            people = [int(identity[t]) for t in tracks]
            chosen = [references_of(t, references[who], embeddings, args.near_copy)
                      for t, who in zip(tracks, people)]
            reason = (f"more than {args.people} people" if len(people) > args.people else
                      "one identity twice" if len(set(people)) < len(people) else
                      "no front view" if not all("front" in views for views in chosen) else
                      "no side view" if not all({"left", "right"} & views.keys() for views in chosen) and
                      not args.front_only else "")
            if reason:
                dropped[reason] += 1
                continue
            video, identities = f"clips/{folder.name}_{clip['start']}.mp4", []
            files[video] = folder / f"{clip['start']}.mp4"
            for who, views in zip(people, chosen):
                person, images = f"person_{who + 1:04d}", {}
                for view, (r, cross) in views.items():
                    image = f"refs/{person}_{r.path.parent.name}_{r.path.name}"
                    files[image] = shown.setdefault(person, {})[view] = r.path
                    images[view] = {"image": image, **r.facts, "cross": cross}
                identities.append({"id": person, "views": images})
            entries.append({"video": video, "caption": captions.get(name, ""), "fps": args.fps,
                            "frames": args.frames, "sha256": clip["sha256"], "source": name,
                            "identities": identities})
        first += len(row["tracks"])
    publish(args.out, files)
    failed = ask_captions(entries, args) if args.caption_url else {}
    reasons = {name: row["reason"] for name, row in zip(names, rows) if row["reason"]}
    kinds = collections.Counter(reason.split(" (")[0] for reason in reasons.values())
    lost = sum((collections.Counter(row["dropped"]) for row in rows), collections.Counter())
    report = {
        "videos": {"all": len(names), "left out": dict(kinds), "kept": len(names) - len(reasons)},
        "tracks": {"all": first + lost.total(), "left out": dict(lost), "kept": first},
        "clips": {"all": sum(len(row["clips"]) for row in rows), "left out": dict(dropped),
                  "kept": len(entries), "without caption": sum(not entry["caption"] for entry in entries)},
        "identities": {"found": len(references), "kept": len(shown), "by embedding": embeddings is not None,
                       "with a view": {view: sum(view in v for v in shown.values()) for view in VIEWS},
                       "by number of views": collections.Counter(sorted(map(len, shown.values())))},
        "references unlike their identity": unlike, "shots": sum(row["shots"] for row in rows),
        "seconds": sum(row["frames"] for row in rows) / args.fps,
        "yaw, in steps of 10 degrees from -180": np.sum([row["yaw"] for row in rows], 0).tolist(),
        "settings": {name: getattr(args, name.replace("-", "_")) for name in (*EXTRACT, *GROUP)},
        "videos left out": reasons, "captions that failed": failed}
    with atomic_file(args.out / "manifest.jsonl") as temporary:
        temporary.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    with atomic_file(args.out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1))
    with atomic_file(args.out / "report.png") as temporary:
        draw_report(report, shown).save(temporary, "PNG")
    return report


def publish(out, files):
    """Link {name: file of a row} into clips/ and refs/, and take out what an earlier run put there."""
    for folder in (out / "clips", out / "refs"):
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            if f"{folder.name}/{old.name}" not in files:
                remove(old)
    for name, source in files.items():
        with atomic_file(out / name) as temporary:
            remove(temporary)
            try:
                os.link(source, temporary)
            except OSError:  # a file system without links
                shutil.copy(source, temporary)


# --------------------------------------------------------------------------------------------------- captions
def read_captions(folder, names):
    """{video: its caption}, from the files that the top of this file names."""
    rows, captions = read_lines(folder / "metadata.jsonl"), {}
    if (folder / "metadata.csv").is_file():
        with as_user_error(folder / "metadata.csv"):
            text = (folder / "metadata.csv").read_text(encoding="utf-8-sig")
            rows += csv.DictReader(io.StringIO(text, newline=""))
    for row in rows:
        video, words = (next((row[key] for key in keys if is_text(row.get(key))), "") for keys in (
            ("file_name", "video", "video_path", "path"), ("caption", "prompt", "text")))
        captions[os.path.normpath(video)] = words
    for name in names:
        beside = (folder / name).with_suffix(".txt")
        if beside.is_file():
            captions[name] = beside.read_text(encoding="utf-8-sig", errors="replace")
    return {name: " ".join(words.split()) for name, words in captions.items()}


def ask_captions(entries, args):
    """Fill missing captions by a vision endpoint. captions.jsonl keeps the answers, so that none is asked for
    again. Returns {clip: why it has none}; ten failures in a row end the asking."""
    store, failed, in_a_row = args.out / "captions.jsonl", {}, 0
    known = {line.get("video"): line.get("caption") for line in read_lines(store)}
    for entry in tqdm(entries, desc="captions", unit=" clips", disable=None):
        video = entry["video"]
        entry["caption"] = entry["caption"] or known.get(video) or ""
        if entry["caption"] or in_a_row == 10:
            continue
        try:
            entry["caption"], in_a_row = ask_caption(args.out / video, len(entry["identities"]), args), 0
            with open(store, "a") as file:  # the first \n ends what a kill cut off
                file.write(f'\n{json.dumps({"video": video, "caption": entry["caption"]})}\n')
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, Unusable) as error:
            failed[video], in_a_row = f"{type(error).__name__}: {error}"[:200], in_a_row + 1
            print(f"{video} gets no caption: {failed[video]}", file=sys.stderr)
    return failed


def ask_caption(path, people, args, frames=4, tries=3):
    """A caption of a clip from an OpenAI-compatible endpoint that sees `frames` of its frames."""
    pictures = list(read_frames(path, args))
    content = [{"type": "text", "text": args.caption_prompt.replace("{people}", str(people))}]
    for k in np.linspace(0, len(pictures) - 1, frames).round().astype(int):
        image, file = ImageOps.contain(Image.fromarray(pictures[k]), (512, 512)), io.BytesIO()
        image.save(file, "JPEG")
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    body = {"model": args.caption_model, "messages": [{"role": "user", "content": content}]}
    headers = {"Content-Type": "application/json",
               "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
    address = f"{args.caption_url.rstrip('/')}/chat/completions"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    for attempt in range(tries):
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                words = json.load(answer)["choices"][0]["message"]["content"]
            if not is_text(words) or not words.strip():
                raise ValueError("an empty answer")
            return " ".join(words.split())
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError):
            if attempt == tries - 1:
                raise
            time.sleep(2**attempt)


# ------------------------------------------------------------------------------------------------- report.png
INK, GREY, BLUE, RED = "#222222", "#999999", "#4477aa", "#cc6677"
BANDS = {"front": "#88ccaa", "left": "#88bbee", "right": "#eebb77", "back": "#bbaadd"}


def draw_report(report, shown, tile=104, most=30):
    """The funnel, the yaw histogram and the first identities by view as one PIL image.
    shown: {identity: {view: picture file}}"""
    bars = []  # label, how many, of how many, colour
    for kind in ("videos", "tracks", "clips"):
        part = report[kind]
        bars.append((f"{kind}, all", part["all"], part["all"], BLUE))
        bars += [(f"   {reason}", n, part["all"], RED) for reason, n in part["left out"].items()]
        bars.append((f"{kind}, kept", part["kept"], part["all"], BLUE))
    people, below = list(shown.items())[:most], 114 + max(22 * len(bars), 286)
    sheet = Image.new("RGB", (1280, below + 40 + (tile + 16) * math.ceil(len(people) / 2)), "white")
    draw = ImageDraw.Draw(sheet)

    def write(x, y, text, size=13, colour=INK, anchor="la"):
        draw.text((x, y), text, colour, ImageFont.load_default(size), anchor)
    minutes, kept = f"{report['seconds'] / 60:,.1f} minutes", report["clips"]["kept"]
    write(24, 14, f"{kept:,} clips of {len(shown):,} people, from {minutes} of video", 24)
    write(24, 54, "What is kept, and why the rest is not", 15)
    for k, (label, n, whole, colour) in enumerate(bars):
        y, end = 84 + 22 * k, 290 + round(260 * n / max(whole, 1))
        write(24, y, label[:40], colour=colour if colour == RED else INK)
        draw.rectangle((290, y + 1, end, y + 15), colour if n else None)
        write(end + 8, y, f"{n:,}")
    yaw, limits = report["yaw, in steps of 10 degrees from -180"], report["settings"]
    front, side, end, back = (limits[name] for name in ("front", "side", "side-end", "back"))
    left, bottom, step = 690, 330, 15
    write(left, 54, "Yaw of all faces, in degrees", 15)
    for view, low, high in (("front", -front, front), ("left", -end, -side), ("right", side, end),
                            ("back", -180, -back), ("back", back, 180)):
        low, high = (left + (angle + 180) / 10 * step for angle in (low, high))
        draw.rectangle((low, 104, high, bottom), BANDS[view])
        write((low + high) / 2, 98, view, 12, anchor="ms")
    for k, n in enumerate(yaw):
        if n:
            x = left + k * step
            draw.rectangle((x + 2, bottom - math.ceil(210 * n / max(yaw)), x + step - 2, bottom), INK)
    for angle in range(-180, 181, 90):
        write(left + (angle + 180) / 10 * step, bottom + 4, str(angle), 12, anchor="ma")
    write(left, bottom + 24, f"{sum(yaw):,} faces, {max(yaw):,} in the highest bar", 12, GREY)
    write(24, below, f"Identities by view, {len(people)} of {len(shown):,}", 15)
    for k, (person, views) in enumerate(people):
        x, y = 24 + k % 2 * 626, below + 30 + k // 2 * (tile + 16)
        write(x, y, person, 12, GREY)
        for view in VIEWS:
            x += tile + 6
            if view in views:
                with Image.open(views[view]) as picture:
                    sheet.paste(ImageOps.pad(picture, (tile, tile), color="white"), (x, y))
            else:
                write(x + tile / 2, y + tile / 2, f"no {view}", 12, GREY, "mm")
            draw.rectangle((x, y, x + tile, y + tile), outline=BANDS[view], width=2)
    return sheet


# -------------------------------------------------------------------------------------------------------- CLI
def read_arguments(argv):
    p = Parser(description=__doc__)
    add = p.add_argument
    add("--videos", required=True, type=Path, help="folder of videos, searched in depth")
    add("--out", required=True, type=Path, help="folder to write to")
    add("--faces", required=True, type=Path, help="folder with the weights that faces.py names")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--shard", default="0/1", help="i/n, from 0/n to n-1/n: extract every n-th video, from the i-th on")
    add("--front-only", action="store_true", help="also keep clips of people without a side view")
    add("--caption-url", type=nonempty, help="OpenAI-compatible endpoint for clips without a caption")
    add("--caption-model", type=nonempty, default="default", help="its model; OPENAI_API_KEY may hold a key")
    add("--caption-prompt", type=nonempty, default=PROMPT, help="what it is asked")
    for flag, (kind, default, meaning) in (EXTRACT | GROUP).items():
        add(f"--{flag}", type=kind, default=default, help=f"{meaning} ({default})")
    args = p.parse_args(argv)
    if args.frames % STEP != 1:
        raise UserError(f"--frames {args.frames}: expected 4n+1, for example {args.frames // 4 * 4 + 1}")
    if not args.front <= args.side <= args.side_end <= args.back:
        raise UserError("expected --front <= --side <= --side-end <= --back")
    part = re.fullmatch(r"(\d{1,6})/(\d{1,6})", args.shard)
    if not part or int(part[1]) >= int(part[2]):
        raise UserError(f"--shard {args.shard[:40]}: expected one of 0/n to n-1/n")
    args.shard = int(part[1]), int(part[2])
    if args.caption_url and not re.match(r"https?://[^/\s]", args.caption_url):
        raise UserError(f"--caption-url {args.caption_url}: expected http://... or https://...")
    if not args.videos.is_dir():
        raise UserError(f"{args.videos}: {'not a folder' if args.videos.exists() else 'no such folder'}")
    if args.out.resolve().is_relative_to(args.videos.resolve()):
        raise UserError(f"--out {args.out} lies in --videos: its clips would be read as videos")
    return args


def find_videos(folder):
    """The relative paths of all videos below a folder, in order."""
    paths = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in VIDEOS
             and p.name[0] != "." and not p.stem.endswith("_mask") and p.is_file()]
    for name in paths:
        if not is_text(name):
            print(f"{ascii(name)} is left out: its name is not valid UTF-8", file=sys.stderr)
    if not any(map(is_text, paths)):
        raise UserError(f"{folder} holds no videos ({' '.join(VIDEOS)})")
    return sorted(filter(is_text, paths))


def row_names(names, args):
    """A hash for every video: of its path, its length in bytes, the settings and the networks."""
    networks = sorted((f.name, f.stat().st_size) for f in args.faces.glob("*") if f.is_file())
    settings = [ROWS, networks, [getattr(args, name.replace("-", "_")) for name in EXTRACT]]
    return [hashlib.sha256(json.dumps([name, (args.videos / name).stat().st_size, settings]).encode())
            .hexdigest()[:16] for name in names]


def main(argv=None, detector=None):
    """detector: an object with the methods of faces.Faces, instead of the networks in --faces."""
    args = read_arguments(argv)
    probe_writable(args.out)
    names = find_videos(args.videos)
    captions = read_captions(args.videos, names)
    folders = [args.out / "rows" / row for row in row_names(names, args)]
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    mine = list(zip(names, folders))[args.shard[0] * ranks + rank::args.shard[1] * ranks]
    for name, folder in tqdm(mine, desc="extract", unit=" videos", disable=None):
        if not folder.exists():
            detector = detector or Faces(args.faces, args.device)
            with atomic_folder(folder) as build:
                extract(args.videos / name, detector, args, build)
            if reason := read_row(folder)["reason"]:
                print(f"{name} is left out: {reason}", file=sys.stderr)
    missing = sum(not folder.exists() for folder in folders)
    if missing:
        print(f"{missing} of {len(names)} videos are left to other shards; the last of them groups all")
        return
    with lock(args.out, wait=True):
        report = group(names, folders, args, captions)
    if not report["clips"]["kept"]:
        counts = {kind: report[kind] for kind in ("videos", "tracks", "clips")}
        raise UserError(f"no clip is left of {len(names)} videos: {json.dumps(counts)}; see report.png and "
                        f"report.json in {args.out}")
    print(f"{report['clips']['kept']} clips of {report['identities']['kept']} people from {len(names)} "
          f"videos: {args.out}/manifest.jsonl, report.png")


if __name__ == "__main__":
    run_script(main, "a smaller --short-side or --frames")
