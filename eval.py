"""The toy benchmark: 100 fixed cases over 52 people that training never saw, with exact ground truth.

  python eval.py --ckpt out/toy         tables, OUT/cases.jsonl (a line a case and setting), report.html
  python eval.py --ablate full no-mfi   trains and measures rows of ABLATIONS, says which CLAIMS hold

A case is a clip of one or two people whose motion sweeps the yaw. The clip is sampled from its caption and
references; what it then shows is read by rendering: the same clip with one thing changed (another person,
yaw, motion, mouth, wall, a reference's pose) is rendered from known parameters, and the nearest rendering
wins. METRICS says what is read. Intervals are 95 %, by bootstrap over cases. A restart skips finished cases.
"""
import argparse
import base64
import contextlib
import functools
import hashlib
import html
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

# before torch starts its threads: beside another busy process, spinning ones made a toy step ten times longer
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch
from PIL import Image
from tqdm import tqdm

import data
from model import find_checkpoint
from rope import VIEWS, UserError, run_script
from sample import RECIPES, default_checkpoint, generate, load, noise_of

SETTINGS = {"none": (), "front": ("front",), "front+left": ("front", "left"), "all": VIEWS}  # views given
SAID = ("motion", "mouth", "wall")  # what of the caption is looked for
ATTRIBUTES = ("skin", "hair", "eyes", "patch_left", "patch_right", "patch_back")
TURNS = torch.arange(-180.0, 180, 15)  # away from the yaw that is asked for: among these a frame's is found
SIGMAS = (0.95, 0.98, 0.99, 0.995, 1.0)  # of the prior's loss: where 19 in 20 of the toy's training steps are
ELSEWHERE = 30  # degrees: a frame asked to face that far from every reference can show a copied pose
CODE = ("data", "encoders", "eval", "kernels", "model", "rope", "sample")  # a case's numbers depend on these
YAW_BINS = ((0, 30), (30, 60), (60, 100), (100, 181))


# -------------------------------------------------------------------------------------------------- measuring
def wrap(degrees):
    """Degrees into -180..180."""
    return (degrees + 180) % 360 - 180


def square(picture, k):
    """Person k's part of toy pictures [..., S, W]."""
    S = picture.shape[-2]
    return picture[..., k * S:(k + 1) * S]


@functools.lru_cache(maxsize=160)
def renderings(number, k, frames, size):
    """Person k of case `number` and all that a sampled clip is compared with: a dict of uint8 videos
    [n, 3, F, S, S] by what differs among them, and the true head's mask [F, S, S]; all of them person k's
    square of the picture, since nobody else changes."""
    clip, who = data.benchmark_cases()[number]
    everybody = data.benchmark_people()
    own = data.pick(everybody, who[k])

    def copies(n):
        return data.pick(own, [0] * n)

    def render(clips, person, pose=None):
        """person: identities, one a clip, in k's place; pose: what of the pose is not the clip's, [n, F]."""
        people = [person if j == k else None for j in range(len(who))]
        videos, masks = data.render_clips(clips, people, frames, size, {k: pose or {}})
        return data.to_bytes(square(videos, k)), square(masks[:, k], k)

    def others(field, names):
        """The clip with another name in a field, which has one name a person, or one for all."""
        before = getattr(clip, field)
        many = isinstance(before, tuple)
        clips = [replace(clip, **{field: (*before[:k], n, *before[k + 1:]) if many else n}) for n in names]
        return render(clips, copies(len(clips)))[0]

    def painted(grey):
        """The person with one attribute in black or in white, for each attribute."""
        n = len(ATTRIBUTES)
        person = copies(n)
        for i, name in enumerate(ATTRIBUTES):
            person[name] = torch.where(torch.arange(n)[:, None] == i, torch.tensor(grey), person[name])
        return render([clip] * n, person)[0]
    pictures = {name: v.unflatten(0, (-1, len(VIEWS)))[who[k]][:, None].expand(-1, frames) for name, v in
                data.reference_pose(data.BENCHMARK_IDENTITIES, data.BENCHMARK_SEED).items()
                if name in ("yaw", "pitch", "roll", "mouth")}
    asked = data.clip_pose([clip], k, frames)["yaw"]  # [1, F]
    everyone, masks = render([clip] * len(everybody["width"]), everybody)
    return {"people": everyone, "mask": masks[who[k]],
            "yaw": render([clip] * len(TURNS), copies(len(TURNS)), {"yaw": asked + TURNS[:, None]})[0],
            "references": render([clip] * len(VIEWS), copies(len(VIEWS)), pictures)[0],
            "motion": others("motions", data.MOTIONS), "mouth": others("mouths", data.MOUTHS),
            "wall": others("background", data.BACKGROUNDS), "black": painted(0.0), "white": painted(1.0)}


