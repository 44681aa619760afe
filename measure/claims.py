"""Train rows of ABLATIONS from a base model, measure them, and judge the papers' CLAIMS by them.

  python eval.py claims full no-mfi --base assets/base           these rows; without any, all
  python eval.py claims --seeds 0 --base assets/base --out assets/claims    the tables that come with the code

A claim compares two rows that differ in one part, case by case and seed by seed: where their stages are the
same, they draw the same samples and noise. It is judged by two 95 % intervals of the difference: over cases
(bootstrap) and over seeds (Student's t). It has no effect if both lie within +-0.15 dB, or 3 points; else it
holds, or does not, if both lie on one side of zero. The result of a row and seed is a file of OUT; to make it
again, delete it. On a CPU a row trains in two processes.
"""
import contextlib
import itertools
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from measure.report import Estimate, as_text, by_case, interval, mean
from support.checkpoints import parent_of
from support.script import ROOT, Parser, UserError, atomic_file, in_range, lock, nonempty, probe_writable
from videos import toy

IN_PAIR = "--pairs in --proxy-tokens 0 --no-mfi"
ABLATIONS = {  # row: flags of train.py
    "full": "", "no-mfi": "--no-mfi", "no-proxies": "--proxy-tokens 0",
    "append": "--rope-layout append", "append-no-proxies": "--rope-layout append --proxy-tokens 0",
    "before": "--rope-layout before", "one-way": "--reference-attention one-way",
    "direct": "--no-curriculum", "front-only": "--front-only",
    "phantom": "--rope-layout append --proxy-tokens 0 --no-mfi",
    "mv2id-base": f"{IN_PAIR} --rope-layout append", "mv2id-rd": f"{IN_PAIR} --rope-layout rd",
    "mv2id-mask": f"{IN_PAIR} --rope-layout append --mask 0.6",
    "mv2id-both": f"{IN_PAIR} --rope-layout rd --mask 0.6",
}
BASE = "base"  # the row that is not trained: the base model itself, which was never shown a reference
GIVEN, SOME_VIEWS = ("front", "front+left", "all"), ("front", "front+left")
NO_VIEWS = ("none", "described")  # no references: what the base can do
COLUMNS = ((1, "front"), (1, "all"), (2, "front"), (2, "all"))  # of the table: people, views given


class Claim(NamedTuple):
    """What the abstracts say: the row `better` should have more of a metric than the row `other`."""
    words: str
    better: str
    other: str
    metric: str
    sign: int = 1  # -1: should have less
    settings: tuple = GIVEN  # views given; none for the prior's loss
    other_settings: tuple | None = None  # of the other row, where they differ
    allowed: float = 0.0  # a claim that something is kept holds if less than this is lost


