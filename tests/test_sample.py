import json
import math
import os
import re
import shutil
import signal
import time
import weakref
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import av
import diffusers
import pytest
import torch
from conftest import ROOT, WAN_SMALL, call, run
from PIL import Image
from safetensors.torch import load_file, save_file
from helpers import FULL_DISK, fork, kill, wait_for

import sample
from model import CONFIGS, DiTConfig, HarmoView, load_wan, on_meta
from networks import solvers
from networks.encoders import NEGATIVE_PROMPT, WanEncoders, stream_blocks
from rope import VIEWS
from support.checkpoints import find_checkpoint, save_checkpoint
from support.script import UserError, sha256_of
from train import STAGES
from videos import jobs, toy
from videos.jobs import Job, contact_sheet
from videos.pictures import to_image, write_video

PROMPT = (
    "a close-up of two people, the first on the left in a red shirt nods with the mouth closed, "
    "the second on the right in a blue shirt turns away with the mouth open, soft light, a grey wall"
)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Reference pictures of two held-out people, as files: 0_front.png ... 1_back.png."""
    folder = tmp_path_factory.mktemp("pictures")
    for k, views in enumerate(toy.benchmark_references(48)[:2]):
        for view, picture in zip(VIEWS, views, strict=True):
            to_image(picture, 48).save(folder / f"{k}_{view}.png")
    return folder


# --------------------------------------------------------------------------------------- solvers and guidance
def test_euler_is_exact_on_a_straight_path():
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 1, 3, 4, 4)
    for shift in (1, 5):
        assert torch.allclose(solvers.solve(lambda x, t: noise - x0, noise, 7, shift, "euler"), x0, atol=1e-5)


def test_euler_visits_the_shifted_times():
    seen = []
    solvers.solve(lambda x, t: seen.append(float(t)) or x * 0, torch.zeros(1), 4, 3.0, "euler")
    assert seen == pytest.approx([1000 * 3 * s / (1 + 2 * s) for s in (1, 0.75, 0.5, 0.25)], rel=1e-6)


@pytest.mark.parametrize("solver, first", [("unipc", Fraction(999, 1000)), ("dpm++", Fraction(1)),
                                           ("euler", Fraction(1))])
@pytest.mark.parametrize("steps, shift", [(1, 5), (5, 3), (14, 8), (40, 12), (50, 5)])
def test_noise_levels_and_times_are_wans(solver, first, steps, shift):
    """Its get_sampling_sigmas and its UniPC's, in exact fractions; times are cut to whole ones."""
    sigma, times = solvers.schedule(steps, shift, solver)
    levels = [first * (1 - Fraction(i, steps)) for i in range(steps + 1)]
    levels = [shift * level / (1 + (shift - 1) * level) for level in levels]
    assert sigma.tolist() == pytest.approx([float(level) for level in levels], rel=1e-12)
    whole = [level if solver == "euler" else Fraction(int(1000 * level), 1000) for level in levels[:-1]]
    assert times.tolist() == pytest.approx([float(1000 * level) for level in whole], rel=1e-12)


def test_wans_recipes_are_its_authors():
    """As in its wan/configs and generate.py."""
    found = {name: [recipe[key] for key in ("steps", "shift", "solver", "guide_text", "fps")]
             for name, recipe in sample.SAMPLE_RECIPES.items() if name != "toy"}
    assert found == {"wan2.1": [50, 5.0, "unipc", (5.0,), 16], "wan2.2": [40, 12.0, "unipc", (4.0, 3.0), 16]}


def test_euler_converges_at_first_order():
    """dx/dsigma = x from sigma 1 to 0 shrinks x by e."""
    error = [
        abs(
            float(solvers.solve(lambda x, t: x, torch.ones(1, dtype=torch.float64), n, 1.0, "euler"))
            - math.exp(-1)
        )
        for n in (50, 100)
    ]
    assert error[0] < 0.005 and error[0] / error[1] == pytest.approx(2, rel=0.05)


def test_guidance_is_the_weighted_sum_of_three_predictions():
    def model(x, t, text, refs, vit, cache):
        return text.mean() * (1 if refs == [{}] else 10) + (0 if vit == [None] else 100)

    x, text, no_text = torch.zeros(1), torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 3.0)
    full, alone, nothing = 20 + 100, 2, 3
    for a, b in ((1, 1), (1, 2), (3, 1.5), (0, 0), (4, None)):  # None: the caption's
        recipe = dict(guide_text=(a,), guide_refs=b)
        velocity = sample.guided(model, text, no_text, ([{"front": 0}], [0]), recipe)
        b = a if b is None else b
        assert velocity(x, torch.tensor(5.0)) == nothing + a * (alone - nothing) + b * (full - alone)


def falling(x, t):
    """A velocity that is neither constant nor linear in x or t."""
    return torch.sin(3 * x) + x * (t / 1000) ** 2 - 0.3


@pytest.mark.parametrize("solver", solvers.SOLVERS[:2])
@pytest.mark.parametrize("steps, shift", [(1, 5.0), (2, 5.0), (3, 1.0), (10, 5.0), (40, 12.0)])
def test_solvers_are_diffusers_schedulers(solver, steps, shift):
    kind = diffusers.UniPCMultistepScheduler if solver == "unipc" else diffusers.DPMSolverMultistepScheduler
    oracle = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2)
    oracle.set_timesteps(steps)
    sigma, times = solvers.schedule(steps, shift, solver)
    # Wan's own schedule, in either's arithmetic
    oracle.sigmas, oracle.timesteps = sigma.float(), times.long()
    x = start = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    for t in oracle.timesteps:
        x = oracle.step(falling(x, t.float()), t, x).prev_sample
    ours = solvers.solve(falling, start, steps, shift, solver)
    assert (ours - x).norm() < 1e-4 * x.norm()


@pytest.mark.parametrize("solver", solvers.SOLVERS[:2])
def test_multistep_solvers_converge_faster_than_euler(solver):
    truth = solvers.solve(falling, torch.ones(1, dtype=torch.float64), 4000, 3.0, "euler")
    error = [
        abs(float(solvers.solve(falling, torch.ones(1, dtype=torch.float64), n, 3.0, solver) - truth))
        for n in (5, 20)
    ]
    assert error[1] < error[0] / 8