def distances(video, candidates):
    """Squared error of a video [3, F, S, S] to each uint8 candidate, by frame: [n, F]. Where all candidates
    are alike it adds the same to each, so the nearest is decided by the pixels where they differ."""
    return (data.from_bytes(candidates) - video).square().sum(dim=(1, 3, 4))


def psnr(a, b, mask):
    """Of a and b [3, ..., S, S] in -1..1 where mask [..., S, S] is 1, peak 2; in dB, None where it is empty,
    at most 60: ground truth is kept in bytes."""
    weight = mask.sum() * 3
    error = ((a - b).square() * mask).sum() / weight
    return min(60.0, float(10 * torch.log10(4 / error))) if weight > 0 else None


def named(video, candidates, names, right):
    """Is the nearest of the renderings the right one; None where the clip does not show the difference."""
    if bool((candidates == candidates[:1]).all()):
        return None
    return list(names)[int(distances(video, candidates).sum(1).argmin())] == right


def colour_error(video, truth, black, white):
    """Distance (0..1 RGB) of an attribute's mean colour where it is visible, None under two pixels of it."""
    weight = (white.float() - black.float()).mean(dim=0) / 255
    if weight.sum() < 2:
        return None
    mean = ((video - truth) / 2 * weight).sum(dim=(1, 2, 3)) / weight.sum()
    return float(mean.norm())


def measure(whole, number, views):
    """A sampled video `whole` [3, F, S, S or 2 S] of a case, which was given these views ->
    per person a dict of what METRICS reads."""
    if not whole.isfinite().all():  # it would be nearest to everything
        raise UserError(f"case {number}: the sampled video is not finite; the checkpoint has diverged")
    clip, who = data.benchmark_cases()[number]
    _, F, S, _ = whole.shape
    given = [VIEWS.index(view) for view in views]
    people = []
    for k, i in enumerate(who):
        r, video = renderings(number, k, F, S), square(whole, k)
        truth, mask = data.from_bytes(r["people"][i]), r["mask"]
        yaw = data.clip_pose([clip], k, F)["yaw"][0]
        to_view = data.view_distance(yaw[None])[0]  # [V, F]
        to_person = distances(video, r["people"])  # [52, F]
        error = to_person.sum(dim=1)
        copied = [None] * F
        if views:  # frames that should show none of the references' poses, and which do
            elsewhere = to_view[given].amin(dim=0) >= ELSEWHERE
            nearer = distances(video, r["references"])[given].amin(dim=0) < to_person[i]
            copied = [bool(yes) if counts else None for yes, counts in zip(nearer, elsewhere)]
        person = {
            "person": i, "rank": int((error < error[i]).sum()) + 1, "psnr": psnr(video, truth, mask),
            "yaw": wrap(yaw).tolist(), "turned": TURNS[distances(video, r["yaw"]).argmin(dim=0)].tolist(),
            "frame_psnr": [psnr(video[:, f], truth[:, f], mask[f]) for f in range(F)],
            "frame_right": (to_person.argmin(dim=0) == i).tolist(),
            "seen": [v in given for v in to_view.argmin(dim=0).tolist()], "copied": copied,
            "motion": named(video, r["motion"], data.MOTIONS, clip.motions[k]),
            "mouth": named(video, r["mouth"], data.MOUTHS, clip.mouths[k]),
            "wall": named(video, r["wall"], data.BACKGROUNDS, clip.background),
            "colour": {name: colour_error(video, truth, r["black"][a], r["white"][a])
                       for a, name in enumerate(ATTRIBUTES)}}
        if len(who) == 2:
            other = who[1 - k]
            person["swapped"] = bool(error[other] < error[i])
            person["margin"] = person["psnr"] - psnr(video, data.from_bytes(r["people"][other]), mask)
        people.append(person)
    return people


def jitter(p):
    """Second differences over time of the yaw found beyond those of the yaw asked for, in degrees: 0 for
    any motion as smooth as the right one, though it be another."""
    def bends(yaw):
        return [abs(wrap(c - b) - wrap(b - a)) for a, b, c in zip(yaw, yaw[1:], yaw[2:])]
    found = bends([yaw + turned for yaw, turned in zip(p["yaw"], p["turned"])])
    return [max(0.0, f - asked) for f, asked in zip(found, bends(p["yaw"]))]


def on_frames(value, where):
    return lambda p: [v for v, yes in zip(p[value], where(p)) if yes]


def side(p):
    return [abs(yaw) >= 45 for yaw in p["yaw"]]


def seen(p):
    return p["seen"]


def unseen(p):
    return [not s for s in p["seen"]]


