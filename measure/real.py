"""The real benchmark: videos of any system, measured with the networks of faces.py by the rules in METRICS.

cases.py says what a case is. Its video is <id>.mp4, or another of pictures.VIDEOS. A video that cannot be
measured is a result with a reason, is counted beside the table, and counts in no mean.

Pictures are taken at one rate of all systems' videos, --fps. In each the n largest faces count, for n people,
and go to those people whom they are most like together. Without ArcFace, or where somebody has no evaluation
reference that shows a face, nothing that needs identity is measured, and people are told apart by place.
"""
import functools
import itertools
import math
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from measure.cases import read_cases
from measure.report import (BIN_NAMES, Metric, Results, as_text, by_case, by_yaw, case_html, column, estimate,
                            hold, in_columns, interval, mean, one, per_frame, read_results, strip, table,
                            write_page)
from networks.faces import Aesthetic, ArcFace, Faces, RetinaFace, SixDRepNet, align, find_faces
from sample import (ROUND, SAMPLE_RECIPES, Hardware, find, frames_and_size, load, made_with, make_round,
                    note_of, recipe_flags, with_flags)
from support.charts import plot
from support.processes import World
from support.script import (Parser, UserError, check_outputs, count, fingerprint, frame_rate, lock, nonempty,
                            probe_writable, progress, source_hash, uses_bf16)
from videos import toy
from videos.curate import EXTRACT, MIDDLE, ask, check_url
from videos.jobs import Job, check_ours, name_references, notes_in, read_references
from videos.manifest import Names
from videos.pictures import (VIDEOS, frame_count, from_bytes, picture_size, read_frames, read_picture,
                             to_bytes, watch_decoder, wrap, write_video)
from videos.toyfaces import is_toy, load_faces, toy_code

SHORT_SIDE = 720  # larger videos are shrunk to it
LONGEST = 120  # seconds of a video
REFERENCE_SIDE = 512  # of the white square that a reference is fitted into
BORDER = 0.25  # of grey around a picture in which no face was found, in its sides: the public rule's retry
REACHED = 95  # percentile of the yaws that counts as reached: one wrong picture in forty is not
COPY_POSE = 8  # degrees of yaw and pitch together: nearer to a reference's pose, a face may be its copy
# and its aligned pixels have at least this correlation with the reference's: a picture coded, scaled,
# lit or turned had 0.90 to 0.996 in 13 of 15 tries, a talking man with himself a second before at most 0.77
COPY_PIXELS = 0.9
PUBLIC_FRAMES, JUDGED_FRAMES, JUDGED, RATED_FRAMES, SHOWN_FRAMES = 32, 16, 3, 8, 8
CODE = ("measure/real", "networks/faces", "videos/curate", "videos/pictures")  # what a result depends on
RUBRIC = ("These are {frames} frames of one generated video, in their order. How natural is it? 5: like a "
          "real recording, 4: small flaws on a second look, 3: visible flaws of bodies, faces or motion, "
          "2: clearly artificial, 1: broken. Answer with one number from 1 to 5.")


# ---------------------------------------------------------------------------------------------------- metrics
def counting_zero(p):
    """Similarity by picture, 0 where the person is not seen; None where no identity is measured."""
    return [value or 0 for value in p["alike"] or ()]


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


# ------------------------------------------------------------------------------------------------------ faces
class BenchmarkFaces(Faces):
    WITHOUT = {ArcFace: "nothing that needs identity is measured",
               SixDRepNet: "yaw comes from five landmarks and falls short at large yaws"}


class SeenFace(NamedTuple):
    """A face in a picture."""
    box: torch.Tensor  # left, top, right, bottom in pixels
    yaw: float
    pitch: float
    embedding: torch.Tensor | None
    pixels: torch.Tensor  # of the aligned grey crop, of mean 0 and length 1: products are correlations


def largest_faces(picture, detector, most=1):
    """The `most` largest SeenFaces of a uint8 picture [H, W, 3], the largest first."""
    faces = find_faces(detector, picture, 0, EXTRACT["score"][1])
    faces = sorted(faces, key=lambda face: -face.side)[:most]
    if not faces:
        return []
    image = from_bytes(torch.from_numpy(picture)).permute(2, 0, 1)
    grey = align(image, torch.stack([face.landmarks for face in faces])).mean(1).flatten(1)
    grey = torch.nn.functional.normalize(grey - grey.mean(1, keepdim=True), dim=1)
    return [SeenFace(face.box, face.yaw, face.pitch, face.embedding, pixels)
            for face, pixels in zip(faces, grey)]


