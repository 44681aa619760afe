"""Verdicts on results whose difference is known, the command on two tiny rows, and what CLAIMS.md may say."""

import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, call

import claims
import eval as evaluation
from checkpoint import UserError, lock
from claims import ABLATIONS, CLAIMS, Claim
from eval import Evaluation, mean
from rope import LAYOUTS


def evaluation_of(values, metric="psnr", settings=("all",)):
    """One of cases that have these values of a metric; as the loss's if that is the metric."""
    if metric == "loss":
        return Evaluation([], {n: [value] * 5 for n, value in enumerate(values)}, 6, 32)
    results = []
    for setting in settings:
        results += [{"case": n, "setting": setting, "people": [{metric: v}]} for n, v in enumerate(values)]
    return Evaluation(results, {}, 6, 32)


def row_of(value, seeds, spread, g, metric="psnr"):
    """A row: for each seed 50 cases about `value`, moved by the seed."""
    moved = value + spread * torch.randn(seeds, 1, generator=g) + 0.1 * torch.randn(seeds, 50, generator=g)
    return {seed: evaluation_of(values, metric) for seed, values in enumerate(moved.tolist())}


def claim(metric="psnr", sign=1, settings=("all",)):
    return Claim("MFI helps", "full", "no-mfi", metric, sign, settings)


VERDICTS = [(2.0, 0.0, 1, "holds"), (0.0, 2.0, 1, "does not hold"), (0.0, 2.0, -1, "holds"),
            (0.0, 0.0, 1, "not decided")]


@pytest.mark.parametrize("metric, settings", [("psnr", ("all",)), ("loss", ())])
@pytest.mark.parametrize("better, other, sign, expected", VERDICTS)
def test_a_claim_holds_where_both_intervals_exclude_zero(better, other, sign, expected, metric, settings):
    g = torch.Generator().manual_seed(1)
    rows = {"full": row_of(18 + better, 2, 0.1, g, metric), "no-mfi": row_of(18 + other, 2, 0.1, g, metric)}
    words, cases, seeds = claims.verdict(rows, claim(metric, sign, settings))
    assert words == expected and cases.mean == pytest.approx(sign * (better - other), abs=0.3)
    # by hand: two rows of two seeds, so t has two degrees of freedom
    variance = 0
    for by_seed in rows.values():
        a, b = (mean(claims.pool([e], metric, settings).values()) for e in by_seed.values())
        variance += (a - b) ** 2 / 2 / 2
    assert seeds.high - seeds.mean == pytest.approx(4.30 * variance**0.5, rel=1e-4)


def test_without_a_second_seed_or_all_settings_nothing_is_decided():
    g = torch.Generator().manual_seed(1)
    rows = {"full": row_of(20, 2, 0.1, g), "no-mfi": row_of(18, 2, 0.1, g)}
    assert claims.verdict(rows, claim(settings=("front", "all"))).words == "not run"  # at one of them only
    assert claims.verdict({}, claim()) == ("not run", None, None)
    alone = {name: {0: by_seed[0]} for name, by_seed in rows.items()}
    words, cases, seeds = claims.verdict(alone, claim())
    assert words == "not decided" and cases is not None and seeds is None


def test_the_two_sides_of_a_claim_may_be_given_other_views():
    rows = {"full": {seed: evaluation_of([3.0 + seed], settings=("all",)) for seed in range(2)},
            "no-mfi": {seed: evaluation_of([1.0 + seed], settings=("front",)) for seed in range(2)}}
    found = claims.verdict(rows, claim()._replace(other_settings=("front",)))
    assert found.cases.mean == 2


def test_a_rate_alike_in_all_cases_proves_little():
    alike = dict.fromkeys(("full", "no-mfi"), dict.fromkeys(range(2), evaluation_of([True] * 50, "mouth")))
    words, cases, _ = claims.verdict(alike, claim("mouth"))
    assert words == "not decided" and cases == (0, -0.06, 0.06)