METRICS = {  # name: (what it is, its values in one person's result, shown as per cent)
    "psnr": ("PSNR on the head against the truth, dB", lambda p: [p["psnr"]], False),
    "side": ("PSNR of frames that face 45 degrees or more away", on_frames("frame_psnr", side), False),
    "seen": ("PSNR of frames whose nearest view was given", on_frames("frame_psnr", seen), False),
    "unseen": ("PSNR of frames whose nearest view was not given", on_frames("frame_psnr", unseen), False),
    "top-1": ("right person nearest of 52 in the same clip, chance 1.9 %", lambda p: [p["rank"] == 1], True),
    "top-1 seen": ("right person nearest in a frame whose nearest view was given",
                   on_frames("frame_right", seen), True),
    "top-1 unseen": ("right person nearest in a frame whose nearest view was not given",
                     on_frames("frame_right", unseen), True),
    "swaps": ("nearer to the clip's other person than to the right one", lambda p: [p.get("swapped")], True),
    "margin": ("PSNR to the right person minus that to the other, dB", lambda p: [p.get("margin")], False),
    "colour": (f"distance to the right colour where it is visible, RGB 0..1, mean of {', '.join(ATTRIBUTES)}",
               lambda p: p["colour"].values(), False),
    **{name: (f"the same of {name} alone", lambda p, name=name: [p["colour"][name]], False)
       for name in ATTRIBUTES},
    "copied": (f"frames nearer to a reference's pose, of those asked {ELSEWHERE} degrees or more from all",
               lambda p: p["copied"], True),
    "yaw": ("error of the yaw found in each frame, degrees", lambda p: map(abs, p["turned"]), False),
    "jitter": ("roughness of the yaw found, beyond the right one's, degrees a frame a frame", jitter, False),
    "motion": ("right motion nearest of 6, chance 17 %", lambda p: [p["motion"]], True),
    "mouth": ("right mouth nearest of 3, chance 33 %", lambda p: [p["mouth"]], True),
    "wall": ("right background nearest of 6, chance 17 %", lambda p: [p["wall"]], True),
    "caption": ("motion, mouth and wall, those that are right", lambda p: [p[name] for name in SAID], True),
    "loss": ("of the velocity with every slot a proxy", lambda p: p.get("loss", ()), False),
}


HEADLINE = ("psnr", "side", "top-1", "swaps")  # printed with their intervals; the report has all
DETAILS = ("seen", "unseen", "top-1 seen", "top-1 unseen", "margin", "copied", "yaw", "jitter", *SAID)


def mean(values):
    """Of those that are not None; None of none."""
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def select(rows, people=(1, 2), settings=SETTINGS):
    return [r for r in rows if len(r["people"]) in people and r["setting"] in settings]


def by_case(rows, metric):
    """{case: the metric's mean over its rows, people and frames}, without cases that do not show it."""
    values = {}
    for row in rows:
        values.setdefault(row["case"], []).extend(v for p in row["people"] for v in METRICS[metric][1](p))
    means = {case: mean(values[case]) for case in sorted(values)}  # any order of rows, one interval
    return {case: v for case, v in means.items() if v is not None}


def interval(values, within=None, draws=2000):
    """Mean of a list and its 95 % bootstrap interval -> (mean, low, high), or None for an empty list.
    Rates, and differences of rates, that are alike in all n cases, where a bootstrap sees no spread, get 3/n
    (the rule of three), `within` the least and the most that they can be."""
    if not values:
        return None
    if within and len(set(values)) == 1:
        value, spread = values[0], 3 / len(values)
        return value, max(within[0], value - spread), min(within[1], value + spread)
    values = torch.tensor(values, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    means = values[torch.randint(len(values), (draws, len(values)), generator=g)].mean(dim=1)
    return float(values.mean()), *torch.quantile(means, torch.tensor([0.025, 0.975]).double()).tolist()


def estimate(rows, metric, *which):
    """A metric of the rows that `select` finds, over cases."""
    values = list(by_case(select(rows, *which), metric).values())
    return interval(values, (0, 1) if METRICS[metric][2] else None)


def shown(found, per_cent=False, signed=False):
    """(mean, low, high) as text."""
    if found is None:
        return "-"
    a, low, high = (100 * v if per_cent else v for v in found)
    digits = 0 if per_cent else 4 if 0 < max(-low, high) < 0.05 else 2
    a, low, high = (round(v, digits) + 0.0 for v in (a, low, high))  # no -0
    return f"{a:{'+' if signed else ''}.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(rows, metrics, show=shown):
    """A header, and for each number of people and views given a line of cells."""
    groups = [((n,), [setting]) for n in (1, 2) for setting in SETTINGS if select(rows, (n,), [setting])]
    return [["people, views given", *(name + " %" * METRICS[name][2] for name in metrics)],
            *([f"{n}, {setting}", *(show(estimate(rows, name, (n,), [setting]), METRICS[name][2])
                                    for name in metrics)] for (n,), (setting,) in groups)]


def align(lines):
    """Rows of cells as text in columns."""
    wide = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                               for i, (cell, w) in enumerate(zip(line, wide))) for line in lines)


