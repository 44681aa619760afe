"""Two benchmarks with one report: the toy's, with exact ground truth, and the real one, with face networks.

  python eval.py --ckpt out/toy                                        the toy: tables, OUT/report.html
  python eval.py make-cases --data DATA --out cases.jsonl              cases for real videos; see cases.py
  python eval.py real --cases cases.jsonl --videos DIR --faces FACES   measure any system's videos
  python eval.py real --cases cases.jsonl --ckpt out/1.3b --faces FACES   sample them first, by torchrun
  python eval.py compare out/ours out/theirs                           systems side by side, paired by case
  python eval.py claims --base assets/base            train variants, judge the papers' claims by them
  python eval.py speed forward --config 1.3b                           time and memory of the network

The toy benchmark has 100 fixed cases over 52 people that training never saw. A case is a clip of one or two
people whose motion sweeps the yaw. The clip is sampled from its caption and references. What it then shows is
read by rendering: the same clip with one thing changed (another person, yaw, motion, mouth, wall, or a
reference's pose) is rendered from known parameters, and the nearest rendering wins. real.py measures
real videos. Every result is a line of JSON in OUT, appended as it is there. A restart skips finished cases.
"""
import functools
import importlib
import itertools
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

# before torch starts its threads: beside another busy process, spinning ones made a toy step ten times longer
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch

import data
from measure.report import (BIN_NAMES, Metric, Results, as_text, by_yaw, case_html, column, estimate, hold,
                            in_columns, interval, mean, one, per_frame, strip, table, write_page)
from rope import VIEWS
from sample import (SAMPLE_RECIPES, VIDEO_CODE, Hardware, default_checkpoint, find, generate, load,
                    recipe_flags, with_flags)
from support.charts import plot
from support.checkpoints import find_checkpoint
from support.processes import World
from support.script import (Parser, UserError, atomic_file, check_outputs, fingerprint, in_range, nonempty,
                            progress, run_script, source_hash, uses_bf16)
from videos import toy
from videos.jobs import Job
from videos.pictures import from_bytes, to_bytes, wrap

CASES = 100
# views given; in "described" none, but a caption that tells the people's looks
SETTINGS = {"none": (), "described": (), "front": ("front",), "front+left": ("front", "left"), "all": VIEWS}
DEFAULT_SETTINGS = [setting for setting in SETTINGS if setting != "described"]
CAPTION_FIELDS = ("motion", "mouth", "wall")  # what of the caption is checked
ATTRIBUTES = ("skin", "hair", "eyes", "patch_left", "patch_right", "patch_back")
YAW_OFFSETS = torch.arange(-180.0, 180, 15)  # candidates around the requested yaw; the nearest one wins
COPY_MARGIN = 30  # degrees from every given view: a frame that should face further can show a copied pose
SIGMAS = (0.95, 0.98, 0.99, 0.995, 1.0)  # of the prior's loss: where 19 in 20 of the toy's training steps are
# what a video depends on, and what the numbers do
CODE = (*VIDEO_CODE, "eval", "videos/encode")


# -------------------------------------------------------------------------------------------------- measuring
def square(picture, k):
    """Person k's part of toy pictures [..., S, W]."""
    S = picture.shape[-2]
    return picture[..., k * S:(k + 1) * S]


