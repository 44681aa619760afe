import random
from dataclasses import replace

import pytest
import torch

import data
from rope import VIEWS, UserError
from train import STAGES

RED = torch.tensor([1.0, 0.0, 1.0])  # a patch colour nothing else has


def person(**changes):
    """One identity with everything the patches could be mistaken for made grey."""
    one = {k: v.clone() for k, v in data.draw_identities(1, 3).items()}
    for name in ("skin", "hair", "eyes", "lips", "patch_left", "patch_right", "patch_back"):
        one[name] = torch.full((1, 3), 0.5)
    return one | {k: torch.as_tensor(v)[None] for k, v in changes.items()}


def magenta(identity, yaw, size=64):
    """Number of pixels with the patch colour at a yaw."""
    pose = {
        "yaw": torch.tensor([float(yaw)]),
        **{k: torch.zeros(1) for k in ("pitch", "roll", "mouth", "y")},
        "scale": torch.tensor([0.6]),
        "light": torch.tensor([[0.0, 0.4, 1.0]]),
        "light_colour": torch.ones(1, 3),
        "shirt": torch.full((1, 3), 0.5),
    }
    rgb, _, _ = data.render_heads(identity, pose, size)
    return int((rgb[0, 0] - rgb[0, 1] > 0.1).sum())


@pytest.mark.parametrize("patch", data.PATCHES)
def test_a_patch_shows_in_its_own_view_only(patch):
    one = person(**{f"patch_{patch}": RED})
    seen = {view: magenta(one, data.VIEW_YAW[view]) for view in VIEWS}
    assert seen[patch] > 40
    assert seen["front"] == 0
    opposite = {"left": "right", "right": "left"}.get(patch)
    assert opposite is None or seen[opposite] == 0


def test_the_left_patch_is_invisible_from_the_whole_right():
    one = person(patch_left=RED)
    assert [magenta(one, yaw) for yaw in range(0, 100, 10)] == [0] * 10
    assert all(magenta(one, yaw) > 20 for yaw in (-60, -90, -120))


def test_yaw_turns_to_the_named_side():
    """In the left view the nose points to the picture's left edge; pitch > 0 looks up."""
    one = person()
    one["nose"] = torch.tensor([0.4])
    pose = {k: torch.zeros(3) for k in ("roll", "mouth", "y")}
    pose |= {
        "yaw": torch.tensor([-85.0, 85, 0]),
        "pitch": torch.tensor([0.0, 0, 30]),
        "scale": torch.full((3,), 0.6),
        "light": torch.ones(3, 3),
        "light_colour": torch.ones(3, 3),
        "shirt": torch.zeros(3, 3),
    }
    one["eyes"] = RED[None]
    three = data.pick(one, torch.zeros(3, dtype=torch.int64))
    rgb, _, head = data.render_heads(three, pose, 64)
    column = torch.arange(64.0)
    middle = (head * column).sum((1, 2, 3)) / head.sum((1, 2, 3))
    assert middle[0] < 31.5 < middle[1]
    eyes = rgb[2, 0] - rgb[2, 1] > 0.1
    level = data.render_heads(
        data.pick(one, 0),
        {k: v[:1] for k, v in (pose | {"yaw": torch.zeros(3), "pitch": torch.zeros(3)}).items()},
        64,
    )[0]
    assert (
        eyes.nonzero()[:, 0].float().mean() < (level[0, 0] - level[0, 1] > 0.1).nonzero()[:, 0].float().mean()
    )


def test_identities_differ_and_training_never_sees_the_held_out():
    held = data.draw_identities(52, data.BENCHMARK_SEED)
    trained = data.draw_identities(500, data.TRAIN_SEED + 1)
    again = data.draw_identities(52, data.BENCHMARK_SEED)
    assert all(torch.equal(held[k], again[k]) for k in held)
    looks = torch.cat([held[f"patch_{p}"] for p in data.PATCHES] + [held["skin"], held["hair"]], 1)
    others = torch.cat([trained[f"patch_{p}"] for p in data.PATCHES] + [trained["skin"], trained["hair"]], 1)
    assert torch.cdist(looks, others).min() > 0.02
    assert (torch.cdist(looks, looks) + 10 * torch.eye(52)).min() > 0.05


