"""Cases of the real benchmark: what to make a video of, and what to measure it with.

A file of cases is one JSON object a line:
  {"id": "case-001", "prompt": "...", "seed": 0, "refs": [{"front": "refs/a.png", "left": "refs/b.png"}],
   "eval_refs": [["refs/c.png"]], "asked_yaw": [-90], "places": true}
  refs       one {view: picture} per person, from left to right, as the prompt names them; at most four people
  eval_refs  one to ten pictures per person that similarity is measured to; without them it is to the refs
  asked_yaw  the largest yaw in degrees that the prompt asks of each person, below 0 to the picture's left and
             above 0 to its right, a list where it asks for both sides ([-45, 45]), or null; without it none
  places     false where the prompt does not say who stands where: then nobody can be in the wrong place
Other keys are not read. Paths are relative to the file and stay in its folder. A bad line becomes a Case with
`fault` set; the results then show that text.
"""
import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from rope import VIEWS
from support.script import (Parser, UserError, as_user_error, atomic_file, atomic_folder, check_outputs,
                            count, is_seed, is_text, probe_writable, read_lines, read_text)
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

    def files(self):
        return [*(file for views in self.refs for file in views.values()), *sum(self.eval_refs, [])]


def read_cases(path):
    """A file of cases -> Cases; a line that cannot be used becomes one with a fault."""
    path, cases, names = Path(path), {}, Names(Path(path).parent)
    with as_user_error(path):
        if not path.is_file():
            raise UserError(f"{path}: no such file; `python eval.py make-cases` writes one")
        text = read_text(path, spare=True)
    for n, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            case = read_case(json.loads(line), names)
            if case.id in cases:
                raise ValueError(f"a second case {case.id}")
        except (OSError, ValueError, RecursionError) as error:
            case = Case(f"line {n}", fault=str(error).encode(errors="replace").decode()[:300])
        cases[case.id] = case
    if not cases:
        raise UserError(f"{path} holds no case; expected one JSON object a line")
    return list(cases.values())


def read_case(entry, names):
    """A line's object -> Case. Raises ValueError for anything else. names: Names of the file's folder"""
    def expect(holds, message):
        if not holds:
            raise ValueError(message)

    def inside(file):
        file = names.find(file)
        path = names.folder / file
        expect(not os.path.isabs(file) and path.resolve().is_relative_to(names.folder.resolve()),
               f"{file!r:.80} leaves the folder")
        expect(path.is_file(), f"{file!r:.80}: no such file")
        return path
    expect(isinstance(entry, dict) and {"id", "prompt", "refs"} <= entry.keys(),
           "expected an object with id, prompt and refs")
    name, prompt, refs = entry["id"], entry["prompt"], entry["refs"]
    expect(isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name),
           f"its id {name!r:.60} is none of letters, digits, '.', '_' and '-', at most 100")
    expect(is_text(prompt) and prompt.strip() and "\ufffd" not in prompt,
           "no prompt, or none that is text in UTF-8")
    expect(is_list(refs, range(1, MOST_PEOPLE + 1), lambda views: isinstance(views, dict) and views
                   and views.keys() <= set(VIEWS) and all(map(is_text, views.values()))),
           f"refs: expected {{view: picture}} of one to {MOST_PEOPLE} people, views of {', '.join(VIEWS)}")
    people = [len(refs)]
    eval_refs = entry.get("eval_refs") or [list(views.values()) for views in refs]
    expect(is_list(eval_refs, people, lambda files: is_list(files, range(1, MOST_REFS + 1), is_text)),
           f"eval_refs: expected one to {MOST_REFS} pictures of each of the {len(refs)} people of refs")
    asked, seed = entry.get("asked_yaw") or [None] * len(refs), entry.get("seed") or 0
    expect(is_list(asked, people,
                   lambda yaw: yaw is None or is_yaw(yaw) or is_list(yaw, range(1, 10), is_yaw)),
           f"asked_yaw {asked!r:.40}: expected -180 to 180 degrees, a list of such, or null, of each person")
    expect(is_seed(seed), "seed is no whole number from 0 on")
    expect(isinstance(entry.get("places", True), bool), "places is neither true nor false")
    refs = [{view: inside(views[view]) for view in VIEWS if view in views} for views in refs]
    eval_refs = [list(map(inside, files)) for files in eval_refs]
    return Case(name, prompt, refs, eval_refs, seed, asked, entry.get("places", True))


def is_list(value, lengths, is_one):
    return isinstance(value, list) and len(value) in lengths and all(map(is_one, value))


def is_yaw(value):
    return type(value) in (int, float) and -180 <= value <= 180


# -------------------------------------------------------------------------------------------------- new cases
IDENTITIES, ONE_PERSON = 0.52, 0.6  # of the papers' 100 cases: 52 people; 60 cases with one, 40 with two
SCENES = ("in a sunlit kitchen", "in front of a brick wall", "on a busy street at night", "in a snowy park")
ACTIONS = {  # what somebody does: the yaw that this asks for, as in asked_yaw
    "talks to the camera": None,
    "looks from one side to the other": [-45, 45],
    "turns the head to the left of the picture until the profile shows": -90,
    "turns the head to the right of the picture until the profile shows": 90,
}


