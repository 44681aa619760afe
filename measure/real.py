"""The real benchmark: videos of any system, measured with the networks of faces.py by the rules in METRICS.

cases.py says what a case is. Its video is <id>.mp4, or another of pictures.VIDEOS. A video that cannot be
measured is a result with a reason, is counted beside the table, and counts in no mean.

Videos are watched at one rate for all systems, --fps. In each picture the n largest faces count, for n
people. They are followed into tracks, and tracks are assigned to people so that most faces have an owner and
then similarity is greatest, nobody at two places at once. Without ArcFace, or where somebody has no
evaluation reference that shows a face, nothing that needs identity is measured, and people are told apart by
place.
"""
import contextlib
import functools
import hashlib
import itertools
import json
import math
import re
import sys
import time
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from measure.cases import Case, read_cases
from measure.report import (BIN_NAMES, Metric, append, base64_of, by_case, by_yaw, column, estimate, figure,
                            in_columns, interval, mean, one, per_frame, plot, read_results, show, table,
                            write_page)
from networks.faces import Aesthetic, ArcFace, Faces, RetinaFace, SixDRepNet, align, find_faces
from sample import (ROUND, SAMPLE_RECIPES, find, frames_and_size, load, made_with, make_round, note_of,
                    override, recipe_flags)
from support.processes import World
from support.script import (Parser, UserError, check_outputs, count, fingerprint, frame_rate, lock, nonempty,
                            probe_writable, progress, sha256_of, source_hash, uses_bf16)
from videos import toy
from videos.curate import EXTRACT, MIDDLE, ask, check_url, follow
from videos.manifest import Names
from videos.pictures import (VIDEOS, Job, check_ours, frame_count, from_bytes, notes_in, open_picture,
                             picture_size, read_frames, read_picture, read_references, to_bytes,
                             watch_decoder, wrap, write_video)
from videos.toyfaces import is_toy, load_faces, toy_code

SHORT_SIDE = 720  # larger videos are shrunk to it
LONGEST = 120  # seconds of a video
REFERENCE_SIDE = 512  # of the white square that a reference is fitted into
BORDER = 0.25  # of grey around a picture in which no face was found, in its sides: the public rule's retry
GAP = 0.5  # seconds that a face may be away within one track
REACHED = 95  # percentile of the yaws that counts as reached: one wrong picture in forty is not
COPY_POSE = 8  # degrees of yaw and pitch together: nearer to a reference's pose, a face may be its copy
# and its aligned pixels have at least this correlation with the reference's: a picture coded, scaled,
# lit or turned had 0.90 to 0.996 in 13 of 15 tries, a talking man with himself a second before at most 0.77
COPY_PIXELS = 0.9
PUBLIC_FRAMES, JUDGED_FRAMES, JUDGED, RATED_FRAMES, SHOWN_FRAMES = 32, 16, 3, 8, 8
STYLE = " div p { margin: 2px 0; max-width: 1000px } img { image-rendering: auto }"
CODE = ("measure/real", "networks/faces", "videos/curate", "videos/pictures")  # what a result depends on
RUBRIC = ("These are {frames} frames of one generated video, in their order. How natural is it? 5: like a "
          "real recording, 4: small flaws on a second look, 3: visible flaws of bodies, faces or motion, "
          "2: clearly artificial, 1: broken. Answer with one number from 1 to 5.")


# ---------------------------------------------------------------------------------------------------- metrics
def counting_zero(p):
    """Similarity by picture, 0 where the person is not seen; None where no identity is measured."""
    return [value or 0 for value in p["alike"]] if p["alike"] else [None]