@pytest.mark.parametrize("people", [1, 2])
def test_captions_say_every_parameter_and_nothing_else(people):
    """Two clips have the same caption exactly if they are the same; every name stands in it word for word."""
    clips = data.toy_clips(300, people, "captions")
    assert len({data.caption(c) for c in clips}) == len(set(clips))
    for clip in clips[:50]:
        words = data.caption(clip)
        assert all(
            name in words for name in (*clip.motions, *clip.mouths, clip.zoom, clip.light, clip.background)
        )
        assert all(f"a {shirt} shirt" in words for shirt in clip.shirts)
        assert words.index(clip.motions[0]) <= words.rindex(clip.motions[-1])


@pytest.mark.parametrize(
    "change",
    [
        {"zoom": "a slow zoom in"},
        {"light": "warm light"},
        {"background": "a sunset"},
        {"motions": ("nods",)},
        {"mouths": ("the mouth open",)},
        {"shirts": ("blue",)},
    ],
)
def test_what_the_caption_says_is_what_the_renderer_shows(change):
    one = data.draw_identities(1, 5)
    base = data.Clip(
        ("tilts the head",), ("the mouth closed",), ("red",), "a close-up", "soft light", "a grey wall"
    )
    other = replace(base, **change)
    (a, b), _ = data.render_clips([base, other], [data.pick(one, [0, 0])], 6, 32)
    assert (a - b).abs().max() > 0.1 and data.caption(base) != data.caption(other)


def test_rendering_is_exact_ground_truth_for_anybody():
    """Re-rendering a clip with another identity changes that person's pixels and nothing else."""
    people = data.draw_identities(4, 6)
    clip = data.toy_clips(1, 2, "truth")[0]
    (a,), mask = data.render_clips([clip], [data.pick(people, 0), data.pick(people, 1)], 6, 32)
    (again,), _ = data.render_clips([clip], [data.pick(people, 0), data.pick(people, 1)], 6, 32)
    (b,), other = data.render_clips([clip], [data.pick(people, 2), data.pick(people, 1)], 6, 32)
    assert torch.equal(a, again) and a.shape == (3, 6, 32, 64) and mask.shape == (1, 2, 6, 32, 64)
    right = torch.zeros(64, dtype=torch.bool)
    right[34:] = True
    assert torch.equal(a[..., right], b[..., right]) and not torch.equal(a[..., ~right], b[..., ~right])
    assert torch.equal(mask[0, 1][..., right], other[0, 1][..., right])


def test_references_are_cross_pair_or_from_the_clip():
    who = data.draw_identities(2, 8)
    cross = data.render_references(who, 1, 32)
    assert cross.shape == (2, 4, 3, 32, 32) and (cross[:, :, :, 0, 0] == 1).all()  # on white
    assert torch.equal(cross, data.render_references(who, 1, 32))
    assert not torch.equal(cross, data.render_references(who, 2, 32))
    clip = data.Clip(
        ("sweeps rightwards",), ("the mouth open",), ("red",), "a close-up", "warm light", "a sunset"
    )
    a, b = (data.render_references(who, 1, 32, [replace(clip, shirts=(s,))] * 2) for s in ("red", "blue"))
    assert (a - b)[:, :3].abs().amax() > 0.5  # in-pair references wear the clip's shirt


def test_view_distance_wraps_around():
    yaw = torch.tensor([[-180.0, 0.0, 190.0, -85.0]])
    distance = data.view_distance(yaw)[0]
    assert distance[VIEWS.index("back")].tolist() == [0, 180, 10, 95]
    assert distance[VIEWS.index("left")].tolist()[3] == 0


def test_the_benchmark_is_fixed():
    cases = data.benchmark_cases()
    assert [len(who) for _, who in cases] == [1] * 60 + [2] * 40
    assert all(set(clip.motions) <= set(data.SWEEPS) and len(set(who)) == len(who) for clip, who in cases)
    assert cases == data.benchmark_cases()
    assert len({i for _, who in cases for i in who}) > 40


