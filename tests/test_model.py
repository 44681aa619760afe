import random
from dataclasses import replace

import pytest
import torch

import data
import train
from model import CONFIGS, MFI, HarmoView, load_checkpoint, load_tensors, save_checkpoint, unpatchify
from rope import VIEWS, UserError

TINY = CONFIGS["tiny"]
B, GRID = 2, (3, 8, 8)


def network(stirred=True, **changes):
    """A tiny network; stirred: every parameter is moved off its initial value, so no zero hides a fault."""
    torch.manual_seed(0)
    net = HarmoView(replace(TINY, **changes))
    if stirred:
        for p in net.parameters():
            p.data += 0.05 * torch.randn_like(p)
    return net


def inputs(views=(), seed=1):
    """x, t, text, refs, vit; views: one tuple of view names per identity."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    refs = [{v: normal(B, TINY.in_dim, 8, 8) for v in VIEWS} for _ in range(2)]
    vit = [normal(B, TINY.vit_levels, 17, TINY.vit_dim) for _ in range(2)]
    x, text = normal(B, TINY.in_dim, *GRID), normal(B, 30, TINY.text_dim)
    return (
        x,
        torch.tensor([300.0, 900.0]),
        text,
        [{v: refs[k][v] for v in given} for k, given in enumerate(views)],
        [vit[k] if "front" in given else None for k, given in enumerate(views)],
    )


def test_without_references_it_is_the_network_without_the_new_parameters():
    net = network()
    plain = HarmoView(replace(TINY, vit_dim=0, vit_levels=0, proxy_tokens=0))
    new = {name for name, _ in net.named_parameters() if name.startswith(("proxies", "mfi"))}
    assert set(net.state_dict()) - set(plain.state_dict()) == new and len(new) == 7
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k not in new})
    x, t, text, _, _ = inputs()
    assert torch.equal(net(x, t, text), plain(x, t, text))


@pytest.mark.parametrize("layout", ["jump", "rd", "append"])
def test_a_zero_initialised_mfi_moves_nothing(layout):
    net = network(rope_layout=layout)
    net.mfi = MFI(net.config)
    x, t, text, refs, vit = inputs([VIEWS, ("front",)])
    assert torch.equal(net(x, t, text, refs, vit), net(x, t, text, refs))
    net.mfi.proj.weight.data += 0.1
    assert not torch.equal(net(x, t, text, refs, vit), net(x, t, text, refs))


def test_a_missing_view_is_its_proxies():
    net = network()
    x, t, text, refs, _ = inputs([("front", "left"), ("front",)])
    slots, _ = net.embed_references(refs, B, (4, 4))
    for i, slot in enumerate(slots):
        k, v = divmod(i, len(VIEWS))
        expected = net.proxies[v].expand(B, -1, -1)
        assert torch.equal(slot, expected) == (VIEWS[v] not in refs[k])
    before = net(x, t, text, refs)
    net.proxies.data[VIEWS.index("front")] += 1  # both people have a front: nobody sees its proxies
    assert torch.equal(net(x, t, text, refs), before)
    net.proxies.data[VIEWS.index("back")] += 1
    assert not torch.allclose(net(x, t, text, refs), before)


def test_no_reference_is_proxies_not_nothing():
    net = network()
    x, t, text, _, _ = inputs()
    assert not torch.allclose(net(x, t, text, [{}]), net(x, t, text))
    assert torch.allclose(network(proxy_tokens=0)(x, t, text, [{}]), network(proxy_tokens=0)(x, t, text))


def test_identities_are_told_apart_by_position_alone():
    net = network()
    x, t, text, (a, b), _ = inputs([VIEWS, VIEWS])
    assert not torch.allclose(net(x, t, text, [a, b]), net(x, t, text, [b, a]), atol=1e-3)


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_forward_returns_velocity(prediction):
    net = network(prediction=prediction)
    x, t, text, refs, vit = inputs([VIEWS])
    velocity = net(x, t, text, refs, vit)
    assert velocity.shape == x.shape and velocity.dtype == torch.float32
    raw = network(prediction="velocity")(x, t, text, refs, vit)
    sigma = (t / 1000).view(-1, 1, 1, 1, 1)
    assert torch.allclose(velocity, raw if prediction == "velocity" else (x - raw) / sigma, atol=1e-5)


def test_samples_of_a_batch_do_not_mix():
    net = network()
    x, t, text, refs, vit = inputs([VIEWS, ("front",)])
    both = net(x, t, text, refs, vit)
    one = net(
        x[1:], t[1:], text[1:], [{v: r[1:] for v, r in views.items()} for views in refs], [f[1:] for f in vit]
    )
    assert torch.allclose(both[1:], one, atol=1e-5)


def test_short_text_is_padded_with_zero_rows():
    net = network()
    x, t, text, _, _ = inputs()
    padded = torch.nn.functional.pad(text, (0, 0, 0, TINY.text_len - text.shape[1]))
    assert torch.equal(net(x, t, text), net(x, t, padded))
    assert net.context(text, None).shape == (B, TINY.text_len, TINY.text_dim)


def test_unpatchify_undoes_the_patch_embedding():
    T, H, W, C = 2, 3, 5, 4
    x = torch.randn(B, C, T, 2 * H, 2 * W)
    patches = [
        x[:, :, f, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].permute(0, 2, 3, 1).flatten(1)
        for f in range(T)
        for i in range(H)
        for j in range(W)
    ]
    assert torch.equal(unpatchify(torch.stack(patches, 1), (T, H, W)), x)


@pytest.mark.parametrize("number", train.STAGES)
def test_gradients_reach_every_parameter_in_the_stage_that_trains_it(number):
    net = network()
    stage = train.STAGES[number]
    for step in range(16):
        layout = data.draw_layout(stage, step / 16, random.Random(step))
        batch = inputs(layout, seed=step)
        train.loss_of(net, (batch[0], *batch[2:]), batch[1] / 1000, torch.randn_like(batch[0])).backward()
    untouched = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    rows = {1: (), 2: (0,), 3: (0,), 4: (0, 1)}[number]  # the identities that the stage shows
    assert untouched == (
        {name for name in dict(net.named_parameters()) if name.startswith("mfi")} if number == 1 else set()
    )
    if rows:
        assert [k for k in range(2) if net.mfi.identity.grad[k].any()] == list(rows)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda i: (i[0][:, :5], *i[1:]), r"latents are \[2, 5, 3, 8, 8\]; expected \[B, 48"),
        (lambda i: (i[0][..., :7], *i[1:]), "even H and W"),
        (lambda i: (*i[:2], i[2][..., :5], *i[3:]), r"text is \[2, 30, 5\]"),
        (lambda i: (*i[:2], i[2].repeat(1, 9, 1), *i[3:]), r"at most 128"),
        (lambda i: (*i[:3], [{}, {}, {}], None), "refs holds 3 identities; this model holds 2"),
        (lambda i: (*i[:3], [{"top": i[3][0]["front"]}], None), "unknown view 'top'"),
        (
            lambda i: (*i[:3], [{"front": i[3][0]["front"][:1]}], None),
            r"reference 'front' is \[1, 48, 8, 8\]",
        ),
    ],
)
def test_bad_input(change, says):
    with pytest.raises(UserError, match=says):
        network()(*change(inputs([VIEWS])))


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(dim=50, num_heads=4), "dim 50 is no multiple of 2 x 4 heads"),
        (dict(rope_layout="spiral"), "unknown rope layout"),
        (dict(rope_jump=3), "rope jump 3 is smaller"),
    ],
)
def test_a_config_that_cannot_work_is_refused(changes, says):
    with pytest.raises(UserError, match=says):
        HarmoView(replace(TINY, **changes))


# ------------------------------------------------------------------------------------------------ checkpoints
def test_a_checkpoint_comes_back_bit_for_bit_and_old_ones_go(tmp_path):
    net, meta = network(), {"config": vars(TINY), "stage": 1}
    for step in (1, 2, 10):
        save_checkpoint(tmp_path / f"step-{step:06d}", {"ema": net.state_dict()}, meta)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000010"]
    again, found = load_checkpoint(tmp_path / "step-000010")
    assert found["stage"] == 1
    assert all(
        torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    folder = tmp_path / "step-000001"
    save_checkpoint(folder, {"ema": network().state_dict()}, {"config": vars(TINY)})
    with pytest.raises(TypeError):
        save_checkpoint(folder, {"ema": network().state_dict()}, {"config": object()})
    load_checkpoint(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_a_damaged_checkpoint_is_refused(tmp_path):
    folder = tmp_path / "step-000001"
    save_checkpoint(folder, {"ema": network().state_dict()}, {"config": vars(TINY)})
    file = folder / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match="missing or damaged"):
        load_tensors(folder, "ema")


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    folder = tmp_path / "step-000001"
    save_checkpoint(folder, {"ema": network().state_dict()}, {"config": {**vars(TINY), "dim": 96}})
    with pytest.raises(UserError, match="size mismatch"):
        load_checkpoint(folder)
    save_checkpoint(folder, {"ema": network().state_dict()}, {"config": {**vars(TINY), "colour": "red"}})
    with pytest.raises(UserError, match="differ in colour"):
        load_checkpoint(folder)