METRICS = {
    "mvrc": Metric("cosine with an evaluation reference, mean over all pictures and references; a picture "
                   "without that face counts 0; not clamped", counting_zero),
    "mvrc_seen": Metric("the same over pictures with that face", lambda p: p["alike"] or [None]),
    "public": Metric("ANOTHER RULE, for comparison only: OpenS2V's public code takes 32 pictures by "
                     "linspace, the largest face in each, max(0, cosine) with the first reference, and skips "
                     "pictures without a face, so hiding the face raises it; one person only",
                     one("public")),
    "face_rate": Metric("pictures with that face", lambda p: p["face"], True),
    "best_view": Metric("cosine with the nearest evaluation reference, over pictures with that face",
                        lambda p: p["best"] or [None]),
    "given": Metric("cosine as in mvrc_seen, pictures whose nearest of the four views by yaw was given",
                    per_frame("alike", seen=[True])),
    "not_given": Metric("the same of the other pictures", per_frame("alike", seen=[False])),
    "coverage": Metric(f"{REACHED}th percentile of the yaw towards the side that the prompt asks for, over "
                       "the yaw asked for, 0 to 1, mean over its sides; 0 where the face is never seen",
                       one("coverage")),
    "swaps": Metric("people who do not stand where the prompt says, from left to right, after assignment by "
                    "identity", one("swapped"), True),
    "margin": Metric("cosine with one's own references minus that with the nearest other person's, after "
                     "assignment by identity", one("margin")),
    "crossed": Metric("pictures whose face is nearer to another person of the case",
                      lambda p: p["crossed"] or [None], True),
    "copied": Metric("pictures whose nearest given reference by pose is also the nearest by aligned pixels, "
                     f"within {COPY_POSE} degrees and with a correlation of at least {COPY_PIXELS}",
                     lambda p: p["copied"] or [None], True),
    "amplitude": Metric("root mean square distance of the face from its mean place, in face sides",
                        one("amplitude")),
    "roughness": Metric("second difference of the face's place from picture to picture, mean, in face sides; "
                        "0 is smooth", one("roughness")),
    "steadiness": Metric("cosine of the face with itself in the next picture", lambda p: p["next"] or [None]),
    "aesthetic": Metric("LAION's aesthetic score, about 1 to 10, mean of 8 pictures", one("aesthetic")),
    "natural": Metric("1 to 5 by a vision model that sees 16 pictures, mean of 3 answers", one("natural")),
}
HEADLINE = ("mvrc", "face_rate", "coverage", "swaps", "copied")
DETAILS = (("mvrc_seen", "best_view", "public", "given", "not_given", "steadiness"),
           ("margin", "crossed", "amplitude", "roughness", "aesthetic", "natural"))


def number(value):
    """As JSON holds it: None for what is not finite."""
    return round(float(value), 5) if value is not None and math.isfinite(value) else None


# -------------------------------------------------------------------------------------------------- measuring
class BenchmarkFaces(Faces):
    WITHOUT = {ArcFace: "nothing that needs identity is measured",
               SixDRepNet: "yaw comes from five landmarks and falls short at large yaws"}


class Shown(NamedTuple):
    """A face in a picture, as curate.follow takes it."""
    frame: int
    box: torch.Tensor
    yaw: float
    pitch: float
    embedding: torch.Tensor | None
    pixels: torch.Tensor  # of the aligned grey crop, of mean 0 and length 1: products are correlations


def find_shown(picture, frame, detector, most):
    """The `most` largest faces of a uint8 picture [H, W, 3], the largest first."""
    faces = find_faces(detector, picture, frame, EXTRACT["score"][1])
    faces = sorted(faces, key=lambda face: -face.side)[:most]
    if not faces:
        return []
    image = from_bytes(torch.from_numpy(picture)).permute(2, 0, 1)
    grey = align(image, torch.stack([face.landmarks for face in faces])).mean(1).flatten(1)
    grey = torch.nn.functional.normalize(grey - grey.mean(1, keepdim=True), dim=1)
    return [Shown(frame, face.box, face.yaw, face.pitch, face.embedding, pixels)
            for face, pixels in zip(faces, grey)]


def largest(picture, detector):
    """The largest face of a picture, or None."""
    return next(iter(find_shown(picture, 0, detector, 1)), None)


def find_with_border(picture, detector):
    """The largest face of a picture with a grey border, or None."""
    edges = [(round(BORDER * n),) * 2 for n in picture.shape[:2]]
    return largest(np.pad(picture, (*edges, (0, 0)), constant_values=128), detector)


@functools.lru_cache(maxsize=2000)  # many cases show one person
def look_up(file, detector):
    """A reference picture -> the Shown of its largest face, or None."""
    picture = read_picture(file, (REFERENCE_SIDE, REFERENCE_SIDE))
    picture = to_bytes(picture).permute(1, 2, 0).contiguous().numpy()
    return largest(picture, detector) or find_with_border(picture, detector)


class Watched(NamedTuple):
    """What is seen of a video."""
    tracks: list
    small: list  # its pictures, uint8, 512 pixels on the longest side
    bordered: dict  # picture number -> Shown that was found with a grey border only
    width: int


def watch(path, detector, most, fps):
    """-> Watched, of a video with at most so many people."""
    tracks, live, small, bordered = [], [], [], {}
    with watch_decoder():
        for frame, picture in enumerate(read_frames(path, fps, SHORT_SIDE)):
            if frame >= LONGEST * fps:
                raise UserError(f"longer than {LONGEST} seconds")
            small.append(np.array(ImageOps.contain(Image.fromarray(picture), (512, 512))))
            faces = find_shown(picture, frame, detector, most)
            if not faces and most == 1 and (found := find_with_border(picture, detector)):
                bordered[frame] = found
            live = [track for track in live if track.faces[-1].frame >= frame - 1 - GAP * fps]
            follow(tracks, live, faces)
    return Watched(tracks, small, bordered, picture.shape[1])