# -------------------------------------------------------------------------------------------- drawing batches
def layouts(number, n=2000):
    return [data.draw_layout(STAGES[number], i / n, random.Random(i)) for i in range(n)]


def test_view_dropout_is_the_stages():
    assert set(layouts(1)) == {((),), ((), ())}
    single = layouts(2)
    assert set(single) == {((),), (("front",),)} and 0.07 < single.count(((),)) / 2000 < 0.13
    multi = layouts(3)
    assert {len(x) for x in multi} == {1}

    def dropped(some):
        given = [x[0] for x in some if x[0]]
        return sum("back" not in views for views in given) / len(given)

    assert 0.44 < dropped(multi[:500]) < 0.54 and 0.17 < dropped(multi[-500:]) < 0.30
    assert any("front" not in x[0] and x[0] for x in multi)
    harmony = layouts(4)
    assert {len(x) for x in harmony} == {1, 2} and 0.07 < sum(not any(x) for x in harmony) / 2000 < 0.13
    assert all(all(x) for x in harmony if any(x))  # nobody is left out alone


def test_region_masking_hides_its_share_in_whole_blocks():
    image = torch.ones(3, 32, 32)
    masked = data.mask_regions(image, 0.6, 8, torch.Generator().manual_seed(0))
    blocks = masked.unfold(1, 8, 8).unfold(2, 8, 8).reshape(3, 16, 64)
    assert ((blocks == 0).all(-1) | (blocks == 1).all(-1)).all()
    assert (blocks[0, :, 0] == 0).sum() == round(0.6 * 16)
    assert torch.equal(image, torch.ones(3, 32, 32))


def test_batches_belong_to_their_samples(tiny):
    """A sample is the same whatever batch it is drawn in, and text dropout takes the caption alone."""
    folder = next((tiny / "cache").iterdir())
    dataset = data.ToyData(folder, 32)

    def generators(*seeds):
        return [torch.Generator().manual_seed(s) for s in seeds]

    layout = (("front", "back"), ())
    x0, text, refs, vit = dataset.batch(layout, generators(1, 2, 3), "cpu")
    alone = dataset.batch(layout, generators(2), "cpu")
    assert torch.equal(x0[1:2], alone[0]) and torch.equal(text[1:2], alone[1])
    assert torch.equal(refs[0]["back"][1:2], alone[2][0]["back"]) and refs[1] == {} and vit[1] is None
    torch.testing.assert_close(vit[0][1:2], alone[3][0])
    nothing = data.ToyData(folder, 32, text_dropout=1).batch(layout, generators(1), "cpu")
    assert torch.equal(nothing[1][0].half(), dataset.clips[1]["text"][-1]) and not torch.equal(
        nothing[1], text[:1]
    )


def test_masking_is_for_references_only(tiny):
    folder = next((tiny / "cache").iterdir())
    draw = {
        m: data.ToyData(folder, 32, mask=m).batch((VIEWS,), [torch.Generator().manual_seed(1)], "cpu")
        for m in (0, 0.6)
    }
    assert torch.equal(draw[0][0], draw[0.6][0])
    hidden = (draw[0.6][2][0]["left"] == 0).float().mean()
    assert 0.55 < hidden < 0.68


def test_views_that_a_cache_lacks_are_proxies(tiny):
    folder = next((tiny / "cache").iterdir())
    dataset = data.ToyData(folder, 32, data.IN_PAIR_VIEWS)
    _, _, refs, vit = dataset.batch((VIEWS, ("back",)), [torch.Generator().manual_seed(1)], "cpu")
    assert tuple(refs[0]) == data.IN_PAIR_VIEWS and refs[1] == {} and vit[1] is None


@pytest.mark.parametrize("motion", data.IN_PAIR_MOTIONS)
def test_in_pair_motions_show_the_in_pair_views(motion):
    clip = replace(data.toy_clips(1, 1, 0)[0], motions=(motion,))
    distance = data.view_distance(data.clip_pose([clip], 0, 6)["yaw"])[0].amin(dim=1)
    assert all(distance[VIEWS.index(view)] < 25 for view in data.IN_PAIR_VIEWS)
    assert distance[VIEWS.index("back")] > 60


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        data.probe_writable(tmp_path / "file" / "below")