def test_wan22_switches_experts_where_its_authors_do():
    recipe, boundary = sample.SAMPLE_RECIPES["wan2.2"], sample.BOUNDARY
    how = recipe["steps"], recipe["shift"], recipe["solver"]
    _, times = solvers.schedule(*how)
    assert len(times) == 40 and times[0] == 999 and torch.equal(times, times.floor())
    assert int((times >= 875).sum()) == int((times >= 1000 * boundary).sum()) == 26
    called = []

    class Network:
        def __init__(self, name):
            self.name = name

        def __call__(self, x, t, text, refs, vit, cache):
            called.append((self.name, float(t[0]), len(alive)))
            return 0 * x + text.mean()

    alive = weakref.WeakSet()

    def load(name):
        network = Network(name)
        alive.add(network)
        return network

    loads = [lambda: load("high"), lambda: load("low")]
    experts = sample.Experts(loads, None, torch.device("cpu"), boundary)
    text, no_text = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    velocity = sample.guided(experts, text, no_text, (None, None), recipe, boundary)
    said = []
    solvers.solve(lambda x, t: said.append(velocity(x, t)) or said[-1], torch.zeros(1), *how)
    assert [name for name, *_ in called] == 52 * ["high"] + 28 * ["low"]  # two forwards a step
    assert {held for *_, held in called} == {1}  # one expert in memory at a time
    assert [float(v) for v in said] == 26 * [4.0] + 14 * [3.0]  # each with its own guidance


@pytest.mark.parametrize("offload", [False, True])
@torch.no_grad()
def test_each_expert_keeps_what_its_one_way_references_computed(offload):
    """Two people, dropped views, two guidance scales, two networks: as without a cache, and computed once."""
    torch.manual_seed(0)
    config = CONFIGS["tiny"]
    networks, computed = [HarmoView(config).requires_grad_(False) for _ in range(2)], []
    layers = config.num_layers
    for network in networks:
        for p in network.parameters():
            p.normal_(std=0.1)

        def counted(block, video, refs, *others):
            computed.extend([1] * (refs is not None))
            return block(video, refs, *others)
        network.run = counted
        if offload:
            stream_blocks(network, torch.device("cpu"))
    C, E = config.in_dim, config.text_dim
    refs = [{view: torch.randn(1, C, 8, 8) for view in views} for views in (("front", "back"), ("left",))]
    vit = [torch.randn(1, config.vit_levels, 17, config.vit_dim), None]
    text, no_text, noise = torch.randn(1, 9, E), torch.randn(1, 4, E), torch.randn(1, C, 3, 8, 16)
    held = {}  # of each term of guidance, the networks whose keys and values are in memory

    def make(wrap):
        loads = [lambda network=network: network for network in networks]
        experts = sample.Experts(loads, config, torch.device("cpu"), 0.875)
        recipe = dict(guide_text=(3.0,), guide_refs=2.0)
        velocity = sample.guided(wrap(experts), text, no_text, (refs, vit), recipe)
        return solvers.solve(velocity, noise, 8, 5.0, "unipc")

    def watched(experts):
        def call(x, t, tokens, r, features, cache):
            out = experts(x, t, tokens, r, features, cache)
            held.setdefault(id(cache), []).append(sorted(cache))
            return out
        return call
    kept = make(watched)
    assert len(computed) == 2 * 3 * layers  # once for each network and term
    assert len(held) == 3 and all(states[0] == [0] and states[-1] == [1] for states in held.values())
    plain = make(lambda experts: lambda *inputs: experts(*inputs[:-1]))
    assert len(computed) == (2 * 3 + 8 * 3) * layers
    assert (kept - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_unknown_solver_and_no_steps():
    """By both ways in: solve, and the generator that sampling takes."""
    for ask in (lambda *how: solvers.solve(None, torch.zeros(1), *how),
                lambda *how: next(solvers.solver_steps(torch.zeros(1), *how))):
        with pytest.raises(ValueError, match="'magic'; expected at least one, of unipc"):
            ask(4, 1, "magic")
        with pytest.raises(ValueError, match="0 steps"):
            ask(0, 1, "euler")


# ---------------------------------------------------------------------------------------------- the whole job
def test_references_in_video_out(tiny, pictures, tmp_path):
    refs = ["--refs", pictures / "0_front.png", pictures / "0_left.png", "--refs",
            f"back={pictures / '1_front.png'}"]
    command = [*refs, "--prompt", PROMPT, "--steps", 2, "--ckpt", tiny / "out" / "tiny"]
    said = call("sample.py", *command, "--out", "a", cwd=tmp_path)
    assert f"stage {max(STAGES)} {STAGES[max(STAGES)].name}" in said and "a.mp4" in said and "a.png" in said
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == toy.WORLDS["tiny"]["frames"]
    call("sample.py", *command, "--out", "b", cwd=tmp_path)
    call("sample.py", *command, "--out", "c", "--seed", 1, cwd=tmp_path)
    a, b, c = (Image.open(tmp_path / f"{name}.png").tobytes() for name in "abc")
    assert a == b and a != c  # a seed repeats its video, another one does not


def toy_jobs(which):
    """Benchmark cases of one person as jobs with all views."""
    jobs = []
    for number in which:
        clip, cast = toy.benchmark_cases()[number]
        pictures = toy.held_out_references(cast, VIEWS, 32)
        jobs.append(Job(toy.caption(clip), pictures, seed=number, size=(32, 32)))
    return jobs


FAST = sample.SAMPLE_RECIPES["toy"] | {"steps": 2}


@pytest.mark.parametrize("precision, near", [("fp32", 1e-4), ("bf16", 0.1)])
def test_a_video_does_not_depend_on_its_batch(tiny, precision, near):
    model, encoders = sample.load(sample.find(tiny / "out" / "tiny"), hardware=sample.Hardware(precision))
    together = sample.generate(model, encoders, toy_jobs([0, 1, 2]), FAST, 3, batch=2)
    assert [video.shape for video in together] == 3 * [(3, 3, 32, 32)]
    for number in (1, 2):
        (alone,) = sample.generate(model, encoders, toy_jobs([number]), FAST, 3)
        torch.testing.assert_close(together[number], alone, atol=near, rtol=0)


def test_sampling_with_references_is_its_parts(tiny):
    """Two people, one without a front, two guidance scales, two videos in one batch."""
    found = sample.find(tiny / "out" / "tiny")
    model, encoders = sample.load(found, hardware=sample.Hardware("fp32"))
    network = model.load[0]()
    torch.manual_seed(0)
    for p in network.parameters():
        p += 0.05 * torch.randn_like(p)
    model.load = [lambda: network]
    recipe = sample.SAMPLE_RECIPES["toy"] | dict(steps=2, shift=3.0, guide_text=(2.0,), guide_refs=1.5,
                                                 negative="a dark room")
    views = ("left",), ("front", "back")
    jobs = [Job(PROMPT, [{view: toy.benchmark_references(32)[i, VIEWS.index(view)] for view in names}
                         for i, names in zip(people, views)], seed, (32, 64))
            for seed, people in ((5, (0, 1)), (3, (2, 3)))]
    videos = sample.generate(model, encoders, jobs, recipe, found.frames, batch=2)
    text, no_text = encoders.text([PROMPT]), encoders.text(["a dark room"])
    for job, video in zip(jobs, videos, strict=True):
        refs = [{view: encoders.encode(p[None, :, None])[:, :, 0] for view, p in person.items()}
                for person in job.references]
        vit = [None, encoders.features(job.references[1]["front"][None])]
        x = torch.randn(1, 48, 3, 8, 16, generator=torch.Generator().manual_seed(job.seed))
        for sigma, after in ((1.0, 0.75), (0.75, 0)):  # a half, shifted by 3
            with torch.no_grad():
                nothing, caption, both = (network(x, torch.tensor([1000 * sigma]), *given) for given in (
                    (no_text, [{}, {}]), (text, [{}, {}]), (text, refs, vit)))
            x = x + (after - sigma) * (nothing + 2 * (caption - nothing) + 1.5 * (both - caption))
        truth = encoders.decode(x)[0]
        assert (truth.abs() < 1).float().mean() > 0.5 and rms(truth) > 0.1
        torch.testing.assert_close(video, truth, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["t2v", "harmony"])  # the first stage has both names: see --no-curriculum
def test_who_has_never_seen_references_is_shown_none(name, tiny):
    found = sample.find(tiny / "out" / "tiny" / "stage1")
    found = replace(found, meta=found.meta | {"name": name})
    jobs = sample.make_jobs(sample.arguments([]), found, 3, (32, 32))
    assert [any(job.references) for job in jobs] == [name == "harmony"] * len(jobs)


def rms(difference):
    return float(difference.square().mean().sqrt())


@pytest.mark.parametrize("kind", ["toy", "wan"])
def test_bf16_repeats_to_the_bit_and_is_near_float32(kind, tiny, wan):
    def make(precision):
        folder = tiny / "out" / "tiny" if kind == "toy" else wan / "2.1"
        found = sample.find(folder)
        model, encoders = sample.load(found, hardware=sample.Hardware(precision))
        jobs = toy_jobs([0, 1]) if kind == "toy" else [Job("a close-up", None, size=(32, 48))]
        recipe = sample.SAMPLE_RECIPES[found.kind] | {"steps": 2}
        return torch.stack(sample.generate(model, encoders, jobs, recipe, 5 if kind == "wan" else 3))

    once, again, exact = make("bf16"), make("bf16"), make("fp32")
    assert torch.equal(once, again)
    assert 0 < rms(once - exact) < 0.05 * rms(exact)


def test_swap_exchanges_the_references_and_keeps_the_noise(tiny, tmp_path, monkeypatch):
    calls = []
    guided = sample.guided

    def recording(model, text, no_text, references, *rest):
        calls.append((text, *references))
        return guided(model, text, no_text, references, *rest)

    monkeypatch.setattr(sample, "guided", recording)
    arguments = ["--ckpt", str(tiny / "out" / "tiny"), "--prompt", PROMPT, "--swap", "--steps", "1"]
    sample.main([*arguments, "--out", str(tmp_path / "s")])
    (text, first, vit), (again, second, vit_again) = calls
    assert torch.equal(text, again)
    assert all(torch.equal(first[k][v], second[1 - k][v]) for k in (0, 1) for v in VIEWS)
    assert all(torch.equal(vit[k], vit_again[1 - k]) for k in (0, 1))
    assert all((tmp_path / name).exists() for name in ("s-1.mp4", "s-2.mp4"))
    with Image.open(tmp_path / "s.png") as sheet:
        notes = [json.loads(sheet.text[f"video {i}"]) for i in (1, 2)]
    assert notes[0].pop("made_of") != notes[1].pop("made_of")
    assert notes[0] == notes[1] and notes[0]["seed"] == 0


# --------------------------------------------------------------------------------------------------- real Wan
SMALL = ["--frames", "5", "--size", "32x48", "--steps", "3"]


def test_text_to_video_from_a_wan_folder(wan, tmp_path):
    command = ["--ckpt", wan / "2.1", *SMALL, "--prompt", "a cat &amp; a  dog"]
    said = call("sample.py", *command, "--out", "a", cwd=tmp_path)
    assert re.search(r" in [\d.]+ s, [\d.e-]+ seconds a step", said)
    with av.open(str(tmp_path / "a.mp4")) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        note = json.loads(container.metadata["comment"])
        assert container.streams.video[0].average_rate == 16
    assert len(frames) == 5 and frames[0].shape == (256, 384, 3)
    assert (note["prompt"], note["seed"], note["steps"]) == ("a cat &amp; a  dog", 0, 3)
    assert (note["solver"] == "unipc" and note["guide_text"] == [5.0] and note["negative"] == NEGATIVE_PROMPT)
    with Image.open(tmp_path / "a.png") as sheet:
        assert json.loads(sheet.text["video 1"]) == note  # any file tells how to make it again
        first = sheet.tobytes()
    changes = {"b": ["--offload"], "c": ["--seed", "1"], "d": ["--shift", "12"], "e": ["--tile", "32"]}
    for name, extra in changes.items():
        call("sample.py", *command, *extra, "--out", name, cwd=tmp_path)
    b, *others = (Image.open(tmp_path / f"{name}.png").tobytes() for name in changes)
    assert b == first and first not in others


def wan_by_hand(folder, prompt, negative, seed, steps, device):
    """Text-to-video of one 5-frame 32x48 clip, in the order of Wan's paper, nothing shared with sample.py but
    the networks and the solver."""
    encoders = WanEncoders(folder, device)
    text, no_text = (encoders.text([words]).to(device) for words in (prompt, negative))
    network = on_meta(folder)
    load_wan(network, folder)
    network.to(device)
    x = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(seed)).to(device)

    def velocity(x, t):
        unguided = network(x, t[None], no_text)
        return unguided + 5 * (network(x, t[None], text) - unguided)

    with torch.no_grad():
        return encoders.decode(solvers.solve(velocity, x, steps, 5.0, "unipc"))[0].cpu()


