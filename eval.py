"""Measure identity against exact ground truth: 100 fixed cases over 52 people that training never saw.

  python eval.py --ckpt out/toy            the table, and one JSON line a case and reference setting in OUT

A case is a clip of one or two people whose motion sweeps the yaw. The clip is sampled from its caption and
references, then compared with the same clip rendered from its known parameters, and with 51 others rendered
in the same person's place:
  PSNR      on the person's head, against the truth;
            "side" over frames with the yaw 45 degrees or more from the front
  top-1     is the right identity the nearest of the 52 (chance 1.9 %)
  swaps     two people: is the generated person nearer to the other one, rendered in the same place
"""
import argparse
import json
import os
import sys
import time
from pathlib import Path

# before torch starts its threads: beside another busy process, spinning ones made a toy step ten times longer
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch
from tqdm import tqdm

import data
from rope import VIEWS, UserError
from sample import RECIPES, generate, load

SETTINGS = {"none": (), "front": ("front",), "all": VIEWS}  # which views the references hold


def truth_of(clip, who, k, identities, frames, size):
    """Person k of a case replaced by each of the 52 -> videos [52, 3, F, S, S], head masks [52, F, S, S]."""
    n = data.BENCHMARK_IDENTITIES
    people = [data.pick(identities, torch.arange(n) if j == k else torch.full((n,), i))
              for j, i in enumerate(who)]
    videos, masks = data.render_clips([clip] * n, people, frames, size)
    return videos, masks[:, k]


def psnr(a, b, mask):
    """Of a and b [3, ..., S, S] in -1..1 where mask [..., S, S] is 1, peak 2; in dB,
    None where the mask is empty."""
    weight = mask.sum() * 3
    error = ((a - b).square() * mask).sum() / weight
    return float(10 * torch.log10(4 / error)) if weight > 0 else None


def measure(videos, clip, who, identities):
    """Generated videos [3, F, S, S] of one case -> for each, one dict of metrics per person."""
    _, F, S, _ = videos[0].shape
    results = [[] for _ in videos]
    for k, i in enumerate(who):
        truths, masks = truth_of(clip, who, k, identities, F, S)
        anybody = masks.amax(dim=0)
        yaw = data.clip_pose([clip], k, F)["yaw"][0]
        side = ((yaw + 180) % 360 - 180).abs() >= 45
        for video, result in zip(videos, results):
            distance = ((truths - video) * anybody).square().sum(dim=(1, 2, 3, 4))  # to each of the 52
            result.append({"person": i, "psnr": psnr(video, truths[i], masks[i]),
                           "psnr_side": psnr(video[:, side], truths[i][:, side], masks[i][side]),
                           "rank": int((distance < distance[i]).sum()) + 1,
                           "swapped": bool(distance[who[1 - k]] < distance[i]) if len(who) == 2 else None})
    return results


def table(rows):
    """Metrics averaged per number of people and setting, as lines to print."""
    def mean(values):
        values = [v for v in values if v is not None]
        return sum(values) / len(values) if values else float("nan")
    lines = [f"{'people':8}{'references':12}{'cases':>6}{'PSNR':>9}{'side':>9}{'top-1':>9}{'swaps':>9}"]
    for people in (1, 2):
        for setting in SETTINGS:
            found = [r for r in rows if len(r["people"]) == people and r["setting"] == setting]
            if found:
                persons = [p for r in found for p in r["people"]]
                swaps = f"{mean(p['swapped'] for p in persons):9.1%}" if people == 2 else f"{'-':>9}"
                lines.append(f"{people:<8}{setting:12}{len(found):6}{mean(p['psnr'] for p in persons):8.2f} "
                             f"{mean(p['psnr_side'] for p in persons):8.2f} "
                             f"{mean(p['rank'] == 1 for p in persons):9.1%}{swaps}")
    return lines


def evaluate(model, encoders, meta, cases, settings, args, write=lambda row: None):
    """Sample and measure the cases under each setting -> rows, each given to `write` as it finishes."""
    frames, size = meta["world"]["frames"], meta["world"]["size"]
    identities = data.draw_identities(data.BENCHMARK_IDENTITIES, data.BENCHMARK_SEED)
    pictures = data.benchmark_references(size)
    recipe = RECIPES["toy"] | dict(steps=args.steps, shift=args.shift, guide_text=(args.guide_text,),
                                   guide_refs=args.guide_refs)
    todo = [(number, case) for number, case in enumerate(data.benchmark_cases()) if number in cases]
    rows = []
    bar = tqdm(total=len(todo), desc="evaluating", unit=" cases", disable=None)
    for people in (1, 2):
        group = [(number, clip, who) for number, (clip, who) in todo if len(who) == people]
        for first in range(0, len(group), args.batch):
            numbers, clips, whos = zip(*group[first:first + args.batch])
            captions = [data.caption(clip) for clip in clips]
            made = []  # per setting a batch of videos
            for setting in settings:
                refs = [{v: pictures[[who[k] for who in whos], VIEWS.index(v)] for v in SETTINGS[setting]}
                        for k in range(people)]
                made.append(generate(model, encoders, captions, refs, frames, (size, size), numbers, recipe))
            for number, clip, who, *videos in zip(numbers, clips, whos, *made):
                for setting, result in zip(settings, measure(videos, clip, who, identities)):
                    rows.append({"case": number, "setting": setting, "caption": data.caption(clip),
                                 "people": result})
                    write(rows[-1])
                bar.update()
    bar.close()
    return rows


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="out/toy",
                   help="checkpoint folder, or a run's folder: its newest one (default out/toy)")
    p.add_argument("--out", default="out/eval.jsonl", help="file for the JSON lines")
    p.add_argument("--limit", type=int, default=100,
                   help="only this many cases, spread over the 100, for a quick look")
    p.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="views given")
    p.add_argument("--batch", type=int, default=20, help="cases sampled together")
    p.add_argument("--steps", type=int, default=RECIPES["toy"]["steps"], help="solver steps")
    p.add_argument("--shift", type=float, default=RECIPES["toy"]["shift"], help="timestep shift")
    p.add_argument("--guide-text", type=float, default=1.0)
    p.add_argument("--guide-refs", type=float, default=RECIPES["toy"]["guide_refs"])
    args = p.parse_args(argv)
    if not 1 <= args.limit <= 100:
        raise UserError(f"--limit {args.limit}: expected 1 to 100 cases")
    out = Path(args.out)
    data.probe_writable(out.parent)
    model, encoders, meta = load(args.ckpt)
    if meta["kind"] != "toy":
        raise UserError(f"{args.ckpt} is no checkpoint of the toy world, which this benchmark is made of")
    cases = {i * 100 // args.limit for i in range(args.limit)}
    start = time.perf_counter()
    with open(out, "w") as f:
        rows = evaluate(model, encoders, meta, cases, args.settings, args,
                        lambda row: print(json.dumps(row), file=f, flush=True))
    print("\n".join(table(rows)))
    print(f"{out} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"eval.py: {error}")
