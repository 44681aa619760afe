"""Several processes equal one: prompts and cases split over ranks, and one forward over all of them."""

import contextlib
import io
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from dataclasses import replace

import av
import conftest
import numpy as np
import pytest
import torch
from conftest import ROOT, TIMEOUT, call

import eval as evaluation
import sample
from model import CONFIGS, HarmoView
from support import processes
from support.processes import Ulysses, World
from support.script import UserError

CPU = torch.device("cpu")
CKPT = ["--ckpt", ROOT / "assets" / "toy", "--precision", "fp32"]
PROMPTS = [("a close-up of one person in a red shirt nods with the mouth closed, a grey wall", 0),
           ("a close-up of one person turns away", 4),
           ("a close-up of two people, the first on the left nods, the second on the right turns", 1),
           ("one person", 2), ("two people", 3)]


def ranks(size, work):
    """work(world) in `size` forked processes of one gloo group: importing torch again would take seconds.
    -> what each returned."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    fork, ends, spawned = multiprocessing.get_context("fork"), [], []

    def child(rank, end):
        os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_PORT=str(port),
                           LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="localhost")
        processes.CORES = 1  # as many threads as one process has, so that the bits are the same
        try:
            world = World.join()
            end.send(work(world))
            world.leave()
        except BaseException:
            end.send(traceback.format_exc())
    for rank in range(size):
        mine, its = fork.Pipe()
        spawned.append(fork.Process(target=child, args=(rank, its), daemon=True))
        spawned[-1].start()
        ends.append(mine)
    results = [end.recv() if end.poll(TIMEOUT) else "no answer" for end in ends]
    for process in spawned:
        process.join(10)
        process.kill()
    bad = [text for text in results if isinstance(text, str) and ("Traceback" in text or text == "no answer")]
    assert not bad, bad
    return results


def torchrun(size, *command, cwd):
    """-> exit status, lines on stdout, the scripts' own lines on stderr (torchrun writes many more)."""
    status, out, errors = conftest.torchrun(size, *command, cwd=cwd)
    said = [line for line in errors.splitlines() if line.startswith(("sample.py:", "two.py:"))]
    return status, out.splitlines(), said


# ------------------------------------------------------------------------------------- prompts over the ranks
@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A folder with prompts and the videos that one process makes of them."""
    folder = tmp_path_factory.mktemp("one")
    lines = [json.dumps({"prompt": prompt, "seed": seed}) for prompt, seed in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    call("sample.py", *CKPT, "--prompts", "prompts.jsonl", "--out", "one", cwd=folder)
    return folder


def same_videos(folder, name):
    return all((folder / f"one-{n}.mp4").read_bytes() == (folder / f"{name}-{n}.mp4").read_bytes()
               for n in range(1, len(PROMPTS) + 1))


def as_rank(rank, size, folder, name, monkeypatch, *more):
    """What rank `rank` of `size` prints. Ranks that split prompts never wait for each other."""
    monkeypatch.setattr(World, "join", classmethod(lambda cls: World(rank, size, CPU)))
    monkeypatch.setattr(World, "leave", lambda self: None)
    return call("sample.py", *CKPT, "--prompts", "prompts.jsonl", "--out", name, *more, cwd=folder)


@pytest.mark.parametrize("size, videos_of_a_rank", [(2, [3, 2]), (3, [2, 2, 1]), (7, [1] * 5 + [0] * 2)])
def test_prompts_split_over_ranks_give_the_same_bits(one, size, videos_of_a_rank, monkeypatch):
    said = [as_rank(rank, size, one, f"of{size}", monkeypatch) for rank in range(size)]
    assert same_videos(one, f"of{size}")
    assert [text.count(".mp4") for text in said] == videos_of_a_rank
    assert "kernels:" in said[0] and not any("kernels" in text or "steps 4" in text for text in said[1:])
    assert all(text.count("\n") <= 1 for text in said[1:])  # the line of its round
    first = range(1, len(PROMPTS) + 1, max(videos_of_a_rank))
    assert {path.name for path in one.glob(f"of{size}*.png")} == {f"of{size}-{n}.png" for n in first}


def test_a_rank_has_more_than_one_round(one, monkeypatch):
    monkeypatch.setattr(sample, "ROUND", 1)
    said = [as_rank(rank, 2, one, "short", monkeypatch).splitlines() for rank in range(2)]
    assert same_videos(one, "short") and len(said[1]) == 2
    assert [line.split(" and ")[0] for line in said[1]] == ["short-2.mp4", "short-4.mp4"]


def test_a_video_does_not_depend_on_its_neighbours_caption(one, tmp_path, monkeypatch):
    """Nor on its length: in one process the two are one round."""
    long = "one person " + "nods and turns " * 30
    lines = [json.dumps({"prompt": prompt}) for prompt in (long, "one person")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    for size in (1, 2):
        for rank in range(size):
            as_rank(rank, size, tmp_path, f"of{size}", monkeypatch)
    for n in (1, 2):
        assert (tmp_path / f"of1-{n}.mp4").read_bytes() == (tmp_path / f"of2-{n}.mp4").read_bytes()


def test_export_is_written_by_one_rank(tmp_path, monkeypatch):
    for rank in (1, 0):
        monkeypatch.setattr(World, "join", classmethod(lambda cls: World(rank, 2, CPU)))
        call("sample.py", *CKPT[:2], "--export", "small", cwd=tmp_path)
        assert (tmp_path / "small").exists() == (rank == 0)


def test_torchrun_starts_it(one):
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:2])  # one thread each, as alone, on any machine: equal bits
    try:
        status, lines, said = torchrun(2, ROOT / "sample.py", *CKPT, "--prompts", "prompts.jsonl",
                                       "--out", "real", cwd=one)
    finally:
        os.sched_setaffinity(0, cores)
    assert status == 0 and same_videos(one, "real"), said
    assert len(lines) == 5 and sum(line.startswith("real-") for line in lines) == 2


# ----------------------------------------------------------------------------------------------------- errors
def test_an_error_of_all_ranks_is_said_once(tmp_path):
    status, lines, said = torchrun(2, ROOT / "sample.py", *CKPT, "--steps", "0", cwd=tmp_path)
    assert status != 0 and not lines
    assert len(said) == 1 and said[0].startswith("sample.py: --steps: got '0'")


def test_an_error_of_one_rank_ends_all(one):
    """Rank 1 cannot write; rank 0 would go on for an hour."""
    (one / "two.py").write_text(f"""import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import sample