def test_the_whole_pipeline_is_its_parts(wan):
    found = sample.find(wan / "2.1")
    model, encoders = sample.load(found, hardware=sample.Hardware("fp32"))
    prompts = ("a close-up", "a dark room of two")
    jobs = [Job(prompt, None, seed, (32, 48)) for seed, prompt in enumerate(prompts)]
    videos = sample.generate(model, encoders, jobs, sample.SAMPLE_RECIPES[found.kind] | {"steps": 3}, 5)
    for job, video in zip(jobs, videos, strict=True):
        truth = wan_by_hand(wan / "2.1", job.prompt, NEGATIVE_PROMPT, job.seed, 3, model.device)
        assert video.shape == (3, 5, 32, 48)
        torch.testing.assert_close(video, truth, atol=1e-4, rtol=0)
    assert not torch.allclose(*videos, atol=0.01)


def test_two_experts_each_make_their_part(wan, tmp_path):
    call("sample.py", "--ckpt", wan / "2.2", *SMALL, "--prompt", "x", cwd=tmp_path)
    found = sample.find(wan / "2.2")
    model, _ = sample.load(found, hardware=sample.Hardware("fp32"))
    assert found.kind == "wan2.2" and model.boundary == 0.875
    x, text = torch.randn(1, 16, 2, 4, 4).to(model.device), torch.zeros(1, 3, 32, device=model.device)
    for part, t in (("high_noise_model", 875.0), ("low_noise_model", 874.0)):
        network, t = on_meta(wan / "2.2" / part), torch.tensor([t], device=model.device)
        load_wan(network, wan / "2.2" / part)
        with torch.no_grad():
            assert torch.equal(model(x, t, text), network.to(model.device)(x, t, text))


