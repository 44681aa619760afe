"""Cases of the real benchmark: what to make a video of, and what to measure it with.

A file of cases is one JSON object a line:
  {"id": "case-001", "prompt": "...", "seed": 0, "refs": [{"front": "refs/a.png", "left": "refs/b.png"}],
   "eval_refs": [["refs/c.png"]], "asked_yaw": [-90], "places": true}
  refs       one {view: picture} per person, from left to right, as the prompt names them; at most four people
  eval_refs  one to ten pictures per person that similarity is measured to; without them it is to the refs
  asked_yaw  the largest yaw in degrees that the prompt asks of each person, below 0 to the picture's left and
             above 0 to its right, a list where it asks for both sides ([-45, 45]), or null; without it none
  places     false where the prompt does not say who stands where: then nobody can be in the wrong place
Other keys are not read. Paths are relative to the file and stay in its folder. A line that cannot be used
becomes a case with a fault, which is a result with a reason.
"""
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from rope import VIEWS
from support.script import (Parser, UserError, as_user_error, atomic_file, atomic_folder, check_outputs,
                            count, is_seed, is_text, probe_writable, read_lines, read_text, seed_number)
from videos.manifest import Names, read_manifest

MOST_PEOPLE, MOST_REFS = 4, 10


class Case(NamedTuple):
    id: str
    prompt: str = ""
    refs: list = ()  # {view: file} per person
    eval_refs: list = ()  # files per person
    seed: int = 0
    asked_yaw: list = ()  # signed degrees, a list of them or None per person
    places: bool = True
    fault: str | None = None  # why its line cannot be used


def read_cases(path):
    """A file of cases -> Cases; a line that cannot be used becomes one with a fault."""
    path, cases, known, names = Path(path), [], set(), Names(Path(path).parent)
    with as_user_error(path):
        if not path.is_file():
            raise UserError(f"{path}: no such file; `python eval.py make-cases` writes one")
        text = read_text(path, spare=True)
    for n, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            case = read_case(json.loads(line), names)
            if case.id in known:
                raise ValueError(f"a second case {case.id}")
        except (OSError, ValueError, RecursionError) as error:
            case = Case(f"line {n}", fault=str(error).encode(errors="replace").decode()[:300])
        known.add(case.id)
        cases.append(case)
    if not cases:
        raise UserError(f"{path} holds no case; expected one JSON object a line")
    return cases


def read_case(entry, names):
    """A line's object -> Case. Raises ValueError for anything else. names: Names of the file's folder"""
    if not isinstance(entry, dict) or not {"id", "prompt", "refs"} <= entry.keys():
        raise ValueError("expected an object with id, prompt and refs")
    name, prompt, refs = entry["id"], entry["prompt"], entry["refs"]
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(f"its id {name!r:.60} is none of letters, digits, '.', '_' and '-', at most 100")
    if not is_text(prompt) or not prompt.strip() or "\ufffd" in prompt:
        raise ValueError("no prompt, or none that is text in UTF-8")
    if not isinstance(refs, list) or not 1 <= len(refs) <= MOST_PEOPLE:
        raise ValueError(f"refs: expected a list of one to {MOST_PEOPLE} people")
    for views in refs:
        if not isinstance(views, dict) or not views or not views.keys() <= set(VIEWS):
            raise ValueError(f"refs: expected {{view: picture}} a person, views of {', '.join(VIEWS)}")
    eval_refs = entry.get("eval_refs") or [list(views.values()) for views in refs]
    asked, seed = entry.get("asked_yaw") or [None] * len(refs), entry.get("seed") or 0
    if not all(isinstance(row, list) and len(row) == len(refs) for row in (eval_refs, asked)):
        raise ValueError(f"eval_refs and asked_yaw: expected lists of {len(refs)}, as refs has people")
    if not all(isinstance(files, list) and 1 <= len(files) <= MOST_REFS for files in eval_refs):
        raise ValueError(f"eval_refs: expected one to {MOST_REFS} pictures a person")
    for yaw in asked:
        sides = yaw if isinstance(yaw, list) and yaw else [0 if yaw is None else yaw]
        if not all(type(side) in (int, float) and -180 <= side <= 180 for side in sides):
            raise ValueError(f"asked_yaw {yaw!r:.20}: expected -180 to 180 degrees, a list of such, or null")
    if not is_seed(seed) or not isinstance(entry.get("places", True), bool):
        raise ValueError("seed is no whole number from 0 on, or places neither true nor false")

    folder = names.folder

    def inside(file):
        file = names.find(file) if is_text(file) else file
        if not is_text(file) or os.path.isabs(file) or not (folder / file).resolve().is_relative_to(
                folder.resolve()):
            raise ValueError(f"{file!r:.80} leaves the folder")
        if not (folder / file).is_file():
            raise ValueError(f"{file!r:.80}: no such file")
        return folder / file
    refs = [{view: inside(views[view]) for view in VIEWS if view in views} for views in refs]
    eval_refs = [list(map(inside, files)) for files in eval_refs]
    return Case(name, prompt, refs, eval_refs, seed, asked, entry.get("places", True))


