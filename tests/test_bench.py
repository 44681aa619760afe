import re

import pytest
from conftest import ROOT, call, run

from measure import speed
from rope import VIEWS
from support.script import UserError


@pytest.mark.parametrize("what, flags", [("train", ["--recompute"]), ("forward", ["--no-fused"])])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bench_prints_its_table(what, flags, precision, tmp_path):
    said = call("eval.py", "speed", what, "--config", "tiny", "--precision", precision, *flags, cwd=tmp_path)
    for part in ("seconds a step", "tokens/s", "model TFLOP/s", "peak memory"):
        assert part in said
    assert ("torch.bfloat16 matmul" in said) == (precision == "bf16")
    assert not any(tmp_path.iterdir())


def test_dry_run_needs_no_weights(wan, tmp_path):
    said = call("eval.py", "speed", "dry-run", "--ckpt", "1.3b", cwd=tmp_path)
    own = re.search(r"transformer +([\d,]+) parameters, ([\d,]+) of them HarmoView's own; x 1", said)
    total, own = (int(number.replace(",", "")) for number in own.groups())
    assert total - own == 1_418_996_800
    assert "5,680,910,336" in said and "126,892,531" in said and "32,760 tokens" in said
    refs = ["--refs", "a_front.png", "a_left.png", "--refs", "b_front.png"]
    said = call("eval.py", "speed", "dry-run", "--ckpt", "14b", *refs, cwd=tmp_path)
    assert f"with references {32_760 + 3 * 1560 + 5 * 16:,}" in said and "2 forwards a step" in said
    said = call("eval.py", "speed", "dry-run", "--ckpt", wan / "2.2", "--size", "64x64", cwd=tmp_path)
    assert "x 2 expert(s)" in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("config, gigabytes", [("14b", 10.2), ("1.3b", 2.3)])
def test_the_dry_run_counts_what_one_way_references_keep(config, gigabytes, tmp_path):
    refs = [word for k in "ab" for word in ("--refs", *(f"{k}_{view}.png" for view in VIEWS))]
    command = ["eval.py", "speed", "dry-run", "--ckpt", config, *refs]
    joint, kept = call(*command, "--reference-attention", "joint", cwd=tmp_path), call(*command, cwd=tmp_path)
    assert f"kept, {gigabytes} GB for given views" in kept and "one-way" not in joint
    memory, tflop = ([float(re.search(words, said)[1].replace(",", "")) for said in (joint, kept)]
                     for words in (r"denoising, bf16 +([\d.]+) GiB", r"([\d,]+) TFLOP a forward"))
    assert memory[1] - memory[0] == pytest.approx(gigabytes * 1e9 / 2**30, rel=0.03)
    assert tflop[0] / tflop[1] == pytest.approx(1.38, abs=0.01)  # shared/PERF.md


def test_references_are_timed_side_by_side(tmp_path):
    said = call("eval.py", "speed", "references", "--config", "tiny", "--people", "2", cwd=tmp_path)
    line = r"^(joint|one-way|one-way, kept) +\S+ s, +([\d.]+) x as fast as joint; by FLOPs +([\d.]+) x$"
    rows = re.findall(line, said, re.M)
    assert [row[0] for row in rows] == ["joint", "one-way", "one-way, kept"]
    assert 1 == float(rows[0][2]) < float(rows[1][2]) < float(rows[2][2])


def test_offload_and_tiles_need_less(tmp_path):
    def phases(*flags):
        said = call("eval.py", "speed", "dry-run", "--ckpt", "14b", *flags, cwd=tmp_path)
        return [float(number) for number in re.findall(r"([\d.]+) GiB", said)]

    plain, less = phases(), phases("--offload", "--tile", "256")
    assert len(plain) == 5
    for phase in (0, 1, 3, 4):  # the ViT is held whole
        assert less[phase] < 0.6 * plain[phase]


BAD = [
    ("", "required"),
    ("dry-run --ckpt toy", "the dry run is for Wan's sizes"),
    ("dry-run --ckpt nowhere", "no checkpoint at nowhere"),
    ("dry-run --ckpt .", "no checkpoint at ."),
    ("dry-run --refs a.png", "a.png: which view is it"),
    ("dry-run" + " --refs a_front.png" * 3, "3 people .* at most 2"),
    ("dry-run --frames 80", "80 frames of 480x832: expected 4n\\+1"),
    ("dry-run --size 40x0", "81 frames of 40x0: expected"),
    ("dry-run --tile 20", "VAE tile 20"),
    ("forward --config huge", "invalid choice: 'huge'"),
    ("forward --size 30", "30x30: expected multiples of 8"),
    ("forward --size 0", "0x0: expected multiples of 8"),
    ("forward --size 40by40", "expected HEIGHTxWIDTH"),
    ("forward --batch 1000000", "--batch: got '1000000', expected 1 to 1024 samples"),
    ("train --batch 10000000", "--batch: got '10000000', expected 1 to 1024 samples"),
    ("references --batch 1025", "--batch: got '1025'"),
    ("forward --frames 10000000", "--frames: got '10000000', expected 1 to 10001 frames"),
    ("plan --frames 10000000", "--frames: got '10000000'"),
    ("dry-run --size 99968x99968", "--size: got '99968x99968'.*at most 8192 a side"),
    ("forward --batch 0", "--batch: got '0'"),
    ("train --frames 1e3", "--frames: got '1e3'"),
    ("train --config 1.3b --frames 6", "6 frames of 256x256: expected 4n\\+1"),
]


@pytest.mark.parametrize("arguments, says", BAD)
def test_bad_input_gets_one_clear_line(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        speed.main(arguments.split())
    assert re.search(says, str(error.value)) and "\n" not in str(error.value)


def test_the_script_exits_with_that_line(tmp_path):
    line = run(ROOT / "eval.py", "speed", "dry-run", "--ckpt", "nowhere", cwd=tmp_path, fails=True)
    assert line.startswith("eval.py: no checkpoint at nowhere")