HEAD = "head.head.weight"  # what the LoRA below changes


@pytest.fixture
def lora(tmp_path):
    """Its two halves, which are in x.safetensors."""
    g = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 128, generator=g), torch.randn(64, 2, generator=g)
    layer = HEAD.removesuffix(".weight")
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, tmp_path / "x.safetensors")
    return down, up


def test_a_lora_is_merged_before_the_first_step(lora, wan, tmp_path):
    """The same as from a folder whose weights were changed by hand."""
    down, up = lora
    shutil.copytree(wan / "2.1", tmp_path / "merged")
    file = tmp_path / "merged" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {HEAD: tensors[HEAD] + 0.7 * up @ down}, file)
    sheets = {}
    for name, flags in {"plain": [wan / "2.1"], "merged": ["merged"],
                        "lora": [wan / "2.1", "--lora", "x.safetensors:0.7"]}.items():
        call("sample.py", "--ckpt", *flags, *SMALL, "--precision", "fp32", "--prompt", "x", "--out", name,
             cwd=tmp_path)
        with Image.open(tmp_path / f"{name}.png") as sheet:
            sheets[name] = torch.tensor(list(sheet.tobytes()))
            note = json.loads(sheet.text["video 1"])
        assert note["lora"] == (["x.safetensors:0.7"] if name == "lora" else [])
    assert (sheets["lora"] - sheets["merged"]).abs().max() <= 1  # merged in another order, then rounded
    assert (sheets["lora"] - sheets["plain"]).abs().max() > 20


@pytest.mark.parametrize("only, changed", [("", [True, True]), ("high=", [True, False]),
                                           ("low=", [False, True])])