@functools.lru_cache(maxsize=160)
def renderings(number, k, frames, size):
    """What a sampled clip of case `number` is compared with, in person k's square of the picture:
    {what differs among them: uint8 videos [n, 3, F, S, S]}, and "mask", the true head's mask [F, S, S].
    Nobody but person k changes."""
    clip, cast = toy.benchmark_cases()[number]
    everybody = toy.benchmark_people()

    def copies(n):
        return toy.pick(everybody, [cast[k]] * n)

    def render(clips, identities, pose=None):
        """identities: one per clip, in k's place; pose: entries of k's pose that are not the clip's."""
        people = [None] * len(cast)
        people[k] = identities
        videos, masks = toy.render_clips(clips, people, frames, size, {k: pose or {}})
        return to_bytes(square(videos, k)), square(masks[:, k], k)

    def vary(clips, pose=None):
        return render(clips, copies(len(clips)), pose)[0]

    def per_person(names, all_names):
        """A clip's names, one per person, with each of all names in k's place."""
        return [(*names[:k], name, *names[k + 1:]) for name in all_names]

    def paint(grey):
        """The person with one attribute in black or in white, for each attribute."""
        identities = copies(len(ATTRIBUTES))
        for i, name in enumerate(ATTRIBUTES):
            identities[name][i] = grey
        return render([clip] * len(ATTRIBUTES), identities)[0]
    poses, reference = toy.reference_pose(toy.BENCHMARK_IDENTITIES, toy.BENCHMARK_SEED), {}
    for name in ("yaw", "pitch", "roll", "mouth"):
        by_person = poses[name].unflatten(0, (-1, len(VIEWS)))
        reference[name] = by_person[cast[k]][:, None].expand(-1, frames)
    requested = toy.clip_pose([clip], k, frames)["yaw"]  # [1, F]
    people, masks = render([clip] * toy.BENCHMARK_IDENTITIES, everybody)
    return {"people": people, "mask": masks[cast[k]],
            "yaw": vary([clip] * len(YAW_OFFSETS), {"yaw": requested + YAW_OFFSETS[:, None]}),
            "references": vary([clip] * len(VIEWS), reference),
            "motion": vary([replace(clip, motions=m) for m in per_person(clip.motions, toy.MOTIONS)]),
            "mouth": vary([replace(clip, mouths=m) for m in per_person(clip.mouths, toy.MOUTHS)]),
            "wall": vary([replace(clip, background=name) for name in toy.BACKGROUNDS]),
            "black": paint(0.0), "white": paint(1.0)}


def distances(video, candidates):
    """Squared error of a video [3, F, S, S] to each uint8 candidate, by frame: [n, F]. Where all candidates
    are alike it adds the same to each, so the nearest is decided by the pixels where they differ."""
    return (from_bytes(candidates) - video).square().sum(dim=(1, 3, 4))


def psnr(a, b, mask):
    """Of a and b [3, ..., S, S] in -1..1 where mask [..., S, S] is 1, peak 2; in dB, None where it is empty,
    at most 60: ground truth is kept in bytes."""
    weight = mask.sum() * 3
    if weight > 0:
        error = ((a - b).square() * mask).sum() / weight
        return min(60.0, float(10 * torch.log10(4 / error)))


def nearest_is(video, candidates, names, truth):
    """Is the nearest candidate, of these names, the true one; None if all look alike in this clip."""
    if bool((candidates == candidates[:1]).all()):
        return None
    return list(names)[int(distances(video, candidates).sum(1).argmin())] == truth


def colour_error(video, truth, black, white):
    """Distance (0..1 RGB) of an attribute's mean colour where it is visible, None under two pixels of it."""
    weight = (white.float() - black.float()).mean(dim=0) / 255
    if weight.sum() < 2:
        return None
    difference = ((video - truth) / 2 * weight).sum(dim=(1, 2, 3)) / weight.sum()
    return float(difference.norm())


def measure(video, number, views):
    """A sampled video [3, F, S, S or 2 S] of a case that was given these views -> what METRICS reads, a dict
    per person."""
    _, cast = toy.benchmark_cases()[number]
    return [measure_person(square(video, k), number, k, views) for k in range(len(cast))]


def measure_person(video, number, k, views):
    clip, cast = toy.benchmark_cases()[number]
    _, F, S, _ = video.shape
    rendered, person, given = renderings(number, k, F, S), cast[k], [VIEWS.index(view) for view in views]
    truth, mask = from_bytes(rendered["people"][person]), rendered["mask"]
    yaw = toy.clip_pose([clip], k, F)["yaw"][0]
    to_view = toy.view_distance(yaw[None])[0]  # degrees, [V, F]
    to_person = distances(video, rendered["people"])  # [52, F]
    error = to_person.sum(dim=1)
    copied = [None] * F
    if views:  # frames that should show none of the references' poses: do they?
        far = to_view[given].amin(dim=0) >= COPY_MARGIN
        copies = distances(video, rendered["references"])[given].amin(dim=0) < to_person[person]
        copied = [bool(copy) if counts else None for copy, counts in zip(copies, far)]
    offsets = YAW_OFFSETS[distances(video, rendered["yaw"]).argmin(dim=0)]
    result = {
        "person": person, "rank": int((error < error[person]).sum()) + 1, "psnr": psnr(video, truth, mask),
        "yaw": wrap(yaw).tolist(), "turned": offsets.tolist(),
        "frame_psnr": [psnr(video[:, f], truth[:, f], mask[f]) for f in range(F)],
        "frame_right": (to_person.argmin(dim=0) == person).tolist(),
        "seen": [view in given for view in to_view.argmin(dim=0).tolist()], "copied": copied,
        "motion": nearest_is(video, rendered["motion"], toy.MOTIONS, clip.motions[k]),
        "mouth": nearest_is(video, rendered["mouth"], toy.MOUTHS, clip.mouths[k]),
        "wall": nearest_is(video, rendered["wall"], toy.BACKGROUNDS, clip.background),
        "colour": {name: colour_error(video, truth, rendered["black"][a], rendered["white"][a])
                   for a, name in enumerate(ATTRIBUTES)}}
    if len(cast) == 2:
        other = cast[1 - k]
        result["swapped"] = bool(error[other] < error[person])
        result["margin"] = result["psnr"] - psnr(video, from_bytes(rendered["people"][other]), mask)
    return result