# -------------------------------------------------------------------------------------------------- new cases
IDENTITIES, ONE_PERSON = 0.52, 0.6  # of the papers' 100 cases: 52 people; 60 cases with one, 40 with two
SHOTS = ("A close-up", "A medium close-up", "A medium shot")
SCENES = ("in a sunlit kitchen", "in front of a brick wall", "on a busy street at night",
          "in a quiet library", "on a beach at sunset", "in a snowy park", "in a train by the window",
          "in a garden after rain", "in a dim theatre", "in a bright office")
ACTIONS = {  # what somebody does: the yaw that this asks for, as in asked_yaw
    "talks to the camera": None,
    "nods and smiles": None,
    "slowly looks to the left of the picture and back": -45,
    "slowly looks to the right of the picture and back": 45,
    "looks from one side to the other": [-45, 45],
    "shakes the head widely, laughing": [-60, 60],
    "turns the head to the left of the picture until the profile shows": -90,
    "turns the head to the right of the picture until the profile shows": 90,
}


def draw(choices, *words):
    """One of them, by a hash of the words: the same on every machine."""
    return choices[int(hashlib.sha256(json.dumps(words).encode()).hexdigest(), 16) % len(choices)]


def in_order(items, *words):
    """These texts in an order by hash."""
    return sorted(items, key=lambda item: hashlib.sha256(json.dumps([*words, item]).encode()).hexdigest())


def read_training(paths):
    """Ids of people and hashes of clips, of manifests and encoded sets; says how many lines lack an id."""
    people, clips, silent = set(), set(), 0
    for path in paths:
        if not path.is_file():
            raise UserError(f"--training {path}: no such file; expected a manifest.jsonl or an encoded set")
        lines = [line for line in read_lines(path)
                 if isinstance(line.get("identities", line.get("views")), list)]
        if not lines:
            raise UserError(f"--training {path} holds no line of a manifest or of an encoded set")
        for line in lines:
            names = line["people"] if isinstance(line.get("people"), list) else [None]
            if "identities" in line:
                names = [isinstance(who, dict) and who.get("id") for who in line["identities"]]
                clips.add(line.get("sha256"))  # in an encoded set it is another file's
            people |= set(filter(is_text, names))
            silent += not all(map(is_text, names))
    if silent:
        print(f"{silent} clips of training do not say whom they show: these people are not left out")
    return people, clips - {None}


def pictures_of(entries, clips):
    """{id: {view: pictures}} of a manifest's people, and the ids of those who are in one of these clips."""
    pictures, refused = {}, set()
    for entry in entries:
        for person in entry["identities"]:
            if not is_text(person.get("id")):
                continue
            if entry.get("sha256") in clips:
                refused.add(person["id"])
            for view, picture in person["views"].items():
                pictures.setdefault(person["id"], {}).setdefault(view, set()).add(picture["image"])
    return pictures, refused


