"""Every metric on videos whose score is known: the truth, noise, somebody else, exchanged people, a pose."""

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, call, run

import data
import eval as evaluation
from rope import VIEWS, UserError
from sample import RECIPES, generate, load

EVERYBODY = data.benchmark_people()
ONE, TWO = (0, 13), (75,)  # cases with one person and with two


def render(number, who=None, poses=None, **changes):
    """A case's video, perhaps with other people, poses, or another clip."""
    clip, own = data.benchmark_cases()[number]
    people = [data.pick(EVERYBODY, i) for i in who or own]
    return data.render_clips([replace(clip, **changes)], people, 6, 32, poses)[0][0]


def score(metric, videos, views=VIEWS):
    """Mean of a metric over {case: video}."""
    rows = [
        {"case": n, "setting": "all", "people": evaluation.measure(v, n, views)} for n, v in videos.items()
    ]
    return evaluation.mean(evaluation.by_case(rows, metric).values())


def test_the_truth_itself_scores_full_marks():
    videos = {n: render(n) for n in ONE + TWO}
    for name, full in {"top-1": 1, "swaps": 0, "copied": 0, "motion": 1, "mouth": 1, "wall": 1}.items():
        assert score(name, videos) == full, name
    for name in ("psnr", "side", "seen"):
        assert score(name, videos) > 55
    assert score("yaw", videos) == 0 and score("jitter", videos) == 0
    assert score("colour", videos) < 0.01 and score("margin", videos) > 30
    assert score("unseen", videos) is None and score("unseen", videos, ("front",)) > 55


def test_noise_scores_chance():
    g = torch.Generator().manual_seed(0)
    cases = (*range(0, 60, 6), *range(60, 100, 8))
    videos = {n: torch.rand(render(n).shape, generator=g) * 2 - 1 for n in cases}
    assert score("psnr", videos) < 12 and score("top-1", videos) < 0.1 and 0.3 < score("swaps", videos) < 0.7
    assert score("yaw", videos) > 40 and score("jitter", videos) > 40
    with pytest.raises(UserError, match="not finite"):
        evaluation.measure(videos[0] * torch.nan, 0, VIEWS)
    assert abs(score("margin", videos)) < 1
    assert score("motion", videos) < 0.35 and score("wall", videos) < 0.35 and score("mouth", videos) < 0.55
    assert score("colour", videos) > 0.1


def test_somebody_else_drops_identity_alone():
    videos = {n: render(n, [(data.benchmark_cases()[n][1][0] + 7) % 52]) for n in ONE}
    assert score("top-1", videos) == 0 and score("psnr", videos) < 25 and score("colour", videos) > 0.1
    assert score("wall", videos) == 1


def test_exchanged_people_are_counted_as_swaps():
    videos = {n: render(n, data.benchmark_cases()[n][1][::-1]) for n in TWO}
    assert score("swaps", videos) == 1 and score("margin", videos) < -5 and score("top-1", videos) == 0


def test_shuffled_references_drop_identity_to_chance():
    """The toy that comes with the code, given everybody's own references and somebody else's."""
    model, encoders, meta = load(str(ROOT / "assets" / "toy"))
    cases, pictures = range(6), data.benchmark_references(32)
    clips, who = zip(*(data.benchmark_cases()[n] for n in cases))
    found = {}
    for name, shift in (("own", 0), ("shuffled", 7)):
        refs = [{v: pictures[[(i + shift) % 52 for (i,) in who], VIEWS.index(v)] for v in VIEWS}]
        videos = generate(model, encoders, [data.caption(c) for c in clips], refs, 6, (32, 32), cases,
                          RECIPES["toy"])
        found[name] = score("top-1", dict(zip(cases, videos)))
    assert found["own"] > 0.9 and found["shuffled"] == 0


def test_the_priors_loss_is_zero_for_an_oracle_and_a_velocitys_power_for_silence():
    _, encoders, _ = load(str(ROOT / "assets" / "toy"))
    clips, videos = [data.benchmark_cases()[n][0] for n in ONE], torch.stack([render(n) for n in ONE])
    x0 = encoders.encode(videos)

    class Oracle:
        device, scale = torch.device("cpu"), 1

        def __call__(self, x, t, text, refs, vit):
            assert refs == [{}] and vit == [None] and len(text) == len(x)
            return self.scale * (x - x0) / (t / 1000).view(-1, 1, 1, 1, 1)  # noise - x0
    losses = torch.tensor(evaluation.prior_loss(Oracle(), encoders, clips, videos, ONE))
    assert losses.shape == (2, len(evaluation.SIGMAS)) and losses.max() < 1e-6
    silent = Oracle()
    silent.scale = 0
    losses = torch.tensor(evaluation.prior_loss(silent, encoders, clips, videos, ONE))
    power = 1 + x0.square().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(losses, power[:, None].expand(-1, 5), rtol=0.05, atol=0)


