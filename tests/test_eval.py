"""Every metric on videos whose score is known: the truth, noise, somebody else, exchanged people, a pose."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, call

import eval as evaluation
from eval import METRICS
from measure import real, report
from rope import VIEWS
from sample import SAMPLE_RECIPES, Hardware, find, generate, load
from support import charts
from support.script import UserError, lock
from videos import toy
from videos.jobs import Job

EVERYBODY = toy.benchmark_people()
ONE, TWO = (0, 13), (75,)  # cases with one person and with two


def render(number, who=None, poses=None, **changes):
    """A case's video, perhaps with other people, poses, or another clip."""
    clip, own = toy.benchmark_cases()[number]
    people = [toy.pick(EVERYBODY, i) for i in who or own]
    return toy.render_clips([replace(clip, **changes)], people, 6, 32, poses)[0][0]


def score(metric, videos, views=VIEWS):
    """Mean of a metric over {case: video}."""
    results = [{"case": n, "people": evaluation.measure(video, n, views)} for n, video in videos.items()]
    return evaluation.mean(report.by_case(results, METRICS[metric]).values())


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
    cases = *range(0, 60, 10), *range(60, 100, 8)
    videos = {n: torch.rand(render(n).shape, generator=g) * 2 - 1 for n in cases}
    assert score("psnr", videos) < 12 and score("top-1", videos) < 0.1 and 0.2 < score("swaps", videos) < 0.8
    assert score("yaw", videos) > 40 and score("jitter", videos) > 30
    assert abs(score("margin", videos)) < 1 and score("colour", videos) > 0.1
    assert score("motion", videos) < 0.4 and score("wall", videos) < 0.4 and score("mouth", videos) < 0.6


def test_somebody_else_drops_identity_alone_and_exchanged_people_are_swaps():
    videos = {n: render(n, [(toy.benchmark_cases()[n][1][0] + 7) % 52]) for n in ONE}
    assert score("top-1", videos) == 0 and score("psnr", videos) < 25 and score("colour", videos) > 0.1
    assert score("wall", videos) == 1
    videos = {n: render(n, toy.benchmark_cases()[n][1][::-1]) for n in TWO}
    assert score("swaps", videos) == 1 and score("margin", videos) < -5 and score("top-1", videos) == 0


def test_shuffled_references_drop_identity_to_chance():
    """The toy that comes with the code, given everybody's own references and somebody else's."""
    checkpoint = find(ROOT / "assets" / "toy")
    model, encoders = load(checkpoint, hardware=Hardware("fp32"))
    frames, size = (checkpoint.meta["world"][name] for name in ("frames", "size"))
    cases, found = range(3), {}
    for name, shift in (("own", 0), ("shuffled", 7)):
        jobs = []
        for n in cases:
            clip, (person,) = toy.benchmark_cases()[n]
            references = toy.held_out_references([(person + shift) % 52], VIEWS, size)
            jobs.append(Job(toy.caption(clip), references, n, (size, size)))
        videos = generate(model, encoders, jobs, SAMPLE_RECIPES["toy"], frames, len(jobs))
        found[name] = score("top-1", dict(zip(cases, videos)))
    assert found["own"] > 0.9 and found["shuffled"] == 0


def test_the_priors_loss_is_zero_for_an_oracle_and_a_velocitys_power_for_silence():
    _, encoders = load(find(ROOT / "assets" / "toy"))
    clips, videos = [toy.benchmark_cases()[n][0] for n in ONE], torch.stack([render(n) for n in ONE])
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
    clip, who = toy.benchmark_cases()[13]
    person = toy.pick(EVERYBODY, who[0])
    person["hair"] = 1 - person["hair"]
    video = toy.render_clips([clip], [person], 6, 32)[0][0]
    (found,) = evaluation.measure(video, 13, VIEWS)
    assert found["colour"]["hair"] > 0.2 and found["colour"]["skin"] < 0.05


def test_a_reference_pasted_into_every_frame_is_a_copy_where_it_was_given_and_is_far():
    """The frontal reference's own pose, where the caption asks for a turn from the front."""
    pose = toy.reference_pose(toy.BENCHMARK_IDENTITIES, toy.BENCHMARK_SEED)
    (i,) = toy.benchmark_cases()[0][1]
    front = {name: pose[name][i * len(VIEWS)].expand(1, 6) for name in ("yaw", "pitch", "roll", "mouth")}
    video = render(0, poses={0: front})
    assert score("yaw", {0: video}) > 20 and score("motion", {0: video}) == 0
    (given,), (not_given,) = (evaluation.measure(video, 0, views) for views in (("front",), ("left",)))
    assert given["copied"] == [None] + [True] * 5  # frame 1 is asked for at 36 degrees
    assert not_given["copied"][1] is False


