import functools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path

import conftest
import pytest
import safetensors.torch
import torch
from conftest import ROOT, TIMEOUT, WAN_SMALL, call, run
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import data
import sample
import train
from measure import speed
from model import CHOICES, CONFIGS, DiTConfig, HarmoView, load_checkpoint, load_wan
from networks import solvers, weights
from networks.lora import NEW_PREFIXES, new_names
from rope import VIEWS
from support import monitor, optimizers, processes, script
from support.checkpoints import find_checkpoint, steps_in
from support.script import UserError
from videos import toy
from videos.encode import names_in, read_sample

FAST = ("--config", "tiny", "--no-samples", "--log-every", 1)
LAST = len(train.STAGES)


@pytest.fixture
def fresh(tiny, tmp_path):
    """A folder of its own with the tiny preset's cache, so that nothing is rendered again."""
    shutil.copytree(tiny / "cache", tmp_path / "cache")
    return tmp_path


def metrics(folder, stage):
    """Lines of training, without what depends on the machine."""
    lines = [json.loads(line) for line in (folder / f"stage{stage}/metrics.jsonl").read_text().splitlines()]
    known = {"stage", "step", "loss", "grad_norm", "lr_factor"}
    return [{name: line[name] for name in known} for line in lines if "loss" in line]


def validations(folder, stage):
    lines = [json.loads(line) for line in (folder / f"stage{stage}/metrics.jsonl").read_text().splitlines()]
    return [line["valid"] for line in lines if "valid" in line]


def weights_of(folder):
    found = find_checkpoint(folder)
    # from bytes: load_file would map the files, which some tests then damage
    return {f.name: safetensors.torch.load(f.read_bytes()) for f in sorted(found.glob("*.safetensors"))}


def assert_equal(a, b):
    assert a.keys() == b.keys() == {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}
    for file in a:
        assert a[file].keys() == b[file].keys()
        assert all(torch.equal(a[file][key], b[file][key]) for key in a[file]), file


# ----------------------------------------------------------------------------------------------- equivalences
def test_accumulation_and_two_processes_equal_the_full_batch(fresh):
    """The same global batch, by one process at once, in micro-steps, and by two gloo processes."""
    common = [*map(str, FAST), "--stage", "1", "--steps", "3", "--precision", "fp32", "--out"]
    micro = ["--micro-batch", "1"]
    call("train.py", *common, "whole", cwd=fresh)
    call("train.py", *common, "micro", *micro, cwd=fresh)
    # both in one torchrun, which imports torch three times
    well, said = in_one_group(fresh, f"""
train.main({[*common, "two"]})
train.main({[*common, "both", *micro]})""")
    assert well, said
    found = {
        name: ([(r["loss"], r["grad_norm"]) for r in metrics(fresh / name, 1)], weights_of(fresh / name))
        for name in ("whole", "micro", "two", "both")
    }
    for name in ("micro", "two", "both"):
        for a, b in zip(found["whole"][0], found[name][0], strict=True):
            assert a == pytest.approx(b, rel=1e-4), name
        whole, other = (found[n][1]["model.safetensors"] for n in ("whole", name))
        assert distance(whole, other) < 1e-6, name


@pytest.mark.parametrize("batch, processes, fits",
                         [(16, 6, 4), (16, 5, 4), (7, 2, 1), (12, 8, 6), (16, 32, 16)])
def test_a_batch_that_does_not_split_names_the_processes_that_fit(batch, processes, fits):
    args = train.arguments(["--config", "tiny", "--batch", str(batch)])
    with pytest.raises(UserError, match=f"does not split over {processes} .*--nproc-per-node {fits}$"):
        train.resolve(args, train.World(0, processes, torch.device("cpu")))


@pytest.mark.parametrize("gpus, left", [(1, [1]), (2, [])])
def test_processes_without_a_gpu_of_their_own_leave_quietly(gpus, left, monkeypatch, capsys):
    """README's two processes on a machine with one GPU and with two."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(processes.dist, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(processes, "rendezvous", lambda *args: iter([(processes.dist.HashStore(),)]))
    gone = []
    for rank in (0, 1):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        try:
            assert train.World.join() == train.World(rank, gpus, torch.device("cuda", rank))
        except SystemExit as end:
            assert end.code == 0
            gone.append(rank)
    assert gone == left and ("1 of 2 processes work" in capsys.readouterr().out) == bool(left)
    monkeypatch.setenv("WORLD_SIZE", "8")  # on several machines that would leave different ranks on each
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match=f"4 processes on a machine with {gpus} GPU.*--nproc-per-node {gpus}"):
        train.World.join()


def test_torchruns_one_thread_becomes_this_machines_share(monkeypatch):
    monkeypatch.setattr(processes.dist, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(processes, "rendezvous", lambda *args: iter([(processes.dist.HashStore(),)]))
    monkeypatch.setattr(processes, "CORES", 8)
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    for name, value in (("RANK", 0), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2), ("OMP_NUM_THREADS", 1)):
        monkeypatch.setenv(name, str(value))
    train.World.join()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's own choice stays
    train.World.join()
    assert threads == [4]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_equal_runs_give_equal_bits(fresh, precision):
    arguments = [*FAST, "--stage", 1, "--steps", 4, "--precision", precision]
    for out in ("a", "b"):
        call("train.py", *arguments, "--out", out, cwd=fresh)
    assert_equal(weights_of(fresh / "a"), weights_of(fresh / "b"))
    assert metrics(fresh / "a", 1) == metrics(fresh / "b", 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_bit_exact(fresh, precision):
    out = fresh / "out" / "tiny"
    command = [*FAST, "--stage", 1, "--steps", 6, "--save-every", 3, "--precision", precision]
    call("train.py", *command, cwd=fresh)
    straight, lines = weights_of(out / "stage1"), metrics(out, 1)
    shutil.rmtree(out / "stage1" / "step-000006")
    call("train.py", *command, "--resume", cwd=fresh)
    assert_equal(straight, weights_of(out / "stage1"))
    assert metrics(out, 1) == lines and len(validations(out, 1)) == 1
    call("train.py", *command, "--resume", cwd=fresh)  # nothing left to do
    assert_equal(straight, weights_of(out / "stage1"))


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(fresh, capsys):
    out = fresh / "out" / "tiny" / "stage1"
    command = [*FAST, "--stage", 1, "--steps", 6, "--save-every", 2, "--keep", 3]
    call("train.py", *command, cwd=fresh)
    straight = weights_of(out)
    (out / "step-000006" / "optimizer.safetensors").write_bytes(b"")
    file = out / "step-000004" / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    call("train.py", *command, "--resume", cwd=fresh)
    assert_equal(straight, weights_of(out))
    errors = capsys.readouterr().err
    assert "step-000006/optimizer.safetensors is missing or damaged" in errors and "step-000004" in errors


@pytest.mark.parametrize("sent, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_sigterm_and_ctrl_c_save_and_the_run_can_go_on(fresh, sent, code):
    """After Ctrl-C, `train.py && sample.py` does not go on; a scheduler's SIGTERM is no failure."""
    out, steps = fresh / "out" / "tiny", 60
    arguments = [*FAST, "--stage", 1, "--steps", steps]
    call("train.py", *arguments, cwd=fresh)
    straight = weights_of(out / "stage1")
    shutil.rmtree(out)
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, arguments)], cwd=fresh,
                               stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    log, latest = out / "stage1" / "metrics.jsonl", time.monotonic() + TIMEOUT
    try:
        while not (log.exists() and log.read_text().count("\n") >= 3):
            time.sleep(0.02)
            assert process.poll() is None and time.monotonic() < latest
        process.send_signal(sent)
        # after Ctrl-C, what was to follow (`train.py && sample.py`) does not
        assert process.wait(TIMEOUT) == (0 if sent == signal.SIGTERM else 130)
    finally:
        process.kill()
    step = json.loads((find_checkpoint(out) / "checkpoint.json").read_text())["step"]
    assert 3 <= step < steps
    with pytest.raises(UserError, match=f"stopped at step {step}.*--stage 1.*--resume"):
        call("train.py", *FAST, "--stage", 2, cwd=fresh)
    call("train.py", *arguments, "--resume", cwd=fresh)
    assert_equal(straight, weights_of(out / "stage1"))


# --------------------------------------------------------------------------------------------------- the loop
def test_every_stage_starts_from_the_one_before(tiny):
    out = tiny / "out" / "tiny"
    for number, stage in train.STAGES.items():
        meta = json.loads((find_checkpoint(out / f"stage{number}") / "checkpoint.json").read_text())
        assert (meta["stage"], meta["name"], meta["step"], meta["finished"]) == (number, stage.name, 2, True)
        assert meta["config"] == vars(CONFIGS["tiny"]) and "train.py" in meta["command"]
    assert load_checkpoint(find_checkpoint(out))[1]["stage"] == max(train.STAGES)
    args = train.arguments(["--config", "tiny", "--out", str(out)])
    world = train.World(0, 1, torch.device("cpu"))
    _, config = train.resolve(args, world)
    start = train.prepare(2, Namespace(**{**vars(args), "overwrite": True}), config, world)
    ema = weights_of(out / "stage1")["ema.safetensors"]
    assert start.step == 0 and all(torch.equal(p, ema[name]) for name, p in start.model.named_parameters())