def test_an_attribute_in_another_colour_raises_its_error_alone():
    clip, who = data.benchmark_cases()[13]
    person = data.pick(EVERYBODY, who[0])
    person["hair"] = 1 - person["hair"]
    video = data.render_clips([clip], [person], 6, 32)[0][0]
    (found,) = evaluation.measure(video, 13, VIEWS)
    assert found["colour"]["hair"] > 0.2 and found["colour"]["skin"] < 0.05


def test_a_reference_pasted_into_every_frame_is_a_copy():
    """The frontal reference's own pose where the caption asks for a turn."""
    pose = data.reference_pose(data.BENCHMARK_IDENTITIES, data.BENCHMARK_SEED)
    videos = {}
    for n in ONE:
        (i,) = data.benchmark_cases()[n][1]
        still = {
            name: pose[name][i * len(VIEWS)].expand(1, 6) for name in ("yaw", "pitch", "roll", "mouth")
        }
        videos[n] = render(n, poses={0: still})
    assert score("copied", videos, ("front",)) == 1
    assert score("yaw", videos) > 20 and score("motion", videos) < 1


def test_only_a_reference_that_was_given_is_copied_and_only_far_from_it():
    pose = data.reference_pose(data.BENCHMARK_IDENTITIES, data.BENCHMARK_SEED)
    (i,) = data.benchmark_cases()[0][1]
    front = {name: pose[name][i * len(VIEWS)].expand(1, 6) for name in ("yaw", "pitch", "roll", "mouth")}
    video = render(0, poses={0: front})  # asked for is a turn from the front, frame 1 at 36 degrees
    (given,), (not_given,) = (evaluation.measure(video, 0, views) for views in (("front",), ("left",)))
    assert given["copied"] == [None] + [True] * 5
    assert not_given["copied"][1] is False


def test_noise_in_the_side_frames_alone_lowers_side_and_leaves_the_front():
    video = render(0)  # turns from 0 to 180 degrees
    g = torch.Generator().manual_seed(0)
    video[:, 2:] = torch.rand(video[:, 2:].shape, generator=g) * 2 - 1
    (found,) = evaluation.measure(video, 0, ("front",))
    rows = [{"case": 0, "setting": "front", "people": [found]}]
    values = {name: evaluation.mean(evaluation.by_case(rows, name).values()) for name in evaluation.METRICS
              if name != "loss" and evaluation.by_case(rows, name)}
    assert values["side"] < 12 and values["seen"] > 35 and values["unseen"] < 12
    assert found["frame_right"][:2] == [True, True] and values["top-1 seen"] > values["top-1 unseen"]


def test_the_yaw_that_was_rendered_is_found_and_a_shaking_head_is_rough():
    """A head that is off by a constant, or that follows another motion smoothly, is not."""
    clip, _ = data.benchmark_cases()[0]
    asked = data.clip_pose([clip], 0, 6)["yaw"]
    for turned, rough in (([30.0] * 6, 0), ([30.0, -30, 30, -30, 30, -30], 120)):
        video = render(0, poses={0: {"yaw": asked + torch.tensor(turned)}})
        (found,) = evaluation.measure(video, 0, VIEWS)
        assert found["turned"] == turned and evaluation.mean(evaluation.jitter(found)) == rough
    assert data.benchmark_cases()[1][0].motions == ("looks around",)
    (found,) = evaluation.measure(render(1, motions=("nods",)), 1, VIEWS)
    assert evaluation.mean(evaluation.jitter(found)) < 10
    assert evaluation.mean(map(abs, found["turned"])) > 20


def test_another_motion_mouth_or_wall_is_noticed():
    clip, _ = data.benchmark_cases()[0]
    wall = next(b for b in data.BACKGROUNDS if b != clip.background)
    (found,) = evaluation.measure(render(0, background=wall), 0, VIEWS)
    assert found["wall"] is False and found["motion"] is True
    (found,) = evaluation.measure(render(0, motions=("nods",)), 0, VIEWS)
    assert found["motion"] is False and found["wall"] is True
    for n in ONE:
        mouth = next(m for m in data.MOUTHS if m != data.benchmark_cases()[n][0].mouths[0])
        (found,) = evaluation.measure(render(n, mouths=(mouth,)), n, VIEWS)
        assert found["mouth"] is False