@pytest.mark.parametrize("views", [("front",), ("left", "back"), VIEWS])
def test_frames_count_for_copies_from_thirty_degrees_on(views):
    """As the metric's words say. Case 0 turns from 0 to 180 degrees."""
    clip, cast = toy.benchmark_cases()[0]
    video = toy.render_clips([clip], [toy.pick(EVERYBODY, i) for i in cast], 20, 32)[0][0]
    (found,) = evaluation.measure(video, 0, views)
    assert "should face 30 degrees or more from all" in METRICS["copied"].words
    for f, copied in enumerate(found["copied"]):
        away = [abs((180 * f / 19 - toy.VIEW_YAW[view] + 180) % 360 - 180) for view in views]
        assert (copied is not None) == (min(away) >= 30), f


def test_noise_in_the_side_frames_alone_lowers_side_and_leaves_the_front():
    video = render(0)  # turns from 0 to 180 degrees
    g = torch.Generator().manual_seed(0)
    video[:, 2:] = torch.rand(video[:, 2:].shape, generator=g) * 2 - 1
    (found,) = evaluation.measure(video, 0, ("front",))
    by_case = {name: report.by_case([{"case": 0, "people": [found]}], METRICS[name]) for name in METRICS}
    values = {name: evaluation.mean(of_case.values()) for name, of_case in by_case.items()}
    assert values["side"] < 12 and values["seen"] > 35 and values["unseen"] < 12
    assert found["frame_right"][:2] == [True, True] and values["top-1 seen"] > values["top-1 unseen"]


def test_the_yaw_that_was_rendered_is_found_and_a_shaking_head_is_rough():
    """A head that is off by a constant, or that follows another motion smoothly, is not."""
    clip, _ = toy.benchmark_cases()[0]
    asked = toy.clip_pose([clip], 0, 6)["yaw"]
    for turned, rough in (([30.0] * 6, 0), ([30.0, -30, 30, -30, 30, -30], 120)):
        video = render(0, poses={0: {"yaw": asked + torch.tensor(turned)}})
        (found,) = evaluation.measure(video, 0, VIEWS)
        assert found["turned"] == turned and evaluation.mean(evaluation.jitter(found)) == rough
    assert toy.benchmark_cases()[1][0].motions == ("looks around",)
    (found,) = evaluation.measure(render(1, motions=("nods",)), 1, VIEWS)
    assert evaluation.mean(evaluation.jitter(found)) < 10
    assert evaluation.mean(map(abs, found["turned"])) > 20


def test_another_motion_mouth_or_wall_is_noticed():
    clip, _ = toy.benchmark_cases()[0]
    wall = next(b for b in toy.BACKGROUNDS if b != clip.background)
    (found,) = evaluation.measure(render(0, background=wall), 0, VIEWS)
    assert found["wall"] is False and found["motion"] is True
    (found,) = evaluation.measure(render(0, motions=("nods",)), 0, VIEWS)
    assert found["motion"] is False and found["wall"] is True
    for n in ONE:
        mouth = next(m for m in toy.MOUTHS if m != toy.benchmark_cases()[n][0].mouths[0])
        (found,) = evaluation.measure(render(n, mouths=(mouth,)), n, VIEWS)
        assert found["mouth"] is False


def test_psnr_is_ten_log_ten_of_peak_two():
    a, mask = torch.zeros(3, 1, 2, 2), torch.tensor([[[1.0, 0], [0, 0]]])
    b = a.clone()
    b[:, 0, 0, 0], b[:, 0, 1, 1] = 0.2, 1  # the second lies outside the mask
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


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    """The command that measured four cases, its folder, what it printed, and the lines that it wrote."""
    folder = tmp_path_factory.mktemp("eval")
    command = ["eval.py", "--ckpt", tiny / "out" / "tiny", "--limit", 4, "--steps", 1, "--out", "ev"]
    command += ["--settings", "none", "all", "none", "--precision", "bf16"]
    printed = call(*command, cwd=folder)
    return command, folder / "ev", printed, (folder / "ev" / "measured.jsonl").read_text().splitlines()


def table_of(printed):
    """All that does not depend on where and how fast it ran."""
    return [line for line in printed.splitlines() if not line.startswith(("checkpoint", "ev/"))]


