"""Train rows of ABLATIONS, measure them on the toy benchmark, and judge the papers' CLAIMS by them.

  python claims.py full no-mfi     these rows (none named: all) and those of earlier calls, as in CLAIMS.md

A claim is decided if two 95 % intervals of the difference of its rows exclude zero: over cases (bootstrap)
and over seeds (Student's t). Two CPU cores train a row in two processes, equal to one up to rounding.
"""
import contextlib
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

# eval comes first: it says how torch's threads wait, before torch starts them
from eval import METRICS, benchmark_flags, evaluate, plan_of, select
from checkpoint import Parser, UserError, find_checkpoint, in_range, lock, nonempty, run_script
from report import Estimate, Metric, by_case, estimate, interval, mean, show
import torch

ABLATIONS = {  # row: flags of train.py
    "full": "", "no-mfi": "--no-mfi",
    "no-proxies": "--proxy-tokens 0",
    "append": "--rope-layout append", "append-no-proxies": "--rope-layout append --proxy-tokens 0",
    "direct": "--no-curriculum", "front-only": "--front-only",
    "phantom": "--rope-layout append --proxy-tokens 0 --no-mfi",
    "mv2id-base": "--pairs in --rope-layout append --proxy-tokens 0 --no-mfi",
    "mv2id-rd": "--pairs in --rope-layout rd --proxy-tokens 0 --no-mfi",
    "mv2id-mask": "--pairs in --rope-layout append --proxy-tokens 0 --no-mfi --mask 0.6",
    "mv2id-both": "--pairs in --rope-layout rd --proxy-tokens 0 --no-mfi --mask 0.6",
}
GIVEN, FEW = ("front", "front+left", "all"), ("front", "front+left")  # FEW: not every frame has a reference
COLUMNS = ((1, "front"), (1, "all"), (2, "front"), (2, "all"))  # of the table: people, views given


class Claim(NamedTuple):
    """What the abstracts say: the row `better` should have more of a metric than the row `other`."""
    words: str
    better: str
    other: str
    metric: str
    sign: int = 1  # -1: should have less
    settings: tuple = GIVEN  # the loss has none
    other_settings: tuple | None = None  # of the other row, where they differ


CLAIM_METRICS = METRICS | {"loss": Metric("squared error of the velocity without references", None)}
CLAIMS = [
    Claim("MFI raises identity", "full", "no-mfi", "psnr"),
    Claim("MFI raises identity, append without proxies", "append-no-proxies", "phantom", "psnr"),
    Claim("proxies unify one to four views", "full", "no-proxies", "psnr"),
    Claim("proxies unify one to four views, append", "append", "append-no-proxies", "psnr"),
    Claim("proxies help where the generated view has no reference", "full", "no-proxies", "unseen", 1, FEW),
    Claim("Jump-RoPE lowers crosstalk", "full", "append", "swaps", -1),
    Claim("Jump-RoPE lowers crosstalk", "full", "append", "margin"),  # swaps are rare
    Claim("Jump-RoPE lowers crosstalk, without proxies", "no-proxies", "append-no-proxies", "margin"),
    Claim("the curriculum beats direct training", "full", "direct", "psnr"),
    Claim("the curriculum keeps the text-to-video prior", "full", "direct", "loss", -1, ()),
    Claim("the curriculum keeps the text-to-video prior", "full", "direct", "caption", 1, ("none",)),
    Claim("several views beat one at large yaw", "full", "front-only", "side", 1, ("all",), ("front",)),
    Claim("region masking lowers copy-paste", "mv2id-both", "mv2id-rd", "copied", -1, FEW),
    Claim("region masking costs a little similarity", "mv2id-rd", "mv2id-both", "psnr", 1, FEW),
    Claim("RD-RoPE makes motion more natural", "mv2id-rd", "mv2id-base", "jitter", -1, FEW),
]
T975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20)  # of Student's t, by freedom


def complete(by_seed, settings):
    """A row's Evaluations, of those seeds that were measured at all these settings."""
    return [e for e in by_seed.values() if set(settings) <= {result["setting"] for result in e.results}]


def pool(evaluations, metric, settings):
    """{case: the metric's mean over these Evaluations}"""
    if metric == "loss":
        return {case: mean(sum((e.losses[case] for e in evaluations), [])) for case in evaluations[0].losses}
    return by_case(select(sum((e.results for e in evaluations), []), settings=settings), METRICS[metric])


def seed_variance(evaluations, metric, settings):
    """Variance between seeds of a metric's mean over cases, pooled over all rows (0 where no row has two
    seeds), and its degrees of freedom. evaluations: {row: {seed: Evaluation}}"""
    squares = freedom = 0
    for by_seed in evaluations.values():
        means = [mean(pool([e], metric, settings).values()) for e in complete(by_seed, settings)]
        means = [m for m in means if m is not None]
        squares += sum((m - mean(means)) ** 2 for m in means)
        freedom += max(0, len(means) - 1)
    return squares / max(1, freedom), freedom


class Verdict(NamedTuple):
    words: str
    cases: Estimate | None = None  # the difference in the claim's favour, seeds averaged: over cases
    seeds: Estimate | None = None  # over seeds; None without a second seed