def assign(tracks, alike):
    """For each track its person, or None. alike: [tracks, people], from -1 to 1. Of all assignments in which
    nobody is in two places at once, the one with the largest sum of faces times 2 + alike: 2, so that a face
    of anybody is worth more than none."""
    people = len(alike[0]) if alike else 0
    order = sorted(range(len(tracks)), key=lambda t: tracks[t].faces[0].frame)
    best = {(-1,) * people: (0.0, ())}  # last picture of each person's latest track -> value, owners so far
    for t in order:
        first, last, following = tracks[t].faces[0].frame, tracks[t].faces[-1].frame, {}
        for ends, (value, owners) in best.items():
            for person in (None, *(k for k in range(people) if ends[k] < first)):
                worth = value + (0 if person is None else len(tracks[t].faces) * (2 + alike[t][person]))
                busy = [end if end >= first else -1 for end in ends]  # fewer states: what is over is over
                now = tuple(last if k == person else end for k, end in enumerate(busy))
                if now not in following or worth > following[now][0]:
                    following[now] = worth, (*owners, person)
        best = following
    owners = dict(zip(order, max(best.values(), key=lambda entry: entry[0])[1]))
    return [owners[t] for t in range(len(tracks))]


def similarity(face, targets):
    """Mean cosine of a face with the embeddings of a person's evaluation references, or None."""
    return mean([float(face.embedding @ target) for target in targets])


def share_faces(watched, targets, people):
    """{picture: face} of each person. targets: embeddings of everybody's evaluation references; without them,
    people are told apart by place."""
    alike = []
    for track in watched.tracks:
        if targets:
            alike.append([mean([similarity(face, own) for face in track.faces]) for own in targets])
        else:
            place = mean([float(face.box[0] + face.box[2]) / 2 / watched.width for face in track.faces])
            alike.append([-abs(place - (k + 0.5) / people) for k in range(people)])
    faces = [{} for _ in range(people)]
    for track, owner in zip(watched.tracks, assign(watched.tracks, alike)):
        if owner is not None:
            faces[owner] |= {face.frame: face for face in track.faces}
    return faces


def measure(case, path, detector, fps):
    """A case's video -> its pictures and a dict per person, which METRICS reads."""
    n, watched = len(case.refs), watch(path, detector, len(case.refs), fps)
    refs = [{view: look_up(file, detector) for view, file in views.items()} for views in case.refs]
    shown = [[look_up(file, detector) for file in files] for files in case.eval_refs]
    targets = [[face.embedding for face in faces if face and face.embedding is not None] for faces in shown]
    targets = targets if all(targets) else None  # people without references could not be told from others
    faces = share_faces(watched, targets, n)
    people = [measure_person(k, case, refs[k], targets, faces[k], len(watched.small)) for k in range(n)]
    for person, found in zip(people, shown):
        person["without_face"] = sum(face is None for face in found)
    if targets and n == 1:
        people[0]["public"] = public_rule(watched, refs[0], len(watched.small))
    if targets and n > 1 and case.places and all(faces):
        places = [mean([float(face.box[0] + face.box[2]) for face in own.values()]) for own in faces]
        for k, person in enumerate(people):
            person["swapped"] = sorted(places).index(places[k]) != k
    return watched.small, people


def measure_person(k, case, refs, targets, faces, length):
    """refs: {view: Shown or None}; targets: embeddings of everybody's evaluation references, None where no
    identity is measured; faces: {picture: Shown} of this person; length: pictures of the video."""
    def by_picture(value):
        return [value(faces[f]) if f in faces else None for f in range(length)]

    def nearest_given(face):
        if math.isnan(face.yaw):
            return None
        return min(MIDDLE, key=lambda view: abs(wrap(face.yaw - MIDDLE[view]))) in case.refs[k]
    yaws = by_picture(lambda face: number(face.yaw))
    person = {"face": [f in faces for f in range(length)], "yaw": yaws, "seen": by_picture(nearest_given),
              "alike": None, "best": None, "crossed": None, "next": None,
              "copied": by_picture(lambda face: is_copy(face, list(filter(None, refs.values())))),
              "coverage": coverage(yaws, bool(faces), case.asked_yaw[k]), **path_of(faces)}
    if targets:
        own, others = targets[k], [target for i, target in enumerate(targets) if i != k]
        person["alike"] = by_picture(lambda face: number(similarity(face, own)))
        person["best"] = by_picture(lambda face: number(max(face.embedding @ target for target in own)))
        person["next"] = [number(faces[f].embedding @ faces[f + 1].embedding)
                          if f in faces and f + 1 in faces else None for f in range(length - 1)]
    if targets and others and faces:
        nearest = by_picture(lambda face: max(similarity(face, target) for target in others))
        person["margin"] = number(mean(person["alike"]) - mean(nearest))
        person["crossed"] = [None if a is None else b > a for a, b in zip(person["alike"], nearest)]
    return person


