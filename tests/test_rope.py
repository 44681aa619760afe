import itertools

import pytest
import torch

from rope import LAYOUTS, VIEWS, apply_rope, axis_pairs, reference_positions, rope_table, video_positions

GRID = dict(T=6, H=4, W=5, ref_hw=(3, 6))  # no two sides alike, so that no rule can mix them up
SUBSETS = [s for n in range(5) for s in itertools.combinations(VIEWS, n)]


def slots(layout, present, proxy_tokens=4, **grid):
    """{(identity, view): its positions} by the documented order."""
    grid = {**GRID, **grid}
    positions = reference_positions(layout, present, **grid, proxy_tokens=proxy_tokens)
    h, w = grid["ref_hw"]
    found, at = {}, 0
    for k, views in enumerate(present):
        for view in VIEWS:
            n = h * w if view in views else proxy_tokens
            found[k, view] = positions[at : at + n]
            at += n
    assert at == len(positions)
    return found


def alone(positions):
    """Where the tokens of a slot of GRID would be without a layout: those of a reference, or two proxies."""
    return video_positions(1, 3, 6) if len(positions) == 18 else torch.tensor([[0, 1, 3]] * 2)


def test_video_positions_are_t_slowest():
    expected = [(t, h, w) for t in range(2) for h in range(3) for w in range(4)]
    assert video_positions(2, 3, 4).tolist() == [list(p) for p in expected]


def test_wan_splits_128_channels_into_44_42_42():
    assert [2 * n for n in axis_pairs(128)] == [44, 42, 42]


@pytest.mark.parametrize("head_dim", [12, 24, 64, 128])
def test_against_a_float64_complex_reference(head_dim):
    torch.manual_seed(0)
    positions = torch.randint(0, 900, (37, 3))
    x = torch.randn(2, 37, 3, head_dim)
    pairs_hw = head_dim // 6
    split = (head_dim // 2 - 2 * pairs_hw, pairs_hw, pairs_hw)
    angles = torch.cat(
        [positions[:, a, None] / 1e4 ** (torch.arange(n).double() / n) for a, n in enumerate(split)], 1
    )
    turned = (
        torch.complex(x[..., 0::2].double(), x[..., 1::2].double())
        * torch.polar(torch.ones(()).double(), angles)[:, None]
    )
    y = apply_rope(x, *rope_table(positions, head_dim))
    assert y.shape == x.shape and y.dtype == x.dtype
    torch.testing.assert_close(y[..., 0::2].double(), turned.real, rtol=0, atol=2e-6)
    torch.testing.assert_close(y[..., 1::2].double(), turned.imag, rtol=0, atol=2e-6)


def test_half_precision_keeps_its_dtype_and_is_rounded_once():
    x, table = torch.randn(1, 5, 2, 24).bfloat16(), rope_table(video_positions(5, 1, 1), 24)
    assert torch.equal(apply_rope(x, *table), apply_rope(x.float(), *table).bfloat16())


def test_scores_depend_on_distances_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 24, dtype=torch.float64)
    a, b, far = torch.tensor([[3, 1, 2]]), torch.tensor([[1, 5, 0]]), torch.tensor([[40, 7, 9]])

    def score(at_q, at_k):
        return float((apply_rope(q, *rope_table(at_q, 24)) * apply_rope(k, *rope_table(at_k, 24))).sum())

    assert abs(score(a, b) - score(a + far, b + far)) < 1e-5
    assert abs(score(a, b) - score(a + far, b)) > 1e-3


@pytest.mark.parametrize("first", SUBSETS)
def test_jump_dropping_views_of_one_person_moves_nobody(first):
    everything = slots("jump", [VIEWS, VIEWS])
    some = slots("jump", [first, VIEWS])
    for k, view in everything:
        if k == 1 or view in first:
            assert torch.equal(everything[k, view], some[k, view])
        else:  # proxies at the centre of the slot that the view left
            assert some[k, view].unique(dim=0).tolist() == [[everything[k, view][0, 0].item(), 1, 3]]


@pytest.mark.parametrize("jump", [16, 7])
def test_jump_keeps_identities_apart(jump):
    T, found = GRID["T"], slots("jump", [VIEWS, VIEWS], jump=jump)
    times = {slot: set(p[:, 0].tolist()) for slot, p in found.items()}
    assert times == {(k, v): {T + jump * (k + 1) + VIEWS.index(v)} for k in (0, 1) for v in VIEWS}
    assert all(min(times[1, v]) - max(times[0, v]) >= jump for v in VIEWS)
    assert min(min(t) for t in times.values()) - (T - 1) >= jump
    grid = video_positions(1, 3, 6)[:, 1:]
    assert all(torch.equal(p[:, 1:], grid) for p in found.values())


@pytest.mark.parametrize("layout, time", [("rd", GRID["T"] + 1), ("before", -1)])
@pytest.mark.parametrize("proxy_tokens", [0, 2])
def test_rd_and_before_share_one_time_and_shift_in_space(layout, time, proxy_tokens):
    """Each is one whole frame of the video further; a group of proxies takes a place as a reference does."""
    found = slots(layout, [("front", "left"), ("back",)], proxy_tokens)
    taken = [slot for slot, positions in found.items() if len(positions)]
    assert len(taken) == (8 if proxy_tokens else 3)
    for i, slot in enumerate(taken, 1):
        assert torch.equal(found[slot], alone(found[slot]) + torch.tensor([time, i * 4, i * 5]))


@pytest.mark.parametrize("proxy_tokens", [0, 2])
def test_append_counts_on_as_further_frames(proxy_tokens):
    found = slots("append", [("front", "left"), ("back",)], proxy_tokens)
    taken = [positions for positions in found.values() if len(positions)]
    for i, positions in enumerate(taken):
        assert torch.equal(positions, alone(positions) + torch.tensor([GRID["T"] + i, 0, 0]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_two_tokens_share_a_position_but_proxies(layout):
    present = [("front", "back"), VIEWS]
    references = reference_positions(layout, present, **GRID, proxy_tokens=0)
    everything = torch.cat((video_positions(6, 4, 5), references))
    assert len(everything.unique(dim=0)) == len(everything) == 6 * 20 + 6 * 18


@pytest.mark.parametrize("layout", LAYOUTS)
def test_references_may_have_another_grid(layout):
    found = slots(layout, [("front",), ()], ref_hw=(3, 5))
    assert len(found[0, "front"]) == 15 and len(found[1, "front"]) == 4


def test_nobody():
    assert reference_positions("jump", [], **GRID, proxy_tokens=4).shape == (0, 3)
    assert reference_positions("append", [(), ()], **GRID, proxy_tokens=0).shape == (0, 3)


@pytest.mark.parametrize(
    "arguments, says",
    [(("spiral", [()]), "unknown rope layout 'spiral'"), (("jump", [("top",)]), "unknown view 'top'")],
)
def test_bad_input(arguments, says):
    with pytest.raises(ValueError, match=says):
        reference_positions(*arguments, **GRID, proxy_tokens=4)
    with pytest.raises(ValueError, match="jump 3 is smaller"):
        reference_positions("jump", [()], **GRID, proxy_tokens=4, jump=3)