@pytest.mark.usefixtures("lora")
def test_a_lora_changes_both_experts_or_the_one_that_is_named(only, changed, wan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Asked(Exception):
        pass

    def generate(model, *_):
        for load, part, change in zip(model.load, ("high_noise_model", "low_noise_model"), changed):
            before = load_file(wan / "2.2" / part / "diffusion_pytorch_model.safetensors")
            now = load().cpu().state_dict()
            assert [name for name in before if not torch.equal(before[name], now[name])] == [HEAD] * change
        raise Asked
    monkeypatch.setattr(sample, "generate", generate)
    with pytest.raises(Asked):
        sample.main(["--ckpt", str(wan / "2.2"), *SMALL, "--precision", "fp32", "--prompt", "x", "--out", "x",
                     "--lora", f"{only}x.safetensors"])


@pytest.mark.parametrize("only", ["", "high=", "low="])
def test_a_lora_that_fits_nothing_is_refused_before_the_first_step(only, wan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "generate", None)
    save_file({"blocks.9.self_attn.q.diff": torch.ones(128, 128)}, "x.safetensors")
    with pytest.raises(UserError, match="x.safetensors: none of its 1 keys fits: .*expected a LoRA for Wan"):
        sample.main(["--ckpt", str(wan / "2.2"), *SMALL, "--prompt", "x", "--out", "x",
                     "--lora", f"{only}x.safetensors"])
    assert [path.name for path in Path().iterdir()] == ["x.safetensors"]


def test_plain_wan22_loads_each_expert_once_for_all_videos(wan):
    found = sample.find(wan / "2.2")
    model, encoders = sample.load(found, hardware=sample.Hardware("fp32"))
    loaded, loads = [], model.load
    model.load = [lambda role=role: loaded.append(role) or loads[role]() for role in (0, 1)]
    jobs = [Job("x", None, seed, (32, 48)) for seed in range(3)]
    sample.generate(model, encoders, jobs, sample.SAMPLE_RECIPES[found.kind] | {"steps": 4}, 5)
    assert loaded == [0, 1]


def test_two_experts_load_once_for_all_videos_with_references_too(tiny, monkeypatch):
    """Both are the same network here, so that the videos are those of one. What references keep is in memory
    for one video at a time, and nothing of denoising is when the videos are decoded."""
    found = sample.find(tiny / "out" / "tiny")
    one, encoders = sample.load(found, hardware=sample.Hardware("fp32"))
    loaded, kept, running, decode, solver_steps = [], [], [], encoders.decode, solvers.solver_steps

    def watched_steps(*how):
        running.append(solver_steps(*how))
        return running[-1]

    def watched_decode(latent):
        assert running and all(solver.gi_frame is None for solver in running)
        assert not any(keys() is not None for keys in kept)
        return decode(latent)
    monkeypatch.setattr(sample, "solver_steps", watched_steps)
    monkeypatch.setattr(encoders, "decode", watched_decode)

    class Watched:
        def __init__(self, network):
            self.network = network

        def __call__(self, *inputs):
            out, (keys, _) = self.network(*inputs), inputs[-1][0]
            if not any(other() is keys for other in kept):
                kept.append(weakref.ref(keys))
            assert sum(other() is not None for other in kept) == 1
            return out

    def load(role):
        loaded.append(role)
        return Watched(one.load[0]())
    loads = [lambda role=role: load(role) for role in (0, 1)]
    two = sample.Experts(loads, found.config, one.device, 0.9, "fp32")
    jobs = [job for job in toy.held_out(("front",), found.frames, found.size[0]) if len(job.references) == 1]
    recipe = sample.SAMPLE_RECIPES["toy"] | {"steps": 6, "shift": 5.0, "solver": "unipc"}
    expected, videos = (sample.generate(model, encoders, jobs, recipe, found.frames) for model in (one, two))
    assert len(jobs) > 1 and loaded == [0, 1]
    assert len(kept) == 2 * len(jobs)  # once for each video and expert
    assert all(torch.equal(a, b) for a, b in zip(expected, videos))


def test_prompts_from_a_file(wan, tmp_path):
    lines = [{"prompt": "a dog"}, {"prompt": "ein Bär", "seed": 5}]
    (tmp_path / "jobs.jsonl").write_text(
        "\ufeff" + "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n",
        encoding="utf-8",
    )
    call("sample.py", "--ckpt", wan / "2.1", *SMALL, "--prompts", "jobs.jsonl", "--out", "v", cwd=tmp_path)
    for i, (prompt, seed) in enumerate((("a dog", 0), ("ein Bär", 5)), 1):
        with av.open(str(tmp_path / f"v-{i}.mp4")) as container:
            note = json.loads(container.metadata["comment"])
        assert (note["prompt"], note["seed"]) == (prompt, seed)


@pytest.mark.parametrize(
    "arguments, says",
    [("--frames 6", "6 frames of 480x832: expected 4n\\+1 frames"),
     ("--size 40x48", "81 frames of 40x48: expected .* multiples of 16"),
     ("--refs a_front.png", "plain Wan, which has never seen references"),
     ("--tile 20 --frames 5 --size 32x48 --steps 1", "VAE tile 20")],
)
def test_wan_bad_input(arguments, says, wan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        sample.main(["--ckpt", str(wan / "2.1"), "--prompt", "x", *arguments.split()])


@pytest.mark.parametrize("file", ["Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google"])
def test_an_incomplete_wan_folder(file, wan, tmp_path):
    shutil.copytree(wan / "2.1", tmp_path / "wan")
    (tmp_path / "wan" / file).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="holds no|no such file"):
        sample.load(sample.find(tmp_path / "wan"))


def test_an_export_is_the_same_network_in_bf16(tiny, tmp_path):
    run_folder, out = tiny / "out" / "tiny", tmp_path / "small"
    call("sample.py", "--ckpt", run_folder, "--export", out, cwd=tmp_path)
    whole, small = (sample.load(sample.find(folder))[0].load[0]() for folder in (run_folder, out))
    for (name, a), b in zip(whole.named_parameters(), small.parameters()):
        assert torch.equal(a.bfloat16().float(), b), name
    assert not (out / "optimizer.safetensors").exists()
    call("sample.py", "--ckpt", out, "--steps", 1, "--prompt", PROMPT, "--out", "a", cwd=tmp_path)
    assert (tmp_path / "a.mp4").exists()
    (tmp_path / "mine").mkdir()
    for folder in (tmp_path / "mine", out):
        before = list(folder.iterdir())
        with pytest.raises(UserError, match="exists: remove it or choose another"):
            sample.main(["--ckpt", str(run_folder), "--export", str(folder)])
        assert list(folder.iterdir()) == before


def test_without_a_checkpoint_a_run_in_out_comes_before_the_toy_of_the_code(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sample.arguments([]).ckpt == sample.default_checkpoint() == str(ROOT / "assets" / "toy")
    Path("out").mkdir()
    Path("out/toy").symlink_to(tiny / "out" / "tiny")
    assert sample.arguments([]).ckpt == sample.default_checkpoint() == "out/toy"


# -------------------------------------------------------------------------------------------------- bad input
@pytest.fixture
def broken(tmp_path, pictures):
    (tmp_path / "front.txt").write_text("not a picture")
    whole = (pictures / "0_front.png").read_bytes()
    (tmp_path / "cut_front.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noview.png").write_bytes(whole)
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat.jsonl").write_text('{"prompt": "x"}\n{"prompt": "x", "refs": ["noview.png"]}\n')
    return tmp_path


@pytest.mark.parametrize(
    "arguments, says",
    [("--refs gone_front.png --prompt x", "gone_front.png: no such file"),
     ("--refs front.txt --prompt x", "front.txt: not a readable picture"),
     ("--refs cut_front.png --prompt x", "cut_front.png: not a readable picture"),
     ("--refs empty/../ --prompt x", "which view is it"),
     ("--refs front=empty --prompt x", "empty: not a file; expected a PNG"),
     ("--refs noview.png --prompt x", "noview.png: which view is it"),
     ("--refs front=noview.png front=noview.png --prompt x", "a second front view of the same person"),
     ("--refs front=noview.png " * 3 + "--prompt x", "3 people .* at most 2"),
     ("--refs front=noview.png", "--refs needs --prompt"), ("--prompt=", "--prompt: is empty"),
     ("--frames 7", "7 frames .* makes 3 frames"), ("--size 40", "of 40x40: this checkpoint makes .* 32x32"),
     ("--frames 0", "--frames: got '0', expected 1 to 10001 frames"),
     ("--steps 0", "--steps: got '0', expected 1 to 1000 steps"), ("--size 40by40", "expected HEIGHTxWIDTH"),
     ("--guide-text 1 2 3", "--guide-text got 3 numbers"),
     ("--prompts front.txt", "front.txt line 1: expected"),
     ("--prompts gone.jsonl", "gone.jsonl: not a readable text file"),
     ("--prompts front.txt --prompt x", "leave --prompt and --refs out"),
     ("--fps 0", "--fps: got '0', expected 1 to 240"), ("--compile --offload", "give it without --offload"),
     ("--swap --prompt one", "--swap exchanges two people"),
     ("--prompts flat.jsonl", "flat.jsonl line 2: expected"),
     ("--ckpt nowhere", "no checkpoint at nowhere: make one with `python train.py"),
     ("--out front.txt/below/name", "cannot write to"),
     ("--lora low=a.safetensors", "--lora high= and low= are for two experts")],
)
def test_bad_input_gets_one_clear_line(arguments, says, tiny, broken, monkeypatch):
    monkeypatch.chdir(broken)
    arguments = arguments.split()
    if "--ckpt" not in arguments:
        arguments += ["--ckpt", str(tiny / "out" / "tiny")]
    with pytest.raises(UserError) as error:
        sample.main(arguments)
    assert re.search(says, str(error.value)) and "\n" not in str(error.value)
    files = sorted(p.name for p in broken.rglob("*") if p.is_file() and p.suffix != ".lock")
    assert files == ["cut_front.png", "flat.jsonl", "front.txt",
                     "noview.png"]  # nothing written, nothing lost


INPUTS = [
    ("--refs ann_front.png --prompt x", "ann_front"),
    ("--refs front=link.png --prompt x", "ann_front.png"),  # what a link leads to
    ("--refs ann_front.png --prompt x", "link"),  # and through one
    ("--refs ann_front.png --prompt x", "sub/../ann_front"),
    ("--prompts jobs.jsonl", "ann_front"),
    ("--prompts jobs.jsonl", "jobs"),
]


@pytest.mark.parametrize("arguments, out", INPUTS)
def test_an_input_is_never_overwritten(arguments, out, tiny, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "load", None)  # refused before anything is loaded
    shutil.copy(pictures / "0_front.png", "ann_front.png")
    Path("link.png").symlink_to("ann_front.png")
    Path("jobs.jsonl").write_text('{"prompt": "x", "refs": [["ann_front.png"]]}')
    Path("jobs.mp4").symlink_to("jobs.jsonl")
    Path("sub").mkdir()
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    with pytest.raises(UserError, match="is one of the inputs and would be overwritten"):
        sample.main([*arguments.split(), "--ckpt", str(tiny / "out" / "tiny"), "--out", out])
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


BAD_FLAGS = """--guide-text=nan --guide-text=inf --guide-refs=1e999 --guide-text=101 --shift=0 --shift=1e-30
--shift=nan --steps=100000000000000000000 --steps=1e3 --steps=1001 --steps=10000000
--frames=1000000 --frames=0 --size=99999x99999 --tile=1000000000 --fps=2147483648 --fps=nan --seed=-1
--seed=9223372036854775808 --size=1x2x3 --size=\uff13\uff12 --out= --out=. --out=.. --out=a/..
--out=a/ --out=.mp4 --ckpt= --wan= --wan=x --tile=0 --tile=256 --ste=4 --views=side --precision=fp8
--solver=EULER""".split()


@pytest.mark.parametrize("flag", BAD_FLAGS)
def test_no_number_or_name_gets_past_the_flags(flag, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "generate", None)
    with pytest.raises(UserError) as error:
        sample.main(["--ckpt", str(tiny / "out" / "tiny"), "--prompt", "x", flag])
    assert flag.split("=")[0] in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("flags, says", [
    (["--prompt", "x", "--views", "front", "--refs", "0_front.png"], "--views chooses among the toy's own"),
])
def test_texts_and_views_that_cannot_be_used(flags, says, tiny, tmp_path, pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    monkeypatch.setattr(sample, "generate", None)
    with pytest.raises(UserError, match=says):
        sample.main(["--ckpt", str(tiny / "out" / "tiny"), *flags, "--out", str(tmp_path / "s")])


def test_a_long_prompt_is_cut_where_the_network_ends_and_that_is_said_once(tiny, tmp_path, monkeypatch,
                                                                          capsys):
    monkeypatch.chdir(tmp_path)
    command = ["--ckpt", str(tiny / "out" / "tiny"), "--steps", "1", "--out", "v"]
    sample.main([*command, "--prompt", "two people " * 400, "--negative", "dark " * 300])
    said = capsys.readouterr().err.splitlines()
    cut = [line for line in said if "cut to the first" in line]
    assert len(cut) == 2 and all("cut to the first 127 of " in line for line in cut)


def change(name, value, part="config"):
    def edit(folder, meta):
        meta[part][name] = value
    return edit


def forget_tokenizer(folder, meta):
    (folder / "spiece.model").unlink()


def change_tokenizer(folder, meta):
    (folder / "spiece.model").write_bytes((folder / "spiece.model").read_bytes() + b" ")


def damage_weights(folder, meta):
    (folder / "ema.safetensors").write_bytes(b"\xff" * 100)
    meta["sha256"]["ema.safetensors"] = sha256_of(folder / "ema.safetensors")


def nan_weights(folder, meta):
    tensors = load_file(folder / "ema.safetensors")
    save_file({name: tensor * math.nan for name, tensor in tensors.items()}, folder / "ema.safetensors")
    meta["sha256"]["ema.safetensors"] = sha256_of(folder / "ema.safetensors")


@pytest.mark.parametrize("edit, says", [
    (change("num_layers", 10**9), "num_layers is 1000000000"),
    (change("in_dim", 10**9), "in_dim is 1000000000"),
    (change("prediction", "x"), "prediction is 'x'"),
    (change("dim", 96), "does not fit"),
    (change("more", 1), "'more'"),
    (change("size", 10**9, "world"), "its world .* is none of toy.WORLDS"),
    (change("frames", None, "world"), "its world .* is none of toy.WORLDS"),
    (lambda folder, meta: meta.pop("world"), "its world .* is none of toy.WORLDS"),
    (lambda folder, meta: meta["sha256"].pop("spiece.model"), "spiece.model is missing or damaged"),
    (forget_tokenizer, "spiece.model is missing or damaged"),
    (change_tokenizer, "spiece.model is missing or damaged"),
    (damage_weights, "ema.safetensors cannot be read"),
    (nan_weights, "not finite"),
])
@pytest.mark.parametrize("export", [False, True])
def test_junk_in_a_checkpoint_is_one_short_line(edit, says, export, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(find_checkpoint(tiny / "out" / "tiny"), "ckpt")
    meta = json.loads(Path("ckpt/checkpoint.json").read_text())
    edit(Path("ckpt"), meta)
    Path("ckpt/checkpoint.json").write_text(json.dumps(meta))
    with pytest.raises(UserError) as error:
        what = ["--export", "new"] if export else ["--prompt", "x", "--steps", "1", "--out", "x"]
        sample.main(["--ckpt", "ckpt", *what])
    assert re.search(says, str(error.value)) and len(str(error.value)) < 400
    assert [path.name for path in Path().iterdir() if path.suffix != ".lock"] == ["ckpt"]


def cut(name):
    return lambda folder: os.truncate(folder / name, 300)


@pytest.mark.parametrize("release, damage, flags, says", [
    ("2.1", cut("Wan2.1_VAE.pth"), "", "wan/Wan2.1_VAE.pth cannot be read: cut short"),
    ("2.1", cut("models_t5_umt5-xxl-enc-bf16.pth"), "", "enc-bf16.pth cannot be read: cut short"),
    ("2.1", cut("google/umt5-xxl/spiece.model"), "", "umt5-xxl/spiece.model cannot be read: cut short"),
    ("2.2", cut("low_noise_model/diffusion_pytorch_model.safetensors"), "",
     "low_noise_model/diffusion_pytorch_model.safetensors cannot be read: cut short"),
    ("2.2", lambda folder: shutil.rmtree(folder / "low_noise_model"), "",
     "wan/low_noise_model: no such file"),
    ("2.1", lambda folder: None, "--tile 20", "VAE tile 20: expected a multiple of 8 pixels, 32 or more"),
    ("2.1", lambda folder: None, "--out ..", "--out '..': expected the name of a file to write"),
    ("2.1", lambda folder: None, "--fps 2147483648", "--fps: got '2147483648', expected 1 to 240 frames"),
    ("2.1", lambda folder: None, "--views front", "--views chooses among the toy's own references"),
    ("2.1", lambda folder: None, "--swap", "--swap exchanges two people"),
])
def test_all_of_wan_is_checked_before_the_first_step(release, damage, flags, says, wan, tmp_path,
                                                     monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "generate", None)
    shutil.copytree(wan / release, "wan")
    damage(Path("wan"))
    with pytest.raises(UserError, match=re.escape(says)):
        sample.main(["--ckpt", "wan", *SMALL, "--prompt", "x", "--out", "x", *flags.split()])


def test_references_for_wan_need_its_vit_before_the_first_step(wan, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = DiTConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=2, **WAN_SMALL)
    weights = HarmoView(config).state_dict()
    shutil.copytree(wan / "2.1", "wan")
    save_checkpoint("ckpt", {"ema": weights}, {"config": asdict(config), "wan": "wan"})
    shutil.copy(pictures / "0_front.png", "a_front.png")
    Path("jobs.jsonl").write_text('{"prompt": "x", "refs": [["a_front.png"]]}')
    command = ["--ckpt", "ckpt", *SMALL, "--prompts", "jobs.jsonl", "--out", "x"]
    sample.main(command)
    Path("wan/dinov2_vits14_pretrain.pth").unlink()
    monkeypatch.setattr(sample, "generate", None)
    with pytest.raises(UserError, match="holds no DINOv2"):
        sample.main(command)


def test_many_prompts_are_written_in_rounds(tiny, tmp_path, monkeypatch):
    """Each with its sheet and its line; what comes after a failure does not take back what was made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "ROUND", 2)
    Path("jobs.jsonl").write_text('{"prompt": "one person"}\n' * 5)
    command = ["--prompts", "jobs.jsonl", "--steps", "1", "--ckpt", str(tiny / "out" / "tiny"), "--out", "v"]
    said = call("sample.py", *command, cwd=tmp_path)
    assert [line.split(" in ")[0] for line in said.splitlines() if "v-" in line] == [
        "v-1.mp4, v-2.mp4 and v-1.png", "v-3.mp4, v-4.mp4 and v-3.png", "v-5.mp4 and v-5.png"]
    before = {path.name: path.read_bytes() for path in tmp_path.glob("v-*")}
    assert len(before) == 8
    sheets = []

    def full_disk(jobs):
        sheets.append(len(jobs))
        if len(sheets) == 2:
            raise OSError("No space left on device")
        return data_sheet(jobs)

    data_sheet = contact_sheet
    monkeypatch.setattr(jobs, "contact_sheet", full_disk)
    with pytest.raises(OSError, match="No space"):
        sample.main([*command, "--seed", "1"])
    after = {path.name: path.read_bytes() for path in tmp_path.glob("v-*")}
    changed = [name for name in sorted(before) if before[name] != after[name]]
    assert changed == ["v-1.mp4", "v-1.png", "v-2.mp4"]
    assert not list(tmp_path.glob(".*"))  # nothing unfinished stays


# ---------------------------------------------------------------------------------- stopped, and called again
@pytest.fixture
def prompts(tiny, pictures, tmp_path, monkeypatch):
    """A folder to work in with jobs.jsonl, five videos of one step with and without references, in rounds of
    two -> the arguments of sample.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "ROUND", 2)
    for name in ("0_front.png", "0_left.png", "1_front.png"):
        shutil.copy(pictures / name, tmp_path)
    write_jobs(JOBS)
    return ["--prompts", "jobs.jsonl", "--steps", "1", "--ckpt", str(tiny / "out" / "tiny"), "--out", "v"]


JOBS = [{"prompt": "one person nods"}, {"prompt": "one person", "refs": [["0_front.png", "0_left.png"]]},
        {"prompt": "zwei Leute, größer", "refs": [["0_front.png"], ["1_front.png"]], "seed": 7},
        {"prompt": "one person nods", "seed": 1}, {"prompt": "one person", "refs": [["1_front.png"]]}]


def write_jobs(jobs):
    Path("jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))


def written():
    return {path.name: path.read_bytes() for path in Path().glob("v*")}


def made_in(command, monkeypatch):
    """Run sample.py -> how many videos it made."""
    jobs, generate = [], sample.generate
    with monkeypatch.context() as patch:
        patch.setattr(sample, "generate", lambda m, e, some, *others: jobs.extend(some)
                      or generate(m, e, some, *others))
        sample.main(command)
    return len(jobs)


@pytest.mark.parametrize("nth, half", [(1, False), (2, True), (3, True), (4, False), (5, True)])
def test_what_was_killed_goes_on_where_it_was(nth, half, prompts, monkeypatch, no_gpu):
    """At the nth video, before it or while it is written."""
    assert made_in(prompts, monkeypatch) == 5
    undisturbed = written()
    assert len(undisturbed) == 8
    for name in undisturbed:
        Path(name).unlink()

    def stopped():
        calls, write_video, replaced = [], jobs.write_video, os.replace

        def write(path, *others):
            calls.append(path)
            if len(calls) == nth:
                os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
                if not half:
                    os.kill(os.getpid(), signal.SIGKILL)
            write_video(path, *others)
            os.replace = replaced
        jobs.write_video = write
        sample.main(prompts)
    process = fork(stopped)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    kept = {name: Path(name).stat().st_mtime_ns for name in written() if name.endswith(".mp4")}
    assert sorted(kept) == [f"v-{n}.mp4" for n in range(1, nth)]
    assert made_in(prompts, monkeypatch) == 5 - len(kept)
    assert written() == undisturbed
    assert kept == {name: Path(name).stat().st_mtime_ns for name in kept}
    assert made_in(prompts, monkeypatch) == 0 and written() == undisturbed
    assert not list(Path().glob(".*"))  # neither halves nor a lock


def with_job(n, **change):
    write_jobs([{**job, **change} if i == n else job for i, job in enumerate(JOBS, 1)])


def other_picture(name):
    with Image.open(name) as picture:
        picture.rotate(180).save(name)


@pytest.mark.parametrize("change, flags, anew", [
    (lambda: None, {}, []),
    (lambda: with_job(1, prompt="one person nods."), {}, [1]),
    (lambda: with_job(4, seed=2), {}, [4]),
    (lambda: other_picture("0_left.png"), {}, [2]),
    (lambda: other_picture("1_front.png"), {}, [3, 5]),
    (lambda: with_job(3, refs=[["1_front.png"], ["0_front.png"]]), {}, [3]),
    (lambda: with_job(2, refs=[["0_front.png"]]), {}, [2]),
    (lambda: None, {"--seed": "3"}, [1, 2, 5]),  # those without their own
    (lambda: None, {"--steps": "2"}, [1, 2, 3, 4, 5]),
    (lambda: None, {"--guide-refs": "2"}, [1, 2, 3, 4, 5]),
    (lambda: None, {"--fps": "8"}, [1, 2, 3, 4, 5]),
    (lambda: os.rename("0_left.png", "also_left.png") or with_job(2, refs=[["0_front.png", "also_left.png"]]),
     {}, [2]),  # its note says the files' names
])
def test_only_what_was_made_of_something_else_is_made_anew(change, flags, anew, prompts, monkeypatch):
    sample.main(prompts)
    before = {n: Path(f"v-{n}.mp4").stat().st_mtime_ns for n in range(1, 6)}
    change()
    flags = {**dict(zip(prompts[::2], prompts[1::2])), **flags}
    assert made_in([part for flag in flags.items() for part in flag], monkeypatch) == len(anew)
    assert [n for n in before if Path(f"v-{n}.mp4").stat().st_mtime_ns != before[n]] == anew


def test_another_checkpoint_makes_all_anew(tiny, prompts, monkeypatch):
    sample.main(prompts)
    prompts[prompts.index("--ckpt") + 1] = str(tiny / "out" / "tiny" / "stage2")
    assert made_in(prompts, monkeypatch) == 5


def test_a_damaged_or_a_missing_file_alone_is_made_anew(prompts, monkeypatch):
    sample.main(prompts)
    before = written()
    Path("v-3.mp4").unlink()
    assert made_in(prompts, monkeypatch) == 1 and written() == before
    Path("v-1.png").unlink()
    assert made_in(prompts, monkeypatch) == 0 and written().keys() == before.keys()


def test_two_calls_never_share_their_out(prompts, monkeypatch, no_gpu):
    """The second is told so, and it works where it writes under another name, in the same folder too."""
    def slow():
        sample.generate = lambda *_: Path("began").touch() or time.sleep(60)
        sample.main(prompts)
    process = fork(slow)
    try:
        wait_for(Path("began").exists)
        with pytest.raises(UserError, match=f"^v is in use by process {process.pid}: wait for it, or choose "
                           "another --out$"):
            sample.main(prompts)
        sample.main([*prompts[:-1], "w"])
    finally:
        kill(process)
    assert made_in(prompts, monkeypatch) == 5


@pytest.mark.parametrize("name", ["v-2.mp4", "v-1.png", "v-5.png"])
def test_a_file_of_the_users_is_refused_and_stays(name, prompts, monkeypatch):
    monkeypatch.setattr(sample, "generate", None)
    if name.endswith(".png"):
        Image.new("RGB", (32, 32), "red").save(name)
    else:
        write_video(name, torch.zeros(3, 2, 32, 32), 4, "holiday")
    before = Path(name).read_bytes()
    with pytest.raises(UserError, match=f"^{name} was not made by this program and would be replaced"):
        sample.main(prompts)
    assert Path(name).read_bytes() == before and len(written()) == 1
    Path(name).write_bytes(b"rubbish")
    with pytest.raises(UserError, match="was not made by this program"):
        sample.main(prompts)
    assert Path(name).read_bytes() == b"rubbish"


def test_a_full_disk_keeps_what_was_made(prompts, monkeypatch):
    real, calls = os.fsync, []

    def fsync(*arguments):
        calls.append(arguments)
        if len(calls) == 3:  # the second video: the sheet comes first
            raise FULL_DISK
        return real(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left on device.*v-2.mp4"):
            sample.main(prompts)
    assert sorted(written()) == ["v-1.mp4", "v-1.png"] and not list(Path().glob(".*"))
    assert made_in(prompts, monkeypatch) == 4


def test_references_lie_beside_the_jsonl_or_as_before_in_the_working_folder(prompts, monkeypatch, capsys):
    """The first alone says nothing, the second is said once."""
    Path("set").mkdir()
    for name in ("jobs.jsonl", "0_front.png", "0_left.png"):
        shutil.move(name, "set")
    prompts[1] = "set/jobs.jsonl"
    sample.main(prompts)
    said = [line for line in capsys.readouterr().out.splitlines() if "beside" in line]
    assert said == ["set/jobs.jsonl: references are looked for beside it; 2 are not there and are taken from "
                    "the working folder, 1_front.png first"]
    before = written()
    shutil.move("1_front.png", "set")
    assert made_in(prompts, monkeypatch) == 0 and written() == before  # of the same content
    assert "beside" not in capsys.readouterr().out


@pytest.mark.parametrize("name, says", [
    ("gone_front.png", "gone_front.png: no such file"), ("text_front.png", "text_front.png: not a readable"),
    ("cut_front.png", "cut_front.png: not a readable"), ("dot_front.png", "dot_front.png: 1 x 1 pixels"),
    ("0.png", "which view is it"), ('0_front.png", "0_front.png', "second front view")])
def test_a_bad_reference_in_the_last_line_is_found_before_the_first_step(name, says, prompts, monkeypatch):
    monkeypatch.setattr(sample, "generate", None)
    Path("text_front.png").write_text("no picture")
    Path("cut_front.png").write_bytes(Path("0_front.png").read_bytes()[:200])
    Image.new("RGB", (1, 1)).save("dot_front.png")
    with open("jobs.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "x"}) + "\n" + f'{{"prompt": "last", "refs": [["{name}"]]}}\n')
    with pytest.raises(UserError, match=says):
        sample.main(prompts)
    assert not written()


@pytest.mark.parametrize("name", ["checkpoint.json", "ema.safetensors", toy.ToyEncoders.TOKENIZER])
def test_a_file_of_a_checkpoint_is_answered_with_its_folder(name, tiny, monkeypatch):
    folder = find_checkpoint(tiny / "out" / "tiny")
    assert (folder / name).is_file()
    with pytest.raises(UserError, match=f"{name} is a file of a checkpoint: give its folder, {folder}$"):
        sample.find(str(folder / name))
    assert sample.find(f"{folder}/").networks == [folder]  # as a shell completes it


PROMPT_FILES = {
    "CRLF": lambda lines: "\r\n".join(lines) + "\r\n", "CR": "\r".join, "blank lines": "\n\n \n".join,
    "no end": "\n".join}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("form", PROMPT_FILES)
def test_prompts_as_windows_and_old_editors_save_them(form, encoding, tmp_path):
    """From another folder, with spaces and letters of other scripts in the names."""
    folder = tmp_path / "Größe 张 x"
    folder.mkdir()
    text = PROMPT_FILES[form](json.dumps(job, ensure_ascii=False) for job in JOBS)
    (folder / "jobs.jsonl").write_bytes(text.encode(encoding))
    jobs = sample.read_jobs(folder / "jobs.jsonl", 0)
    assert [job.prompt for job in jobs] == [job["prompt"] for job in JOBS]
    assert jobs[4].files == [[f"{folder}/1_front.png"]]


def test_files_do_not_tell_where_they_were_made(tiny, pictures, tmp_path):
    command = ["--refs", pictures / "0_front.png", f"left={pictures}/0_left.png", "--prompt", "one person"]
    call("sample.py", *command, "--steps", 1, "--ckpt", tiny / "out" / "tiny", "--out", tmp_path / "v",
         cwd=tmp_path)
    for path in (tmp_path / "v.mp4", tmp_path / "v.png"):
        assert str(tmp_path.parent).encode() not in path.read_bytes()
    with Image.open(tmp_path / "v.png") as sheet:
        note = json.loads(sheet.text["video 1"])
    assert note["refs"] == [["0_front.png", "0_left.png"]] and note["ckpt"] == "tiny"


def test_the_script_exits_with_that_line(tmp_path):
    line = run(ROOT / "sample.py", "--ckpt", "nowhere", cwd=tmp_path, fails=True)
    assert line.startswith("sample.py: no checkpoint at nowhere")