def coverage(yaws, seen, asked):
    """yaws by picture, degrees or None; asked as in cases.py -> the share of it that was reached, mean over
    its sides; None where none was asked, or where no yaw could be read."""
    sides = [side for side in (asked if isinstance(asked, list) else [asked]) if side]
    yaws = [yaw for yaw in yaws if yaw is not None] or ([] if seen else [0])
    if sides and yaws:
        return number(mean([np.percentile(np.divide(yaws, side), REACHED).clip(0, 1) for side in sides]))


def is_copy(face, refs):
    """Does a face show a reference's own pose and pixels; None where no reference has a face with a pose."""
    def apart(ref):
        return math.hypot(wrap(face.yaw - ref.yaw), face.pitch - ref.pitch)

    def alike(ref):
        return float(face.pixels @ ref.pixels)
    refs = [ref for ref in refs if math.isfinite(apart(ref))]
    if not refs:
        return None
    near, same = min(refs, key=apart), max(refs, key=alike)
    return near is same and apart(near) <= COPY_POSE and alike(same) >= COPY_PIXELS


def path_of(faces):
    """Amplitude and roughness of the path of {picture: face}; None where it is too short."""
    if not faces:
        return {"amplitude": None, "roughness": None}
    low, high = torch.stack([face.box for face in faces.values()]).double().unflatten(1, (2, 2)).unbind(1)
    places = (low + high) / 2 / (high - low).amax(1).median()
    at = dict(zip(faces, places))
    bends = [float((at[f - 1] - 2 * at[f] + at[f + 1]).norm()) for f in at if f - 1 in at and f + 1 in at]
    spread = (places - places.mean(0)).square().sum(1).mean().sqrt() if len(faces) > 1 else None
    return {"amplitude": number(spread), "roughness": number(mean(bends))}


def evenly(length, n):
    """n numbers of pictures from the first to the last, none twice."""
    return sorted(set(np.linspace(0, length - 1, n).round().astype(int).tolist()))


def public_rule(watched, refs, length):
    """FaceSim as OpenS2V's public code computes it: see METRICS. 0 where no picture shows a face."""
    target = next((ref for ref in refs.values() if ref), None)
    if target is None:
        return None
    faces = watched.bordered | {face.frame: face for track in watched.tracks for face in track.faces}
    chosen = np.linspace(0, length - 1, PUBLIC_FRAMES).round().astype(int).tolist()
    found = [max(0.0, float(faces[f].embedding @ target.embedding)) for f in chosen if f in faces]
    return number(mean(found) or 0)


class Judge:
    """NaturalScore through an OpenAI-compatible endpoint. Ten failures in a row end the asking."""

    def __init__(self, url, model):
        self.url, self.model, self.name, self.in_a_row = url, model, f"{model} at {url}", 0

    @staticmethod
    def read(words):
        """The one number from 1 to 5 in an answer; what follows "of" or "/" is the scale."""
        found = re.findall(r"(?<![\d.])[1-5](?:\.\d+)?(?![\d.]*\d)", re.sub(r"(/|\bof) ?5\b", "", words))
        if len(found) != 1 or float(found[0]) > 5:
            raise ValueError(f"not one number from 1 to 5 in {words[:60]!r}")
        return float(found[0])

    def __call__(self, video, length, rate, name):
        """A video of `length` pictures at that rate -> the mean of three answers, or None, and why there is
        none."""
        if self.in_a_row == 10:
            return None, "not asked after ten failures in a row"
        chosen = evenly(length, JUDGED_FRAMES)
        pictures = [picture for f, picture in enumerate(read_frames(video, rate, 512)) if f in chosen]
        words = RUBRIC.format(frames=len(pictures))
        try:
            answers = [ask(self.url, self.model, words, pictures, self.read) for _ in range(JUDGED)]
        except Exception as error:  # a network and what it answers raise a dozen kinds
            self.in_a_row += 1
            reason = f"{type(error).__name__}: {error}"[:200]
            print(f"{name} gets no natural score: {reason}", file=sys.stderr)
            return None, reason
        self.in_a_row = 0
        return number(mean(answers)), None