def test_where_seeds_alone_differ_a_verdict_is_rarely_wrong():
    g, wrong = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        rows = {name: row_of(18, 2, 0.2, g) for name in ("full", "no-mfi", "append", "direct")}
        wrong += claims.verdict(rows, claim()).words != "not decided"
    assert 0.01 < wrong / 400 < 0.09  # 0.05 expected


def test_claims_name_rows_settings_and_metrics_that_exist():
    for each in CLAIMS:
        assert {each.better, each.other} <= set(ABLATIONS) and each.sign in (1, -1)
        assert each.metric in claims.CLAIM_METRICS and (each.metric == "loss") == (each.settings == ())
        assert {*each.settings, *(each.other_settings or ())} <= set(evaluation.SETTINGS)
    for flags in ABLATIONS.values():
        layout = re.search(r"--rope-layout (\w+)", flags)
        assert not layout or layout[1] in LAYOUTS


# -------------------------------------------------------------------------------------------------- CLAIMS.md
def tables_in(text):
    """The cells of every Markdown table in a text."""
    found = [[]]
    for line in text.splitlines():
        if line.startswith("| "):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return found[:-1] if not found[-1] else found


def test_the_page_has_the_tables_that_the_script_prints():
    page = tables_in((ROOT / "CLAIMS.md").read_text())
    nothing = claims.tables({"full": {0: evaluation_of([], settings=())}})
    for of_page, of_script in zip(page, tables_in(nothing), strict=True):
        assert of_page[:2] == of_script[:2]  # the columns
        assert all(len(cells) == len(of_page[0]) for cells in of_page)
    rows, judged = page
    assert {cells[0].strip("`"): cells[1] for cells in rows[2:]} == ABLATIONS
    assert len({tuple(cells[:3]) for cells in rows}) == len(rows)  # a row and seed once
    of_script = tables_in(nothing)[1]
    for cells, expected in zip(judged[2:], of_script[2:], strict=True):
        assert cells[:2] == expected[:2] and cells[3] == expected[3]  # the claim, its rows, its metric
        assert cells[2] in ("holds", "does not hold", "not decided", "not run")


def test_every_name_on_the_page_is_one_of_the_scripts():
    page = (ROOT / "CLAIMS.md").read_text()
    prose = "\n".join(line for line in page.splitlines() if not line.startswith("|"))
    for name in re.findall(r"`([^`\n]+)`", prose):
        assert name in ABLATIONS or name.startswith(("python ", "mv2id-...")), name
    for command in re.findall(r"^python claims.py (.*)$", page, re.M):
        words = shlex.split(command)
        assert set(words[:words.index("--seeds")]) <= set(ABLATIONS)


