import json
import math
import re
import shutil
import weakref

import av
import diffusers
import pytest
import torch
from conftest import ROOT, call, run
from PIL import Image

import data
import sample
from model import HarmoView, load_wan, wan_config
from rope import VIEWS, UserError

PROMPT = (
    "a close-up of two people, the first on the left in a red shirt nods with the mouth closed, "
    "the second on the right in a blue shirt turns away with the mouth open, soft light, a grey wall"
)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Reference pictures of two held-out people, as files: 0_front.png ... 1_back.png."""
    folder = tmp_path_factory.mktemp("pictures")
    for k, views in enumerate(data.benchmark_references(48)[:2]):
        for view, picture in zip(VIEWS, views, strict=True):
            data.to_image(picture, 48).save(folder / f"{k}_{view}.png")
    return folder


# --------------------------------------------------------------------------------------- solvers and guidance
def test_euler_is_exact_on_a_straight_path():
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 1, 3, 4, 4)
    for shift in (1, 5):
        assert torch.allclose(sample.solve(lambda x, t: noise - x0, noise, 7, shift, "euler"), x0, atol=1e-5)


def test_euler_visits_the_shifted_times():
    seen = []
    sample.solve(lambda x, t: seen.append(float(t)) or x * 0, torch.zeros(1), 4, 3.0, "euler")
    assert seen == pytest.approx([1000 * 3 * s / (1 + 2 * s) for s in (1, 0.75, 0.5, 0.25)], rel=1e-6)


def test_euler_converges_at_first_order():
    """dx/dsigma = x from sigma 1 to 0 shrinks x by e."""
    error = [
        abs(
            float(sample.solve(lambda x, t: x, torch.ones(1, dtype=torch.float64), n, 1.0, "euler"))
            - math.exp(-1)
        )
        for n in (50, 100)
    ]
    assert error[0] < 0.005 and error[0] / error[1] == pytest.approx(2, rel=0.05)


def test_guidance_is_the_weighted_sum_of_three_predictions():
    def model(x, t, text, refs, vit):
        return text.mean() * (1 if refs == [{}] else 10) + (0 if vit == [None] else 100)

    x, text, no_text = torch.zeros(1), torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 3.0)
    full, alone, nothing = 20 + 100, 2, 3
    for a, b in ((1, 1), (1, 2), (3, 1.5), (0, 0)):
        velocity = sample.guided(model, text, no_text, [{"front": 0}], [0], (a,), b)
        assert velocity(x, torch.tensor(5.0)) == nothing + a * (alone - nothing) + b * (full - alone)


def falling(x, t):
    """A velocity that is neither constant nor linear in x or t."""
    return torch.sin(3 * x) + x * (t / 1000) ** 2 - 0.3


@pytest.mark.parametrize("solver", sample.SOLVERS[:2])
@pytest.mark.parametrize("steps, shift", [(1, 5.0), (2, 5.0), (3, 1.0), (10, 5.0), (40, 12.0)])
def test_solvers_are_diffusers_schedulers(solver, steps, shift):
    kind = diffusers.UniPCMultistepScheduler if solver == "unipc" else diffusers.DPMSolverMultistepScheduler
    oracle = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2)
    oracle.set_timesteps(steps)
    sigma, times = sample.schedule(steps, shift, solver)
    # Wan's own schedule, in either's arithmetic
    oracle.sigmas, oracle.timesteps = sigma.float(), times.long()
    x = start = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    for t in oracle.timesteps:
        x = oracle.step(falling(x, t.float()), t, x).prev_sample
    ours = sample.solve(falling, start, steps, shift, solver)
    assert (ours - x).norm() < 1e-4 * x.norm()


@pytest.mark.parametrize("solver", sample.SOLVERS[:2])
def test_multistep_solvers_converge_faster_than_euler(solver):
    truth = sample.solve(falling, torch.ones(1, dtype=torch.float64), 4000, 3.0, "euler")
    error = [
        abs(float(sample.solve(falling, torch.ones(1, dtype=torch.float64), n, 3.0, solver) - truth))
        for n in (5, 20)
    ]
    assert error[1] < error[0] / 8


def test_wan22_switches_experts_where_its_authors_do():
    _, times = sample.schedule(40, 12.0, "unipc")
    assert int((times >= 875).sum()) == 26 and times[0] == 999 and torch.equal(times, times.floor())
    called = []

    class Network:
        def __init__(self, name):
            self.name = name

        def __call__(self, x, t, text, refs, vit):
            called.append((self.name, float(t[0]), len(alive)))
            return 0 * x + text.mean()

    alive = weakref.WeakSet()

    def load(name):
        network = Network(name)
        alive.add(network)
        return network

    experts = sample.Experts([lambda: load("high"), lambda: load("low")], None, torch.device("cpu"), 0.875)
    velocity = sample.guided(
        experts, torch.ones(1, 1, 1), torch.zeros(1, 1, 1), None, None, (4.0, 3.0), 0.0, 0.875
    )
    said = []
    sample.solve(lambda x, t: said.append(velocity(x, t)) or said[-1], torch.zeros(1), 40, 12.0, "unipc")
    assert [name for name, *_ in called] == 52 * ["high"] + 28 * ["low"]  # two forwards a step
    assert {held for *_, held in called} == {1}  # one expert in memory at a time
    assert [float(v) for v in said] == 26 * [4.0] + 14 * [3.0]  # each with its own guidance


def test_unknown_solver_and_no_steps():
    with pytest.raises(UserError, match="unknown solver 'magic'"):
        sample.solve(None, torch.zeros(1), 4, 1, "magic")
    with pytest.raises(UserError, match="0 steps"):
        sample.solve(None, torch.zeros(1), 0, 1, "euler")


# ---------------------------------------------------------------------------------------- reading and writing
@pytest.mark.parametrize(
    "argument, view",
    [
        ("anna_front.png", "front"),
        ("a/left/anna-BACK.2.png", "back"),
        ("left=a_front.png", "left"),
        ("right=x.png", "right"),
        ("Left 3.jpg", "left"),
    ],
)
def test_views_come_from_names(argument, view):
    assert sample.view_of(argument)[0] == view


@pytest.mark.parametrize("argument", ["anna.png", "backwards.png", "front_left.png", "side=anna.png"])
def test_a_view_must_be_named_once(argument):
    with pytest.raises(UserError, match="which view is it"):
        sample.view_of(argument)


def test_pictures_are_turned_flattened_and_fitted(tmp_path):
    image = Image.new("RGBA", (20, 10), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 10, 10))  # the left half is transparent
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right: its left edge becomes the top
    image.save(tmp_path / "a.png", exif=exif)
    picture = sample.read_picture(tmp_path / "a.png", (20, 20))
    assert picture.shape == (3, 20, 20)
    assert (picture[:, :, 0] == 1).all() and (
        picture[:, 4, 10] == 1
    ).all()  # white border, white where transparent
    assert picture[:, 15, 10].tolist() == [1, -1, -1]


def test_writing_a_video_and_reading_it_back(tmp_path):
    video = torch.full((3, 5, 32, 32), -1.0)
    video[0, 3:] = 1
    data.write_video(tmp_path / "v.mp4", video, fps=4)
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert container.streams.video[0].average_rate == 4
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(frames) == 5 and frames[0].shape == (256, 256, 3)
    assert frames[0].max() < 20 and frames[4][..., 0].mean() > 230 and frames[4][..., 1].mean() < 20


# ---------------------------------------------------------------------------------------------- the whole job
def test_references_in_video_out(tiny, pictures, tmp_path):
    refs = [
        "--refs",
        pictures / "0_front.png",
        pictures / "0_left.png",
        "--refs",
        f"back={pictures / '1_front.png'}",
    ]
    command = [*refs, "--prompt", PROMPT, "--steps", 2, "--ckpt", tiny / "out" / "tiny"]
    said = call("sample.py", *command, "--out", "a", cwd=tmp_path)
    assert "stage 4 harmony" in said and "a.mp4" in said and "a.png" in said
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == data.WORLDS["tiny"]["frames"]
    call("sample.py", *command, "--out", "b", cwd=tmp_path)
    call("sample.py", *command, "--out", "c", "--seed", 1, cwd=tmp_path)
    a, b, c = (Image.open(tmp_path / f"{name}.png").tobytes() for name in "abc")
    assert a == b and a != c  # a seed repeats its video, another one does not


def test_a_video_does_not_depend_on_its_batch(tiny):
    model, encoders, meta = sample.load(tiny / "out" / "tiny")
    refs = data.benchmark_references(32)[:2]
    captions = [data.caption(clip) for clip, _ in data.benchmark_cases()[:2]]

    def make(which):
        people = [{view: refs[which, v] for v, view in enumerate(VIEWS)}]
        recipe = sample.RECIPES["toy"] | {"steps": 2}
        return sample.generate(
            model, encoders, [captions[i] for i in which], people, 3, (32, 32), which, recipe
        )

    torch.testing.assert_close(make([0, 1])[1:], make([1]), atol=1e-4, rtol=0)


def test_swap_exchanges_the_references_and_keeps_the_noise(tiny, tmp_path, monkeypatch):
    calls = []
    guided = sample.guided

    def recording(model, text, no_text, refs, vit, *rest):
        calls.append((text, refs, vit))
        return guided(model, text, no_text, refs, vit, *rest)

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
    assert notes[0] == notes[1] and notes[0]["seed"] == 0


# --------------------------------------------------------------------------------------------------- real Wan
SMALL = ["--frames", "5", "--size", "32x48", "--steps", "3"]


def test_text_to_video_from_a_wan_folder(wan, tmp_path):
    command = ["--ckpt", wan / "2.1", *SMALL, "--prompt", "a cat &amp; a  dog"]
    said = call("sample.py", *command, "--out", "a", cwd=tmp_path)
    assert "seconds a step" in said and "peak memory" in said
    with av.open(str(tmp_path / "a.mp4")) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        note = json.loads(container.metadata["comment"])
        assert container.streams.video[0].average_rate == 16
    assert len(frames) == 5 and frames[0].shape == (256, 384, 3)
    assert (note["prompt"], note["seed"], note["steps"]) == ("a cat &amp; a  dog", 0, 3)
    assert (
        note["solver"] == "unipc" and note["guide_text"] == [5.0] and note["negative"] == data.NEGATIVE_PROMPT
    )
    with Image.open(tmp_path / "a.png") as sheet:
        assert json.loads(sheet.text["video 1"]) == note  # any file tells how to make it again
        first = sheet.tobytes()
    changes = {"b": ["--offload"], "c": ["--seed", "1"], "d": ["--shift", "12"], "e": ["--tile", "32"]}
    for name, extra in changes.items():
        call("sample.py", *command, *extra, "--out", name, cwd=tmp_path)
    b, *others = (Image.open(tmp_path / f"{name}.png").tobytes() for name in changes)
    assert b == first and first not in others


def wan_by_hand(folder, prompt, negative, seed, steps):
    """Text-to-video of one 5-frame 32x48 clip, in the order of Wan's paper, nothing shared with sample.py but
    the networks and the solver."""
    encoders = data.WanEncoders(folder, torch.device("cpu"))
    text, no_text = encoders.text([prompt]), encoders.text([negative])
    with torch.device("meta"):
        network = HarmoView(wan_config(folder))
    load_wan(network, folder)
    x = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(seed))

    def velocity(x, t):
        unguided = network(x, t[None], no_text)
        return unguided + 5 * (network(x, t[None], text) - unguided)

    with torch.no_grad():
        return encoders.decode(sample.solve(velocity, x, steps, 5.0, "unipc"))[0]


def test_the_whole_pipeline_is_its_parts(wan):
    model, encoders, meta = sample.load(wan / "2.1")
    rows = [
        {"prompt": p, "people": None, "seed": i, "size": (32, 48)}
        for i, p in enumerate(("a close-up", "a dark room of two"))
    ]
    sample.make(rows, model, encoders, sample.RECIPES[meta["kind"]] | {"steps": 3}, 5)
    for row in rows:
        truth = wan_by_hand(wan / "2.1", row["prompt"], data.NEGATIVE_PROMPT, row["seed"], 3)
        assert row["video"].shape == (3, 5, 32, 48)
        torch.testing.assert_close(row["video"], truth, atol=1e-4, rtol=0)
    assert not torch.allclose(rows[0]["video"], rows[1]["video"], atol=0.01)


def test_two_experts_each_make_their_part(wan, tmp_path):
    call("sample.py", "--ckpt", wan / "2.2", *SMALL, "--prompt", "x", cwd=tmp_path)
    model, _, meta = sample.load(wan / "2.2")
    assert meta["kind"] == "wan2.2" and model.boundary == 0.875
    x, text = torch.randn(1, 16, 2, 4, 4), torch.zeros(1, 3, 32)
    for part, t in (("high_noise_model", 875.0), ("low_noise_model", 874.0)):
        with torch.device("meta"):
            network = HarmoView(wan_config(wan / "2.2" / part))
        load_wan(network, wan / "2.2" / part)
        with torch.no_grad():
            assert torch.equal(model(x, torch.tensor([t]), text), network(x, torch.tensor([t]), text))


def test_prompts_from_a_file(wan, tmp_path):
    lines = [{"prompt": "a dog"}, {"prompt": "ein Bär", "seed": 5}]
    (tmp_path / "jobs.jsonl").write_text(
        "\ufeff" + "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n",
        encoding="utf-8",
    )
    call(
        "sample.py",
        "--ckpt",
        wan / "2.1",
        *SMALL,
        "--prompts",
        "jobs.jsonl",
        "--out",
        "v",
        cwd=tmp_path,
    )
    for i, (prompt, seed) in enumerate((("a dog", 0), ("ein Bär", 5)), 1):
        with av.open(str(tmp_path / f"v-{i}.mp4")) as container:
            note = json.loads(container.metadata["comment"])
        assert (note["prompt"], note["seed"]) == (prompt, seed)


def test_dry_run_needs_no_weights(wan, tmp_path):
    said = call("sample.py", "--ckpt", "1.3b", "--dry-run", cwd=tmp_path)
    own = re.search(r"transformer +([\d,]+) parameters, ([\d,]+) of them HarmoView's own; x 1", said)
    total, own = (int(number.replace(",", "")) for number in own.groups())
    assert total - own == 1_418_996_800
    assert "5,680,910,336" in said and "126,892,531" in said and "32,760 tokens" in said
    refs = ["--refs", "a_front.png", "a_left.png", "--refs", "b_front.png"]
    said = call("sample.py", "--ckpt", "14b", "--dry-run", *refs, "--prompt", "x", cwd=tmp_path)
    assert f"with references {32_760 + 3 * 1560 + 5 * 16:,}" in said and "2 forwards a step" in said
    said = call("sample.py", "--ckpt", wan / "2.2", "--dry-run", "--size", "64x64", cwd=tmp_path)
    assert "x 2 expert(s)" in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--frames 6", "6 frames of 480x832: expected 4n\\+1 frames"),
        ("--size 40x48", "81 frames of 40x48: expected .* multiples of 16"),
        ("--refs a_front.png", "plain Wan, which has never seen references"),
        ("--tile 20 --frames 5 --size 32x48 --steps 1", "VAE tile 20"),
    ],
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
        sample.load(tmp_path / "wan")


def test_an_export_is_the_same_network_in_bf16(tiny, tmp_path, monkeypatch):
    run_folder, out = tiny / "out" / "tiny", tmp_path / "small"
    call("sample.py", "--ckpt", run_folder, "--export", out, cwd=tmp_path)
    whole, small = (sample.load(folder)[0].load[0]() for folder in (run_folder, out))
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
    # what a command without --ckpt takes: a run in out/ before the toy that comes with the code
    monkeypatch.chdir(tmp_path)
    assert sample.default_checkpoint() == str(ROOT / "assets" / "toy")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "toy").symlink_to(run_folder)
    assert sample.default_checkpoint() == "out/toy"


def test_the_contact_sheet_shows_everything():
    people = [{"front": torch.full((3, 32, 32), -1.0)}, {}]
    video = torch.zeros(3, 2, 32, 32)
    small = sample.contact_sheet([{"people": people, "video": video, "prompt": "short"}])
    long = sample.contact_sheet([{"people": people, "video": video, "prompt": "long " * 60}])
    assert long.width == small.width and long.height > small.height  # a long prompt goes on in further lines
    assert small.getpixel((20, 20)) == (0, 0, 0)


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
    [
        ("--refs gone_front.png --prompt x", "gone_front.png: no such file"),
        ("--refs front.txt --prompt x", "front.txt: not a readable picture"),
        ("--refs cut_front.png --prompt x", "cut_front.png: not a readable picture"),
        ("--refs empty/../ --prompt x", "which view is it"),
        ("--refs front=empty --prompt x", "empty: .*picture"),
        ("--refs noview.png --prompt x", "noview.png: which view is it"),
        ("--refs front=noview.png front=noview.png --prompt x", "a second front view of the same person"),
        ("--refs front=noview.png " * 3 + "--prompt x", "3 people .* at most 2"),
        ("--refs front=noview.png", "--refs needs --prompt"),
        ("--prompt=", "--prompt is empty"),
        ("--frames 7", "7 frames .* makes 3 frames"),
        ("--size 40", "of 40x40: this checkpoint makes .* 32x32"),
        ("--frames 0", "0 frames of"),
        ("--steps 0", "--steps 0 .* at least 1 step"),
        ("--size 40by40", "expected HEIGHTxWIDTH"),
        ("--guide-text 1 2 3", "--guide-text got 3 numbers"),
        ("--prompts front.txt", "front.txt line 1: expected"),
        ("--prompts gone.jsonl", "gone.jsonl: not a readable text file"),
        ("--prompts front.txt --prompt x", "leave --prompt and --refs out"),
        ("--fps 0", "--fps 0"),
        ("--compile --offload", "give it without --offload"),
        ("--swap --prompt one", "--swap exchanges two people"),
        ("--prompts flat.jsonl", "flat.jsonl line 2: expected"),
        ("--ckpt nowhere", "no checkpoint at nowhere: make one with `python train.py"),
        ("--out front.txt/below/name", "cannot write to"),
    ],
)
def test_bad_input_gets_one_clear_line(arguments, says, tiny, broken, monkeypatch):
    monkeypatch.chdir(broken)
    arguments = arguments.split()
    if "--ckpt" not in arguments:
        arguments += ["--ckpt", str(tiny / "out" / "tiny")]
    with pytest.raises(UserError) as error:
        sample.main(arguments)
    assert re.search(says, str(error.value)) and "\n" not in str(error.value)
    files = sorted(p.name for p in broken.rglob("*") if p.is_file())
    assert files == [
        "cut_front.png",
        "flat.jsonl",
        "front.txt",
        "noview.png",
    ]  # nothing written, nothing lost


def test_the_script_exits_with_that_line(tmp_path):
    line = run(ROOT / "sample.py", "--ckpt", "nowhere", cwd=tmp_path, fails=True)
    assert line.startswith("sample.py: no checkpoint at nowhere")