def with_border(picture):
    """A picture with a grey border."""
    edges = [(round(BORDER * n),) * 2 for n in picture.shape[:2]]
    return np.pad(picture, (*edges, (0, 0)), constant_values=128)


@functools.lru_cache(maxsize=2000)  # many cases show one person
def reference_face(file, detector):
    """The largest face of a reference picture, or None."""
    picture = to_bytes(read_picture(file, (REFERENCE_SIDE, REFERENCE_SIDE)))
    picture = picture.permute(1, 2, 0).contiguous().numpy()
    faces = largest_faces(picture, detector) or largest_faces(with_border(picture), detector)
    return faces[0] if faces else None


class Watched(NamedTuple):
    """What is seen of a video, a list entry a picture."""
    faces: list  # SeenFaces
    bordered: list  # those that were found with a grey border only, of one person
    small: list  # uint8 pictures, 512 pixels on the longest side
    width: int = 0  # pixels


def watch(path, detector, most, fps):
    """-> Watched, of a video with at most so many people."""
    watched = Watched([], [], [])
    with watch_decoder():
        for frame, picture in enumerate(read_frames(path, fps, SHORT_SIDE)):
            if frame >= LONGEST * fps:
                raise UserError(f"longer than {LONGEST} seconds")
            watched.small.append(np.array(ImageOps.contain(Image.fromarray(picture), (512, 512))))
            watched.faces.append(largest_faces(picture, detector, most))
            again = most == 1 and not watched.faces[-1]
            watched.bordered.append(largest_faces(with_border(picture), detector) if again else [])
    return watched._replace(width=picture.shape[1])


def mean_cosine(face, targets):
    """Of a face with the embeddings of a person's evaluation references, or None."""
    return mean([float(face.embedding @ target) for target in targets])


def faces_by_person(watched, targets, people):
    """{picture: SeenFace} of each person. In each picture the faces go to those people whom they are most
    like together. targets: embeddings of everybody's evaluation references; without them, the nearer to
    one's place, from left to right, the more alike."""
    def alike(face, k):
        if targets:
            return mean_cosine(face, targets[k])
        return -abs(float(face.box[0] + face.box[2]) / 2 / watched.width - (k + 0.5) / people)
    found = [{} for _ in range(people)]
    for f, faces in enumerate(watched.faces):
        likeness = [[alike(face, k) for k in range(people)] for face in faces]
        owners = max(itertools.permutations(range(people), len(faces)),
                     key=lambda owners: sum(row[k] for row, k in zip(likeness, owners)))
        for face, k in zip(faces, owners):
            found[k][f] = face
    return found


# -------------------------------------------------------------------------------------------------- measuring
def measure_case(case, path, detector, aesthetic, fps):
    """-> what a line of the results says of a case's video: a dict per person, which METRICS reads, and
    pictures; {"reason": ...} where it cannot be measured."""
    try:
        n, watched = len(case.refs), watch(path, detector, len(case.refs), fps)
        length = len(watched.small)
        refs = [{view: reference_face(file, detector) for view, file in views.items()} for views in case.refs]
        shown = [[reference_face(file, detector) for file in files] for files in case.eval_refs]
        strips = [jpeg_strip([to_bytes(read_picture(file, (72, 72))).permute(1, 2, 0).numpy()
                            for file in views.values()]) for views in case.refs]
        rated = [watched.small[f] for f in evenly(length, RATED_FRAMES)] if aesthetic else []
        score = mean([aesthetic(from_bytes(torch.from_numpy(p)).permute(2, 0, 1)) for p in rated])
    except (UserError, OSError) as error:
        return {"reason": str(error)}
    targets = [[face.embedding for face in faces if face and face.embedding is not None] for faces in shown]
    targets = targets if all(targets) else None  # people without references could not be told from others
    faces = faces_by_person(watched, targets, n)
    people = [score_person(k, case, refs[k], targets, faces[k], length) for k in range(n)]
    for person, of_person in zip(people, shown):
        person["without_face"] = of_person.count(None)
        person["aesthetic"] = number(score)  # of the whole video, so the same for each
    if targets and n == 1:
        people[0]["public"] = public_rule(watched, refs[0])
    if targets and n > 1 and case.places and all(faces):
        places = [mean([float(face.box[0] + face.box[2]) for face in own.values()]) for own in faces]
        for k, person in enumerate(people):
            person["swapped"] = sorted(places).index(places[k]) != k
    shown = [watched.small[f] for f in evenly(length, SHOWN_FRAMES)]
    return {"people": people, "strip": jpeg_strip(shown), "refs": strips}