def test_the_command_prints_tables_and_writes_results_and_report(measured):
    _, folder, printed, lines = measured
    lines = [json.loads(line) for line in lines]
    # with none, with all and the loss; with none and the loss of stage 1
    assert len(lines) == 4 * 3 + 4 * 2
    last = [line for line in lines if line["run"] == lines[0]["run"]]
    cases = {(line["case"], line.get("setting")) for line in last}
    assert cases == {(i, setting) for i in (0, 25, 50, 75) for setting in ("none", "all", None)}
    assert all(len(line["loss"]) == 5 for line in lines if "setting" not in line)
    one = [line["people"][0]["psnr"] for line in last if line.get("setting") == "all" and line["case"] < 60]
    line = next(line for line in printed.splitlines() if line.startswith("1, all"))
    assert float(line.split()[2]) == pytest.approx(sum(one) / 3, abs=0.01)
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 7 and page.count("<h3>") == 4 and "http" not in page
    picture = (folder / "yaw.svg").read_text()
    assert picture.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert "PSNR by yaw, one person" in picture


def test_in_described_the_caption_tells_the_looks_and_nothing_is_given(measured, monkeypatch, tmp_path):
    asked, people = [], toy.benchmark_people()

    def generate(model, encoders, jobs, recipe, frames, batch):
        asked.extend(jobs)
        return [toy.benchmark_truth(job.seed, frames, 32) for job in jobs]
    monkeypatch.setattr(evaluation, "generate", generate)
    plan = evaluation.Plan([0, 99], ["none", "described"], evaluation.SAMPLE_RECIPES["toy"], 1)
    evaluation.evaluate(measured[0][2], plan, tmp_path / "measured.jsonl")
    for number, (plain, described) in zip((0, 99), (asked[:2], asked[2:]), strict=True):
        clip, cast = toy.benchmark_cases()[number]
        assert plain.references == described.references == [{} for _ in cast]
        assert plain.prompt == toy.caption(clip)
        assert described.prompt == toy.caption(clip, [toy.describe(people, i) for i in cast])
    assert set(evaluation.SETTINGS) - set(evaluation.DEFAULT_SETTINGS) == {"described"}