def verdict(evaluations, claim):
    """Does a claim hold? evaluations: {row: {seed: Evaluation}}"""
    sides, variance_of_mean, freedom = [], 0.0, math.inf
    for row, settings in ((claim.better, claim.settings),
                          (claim.other, claim.other_settings or claim.settings)):
        of_row = complete(evaluations.get(row, {}), settings)
        if not of_row:
            return Verdict("not run")
        sides.append(pool(of_row, claim.metric, settings))
        variance, degrees = seed_variance(evaluations, claim.metric, settings)
        variance_of_mean, freedom = variance_of_mean + variance / len(of_row), min(freedom, degrees)
    better, other = sides
    differences = [claim.sign * (better[case] - other[case]) for case in sorted(better.keys() & other.keys())]
    cases = interval(differences, (-1, 1) if CLAIM_METRICS[claim.metric].percent else None)
    if cases is None or not freedom:
        return Verdict("not decided", cases)
    half = T975[min(freedom, len(T975)) - 1] * math.sqrt(variance_of_mean)
    seeds = Estimate(cases.mean, cases.mean - half, cases.mean + half)
    if any(found.low <= 0 <= found.high for found in (cases, seeds)):
        return Verdict("not decided", cases, seeds)
    return Verdict("holds" if cases.mean > 0 else "does not hold", cases, seeds)


def cell(results):
    """PSNR, top-1 and, with two people, swaps."""
    psnr, *rates = [estimate(results, METRICS[name]) for name in ("psnr", "top-1", "swaps")]
    rates = [show(rate, True, with_interval=False) + " %" for rate in rates if rate]
    return ", ".join([show(psnr, with_interval=False), *rates])


def tables(evaluations):
    """Rows by seed, and verdicts, in Markdown. evaluations: {row: {seed: Evaluation}}"""
    def line(*cells):
        return f"| {' | '.join(cells)} |\n"
    text = line("row", "flags of train.py", "seed", *(f"{n}, {setting}" for n, setting in COLUMNS))
    text += line(*["---"] * 7)
    for name, by_seed in evaluations.items():
        for seed, evaluation in sorted(by_seed.items()):
            cells = [cell(select(evaluation.results, [n], [setting])) for n, setting in COLUMNS]
            text += line(f"`{name}`", ABLATIONS[name], str(seed), *cells)
    text += "\n" + line("claim", "rows compared", "verdict", "metric", "in favour, over cases", "over seeds")
    text += line(*["---"] * 6)
    for claim in CLAIMS:
        found, percent = verdict(evaluations, claim), CLAIM_METRICS[claim.metric].percent
        text += line(claim.words, f"`{claim.better}`, `{claim.other}`", found.words,
                     claim.metric + (" %" if percent else ""),
                     show(found.cases, percent, True), show(found.seeds, percent, True))
    return text.rstrip()


def train(name, seed, args, out):
    """Train a row with train.py, from where an earlier call left it."""
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher = [] if torch.cuda.is_available() or torch.get_num_threads() < 2 else two
    command = [sys.executable, *launcher, str(Path(__file__).with_name("train.py")), "--config", args.config,
               "--out", str(out), "--seed", str(seed), "--resume", "--no-samples", *args.train,
               *ABLATIONS[name].split()]
    print(shlex.join(command[1:]), flush=True)
    training = subprocess.Popen(command, stdout=2)
    try:
        if training.wait():
            raise UserError(f"row {name}: training failed; mend it and repeat, finished rows are kept")
    finally:  # where this script is stopped, train.py saves a checkpoint and ends
        training.terminate()
        training.wait()


def main(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ABLATIONS))
    p.add_argument("--seeds", type=in_range(int, 1, 100, "1 to 100"), default=2, help="seeds of each row")
    p.add_argument("--config", default="toy", choices=("tiny", "toy", "toy64"), help="what to train")
    p.add_argument("--train", default=[], type=shlex.split, metavar="FLAGS", help="further flags of train.py")
    p.add_argument("--out", type=nonempty, default="out/claims", help="folder of all trainings")
    benchmark_flags(p.add_argument)
    args = p.parse_args(argv)
    if not set(args.rows) <= set(ABLATIONS):
        raise UserError(f"{' '.join(args.rows)}: expected rows of {', '.join(ABLATIONS)}")
    for name in [flag.split("=")[0] for flag in args.train]:
        if len(name) > 2 and any(own.startswith(name) for own in ("--seed", "--out", "--config", "--stage")):
            raise UserError(f"--train {name}: claims.py sets this itself; it has --seeds, --out and --config")
    # a folder for each way to train, or --resume would go on from another one's checkpoints
    root = Path(args.out, re.sub(r"[^\w.]+", "-", " ".join([args.config, *args.train])))
    evaluations = {name: {} for name in ABLATIONS}
    with lock(args.out), contextlib.redirect_stdout(sys.stderr):  # stdout is for the tables
        plan = plan_of(args)
        for seed in range(args.seeds):
            for name in args.rows or ABLATIONS:
                out = root / f"{name}-{seed}"
                train(name, seed, args, out)
                evaluate(out, plan, out / "cases.jsonl")
        for path in sorted(root.glob("*/cases.jsonl")):
            name, _, seed = path.parent.name.rpartition("-")
            if name in ABLATIONS and seed.isdecimal() and find_checkpoint(path.parent):
                evaluations[name][int(seed)] = evaluate(path.parent, plan, path)
    print(tables(evaluations))


if __name__ == "__main__":
    run_script(main, "a smaller --batch")