# --------------------------------------------------------------------------------------------------- sampling
def finished(path, run):
    """Rows of cases.jsonl that an earlier call wrote for the same run; a half-written line is no row."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and row.get("run") == run]


def strip(video):
    """[3, F, S, S] as one PNG, frame beside frame, in base64."""
    pixels = data.to_bytes(video).permute(2, 1, 3, 0).flatten(1, 2).numpy()
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "png")
    return base64.b64encode(png.getvalue()).decode()


@torch.no_grad()
def prior_loss(model, encoders, clips, videos, seeds):
    """Mean squared error of the velocity at SIGMAS with every slot a proxy: per clip one list."""
    x0 = encoders.encode(videos).to(model.device)
    text = encoders.text([data.caption(clip) for clip in clips]).to(model.device)
    noise = noise_of(x0.shape[1:], seeds).to(model.device)
    nobody = [{} for _ in clips[0].motions]
    losses = []
    for sigma in SIGMAS:
        t = torch.full((len(x0),), 1000 * sigma, device=model.device)
        v = model((1 - sigma) * x0 + sigma * noise, t, text, nobody, [None for _ in nobody])
        losses.append((v - (noise - x0)).square().mean(dim=(1, 2, 3, 4)))
    return torch.stack(losses, dim=1).tolist()


def evaluate(ckpt, cases, settings, recipe, path, batch=20):
    """Sample and measure the cases of a checkpoint under each setting; every row is appended to `path` as it
    is finished, and rows that are there already are not made again -> all rows of this run, and the frames
    and pixels a side of its videos."""
    model, encoders, meta = load(ckpt)
    if meta["kind"] != "toy":
        raise UserError(f"{ckpt} is no checkpoint of the toy world, which this benchmark is made of")
    frames, size = meta["world"]["frames"], meta["world"]["size"]
    run = json.dumps([meta["sha256"], meta["config"], meta["world"], recipe, data.code_of(*CODE)],
                     sort_keys=True)
    run = hashlib.sha256(run.encode()).hexdigest()[:12]
    rows = finished(path, run)
    done = {(row["case"], row["setting"]) for row in rows}
    bench, pictures = data.benchmark_cases(), data.benchmark_references(size)
    todo = [[n for n in cases if len(bench[n][1]) == people and (n, setting) not in done]
            for people in (1, 2) for setting in (*settings, "prior")]
    bar = tqdm(total=sum(map(len, todo)), desc="evaluating", unit=" videos", disable=None)
    with open(path, "a+") as file:
        file.seek(max(0, file.tell() - 1))
        if file.read() not in ("", "\n"):  # a line that was cut off
            file.write("\n")
        for setting, numbers in zip((*settings, "prior") * 2, todo):
            for at in range(0, len(numbers), batch):
                part = numbers[at:at + batch]
                clips, who = zip(*(bench[n] for n in part))
                if setting == "prior":
                    truths = torch.stack([data.benchmark_truth(n, frames, size) for n in part])
                    made = [{"people": [{"loss": loss}] * len(who[0])}
                            for loss in prior_loss(model, encoders, clips, truths, part)]
                else:
                    refs = [{v: pictures[[w[k] for w in who], VIEWS.index(v)] for v in SETTINGS[setting]}
                            for k in range(len(who[0]))]
                    videos = generate(model, encoders, [data.caption(c) for c in clips], refs, frames,
                                      data.frame_size(size, len(refs)), part, recipe)
                    made = ({"people": measure(video, n, SETTINGS[setting]), "strip": strip(video)}
                            for n, video in zip(part, videos))
                for n, result in zip(part, made):
                    rows.append({"run": run, "case": n, "setting": setting, **result})
                    file.write(json.dumps(rows[-1]) + "\n")
                    file.flush()
                    bar.update()
    bar.close()
    rows = [row for row in rows if row["case"] in cases and row["setting"] in (*settings, "prior")]
    return rows, (frames, size)


# ----------------------------------------------------------------------------------------------------- report
COLOURS = {"none": "#999999", "front": "#d95f02", "front+left": "#7570b3", "all": "#1b9e77",
           "this checkpoint": "#1b9e77", "its stage 1": "#999999"}


def plot(title, ticks, series, per_cent=False):
    """Means with 95 % intervals as an inline SVG. series: {name: one estimate, or None, a tick}."""
    series = {name: [e and [v * (100 if per_cent else 1) for v in e] for e in line]
              for name, line in series.items() if any(line)}
    known = [v for line in series.values() for e in line if e for v in e]
    if not known:
        return ""
    low, high = min(known), max(known)
    step = 10 ** math.floor(math.log10((high - low or 1) / 2))  # between ticks: 1, 2 or 5 of a power of ten
    step *= next(m for m in (1, 2, 5, 10) if (high - low or 1) / (m * step) <= 5)
    low = math.floor(low / step) * step
    high = max(low + step, math.ceil(high / step - 1e-9) * step)
    W, H, left, top, bottom = 430, 250, 46, 26, 40

    def y(v):
        return top + (high - v) / (high - low) * (H - top - bottom)

    def x(i, shift=0.0):
        return left + (i + 0.5 + shift) * (W - left - 10) / len(ticks)
    parts = [f'<text x="{left}" y="14" font-weight="bold">{html.escape(title)}</text>']
    for i in range(round((high - low) / step) + 1):
        v = low + i * step
        parts.append(f'<line x1="{left}" x2="{W - 10}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#eee"/>'
                     f'<text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.3g}</text>')
    parts += [f'<text x="{x(i):.1f}" y="{H - bottom + 16}" text-anchor="middle">{html.escape(tick)}</text>'
              for i, tick in enumerate(ticks)]
    for s, (name, line) in enumerate(series.items()):
        shift, colour = (s - (len(series) - 1) / 2) * 0.09, COLOURS.get(name, "#444")
        points = [(x(i, shift), *map(y, e)) for i, e in enumerate(line) if e]
        parts.append('<polyline fill="none" stroke="{}" points="{}"/>'.format(
            colour, " ".join(f"{a:.1f},{b:.1f}" for a, b, _, _ in points)))
        parts += [f'<line x1="{a:.1f}" x2="{a:.1f}" y1="{c:.1f}" y2="{d:.1f}" stroke="{colour}"/>'
                  f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}"/>' for a, b, c, d in points]
        parts.append(f'<text x="{left + s * 95}" y="{H - 6}" fill="{colour}">&#9679; {name}</text>')
    return f'<svg width="{W}" height="{H}" viewBox="0 0 {W} {H}">{"".join(parts)}</svg>'


def by_yaw(rows, value):
    """A per-frame value of one setting's rows in each of YAW_BINS: estimates over cases."""
    def of(row, low, high):
        return mean([v for p in row["people"] for v, yaw in zip(p[value], p["yaw"])
                     if low <= abs(yaw) < high])
    within = (0, 1) if value == "frame_right" else None
    return [interval([v for row in rows if (v := of(row, *ends)) is not None], within) for ends in YAW_BINS]


