"""The tables of times, and of the memory that is planned from shapes."""

import re
from dataclasses import replace

import pytest
from conftest import call

from measure import speed
from model import CONFIGS


@pytest.mark.parametrize("what, precision, flags", [("train", "fp32", ["--recompute"]),
                                                    ("forward", "bf16", ["--no-fused"])])
def test_times_are_a_table(what, precision, flags, tmp_path):
    said = call("eval.py", "speed", what, "--config", "tiny", "--precision", precision, *flags, cwd=tmp_path)
    for part in ("seconds a step", "tokens/s", "model TFLOP/s", "peak memory"):
        assert part in said
    assert ("torch.bfloat16 matmul" in said) == (precision == "bf16")
    assert not any(tmp_path.iterdir())


def plan(*flags, cwd):
    return call("eval.py", "speed", "plan", *flags, cwd=cwd)


def test_a_plan_needs_no_weights(tmp_path):
    said = plan("--config", "14b", "--people", "2", "--views", "3", cwd=tmp_path)
    total, own = (int(re.search(words, said)[1].replace(",", ""))
                  for words in (r"transformer +([\d,]+) parameters", r"([\d,]+) are HarmoView's own"))
    assert total - own == 14_288_491_584  # a released expert's
    assert "5,680,910,336" in said and "126,892,531" in said and "2 forwards a step" in said
    assert f"32,760 tokens, with references {32_760 + 6 * 1560 + 2 * 16:,}" in said


@pytest.mark.parametrize("config, gigabytes", [("14b", 10.2), ("1.3b", 2.3)])
def test_a_plan_counts_what_one_way_references_keep(config, gigabytes, tmp_path, monkeypatch):
    kept = plan("--config", config, "--people", "2", cwd=tmp_path)
    monkeypatch.setitem(CONFIGS, config, replace(CONFIGS[config], reference_attention="joint"))
    joint = plan("--config", config, "--people", "2", cwd=tmp_path)
    assert f"kept, {gigabytes} GB for given views" in kept and "one-way" not in joint
    memory, tflop = ([float(re.search(words, said)[1].replace(",", "")) for said in (joint, kept)]
                     for words in (r"denoising, bf16 +([\d.]+) GiB", r"([\d,]+) TFLOP a forward"))
    assert memory[1] - memory[0] == pytest.approx(gigabytes * 1e9 / 2**30, rel=0.03)
    assert tflop[0] / tflop[1] == pytest.approx(1.38, abs=0.01)  # shared/PERF.md


def test_offload_and_tiles_need_less(tmp_path):
    plain, less = ([float(number) for number in re.findall(r"([\d.]+) GiB", plan(*flags, cwd=tmp_path))]
                   for flags in (["--config", "14b"], ["--config", "14b", "--offload", "--tile", "256"]))
    assert len(plain) == 5
    for phase in (0, 1, 3, 4):  # the ViT is held whole
        assert less[phase] < 0.6 * plain[phase]


def test_frozen_weights_and_more_cards_need_less(tmp_path):
    rows = re.findall(r"^(all|new|lora) +([\d,]+) +(.*)$", plan("--config", "1.3b", cwd=tmp_path), re.M)
    needs = {what: [float(n.replace(",", "")) for n in cells.split()] for what, _, cells in rows}
    assert all(needs["lora"][k] < needs["all"][k] for k in (0, 1)) and len(needs) == 3
    assert needs["all"][1] > needs["all"][2] > needs["all"][-1] and len(needs["all"]) == 2 + len(speed.SHARDS)
