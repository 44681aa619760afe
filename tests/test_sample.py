import math
import re

import av
import pytest
import torch
from conftest import ROOT, run
from PIL import Image

import data
import sample
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
        velocity = sample.guided(model, text, no_text, [{"front": 0}], [0], a, b)
        assert velocity(x, torch.tensor(5.0)) == nothing + a * (alone - nothing) + b * (full - alone)


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
    picture = sample.read_picture(tmp_path / "a.png", 20)
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
    command = [ROOT / "sample.py", *refs, "--prompt", PROMPT, "--steps", 2, "--ckpt", tiny / "out" / "tiny"]
    said = run(*command, "--out", "a", cwd=tmp_path)
    assert "stage 4 harmony" in said and "a.mp4" in said and "a.png" in said
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == data.WORLDS["tiny"]["frames"]
    run(*command, "--out", "b", cwd=tmp_path)
    run(*command, "--out", "c", "--seed", 1, cwd=tmp_path)
    a, b, c = (Image.open(tmp_path / f"{name}.png").tobytes() for name in "abc")
    assert a == b and a != c  # a seed repeats its video, another one does not


def test_a_video_does_not_depend_on_its_batch(tiny):
    model, encoders, meta = sample.load(tiny / "out" / "tiny")
    refs = data.benchmark_references(32)[:2]
    captions = [data.caption(clip) for clip, _ in data.benchmark_cases()[:2]]

    def make(which):
        people = [{view: refs[which, v] for v, view in enumerate(VIEWS)}]
        return sample.generate(model, encoders, [captions[i] for i in which], people, 3, 32, which, steps=2)

    torch.testing.assert_close(make([0, 1])[1:], make([1]), atol=1e-4, rtol=0)


def test_swap_exchanges_the_references_and_keeps_the_noise(tiny, tmp_path, monkeypatch):
    calls = []
    generate = sample.generate

    def recording(*args, **kwargs):
        calls.append(args)
        return generate(*args, **kwargs)

    monkeypatch.setattr(sample, "generate", recording)
    sample.main(
        [
            "--ckpt",
            str(tiny / "out" / "tiny"),
            "--prompt",
            PROMPT,
            "--swap",
            "--steps",
            "1",
            "--out",
            str(tmp_path / "s"),
        ]
    )
    (
        (
            _,
            _,
            captions,
            first,
            *_,
        ),
        (_, _, again, second, *_),
    ) = (c[:5] for c in calls)
    assert captions == again == [PROMPT]
    assert all(torch.equal(first[k][v], second[1 - k][v]) for k in (0, 1) for v in VIEWS)
    assert calls[0][6] == calls[1][6]  # seeds
    assert (
        (tmp_path / "s-1.mp4").exists() and (tmp_path / "s-2.mp4").exists() and (tmp_path / "s.png").exists()
    )


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
        (
            "--refs front=noview.png --refs front=noview.png --refs front=noview.png --prompt x",
            "3 people .* at most 2",
        ),
        ("--refs front=noview.png", "--refs needs --prompt"),
        ("--prompt=", "--prompt is empty"),
        ("--frames 7", "7 frames .* makes 3 frames"),
        ("--size 40", "of 40x40: this checkpoint makes .* 32x32"),
        ("--frames 0", "0 frames of"),
        ("--steps 0", "0 steps"),
        ("--fps 0", "--fps 0"),
        ("--swap --prompt one", "--swap exchanges two people"),
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
    assert files == ["cut_front.png", "front.txt", "noview.png"]  # nothing written, nothing lost


def test_the_script_exits_with_that_line(tmp_path):
    line = run(ROOT / "sample.py", "--ckpt", "nowhere", cwd=tmp_path, fails=True)
    assert line.startswith("sample.py: no checkpoint at nowhere")