def test_psnr_is_ten_log_ten_of_peak_two():
    a, mask = torch.zeros(3, 1, 2, 2), torch.tensor([[[1.0, 0], [0, 0]]])
    b = a.clone()
    b[:, 0, 0, 0] = 0.2
    b[:, 0, 1, 1] = 1  # outside the mask
    assert evaluation.psnr(a, b, mask) == pytest.approx(20)
    assert evaluation.psnr(a, b, mask * 0) is None


def test_intervals_cover_the_mean_as_often_as_they_say():
    g = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        mean, low, high = evaluation.interval(torch.randn(60, generator=g).tolist(), draws=500)
        assert low < mean < high
        covered += low < 0 < high
    assert 0.88 < covered / 200 < 0.99
    assert evaluation.interval([]) is None and evaluation.interval([3.0] * 5) == (3, 3, 3)
    # all of n alike: the rule of three
    assert evaluation.interval([0.0] * 60, (0, 1)) == pytest.approx((0, 0, 0.05))
    assert evaluation.interval([1.0] * 60, (0, 1)) == pytest.approx((1, 0.95, 1))


def rows_of(values, metric="psnr"):
    return [
        {"case": n, "setting": "all", "people": [{metric: value}]} for n, value in enumerate(values)
    ]


def runs_of(value, seeds, spread, g, metric="psnr"):
    """A row: for each seed 50 cases about `value`, moved by the seed."""
    moved = value + spread * torch.randn(seeds, 1, generator=g) + 0.1 * torch.randn(seeds, 50, generator=g)
    return [rows_of(values, metric) for values in moved.tolist()]


FULL, NO_MFI = ("full", ["all"]), ("no-mfi", ["all"])


@pytest.mark.parametrize(
    "better, other, sign, expected",
    [
        (2.0, 0.0, 1, "holds"),
        (0.0, 2.0, 1, "does not hold"),
        (0.0, 2.0, -1, "holds"),
        (0.0, 0.0, 1, "not decided"),
    ],
)
def test_verdicts(better, other, sign, expected):
    g = torch.Generator().manual_seed(1)
    results = {"full": runs_of(18 + better, 2, 0.1, g), "no-mfi": runs_of(18 + other, 2, 0.1, g)}
    said, cases, seeds = evaluation.verdict(results, FULL, NO_MFI, "psnr", sign)
    assert said == expected and cases[0] == pytest.approx(sign * (better - other), abs=0.3)
    # by hand: two rows of two seeds, so t has two degrees of freedom
    means = [[evaluation.mean(p["psnr"] for r in rows for p in r["people"]) for rows in runs]
             for runs in results.values()]
    variance = sum((a - b) ** 2 / 2 for a, b in means) / 2
    assert seeds[2] - seeds[0] == pytest.approx(4.30 * variance**0.5, rel=1e-4)
    sides = ("full", ["front", "all"]), ("no-mfi", ["front", "all"])
    assert evaluation.verdict(results, *sides, "psnr", 1)[0] == "not run"  # at one of its settings only
    assert evaluation.verdict({}, FULL, NO_MFI, "psnr", 1) == ("not run", None, None)
    alone = {name: runs[:1] for name, runs in results.items()}  # no second seed
    said, cases, seeds = evaluation.verdict(alone, FULL, NO_MFI, "psnr", 1)
    assert said == "not decided" and cases is not None and seeds is None


def test_a_rate_alike_in_all_cases_proves_little():
    alike = dict.fromkeys(("full", "no-mfi"), [rows_of([True] * 50, "mouth")] * 2)
    said, cases, _ = evaluation.verdict(alike, FULL, NO_MFI, "mouth", 1)
    assert said == "not decided" and cases == (0, -0.06, 0.06)


def test_where_seeds_alone_differ_a_verdict_is_rarely_wrong():
    g = torch.Generator().manual_seed(0)
    wrong = 0
    for _ in range(400):
        results = {name: runs_of(18, 2, 0.2, g) for name in ("full", "no-mfi", "append", "direct")}
        wrong += evaluation.verdict(results, FULL, NO_MFI, "psnr", 1)[0] != "not decided"
    assert 0.01 < wrong / 400 < 0.09  # 0.05 expected