# ------------------------------------------------------------------------------------------------ a whole set
def strip_of(pictures, height=72):
    """uint8 pictures [H, W, 3] beside each other, a JPEG in base64."""
    images = [Image.fromarray(picture) for picture in pictures]
    images = [image.resize((max(1, round(image.width * height / image.height)), height)) for image in images]
    sheet, x = Image.new("RGB", (sum(image.width for image in images), height)), 0
    for image in images:
        sheet.paste(image, (x, 0))
        x += image.width
    return base64_of(sheet, "jpeg")


def measure_case(case, path, detector, aesthetic, fps):
    """-> what a line of the results says of a video; {"reason": ...} where it cannot be measured."""
    try:
        small, people = measure(case, path, detector, fps)
        rated = [small[f] for f in evenly(len(small), RATED_FRAMES)] if aesthetic else []
        score = mean([aesthetic(from_bytes(torch.from_numpy(p)).permute(2, 0, 1)) for p in rated])
        refs = [[to_bytes(read_picture(file, (72, 72))).permute(1, 2, 0).numpy() for file in views.values()]
                for views in case.refs]
    except (UserError, OSError) as error:
        return {"reason": str(error)}
    for person in people:  # of the whole video, so the same for each
        person["aesthetic"] = number(score)
    return {"people": people, "strip": strip_of([small[f] for f in evenly(len(small), SHOWN_FRAMES)]),
            "refs": [strip_of(pictures) for pictures in refs]}


def files_of(case):
    return [*itertools.chain(*(views.values() for views in case.refs)), *itertools.chain(*case.eval_refs)]


def find_video(case, names):
    """A case's video in the folder of some Names; UserError where there is none or more than one."""
    if case.fault:
        raise UserError(case.fault)
    found = [path for suffix in VIDEOS
             if (path := names.folder / names.find(f"{case.id}{suffix}")).is_file()]
    if len(found) != 1:
        raise UserError("more than one video" if found else f"no video {case.id}.mp4 in {names.folder}")
    return found[0]


class Task(NamedTuple):
    """A case, its video if it has one, and what its result depends on."""
    case: Case
    video: Path | None
    key: tuple  # the case's id, a hash of all but the video, a hash of the video or why there is none


def tasks_of(cases, folder, args):
    """-> a Task per case. The hashes are alike on every machine, so that results can be compared."""
    patterns = itertools.chain(Faces.FILES.values(), *Aesthetic.FILES.values())
    networks = sorted({fingerprint(path) for p in patterns for path in args.faces.glob(p)})
    tasks, names = [], Names(folder)
    for case in cases:
        files = []
        try:
            video = find_video(case, names)
            content = sha256_of(video)[:12]
            files = list(map(sha256_of, files_of(case)))
        except (UserError, OSError) as error:
            video, content = None, str(error)
        counts = [sorted(views) for views in case.refs], list(map(len, case.eval_refs))
        parts = [case.prompt, case.seed, case.asked_yaw, case.places, counts, files, networks, args.rate,
                 source_hash(*CODE), *toy_code(args.faces)]
        rule = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
        tasks.append(Task(case, video, (case.id, rule, content)))
    return tasks


def by_key(lines):
    """{Task.key: its latest result}"""
    return {(line["case"], line["rule"], line["video"]): line for line in lines}


def run_cases(cases, folder, args, world, detector=None):
    """Measure the videos of these Cases in a folder -> a result per case, in their order. Each is appended to
    args.out/cases_measured.jsonl as it is there, and those of an earlier call are kept where nothing that
    they depend on has changed. Several ranks share the cases, and the file."""
    path, tasks = args.out / "cases_measured.jsonl", tasks_of(cases, folder, args)
    lines, networks = read_results(path), None
    known, latest = by_key(lines), {line["case"]: line for line in lines}
    judge = args.judge_url and Judge(args.judge_url, args.judge_model)
    for task in progress(tasks[world.rank::world.size], "measuring", "videos"):
        result = known.get(task.key)
        if result is None and task.video and not networks:
            networks = (detector or load_faces(args.faces, world.device, BenchmarkFaces),
                        Aesthetic.load(args.faces, world.device))
        if result is None:
            found = (measure_case(task.case, task.video, *networks, args.rate) if task.video
                     else {"reason": task.key[-1]})
            result = dict(zip(("case", "rule", "video"), task.key)) | found
            append(path, result)
        elif latest[task.case.id] is not result:
            append(path, result)  # measured by these rules before others: --compare takes the last line
        if judge and "people" in result and result.get("judge") != judge.name:
            append(path, ask_judge(judge, result, task.video, args))
    world.barrier()  # now all is in the file
    known = by_key(read_results(path))
    return [known[task.key] for task in tasks]