def cast_cases(people, n, seed):
    """Whom each of n cases shows: lists of one or two of `people`, everybody nearly equally often."""
    people, one = in_order(people, seed, "people"), round(ONE_PERSON * n)
    apart = max(1, len(people) // 2 - 1)
    return ([[people[i % len(people)]] for i in range(one)]
            + [[people[i % len(people)], people[(i + apart) % len(people)]] for i in range(one, n)])


def prompt_of(case, n_people, seed):
    """-> a sentence or two from the grammar, and the yaw that it asks of each person."""
    shot, scene = draw(SHOTS, seed, case, "shot"), draw(SCENES, seed, case, "scene")
    acts = [draw(list(ACTIONS), seed, case, "action", k) for k in range(n_people)]
    who, do = "a person", "The person {}."
    if n_people > 1:
        who, do = "two people", "The one on the left {}, the one on the right {}."
    return f"{shot} of {who} {scene}. {do.format(*acts)}", [ACTIONS[action] for action in acts]


def make_cases(argv):
    """`python eval.py make-cases`"""
    p = Parser(prog="eval.py make-cases", description="cases for the real benchmark, of people of a curated "
               "set that training never saw: for 100 cases 52 people, 60 cases with one and 40 with two")
    p.add_argument("--data", required=True, type=Path, help="folder with a manifest.jsonl")
    p.add_argument("--n", type=count, default=100, help="cases; a smaller number keeps the proportions")
    p.add_argument("--out", required=True, type=Path, help="the .jsonl file; pictures are copied beside it")
    p.add_argument("--training", nargs="+", type=Path, help="manifests and encoded sets of training: who has "
                   "a clip or an id in them is left out (default: encoded, in --data)")
    p.add_argument("--seed", type=seed_number, default=0, help="of the choice of clips")
    args = p.parse_args(argv)
    folder = args.out.parent / f"{args.out.stem}_refs"
    probe_writable(args.out.parent)
    training = [path / "index.jsonl" if path.is_dir() else path
                for path in args.training or [args.data / "encoded"]]
    if not args.training and not training[0].is_file():
        print(f"{training.pop()}: no training set to look at, so nobody is left out; --training names others")
    check_outputs([args.out], [args.data / "manifest.jsonl", *training])
    for path in (args.out, folder):
        if os.path.lexists(path):  # somebody may have edited it
            raise UserError(f"{path} exists and would be replaced: choose another --out")
    named, clips = read_training(training)
    pictures, seen = pictures_of(read_manifest(args.data), clips)
    refused = pictures.keys() & (named | seen)
    people = sorted(name for name in pictures.keys() - refused if "front" in pictures[name])
    needed = max(1 if args.n == round(ONE_PERSON * args.n) else 2, round(IDENTITIES * args.n))
    if len(people) < needed:
        advice = f"; --n {int(len(people) / IDENTITIES)} would do" if len(people) > 1 else ""
        raise UserError(f"{args.data} has {len(pictures)} identities, of which training names {len(refused)} "
                        f"and {len(people)} others have a front view; --n {args.n} needs {needed}{advice}")
    people = in_order(people, args.seed, "chosen")[:needed]
    with atomic_folder(folder) as build:
        given = {name: copy_pictures(args, name, k, pictures[name], build) for k, name in enumerate(people)}
    lines = []
    for k, cast in enumerate(cast_cases(people, args.n, args.seed), 1):
        words, asked = prompt_of(k, len(cast), args.seed)
        lines.append({"id": f"case-{k:03d}", "prompt": words, "refs": [given[name][0] for name in cast],
                      "eval_refs": [given[name][1] for name in cast], "asked_yaw": asked, "seed": k,
                      "people": cast})
    with atomic_file(args.out) as temporary:
        temporary.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    own = sum(sorted(views.values()) == sorted(files) for views, files in given.values())
    print(f"{args.out}: {len(lines)} cases of {len(people)} people; training names {len(refused)} others"
          + (f"; {own} have no picture besides their references, to which they are measured" if own else ""))


def copy_pictures(args, name, k, views, build):
    """Copy a person's pictures into the folder `build`, one per view as reference, up to MOST_REFS of the
    others to measure with -> {view: path}, paths, both as the file of cases names them."""
    def copy(image, label):
        target = f"{k:03d}_{label}{Path(image).suffix}"
        shutil.copyfile(args.data / image, build / target)
        return f"{args.out.stem}_refs/{target}"
    ordered = {view: in_order(views[view], args.seed, name) for view in VIEWS if view in views}
    refs = {view: copy(images[0], view) for view, images in ordered.items()}
    used = {images[0] for images in ordered.values()}
    others = in_order(set().union(*views.values()) - used, args.seed, name)[:MOST_REFS]
    return refs, [copy(image, f"eval_{i}") for i, image in enumerate(others)] or list(refs.values())