def score_person(k, case, refs, targets, faces, length):
    """refs: {view: SeenFace or None}; targets: embeddings of everybody's evaluation references, None where no
    identity is measured; faces: {picture: SeenFace} of this person; length: pictures of the video."""
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
    if not targets:
        return person
    own, others = targets[k], targets[:k] + targets[k + 1:]
    person["alike"] = by_picture(lambda face: number(mean_cosine(face, own)))
    person["best"] = by_picture(lambda face: number(max(face.embedding @ target for target in own)))
    pairs = [(faces.get(f), faces.get(f + 1)) for f in range(length - 1)]
    person["next"] = [number(a.embedding @ b.embedding) if a and b else None for a, b in pairs]
    if others and faces:
        nearest = by_picture(lambda face: max(mean_cosine(face, target) for target in others))
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

    def correlation(ref):
        return float(face.pixels @ ref.pixels)
    refs = [ref for ref in refs if math.isfinite(apart(ref))]
    if not refs:
        return None
    near, same = min(refs, key=apart), max(refs, key=correlation)
    return near is same and apart(near) <= COPY_POSE and correlation(same) >= COPY_PIXELS


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


def public_rule(watched, refs):
    """FaceSim as OpenS2V's public code computes it: see METRICS. 0 where no picture shows a face."""
    target = next(filter(None, refs.values()), None)
    if target is None:
        return None
    cosines = []
    for f in np.linspace(0, len(watched.faces) - 1, PUBLIC_FRAMES).round().astype(int):
        for face in watched.faces[f] or watched.bordered[f]:
            cosines.append(max(0.0, float(face.embedding @ target.embedding)))
    return number(mean(cosines) or 0)


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

    def __call__(self, result, video, rate):
        """A result with the mean of three answers. One that failed has no judge, so a restart asks again."""
        score, reason = None, "not asked after ten failures in a row"
        try:
            if self.in_a_row < 10:
                chosen = evenly(len(result["people"][0]["face"]), JUDGED_FRAMES)
                pictures = [p for f, p in enumerate(read_frames(video, rate, 512)) if f in chosen]
                words = RUBRIC.format(frames=len(pictures))
                score = number(mean([ask(self.url, self.model, words, pictures, self.read)
                                     for _ in range(JUDGED)]))
                self.in_a_row, reason = 0, None
        except Exception as error:  # a network and what it answers raise a dozen kinds
            self.in_a_row, reason = self.in_a_row + 1, f"{type(error).__name__}: {error}"[:200]
            print(f"{result['case']} gets no natural score: {reason}", file=sys.stderr)
        people = [person | {"natural": score} for person in result["people"]]
        return result | {"people": people, "judge": None if reason else self.name, "judge_failed": reason}


# ------------------------------------------------------------------------------------------------ a whole set
def jpeg_strip(pictures, height=72):
    """uint8 pictures [H, W, 3] beside each other, a JPEG."""
    images = [ImageOps.contain(Image.fromarray(picture), (10 * height, height)) for picture in pictures]
    return strip(map(np.asarray, images), "jpeg")


def task_of(case, names, rules):
    """-> a case's video in the folder of some Names, or None; and of its result the case, the rule (a name
    for all that it depends on but the video) and the video (a name, or why there is none). Names are alike on
    every machine, so that results can be compared."""
    try:
        if case.fault:
            raise UserError(case.fault)
        paths = [names.folder / names.find(f"{case.id}{suffix}") for suffix in VIDEOS]
        videos = [path for path in paths if path.is_file()]
        if len(videos) != 1:
            raise UserError("more than one video" if videos else f"no video {case.id}.mp4 in {names.folder}")
        return videos[0], (case.id, fingerprint(case._replace(id=""), rules), fingerprint(videos[0]))
    except (UserError, OSError) as error:
        return None, (case.id, "", str(error))