def jitter(person):
    """Second differences over time of the yaw in the video beyond those of the requested yaw, in degrees: 0
    for any motion as smooth as the right one, though it be another."""
    def bends(yaw):
        return [abs(wrap(c - b) - wrap(b - a)) for a, b, c in zip(yaw, yaw[1:], yaw[2:])]
    actual = bends([yaw + offset for yaw, offset in zip(person["yaw"], person["turned"])])
    return [max(0.0, bend - requested) for bend, requested in zip(actual, bends(person["yaw"]))]


METRICS = {
    "psnr": Metric("PSNR on the head against the truth, dB", one("psnr")),
    "side": Metric("PSNR of frames that face 45 degrees or more away, dB", per_frame("frame_psnr", 45)),
    "seen": Metric("PSNR of frames whose nearest view was given, dB", per_frame("frame_psnr", seen=[True])),
    "unseen": Metric("PSNR of the other frames, dB", per_frame("frame_psnr", seen=[False])),
    "top-1": Metric("right person nearest of 52 in the clip, chance 1.9 %", lambda p: [p["rank"] == 1], True),
    "top-1 seen": Metric("the same in a frame whose nearest view was given",
                         per_frame("frame_right", seen=[True]), True),
    "top-1 unseen": Metric("the same in the other frames", per_frame("frame_right", seen=[False]), True),
    "swaps": Metric("nearer to the clip's other person than to the right one", one("swapped"), True),
    "margin": Metric("PSNR to the right person minus that to the other, dB", one("margin")),
    "colour": Metric("distance to the right colour where it is visible, RGB 0..1, mean of "
                     + ", ".join(ATTRIBUTES), lambda p: p["colour"].values()),
    **{name: Metric(f"the same of {name} only", lambda p, name=name: [p["colour"][name]])
       for name in ATTRIBUTES},
    "copied": Metric(f"frames nearer to a given reference's pose, of those that should face {COPY_MARGIN} "
                     "degrees or more from all", lambda p: p["copied"], True),
    "yaw": Metric("error of the yaw in each frame, degrees", lambda p: map(abs, p["turned"])),
    "jitter": Metric("roughness of the yaw beyond the right one's, degrees per frame per frame", jitter),
    "motion": Metric("right motion nearest of 6, chance 17 %", one("motion"), True),
    "mouth": Metric("right mouth nearest of 3, chance 33 %", one("mouth"), True),
    "wall": Metric("right background nearest of 6, chance 17 %", one("wall"), True),
    "caption": Metric("motion, mouth and wall: those that are right",
                      lambda p: [p[name] for name in CAPTION_FIELDS], True),
}
HEADLINE = ("psnr", "side", "top-1", "swaps")  # printed with their intervals; the report has all
DETAILS = ("seen", "unseen", "top-1 seen", "top-1 unseen", "margin", "copied", "yaw", "jitter",
           *CAPTION_FIELDS)


# ------------------------------------------------------------------------------------------------- statistics
def select(results, n_people=(1, 2), settings=SETTINGS):
    return [r for r in results if len(r["people"]) in n_people and r["setting"] in settings]


def title(name):
    return column(name, METRICS[name])