CLAIMS = [
    Claim("MFI raises identity", "full", "no-mfi", "psnr"),
    Claim("MFI raises identity, the front alone given", "full", "no-mfi", "psnr", 1, ("front",)),
    Claim("MFI raises identity, append without proxies", "append-no-proxies", "phantom", "psnr"),
    Claim("proxies unify one to four views", "full", "no-proxies", "psnr"),
    Claim("proxies unify one to four views, append", "append", "append-no-proxies", "psnr"),
    Claim("proxies help where the generated view has no reference", "full", "no-proxies", "unseen", 1,
          SOME_VIEWS),
    Claim("Jump-RoPE lowers crosstalk", "full", "append", "swaps", -1),
    Claim("Jump-RoPE lowers crosstalk", "full", "append", "margin"),  # swaps are rare
    Claim("Jump-RoPE lowers crosstalk, without proxies", "no-proxies", "append-no-proxies", "margin"),
    Claim("Jump-RoPE is better than one time before the video", "full", "before", "psnr"),
    Claim("the curriculum beats direct training", "full", "direct", "psnr"),
    Claim("the curriculum keeps the prior better", "full", "direct", "loss", -1, ()),
    Claim("the curriculum keeps the prior better", "full", "direct", "caption", 1, NO_VIEWS),
    Claim("the curriculum keeps the prior better: looks", "full", "direct", "colour", -1, NO_VIEWS[1:]),
    Claim("the base's prior is kept: captions", "full", BASE, "caption", 1, NO_VIEWS, None, 0.03),
    Claim("the base's prior is kept: looks", "full", BASE, "colour", -1, NO_VIEWS[1:], None, 0.01),
    Claim("several views beat one at large yaw", "full", "front-only", "side", 1, ("all",), ("front",)),
    Claim("one-way references cost nothing", "one-way", "full", "psnr", 1, GIVEN, None, 0.15),
    Claim("region masking lowers copy-paste", "mv2id-both", "mv2id-rd", "copied", -1, SOME_VIEWS),
    Claim("region masking lowers copy-paste, append", "mv2id-mask", "mv2id-base", "copied", -1,
          SOME_VIEWS),
    Claim("region masking costs a little similarity", "mv2id-rd", "mv2id-both", "psnr", 1, SOME_VIEWS),
    Claim("region masking costs a little similarity, append", "mv2id-base", "mv2id-mask", "psnr", 1,
          SOME_VIEWS),
    Claim("RD-RoPE makes motion more natural", "mv2id-rd", "mv2id-base", "jitter", -1, SOME_VIEWS),
]
# what a result holds: the metrics that the tables show and that are judged
STORED = dict.fromkeys(["psnr", "top-1", "swaps", *(c.metric for c in CLAIMS if c.metric != "loss")])
NO_EFFECT, NO_EFFECT_RATE = 0.15, 0.03  # dB, and of a rate: what is smaller does not matter
DECIBELS = ("psnr", "side", "unseen", "margin")
RATES = ("top-1", "swaps", "copied", "caption")  # shares of cases; a loss is none of both
T975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20)  # of Student's t, by freedom


# --------------------------------------------------------------------------------------------------- verdicts
# A result, of one row and seed: {metric: {setting: {case: value}}}; the loss has one setting, "".
def pool(result, metric, settings):
    """{case: the metric's mean over these settings}; None where one of them was not measured."""
    by_setting = [result.get(metric, {}).get(setting) for setting in settings or ("",)]
    if not all(by_setting):
        return None
    cases = sorted(set().union(*by_setting))
    return {case: mean([part.get(case) for part in by_setting]) for case in cases}


def differences(results, claim):
    """{seed: {case: difference in the claim's favour}} of the seeds that both rows have; the base has one.
    results: {row: {seed: result}}"""
    by_seed, others = {}, results.get(claim.other, {})
    for seed, result in results.get(claim.better, {}).items():
        other = others.get(0 if claim.other == BASE else seed, {})
        better = pool(result, claim.metric, claim.settings)
        other = pool(other, claim.metric, claim.other_settings or claim.settings)
        if better and other:
            by_seed[seed] = {case: claim.sign * (better[case] - other[case])
                             for case in sorted(better.keys() & other.keys())}
    return by_seed


def seed_interval(results, claim, by_seed):
    """Estimate of a difference over seeds, None for one seed; by_seed: its mean of each. The standard error
    is from this pair's seeds, or from the row-by-seed residuals of all rows, whichever is larger: with few
    seeds the other rows add degrees of freedom."""
    means, freedom, rows = torch.tensor(list(by_seed.values()), dtype=torch.float64), len(by_seed) - 1, []
    if not freedom:
        return None
    for name in ABLATIONS:
        of_other = name == claim.other and claim.other_settings
        row = [pool(results.get(name, {}).get(seed, {}), claim.metric, of_other or claim.settings)
               for seed in by_seed]
        if all(row) and name.startswith("mv2id") == claim.better.startswith("mv2id"):
            rows.append([mean(cases.values()) for cases in row])
    variance = float(means.var())
    if len(rows) > 2 and claim.other != BASE:
        rows = torch.tensor(rows, dtype=torch.float64)
        residuals = rows - rows.mean(1, keepdim=True) - rows.mean(0) + rows.mean()
        pooled = 2 * float(residuals.square().sum()) / (freedom * (len(rows) - 1))
        if pooled >= variance:
            variance, freedom = pooled, freedom * (len(rows) - 1)
    half = T975[min(freedom, len(T975)) - 1] * math.sqrt(variance / len(means))
    return Estimate(float(means.mean()), float(means.mean()) - half, float(means.mean()) + half)