def test_vit_levels_that_do_not_fit_are_said_before_rendering(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "VIT_LEVELS", (0, 1, 3))
    with pytest.raises(UserError, match="reads 2 levels of the ViT, toy.VIT_LEVELS names 3: set vit_levels"):
        call("train.py", *FAST, "--stage", 1, cwd=tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_stage_more_is_a_row_more(fresh, monkeypatch):
    last = max(train.STAGES)
    monkeypatch.setitem(train.STAGES, last + 1, replace(train.STAGES[last], name="polish"))
    call("train.py", "--config", "tiny", "--no-samples", cwd=fresh)
    folder = find_checkpoint(fresh / "out" / "tiny")
    meta = json.loads((folder / "checkpoint.json").read_text())
    assert folder.parent.name == f"stage{last + 1}" and meta["finished"]
    assert (meta["name"], meta["step"]) == ("polish", 2)


def test_a_log_has_a_line_every_few_steps_and_says_at_its_end_what_is_next(fresh, capsys):
    said = call("train.py", *FAST, "--stage", 1, "--steps", 5, "--log-every", 2, cwd=fresh)
    lines = re.findall(r"stage 1 t2v: (\d) of 5 steps, [\d.e-]+ s each, 0:\d\d:\d\d left, loss \d",
                       capsys.readouterr().err)
    assert lines == ["2", "4", "5"]
    newest = "out/tiny/stage1/step-000005"
    assert said.endswith(f"the newest checkpoint is {newest}; now `python sample.py --ckpt out/tiny`\n")


@pytest.mark.parametrize("job, says", [
    ({"refs": [["gone_front.png"]]}, "gone_front.png: no such file"),
    ({"refs": [["text_front.png"]]}, "text_front.png: not a readable picture"),
    ({"refs": [["face.png"]]}, "face.png: which view is it"),
    ({"refs": [["a_front.png"]] * 3}, "3 people .* holds at most 2"),
    ({"refs": [["a_front.png", "front=face.png"]]}, "a second front view"),
])
def test_jobs_of_sheets_are_refused_before_the_stage(job, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text_front.png").write_text("no picture")
    for name in ("face.png", "a_front.png"):
        Image.new("RGB", (16, 16)).save(name)
    Path("jobs.jsonl").write_text(json.dumps({"prompt": "x"} | job))
    with pytest.raises(UserError, match=says):
        train.main(["--config", "tiny", "--sample-prompts", "jobs.jsonl"])
    assert not Path("cache").exists()


def sheets_command(monkeypatch, tmp_path, **ends):
    """The command of a Wan run's sheet of a set of 17 frames of 32x48, which ends in that way."""
    asked = []

    def run(command, **_):
        asked.append(list(map(str, command)))
        if "timeout" in ends:
            raise subprocess.TimeoutExpired(command, ends["timeout"])
        return subprocess.CompletedProcess(command, ends["code"])
    monkeypatch.setattr(monitor.subprocess, "run", run)
    args = train.arguments(["--config", "1.3b", "--sample-prompts", "jobs.jsonl"])
    monitor.write_sheet(tmp_path, 5, True, args, CONFIGS["1.3b"], (16, 5, 4, 6))
    return asked[0]


def test_wans_sheets_have_the_sets_size_and_frames(monkeypatch, tmp_path, capsys):
    command = sheets_command(monkeypatch, tmp_path, code=0)
    assert command[command.index("--frames") + 1] == "17" and command[command.index("--size") + 1] == "32x48"
    assert not capsys.readouterr().err


@pytest.mark.parametrize("ends, says", [({"code": 1}, "sample.py ended with 1"),
                                        ({"timeout": 3000}, "it took over 50 minutes and was ended")])
def test_a_sheet_that_fails_is_said(ends, says, monkeypatch, tmp_path, capsys):
    sheets_command(monkeypatch, tmp_path, **ends)
    error = capsys.readouterr().err
    assert "no sample sheet" in error and says in error and error.count("\n") == 1


@pytest.mark.parametrize("flag", ["--batch=1000000", "--micro-batch=1000000", "--rank=100000"])
def test_numbers_that_no_memory_holds_are_refused_at_once(flag):
    with pytest.raises(UserError, match=f"{flag.split('=')[0]}: got .*, expected 1 to"):
        train.arguments(["--config", "tiny", flag])


def test_a_stage_ends_with_a_sample_sheet(fresh):
    out = fresh / "out" / "tiny" / "stage1"
    call("train.py", "--config", "tiny", "--stage", 1, "--steps", 1, cwd=fresh)
    assert (out / "sample.png").exists() and sorted(p.name for p in out.glob("sample-*.mp4")) == [
        f"sample-{i}.mp4" for i in (1, 2, 3)  # without references no case twice
    ]


def test_the_loss_is_of_the_velocity_on_the_straight_path():
    """Each sample at its own noise level; text, refs and features are passed on."""
    x0, noise, off = torch.randn(3, 2, 4, 3, 6, 2, generator=torch.Generator().manual_seed(0))
    sigma, others = torch.tensor([0.3, 0.9]), ("text", "refs", "vit")

    def model(x, t, *rest):
        assert rest == others and t.tolist() == pytest.approx([300, 900])
        for s, found, a, b in zip((0.3, 0.9), x, x0, noise, strict=True):
            torch.testing.assert_close(found, (1 - s) * a + s * b)
        return noise - x0 + off
    loss = train.loss_of(model, (x0, *others), sigma, noise)
    assert float(loss) == pytest.approx(float(off.square().mean()), rel=1e-5)


def test_one_clip_can_be_overfitted(tiny):
    """80 steps on one clip with one person, then sampling from noise gives that clip."""
    torch.manual_seed(0)
    dataset = data.Dataset(next((tiny / "cache").glob("toy-*-cross-mask0-*")), text_dropout=0)
    bucket = dataset.sampler.having((VIEWS,))
    model = HarmoView(replace(CONFIGS["tiny"], dim=96, ffn_dim=192))
    pair = optimizers.make_optimizers(
        model, Namespace(optimizer="muon", muon_lr=1e-2, adamw_lr=3e-3, new_lr=3e-3, weight_decay=0.0)
    )
    for step in range(80):
        generators = [torch.Generator().manual_seed(train.seed_of(step, i)) for i in range(4)]
        batch = dataset.batch((VIEWS,), 4 * [0], bucket, generators, "cpu")
        train.loss_of(model, batch, *train.draw_noise(batch[0], generators, data.NoiseLevels(8.0))).backward()
        for optimizer in pair:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * (1 - step / 80)
            optimizer.step()
            optimizer.zero_grad()
    x0, text, refs, vit = dataset.batch((VIEWS,), [0], bucket, [torch.Generator().manual_seed(0)], "cpu")
    noise = torch.randn(x0.shape)
    with torch.no_grad():
        velocity = sample.guided(model, text, text, (refs, vit), sample.SAMPLE_RECIPES["toy"])
        made = solvers.solve(velocity, noise, 8, 8.0, "euler")
    psnr = float(10 * torch.log10(4 / (made - x0).square().mean()))
    assert psnr > 22, psnr


def test_learning_rate_clipping_and_average_of_every_step(fresh):
    """Against numbers derived by hand from the flags, and against what the optimizers really get."""
    steps = []  # of every optimizer's: learning rate over the peak, norm of its gradients

    def see(optimizer, *_):
        (group,) = optimizer.param_groups
        grads = [p.grad for p in group["params"] if p.grad is not None]
        steps.append((group["lr"] / group["peak_lr"], float(torch.nn.utils.get_total_norm(grads))))
    hook = register_optimizer_step_pre_hook(see)
    try:
        call("train.py", *FAST, "--stage", 1, "--steps", 4, "--warmup", 2, "--lr-span", 1, 0.5, "--ema", 0.2,
             "--clip", 0.01, "--save-every", 1, "--keep", 4, "--precision", "fp32", cwd=fresh)
    finally:
        hook.remove()
    lines = metrics(fresh / "out" / "tiny", 1)
    # half of the peak in the first of two warm-up steps; from 1 to 0.5 an eighth less at every step
    factors = [0.5 * 1, 0.875, 0.75, 0.625]
    assert [line["lr_factor"] for line in lines] == pytest.approx(factors)
    assert len(steps) == 8  # AdamW's and Muon's
    assert [lr for lr, _ in steps] == pytest.approx([factor for factor in factors for _ in range(2)])
    for line, (_, one), (_, other) in zip(lines, steps[::2], steps[1::2], strict=True):
        assert line["grad_norm"] > 0.02 and math.hypot(one, other) == pytest.approx(0.01, rel=1e-3)
    torch.manual_seed(0)
    before = HarmoView(CONFIGS["tiny"]).state_dict()
    for step, decay in enumerate((1 / 10, 2 / 11, 0.2, 0.2), 1):  # 3 / 12 and 4 / 13 are more than --ema
        found = weights_of(fresh / "out" / "tiny" / "stage1" / f"step-{step:06d}")
        new, average = found["model.safetensors"], found["ema.safetensors"]
        assert distance(before, new) > 1e-4
        for name in average:
            expected = torch.lerp(before[name], new[name], 1 - decay)
            torch.testing.assert_close(average[name], expected, atol=1e-7, rtol=1e-6)
        before = average


def test_what_wan_lacks_learns_at_a_rate_of_its_own():
    """For Wan ten times its rate, whatever else trains; for the toy as all the rest. Flags win."""
    def rates(config, *flags):
        args = train.arguments(["--config", config, "--data", str(ROOT), "--wan", "w", *flags])
        monkeypatched = {"encoded_set": lambda folder: folder}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in monkeypatched.items():
                patch.setattr(train, name, value)
            train.resolve(args, train.World(0, 1, torch.device("cpu")))
        model = HarmoView(replace(CONFIGS["tiny"], num_layers=1))
        train.set_trained(model, args.train, 2)
        found = {id(p): group["peak_lr"] for optimizer in train.make_optimizers(model, args, new_names(model))
                 for group in optimizer.param_groups for p in group["params"]}
        names = {"proxies": "proxies", "mfi": "mfi.proj.weight", "head": "head.head.weight",
                 "q": "blocks.0.self_attn.q.weight", "adapter": "blocks.0.self_attn.q.lora_A"}
        parameters = dict(model.named_parameters())
        return {short: found.get(id(parameters.get(name))) for short, name in names.items()}
    assert rates("1.3b") == {"proxies": 1e-4, "mfi": 1e-4, "head": 1e-5, "q": 1e-5, "adapter": None}
    assert rates("14b", "--train", "lora") == {"proxies": 1e-4, "mfi": 1e-4, "head": None, "q": None,
                                               "adapter": 1e-4}
    assert rates("14b", "--train", "lora", "--adamw-lr", "3e-5")["adapter"] == 3e-5
    assert rates("1.3b", "--new-lr", "1e-3", "--adamw-lr", "2e-5") == {
        "proxies": 1e-3, "mfi": 1e-3, "head": 2e-5, "q": 2e-5, "adapter": None}
    assert rates("toy") == {"proxies": 4e-3, "mfi": 4e-3, "head": 4e-3, "q": 16e-3, "adapter": None}


def test_muon_makes_updates_orthogonal():
    """Newton-Schulz against the SVD: singular values near 1, vectors kept, for wide and tall alike."""
    torch.manual_seed(0)
    for shape in ((3, 24, 48), (2, 48, 24)):
        x = torch.randn(shape)
        u, s, v = torch.linalg.svd(optimizers.orthogonalize(x), full_matrices=False)
        assert 0.6 < s.min() and s.max() < 1.3
        a, _, b = torch.linalg.svd(x, full_matrices=False)
        assert ((optimizers.orthogonalize(x) - a @ b).norm() / (a @ b).norm()) < 0.35


def step_all(parameters, optimizers, steps=4):
    """Optimizer steps with gradients of sizes that change, the same at every call."""
    g = torch.Generator().manual_seed(1)
    for size in torch.linspace(1, 3, steps):
        for p in parameters:
            p.grad = size * torch.randn(p.shape, generator=g)
        for optimizer in optimizers:
            optimizer.step()


def test_our_muon_is_torchs(monkeypatch):
    shapes, found = ((8, 16), (16, 8), (8, 16), (24, 24), (5, 40)), []
    for kind, more in ((optimizers.Muon, {}), (torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw"})):
        torch.manual_seed(0)
        found.append([torch.nn.Parameter(torch.randn(shape)) for shape in shapes])
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # torch's multiplies in bf16
        step_all(found[-1], [kind(found[-1], lr=0.1, weight_decay=0.1, **more)])
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_has_its_optimizer_rate_and_decay(optimizer, monkeypatch):
    """Muon has the blocks' matrices, AdamW the rest and, where asked, all; what is frozen stays."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    args = Namespace(optimizer=optimizer, muon_lr=0.02, adamw_lr=0.004, new_lr=0.001, weight_decay=0.3)
    ours, theirs, separate = HarmoView(CONFIGS["tiny"]), HarmoView(CONFIGS["tiny"]), []
    theirs.load_state_dict(ours.state_dict())
    frozen = {"blocks.0.ffn.0.weight", "patch_embedding.weight"}
    for net in (ours, theirs):
        for name in frozen:
            net.get_parameter(name).requires_grad_(False)
    for name, p in theirs.named_parameters():
        if name in frozen:
            continue
        if optimizer == "muon" and name.startswith("blocks.") and name.endswith(".weight") and p.ndim == 2:
            assert re.search(r"attn\.[qkvo]\.|ffn\.[02]\.", name)
            separate.append(torch.optim.Muon([p], 0.02, 0.3, adjust_lr_fn="match_rms_adamw"))
        else:
            rate = 0.001 if name.startswith(NEW_PREFIXES) else 0.004
            separate.append(torch.optim.AdamW([p], rate, (0.9, 0.95), weight_decay=0.3))
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    made = optimizers.make_optimizers(ours, args, new_names(ours))
    step_all([p for p in ours.parameters() if p.requires_grad], made)
    step_all([p for p in theirs.parameters() if p.requires_grad], separate)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, before[name]) == (name in frozen)
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["toy", "base", "base64", "base-plain"])
def test_the_commands_that_made_the_shipped_networks_mean_what_they_meant(name, tmp_path, monkeypatch):
    """All that is not in the command is a default, of a flag or of a recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "STAGES", {n: train.STAGES[n] for n in (1, 2, 3, 4)})  # what there was then
    meta = json.loads((ROOT / "assets" / name / "checkpoint.json").read_text())
    words = meta["command"].split()[1:]
    args = train.arguments([*words, "--precision", "bf16", "--config", meta["preset"]])
    train.resolve(args, train.World(0, 1, torch.device("cpu")))
    flags = train.step_flags(args, meta["stage"])
    assert {name: flags[name] for name in meta["flags"] if name in flags} == {
        name: value for name, value in meta["flags"].items() if name not in ("no_curriculum", "lr_span")}
    assert flags["stage lr"] == (meta["flags"]["lr_span"] or list(train.STAGES[meta["stage"]].lr))


def test_noise_levels_are_shifted_logit_normals():
    x0 = torch.zeros(4000, 1, 1, 1, 1)
    generators = [torch.Generator().manual_seed(i) for i in range(4000)]
    sigma, noise = train.draw_noise(x0, generators, data.NoiseLevels(1.0))
    generators = [torch.Generator().manual_seed(i) for i in range(4000)]
    shifted, same = train.draw_noise(x0, generators, data.NoiseLevels(3.0))
    assert (
        torch.equal(noise, same)
        and abs(float(sigma.logit().std()) - 1) < 0.05
        and abs(float(sigma.mean()) - 0.5) < 0.02
    )
    torch.testing.assert_close(shifted, 3 * sigma / (1 + 2 * sigma))
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05


@pytest.fixture
def drawn(monkeypatch):
    """Of every step that was drawn its samples' names, as messages have them; prefetching is a step ahead."""
    steps, batch = [], data.Dataset.batch

    def recorded(self, views, clips, *rest):
        steps.append(", ".join(sorted({self.entry(clip)["source"] for clip in clips})))
        return batch(self, views, clips, *rest)
    monkeypatch.setattr(data.Dataset, "batch", recorded)
    return steps


def test_a_field_that_an_older_run_lacks_has_its_default_there(fresh):
    """As after a fork has added a field to DiTConfig: the tiny preset has 4 proxies, the default is 16."""
    call("train.py", *FAST, "--stage", 1, "--steps", 2, cwd=fresh)
    path = find_checkpoint(fresh / "out/tiny") / "checkpoint.json"
    meta = json.loads(path.read_text())
    del meta["config"]["proxy_tokens"]
    path.write_text(json.dumps(meta))
    for flags in (["--stage", 1, "--resume", "--steps", 2], ["--stage", 2]):
        with pytest.raises(UserError, match="trained otherwise .proxy_tokens 16 there, 4 here"):
            call("train.py", *FAST, *flags, cwd=fresh)


@pytest.fixture
def another_codec(monkeypatch):
    encode = toy.ToyCodec.encode
    monkeypatch.setattr(toy.ToyCodec, "encode", lambda self, video: encode(self, video).flip(1))
    toy.codec_of.cache_clear()
    yield
    toy.codec_of.cache_clear()


@pytest.mark.usefixtures("another_codec")
def test_another_codec_is_said_wherever_a_toy_is_read(fresh):
    """The shipped toy would draw grey noise."""
    with pytest.raises(UserError, match="assets/toy was trained on latents of another codec"):
        sample.find(ROOT / "assets/toy")
    with pytest.raises(UserError, match="assets/base was trained on latents of another codec"):
        call("train.py", "--stage", 1, "--out", "x", cwd=fresh)


def test_a_step_without_finite_gradients_changes_nothing(fresh, drawn, monkeypatch, capsys):
    monkeypatch.chdir(fresh)
    real, calls = train.loss_of, []

    def spoiled(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(train, "loss_of", spoiled)
    train.main([*map(str, FAST), "--stage", "1", "--steps", "3", "--save-every", "1", "--keep", "3"])
    assert "step 2: gradient norm nan; step skipped" in capsys.readouterr().out
    saved = [{path.name: safetensors.torch.load(path.read_bytes()) for path in folder.glob("*.safetensors")}
             for folder in steps_in(fresh / "out" / "tiny" / "stage1")]
    assert_equal(saved[0], saved[1])  # the averages and the optimizers' state too
    assert all(torch.isfinite(v).all() for v in saved[2]["model.safetensors"].values())
    assert not torch.equal(*(state["ema.safetensors"]["head.head.weight"] for state in saved[1:]))
    monkeypatch.setattr(train, "loss_of", lambda *args: real(*args) * float("nan"))
    drawn.clear()
    with pytest.raises(UserError, match="10 steps in a row without a finite gradient") as error:
        train.main([*map(str, FAST), "--stage", "1", "--steps", "20", "--out", "nan"])
    assert f", the last one 10 with {drawn[9]}; try" in str(error.value)
    assert re.fullmatch("clip [0-9-]+(, clip [0-9-]+){3}", drawn[9]) and drawn[8] != drawn[9]


def test_bad_steps_between_good_ones_do_not_add_up(fresh, monkeypatch):
    """Ten in a row end a stage; here every other one is bad."""
    calls = []

    def spoiled(model, *_):
        calls.append(1)
        return (float("nan") if len(calls) % 2 else 0) * model.head.head.bias.sum()
    monkeypatch.setattr(train, "loss_of", spoiled)
    call("train.py", *FAST, "--stage", 1, "--steps", 21, cwd=fresh)
    lost = [line["loss"] is None for line in metrics(fresh / "out" / "tiny", 1)]
    assert lost == 10 * [True, False] + [True]


def test_every_sample_of_every_step_stage_and_seed_has_noise_of_its_own(fresh, monkeypatch):
    drawn = []

    def watched(model, batch, sigma, noise):
        if torch.is_grad_enabled():
            drawn.extend(zip(sigma.tolist(), noise.flatten(1)[:, 0].tolist()))
        return 0 * model.head.head.bias.sum()
    monkeypatch.setattr(train, "loss_of", watched)
    for seed in (0, 1):
        for stage in (1, 2):
            call("train.py", *FAST, "--stage", stage, "--steps", 3, "--seed", seed, "--out", seed, cwd=fresh)
    assert all(len(set(numbers)) == 2 * 2 * 3 * 4 for numbers in zip(*drawn))


def test_a_tenth_of_the_captions_is_lost_in_training_and_none_in_validation(fresh, monkeypatch):
    lost = {True: [], False: []}

    def watched(model, batch, *_):  # an empty caption is one token, </s>
        lost[torch.is_grad_enabled()] += (batch[1].any(dim=2).sum(dim=1) == 1).tolist()
        return 0 * model.head.head.bias.sum()
    monkeypatch.setattr(train, "loss_of", watched)
    call("train.py", *FAST, "--stage", 1, "--steps", 100, cwd=fresh)
    assert len(lost[True]) == 400 and 25 < sum(lost[True]) < 55
    assert len(lost[False]) > 50 and not any(lost[False])


def test_mv2id_asks_for_no_references_from_other_clips():
    for flags, factor in (([], 1), (["--mv2id"], 0)):
        args = train.arguments(flags)
        for number, stage in train.STAGES.items():
            assert train.stage_of(number, args).cross == factor * stage.cross


def test_switches_of_the_method(fresh):
    for flags, check in (
        (("--no-mfi",), lambda c: c["vit_dim"] == 0),
        (("--rope-layout", "rd"), lambda c: c["rope_layout"] == "rd"),
        (("--proxy-tokens", 0, "--rope-layout", "append"), lambda c: c["proxy_tokens"] == 0),
    ):
        call("train.py", *FAST, *flags, "--steps", 1, "--out", "x", "--mask", 0.6, cwd=fresh)
        assert check(json.loads((find_checkpoint(fresh / "x") / "checkpoint.json").read_text())["config"])
        shutil.rmtree(fresh / "x")


def test_without_curriculum_and_with_the_front_only(fresh, monkeypatch):
    stages, views = [], []
    draw, batch = data.draw_views, data.Dataset.batch

    def recorded_views(stage, *rest):
        stages.append(stage)
        return draw(stage, *rest)

    def recorded_batch(self, *rest):
        made = batch(self, *rest)
        views.append([tuple(names) for names in made[2]])
        return made

    monkeypatch.setattr(data, "draw_views", recorded_views)
    monkeypatch.setattr(data.Dataset, "batch", recorded_batch)
    call("train.py", *FAST, "--steps", 20, "--no-curriculum", "--front-only", "--out", "x", cwd=fresh)
    assert {s.name for s in stages} == {train.STAGES[max(train.STAGES)].name}
    assert stages[0].lr == train.STAGES[1].lr
    given = {names for step in views for names in step}
    assert given == {("front",), ()} and {len(step) for step in views} == {1, 2}
    assert all(len(set(step)) == 1 for step in views)  # the only view is lost by all or by none


# -------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--stage 99", "--stage: invalid choice: '99'"),
        ("--stage two", "--stage: invalid choice"),
        ("--stage 3 --out new",
         "stage 3 starts from stage 2, .* run `python train.py --stage 2 --config tiny --out new`$"),
        ("--stage 2", "exists: --resume goes on"),
        ("--stage all", "exists: --resume goes on"),
        ("--stage 2 --overwrite --no-mfi", "trained otherwise .*vit_dim 96 there, 0 here"),
        ("--stage 2 --resume --batch 8", "trained otherwise .*batch 4 there, 8 here.*: give the same flags"),
        ("--stage 2 --resume --mask 0.6", "trained otherwise .*mask 0.0 there, 0.6 here"),
        ("--stage 2 --resume --clips 4 4", r"trained otherwise .*clips \[12, 12\] there, \[4, 4\] here"),
        ("--stage 2 --resume --steps 3", "trained otherwise .*steps 2 there, 3 here"),
        ("--stage all --resume --steps 3",
         rf"stage{LAST}.* grew from fewer steps of stage {LAST - 1} than 3: give"),
        ("--stage 2 --resume --overwrite", "give one of them"),
        ("--stage 1 --out new --expert high --sample-prompts jobs", "--sample-prompts needs both experts"),
        ("--stage 1 --out new --valid nowhere", "--valid nowhere holds no encoded set"),
        ("--stage 1 --out new --sample-prompts nowhere", "nowhere: "),
        ("--stage 1 --out new --rope-jump 2", "rope jump 2 is smaller"),
        ("--stage 1 --out new --steps 1 2", f"--steps 1 2: expected one number, or {len(train.STAGES)}"),
        ("--stage 1 --out new --batch 4 --micro-batch 3", "--batch 4 is not a multiple of"),
        *((f"--stage 2 --train new {flags}", "--train new trains proxies, .* and MFI, .*leave --proxy-tokens")
          for flags in ("--no-mfi", "--proxy-tokens 0", "--no-mfi --proxy-tokens 0")),
        ("--stage 1 --out file/below", "cannot write to"),
        ("--stage 1 --out new --data file/below", "cannot write to"),
        ("--stage 1 --out=", "--out: is empty"),
        ("--stage 1 --ou new", "unrecognized arguments: --ou"),  # no abbreviations
        ("--stage 1 --out new --clips 0 5", "--clips: got '0', expected"),
        ("--stage 1 --out new --clips 5 100000000000000000000", "--clips: got '10+', expected"),
        *((f"--stage 1 --out new --{flag} {value}", f"--{flag}: got '{value}', expected")
          for flag, values in (
              ("muon-lr", "nan -1 0 inf x"), ("adamw-lr", "inf"), ("ema", "nan 1 -0.1"), ("clip", "nan -1 0"),
              ("weight-decay", "inf -1"), ("shift", "nan 0"), ("mask", "1 1.5 nan"), ("warmup", "0"),
              ("log-every", "0"), ("save-every", "0"), ("keep", "0"), ("steps", "0 1e3"), ("batch", "0"),
              ("seed", "99999999999999999999 -1"))
          for value in values.split()),
    ],
)
def test_bad_input_gets_one_clear_line(arguments, says, tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    (tmp_path / "run" / "file").write_text("")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(UserError) as error:
        train.main(["--config", "tiny", "--no-samples", *arguments.split()])
    assert re.search(says, str(error.value)) and "\n" not in str(error.value)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_precision_does_not_change_within_a_stage(fresh):
    call("train.py", *FAST, "--stage", 1, "--steps", 2, "--precision", "fp32", cwd=fresh)
    with pytest.raises(UserError, match="trained otherwise .precision fp32 there, bf16 here"):
        call("train.py", *FAST, "--stage", 1, "--steps", 2, "--precision", "bf16", "--resume", cwd=fresh)


@pytest.mark.parametrize("change", [{"cross": 0.25}, {"drop": (0.4, 0.1)}, {"people": (1,)},
                                    {"lr": (1, 0.5)}], ids=str)
def test_a_stage_is_not_resumed_after_its_row_was_edited(change, fresh, monkeypatch):
    """README invites to edit STAGES. Flags that change a row are of the row too."""
    monkeypatch.chdir(fresh)
    flags = [*map(str, FAST), "--stage", "1"]
    train.main(flags)
    monkeypatch.setitem(train.STAGES, 1, replace(train.STAGES[1], **change))
    [(name, value)] = change.items()
    with pytest.raises(UserError, match=f"trained otherwise .stage {name} .* there, .* here"):
        train.main([*flags, "--resume"])


def test_two_trainings_do_not_share_a_folder(fresh):
    with train.lock(fresh / "out" / "tiny"):
        line = run(ROOT / "train.py", *FAST, "--stage", 1, cwd=fresh, fails=True)
    assert re.fullmatch(r"train.py: .*out/tiny is in use by process \d+: wait for it, or choose .*", line)


def test_a_users_folders_among_the_checkpoints_are_left_alone(fresh):
    stage = fresh / "out" / "tiny" / "stage1"
    for name in ("step-best", "step-000001-good", "step-000777"):
        (stage / name).mkdir(parents=True)
        (stage / name / "mine").write_text("")
    call("train.py", *FAST, "--stage", 1, "--steps", 4, "--save-every", 1, "--keep", 1, cwd=fresh)
    left = {"step-best", "step-000001-good", "step-000777", "step-000004", "metrics.jsonl"}
    assert {p.name for p in stage.iterdir()} == left


def test_overwriting_deletes_checkpoints_and_nothing_else(fresh, tiny):
    shutil.copytree(tiny / "out", fresh / "out")
    names = ("stage4/notes.txt", "stage4/step-000500-best/ema", "stage1/x")
    mine = [fresh / "out" / "tiny" / name for name in names]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    call("train.py", *FAST, "--overwrite", "--steps", 1, cwd=fresh)
    assert all(path.read_text() == "mine" for path in mine)
    steps = [path.name for path in (fresh / "out" / "tiny").glob("stage*/step-??????")]
    assert steps == LAST * ["step-000001"]


def test_one_folder_may_hold_the_run_and_the_data(tmp_path):
    call("train.py", *FAST, "--stage", 1, "--steps", 1, "--out", "x", "--data", "x", cwd=tmp_path)
    assert find_checkpoint(tmp_path / "x")


@pytest.mark.parametrize("harm", ["folder", "file"])
def test_what_is_in_the_way_of_a_later_stage_is_said_before_the_first(fresh, harm):
    stage = fresh / "out" / "tiny" / "stage4"
    if harm == "file":
        stage.parent.mkdir(parents=True)
        stage.write_text("")
    else:
        (stage / "step-000002").mkdir(parents=True)
        (stage / "step-000002" / "mine").write_text("")
    with pytest.raises(UserError, match="stage4.*move it away"):
        call("train.py", *FAST, cwd=fresh)
    assert not (fresh / "out" / "tiny" / "stage1").exists()


def test_a_stage_of_an_older_run_is_not_resumed(fresh, tiny):
    shutil.copytree(tiny / "out", fresh / "out")
    call("train.py", *FAST, "--stage", 2, "--steps", 3, "--overwrite", cwd=fresh)
    with pytest.raises(UserError, match="stage3.* did not grow from .*stage2.*: give --stage 3 --overwrite"):
        call("train.py", *FAST, "--steps", *[2 + (n == 2) for n in train.STAGES], "--resume", cwd=fresh)


def test_a_stage_without_a_whole_checkpoint_is_not_begun_again_unasked(fresh, tiny):
    shutil.copytree(tiny / "out", fresh / "out")
    file = find_checkpoint(fresh / "out" / "tiny" / "stage2") / "optimizer.safetensors"
    file.write_bytes(file.read_bytes() + b"!")
    with pytest.raises(UserError, match="stage2: none of its checkpoints is whole; --overwrite"):
        call("train.py", *FAST, "--stage", 2, "--resume", cwd=fresh)
    assert file.exists()


def changed(folder, name, tensors=None, **meta):
    """A checkpoint edited by hand, with the right sha256."""
    if tensors is not None:
        safetensors.torch.save_file(tensors, folder / name)
    path = folder / "checkpoint.json"
    stored = json.loads(path.read_text()) | meta
    stored["sha256"][name] = script.sha256_of(folder / name)
    path.write_text(json.dumps({key: value for key, value in stored.items() if value != "gone"}))


@pytest.mark.parametrize(
    "name, edit, says",
    [("ema", lambda t: t | {"x": torch.zeros(1)}, r"ema.safetensors does not fit HarmoView.*1 unknown"),
     ("ema", lambda t: {k: v for k, v in t.items() if k != "proxies"}, "ema.*1 missing"),
     ("ema", lambda t: t | {"proxies": t["proxies"].long()}, "'proxies' is torch.int64"),
     ("model", lambda t: t | {"proxies": t["proxies"].long()}, "'proxies' is torch.int64"),
     ("optimizer", lambda t: t | {"x": torch.zeros(1)}, "optimizer.safetensors cannot be read"),
     ("optimizer", lambda t: t | {"0.9999.x": torch.zeros(1)}, "optimizer.safetensors cannot be read"),
     ("optimizer", lambda t: t | {"0.0.exp_avg": torch.zeros(7)}, r"optimizer.*0.0.exp_avg is .* \[7\]")],
)
def test_hand_edited_tensors_are_one_line(name, edit, says, fresh):
    command = [*FAST, "--stage", 1, "--steps", 4, "--save-every", 2]
    call("train.py", *command, cwd=fresh)
    shutil.rmtree(fresh / "out" / "tiny" / "stage1" / "step-000004")
    folder = find_checkpoint(fresh / "out" / "tiny")
    file = f"{name}.safetensors"
    changed(folder, file, edit(safetensors.torch.load((folder / file).read_bytes())))
    with pytest.raises(UserError, match=says) as error:
        call("train.py", *command, "--resume", cwd=fresh)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("meta", [{"step": 999}, {"step": -5}, {"step": 2.0}, {"step": None}])
def test_hand_edited_steps_are_damage(meta, fresh):
    call("train.py", *FAST, "--stage", 1, "--steps", 2, cwd=fresh)
    changed(find_checkpoint(fresh / "out" / "tiny"), "ema.safetensors", **meta)
    with pytest.raises(UserError, match="checkpoint.json is damaged|none of its checkpoints is whole"):
        call("train.py", *FAST, "--stage", 1, "--steps", 2, "--resume", cwd=fresh)


@pytest.mark.parametrize(
    "variables",
    [dict(WORLD_SIZE="abc"), dict(WORLD_SIZE="0"), dict(WORLD_SIZE="-1"), dict(WORLD_SIZE=""), dict(RANK="1"),
     dict(RANK="5", WORLD_SIZE="2"), dict(LOCAL_WORLD_SIZE="0")],
)
def test_torchruns_variables_half_set_are_one_line(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="RANK, WORLD_SIZE.* do not fit .*start with torchrun"):
        train.World.join()


def test_a_damaged_tokenizer_in_the_cache_is_said_before_training(fresh):
    next((fresh / "cache").glob("toy-*/spiece.model")).write_bytes(b"junk")
    with pytest.raises(UserError, match="spiece.model.*delete its folder, it is made again"):
        call("train.py", *FAST, "--stage", 1, cwd=fresh)


def test_a_stage_without_any_finite_step_is_not_finished(fresh, drawn, monkeypatch):
    real = train.loss_of
    monkeypatch.setattr(train, "loss_of", lambda *args: real(*args) * float("nan"))
    with pytest.raises(UserError, match="2 steps in a row without a finite gradient") as error:
        call("train.py", *FAST, "--stage", 1, "--steps", 2, cwd=fresh)
    assert len(drawn) == 2 and f", the last one 2 with {drawn[1]}; try" in str(error.value)
    assert [line["loss"] for line in metrics(fresh / "out" / "tiny", 1)] == [None]


def test_a_resumed_stage_without_any_finite_step_is_not_finished(fresh, monkeypatch):
    flags = ["train.py", *FAST, "--stage", 1, "--steps", 4, "--save-every", 2]
    call(*flags, cwd=fresh)
    shutil.rmtree(fresh / "out" / "tiny" / "stage1" / "step-000004")
    real = train.loss_of
    monkeypatch.setattr(train, "loss_of", lambda *args: real(*args) * float("nan"))
    with pytest.raises(UserError, match="2 steps in a row without a finite gradient, the last one 4"):
        call(*flags, "--resume", cwd=fresh)


def test_weights_that_are_not_finite_are_never_saved(fresh, monkeypatch):
    def poison(self):
        next(p for group in self.param_groups for p in group["params"]).data[:] = float("nan")

    monkeypatch.setattr(optimizers.Muon, "step", poison)
    with pytest.raises(UserError, match="stage 1 step 1: the weights are no longer finite and not saved"):
        call("train.py", *FAST, "--stage", 1, "--steps", 1, cwd=fresh)
    assert find_checkpoint(fresh / "out" / "tiny") is None


def test_the_script_exits_with_that_line(tmp_path):
    line = run(ROOT / "train.py", "--stage", "9", cwd=tmp_path, fails=True)
    assert line.startswith("train.py: --stage: invalid choice: '9'")


def test_overwriting_all_stages_leaves_no_later_one_of_the_old_run(fresh, tiny, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt
    shutil.copytree(tiny / "out", fresh / "out")
    monkeypatch.setattr(train, "train_stage", interrupted)
    others = [number for number in train.STAGES if number != 2]
    for stage, left in (("2", others), ("all", [])):  # nor its curves; another stage's stay
        with pytest.raises(KeyboardInterrupt):
            call("train.py", *FAST, "--stage", stage, "--overwrite", cwd=fresh)
        for name in ("metrics.jsonl", "step-??????"):
            paths = (fresh / "out" / "tiny").glob(f"stage*/{name}")
            assert sorted(path.parent.name for path in paths) == [f"stage{n}" for n in left]
    assert find_checkpoint(fresh / "out" / "tiny") is None


def test_a_cut_line_of_the_metrics_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[]\n{"step": "x"}\n\x00\n{"step": 2}\n{"st')
    train.Metrics(tmp_path, 1, None, train.World(0, 1, torch.device("cpu"))).file.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_an_interrupted_rendering_leaves_no_cache(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "render_clips", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toy.training_set(tmp_path, **toy.WORLDS["tiny"])
    assert not list(tmp_path.rglob("index.jsonl"))


def test_recomputing_and_compiling_blocks_change_no_gradient(monkeypatch):
    """Compiled as one graph each, without a break; by aot_eager, since inductor takes a minute."""
    torch.manual_seed(0)
    model = HarmoView(CONFIGS["tiny"])
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    inputs = speed.random_inputs(model.config, (48, 3, 40, 40), 1, "cpu")  # long enough for SDPA
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    grads = []
    for model.recompute, compiled in ((False, False), (True, False), (False, True), (True, True)):
        if compiled:
            processes.compile_blocks(model)
        model.zero_grad()
        model(*inputs).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for found in grads[1:]:
        torch.testing.assert_close(found, grads[0])


@pytest.mark.parametrize("attention", CHOICES["reference_attention"])
def test_recomputing_in_bf16_changes_no_gradient(attention):
    """As train.py does it: the forward under autocast, whose cast weights are gone in the backward."""
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = HarmoView(replace(CONFIGS["tiny"], reference_attention=attention))
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p)
        inputs = speed.random_inputs(model.config, (48, 3, 40, 40), 1, "cpu")  # long enough for SDPA
        model.recompute = recompute
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*inputs).square().mean()
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


class Calls(TorchDispatchMode):
    """Counts every operation that is really computed."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention, passes", [("joint", 1), ("one-way", 2)])  # references on their own
def test_recomputing_keeps_attention_and_makes_the_rest_again(attention, passes):
    model = HarmoView(replace(CONFIGS["tiny"], reference_attention=attention))
    layers, aten = passes * model.config.num_layers, torch.ops.aten
    inputs = speed.random_inputs(model.config, (48, 3, 40, 40), 1, torch.device("cpu"))
    for model.recompute, again in ((False, 0), (True, layers)):
        with Calls() as calls:
            model(*inputs).square().mean().backward()
        assert calls.count[aten._scaled_dot_product_flash_attention_for_cpu.default] == layers
        assert calls.count[aten.gelu.default] == layers + 1 + again  # the FFNs', and the text embedding's


# --------------------------------------------------------------------------------------------------- from Wan
@pytest.fixture(scope="session")
def wan_set(wan, tmp_path_factory):
    """Toy clips as MP4 and PNG with their manifest, encoded by small random Wan networks."""
    folder = tmp_path_factory.mktemp("look")
    toy.main(["--out", str(folder), "--size", "48", "--frames", "9", "--fps", "16"])
    encode = ["encode", "--data", str(folder), "--wan", str(wan / "2.1"), "--size", "32x32", "32x48"]
    data.main([*encode, "--frames", "5", "--precision", "fp32", "--mask", "0.5", "--mask-variants", "2"])
    return folder


@pytest.fixture
def small_wan(wan, wan_set, monkeypatch, tmp_path):
    """--config small, --wan and --data: small folders of each kind, in an empty working directory."""
    config = DiTConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=2, **WAN_SMALL)
    monkeypatch.setitem(train.CONFIGS, "small", config)
    monkeypatch.setitem(train.TRAIN_RECIPES, "small", train.TRAIN_RECIPES["tiny"] | {"batch": 2})
    monkeypatch.setitem(toy.WORLDS, "small", toy.WORLDS["1.3b"])
    monkeypatch.chdir(tmp_path)
    return ["--config", "small", "--no-samples", "--data", str(wan_set), "--wan", str(wan / "2.1")]


@pytest.mark.parametrize("stage", [1, 3])
def test_wan_is_the_start_of_any_stage(small_wan, wan, stage):
    train.main([*small_wan, "--stage", str(stage), "--steps", "1", "--adamw-lr", "1e-9"])
    meta = json.loads(next(Path("out/small").rglob("checkpoint.json")).read_text())
    assert meta["stage"] == stage and meta["wan"] == str(wan / "2.1")
    trained, _ = load_checkpoint(find_checkpoint("out/small"), "model")
    base = HarmoView(trained.config)
    assert all(name.startswith(NEW_PREFIXES) for name in load_wan(base, wan / "2.1"))
    for (name, a), b in zip(trained.named_parameters(), base.parameters(), strict=True):
        if not name.startswith(NEW_PREFIXES):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_the_base_that_comes_with_the_code_is_the_toys_wan():
    """In Wan's layout, without what HarmoView adds."""
    model = HarmoView(CONFIGS["toy"])
    absent = load_wan(model, ROOT / "assets" / "base")
    assert absent == [name for name in model.state_dict() if name.startswith(NEW_PREFIXES)]
    weights = [path for path in (ROOT / "assets" / "base").iterdir() if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in weights) < 3e6


def test_a_toy_starts_from_a_base(fresh, monkeypatch):
    monkeypatch.chdir(fresh)
    run = ["--config", "tiny", "--no-samples", "--stage", "1", "--steps", "1"]
    train.main([*run, "--no-mfi", "--proxy-tokens", "0", "--adamw-lr", "0.1", "--out", "before"])
    sample.main(["--ckpt", "before", "--export", "base"])
    train.main([*run, "--wan", "base", "--muon-lr", "1e-12", "--adamw-lr", "1e-12", "--out", "after"])
    base, found = (load_checkpoint(find_checkpoint(name))[0] for name in ("base", "after"))
    found = dict(found.named_parameters())
    for name, p in base.named_parameters():
        torch.testing.assert_close(found[name], p, atol=1e-6, rtol=0)
    assert found.keys() > dict(base.named_parameters()).keys()
    (fresh / "base" / "spiece.model").write_bytes(b"another")
    with pytest.raises(UserError, match="--wan base reads captions with another tokenizer"):
        train.main([*run, "--wan", "base", "--out", "other"])


@pytest.mark.parametrize("argv, base", [
    ("", "assets/base"), ("--config toy64 --stage 1", "assets/base64"), ("--wan other", "other"),
    ("--scratch", ""), ("--stage 2", ""), ("--config tiny", "")])
def test_what_a_run_starts_from(argv, base):
    args = train.arguments(argv.split())
    train.resolve(args, train.World(0, 1, torch.device("cpu")))
    assert str(args.wan or "").endswith(base) and bool(args.wan) == bool(base)


def test_a_base_and_scratch_exclude_each_other():
    args = train.arguments(["--wan", "assets/base", "--scratch"])
    with pytest.raises(UserError, match="--wan says what to start from, --scratch from nothing"):
        train.resolve(args, train.World(0, 1, torch.device("cpu")))


def test_a_run_that_started_from_other_weights_is_not_resumed(fresh, monkeypatch):
    monkeypatch.chdir(fresh)
    one = [*map(str, FAST), "--stage", "1", "--steps", "1", "--out"]
    train.main([*one, "scratch"])
    sample.export("scratch", "base")
    wan = ["--wan", "base"]
    train.main([*one, "based", *wan])
    for flags in (["based"], ["scratch", *wan]):
        with pytest.raises(UserError, match="started from other weights: give the --wan that it had"):
            train.main([*one, *flags, "--resume"])
    train.main([*one, "based", *wan, "--resume"])


def test_with_wan_a_stage_goes_on_from_the_one_before(small_wan):
    train.main([*small_wan, "--stage", "1", "--steps", "1"])
    train.main([*small_wan, "--stage", "2", "--steps", "1", "--adamw-lr", "1e-12"])
    first, second = (weights_of(Path("out/small") / f"stage{n}") for n in (1, 2))
    for name, value in first["ema.safetensors"].items():
        torch.testing.assert_close(second["model.safetensors"][name], value, atol=1e-9, rtol=0)


def test_from_files_through_all_stages_to_a_video_from_references(small_wan, wan_set):
    """Manifest, encoding, 20 steps over four stages, and a video of two people from pictures."""
    train.main([*small_wan, "--steps", "5", "--log-every", "1"])
    assert all(len(metrics(Path("out/small"), stage)) == 5 for stage in train.STAGES)
    refs = ["--refs", str(wan_set / "ann_front.png"), "--refs", str(wan_set / "ben_left.png")]
    words = (wan_set / "captions.txt").read_text().splitlines()[2]
    size = ["--steps", "1", "--frames", "5", "--size", "32x48"]
    sample.main(["--ckpt", "out/small", *refs, "--prompt", words, *size, "--out", "v"])
    assert Path("v.mp4").exists() and Path("v.png").exists()


def test_both_experts_through_all_stages_to_a_video_from_references(small_wan, wan, wan_set):
    """All of each expert trains in two stages, adapters in two more; then both make one video."""
    small_wan[-1] = str(wan / "2.2")
    for role in ("high", "low"):
        out = ["--expert", role, "--out", f"pair/{role}_noise_model", "--steps", "2"]
        for stage, flags in (("1", []), ("2", []), ("3", ["--train", "lora"]), ("4", ["--train", "lora"])):
            train.main([*small_wan, *out, *flags, "--stage", stage])
        meta = json.loads((find_checkpoint(f"pair/{role}_noise_model") / "checkpoint.json").read_text())
        assert meta["stage"] == 4 and meta["expert"]["role"] == role and meta["wan"] == str(wan / "2.2")
        assert "/stage2/" in meta["base"]["path"]
    refs = ["--refs", str(wan_set / "ann_front.png"), "--refs", str(wan_set / "ben_left.png")]
    words = (wan_set / "captions.txt").read_text().splitlines()[2]
    size = ["--steps", "8", "--shift", "5", "--frames", "5", "--size", "32x48"]
    sample.main(["--ckpt", "pair", *refs, "--prompt", words, *size, "--out", "v"])
    assert Path("v.mp4").exists() and Path("v.png").exists()


def test_resume_on_an_encoded_set_is_bit_exact(small_wan):
    command = [*small_wan, "--stage", "3", "--steps", "6", "--save-every", "3"]
    train.main(command)
    folder = Path("out/small/stage3")
    straight = weights_of(folder)
    shutil.rmtree(folder / "step-000006")
    train.main([*command, "--resume"])
    assert_equal(straight, weights_of(folder))


def test_a_damaged_sample_is_named_and_training_goes_on(small_wan, wan_set, tmp_path, capsys):
    shutil.copytree(wan_set / "encoded", tmp_path / "set")
    first = json.loads((tmp_path / "set" / "index.jsonl").read_text().splitlines()[0])
    file = tmp_path / "set" / first["name"][:2] / f"{first['name']}.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    small_wan[small_wan.index("--data") + 1] = str(tmp_path / "set")
    train.main([*small_wan, "--stage", "3", "--steps", "8"])
    printed = capsys.readouterr().out
    assert printed.count(f"sample {first['name']} (clip1.mp4) is damaged") == 1


def test_wan_configs_need_wan_and_a_set(small_wan, wan_set, tmp_path):
    for arguments, says in (
        (["--config", "1.3b"], "--config 1.3b needs --wan DIR.*and --data DIR, a set that.*came --wan None"),
        ([*small_wan[:3], *small_wan[5:]], "--config small needs --wan DIR.*and --data DIR"),
        (["--config", "1.3b", *small_wan[2:]], "does not fit HarmoView.*instead of .1536"),
        ([*small_wan[:-1], "nowhere"], "nowhere: no such file"),
        ([*small_wan, "--mask", "0.6"], "--mask, --clips, --described and --pairs are for the toy"),
        ([*small_wan, "--described", "0.6"], "--mask, --clips, --described and --pairs are for the toy"),
        (["--config", "tiny", "--data", str(wan_set)], "encoded with in_dim 16, the network has 48"),
    ):
        with pytest.raises(UserError, match=says):
            train.main(arguments)
    assert not (tmp_path / "out" / "small").exists()


# ------------------------------------------------------------------------------- two experts and noise levels
@pytest.mark.parametrize("kind", ["logit-normal", "uniform"])
@pytest.mark.parametrize("shift, low, high", [
    (5.0, 0.875, math.inf), (5.0, 0, 0.875), (12.0, 0.875, math.inf), (1.0, 0, math.inf), (3.0, 0.5, 0.7)])
def test_an_experts_slice_is_cut_out_of_the_law(kind, shift, low, high):
    """The share of draws and the histogram inside a slice, against a million draws of the whole law."""
    generator = torch.Generator().manual_seed(0)
    if kind == "uniform":
        u = torch.rand(10**6, generator=generator, dtype=torch.float64)
    else:
        u = torch.randn(10**6, generator=generator, dtype=torch.float64).sigmoid()
    whole = shift * u / (1 + (shift - 1) * u)
    inside = whole[(whole >= low) & (whole < high)]
    levels = data.NoiseLevels(shift, kind, low, high)
    assert levels.share() == pytest.approx(len(inside) / 10**6, abs=0.002)
    drawn = torch.stack([levels.draw(torch.Generator().manual_seed(i)) for i in range(4000)]).double()
    assert drawn.min() >= low and drawn.max() < high
    edges = torch.quantile(inside, torch.linspace(0, 1, 9, dtype=torch.float64))
    counts = torch.histogram(drawn.clamp(edges[0], edges[-1]), edges).hist / len(drawn)
    assert (counts - 1 / 8).abs().max() < 0.025  # eight equal parts of the law
    for q in (0.1, 0.5, 0.9):
        assert levels.quantile(q) == pytest.approx(float(torch.quantile(inside, q)), abs=0.005)


@pytest.mark.parametrize("flags, levels", [
    ("", (100.0, "logit-normal", 0, math.inf)),
    ("--timesteps uniform --shift 3", (3.0, "uniform", 0, math.inf)),
    ("--expert high --boundary 0.6 --shift 9", (9.0, "logit-normal", 0.6, math.inf)),
    ("--expert low --timesteps uniform --shift 9", (9.0, "uniform", 0, 0.875))])
def test_flags_decide_the_law_of_noise_levels(flags, levels):
    args = train.arguments(["--config", "tiny", *flags.split()])
    train.resolve(args, train.World(0, 1, torch.device("cpu")))
    assert args.levels == levels


def test_the_shares_of_two_experts_are_one():
    for kind in ("logit-normal", "uniform"):
        high, low = (data.NoiseLevels(5.0, kind, *part) for part in ((0.875, math.inf), (0, 0.875)))
        assert high.share() + low.share() == pytest.approx(1)


def test_two_experts_train_in_their_slices_and_sample_together(fresh, monkeypatch):
    monkeypatch.chdir(fresh)
    seen, real = {}, train.loss_of

    def watched(model, batch, sigma, noise):
        seen.setdefault(role, []).extend(sigma.tolist())
        return real(model, batch, sigma, noise)
    monkeypatch.setattr(train, "loss_of", watched)
    for role in ("high", "low"):
        train.main([*map(str, FAST), "--expert", role, "--shift", "5", "--boundary", "0.8", "--stage", "1",
                    "--steps", "3", "--out", f"pair/{role}_noise_model"])
    assert min(seen["high"]) >= 0.8 > max(seen["low"])
    stamp = json.loads((find_checkpoint("pair/low_noise_model") / "checkpoint.json").read_text())["expert"]
    assert (stamp["role"], stamp["boundary"]) == ("low", 0.8) and 0 < stamp["share"] < 1
    found = sample.find("pair")
    experts, _ = sample.load(found)
    assert found.boundary == 0.8 and len(found.networks) == 2
    sample.main(["--ckpt", "pair", "--steps", "2", "--out", "v"])
    with pytest.raises(UserError, match="is the expert for high noise only: put both into one folder"):
        sample.find("pair/high_noise_model")
    Path("swapped").mkdir()
    for there, here in (("high", "low"), ("low", "high")):
        Path(f"swapped/{there}_noise_model").symlink_to((Path("pair") / f"{here}_noise_model").resolve())
    with pytest.raises(UserError, match="was trained for low noise.*the expert for high noise"):
        sample.find("swapped")


def test_experts_that_do_not_fit_are_one_line(fresh, tmp_path, monkeypatch):
    monkeypatch.chdir(fresh)
    for arguments, says in (
        (["--expert", "high", "--boundary", "875"], "--boundary: got '875', expected a number from 0 to"),
        (["--expert", "high", "--shift", "0.001"], "of 1,000 noise levels less than one is its own"),
    ):
        with pytest.raises(UserError, match=says):
            train.main([*map(str, FAST), *arguments])
    for name in ("transformer", "transformer_2"):
        Path("wan", name).mkdir(parents=True)
    assert train.choose_expert("wan", "high") == Path("wan/transformer")  # so diffusers names them
    assert train.choose_expert("wan", "low") == Path("wan/transformer_2")
    with pytest.raises(UserError, match="that is the other expert"):
        train.choose_expert("wan/transformer_2", "high")
    with pytest.raises(UserError, match="holds two experts: give its transformer or transformer_2, or train"):
        weights.wan_files("wan")


# ------------------------------------------------------------------------------------------------ what trains
@pytest.mark.parametrize("what", ["new", "lora"])
def test_on_a_frozen_base_only_what_is_added_trains(fresh, what, monkeypatch):
    """Over two stages and a resume; then what was trained is sampled, and exported as one network. Frozen
    weights need no gradient, so a step costs two forwards instead of three."""
    monkeypatch.chdir(fresh)
    flags, passes = [*map(str, FAST), "--precision", "fp32"], []
    monkeypatch.setattr(train.Metrics, "speed", lambda self: passes.append(self.passes) or {})
    train.main([*flags, "--stage", "1", "--steps", "1"])
    base = weights_of(Path("out/tiny"))["ema.safetensors"]
    flags += ["--train", what, "--rank", "4", "--steps", "4", "--save-every", "2"]
    train.main([*flags, "--stage", "2"])
    assert passes == [3, 2, 2, 2, 2]
    straight = weights_of(Path("out/tiny/stage2"))
    adapters = {name for name in straight["ema.safetensors"] if "lora_" in name}
    assert len(adapters) == (40 if what == "lora" else 0)
    assert straight["ema.safetensors"].keys() - adapters == {n for n in base if n.startswith(NEW_PREFIXES)}
    shutil.rmtree("out/tiny/stage2/step-000004")
    train.main([*flags, "--stage", "2", "--resume"])
    assert_equal(straight, weights_of(Path("out/tiny/stage2")))
    train.main([*flags, "--stage", "3"])
    with pytest.raises(UserError, match="was trained with --train .* --rank 4: give the same"):
        train.main([*flags, "--stage", "4", "--train", "lora", "--rank", "5"])
    trained, meta = load_checkpoint(find_checkpoint("out/tiny/stage3"))
    moved = {name for name, p in trained.named_parameters() if not torch.equal(p, base[name])}
    matrices = {name for name in base if name.startswith("blocks.") and base[name].ndim == 2}
    assert meta["base"]["path"] == str(fresh / "out/tiny/stage1/step-000001")
    assert moved <= matrices | {n for n in base if n.startswith(NEW_PREFIXES)} and "proxies" in moved
    assert bool(moved & matrices) == (what == "lora")
    sample.main(["--export", "alone", "--ckpt", "out/tiny"])
    assert load_checkpoint(Path("alone"))[0].state_dict().keys() == base.keys()
    shutil.rmtree("out/tiny/stage1")
    with pytest.raises(UserError, match="the frozen network .*, is gone or was trained again"):
        load_checkpoint(find_checkpoint("out/tiny/stage3"))
    sample.main(["--ckpt", "alone", "--steps", "1", "--out", "v"])


def test_adapters_need_a_base(fresh, monkeypatch):
    monkeypatch.chdir(fresh)
    with pytest.raises(UserError, match="--train lora adds to a trained network: give --wan, or"):
        train.main([*map(str, FAST), "--train", "lora"])


# ------------------------------------------------------------------------------------------------- validation
def test_validation_is_the_same_for_any_number_of_processes(fresh, monkeypatch):
    """Two processes make every other case; the noise and the clips are fixed."""
    monkeypatch.chdir(fresh)
    train.main([*map(str, FAST), "--stage", "1", "--steps", "2", "--valid-every", "1", "--precision", "fp32"])
    first, second = validations(Path("out/tiny"), 1)
    assert first.keys() == second.keys() == {
        *(name for name in first if name.startswith("t ")), "no references", "1 view", "2 views", "3 views",
        "4 views", "two people"} and len(first) == 11 and first != second
    model, _ = load_checkpoint(find_checkpoint("out/tiny"))
    folder = next(Path("cache").glob("toy77000-*"))
    training = data.Dataset(next(Path("cache").glob("toy-*")))
    found = []
    for size in (1, 3):
        parts = []
        for rank in range(size):
            world = train.World(rank, size, torch.device("cpu"))
            valid = train.load_validation(folder, model.config, world, training)
            monkeypatch.setattr("support.monitor.dist.all_reduce", lambda found: parts.append(found.clone()))
            losses = valid.losses(train.loss_of, model, data.NoiseLevels(100.0), "fp32")
        found.append(losses if size == 1 else sum(parts))
    one = train.load_validation(folder, model.config, train.World(0, 1, torch.device("cpu")), training)
    counts = [len(clips) for _, clips, _ in one.cases.values()]
    means = [float(part[:, :n].mean()) for part, n in zip(found[1], counts, strict=True)]
    assert means == pytest.approx([found[0][name] for name in one.cases], rel=1e-6)
    assert found[0] == pytest.approx(second, rel=1e-6)


def test_validation_is_at_fixed_quantiles_with_noise_of_its_own_for_each_case(tmp_path):
    """On three clips with one person and two with two: fewer than it could take."""
    folders = []
    for seed in (5, 6):
        folders.append(toy.training_set(tmp_path, 32, 3, (3, 2), seed=seed))
    world = train.World(0, 1, torch.device("cpu"))
    valid = train.load_validation(folders[0], CONFIGS["tiny"], world, data.Dataset(folders[1]))
    levels, noises = data.NoiseLevels(3.0), []
    drawn = torch.stack([levels.draw(torch.Generator().manual_seed(i)) for i in range(4000)])

    def loss_of(model, batch, sigma, noise):
        noises.append(noise.flatten()[:9])
        return sigma.mean()
    found = valid.losses(loss_of, None, levels, "fp32")
    shares = [float((drawn < loss).float().mean()) for name, loss in found.items() if name.startswith("t ")]
    assert shares == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9], abs=0.03)
    mean = sum(found[name] for name in found if name.startswith("t ")) / 5
    for name, loss in found.items():
        assert loss == pytest.approx(int(name[2:]) / 1000 if name.startswith("t ") else mean, abs=6e-4)
    assert len(noises) == 5 * (3 * 5 + 2) and len(torch.stack(noises).unique(dim=0)) == 5 * 5
    first = list(noises)
    noises.clear()
    assert valid.losses(loss_of, None, levels, "fp32") == found and all(map(torch.equal, first, noises))


def test_a_toy_is_validated_on_a_set_that_is_given(fresh, monkeypatch):
    """The line is what the saved averages lose on that set; the default's is another."""
    monkeypatch.chdir(fresh)
    others = toy.training_set("others", 32, 3, (4, 4), seed=5)
    one = [*map(str, FAST), "--stage", "1", "--steps", "1", "--precision", "fp32"]
    train.main([*one, "--out", "default"])
    train.main([*one, "--valid", str(others), "--out", "given"])
    (default,), (given,) = (validations(Path(name), 1) for name in ("default", "given"))
    model, _ = load_checkpoint(find_checkpoint("given"))
    training = data.Dataset(next(Path("cache").glob("toy-*")))
    valid = train.load_validation(others, model.config, train.World(0, 1, torch.device("cpu")), training)
    expected = valid.losses(train.loss_of, model, data.NoiseLevels(100.0), "fp32")
    assert given == pytest.approx(expected, rel=1e-6) and given.keys() == default.keys()
    assert not any(given[name] == pytest.approx(default[name], rel=1e-4) for name in given)
    assert torch.equal(*(weights_of(name)["model.safetensors"]["proxies"] for name in ("default", "given")))


def test_wan_is_validated_only_on_a_set_that_is_given_of_other_people(small_wan, wan_set):
    one = [*small_wan, "--stage", "1", "--steps", "1", "--out"]
    train.main([*one, "none"])
    Path("again").symlink_to(wan_set)
    for same in (str(wan_set), "again"):
        with pytest.raises(UserError, match=f"--valid {same} is the training set"):
            train.main([*one, "given", "--valid", same])
    shutil.copytree(wan_set / "encoded", "few/encoded")
    lines = Path("few/encoded/index.jsonl").read_text().splitlines(keepends=True)
    Path("few/encoded/index.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(UserError, match="--valid .* shows people of the training set: "):
        train.main([*one, "given", "--valid", "few"])
    assert not Path("given/stage1").exists()
    shutil.copytree(wan_set / "encoded", "others/encoded")
    index = Path("others/encoded/index.jsonl")
    index.write_text(re.sub('"(ann|ben|cho|dan)"', r'"\1 of others"', index.read_text()))
    train.main([*one, "given", "--valid", "others"])  # the folder above it, as --data may be
    assert validations(Path("none"), 1) == []
    (given,) = validations(Path("given"), 1)
    assert "no references" in given and all(0 < loss < math.inf for loss in given.values())


def test_a_damaged_validation_set_is_refused_before_anything_is_deleted(fresh, tiny):
    call("train.py", *FAST, "--stage", 1, cwd=fresh)
    others = toy.training_set(fresh / "others", 32, 3, (4, 4), seed=5)
    for file in others.glob("??/*.safetensors"):
        if file.stem != "empty":
            file.write_bytes(file.read_bytes()[:-9])
    before = weights_of(fresh / "out" / "tiny")
    with pytest.raises(UserError, match="damaged|no whole sample"):
        call("train.py", *FAST, "--stage", 1, "--overwrite", "--valid", others, cwd=fresh)
    assert_equal(before, weights_of(fresh / "out" / "tiny"))


def test_one_expert_alone_makes_no_sample_sheet(fresh, monkeypatch):
    monkeypatch.setattr(monitor.subprocess, "run", None)
    flags = [flag for flag in FAST if flag != "--no-samples"]
    call("train.py", *flags, "--stage", 1, "--expert", "high", cwd=fresh)


def test_losses_of_later_stages_are_not_drawn(tmp_path):
    """They are an older run's: what is trained anew has none yet."""
    def drawn(stage):
        (tmp_path / "loss.svg").unlink(missing_ok=True)
        monitor.draw_losses(tmp_path, stage)
        return (tmp_path / "loss.svg").read_bytes()
    for stage, losses in ((1, (1.0, 0.9)), (2, (0.5, 0.1))):
        (tmp_path / f"stage{stage}").mkdir()
        lines = [json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate(losses, 1)]
        (tmp_path / f"stage{stage}" / "metrics.jsonl").write_text("".join(lines))
    first, both = drawn(1), drawn(2)
    (tmp_path / "stage2" / "metrics.jsonl").unlink()
    assert first == drawn(1) == drawn(2) != both
    ticks = [float(tick) for tick in re.findall(rb'end">(.*?)<', both)]  # losses, not their logarithms
    assert ticks[0] == pytest.approx(0.1, rel=0.3) and ticks[-1] == pytest.approx(1, rel=0.3)


def test_losses_are_drawn(fresh, monkeypatch):
    monkeypatch.chdir(fresh)
    train.main([*map(str, FAST), "--steps", "2"])
    drawn = Path("out/tiny/loss.svg").read_text()
    assert drawn.count("<polyline") >= 2 and "stage2" in drawn and "training" in drawn
    line = json.loads(Path("out/tiny/stage2/metrics.jsonl").read_text().splitlines()[0])
    assert line["memory_gib"] > 0 and line["tflops_per_process"] > 0 and 0 <= line["waiting"] <= 1
    # four clips of 3 frames (1 latent frame each) of 32x32 in patches of 8 pixels; of the 4 slots the front's
    # is a picture, three have 4 proxy tokens each
    tokens = 4 * (3 * 16 + 16 + 3 * 4)
    rounded = 1e-4 * line["tokens_per_s"]  # seconds have four digits
    assert line["tokens_per_s"] * line["seconds"] == pytest.approx(tokens, abs=rounded)


# --------------------------------------------------------------------------------------------------- sharding
def torchrun(ranks, *arguments, cwd, script=ROOT / "train.py", restarts=0):
    """-> whether it ended well, and what it wrote to stderr, torchrun's own traceback included."""
    status, _, said = conftest.torchrun(ranks, script, *arguments, cwd=cwd, restarts=restarts)
    return status == 0, said


def in_one_group(folder, trainings, ranks=2):
    """Lines of Python with calls of train.main, by one torchrun in `folder` -> as of torchrun. All are in one
    process group, as a second one may hang."""
    (folder / "script.py").write_text(f"""import json, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train
world, leave = train.World.join(), train.World.leave
train.World.join, train.World.leave = lambda: world, lambda self: None
def main():
{textwrap.indent(trainings, "    ")}
    leave(world)
train.run_script(main)
""")
    return torchrun(ranks, cwd=folder, script="script.py")


def distance(a, b):
    """Of two networks, relative."""
    difference = sum(((a[name] - b[name]).double() ** 2).sum() for name in a)
    return float((difference / sum((a[name].double() ** 2).sum() for name in a)).sqrt())


def test_sharded_replicated_and_alone_are_one_training(fresh):
    """Three steps, float32: FSDP2 on 1, 2 and 3 processes, DDP on 2, and one process, with and without
    accumulation. Then 2 processes go on as 3."""
    common = [*FAST, "--stage", 1, "--steps", 3, "--precision", "fp32", "--optimizer", "adamw", "--batch", 6]
    call("train.py", *common, "--out", "alone", cwd=fresh)
    assert torchrun(2, *common, "--out", "ddp", cwd=fresh)[0]
    flags = ["--shard", "--micro-batch", 1, "--recompute", "--save-every", 2, "--out", "two"]
    assert torchrun(2, *common, *flags, cwd=fresh)[0]
    assert torchrun(3, *common, "--shard", "--out", "three", cwd=fresh)[0]
    found = {name: weights_of(fresh / name)["ema.safetensors"] for name in ("alone", "ddp", "two", "three")}
    torch.manual_seed(0)
    start = {name: p.detach() for name, p in HarmoView(CONFIGS["tiny"]).named_parameters()}
    assert distance(found["alone"], start) > 5e-4
    for name in ("ddp", "two", "three"):
        assert distance(found["alone"], found[name]) < 1e-6, name
    newest = fresh / "two" / "stage1" / "step-000003"
    files = {path.name for path in newest.iterdir()}
    assert files == {".metadata", "__0_0.distcp", "__1_0.distcp", "checkpoint.json", "ema.safetensors",
                     "spiece.model"}
    flipped = bytearray((newest / "__1_0.distcp").read_bytes())
    flipped[-1] ^= 1
    (newest / "__1_0.distcp").write_bytes(flipped)
    well, said = torchrun(3, *common, "--shard", "--out", "two", "--resume", cwd=fresh)  # from step 2, of two
    assert well and "__1_0.distcp is missing or damaged" in said, said
    assert distance(found["alone"], weights_of(fresh / "two")["ema.safetensors"]) < 1e-6
    well, said = torchrun(2, *common, "--out", "two", "--resume", cwd=fresh)
    assert not well and "trained otherwise (shard True there, False here" in said


@pytest.mark.parametrize("attention", CHOICES["reference_attention"])
def test_sharded_references_are_the_same_training(fresh, attention):
    """One-way: every block runs twice in a forward, for references and for the video."""
    common = [*FAST, "--stage", 1, "--steps", 2, "--precision", "fp32", "--optimizer", "adamw",
              "--reference-attention", attention]
    call("train.py", *common, "--out", "alone", cwd=fresh)
    assert torchrun(2, *common, "--shard", "--micro-batch", 1, "--recompute", "--out", "two", cwd=fresh)[0]
    alone, two = (weights_of(fresh / name)["ema.safetensors"] for name in ("alone", "two"))
    assert distance(alone, two) < 1e-6


@pytest.fixture(scope="session")
def uneven_set(wan, tmp_path_factory):
    """Two sets as people have them, of different people: clips of two sizes, captions of ten and of 480
    tokens (with MFI's more than text_len), views that not all have, pictures from the clip itself."""
    root = tmp_path_factory.mktemp("uneven")
    for name in ("data", "valid"):
        toy.main(["--out", str(root / name), "--size", "48", "--frames", "9", "--fps", "16"])
        path = root / name / "manifest.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for n, line in enumerate(lines):
            line["caption"] = " ".join([line["caption"]] * (1 + 19 * (n % 2)))[:480 + 1700 * (n % 2)]
            for k, person in enumerate(line["identities"]):
                person["id"] += name
                for view in VIEWS[2 + n % 3:]:
                    del person["views"][view]
                person["views"]["front"]["cross"] = n != k
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        data.main(["encode", "--data", str(root / name), "--wan", str(wan / "2.1"), "--size", "32x32",
                   "32x48", "--frames", "5", "--precision", "fp32"])
    texts = [read_sample(root / "data/encoded", name, ["text"])["text"]
             for name in names_in(root / "data/encoded")]
    assert max(map(len, texts)) > 512 - 130 and min(map(len, texts)) < 100
    return root


WAYS = {  # flags of both trainings of a pair, and of the second only; LOG.md has all others, run once
    "all": (["--precision", "bf16"], ["--compile", "--recompute"]),
    "lora": (["--precision", "fp32", "--rank", "2"], ["--compile", "--recompute", "--shard"])}


def test_two_processes_compiled_recomputed_and_sharded_are_the_same_training(uneven_set, wan, tmp_path):
    """README's commands for eight cards, with validation, long captions and clips of two sizes. By aot_eager,
    since inductor takes minutes. However many sizes there are, a block is compiled a few times; a sharded
    network is never whole in a process."""
    common = ["--config", "small", "--wan", str(wan / "2.1"), "--data", str(uneven_set / "data"), "--valid",
              str(uneven_set / "valid"), "--valid-every", "2", "--no-samples", "--stage", "4", "--steps", "4",
              "--batch", "4", "--micro-batch", "1", "--log-every", "1", "--warmup", "1"]
    well, said = in_one_group(tmp_path, f"""import functools, torch
from videos import toy
from networks.lora import new_names
from model import DiTConfig
from torch._dynamo.utils import counters
shard = train.shard
def from_nothing(model, *rest):
    new = new_names(model)
    assert all(p.is_meta for name, p in model.named_parameters() if name not in new)
    shard(model, *rest)
train.shard = from_nothing
torch.compile = functools.partial(torch.compile, backend="aot_eager")
train.CONFIGS["small"] = DiTConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=2, **{WAN_SMALL})
train.TRAIN_RECIPES["small"] = train.TRAIN_RECIPES["1.3b"]
toy.WORLDS["small"] = toy.WORLDS["1.3b"]
for what, (flags, further) in {WAYS}.items():
    for name, flags in (("plain", flags), ("fast", flags + further)):
        torch._dynamo.reset(), counters.clear()
        train.main([*{common}, "--train", what, *flags, "--out", f"{{what}}-{{name}}"])
    assert 0 < counters["stats"]["unique_graphs"] <= 10, counters
""")
    assert well, said
    for what in WAYS:
        plain, fast = [], []
        for name, losses in (("plain", plain), ("fast", fast)):
            out = tmp_path / f"{what}-{name}"
            losses += [line["loss"] for line in metrics(out, 4)]
            losses += [loss for valid in validations(out, 4) for loss in valid.values()]
        assert len(plain) > 14 and all(map(math.isfinite, plain))
        assert fast == pytest.approx(plain, rel=1e-5 if what == "lora" else 2e-2), what


def test_a_lost_process_ends_all_and_torchrun_starts_them_again(fresh):
    """SIGKILL to one of two at step 3: torchrun --max-restarts 1 with --resume ends in the bits of an
    undisturbed run; without, the run fails at once."""
    common = [*FAST, "--stage", 1, "--steps", 6, "--save-every", 2, "--precision", "fp32"]
    assert torchrun(2, *common, "--out", "straight", cwd=fresh)[0]
    killer = f"""import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
real, calls = train.draw_noise, []
def draw_noise(*arguments):
    calls.append(1)
    if len(calls) == 4 and os.environ["RANK"] == "1" and not os.path.exists("killed"):
        open("killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
train.draw_noise = draw_noise
sys.argv[0] = "train.py"
train.run_script(train.main)
"""
    (fresh / "killer.py").write_text(killer)
    well, said = torchrun(2, *common, "--out", "lost", cwd=fresh, script="killer.py")
    assert not well and "another process of this run has ended" in said
    assert steps_in(fresh / "lost/stage1")[-1].name < "step-000006"
    (fresh / "killed").unlink()
    flags = ["--out", "again", "--resume"]
    well, said = torchrun(2, *common, *flags, cwd=fresh, script="killer.py", restarts=1)
    assert well and (fresh / "killed").exists(), said
    assert_equal(weights_of(fresh / "straight"), weights_of(fresh / "again"))


def test_a_bad_batch_of_one_process_is_skipped_by_all(fresh):
    """The loss of rank 1 alone is nan, in one micro-step of step 2: neither process takes that step, with
    whole weights and with sharded ones."""
    common = [*FAST, "--stage", 1, "--steps", 4, "--precision", "fp32", "--optimizer", "adamw",
              "--micro-batch", 1, "--out"]
    well, said = in_one_group(fresh, f"""from torch.optim.optimizer import register_optimizer_step_post_hook
real, calls, taken = train.loss_of, [], []
def loss_of(*arguments):
    calls.append(1)
    return real(*arguments) * (float("nan") if len(calls) == 3 and world.rank == 1 else 1)
def step_taken(optimizer, *_):
    taken.append(float(sum(train.local(p).detach().sum() for p in optimizer.param_groups[0]["params"])))
train.loss_of = loss_of
register_optimizer_step_post_hook(step_taken)
for name, flags in (("ddp", []), ("shard", ["--shard"])):
    calls.clear(), taken.clear()
    train.main([*{list(map(str, common))}, name, *flags])
    with open(f"{{name}}-{{world.rank}}.json", "w") as file:
        json.dump(taken, file)
""")
    assert well, said
    for name in ("ddp", "shard"):
        first, second = (json.loads((fresh / f"{name}-{rank}.json").read_text()) for rank in (0, 1))
        assert len(first) == len(second) == 3 and all(map(math.isfinite, first + second)), name
        assert first == second or name == "shard"  # there each has its own half of the weights
        assert [line["loss"] is None for line in metrics(fresh / name, 1)] == [False, True, False, False]
        assert all(p.isfinite().all() for p in weights_of(fresh / name)["ema.safetensors"].values())
    assert distance(*(weights_of(fresh / name)["ema.safetensors"] for name in ("ddp", "shard"))) < 1e-6


def test_sigterm_to_several_processes_saves_and_the_run_can_go_on(fresh):
    """To torchrun, which sends it on to both and then ends with 1 itself, and to rank 1 alone: both processes
    stop after the same step, save and end with 0. Resumed, the bits are an undisturbed run's."""
    straight, both, alone = (
        [*map(str, FAST), "--stage", "1", "--steps", "6", "--precision", "fp32", "--out", name]
        for name in ("straight", "both", "alone"))
    stopping = """
real, calls, end = train.draw_noise, [], os._exit
def draw_noise(*arguments):
    calls.append(1)
    if len(calls) == 3 and world.rank == 1:
        arrived = []
        handler = signal.signal(signal.SIGTERM, lambda *_: arrived.append(1))
        os.kill(whom, signal.SIGTERM)
        while not arrived:
            time.sleep(0.01)
        handler(signal.SIGTERM, None)
    return real(*arguments)
def ended(status):
    open(f"ended-{world.rank}-{status}", "w").close()
    end(status)
train.draw_noise, os._exit = draw_noise, ended
"""
    well, said = in_one_group(fresh, f"""whom = os.getppid()
{stopping}
train.main({both})""")
    assert not well and "got signal: 15" in said, said
    assert {path.name for path in fresh.glob("ended-*")} == {"ended-0-0", "ended-1-0"}, said
    assert [path.name for path in steps_in(fresh / "both" / "stage1")] == ["step-000003"]
    well, said = in_one_group(fresh, f"""train.main({straight})
whom = os.getpid()
{stopping}
train.main({alone})
for stopped in ({alone}, {both}):
    train.main([*stopped, "--resume"])""")
    assert well, said
    for name in ("alone", "both"):
        assert [path.name for path in steps_in(fresh / name / "stage1")] == ["step-000003", "step-000006"]
        assert_equal(weights_of(fresh / "straight"), weights_of(fresh / name))


# --------------------------------------------------------------------------------------------- Mv2ID's recipe
def test_mv2id_is_a_preset_of_flags(fresh, monkeypatch):
    monkeypatch.chdir(fresh)
    train.main([*map(str, FAST), "--mv2id", "--stage", "1", "--steps", "1"])
    meta = json.loads((find_checkpoint("out/tiny") / "checkpoint.json").read_text())
    assert meta["config"]["rope_layout"] == "rd" and meta["config"]["proxy_tokens"] == 0
    assert meta["config"]["vit_dim"] == 0 and meta["flags"]["mask"] == 0.6 and meta["flags"]["pairs"] == "in"
    args = train.arguments(["--mask", "0.3", "--mv2id", "--rope-layout", "append"])  # what is given too wins
    assert (args.mask, args.rope_layout, args.proxy_tokens, args.no_mfi) == (0.3, "append", 0, True)
    encoded = str(next(Path("cache").glob("toy-*-cross-mask0-*")))
    with pytest.raises(UserError, match="was encoded with --mask 0.0, not 0.6"):
        train.main([*map(str, FAST), "--mv2id", "--out", "x", "--data", encoded])


def test_sheets_at_every_checkpoint(fresh, monkeypatch):
    monkeypatch.chdir(fresh)
    arguments = [argument for argument in map(str, FAST) if argument != "--no-samples"]
    train.main([*arguments, "--stage", "1", "--steps", "4", "--save-every", "2", "--sample-saves"])
    sheets = {path.name for path in Path("out/tiny/stage1").glob("*.png")}
    assert sheets == {"sample.png", "sample-000002.png"}


def test_a_network_is_sharded_over_processes_only(fresh, monkeypatch):
    monkeypatch.chdir(fresh)
    with pytest.raises(UserError, match="--shard splits a network over processes: start with torchrun"):
        train.main([*map(str, FAST), "--shard"])
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="Muon needs them whole: give --optimizer adamw"):
        train.main([*map(str, FAST), "--shard", "--optimizer", "muon"])