def ask_judge(judge, result, video, args):
    """A result with its natural score. One that failed has no judge, so that a restart asks again."""
    score, reason = judge(video, len(result["people"][0]["face"]), args.rate, result["case"])
    people = [person | {"natural": score} for person in result["people"]]
    return result | {"people": people, "judge": None if reason else judge.name, "judge_failed": reason}


# ----------------------------------------------------------------------------------------------------- report
def groups_of(results):
    """{"1 person, 60 cases": the results that could be measured, ...}"""
    groups = {}
    for result in results:
        if n := len(result.get("people", ())):
            groups.setdefault(n, []).append(result)
    return {f"{n} {'person' if n == 1 else 'people'}, {len(group)} cases": group
            for n, group in sorted(groups.items())}


def identity_plots(series, words=""):
    """series: {name: results}"""
    given = [METRICS["given"], METRICS["not_given"]]
    return [plot(f"identity by yaw of the face, cosine{words}", BIN_NAMES,
                 {name: by_yaw(group, "alike") for name, group in series.items()}, most=1),
            plot(f"identity by nearest view, cosine{words}", ["given", "not given"],
                 {name: [estimate(group, metric) for metric in given] for name, group in series.items()},
                 most=1)]


def case_html(case, result):
    """One case: its references, its video, and what was measured of each person."""
    head = f"<h3>{escape(f'{case.id}: {case.prompt}' if case.prompt else case.id)}</h3><div>"
    if "reason" in result:
        return f"{head}<p>not measured: {escape(result['reason'])}</p></div>"
    parts = [figure(strip, f"references of person {k}: {', '.join(views)}", "jpeg")
             for k, (strip, views) in enumerate(zip(result["refs"], case.refs), 1)]
    parts.append(figure(result["strip"], "its video", "jpeg"))
    for k, person in enumerate(result["people"], 1):
        values = {name: mean(metric.values(person)) for name, metric in METRICS.items()}
        words = ", ".join(f"{name} {value:.3g}" for name, value in values.items() if value is not None)
        if person["without_face"]:
            words += f"; {person['without_face']} evaluation references show no face"
        parts.append(f"<p>person {k}: {escape(words)}</p>")
    return head + "".join(parts) + "</div>"


def write_report(path, heading, cases, results):
    """report.html of results, those that could not be measured first, then the worst."""
    def quality(pair):
        people = pair[1].get("people", ())
        similarity = [mean(METRICS["mvrc"].values(person)) for person in people]
        rates = [mean(person["face"]) for person in people]
        return bool(people), mean(similarity) or 0, mean(rates) or 0
    groups = groups_of(results)
    plots = identity_plots({label.split(",")[0]: group for label, group in groups.items()})
    galleries = [case_html(*pair) for pair in sorted(zip(cases, results), key=quality)]
    heading += f"; {sum(map(len, groups.values()))} of {len(cases)} videos measured"
    write_page(path, "real benchmark", heading, table("", groups, METRICS), METRICS, plots, galleries, STYLE)


def summary(results):
    """What is printed: tables, and what could not be measured."""
    groups = groups_of(results)
    lines = []
    for names in (HEADLINE, *DETAILS) if groups else ():
        metrics = {name: METRICS[name] for name in names}
        lines.append(in_columns(table("", groups, metrics, with_interval=names is HEADLINE)))
    reasons = [f"{result['case']}: {result['reason']}" for result in results if "reason" in result]
    measured = len(results) - len(reasons)
    lines.append(f"{measured} of {len(results)} videos measured; the others count in no mean")
    lines += [f"  {reason}" for reason in reasons[:10]]
    people = [person for group in groups.values() for result in group for person in result["people"]]
    if unknown := sum(not person["alike"] for person in people):
        lines.append(f"no identity was measured of {unknown} of {len(people)} people: no ArcFace, or "
                     "evaluation references that show no face")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- comparison