def run_cases(cases, folder, args, world, detector=None):
    """Measure the videos of these Cases in a folder -> a result per case, in their order, kept where nothing
    that it depends on has changed. Several ranks share the cases."""
    names = ("case", "rule", "video")
    results = Results(args.out / "cases_measured.jsonl", names)
    latest = {line["case"]: line for line in results.values()}
    patterns = [*Faces.FILES.values(), *sum(Aesthetic.FILES.values(), ())]
    files = sorted({fingerprint(path) for pattern in patterns for path in args.faces.glob(pattern)})
    rules = [files, args.rate, source_hash(*CODE), toy_code(args.faces)]
    folder, networks = Names(folder), None
    tasks = [task_of(case, folder, rules) for case in cases]
    judge = args.judge_url and Judge(args.judge_url, args.judge_model)
    mine = list(zip(cases, tasks))[world.rank::world.size]
    for case, (video, key) in progress(mine, "measuring", "videos"):
        result = results.get(key)
        if result is None:
            found = {"reason": key[-1]}
            if video:
                networks = networks or (detector or load_faces(args.faces, world.device, BenchmarkFaces),
                                        Aesthetic.load(args.faces, world.device))
                found = measure_case(case, video, *networks, args.rate)
            result = results.add(dict(zip(names, key)) | found)
        elif latest[case.id] is not result:
            results.add(result)  # it was measured by other rules meanwhile: compare takes the last line
        if judge and "people" in result and result.get("judge") != judge.name:
            results.add(judge(result, video, args.rate))
    world.barrier()  # now all is in the file
    results.read()
    return [results[key] for _, key in tasks]


# ----------------------------------------------------------------------------------------------------- report
def groups_of(results):
    """{"1 person, 60 cases": the results that could be measured, ...}"""
    groups = {}
    for n in range(1, 5):
        if same := [result for result in results if len(result.get("people", ())) == n]:
            groups[f"{n} {'person' if n == 1 else 'people'}, {len(same)} cases"] = same
    return groups


def identity_plots(series, words=""):
    """series: {name: results}"""
    by_view = {name: [estimate(group, METRICS[metric]) for metric in ("given", "not_given")]
               for name, group in series.items()}
    by_angle = {name: by_yaw(group, "alike") for name, group in series.items()}
    return [plot(f"identity by yaw of the face, cosine{words}", BIN_NAMES, by_angle, most=1),
            plot(f"identity by nearest view, cosine{words}", ["given", "not given"], by_view, most=1)]


def gallery(case, result):
    """One case: its references, its video, and what was measured of each person."""
    title = f"{case.id}: {case.prompt}" if case.prompt else case.id
    if "reason" in result:
        return case_html(title, [], [f"not measured: {result['reason']}"])
    pictures = [(picture, f"references of person {k}: {', '.join(views)}")
                for k, (picture, views) in enumerate(zip(result["refs"], case.refs), 1)]
    lines = []
    for k, person in enumerate(result["people"], 1):
        values = {name: mean(metric.values(person)) for name, metric in METRICS.items()}
        words = [f"{name} {value:.3g}" for name, value in values.items() if value is not None]
        lines.append(f"person {k}: {', '.join(words)}")
        if person["without_face"]:
            lines[-1] += f"; {person['without_face']} evaluation references show no face"
    return case_html(title, [*pictures, (result["strip"], "its video")], lines, "jpeg")


def write_report(path, heading, cases, results):
    """report.html of results, those that could not be measured first, then the worst."""
    def quality(pair):
        people = pair[1].get("people", ())
        similarity = mean([mean(METRICS["mvrc"].values(person)) for person in people])
        return bool(people), similarity or 0, mean([mean(person["face"]) for person in people]) or 0
    groups = groups_of(results)
    plots = identity_plots({label.split(",")[0]: group for label, group in groups.items()})
    galleries = [gallery(*pair) for pair in sorted(zip(cases, results), key=quality)]
    heading += f"; {sum(map(len, groups.values()))} of {len(cases)} videos measured"
    write_page(path, "real benchmark", heading, table("", groups, METRICS), METRICS, plots, galleries)