# ---------------------------------------------------------------------------------------------------- the CLI
@pytest.fixture
def one_process(monkeypatch):
    """Starting two costs seconds a row; tests/test_train.py has their equality."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


COMMAND = ["--config", "tiny", "--steps", 1, "--out", "cl", "--limit", 4, "--settings", "front", "front",
           "--train=--steps 1"]


def test_rows_are_trained_measured_and_judged_and_earlier_ones_kept(one_process, tmp_path):
    first = call("claims.py", "full", "append", *COMMAND, "--seeds", 1, cwd=tmp_path)
    rows, judged = tables_in(first)
    assert [cells[0] for cells in rows[2:]] == ["`full`", "`append`"] and len(judged) == 2 + len(CLAIMS)
    assert re.fullmatch(r"\d+\.\d\d, \d+ %", rows[2][3]) and rows[2][4] == "-"
    assert re.fullmatch(r"\d+\.\d\d, \d+ %, \d+ %", rows[2][5])
    assert [cells[2] for cells in judged].count("not run") >= 5
    assert (tmp_path / "cl" / "tiny-steps-1" / "append-0" / "stage4").exists()
    lines = (tmp_path / "cl" / "tiny-steps-1" / "full-0" / "cases.jsonl").read_text()
    (tmp_path / "cl" / "tiny-steps-1" / "notes-1").mkdir()  # somebody else's
    (tmp_path / "cl" / "tiny-steps-1" / "notes-1" / "cases.jsonl").write_text("{}")
    second = call("claims.py", "full", *COMMAND, "--seeds", 2, cwd=tmp_path)  # the table keeps the other row
    rows_now, _ = tables_in(second)
    assert [cells[0] + cells[2] for cells in rows_now[2:]] == ["`full`0", "`full`1", "`append`0"]
    assert rows_now[2] == rows[2] and rows_now[4] == rows[3]
    assert (tmp_path / "cl" / "tiny-steps-1" / "full-0" / "cases.jsonl").read_text() == lines


def test_on_a_cpu_a_row_trains_in_two_processes(monkeypatch, tmp_path):
    commands = []

    class Process:
        def __init__(self, command, **_):
            commands.append(command)

        def wait(self):
            return 0

        def terminate(self):
            pass
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = type("Arguments", (), {"config": "tiny", "train": ["--steps", "1"]})
    for threads in (1, 2, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        claims.train("no-mfi", 3, args, tmp_path / "no-mfi-3")
    script = str(ROOT / "train.py")
    one, two, many = commands
    assert one[:2] == [sys.executable, script] and two == many
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert two[1:two.index(script)] == launcher
    for command in commands:
        assert command[-3:] == ["--steps", "1", "--no-mfi"]
        assert command[command.index("--seed") + 1] == "3"


def test_a_row_that_fails_is_one_line(one_process, tmp_path):
    args = type("Arguments", (), {"config": "tiny", "train": ["--steps", "no"]})
    with pytest.raises(UserError, match="row full: training failed"):
        claims.train("full", 0, args, tmp_path / "full-0")


def test_a_stopped_script_lets_its_training_save_and_end(monkeypatch, tmp_path):
    args, ended = type("Arguments", (), {"config": "tiny", "train": []}), []

    class Process:
        def __init__(self, *_, **__):
            self.waits = 0

        def wait(self):
            self.waits += 1
            if self.waits == 1:
                raise KeyboardInterrupt
            ended.append("waited")

        def terminate(self):
            ended.append("terminated")
    monkeypatch.setattr(subprocess, "Popen", Process)
    with pytest.raises(KeyboardInterrupt):
        claims.train("full", 0, args, tmp_path / "full-0")
    assert ended == ["terminated", "waited"]


OWN = ("--seed 1", "--seed=1", "--see 1", "--se=1", "--s 1", "--out x", "--out=x", "--ou x", "--o x",
       "--config tiny", "--conf=tiny", "--stage 1", "--sta 1", "--steps 1 --stage=1")
WRONG = [([f"--train={own}"], "claims.py sets this itself") for own in OWN] + [
    (["full", "nonsense"], "nonsense: expected rows of full"), (["--train='"], "--train"),
    (["--seeds", "0"], "--seeds"), (["--seeds", "1" + "0" * 20], "--seeds"), (["--seed=2"], "--seed"),
    (["--out", ""], "--out"), (["--limit", "0"], "--limit"), (["--batch", "1000000"], "--batch"),
    (["--settings", "back"], "--settings"), (["--config", "1.3b"], "--config")]


@pytest.mark.parametrize("flags, message", WRONG)
def test_a_wrong_flag_is_one_line_before_any_training(flags, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(claims, "train", None)
    with pytest.raises(UserError, match=message):
        claims.main(flags)
    assert not list(tmp_path.iterdir())


def test_flags_that_only_begin_alike_are_passed_on(monkeypatch, tmp_path):
    """--steps begins as --stage does, --clip as --clips: none of them is claims.py's."""
    passed = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(claims, "train", lambda name, seed, args, out: passed.append(args.train))
    monkeypatch.setattr(claims, "evaluate", lambda *_: None)
    claims.main(["full", "--seeds", "1", "--train=--steps 1 --clip 2 --clips 4 4"])
    assert passed == [["--steps", "1", "--clip", "2", "--clips", "4", "4"]]


def test_two_calls_never_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "train", None)
    with lock(tmp_path), pytest.raises(UserError, match="is in use by process"):
        claims.main(["full", "--out", str(tmp_path)])