def verdict(results, claim):
    """Does a claim hold? -> words, and Estimates of the difference in its favour over cases (seeds averaged)
    and over seeds, None where there is none. results: {row: {seed: result}}"""
    by_seed = differences(results, claim)
    if not by_seed:
        return "not run", None, None
    first, *_ = by_seed.values()
    by_case = [mean([part.get(case) for part in by_seed.values()]) for case in first]
    cases = interval(by_case, (-1, 1) if claim.metric in RATES else None)
    seeds = seed_interval(results, claim, {seed: mean(part.values()) for seed, part in by_seed.items()})
    return judge(claim, cases, seeds), cases, seeds


def judge(claim, cases, seeds):
    """The words of a verdict, from the two Estimates of a difference."""
    if seeds is None:
        return "not decided"
    low, high = min(cases.low, seeds.low), max(cases.high, seeds.high)
    zone = NO_EFFECT_RATE if claim.metric in RATES else NO_EFFECT * (claim.metric in DECIBELS)
    if not claim.allowed and -zone < low and high < zone:
        return "no effect"
    if low > -claim.allowed:
        return "holds"
    return "does not hold" if high < -claim.allowed else "not decided"


def cell(result, n_people, setting):
    """PSNR, top-1 and, with two people, swaps."""
    words = []
    for name in ("psnr", "top-1", "swaps"):
        values = [value for case, value in result.get(name, {}).get(setting, {}).items()
                  if len(toy.benchmark_cases()[int(case)][1]) == n_people]
        if values:
            words.append(f"{100 * mean(values):.0f} %" if name in RATES else f"{mean(values):.2f}")
    return ", ".join(words) or "-"


def tables(results):
    """Rows by seed, and the verdicts that they allow, in Markdown. results: {row: {seed: result}}"""
    rows = [["row", "flags of train.py", "seed", *(f"{n}, {setting}" for n, setting in COLUMNS)], ["---"] * 7]
    for name, by_seed in results.items():
        for seed, result in sorted(by_seed.items()):
            cells = [cell(result, n, setting) for n, setting in COLUMNS]
            rows.append([f"`{name}`", ABLATIONS.get(name, "not trained"), str(seed), *cells])
    judged = [["claim", "rows compared", "verdict", "metric", "in favour, over cases", "over seeds"],
              ["---"] * 6]
    for claim in CLAIMS:
        (words, *found), percent = verdict(results, claim), claim.metric in RATES
        if found[0]:
            judged.append([claim.words, f"`{claim.better}`, `{claim.other}`", words,
                           claim.metric + " %" * percent, *(as_text(one, percent, True) for one in found)])
    return "\n\n".join("\n".join(f"| {' | '.join(cells)} |" for cells in lines) for lines in (rows, judged))