def summary(results):
    """What is printed: tables, and what could not be measured."""
    groups, lines = groups_of(results), []
    for names in (HEADLINE, *DETAILS) if groups else ():
        metrics = {name: METRICS[name] for name in names}
        lines.append(in_columns(table("", groups, metrics, with_interval=names is HEADLINE)))
    reasons = [f"  {result['case']}: {result['reason']}" for result in results if "reason" in result]
    lines += [f"{len(results) - len(reasons)} of {len(results)} videos measured; the others count in no mean",
              *reasons[:10]]
    people = [person for result in results for person in result.get("people", ())]
    if unknown := sum(not person["alike"] for person in people):
        lines.append(f"no identity was measured of {unknown} of {len(people)} people: no ArcFace, or "
                     "evaluation references that show no face")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- comparison
def read_systems(folders):
    """--out folders -> {name: {(case, rule): its result}}, those that were measured last of every case."""
    systems = {}
    for folder in dict.fromkeys(folders):
        lines = read_results(folder / "cases_measured.jsonl")
        if not lines:
            raise UserError(f"{folder} holds no cases_measured.jsonl with results: give --out folders of "
                            "`eval.py real`")
        latest = {line["case"]: line for line in lines}
        name = str(folder) if folder.name in systems else folder.name
        systems[name] = {(line["case"], line["rule"]): line for line in latest.values() if "people" in line}
    if len(systems) < 2:
        raise UserError("compare needs two or more different folders")
    results = [result for found in systems.values() for result in found.values()]
    judges = {result.get("judge") for result in results} - {None}
    if len(judges) > 1:
        print(f"natural is left out, judged by {' and '.join(sorted(judges))}")
        for person in (person for result in results for person in result["people"]):
            person["natural"] = None
    return systems


def compare_main(argv):
    """`python eval.py compare`: a table and OUT/compare.html, on the cases that all systems measured by the
    same rules."""
    p = Parser(prog="eval.py compare", description="systems side by side, paired by case")
    p.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="--out folders of `eval.py real`")
    p.add_argument("--out", type=Path, default="out/eval", help="folder for compare.html")
    args = p.parse_args(argv)
    systems, page = read_systems(args.folders), args.out / "compare.html"
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
    with lock(args.out):
        write_page(page, "real benchmark: systems side by side", heading, list(zip(*lines)), METRICS, plots)
    print(page)


def compare_table(groups):
    """Lines of cells: a metric of a group of cases for every system, then the differences to the first one,
    paired by case. groups: {system: {label: results}}"""
    first, *others = groups
    lines = [["", *groups, *(f"{name} - {first}" for name in others)]]
    for label in groups[first]:
        for name, metric in METRICS.items():
            values = {system: by_case(own[label], metric) for system, own in groups.items()}
            cells = [as_text(estimate(own[label], metric), metric.percent) for own in groups.values()]
            for other in others:
                both = sorted(values[first].keys() & values[other].keys())
                found = interval([values[other][case] - values[first][case] for case in both],
                                 (-1, 1) if metric.percent else None)
                # of fewer than six cases all may be on one side by chance
                decided = found and len(both) > 5 and (found.low > 0 or found.high < 0)
                cells.append(as_text(found, metric.percent, signed=True) + " *" * bool(decided))
            if any(values.values()):
                lines.append([f"{label}: {column(name, metric)}", *cells])
    return lines