def table_of(results, names, with_interval=True):
    """A header, and a line of cells for each number of people and setting."""
    groups = {f"{n_people}, {setting}": select(results, (n_people,), [setting])
              for n_people, setting in itertools.product((1, 2), SETTINGS)}
    metrics = {name: METRICS[name] for name in names}
    return table("people, views given", groups, metrics, with_interval)


def loss_estimates(losses):
    """Over cases, the prior's loss at each of SIGMAS."""
    return [interval(list(at_sigma)) for at_sigma in zip(*losses.values())]


def caption_estimates(results):
    """How often each of CAPTION_FIELDS is right without references."""
    return [estimate(select(results, settings=["none"]), METRICS[name]) for name in CAPTION_FIELDS]


# --------------------------------------------------------------------------------------------------- sampling
class Plan(NamedTuple):
    """What is measured of a checkpoint; benchmark_flags ask for it."""
    cases: list  # case numbers
    settings: list
    recipe: dict  # a row of SAMPLE_RECIPES
    batch: int = 20  # cases that share a forward
    precision: str = "auto"


class Evaluation(NamedTuple):
    """What was measured of one checkpoint."""
    results: list  # a dict per case and setting: "case", "setting", "people" (see measure), "strip"
    losses: dict  # case -> the prior's loss at each of SIGMAS
    frames: int
    size: int  # pixels a side