def prior(rows):
    """The loss at each of SIGMAS over cases, with every slot a proxy."""
    losses = [row["people"][0]["loss"] for row in rows if row["setting"] == "prior"]
    return [interval([float(loss[i]) for loss in losses]) for i in range(len(SIGMAS))]


def followed(rows):
    """How often each of SAID is right with every slot a proxy."""
    return [estimate(rows, name, (1, 2), ["none"]) for name in SAID]


def picture(png, caption):
    return (f'<figure><img src="data:image/png;base64,{png}"><figcaption>{html.escape(caption)}</figcaption>'
            '</figure>')


def case_html(number, rows, frames, size):
    """One case: what was given, what was asked, and for each setting what came."""
    clip, who = data.benchmark_cases()[number]
    references = data.benchmark_references(size)
    parts = [f"<h3>Case {number}: {html.escape(data.caption(clip))}</h3><div>"]
    parts += [picture(strip(references[i].transpose(0, 1)), f"references of person {i}: {', '.join(VIEWS)}")
              for i in who]
    parts.append(picture(strip(data.benchmark_truth(number, frames, size)), "ground truth"))
    for row in sorted(rows, key=lambda r: list(SETTINGS).index(r["setting"])):
        said = "; ".join(f"{p['psnr']:.1f} dB, rank {p['rank']}{', swapped' * bool(p.get('swapped'))}"
                         for p in row["people"])
        parts.append(picture(row["strip"], f"given {row['setting']}: {said}"))
    return "".join(parts) + "</div>"