# -------------------------------------------------------------------------------------- a checkpoint's videos
def sample_cases(cases, args, world):
    """Make the cases' videos with --ckpt in OUT/videos, over all ranks -> that folder. Cases that the
    checkpoint cannot make get a fault. A video that says that it was made of the same is kept."""
    ckpt = find(args.ckpt)
    recipe, folder = with_flags(SAMPLE_RECIPES[ckpt.kind], args), args.out / "videos"
    frames, size = frames_and_size(args, ckpt)
    if not ckpt.meta:
        raise UserError(f"{args.ckpt} is plain Wan, which has never seen references: give --ckpt one that "
                        "train.py made")
    probe_writable(folder)
    hardware = Hardware(args.precision, args.offload, args.tile)
    model, encoders = load(ckpt, args.wan, hardware, need_vit=ckpt.config.vit_dim > 0)
    made = made_with(ckpt, encoders, recipe, frames, uses_bf16(world.device, args.precision), args.tile)

    def job_of(case):
        """A case as a Job whose references are files, with what is written of how its video is made."""
        if case.fault:
            raise UserError(case.fault)
        files = [[f"{view}={file}" for view, file in views.items()] for views in case.refs]
        job = Job(case.prompt, None, case.seed, size, files)
        job.references = name_references(job, ckpt.config.max_identities)
        if ckpt.kind == "toy":
            job.size = toy.frame_size(size[0], len(files))
        job.note = note_of(job, recipe, frames, args.ckpt, made)
        return job
    todo = {}
    for n, case in enumerate(cases):
        path = folder / f"{case.id}.mp4"
        try:
            job = job_of(case)
            if notes_in(path) != [job.note]:
                todo[path] = job
        except (UserError, OSError) as error:
            cases[n] = case._replace(fault=str(error))
    check_ours(todo)
    world.barrier()  # all have looked before anybody writes
    mine = list(todo)[world.rank::world.size]
    for start in range(0, len(mine), ROUND):
        paths = mine[start:start + ROUND]
        jobs = [replace(todo[path], references=read_references(todo[path].references, size))
                for path in paths]
        make_round(model, encoders, jobs, recipe, frames)
        for path, job in zip(paths, jobs):
            write_video(path, job.video, recipe["fps"], job.note)
    world.barrier()
    return folder


# ------------------------------------------------------------------------------------------------ the command
SAMPLING = ("steps", "shift", "guide_refs", "guide_text", "precision", "wan", "frames", "size", "offload",
            "tile")  # flags that are for --ckpt


def run(args, world, detector=None):
    start, page = time.perf_counter(), args.out / "report.html"
    world.barrier()  # rank 0 holds the folder
    cases, folder = read_cases(args.cases), args.videos
    outputs = [args.out / "videos" / f"{case.id}.mp4" for case in cases if not folder]
    check_outputs([page, args.out / "cases_measured.jsonl", *filter(Path.exists, outputs)],
                  [args.cases, *(file for case in cases for file in case.files())])
    pattern = Faces.FILES[RetinaFace]
    if not (detector or is_toy(args.faces) or any(args.faces.glob(pattern))):  # before hours of sampling
        raise UserError(f"--faces {args.faces} holds no RetinaFace ({pattern}); see videos/README.md")
    if not folder:
        folder = sample_cases(cases, args, world)
    results = run_cases(cases, folder, args, world, detector)
    print(summary(results))
    if world.rank == 0:
        write_report(page, f"{args.cases.name}, videos of {args.ckpt or args.videos}", cases, results)
        print(f"{page} in {time.perf_counter() - start:.0f} s")
    if all("reason" in result for result in results):
        raise UserError(f"none of {len(results)} videos could be measured; the first: {results[0]['reason']}")


def real_arguments(argv):
    meanings = "\n".join(f"  {name:15}{metric.words}" for name, metric in METRICS.items())
    p = Parser(prog="eval.py real", description=__doc__, epilog=f"what the columns mean:\n{meanings}")
    add = p.add_argument
    add("--cases", type=Path, required=True, help="file of cases; see cases.py and make-cases")
    add("--out", type=Path, default="out/eval", help="folder for results and report.html")
    add("--faces", type=Path, required=True, help="folder with the weights that faces.py names, or toy")
    add("--fps", dest="rate", type=frame_rate, default=8, help="pictures a second that are looked at")
    add("--judge-url", type=nonempty, help="OpenAI-compatible endpoint of a vision model: `natural`")
    add("--judge-model", type=nonempty, default="default", help="its model; the key: OPENAI_API_KEY")
    add = p.add_mutually_exclusive_group(required=True).add_argument
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
    for name in SAMPLING if args.videos else ():
        if getattr(args, name) != p.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} is for sampling: leave it out with --videos")
    if args.videos and not args.videos.is_dir():
        raise UserError(f"--videos {args.videos}: no such folder")
    check_url("--judge-url", args.judge_url)
    return args


def main(argv, detector=None):
    """`python eval.py real`. detector: an object with the methods of faces.Faces, instead of the networks in
    --faces."""
    world = World.join()
    with world.one_voice():
        args = real_arguments(argv)
        with hold(args.out, world):
            run(args, world, detector)
    world.leave()