@torch.no_grad()
def prior_loss(model, encoders, clips, videos, seeds):
    """Mean squared error of the velocity at SIGMAS without references, in float32: one list per clip."""
    x0 = encoders.encode(videos).to(model.device)
    text = encoders.text([toy.caption(clip) for clip in clips]).to(model.device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = data.noise_of(x0.shape[1:], generators).to(model.device)
    no_refs = [{} for _ in clips[0].motions]
    losses = []
    for sigma in SIGMAS:
        t = torch.full((len(x0),), 1000 * sigma, device=model.device)
        v = model((1 - sigma) * x0 + sigma * noise, t, text, no_refs, [None] * len(no_refs))
        losses.append((v - (noise - x0)).square().mean(dim=(1, 2, 3, 4)))
    return torch.stack(losses, dim=1).tolist()


def run_key(model, checkpoint, plan):
    """A short name for all that a result depends on. Under bf16 a video depends in its last digits on those
    that it shares a forward with, so the cases and --batch count too."""
    of_checkpoint = checkpoint.meta["sha256"], checkpoint.meta["config"], checkpoint.frames, checkpoint.size
    precision = uses_bf16(model.device, model.precision)
    return fingerprint(of_checkpoint, plan.recipe, plan.cases, plan.batch, model.device.type, precision,
                       source_hash(*CODE))


def cut_batches(cases, batch):
    """Case numbers in batches with equally many people. All cases are cut, finished or not, so that a restart
    samples the same batches."""
    batches = []
    for n_people in (1, 2):
        same = [n for n in cases if len(toy.benchmark_cases()[n][1]) == n_people]
        batches += [same[i:i + batch] for i in range(0, len(same), batch)]
    return batches


def sample_batch(model, encoders, checkpoint, numbers, setting, plan):
    """Yields these cases' numbers and what was measured of each under one setting, or None: the prior."""
    frames, size = checkpoint.frames, checkpoint.size[0]
    clips, casts = zip(*(toy.benchmark_cases()[n] for n in numbers))
    if setting is None:
        truths = torch.stack([toy.benchmark_truth(n, frames, size) for n in numbers])
        for n, loss in zip(numbers, prior_loss(model, encoders, clips, truths, numbers)):
            yield n, {"loss": loss}
        return
    views, jobs, looks = SETTINGS[setting], [], None
    for n, clip, cast in zip(numbers, clips, casts):
        references = toy.held_out_references(cast, views, size)
        if setting == "described":
            looks = [toy.describe(toy.benchmark_people(), i) for i in cast]
        jobs.append(Job(toy.caption(clip, looks), references, n, toy.frame_size(size, len(cast))))
    for n, video in zip(numbers, generate(model, encoders, jobs, plan.recipe, frames, len(jobs))):
        yield n, {"setting": setting, "people": measure(video, n, views), "strip": png_strip(video)}


def png_strip(video):
    """[3, F, S, S], frame beside frame, as a PNG."""
    return strip(to_bytes(video).permute(1, 2, 3, 0).numpy())


def evaluate(ckpt, plan, path, world=World(0, 1, torch.device("cpu"))):
    """Sample and measure a checkpoint -> Evaluation. Every result is appended to `path` at once, and those of
    an earlier call are kept. A batch of which any result is missing is sampled again as a whole, since its
    other videos change the last digits. Several ranks share the batches, and the file."""
    checkpoint = find(ckpt)
    if checkpoint.kind != "toy":
        raise UserError(f"{ckpt} is not a checkpoint of the toy world, which this benchmark is made of")
    model, encoders = load(checkpoint, hardware=Hardware(plan.precision))
    run, results = run_key(model, checkpoint, plan), Results(path, ("run", "case", "setting"))
    batches = cut_batches(plan.cases, plan.batch)[world.rank::world.size]
    for numbers in progress(batches, "evaluating", "batches"):
        for setting in (*plan.settings, None):
            missing = [n for n in numbers if (run, n, setting) not in results]
            if not missing:
                continue
            for n, values in sample_batch(model, encoders, checkpoint, numbers, setting, plan):
                if n in missing:
                    results.add({"run": run, "case": n, **values})
    if world.size > 1:  # now all is in the file, as it is for a restart
        world.barrier()
        results.read()
    # in this order, since a restart measures in another one
    in_order = [results[run, *key] for key in itertools.product(plan.cases, sorted(plan.settings))]
    return Evaluation(in_order, {n: results[run, n, None]["loss"] for n in plan.cases},
                      checkpoint.frames, checkpoint.size[0])


# ----------------------------------------------------------------------------------------------------- report
def gallery_of(number, results, frames, size):
    """One case: its references, the truth, and the video under each setting."""
    clip, cast = toy.benchmark_cases()[number]
    pictures = [(png_strip(toy.benchmark_references(size)[i].transpose(0, 1)),
                 f"references of person {i}: {', '.join(VIEWS)}") for i in cast]
    pictures.append((png_strip(toy.benchmark_truth(number, frames, size)), "ground truth"))
    for result in sorted(results, key=lambda r: list(SETTINGS).index(r["setting"])):
        people = [f"{p['psnr']:.1f} dB, rank {p['rank']}" + ", swapped" * p.get("swapped", False)
                  for p in result["people"]]
        pictures.append((result["strip"], f"given {result['setting']}: {'; '.join(people)}"))
    return case_html(f"Case {number}: {toy.caption(clip)}", pictures)


def report(path, heading, evaluations):
    """Write report.html: the table, plots, every case with the worst first. evaluations: {"this checkpoint":
    its Evaluation, "its stage 1": that of the run's first stage, where there is one}"""
    results, _, frames, size = evaluations["this checkpoint"]
    settings, plots = [s for s in SETTINGS if select(results, settings=[s])], []
    for n_people, words in ((1, "one person"), (2, "two people")):
        groups = {s: select(results, (n_people,), [s]) for s in settings}
        plots += [plot(f"PSNR by yaw, {words}, dB", BIN_NAMES,
                       {s: by_yaw(group, "frame_psnr") for s, group in groups.items()}),
                  plot(f"right person nearest by yaw, {words}, % of frames", BIN_NAMES,
                       {s: by_yaw(group, "frame_right", True) for s, group in groups.items()}, True)]
    swaps = [estimate(select(results, (2,), [s]), METRICS["swaps"]) for s in settings]
    losses = {name: loss_estimates(e.losses) for name, e in evaluations.items()}
    captions = {name: caption_estimates(e.results) for name, e in evaluations.items()}
    plots += [plot("swaps by views given, two people, %", settings, {"this checkpoint": swaps}, True),
              plot("loss by noise level, no references", [str(s) for s in SIGMAS], losses),
              plot("caption followed, no references, %", CAPTION_FIELDS, captions, True)]
    cases, quality = {}, {}
    for result in results:
        cases.setdefault(result["case"], []).append(result)
        if result["setting"] == settings[-1]:  # most views
            quality[result["case"]] = mean([person["psnr"] for person in result["people"]])
    with atomic_file(path.with_name("yaw.svg")) as temporary:  # on its own, for a README
        alone = plots[0].replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
        temporary.write_text(alone, encoding="utf-8")
    galleries = [gallery_of(n, cases[n], frames, size) for n in sorted(cases, key=quality.get)]
    write_page(path, "toy benchmark", heading, table_of(results, METRICS), METRICS, plots, galleries)


# ----------------------------------------------------------------------------------------------- the toy, run
def benchmark_flags(add, settings=DEFAULT_SETTINGS):
    """Flags that say what is measured; claims.py has them too."""
    case_count = in_range(int, 1, CASES, f"1 to {CASES} cases")
    add("--limit", type=case_count, default=CASES, help="for a quick look: so many cases, spread over all")
    add("--settings", nargs="+", choices=SETTINGS, default=list(settings), help="views given; described: "
        f"none, but the caption tells the looks, for a base model (default: {' '.join(settings)})")
    add("--batch", type=case_count, default=20, help="cases that share a forward")
    recipe_flags(add)


def plan_of(args):
    """benchmark_flags -> Plan; says what it is."""
    cases = sorted({i * CASES // args.limit for i in range(args.limit)})
    recipe = with_flags(SAMPLE_RECIPES["toy"], args)
    plan = Plan(cases, list(dict.fromkeys(args.settings)), recipe, args.batch, args.precision)
    print(f"{len(cases)} cases, given {', '.join(plan.settings)}; "
          + ", ".join(f"{name} {value}" for name, value in recipe.items() if value))
    return plan


def run_toy(args, world):
    start, ckpt = time.perf_counter(), args.ckpt or default_checkpoint()
    path, page = Path(args.out, "measured.jsonl"), Path(args.out, "report.html")
    world.barrier()  # rank 0 holds the folder
    check_outputs([page, page.with_name("yaw.svg")], [])
    plan = plan_of(args)
    evaluations = {"this checkpoint": evaluate(ckpt, plan, path, world)}
    if first := find_checkpoint(Path(ckpt) / "stage1"):
        settings = [s for s in plan.settings if s == "none"]
        evaluations["its stage 1"] = evaluate(first, plan._replace(settings=settings), path, world)
    results = evaluations["this checkpoint"].results
    print(in_columns(table_of(results, HEADLINE)))
    for metrics in (DETAILS, ("colour", *ATTRIBUTES)):
        print(in_columns(table_of(results, metrics, with_interval=False)))
    lines = [["every slot a proxy", *(f"loss at {s}" for s in SIGMAS), *map(title, CAPTION_FIELDS)]]
    for name, evaluation in evaluations.items():
        rates = [as_text(found, percent=True) for found in caption_estimates(evaluation.results)]
        lines.append([name, *map(as_text, loss_estimates(evaluation.losses)), *rates])
    print(in_columns(lines))
    if world.rank == 0:
        how = f"{plan.recipe['steps']} steps, reference guidance {plan.recipe['guide_refs']}"
        report(page, f"{ckpt}: {how}", evaluations)
        print(f"{path} and {page} in {time.perf_counter() - start:.0f} s")


# -------------------------------------------------------------------------------------------------------- CLI
DOORS = {  # python eval.py NAME ...: the module and its function; without a name, the toy benchmark
    "real": ("measure.real", "main"), "compare": ("measure.real", "compare_main"),
    "make-cases": ("measure.cases", "make_cases"), "claims": ("measure.claims", "main"),
    "speed": ("measure.speed", "main")}


def main(argv=None, **options):
    """options: further arguments of the function that is called."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] and argv[0] in DOORS:
        module, function = DOORS[argv[0]]
        if argv[0] == "claims":
            options |= {"benchmark": sys.modules[__name__]}
        return getattr(importlib.import_module(module), function)(argv[1:], **options)
    if argv[:1] == ["toy"]:
        argv = argv[1:]
    world = World.join()
    with world.one_voice():
        meanings = "\n".join(f"  {title(name):15}{metric.words}" for name, metric in METRICS.items())
        p = Parser(description=__doc__, usage=f"eval.py [{' | '.join(['toy', *DOORS])}] ... [--help]",
                   epilog=f"what the columns mean:\n{meanings}")
        p.add_argument("--ckpt", type=nonempty, help="folder of a checkpoint, or of a run: its newest one")
        p.add_argument("--out", type=nonempty, default="out/eval", help="folder for results and report.html")
        benchmark_flags(p.add_argument)
        args = p.parse_args(argv)
        with hold(args.out, world):
            run_toy(args, world)
    world.leave()


if __name__ == "__main__":
    run_script(main, "a smaller --batch, or for real videos --offload and --tile 256")