def read_training(paths):
    """Ids of people and hashes of clips, of manifests and encoded sets; says how many lines lack an id."""
    people, clips, silent = set(), set(), 0
    for path in paths:
        if not path.is_file():
            raise UserError(f"--training {path}: no such file; expected a manifest.jsonl or an encoded set")
        lines = [line for line in read_lines(path) if "identities" in line or "views" in line]
        if not lines:
            raise UserError(f"--training {path} holds no line of a manifest or of an encoded set")
        with as_user_error(path):
            for line in lines:
                names = line.get("people", [None])
                if "identities" in line:
                    names = [person.get("id") for person in line["identities"]]
                    clips.add(line.get("sha256"))  # in an encoded set it is another file's
                people |= set(names)
                silent += None in names
    if silent:
        print(f"{silent} clips of training do not say whom they show: these people are not left out")
    return people - {None}, clips - {None}


def pictures_of(entries, clips):
    """{id: {view: pictures}} of a manifest's people, and the ids of those who are in one of these clips."""
    pictures, in_clips = {}, set()
    for entry in entries:
        for person in entry["identities"]:
            if is_text(person.get("id")):
                views = pictures.setdefault(person["id"], {})
                for view, picture in person["views"].items():
                    views.setdefault(view, set()).add(picture["image"])
                if entry.get("sha256") in clips:
                    in_clips.add(person["id"])
    return pictures, in_clips


def prompt_of(n_people, rng):
    """-> a sentence or two, and the yaw that it asks of each person."""
    acts = [rng.choice(list(ACTIONS)) for _ in range(n_people)]
    words = "A medium close-up of a person {}. The person {}."
    if n_people > 1:
        words = "A medium close-up of two people {}. The one on the left {}, the one on the right {}."
    return words.format(rng.choice(SCENES), *acts), [ACTIONS[action] for action in acts]


def make_cases(argv):
    """`python eval.py make-cases`"""
    p = Parser(prog="eval.py make-cases", description="cases for the real benchmark, of people of a curated "
               "set that training never saw: for 100 cases 52 people, 60 cases with one and 40 with two")
    p.add_argument("--data", required=True, type=Path, help="folder with a manifest.jsonl")
    p.add_argument("--n", type=count, default=100, help="cases; a smaller number keeps the proportions")
    p.add_argument("--out", required=True, type=Path, help="the .jsonl file; pictures are copied beside it")
    p.add_argument("--training", nargs="+", type=Path, help="manifests and encoded sets of training: who has "
                   "a clip or an id in them is left out (default: encoded, in --data)")
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
    pictures, in_clips = pictures_of(read_manifest(args.data), clips)
    refused = pictures.keys() & (named | in_clips)
    people = sorted(name for name in pictures.keys() - refused if "front" in pictures[name])
    alone = round(ONE_PERSON * args.n)
    needed = max(1 if args.n == alone else 2, round(IDENTITIES * args.n))
    if len(people) < needed:
        advice = f"; --n {int(len(people) / IDENTITIES)} would do" * (len(people) > 1)
        raise UserError(f"{args.data} has {len(pictures)} identities, of which training names {len(refused)} "
                        f"and {len(people)} others have a front view; --n {args.n} needs {needed}{advice}")
    rng, lines = random.Random(0), []
    people = rng.sample(people, needed)
    with atomic_folder(folder) as build:
        references = {name: copy_pictures(args, f"{k:03d}", pictures[name], build, rng)
                      for k, name in enumerate(people)}
    apart = max(1, needed // 2 - 1)  # of two people in the list, so that no pair comes twice
    for k in range(args.n):
        cast = [people[k % needed], people[(k + apart) % needed]][:1 if k < alone else 2]
        words, asked = prompt_of(len(cast), rng)
        refs, eval_refs = zip(*(references[name] for name in cast))
        lines.append({"id": f"case-{k + 1:03d}", "prompt": words, "refs": refs, "eval_refs": eval_refs,
                      "asked_yaw": asked, "seed": k + 1, "people": cast})
    with atomic_file(args.out) as temporary:
        temporary.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    print(f"{args.out}: {len(lines)} cases of {len(people)} people; training names {len(refused)} others")
    if own := sum(sorted(views.values()) == sorted(files) for views, files in references.values()):
        print(f"{own} have no picture besides their references, to which they are measured")


def copy_pictures(args, person, views, build, rng):
    """Copy a person's pictures into the folder `build`, one per view as reference, up to MOST_REFS of the
    others to measure with -> {view: path}, paths, both as the file of cases names them."""
    def copy(image, label):
        target = f"{person}_{label}{Path(image).suffix}"
        shutil.copyfile(args.data / image, build / target)
        return f"{args.out.stem}_refs/{target}"
    chosen = {view: rng.choice(sorted(views[view])) for view in VIEWS if view in views}
    refs = {view: copy(image, view) for view, image in chosen.items()}
    others = sorted(set().union(*views.values()) - set(chosen.values()))
    others = rng.sample(others, min(MOST_REFS, len(others)))
    return refs, [copy(image, f"eval_{i}") for i, image in enumerate(others)] or list(refs.values())