def compare(folders, out):
    """Several --out folders side by side, on the cases that all of them measured by the same rules; prints a
    table and writes out/compare.html."""
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = list(map(str, folders))
    systems = {}
    for name, folder in zip(names, folders):
        lines = read_results(folder / "cases_measured.jsonl")
        if not lines:
            raise UserError(f"{folder} holds no cases_measured.jsonl with results: give --out folders of "
                            "`eval.py --cases`")
        latest = {line["case"]: line for line in lines}  # under the rules that it was last measured by
        systems[name] = {(line["case"], line["rule"]): line for line in latest.values() if "people" in line}
    judges = {line.get("judge") for found in systems.values() for line in found.values()} - {None}
    if len(judges) > 1:
        print(f"natural is left out, judged by {' and '.join(sorted(judges))}")
        for person in (p for found in systems.values() for line in found.values() for p in line["people"]):
            person["natural"] = None
    if len(systems) < 2:
        raise UserError("--compare needs two or more different folders")
    common = sorted(set.intersection(*map(set, systems.values())))
    counts = ", ".join(f"{name} {len(found)}" for name, found in systems.items())
    if not common:
        raise UserError(f"no case was measured in all of them by the same rules (results: {counts}): measure "
                        "again with the same cases, --faces, --fps and version of the code")
    heading = (f"{len(common)} cases that all systems measured by the same rules; results: {counts}; * the "
               "interval of the difference, paired by case, is without 0 (of six cases or more)")
    groups = {name: groups_of([found[key] for key in common]) for name, found in systems.items()}
    lines, plots = compare_table(groups), []
    for label in next(iter(groups.values())):
        plots += identity_plots({name: own[label] for name, own in groups.items()}, f", {label}")
    print(f"{heading}\n{in_columns(lines)}")
    write_page(out / "compare.html", "real benchmark: systems side by side", heading, list(zip(*lines)),
               METRICS, plots, [])
    print(out / "compare.html")


def compare_table(groups):
    """Lines of cells: a metric of a group of cases for every system, then the differences to the first one,
    paired by case. groups: {system: {label: results}}"""
    first, *others = groups
    lines = [["", *groups, *(f"{name} - {first}" for name in others)]]
    for label in groups[first]:
        for name, metric in METRICS.items():
            values = {system: by_case(own[label], metric) for system, own in groups.items()}
            cells = [show(estimate(own[label], metric), metric.percent) for own in groups.values()]
            for other in others:
                both = values[first].keys() & values[other].keys()
                found = interval([values[other][case] - values[first][case] for case in sorted(both)],
                                 (-1, 1) if metric.percent else None)
                # of fewer than six cases all may be on one side by chance
                decided = found and len(both) > 5 and (found.low > 0 or found.high < 0)
                cells.append(show(found, metric.percent, signed=True) + (" *" if decided else ""))
            if any(values.values()):
                lines.append([f"{label}: {column(name, metric)}", *cells])
    return lines


# -------------------------------------------------------------------------------------- a checkpoint's videos
def sample_cases(cases, args, world):
    """Make the cases' videos with --ckpt in OUT/videos, over all ranks -> that folder, and the cases, those
    that the checkpoint cannot make with a fault. A video whose comment says that it was made of the same is
    kept."""
    found = find(args.ckpt)
    recipe, folder = override(SAMPLE_RECIPES[found.kind], args), args.out / "videos"
    frames, size = frames_and_size(args, found)
    if not found.meta:
        raise UserError(f"{args.ckpt} is plain Wan, which has never seen references: give --ckpt one that "
                        "train.py made")
    probe_writable(folder)
    model, encoders = load(found, args.wan, args.offload, args.tile, precision=args.precision,
                           need_vit=found.config.vit_dim > 0)
    bf16 = uses_bf16(world.device, args.precision)
    made = made_with(found, encoders, recipe, frames, bf16, args.tile)

    def job_of(case):
        """A case as a Job whose references are files, and what is written of how its video is made."""
        if len(case.refs) > found.config.max_identities:
            raise UserError(f"{len(case.refs)} people: this checkpoint holds at most "
                            f"{found.config.max_identities}")
        for file in itertools.chain(*map(dict.values, case.refs)):
            with open_picture(file) as picture:
                picture.load()
        shape = toy.frame_size(size[0], len(case.refs)) if found.kind == "toy" else size
        job = Job(case.prompt, case.refs, case.seed, shape,
                  files=[[f"{view}={file}" for view, file in views.items()] for views in case.refs])
        return replace(job, note=note_of(job, recipe, frames, args.ckpt, made))
    checked, todo = [], []
    for case in cases:
        try:
            if not case.fault and notes_in(folder / f"{case.id}.mp4") != [job_of(case).note]:
                todo.append(case)
        except (UserError, OSError) as error:
            case = case._replace(fault=str(error))
        checked.append(case)
    check_ours([folder / f"{case.id}.mp4" for case in todo])
    world.barrier()  # all have looked before anybody writes
    mine = todo[world.rank::world.size]
    for start in range(0, len(mine), ROUND):
        jobs = [replace(job, references=read_references(job.references, size))
                for job in map(job_of, mine[start:start + ROUND])]
        make_round(model, encoders, jobs, recipe, frames)
        for case, job in zip(mine[start:], jobs):
            write_video(folder / f"{case.id}.mp4", job.video, recipe["fps"], job.note)
    world.barrier()
    return folder, checked