def report(path, title, rows, base, frames, size):
    """Write report.html: table, plots, every case with the worst first. base: rows of the run's stage 1."""
    shown_settings = [s for s in SETTINGS if select(rows, settings=[s])]
    bins = [f"{low}-{min(high, 180)}°" for low, high in YAW_BINS]
    plots = []
    for people, words in ((1, "one person"), (2, "two people")):
        of = {s: select(rows, (people,), [s]) for s in shown_settings}
        plots += [plot(f"PSNR by yaw, {words}, dB", bins,
                       {s: by_yaw(r, "frame_psnr") for s, r in of.items()}),
                  plot(f"right person nearest by yaw, {words}, % of frames", bins,
                       {s: by_yaw(r, "frame_right") for s, r in of.items()}, True)]
    swaps = [estimate(rows, "swaps", (2,), [s]) for s in shown_settings]
    plots += [plot("swaps by views given, two people, %", shown_settings, {"this checkpoint": swaps}, True),
              plot("loss by noise level, every slot a proxy", [str(s) for s in SIGMAS],
                   {"this checkpoint": prior(rows), "its stage 1": prior(base)}),
              plot("caption followed, every slot a proxy, %", SAID,
                   {"this checkpoint": followed(rows), "its stage 1": followed(base)}, True)]
    header, *lines = zip(*table(rows, [name for name in METRICS if name != "loss"]))
    cells = "".join("<tr><td title='{}'>{}</td>{}</tr>".format(
        html.escape(METRICS[name.removesuffix(" %")][0]), name, "".join(f"<td>{c}</td>" for c in line))
        for name, *line in lines)
    legend = "".join(f"<li><b>{name}</b>: {html.escape(words)}</li>"
                     for name, (words, _, _) in METRICS.items())
    cases = {}
    for row in select(rows):
        cases.setdefault(row["case"], []).append(row)
    most = shown_settings[-1]  # views given
    worst = sorted(cases, key=lambda n: mean([p["psnr"] for row in select(cases[n], settings=[most])
                                              for p in row["people"]]))
    path.write_text(f"""<!doctype html><meta charset="utf-8"><title>HarmoView: toy benchmark</title><style>
body {{ font: 14px sans-serif; margin: 2em; max-width: 1320px }} svg {{ font: 11px sans-serif; margin: 6px }}
table {{ border-collapse: collapse; font-size: 12px }} td, th {{ padding: 3px 9px; text-align: right }}
tr:nth-child(even) {{ background: #f5f5f5 }} td:first-child {{ text-align: left }} li {{ margin: 2px }}
img {{ height: 72px; image-rendering: pixelated; display: block }}
h3 {{ font-size: 13px; margin: 22px 0 4px }}
figure {{ display: inline-block; margin: 0 14px 8px 0; vertical-align: top }}
figcaption {{ font-size: 11px; color: #555 }}</style>
<h1>HarmoView on the toy benchmark</h1><p>{html.escape(title)}. Means over cases with 95 % bootstrap
intervals. </p>
<table><tr>{''.join(f'<th>{h}</th>' for h in header)}</tr>{cells}</table><ul>{legend}</ul>
<div>{''.join(plots)}</div><h2>All cases, the worst first</h2>
{''.join(case_html(n, cases[n], frames, size) for n in worst)}""", encoding="utf-8")


# -------------------------------------------------------------------------------------------------- ablations
ABLATIONS = {  # row: flags of train.py
    "full": "",
    "no-mfi": "--no-mfi",
    "no-proxies": "--proxy-tokens 0",
    "append": "--rope-layout append",
    "append-no-proxies": "--rope-layout append --proxy-tokens 0",
    "direct": "--no-curriculum",
    "front-only": "--front-only",
    "phantom": "--rope-layout append --proxy-tokens 0 --no-mfi",
    # Mv2ID, on references that are frames of the clip itself
    "mv2id-base": "--pairs in --rope-layout append --proxy-tokens 0 --no-mfi",
    "mv2id-rd": "--pairs in --rope-layout rd --proxy-tokens 0 --no-mfi",
    "mv2id-mask": "--pairs in --rope-layout append --proxy-tokens 0 --no-mfi --mask 0.6",
    "mv2id-both": "--pairs in --rope-layout rd --proxy-tokens 0 --no-mfi --mask 0.6",
}
GIVEN = ("front", "front+left", "all")
IN_PAIR = GIVEN[:2]  # in-pair training has no backs
CLAIMS = [  # what the abstracts say; (row, settings) that should be better than (row, settings); metric, sign
    ("MFI raises identity", ("full", GIVEN), ("no-mfi", GIVEN), "psnr", 1),
    ("MFI raises identity, append without proxies",
     ("append-no-proxies", GIVEN), ("phantom", GIVEN), "psnr", 1),
    ("proxies unify one to four views", ("full", GIVEN), ("no-proxies", GIVEN), "psnr", 1),
    ("proxies unify one to four views, append", ("append", GIVEN), ("append-no-proxies", GIVEN), "psnr", 1),
    ("proxies help where the generated view has no reference",
     ("full", GIVEN[:2]), ("no-proxies", GIVEN[:2]), "unseen", 1),
    ("Jump-RoPE lowers crosstalk", ("full", GIVEN), ("append", GIVEN), "swaps", -1),
    ("Jump-RoPE lowers crosstalk", ("full", GIVEN), ("append", GIVEN), "margin", 1),  # swaps are rare
    # proxies keep append's identities apart too, by four; without them a dropped view moves the second person
    ("Jump-RoPE lowers crosstalk, without proxies",
     ("no-proxies", GIVEN), ("append-no-proxies", GIVEN), "margin", 1),
    ("the curriculum beats direct training", ("full", GIVEN), ("direct", GIVEN), "psnr", 1),
    ("the curriculum keeps the text-to-video prior", ("full", ["prior"]), ("direct", ["prior"]), "loss", -1),
    ("the curriculum keeps the text-to-video prior", ("full", ["none"]), ("direct", ["none"]), "caption", 1),
    ("several views beat one at large yaw", ("full", ["all"]), ("front-only", ["front"]), "side", 1),
    ("region masking lowers copy-paste", ("mv2id-both", IN_PAIR), ("mv2id-rd", IN_PAIR), "copied", -1),
    ("region masking costs a little similarity", ("mv2id-rd", IN_PAIR), ("mv2id-both", IN_PAIR), "psnr", 1),
    ("RD-RoPE makes motion more natural", ("mv2id-rd", IN_PAIR), ("mv2id-base", IN_PAIR), "jitter", -1),
]