from support import processes
from support.script import run_script
processes.PATIENCE = 0.1
def write(*_):
    if os.environ["RANK"] == "1":
        raise OSError("the disk is full")
    time.sleep(3600)
sample.write_round = write
run_script(sample.main)""")
    status, _, said = torchrun(2, "two.py", *CKPT, "--prompts", "prompts.jsonl", "--out", "bad", cwd=one)
    assert status != 0 and said == ["two.py: the disk is full"]


def test_another_ranks_own_error_is_said_after_a_while(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(processes.time, "sleep", waited.append)
    for rank in (0, 1):
        with pytest.raises(UserError, match="no such"), World(rank, 2, CPU).one_voice():
            print(f"from {rank}")
            print(f"error of {rank}", file=sys.stderr)
            raise UserError("no such file")
    assert waited == [processes.PATIENCE] and capsys.readouterr() == ("from 0\n", "error of 0\n")


@pytest.mark.parametrize("size, message", [
    (1, "--ulysses splits .* start with torchrun"),
    (4, "6 heads do not split over 4 processes: .*one of 2, 3, 6$"),
    (2, "--ulysses exchanges tokens inside a block: give it without --compile"),
])
def test_ulysses_refuses_what_does_not_work(one, size, message, monkeypatch):
    more = ["--compile"] if "--compile" in message else []
    with pytest.raises(UserError, match=message):
        as_rank(0, size, one, "never", monkeypatch, "--ulysses", *more)
    assert not list(one.glob("never*"))


# ---------------------------------------------------------------------------------------------------- ulysses
def network(name, **changes):
    """A preset with every parameter random, so that all of it counts, and inputs of one forward."""
    torch.manual_seed(0)
    model = HarmoView(replace(CONFIGS[name], **changes)).eval().requires_grad_(False)
    for p in model.parameters():
        p.data = torch.randn_like(p) / p.shape[-1] ** 0.5
    c = model.config
    views = [{"front": torch.randn(2, c.in_dim, 4, 4), "left": torch.randn(2, c.in_dim, 4, 4)}, {}]
    vit = [torch.randn(2, c.vit_levels, 5, c.vit_dim), None]
    inputs = torch.randn(2, c.in_dim, 3, 6, 4), torch.tensor([300.0, 900.0]), torch.randn(2, 7, c.text_dim)
    return model, inputs, views, vit


def forwards(model, inputs, views, vit):
    """Without references 18 tokens, with them more: 4 ranks do not divide either."""
    outputs = []
    with torch.no_grad():
        for given in ((None, None), (views, vit), ([{}], [None])):
            outputs.append(model(*inputs, *given))
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(model(*inputs, views, vit))
    return outputs


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("attention", ["joint", "one-way"])
@pytest.mark.parametrize("name, size", [("tiny", 2), ("toy", 2), ("toy", 4), ("toy64", 3)])
def test_a_forward_over_ranks_equals_one_process(name, size, attention):
    model, *inputs = network(name, reference_attention=attention)
    whole = forwards(model, *inputs)

    def work(world):
        ulysses = Ulysses(world, model.config.num_heads)
        ulysses.spread(model)
        outputs = forwards(model, *inputs)
        assert len(set(ulysses.lengths)) == 2 or 18 % size == 0  # uneven
        return [output.numpy() for output in outputs]
    for outputs in ranks(size, work):
        errors = [difference(torch.from_numpy(a), b) for a, b in zip(outputs, whole, strict=True)]
        print(name, size, errors)
        assert max(errors[:3]) < 1e-5 and errors[3] < 0.03


def test_ranks_without_a_token_take_part():
    """More ranks than tokens: one token of video on two ranks."""
    model, (_, t, text), *_ = network("tiny")
    x = torch.randn(2, model.config.in_dim, 1, 2, 2)
    with torch.no_grad():
        whole = model(x, t, text)

    def work(world):
        Ulysses(world, 2).spread(model)
        with torch.no_grad():
            return model(x, t, text).numpy()
    assert all(difference(torch.from_numpy(found), whole) < 1e-5 for found in ranks(2, work))


def test_ulysses_is_not_for_training():
    model, inputs, *_ = network("tiny")

    def work(world):
        Ulysses(world, 2).spread(model)
        try:
            model(*inputs)
        except AssertionError:
            return "refused"
    assert ranks(2, work) == ["refused"] * 2


def scripts(folder, commands):
    """A function for `ranks`: main() of each script and flags, one after the other -> what it printed."""
    def work(world):
        World.join, World.leave = lambda: world, lambda self: None
        os.chdir(folder)
        said = []
        for main, flags in commands:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                main([str(flag) for flag in flags])
            said.append(out.getvalue().splitlines())
        return said
    return work


def test_sampling_with_ulysses(one):
    flags = [*CKPT, "--prompts", "prompts.jsonl", "--ulysses", "--out"]
    first, second = ranks(2, scripts(one, [(sample.main, [*flags, "uly"]),
                                           (sample.main, [*flags, "off", "--offload"])]))
    assert [len(said) for said in (*first, *second)] == [4, 4, 0, 0]  # and rank 0 alone wrote
    assert (one / "uly.png").exists()
    for n in range(1, len(PROMPTS) + 1):
        whole, *others = (pixels(one / f"{name}-{n}.mp4") for name in ("one", "uly", "off"))
        assert all((whole - other).abs().mean() < 0.5 for other in others)


def pixels(path):
    """Frames of an MP4, 0..255."""
    with av.open(str(path)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).float()


# -------------------------------------------------------------------------------------- the benchmark's cases
def test_eval_over_ranks_gives_the_same_table(tmp_path):
    """Four batches for two ranks, of which one was measured before; and nothing is missing for three."""
    flags = [*CKPT, "--limit", "4", "--settings", "front", "--batch", "1", "--steps", "1", "--out"]
    whole = call("eval.py", *flags, "one", cwd=tmp_path).splitlines()
    lines = (tmp_path / "one" / "measured.jsonl").read_text().splitlines()
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "measured.jsonl").write_text("\n".join(lines[:2]) + "\n" + lines[2][:50])
    said, nothing = ranks(2, scripts(tmp_path, [(evaluation.main, [*flags, "two"])]))
    assert nothing == [[]]
    assert table_of(said[0]) == table_of(whole)
    again = (tmp_path / "two" / "measured.jsonl").read_text().splitlines()
    assert sorted(again) == sorted([*lines, lines[2][:50]])
    one, two = (tmp_path / name / "report.html" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def table_of(lines):
    """Without which checkpoint it is, and the time."""
    return [line for line in lines if not line.startswith(("checkpoint", "one/", "two/"))]


def test_two_machines_start_again_after_one_lost_its_process(tmp_path):
    """Two torchruns of one process each, as on two machines. Each counts its own restarts; both find each
    other again."""
    (tmp_path / "script.py").write_text(f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
from support.processes import World
world = World.join()
world.barrier()
if world.rank == 1 and not os.path.exists("died"):
    open("died", "w").close()
    os._exit(1)
for _ in range(3):
    world.barrier()
open(f"done-{{world.rank}}-" + os.environ["TORCHELASTIC_RESTART_COUNT"], "w").close()
world.leave()
""")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "two",
               "--max-restarts", "3", "script.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    machines = [subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.DEVNULL) for _ in range(2)]
    try:
        assert [machine.wait(TIMEOUT) for machine in machines] == [0, 0]
    finally:
        for machine in machines:
            machine.terminate()
    assert len(list(tmp_path.glob("done-*"))) == 2  # their counts of restarts may differ