def run(args, world, detector=None):
    start = time.perf_counter()
    page = args.out / "report.html"
    world.barrier()  # rank 0 holds the folder
    cases, folder = read_cases(args.cases), args.videos
    inputs = [args.cases, *(file for case in cases if not case.fault for file in files_of(case))]
    outputs = [] if folder else [args.out / "videos" / f"{case.id}.mp4" for case in cases]
    check_outputs([page, args.out / "cases_measured.jsonl", *filter(Path.exists, outputs)], inputs)
    pattern = Faces.FILES[RetinaFace]
    if not (detector or is_toy(args.faces) or any(args.faces.glob(pattern))):  # before hours of sampling
        raise UserError(f"--faces {args.faces} holds no RetinaFace ({pattern}); see README.md, Your own data")
    if not folder:
        folder, cases = sample_cases(cases, args, world)
    results = run_cases(cases, folder, args, world, detector)
    print(summary(results))
    if world.rank == 0:
        heading = f"{args.cases.name}, videos of {args.ckpt or args.videos}"
        write_report(page, heading, cases, results)
        print(f"{page} in {time.perf_counter() - start:.0f} s")
    if all("reason" in result for result in results):
        raise UserError(f"none of {len(results)} videos could be measured; the first: {results[0]['reason']}")


# -------------------------------------------------------------------------------------------------------- CLI
def main(argv, detector=None):
    """detector: an object with the methods of faces.Faces, instead of the networks in --faces."""
    world = World.join()
    with world.one_voice():
        meanings = "\n".join(f"  {name:15}{metric.words}" for name, metric in METRICS.items())
        p = Parser(prog="eval.py real", description=__doc__, epilog=f"what the columns mean:\n{meanings}")
        add = p.add_argument
        add("--cases", type=Path, required=True, help="file of cases; see cases.py and make-cases")
        add("--out", type=Path, default="out/eval", help="folder for results and report.html")
        add("--faces", type=Path, required=True, help="folder with the weights that faces.py names, or toy")
        add("--fps", dest="rate", type=frame_rate, default=8, help="pictures a second that are looked at")
        add("--judge-url", type=nonempty, help="OpenAI-compatible endpoint of a vision model: `natural`")
        add("--judge-model", type=nonempty, default="default", help="its model; the key: OPENAI_API_KEY")
        add("--videos", type=Path, help="folder with <id>.mp4 of each case, of any system; or else --ckpt")
        add("--ckpt", type=nonempty, help="make the videos with this checkpoint, or run: its newest one")
        add = p.add_argument_group("for --ckpt, as in sample.py").add_argument
        recipe_flags(add)
        add("--wan", type=nonempty, help="folder of umT5, VAE and ViT")
        add("--frames", type=frame_count, help="of each video")
        add("--size", type=picture_size, help="HEIGHTxWIDTH")
        add("--offload", action="store_true", help="networks wait in CPU memory")
        add("--tile", type=count, help="pixels a side that the VAE works on at a time")
        args = p.parse_args(argv)
        given = {word.split("=")[0] for word in argv}
        if bool(args.videos) == bool(args.ckpt):
            raise UserError("expected one of --videos DIR, a system's videos, and --ckpt to make them")
        if args.videos and (named := sorted(given & OF_SAMPLING)):
            raise UserError(f"{named[0]} is for sampling: leave it out with --videos")
        if not (args.faces.is_dir() or is_toy(args.faces)):
            raise UserError(f"--faces {args.faces}: expected a folder of face networks; see README.md")
        if args.videos and not args.videos.is_dir():
            raise UserError(f"--videos {args.videos}: no such folder")
        check_url("--judge-url", args.judge_url)
        with lock(args.out) if world.rank == 0 else contextlib.nullcontext():
            run(args, world, detector)
    world.leave()


OF_SAMPLING = {"--steps", "--shift", "--guide-refs", "--guide-text", "--precision", "--wan", "--frames",
               "--size", "--offload", "--tile"}


def compare_main(argv):
    p = Parser(prog="eval.py compare", description="systems side by side, paired by case")
    p.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="--out folders of `eval.py real`")
    p.add_argument("--out", type=Path, default="out/eval", help="folder for compare.html")
    args = p.parse_args(argv)
    with lock(args.out):
        compare(args.folders, args.out)