@pytest.fixture
def again(measured, tmp_path):
    """A function that runs the command on a measured.jsonl with other bytes -> what it printed, its lines."""
    command, *_ = measured

    def run_again(text, *more):
        (tmp_path / "ev").mkdir(exist_ok=True)
        (tmp_path / "ev" / "measured.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
        printed = call(*command, *more, cwd=tmp_path)
        return printed, (tmp_path / "ev" / "measured.jsonl").read_text(errors="replace").split("\n")
    return run_again


def test_a_restart_measures_what_is_missing_in_the_same_batches(measured, again, monkeypatch):
    """Under bf16 a video may depend on those that share its forward: the first of three is missing here, and
    the last line is cut as by a kill."""
    _, _, before, lines = measured
    batches = []

    def recording(model, encoders, jobs, *rest):
        batches.append([job.seed for job in jobs])
        return generate(model, encoders, jobs, *rest)
    monkeypatch.setattr(evaluation, "generate", recording)
    missing = next(line for line in lines if '"case": 0, "setting": "all"' in line)
    rest = [line for line in lines if line != missing]
    printed, after = again("\n".join(rest)[:-60])
    assert table_of(printed) == table_of(before)
    assert sorted(line for line in after if line in lines) == sorted(lines) and len(after) == len(lines) + 2
    assert batches == [[0, 25, 50]]
    printed, after = again("\n".join(lines) + "\n")  # nothing is missing
    assert table_of(printed) == table_of(before) and len(after) == len(lines) + 1 and len(batches) == 1


@pytest.mark.parametrize("junk", ['{"run": "RUN", "case": [], "loss": null, "checksum": "0"}', "[" * 100_000,
                                  '{"run": ["RUN"], "checksum": {}}', b"\xff\xfe\x00", "CHANGED"])
def test_junk_in_measured_jsonl_is_passed_over(measured, again, junk):
    _, _, before, lines = measured
    if junk == "CHANGED":  # a result that somebody edited, with a script in its picture
        junk, lines = re.sub('"strip": ".', '"strip": "<script>', lines[0]), lines[1:]
        assert "<script>" in junk
    if isinstance(junk, str):
        junk = junk.replace("RUN", json.loads(lines[0])["run"]).encode()
    printed, _ = again("\n".join(lines).encode() + b"\n" + junk)
    assert table_of(printed) == table_of(before)


def test_no_text_of_a_result_becomes_markup(tmp_path):
    person = evaluation.measure(render(0), 0, VIEWS)
    result = {"case": 0, "setting": "all", "people": person, "strip": '"><script>'}
    of_checkpoint = evaluation.Evaluation([result], {0: [1.0] * 5}, 6, 32)
    evaluation.report(tmp_path / "report.html", "<script>", {"this checkpoint": of_checkpoint})
    case = report.case_html("<script>", [("<script>", "<script>")], ["<script>"])
    for page in ((tmp_path / "report.html").read_text(), case):
        assert "<script" not in page and "&lt;script&gt;" in page


def test_all_that_a_result_depends_on_is_in_the_runs_key():
    found = find(ROOT / "assets" / "toy")
    model, _ = load(found, hardware=Hardware("fp32"))
    plan = evaluation.Plan([0, 50], ["all"], SAMPLE_RECIPES["toy"], 20, "fp32")
    keys = {evaluation.run_key(model, found, plan)}
    for change in (dict(cases=[0, 25]), dict(batch=1), dict(recipe=SAMPLE_RECIPES["toy"] | {"steps": 1})):
        keys.add(evaluation.run_key(model, found, plan._replace(**change)))
    model.precision = "bf16"
    keys.add(evaluation.run_key(model, found, plan))
    found.meta = found.meta | {"sha256": {}}
    keys.add(evaluation.run_key(model, found, plan))
    assert len(keys) == 6
    assert evaluation.run_key(model, found, plan._replace(settings=["front"])) in keys


def test_batches_hold_all_cases_once_and_never_mix_one_person_with_two():
    for batch in (1, 20, 100):
        batches = evaluation.cut_batches([0, 25, 59, 60, 75], batch)
        assert sum(batches, []) == [0, 25, 59, 60, 75] and max(map(len, batches)) <= batch
        assert not any(min(numbers) < 60 <= max(numbers) for numbers in batches)


@pytest.mark.parametrize("flags, message", [
    ("--limit 0", "--limit.*1 to 100 cases"), ("--batch 101", "--batch.*1 to 100 cases"),
    ("--guide-text 1 2", "--guide-text"), ("--settings back", "--settings"), ("--videos v", "unrecognized"),
    ("--ckpt nowhere", "no checkpoint at")])
def test_a_wrong_flag_is_one_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        evaluation.main(flags.split())


@pytest.mark.parametrize("name", ["measured.jsonl", "report.html", "yaw.svg"])
def test_a_folder_in_an_outputs_place_is_refused_before_any_work(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is (a folder|not a file)"):
        evaluation.main(["--ckpt", str(ROOT / "assets" / "toy"), "--out", str(tmp_path)])
    assert not (tmp_path / "measured.jsonl").is_file()


def test_two_evaluations_never_share_a_folder(tmp_path):
    with lock(tmp_path), pytest.raises(UserError, match="is in use by process"):
        evaluation.main(["--ckpt", str(ROOT / "assets" / "toy"), "--out", str(tmp_path)])


@pytest.mark.parametrize("door, metrics", [("toy", METRICS), ("real", real.METRICS)])
def test_help_says_what_every_column_means(door, metrics, capsys):
    with pytest.raises(SystemExit):
        evaluation.main([door, "--help"])
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed and metric.words in printed for name, metric in metrics.items())


def results_of(*values):
    return [{"case": n, "people": [{"v": value}]} for n, value in enumerate(values)]


@pytest.mark.parametrize("value, percent", [(24.3, False), (0.0123, False), (-3.0, False), (1.0, True),
                                            (0.0, True)])
def test_one_case_has_no_interval(value, percent):
    metric = report.Metric("", report.one("v"), percent)
    for values in ((value,), (value, None)):  # the other does not show it
        found = report.estimate(results_of(*values), metric)
        shown = report.as_text(found, percent)
        assert "[" not in shown and float(shown) == pytest.approx(100 * value if percent else value, abs=0.5)
        drawn = charts.plot("t", ["a"], {"all": [found]})
        assert "<circle" in drawn and "nan" not in drawn and "inf" not in drawn
    assert "[" in report.as_text(report.estimate(results_of(value, value + 1), metric), percent)


@pytest.mark.parametrize("values, most", [
    ((1 + 2e-7, 1.0, 1 + 3e-7), 1), ((0.97, 0.2, 1 + 1e-7), 1), ((0.999, 0.998, 1.0), 1),
    ((1.0, -math.inf, math.inf), 1), ((0.5, 0.0, 1.0), 9), ((15.0, 14.0, 22.0), 99), ((0.0, 0.0, 0.0), 9)])
def test_a_plot_holds_its_values_between_its_ticks_and_none_of_a_rate_is_above_one(values, most):
    for percent in (False, True)[:1 + (most == 1)]:
        drawn = charts.plot("t", ["a"], {"all": [report.Estimate(*values)]}, percent, most)
        ticks = [float(v) / (100 if percent else 1) for v in re.findall(r'end">(.*?)<', drawn)]
        low, high = (end if math.isfinite(end) else values[0] for end in values[1:])
        assert 2 <= len(ticks) <= 7 and ticks[0] <= low and min(high, most) <= ticks[-1] <= most
    assert charts.plot("t", ["a"], {"all": [None]}) == ""