# the 97.5th percentile of Student's t by degrees of freedom; beyond the last it falls to 1.96
T975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20)


def complete(runs, settings):
    """The rows at these settings of those runs, one a seed, that have all of them."""
    found = [select(rows, settings=settings) for rows in runs]
    return [rows for rows in found if {r["setting"] for r in rows} == set(settings)]


def seed_variance(results, metric, settings):
    """Variance between seeds of a metric's mean over cases, pooled over all rows -> it (0 where no row has
    two seeds) and its degrees of freedom."""
    squares = freedom = 0
    for runs in results.values():
        means = [m for rows in complete(runs, settings)
                 if (m := mean(by_case(rows, metric).values())) is not None]
        if means:
            centre = mean(means)
            squares += sum((m - centre) ** 2 for m in means)
            freedom += len(means) - 1
    return squares / max(1, freedom), freedom


def verdict(results, better, other, metric, sign):
    """"holds" or "does not hold" where the difference of a claim's two sides leaves zero out twice: in its
    interval over cases, seeds averaged, and in its interval over seeds; else "not decided", as always
    without a second seed. With both intervals, as (mean, low, high).

    results        {row: one list of rows of cases.jsonl a seed}
    better, other  (row, settings)
    """
    sides, error, freedom = [], 0.0, math.inf
    for row, settings in (better, other):
        runs = complete(results.get(row, ()), settings)
        if not runs:
            return "not run", None, None
        sides.append(by_case(sum(runs, []), metric))
        variance, degrees = seed_variance(results, metric, settings)
        error, freedom = error + variance / len(runs), min(freedom, degrees)
    a, b = sides
    cases = interval([sign * (a[case] - b[case]) for case in sorted(a.keys() & b.keys())],
                     (-1, 1) if METRICS[metric][2] else None)
    if cases is None or not freedom:
        return "not decided", cases, None
    half = T975[min(freedom, len(T975)) - 1] * math.sqrt(error)
    seeds = cases[0], cases[0] - half, cases[0] + half
    if any(low <= 0 <= high for _, low, high in (cases, seeds)):
        return "not decided", cases, seeds
    return "holds" if cases[0] > 0 else "does not hold", cases, seeds