def train(name, seed, args, out):
    """Train a row with train.py, from where an earlier call left it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    if torch.cuda.is_available() or torch.get_num_threads() < 2:
        launcher = []
    start = ["--wan", args.base] if args.base else ["--scratch"]
    command = [sys.executable, *launcher, str(ROOT / "train.py"), "--config", args.config, "--out", str(out),
               "--seed", str(seed), "--resume", "--no-samples", *start,
               "--reference-attention", "joint",  # as in the papers; the row one-way overrides it
               *args.train, *ABLATIONS[name].split()]
    print(shlex.join(command[1:]), flush=True)
    training = subprocess.Popen(command, stdout=2)
    try:
        if training.wait():
            raise UserError(f"row {name}: training failed; mend it and repeat, finished rows are kept")
    finally:  # where this script is stopped, train.py saves a checkpoint and ends
        training.terminate()
        training.wait()


def run_row(name, seed, args, plan, path, benchmark):
    """Train and measure a row, or measure the base, and write the result; its folder is beside that."""
    ckpt = out = path.with_suffix("")
    key = plan_key(plan, args.base)
    probe_writable(out)
    if name == BASE:
        ckpt, plan = args.base, plan._replace(settings=[s for s in plan.settings if s in NO_VIEWS])
    else:
        train(name, seed, args, out)
    measured = benchmark.evaluate(ckpt, plan, out / "measured.jsonl")
    result = {"plan": key, "loss": {"": {case: mean(loss) for case, loss in measured.losses.items()}}}
    for metric in STORED:
        result[metric] = {setting: by_case(benchmark.select(measured.results, settings=[setting]),
                                           benchmark.METRICS[metric]) for setting in benchmark.SETTINGS}
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(result))


def plan_key(plan, base):
    """What two results must share to be compared: cases, the way to sample, and the base."""
    return {"cases": plan.cases, "recipe": plan.recipe, "base": base and parent_of(base)}


def read_stored(root, key):
    """The results in a folder, {row: {seed: result}}, rows in ABLATIONS' order. UserError for one that is
    damaged, or has another plan_key."""
    results, key = {}, json.loads(json.dumps(key))
    for name, seed in itertools.product([*ABLATIONS, BASE], range(100)):
        path = root / f"{name}-{seed}.json"
        if path.exists():
            try:
                result = json.loads(path.read_text())
                same = result["plan"] == key
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{path} is damaged: delete it, and this row is made again") from None
            if not same:
                raise UserError(f"{path} is of another base, other cases or another way to sample: give the "
                                "same flags, another --out, or delete it")
            results.setdefault(name, {})[seed] = result
    return results


def main(argv, benchmark):
    """benchmark: eval.py, which measures the rows."""
    p, known = Parser(prog="eval.py claims", description=__doc__), [*ABLATIONS, BASE]
    p.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(known))
    p.add_argument("--seeds", type=in_range(int, 0, 100, "0 to 100"), default=3,
                   help="seeds of each row; 0: only the tables, of results that are there")
    p.add_argument("--config", default="toy", choices=("tiny", "toy", "toy64"), help="what to train")
    p.add_argument("--train", default=[], type=shlex.split, help='flags of train.py, as --train="--no-mfi"')
    p.add_argument("--base", type=nonempty, help="the base model that every row starts from, such as "
                   "assets/base (none: random weights); the row `base` measures it")
    p.add_argument("--out", type=nonempty, default="out/claims", help="folder of all trainings and results")
    benchmark.benchmark_flags(p.add_argument, benchmark.SETTINGS)
    args = p.parse_args(argv)
    if not set(args.rows) <= set(known):
        raise UserError(f"{' '.join(args.rows)}: expected rows of {', '.join(known)}")
    if BASE in args.rows and not args.base:
        raise UserError(f"the row {BASE} needs --base DIR: assets/base comes with the code")
    for name in {flag.split("=")[0] for flag in args.train}:
        if name in ("--seed", "--out", "--config", "--stage", "--wan", "--scratch"):
            raise UserError(f"--train {name}: claims.py sets this itself; it has --seeds, --out, --config "
                            "and --base")
    # a folder for each way to train, or --resume would go on from another one's checkpoints
    start = ["from", Path(args.base).name] if args.base else []
    root = Path(args.out, re.sub(r"[^\w.]+", "-", " ".join([args.config, *start, *args.train])))
    with lock(args.out), contextlib.redirect_stdout(sys.stderr):  # stdout is for the tables
        plan = benchmark.plan_of(args)
        key = plan_key(plan, args.base)
        read_stored(root, key)  # refused now, before hours of training
        for seed in range(args.seeds):
            for name in args.rows or known:
                path = root / f"{name}-{seed}.json"
                if not path.exists() and (name != BASE or args.base and seed == 0):
                    run_row(name, seed, args, plan, path, benchmark)
        results = read_stored(root, key)
    if not results:
        raise UserError(f"{root} holds no results: give --seeds 1, or the --base and --train that they had")
    print(tables(results))
