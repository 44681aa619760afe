"""Verdicts on results whose difference is known, the command on two tiny rows, and what CLAIMS.md may say."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, call

import eval as evaluation
from eval import METRICS, Plan
from measure import claims
from measure.claims import ABLATIONS, BASE, CLAIMS, Claim
from measure.report import mean
from rope import LAYOUTS
from support.script import UserError, lock


def result_of(values, metric="psnr", settings=("all",)):
    """A result of cases that have these values of a metric."""
    return {metric: {setting: {str(n): value for n, value in enumerate(values)} for setting in settings}}


def rows_of(differences, seeds, spread, g, metric="psnr", settings=("all",), noise=0.1):
    """A row for each difference from the value 18: seeds x 50 cases. A seed moves a row by `spread`."""
    def row(difference):
        moved = 18 + difference + spread * torch.randn(seeds, 1, generator=g)
        values = moved + noise * torch.randn(seeds, 50, generator=g)
        return {seed: result_of(by_case, metric, settings) for seed, by_case in enumerate(values.tolist())}
    return {name: row(difference) for name, difference in differences.items()}


def claim(metric="psnr", sign=1, settings=("all",), **more):
    return Claim("MFI helps", "full", "no-mfi", metric, sign, settings, **more)


# ------------------------------------------------------------------------------------------------- verdicts
@pytest.mark.parametrize("better, other, sign, metric, expected", [
    (2.0, 0.0, 1, "psnr", "holds"), (0.0, 2.0, 1, "psnr", "does not hold"), (0.0, 2.0, -1, "psnr", "holds"),
    (0.0, 2.0, -1, "loss", "holds")])
def test_a_claim_holds_where_both_intervals_exclude_zero(better, other, sign, metric, expected):
    settings = ("",) if metric == "loss" else ("all",)
    g = torch.Generator().manual_seed(1)
    rows = rows_of({"full": better, "no-mfi": other}, 3, 0.1, g, metric, settings)
    asked = claim(metric, sign, () if metric == "loss" else settings)
    words, cases, seeds = claims.verdict(rows, asked)
    assert words == expected and cases.mean == pytest.approx(sign * (better - other), abs=0.3)
    # by hand: three paired differences, so t has two degrees of freedom
    means = [[torch.tensor([*rows[name][seed][metric][settings[0]].values()]).mean() for seed in range(3)]
             for name in ("full", "no-mfi")]
    deviation = float((torch.stack(means[0]) - torch.stack(means[1])).std())
    assert seeds.high - seeds.mean == pytest.approx(4.30 * deviation / 3**0.5, rel=1e-3)


def test_what_a_seed_does_to_both_rows_alike_does_not_count():
    rows = rows_of({"full": 0.5}, 3, 2.0, torch.Generator().manual_seed(1))  # seeds lie 2 dB apart
    rows["no-mfi"] = {seed: result_of([v - 0.5 + 0.01 * seed for v in result["psnr"]["all"].values()])
                      for seed, result in rows["full"].items()}
    words, _, seeds = claims.verdict(rows, claim())
    assert words == "holds" and seeds.high - seeds.low < 0.1


def test_other_rows_of_the_same_seeds_add_degrees_of_freedom():
    names = ("full", "no-mfi", "no-proxies", "direct")
    rows = rows_of(dict.fromkeys(names, 0.0), 3, 0.1, torch.Generator().manual_seed(1))
    _, _, alone = claims.verdict({name: rows[name] for name in names[:2]}, claim())
    _, _, pooled = claims.verdict(rows, claim())
    means = torch.tensor([[mean([*rows[name][seed]["psnr"]["all"].values()]) for seed in range(3)]
                          for name in names], dtype=torch.float64)
    own = (means[0] - means[1]).var()
    # the variance of a difference is the mean over all pairs of rows
    pairs = [(means[i] - means[j]).var() for i in range(4) for j in range(i)]
    all_rows = sum(pairs) / len(pairs)
    assert all_rows > own
    half = 2.45 * float(all_rows / 3) ** 0.5  # six degrees of freedom
    assert pooled.high - pooled.mean == pytest.approx(half, rel=1e-6)
    assert alone.high - alone.mean == pytest.approx(4.30 * float(own / 3) ** 0.5, rel=1e-6)
    others = {name.replace("no-proxies", "mv2id-rd").replace("direct", "mv2id-base"): row
              for name, row in rows.items()}  # the other paper's rows are not of one kind with these
    assert claims.verdict(others, claim())[2] == alone


@pytest.mark.parametrize("metric, difference, allowed, expected", [
    ("psnr", 0.05, 0, "no effect"), ("psnr", 0.3, 0, "holds"), ("caption", 0.01, 0, "no effect"),
    ("caption", 0.2, 0, "holds"), ("jitter", 0.3, 0, "holds"),  # nobody knows what jitter matters
    ("psnr", -0.05, 0.15, "holds"), ("psnr", -0.15, 0.15, "not decided"),  # kept, if a little may be lost
    ("psnr", -0.5, 0.15, "does not hold")])
def test_what_is_too_small_to_matter_and_what_may_be_lost(metric, difference, allowed, expected):
    rows = rows_of({"full": difference, "no-mfi": 0.0}, 3, 0.002, torch.Generator().manual_seed(2), metric,
                   noise=0.01)
    assert claims.verdict(rows, claim(metric, allowed=allowed))[0] == expected


def test_the_base_is_compared_with_every_seed():
    def caption(value):
        return result_of([value] * 9, "caption", claims.NO_VIEWS)
    rows = {"full": {seed: caption(0.8 + seed / 100) for seed in range(3)}, BASE: {0: caption(0.8)}}
    kept = next(c for c in CLAIMS if c.other == BASE and c.metric == "caption")
    assert claims.verdict(rows, kept)[1].mean == pytest.approx(0.01)


def test_without_a_second_seed_or_all_settings_nothing_is_decided():
    rows = rows_of({"full": 2, "no-mfi": 0}, 2, 0.1, torch.Generator().manual_seed(1))
    assert claims.verdict(rows, claim(settings=("front", "all")))[0] == "not run"  # at one of them only
    assert claims.verdict({}, claim()) == ("not run", None, None)
    words, cases, seeds = claims.verdict({name: {0: row[0]} for name, row in rows.items()}, claim())
    assert words == "not decided" and cases is not None and seeds is None
    unpaired = {"full": {0: rows["full"][0]}, "no-mfi": {1: rows["no-mfi"][1]}}
    assert claims.verdict(unpaired, claim())[0] == "not run"


def test_the_two_sides_of_a_claim_may_be_given_other_views():
    rows = {"full": {seed: result_of([3.0 + seed], settings=("all",)) for seed in range(2)},
            "no-mfi": {seed: result_of([1.0 + seed], settings=("front",)) for seed in range(2)}}
    assert claims.verdict(rows, claim(other_settings=("front",)))[1].mean == 2


def test_a_rate_alike_in_all_cases_proves_little():
    alike = dict.fromkeys(("full", "no-mfi"), dict.fromkeys(range(2), result_of([1.0] * 50, "caption")))
    words, cases, _ = claims.verdict(alike, claim("caption"))
    assert words == "not decided" and cases == (0, -0.06, 0.06)


@pytest.mark.parametrize("unlike", [0.5, 2])
def test_where_nothing_differs_a_verdict_is_rarely_wrong(unlike):
    """400 trials of four rows that a seed moves by 0.2 dB (the last two by `unlike` times that)."""
    g, wrong = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        rows = rows_of({"full": 0.0, "no-mfi": 0.0}, 3, 0.2, g)
        rows |= rows_of({"no-proxies": 0.0, "direct": 0.0}, 3, 0.2 * unlike, g)
        wrong += claims.verdict(rows, claim())[0] in ("holds", "does not hold")
    assert 0 < wrong <= 0.05 * 400


def test_claims_name_rows_settings_and_metrics_that_exist():
    for each in CLAIMS:
        assert {each.better, each.other} <= {*ABLATIONS, BASE} and each.sign in (1, -1)
        assert (each.metric == "loss") == (each.settings == ())
        if each.metric != "loss":
            assert METRICS[each.metric].percent == (each.metric in claims.RATES)
        assert {*each.settings, *(each.other_settings or ())} <= set(evaluation.SETTINGS)
    layouts = re.findall(r"--rope-layout (\w+)", " ".join(ABLATIONS.values()))
    assert set(layouts) <= set(LAYOUTS)


# ------------------------------------------------------------------------------------------------- CLAIMS.md
def tables_in(text):
    """The cells of every Markdown table in a text."""
    found = [[]]
    for line in text.splitlines():
        if line.startswith("| "):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return found[:-1] if not found[-1] else found


@pytest.mark.parametrize("name, base", [("toy-from-base", "base"), ("toy-from-base-plain", "base-plain"),
                                        ("toy-from-base-steps-60-80-1200-1000", "base")])
def test_the_page_is_what_the_results_that_come_with_the_code_say(name, base):
    plan = Plan(list(range(evaluation.CASES)), [], evaluation.SAMPLE_RECIPES["toy"])
    key = claims.plan_key(plan, ROOT / "assets" / base)
    results = claims.read_stored(ROOT / "assets" / "claims" / name, key)
    assert {"full", "append"} <= set(results)
    assert claims.tables(results) in (ROOT / "measure/CLAIMS.md").read_text()


@pytest.mark.parametrize("text, says", [
    ('{"psnr": {', "is damaged: delete it"), ("[1]", "is damaged: delete it"),
    ('{"plan": {"cases": [1]}}', "is of another base, other cases or another way to sample")])
def test_a_result_that_does_not_fit_is_one_line(text, says, tmp_path):
    (tmp_path / "full-0.json").write_text(text)
    with pytest.raises(UserError, match=f"full-0.json {says}"):
        claims.read_stored(tmp_path, claims.plan_key(Plan([0], [], evaluation.SAMPLE_RECIPES["toy"]), None))


def test_results_of_two_bases_of_one_name_are_not_mixed(tmp_path):
    shutil.copytree(ROOT / "assets" / "base-plain", tmp_path / "base")
    with pytest.raises(UserError, match="is of another base"):
        claims.main(["base", "--seeds", "0", "--out", str(ROOT / "assets" / "claims"), "--base",
                     str(tmp_path / "base")], evaluation)


def test_every_name_on_the_page_is_one_of_the_scripts():
    page = (ROOT / "measure/CLAIMS.md").read_text()
    prose = "\n".join(line for line in page.splitlines() if not line.startswith("|"))
    for name in re.findall(r"`([^`\n]+)`", prose):
        assert name in ABLATIONS or name.startswith(("python ", "mv2id-...")), name
    for command in re.findall(r"^python eval.py claims (.*)$", page, re.M):
        words = shlex.split(command)
        assert set(words[:words.index("--seeds")]) <= {*ABLATIONS, BASE}


# ----------------------------------------------------------------------------------------------- the command
COMMAND = ["--config", "tiny", "--steps", 1, "--out", "cl", "--limit", 4, "--settings", "front", "front",
           "--train=--steps 1"]


def test_rows_are_trained_measured_and_judged_and_earlier_ones_kept(monkeypatch, tmp_path):
    # one process: starting two costs seconds a row, and tests/test_train.py has their equality
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    first = call("eval.py", "claims", "full", "no-mfi", *COMMAND, "--seeds", 1, cwd=tmp_path)
    rows, judged = tables_in(first)
    assert [cells[0] for cells in rows[2:]] == ["`full`", "`no-mfi`"] and len(judged) == 2 + 1
    assert re.fullmatch(r"\d+\.\d\d, \d+ %", rows[2][3]) and rows[2][4] == "-"
    assert re.fullmatch(r"\d+\.\d\d, \d+ %, \d+ %", rows[2][5])
    assert judged[2][:2] == ["MFI raises identity, the front alone given", "`full`, `no-mfi`"]
    root = tmp_path / "cl" / "tiny-steps-1"
    assert (root / "no-mfi-0" / "stage4").exists()
    lines = (root / "full-0.json").read_text()
    (root / "notes-1.json").write_text("{}")  # somebody else's
    second = call("eval.py", "claims", "full", *COMMAND, "--seeds", 2, cwd=tmp_path)
    rows_now, _ = tables_in(second)  # the other row stays
    assert [cells[0] + cells[2] for cells in rows_now[2:]] == ["`full`0", "`full`1", "`no-mfi`0"]
    assert rows_now[2] == rows[2] and rows_now[4] == rows[3]
    assert (root / "full-0.json").read_text() == lines
    shutil.rmtree(root / "no-mfi-0")  # a result needs its training no more
    assert call("eval.py", "claims", *COMMAND, "--seeds", 0, cwd=tmp_path) == second


ROW = type("Arguments", (), {"config": "tiny", "base": None, "train": ["--steps", "1"]})


class Process:
    """Of subprocess.Popen: remembers its commands and what was asked of it."""
    said, ends = [], []

    def __init__(self, command, **_):
        self.said.append(command)

    def wait(self):
        self.said.append("wait")
        end = self.ends.pop(0) if self.ends else 0
        if isinstance(end, int):
            return end
        raise end

    def terminate(self):
        self.said.append("terminate")


@pytest.fixture
def process(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Process.said, Process.ends = [], []
    return Process


def test_on_a_cpu_a_row_trains_in_two_processes(process, monkeypatch, tmp_path):
    for threads in (1, 2, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        claims.train("no-mfi", 3, ROW, tmp_path / "no-mfi-3")
    one, two, many = (said for said in process.said if isinstance(said, list))
    script = str(ROOT / "train.py")
    assert one[:2] == [sys.executable, script] and two == many
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert two[1:two.index(script)] == launcher
    assert one[-3:] == two[-3:] == ["--steps", "1", "--no-mfi"] and one[one.index("--seed") + 1] == "3"


def test_a_row_that_fails_is_one_line_and_one_that_is_stopped_may_save_and_end(process, tmp_path):
    process.ends[:] = [1]
    with pytest.raises(UserError, match="row full: training failed"):
        claims.train("full", 0, ROW, tmp_path / "full-0")
    process.ends[:], process.said[:] = [KeyboardInterrupt()], []
    with pytest.raises(KeyboardInterrupt):
        claims.train("full", 0, ROW, tmp_path / "full-0")
    assert process.said[1:] == ["wait", "terminate", "wait"]


@pytest.mark.parametrize("flags, message", [
    *(([f"--train={own}"], "claims.py sets this itself")
      for own in ("--seed 1", "--seed=1", "--wan x", "--scratch", "--out=x", "--config tiny", "--stage=1")),
    (["full", "nonsense"], "nonsense: expected rows of full"), (["base"], "the row base needs --base DIR"),
    (["--train='"], "--train"), (["--seeds", "0"], "holds no results: give --seeds 1")])
def test_what_cannot_work_is_one_line_before_any_training(flags, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(claims, "train", None)
    with pytest.raises(UserError, match=message):
        claims.main(flags, evaluation)


def test_flags_that_only_begin_alike_are_passed_on(monkeypatch, tmp_path):
    """--steps begins as --stage does, --clip as --clips: none of them is claims.py's."""
    passed = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(claims, "train", lambda name, seed, args, out: passed.append(args.train))
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: evaluation.Evaluation([], {}, 6, 32))
    claims.main(["full", "--seeds", "1", "--train=--steps 1 --clip 2 --clips 4 4"], evaluation)
    assert passed == [["--steps", "1", "--clip", "2", "--clips", "4", "4"]]


def test_two_calls_never_share_a_folder(tmp_path):
    with lock(tmp_path), pytest.raises(UserError, match="is in use by process"):
        claims.main(["full", "--out", str(tmp_path)], evaluation)