def ablate(names, args, recipe, cases):
    """Train and measure rows of ABLATIONS, each from where an earlier call left it; print table and verdicts
    of all rows that were ever measured for the same --config and --train."""
    # a folder for each way to train, or --resume would go on from another one's checkpoints
    root = Path(args.out) / "ablate" / re.sub(r"[^\w.]+", "-", " ".join([args.config, *args.train]))

    @functools.cache
    def measured(out):
        return evaluate(out, cases, args.settings, recipe, out / "cases.jsonl", args.batch)[0]
    for seed in range(args.seeds):
        for name in names:
            out = root / f"{name}-{seed}"
            command = [sys.executable, str(Path(__file__).with_name("train.py")), "--config", args.config,
                       "--no-samples", "--out", str(out), "--resume", "--seed", str(seed),
                       *shlex.split(ABLATIONS[name]), *args.train]
            print(" ".join(command[1:]), flush=True)
            start = time.perf_counter()
            if subprocess.run(command).returncode:
                raise UserError(f"row {name}: training failed; mend it and repeat, finished rows are kept")
            measured(out)
            print(f"row {name}, seed {seed}: {(time.perf_counter() - start) / 60:.1f} min", flush=True)
    results = {}
    for name in ABLATIONS:
        if files := sorted(root.glob(f"{name}-[0-9]*/cases.jsonl")):
            results[name] = [measured(file.parent) for file in files]
    columns = [(people, s, metric) for people in (1, 2) for s in args.settings if s in ("front", "all")
               for metric in ("psnr", "top-1", "swaps")[:1 + people]]
    lines = [["row", "seeds", *(f"{people} {s} {metric}" for people, s, metric in columns)]]
    for name, runs in results.items():
        lines.append([name, str(len(runs)), *(
            shown(estimate(sum(runs, []), metric, (people,), [s]), METRICS[metric][2])
            for people, s, metric in columns)])
    print(align(lines))
    lines = [["claim", "verdict", "metric", "in its favour, over cases", "over seeds"]]
    for words, *sides in CLAIMS:
        said, *intervals = verdict(results, *sides)
        lines.append([words, said, sides[2], *(shown(i, METRICS[sides[2]][2], True) for i in intervals)])
    print(align(lines))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", help="checkpoint folder, or a run's folder: its newest one (as sample.py)")
    p.add_argument("--out", default="out/eval", help="folder for cases.jsonl and report.html")
    p.add_argument("--limit", type=int, default=100,
                   help="only this many cases, spread over the 100, for a quick look")
    p.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="views given")
    p.add_argument("--batch", type=int, default=20, help="cases sampled together")
    p.add_argument("--steps", type=int, default=RECIPES["toy"]["steps"], help="solver steps")
    p.add_argument("--shift", type=float, default=RECIPES["toy"]["shift"], help="timestep shift")
    p.add_argument("--guide-text", type=float, default=1.0, help="guidance towards the caption; 1 is none")
    p.add_argument("--guide-refs", type=float, default=RECIPES["toy"]["guide_refs"],
                   help="guidance towards the references; 1 is none")
    p.add_argument("--ablate", nargs="*", metavar="ROW", help=f"rows to train and measure, of "
                   f"{', '.join(ABLATIONS)}; none named: all")
    p.add_argument("--seeds", type=int, default=2, help="seeds of each row; one alone decides no claim")
    p.add_argument("--config", default="toy", choices=("tiny", "toy", "toy64"), help="what --ablate trains")
    p.add_argument("--train", default=[], type=shlex.split, metavar="FLAGS",
                   help="further flags of train.py for every row")
    args = p.parse_args(argv)
    if not 1 <= args.limit <= 100:
        raise UserError(f"--limit {args.limit}: expected 1 to 100 cases")
    for name in ("batch", "steps", "seeds", "shift"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name} {getattr(args, name)}: expected more than 0")
    out = Path(args.out)
    data.probe_writable(out)
    cases = sorted({i * 100 // args.limit for i in range(args.limit)})
    recipe = RECIPES["toy"] | dict(steps=args.steps, shift=args.shift, guide_text=(args.guide_text,),
                                   guide_refs=args.guide_refs)
    print(f"{len(cases)} cases, given {', '.join(args.settings)}; "
          + ", ".join(f"{name} {value}" for name, value in recipe.items() if value))
    if args.ablate is not None:
        if unknown := set(args.ablate) - set(ABLATIONS):
            raise UserError(f"--ablate {' '.join(sorted(unknown))}: expected {', '.join(ABLATIONS)}")
        given = {flag.split("=")[0] for flag in args.train}
        if own := given & {"--seed", "--out", "--config", "--stage"}:
            raise UserError(f"--train {' '.join(args.train)}: {', '.join(sorted(own))} is set by eval.py "
                            "itself; it has --seeds, --out and --config")
        return ablate(args.ablate or list(ABLATIONS), args, recipe, cases)
    start, ckpt = time.perf_counter(), args.ckpt or default_checkpoint()
    rows, world = evaluate(ckpt, cases, args.settings, recipe, out / "cases.jsonl", args.batch)
    base, first = [], find_checkpoint(Path(ckpt) / "stage1")
    if first:
        base, _ = evaluate(first, cases, [s for s in args.settings if s == "none"], recipe,
                           out / "cases.jsonl", args.batch)
    print(align(table(rows, HEADLINE)))
    for names in (DETAILS, ("colour", *ATTRIBUTES)):
        print(align(table(rows, names, lambda found, per_cent: shown(found, per_cent).split(" [")[0])))
    lines = [["every slot a proxy", *(f"loss at {s}" for s in SIGMAS), *(f"{name} %" for name in SAID)]]
    for name, r in (("this checkpoint", rows), ("its stage 1", base)):
        if r:
            lines.append([name, *map(shown, prior(r)), *(shown(found, True) for found in followed(r))])
    print(align(lines))
    report(out / "report.html", f"{ckpt}: {recipe['steps']} steps, reference guidance {recipe['guide_refs']}",
           rows, base, *world)
    print(f"{out / 'cases.jsonl'} and {out / 'report.html'} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    run_script(main)
