import json

import pytest
import torch
from conftest import ROOT, run

import data
import eval as evaluation
from rope import UserError


def truth(number):
    clip, who = data.benchmark_cases()[number]
    people = data.draw_identities(data.BENCHMARK_IDENTITIES, data.BENCHMARK_SEED)
    video, mask = data.render_clips([clip], [data.pick(people, i) for i in who], 6, 32)
    return clip, who, people, video[0], mask[0]


@pytest.mark.parametrize("number", [0, 75])
def test_the_truth_itself_scores_full_marks(number):
    clip, who, people, video, _ = truth(number)
    for row in evaluation.measure([video], clip, who, people)[0]:
        assert row["psnr"] == float("inf") and row["rank"] == 1 and not row["swapped"]


def test_somebody_else_is_noticed():
    clip, who, people, _, _ = truth(0)
    other = (who[0] + 1) % 52
    video, _ = data.render_clips([clip], [data.pick(people, other)], 6, 32)
    (row,) = evaluation.measure([video[0]], clip, who, people)[0]
    assert row["rank"] > 1 and row["psnr"] < 25


def test_exchanged_people_are_counted_as_swaps():
    clip, who, people, _, _ = truth(75)
    video, _ = data.render_clips([clip], [data.pick(people, i) for i in who[::-1]], 6, 32)
    assert [row["swapped"] for row in evaluation.measure([video[0]], clip, who, people)[0]] == [True, True]


def test_psnr_is_ten_log_ten_of_peak_two():
    a, mask = torch.zeros(3, 1, 2, 2), torch.tensor([[[1.0, 0], [0, 0]]])
    b = a.clone()
    b[:, 0, 0, 0] = 0.2
    b[:, 0, 1, 1] = 1  # outside the mask
    assert evaluation.psnr(a, b, mask) == pytest.approx(20)
    assert evaluation.psnr(a, b, mask * 0) is None


def test_only_the_head_counts():
    clip, who, people, video, mask = truth(0)
    elsewhere = video + 0.5 * (mask.amax(0) == 0)
    (row,) = evaluation.measure([elsewhere], clip, who, people)[0]
    assert row["psnr"] > 100


def test_the_command_prints_the_table_and_writes_every_case(tiny, tmp_path):
    said = run(
        ROOT / "eval.py",
        "--ckpt",
        tiny / "out" / "tiny",
        "--limit",
        5,
        "--settings",
        "none",
        "all",
        "--steps",
        1,
        "--out",
        "rows.jsonl",
        cwd=tmp_path,
    )
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {(r["case"], r["setting"]) for r in rows} == {
        (i, s) for i in (0, 20, 40, 60, 80) for s in ("none", "all")
    }
    persons = [p for r in rows if r["setting"] == "all" and r["case"] < 60 for p in r["people"]]
    mean = sum(p["psnr"] for p in persons) / 3
    line = next(line for line in said.splitlines() if line.split()[:2] == ["1", "all"])
    assert float(line.split()[3]) == pytest.approx(mean, abs=0.01)


def test_bad_limits(tmp_path):
    with pytest.raises(UserError, match="--limit 0"):
        evaluation.main(["--limit", "0"])
    assert run(ROOT / "eval.py", "--ckpt", "nowhere", cwd=tmp_path, fails=True).startswith(
        "eval.py: no checkpoint"
    )