def test_claims_name_rows_and_metrics_that_exist():
    for _, *sides, metric, sign in evaluation.CLAIMS:
        assert {row for row, _ in sides} <= set(evaluation.ABLATIONS) and sign in (1, -1)
        assert metric in evaluation.METRICS


def test_the_command_writes_rows_and_report_and_a_restart_goes_on(tiny, tmp_path):
    command = ["eval.py", "--ckpt", tiny / "out" / "tiny", "--limit", 4, "--steps", 1]
    command += ["--settings", "none", "all", "--out", "ev"]
    said = call(*command, cwd=tmp_path)
    path = tmp_path / "ev" / "cases.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 4 * 3 + 4 * 2  # none, all and prior; none and prior of stage 1
    last = [r for r in rows if r["run"] == rows[0]["run"]]
    assert {(r["case"], r["setting"]) for r in last} == {
        (i, s) for i in (0, 25, 50, 75) for s in ("none", "all", "prior")
    }
    persons = [p for r in last if r["setting"] == "all" and r["case"] < 60 for p in r["people"]]
    mean = sum(p["psnr"] for p in persons) / 3
    line = next(line for line in said.splitlines() if line.startswith("1, all"))
    assert float(line.split()[2]) == pytest.approx(mean, abs=0.01)
    page = (tmp_path / "ev" / "report.html").read_text()
    assert page.count("<svg") == 7 and page.count("<h3>") == 4 and "http" not in page
    # the last line half written, as after a kill -9: that row is made again, the same, and no other
    path.write_text("\n".join(json.dumps(r) for r in rows[:-1]) + "\n" + json.dumps(rows[-1])[:40])
    assert call(*command, cwd=tmp_path).splitlines()[2:-1] == said.splitlines()[2:-1]
    lines = path.read_text().splitlines()
    assert len(lines) == len(rows) + 1


def test_ablations_train_measure_and_judge(tmp_path):
    command = ["eval.py", "--ablate", "full", "append", "--config", "tiny", "--steps", 1]
    command += ["--out", "ev", "--limit", 2, "--settings", "front", "--train=--steps 1", "--seeds"]
    said = call(*command, 1, cwd=tmp_path)
    assert "Jump-RoPE lowers crosstalk" in said and said.count("not run") >= 5
    tables = len(evaluation.CLAIMS) + 4
    again = call(*command, 1, cwd=tmp_path)
    assert again.splitlines()[-tables:] == said.splitlines()[-tables:]
    assert (tmp_path / "ev" / "ablate" / "tiny-steps-1" / "append-0" / "stage4").exists()
    command[3:4] = []  # a second seed of one row: the table keeps the other
    said = call(*command, 2, cwd=tmp_path)
    counts = {line.split()[0]: line.split()[1] for line in said.splitlines()[-tables:]}
    assert counts["full"] == "2" and counts["append"] == "1"


def test_bad_input(tmp_path, capsys):
    with pytest.raises(UserError, match="--limit 0"):
        evaluation.main(["--limit", "0"])
    for flag in ("--batch", "--steps", "--seeds", "--shift"):
        with pytest.raises(UserError, match=f"{flag} 0.*expected more than 0"):
            evaluation.main([flag, "0"])
    with pytest.raises(UserError, match="--ablate nonsense: expected full"):
        evaluation.main(["--ablate", "nonsense", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="--seed is set by eval.py"):
        evaluation.main(["--ablate", "full", "--out", str(tmp_path), "--train=--seed 1"])
    assert run(ROOT / "eval.py", "--ckpt", "nowhere", cwd=tmp_path, fails=True).startswith(
        "eval.py: no checkpoint"
    )


@pytest.mark.parametrize("values", [(1.0, 1.0, 1.0), (0.5, 0.0, 1.0), (15.0, 14.0, 22.0), (0.0, 0.0, 0.0)])
def test_a_plot_holds_its_values_between_its_ticks(values):
    drawn = evaluation.plot("t", ["a"], {"all": [values]})
    ticks = [float(v) for v in re.findall(r'end">(.*?)<', drawn)]
    assert 2 <= len(ticks) <= 7 and ticks[0] <= values[1] and ticks[-1] >= values[2]
    assert evaluation.plot("t", ["a"], {"all": [None]}) == ""
