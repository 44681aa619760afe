import json
import math
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import save_file

import data
import train
from kernels import qk_norm_rope
from model import (CHOICES, CONFIGS, MFI, WAN, DiTConfig, HarmoView, coordinate_planes, load_checkpoint,
                   load_wan, on_meta, positions_and_tables, sinusoid, unpatchify)
from networks.lora import NEW_PREFIXES
from networks.weights import original_name
from rope import VIEWS
from support import checkpoints
from support.checkpoints import save_checkpoint
from support.script import UserError, uses_bf16

TINY = CONFIGS["tiny"]
MIXED = [("front", "left", "back"), ("right",)]  # two people, dropped views
B, GRID, REF = 2, (3, 6, 10), (8, 4)  # no two sides alike, so that nothing can mix them up


def network(stirred=True, **changes):
    """A tiny network; stirred: every parameter is moved off its initial value, so no zero hides a fault."""
    torch.manual_seed(0)
    net = HarmoView(replace(TINY, **changes))
    if stirred:
        for p in net.parameters():
            p.data += 0.05 * torch.randn_like(p)
    return net


def inputs(views=(), seed=1, grid=GRID):
    """x, t, text, refs, vit; views: one tuple of view names per identity."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    refs = [{v: normal(B, TINY.in_dim, *REF) for v in VIEWS} for _ in range(2)]
    vit = [normal(B, TINY.vit_levels, 17, TINY.vit_dim) for _ in range(2)]
    x, text = normal(B, TINY.in_dim, *grid), normal(B, 30, TINY.text_dim)
    return (x, torch.tensor([300.0, 900.0]), text,
            [{v: refs[k][v] for v in given} for k, given in enumerate(views)],
            [vit[k] if "front" in given else None for k, given in enumerate(views)])


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
    net.init_new()
    x, t, text, refs, vit = inputs([VIEWS, ("front",)])
    assert torch.equal(net(x, t, text, refs, vit), net(x, t, text, refs))
    net.mfi.proj.weight.data += 0.1
    assert not torch.equal(net(x, t, text, refs, vit), net(x, t, text, refs))


def test_a_new_networks_blocks_are_the_identity_with_open_gates_and_look_at_their_own_place():
    torch.manual_seed(0)
    net = HarmoView(TINY)
    x, t, text, refs, vit = inputs(MIXED)
    assert torch.equal(net(x, t, text, refs, vit), x / (t / 1000).view(-1, 1, 1, 1, 1))  # x0 is zero
    net.head.head.weight.data.normal_()
    alone = net(x, t, text)
    assert torch.equal(net(x, t, text + 1, refs, vit), alone) and not torch.equal(net(x, t / 2, text), alone)
    alone.square().mean().backward()
    for block in net.blocks:
        assert block.self_attn.o.weight.grad.any() and block.ffn[2].weight.grad.any()
        a, nothing = block.self_attn, torch.zeros(1, 60, TINY.dim)
        layout = "jump", 0, 16, TINY.dim // TINY.num_heads
        rope = positions_and_tables(layout, (), (3, 4, 5), (4, 2), x.device)
        q, k = qk_norm_rope(a.q(nothing), a.k(nothing), a.norm_q.weight, a.norm_k.weight, *rope, TINY.eps)
        nearest = torch.einsum("blnk,bmnk->lm", q, k).argmax(dim=1)
        assert torch.equal(nearest, torch.arange(60))


def test_a_missing_view_is_its_proxies():
    net = network()
    x, t, text, refs, _ = inputs([("front", "left"), ("front",)])
    _, tokens, *_ = net.embed_all(x, refs)
    lengths = [8 if view in views else TINY.proxy_tokens for views in refs for view in VIEWS]
    for i, slot in enumerate(tokens.split(lengths, dim=1)):
        k, v = divmod(i, len(VIEWS))
        expected = net.proxies[v].expand(B, -1, -1)
        assert torch.equal(slot[:, :TINY.proxy_tokens], expected) == (VIEWS[v] not in refs[k])
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
@pytest.mark.parametrize("times, divisors", [((300, 900), (0.3, 0.9)), ((20, 60), (0.05, 0.06))])
def test_forward_returns_velocity(prediction, times, divisors):
    """Of an x0 prediction too, though at low noise it is divided by no less than 0.05."""
    net, t = network(prediction=prediction), torch.tensor(times).float()
    x, _, text, refs, vit = inputs([VIEWS])
    velocity = net(x, t, text, refs, vit)
    assert velocity.shape == x.shape and velocity.dtype == torch.float32
    raw = network(prediction="velocity")(x, t, text, refs, vit)
    sigma = torch.tensor(divisors).view(-1, 1, 1, 1, 1)
    assert torch.allclose(velocity, raw if prediction == "velocity" else (x - raw) / sigma, atol=1e-5)


@pytest.mark.parametrize("lengths", [(128, 20), (9, 94, 128), (95, 128), (30, 94)])
def test_a_long_caption_of_a_neighbour_changes_nothing(lengths):
    """One person's MFI takes 34 of 128 rows: a caption of more than 94 needs further ones. All of a long
    caption is read."""
    net = network()
    g = torch.Generator().manual_seed(3)
    texts = [torch.randn(n, TINY.text_dim, generator=g) for n in lengths]
    x = torch.randn(len(lengths), TINY.in_dim, *GRID, generator=g)
    vit = torch.randn(len(lengths), TINY.vit_levels, 17, TINY.vit_dim, generator=g)
    refs = torch.randn(len(lengths), TINY.in_dim, *REF, generator=g)

    def velocity(some, texts):
        text = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        return net(x[some], torch.full((len(some),), 600.0), text, [{"front": refs[some]}], [vit[some]])

    together = velocity([*range(len(texts))], texts)
    for n, text in enumerate(texts):
        assert (together[n] - velocity([n], [text])[0]).abs().max() < 1e-5 * together.abs().max()
        changed = velocity([n], [torch.cat((text[:-1], -text[-1:]))])[0]
        assert (together[n] - changed).abs().max() > 1e-4 * together.abs().max()


def test_a_predicted_clip_is_reached_from_every_noise_level_of_twenty_plain_steps():
    """One step of the velocity ends at the predicted x0, from sigma 0.05 on, the last of 20 steps without a
    shift; below, dividing by sigma would blow up what is left of an error."""
    net, raw = network(prediction="x0"), network(prediction="velocity")
    x, _, text, refs, vit = inputs([VIEWS])
    for sigma in (1.0, 0.2, 0.1, 0.05, 0.01, 0.0):
        t = torch.full((B,), 1000 * sigma)
        predicted, velocity = raw(x, t, text, refs, vit), net(x, t, text, refs, vit)
        if sigma >= 0.05:
            assert torch.allclose(x - sigma * velocity, predicted, atol=1e-4)
        else:
            assert torch.allclose(velocity, (x - predicted) / 0.05, rtol=1e-4, atol=1e-3)


def test_a_time_is_embedded_in_float64_and_read_in_float32():
    """Also with weights in bf16 and under autocast. In float32 the angle of 999.5 is off by 3e-5."""
    t = torch.tensor([999.5, 437, 0.3])
    angles = t.double()[:, None] / 10000 ** (torch.arange(64) / 64).double()
    expected = torch.cat((angles.cos(), angles.sin()), dim=1)
    assert (sinusoid(t, 128) - expected).abs().max() < 1e-7
    net = network().bfloat16()
    rounded = network()
    rounded.load_state_dict(net.state_dict())
    time = rounded.time_embedding(expected.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = net.embed_time(t)
    for a, b in zip(found, (time, rounded.time_projection(time).unflatten(1, (6, -1))), strict=True):
        assert a.dtype == torch.float32 and (a - b).abs().max() < 1e-5


def test_mfi_is_its_formula_for_each_identity_and_level():
    """LayerNorm, a projection, and the sum of an embedding of the identity and one of the level."""
    mfi, g = network(vit_levels=3).mfi.double(), torch.Generator().manual_seed(1)
    features = torch.randn(B, 3, 5, TINY.vit_dim, generator=g).double()
    features = features * torch.tensor([3e-3, 1, 40])[:, None, None] + torch.tensor([0, 1, 9])[:, None, None]
    for k in (0, 1):
        found = mfi(features, k).unflatten(1, (3, 5))
        for level in range(3):
            x = features[:, level]
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            x = (x * mfi.norm.weight + mfi.norm.bias) @ mfi.proj.weight.T + mfi.proj.bias
            assert (found[:, level] - x - mfi.identity[k] - mfi.level[level]).abs().max() < 1e-5


def test_the_second_person_keeps_its_identity_where_the_first_has_no_front():
    net = network()
    x, t, text, refs, vit = inputs([("left",), ("front",)])
    before = net(x, t, text, refs, vit)
    net.mfi.identity.data[0] += 1
    assert vit[0] is None and torch.equal(net(x, t, text, refs, vit), before)
    net.mfi.identity.data[1] += 1
    assert not torch.allclose(net(x, t, text, refs, vit), before, atol=1e-3)


def test_coordinates_are_waves_of_time_height_and_width():
    """Height and width in the same unit, so the left square of a wide picture looks like a square one."""
    planes = coordinate_planes(18, 3, 4, 7, torch.device("cpu"))
    assert planes.shape == (18, 3, 4, 7)
    for f, i, j in ((0, 0, 0), (1, 3, 2), (2, 1, 6)):
        places = f - 1, 2 * i / 3 - 1, 2 * j / 3 - 1
        expected = [1.5 * wave(2**k * math.pi / 4 * place)
                    for k in (0, 1, 2) for wave in (math.sin, math.cos) for place in places]
        assert planes[:, f, i, j].tolist() == pytest.approx(expected, abs=1e-6)
    square = coordinate_planes(18, 3, 4, 4, torch.device("cpu"))
    assert torch.equal(planes[..., :4], square)


def test_samples_of_a_batch_do_not_mix():
    net = network()
    x, t, text, refs, vit = inputs([VIEWS, ("front",)])
    both = net(x, t, text, refs, vit)
    one = net(x[1:], t[1:], text[1:], [{v: r[1:] for v, r in views.items()} for views in refs],
              [f[1:] for f in vit])
    assert torch.allclose(both[1:], one, atol=1e-5)


def test_short_text_is_padded_with_zero_rows():
    net = network()
    x, t, text, _, _ = inputs()
    padded = torch.nn.functional.pad(text, (0, 0, 0, TINY.text_len - text.shape[1]))
    assert torch.equal(net(x, t, text), net(x, t, padded))
    assert net.text_and_mfi(text, None)[0].shape == (B, TINY.text_len, TINY.text_dim)


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
    for step in range(32):
        people = stage.people[step % len(stage.people)]
        layout = data.draw_views(stage, step / 32, random.Random(step), people * (VIEWS,))
        batch = inputs(layout, seed=step)
        train.loss_of(net, (batch[0], *batch[2:]), batch[1] / 1000, torch.randn_like(batch[0])).backward()
    untouched = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    rows = () if stage.views == "none" else range(max(stage.people))  # the identities that the stage shows
    expected = {name for name in dict(net.named_parameters()) if name.startswith("mfi")}
    assert untouched == (set() if rows else expected)
    if rows:
        assert [k for k in range(2) if net.mfi.identity.grad[k].any()] == list(rows)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda i: (i[0][:, :5], *i[1:]), r"latents are \[2, 5, 3, 6, 10\]; expected \[B, 48"),
        (lambda i: (i[0][..., :7], *i[1:]), "even H and W"),
        (lambda i: (*i[:2], i[2][..., :5], *i[3:]), r"text is \[2, 30, 5\]"),
        (lambda i: (*i[:2], i[2].repeat(1, 9, 1), *i[3:]), r"at most 128"),
        (lambda i: (*i[:3], [{}, {}, {}], None), "refs hold 3 identities; this model holds 2"),
        (lambda i: (*i[:3], [{"top": i[3][0]["front"]}], None), "unknown view 'top'"),
        (lambda i: (*i[:3], [{"front": i[3][0]["front"][:1]}], None), r"references are \(1, 48, 8, 4\)"),
        (lambda i: (*i[:3], [{"front": i[3][0]["front"][:, :, :7]}], None),
         r"references are \(2, 48, 7, 4\); expected \[2, 48, h, w\], the same even h and w"),
        (lambda i: (*i[:3], [{"front": i[3][0]["front"][..., :3]}], None),
         r"references are \(2, 48, 8, 3\); expected \[2, 48, h, w\], the same even h and w"),
        (lambda i: (*i[:3], [i[3][0] | {"left": i[3][0]["left"][..., :2]}], None),
         r"references are \(2, 48, 8, 2\) and \(2, 48, 8, 4\); .* the same even h and w for every one"),
    ],
)
def test_bad_input(change, says):
    with pytest.raises(ValueError, match=says):
        network()(*change(inputs([VIEWS])))


@pytest.mark.parametrize(
    "changes, says",
    [(dict(num_layers=1001), "config num_layers is 1001; expected an int from 0 to 1000$"),
     (dict(ffn_dim=2**18 + 1), "config ffn_dim is 262145"), (dict(in_dim=-1), "config in_dim is -1"),
     (dict(prediction=None), "config prediction is None; expected velocity or x0$"),
     (dict(prediction="x"), "config prediction is 'x'; expected velocity or x0$"),
     (dict(coord_channels=10), "config coord_channels is 10; expected a multiple of 6"),
     (dict(dim=50, num_heads=4), "dim 50 is not a multiple of 2 x 4 heads"),
     (dict(rope_layout="spiral"), "unknown rope layout"), (dict(rope_jump=3), "rope jump 3 is smaller")],
)
def test_a_config_that_cannot_work_is_refused(changes, says):
    with pytest.raises(UserError, match=says):
        HarmoView(replace(TINY, **changes))


# ------------------------------------------------------------------------------------------------ checkpoints
def test_a_checkpoint_comes_back_bit_for_bit_and_takes_none_away(tmp_path):
    net, meta = network(), {"config": vars(TINY), "stage": 1}
    for step in (1, 2, 10):
        save_checkpoint(tmp_path / f"step-{step:06d}", {"ema": net.state_dict()}, meta)
    assert len(list(tmp_path.iterdir())) == 3
    again, found = load_checkpoint(tmp_path / "step-000010")
    assert found["stage"] == 1
    weights = zip(net.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    folder = tmp_path / "step-000001"
    save_checkpoint(folder, {"ema": network().state_dict()}, {"config": vars(TINY)})
    with pytest.raises(TypeError):
        save_checkpoint(folder, {"ema": network().state_dict()}, {"config": object()})
    load_checkpoint(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_a_damaged_checkpoint_is_refused(tmp_path):
    folder, tokenizer = tmp_path / "step-000001", tmp_path / "spiece.model"
    tokenizer.write_bytes(b"pieces")
    save_checkpoint(folder, {"ema": network().state_dict()}, {"config": vars(TINY)}, [tokenizer])
    file = folder / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match="ema.safetensors is missing or damaged"):
        load_checkpoint(folder)
    meta = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps(meta | {"step": None}))
    with pytest.raises(UserError, match="checkpoint.json is damaged"):
        load_checkpoint(folder)
    for wrong, says in (({"dim": "x"}, "config dim is x; expected an int from 0 to 262144"),
                        ({"ffn_dim": -1}, "config ffn_dim is -1"),
                        ({"num_layers": 1001}, "config num_layers is 1001"),
                        ({"prediction": "x"}, "config prediction is 'x'; expected velocity or x0"),
                        ({"coord_channels": 10}, "config coord_channels is 10; expected a multiple of 6")):
        (folder / "checkpoint.json").write_text(json.dumps(meta | {"config": meta["config"] | wrong}))
        with pytest.raises(UserError, match=rf"its config does not fit this version \({says}"
                           ) as error:
            load_checkpoint(folder)
        assert len(str(error.value)) < 400


def test_a_check_reads_no_weights(tmp_path, monkeypatch):
    """A checkpoint of 14b and its optimizer are 200 GB, which a check of its shapes must not hash."""
    folder = tmp_path / "step-000001"
    save_checkpoint(folder, {"ema": network().state_dict()}, {"config": vars(TINY)})
    monkeypatch.setattr(checkpoints, "sha256_of", None)
    on_meta(folder)
    with pytest.raises(TypeError):
        load_checkpoint(folder)


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    folder = tmp_path / "step-000001"
    save_checkpoint(folder, {"ema": network().state_dict()}, {"config": {**vars(TINY), "dim": 96}})
    with pytest.raises(UserError, match="does not fit HarmoView.*mis-shaped"):
        load_checkpoint(folder)
    save_checkpoint(folder, {"ema": network().state_dict()}, {"config": {**vars(TINY), "colour": "red"}})
    with pytest.raises(UserError, match="does not fit this version.*colour"):
        load_checkpoint(folder)


# ------------------------------------------------------------------------------------------ Wan's checkpoints
EPS = 0.05  # Wan's, a millionth, changes hardly a digit that float32 holds
SMALL_WAN = DiTConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=3, freq_dim=32, text_dim=24, vit_dim=20,
                      vit_levels=2, eps=EPS)
TO_DIFFUSERS = {  # ours: theirs, written out again so that a wrong rename in model.py cannot hide
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
IN_BLOCKS = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{
        f"{ours}.{part}": f"{theirs}.{their_part}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, their_part in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"),
                                 ("norm_q", "norm_q"), ("norm_k", "norm_k"))
    },
}


def their_name(name):
    if name.startswith("blocks."):
        _, number, rest = name.split(".", 2)
        stem = max((k for k in IN_BLOCKS if rest == k or rest.startswith(k + ".")), key=len)
        return f"blocks.{number}.{IN_BLOCKS[stem]}{rest[len(stem) :]}"
    stem = next((k for k in TO_DIFFUSERS if name.startswith(k)), None)
    return TO_DIFFUSERS[stem] + name[len(stem) :] if stem else name


@pytest.fixture(scope="module")
def oracle():
    """diffusers' Wan transformer, small, with random weights, and its tensors by our names."""
    torch.manual_seed(0)
    net = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, text_dim=24, freq_dim=32, ffn_dim=96, num_layers=3,
        eps=EPS).eval()
    for name, p in net.named_parameters():
        one = p.ndim == 1 or "scale_shift" in name  # of size one, or attention would be nearly uniform
        p.data = torch.randn_like(p) / (1 if one else p[0].numel() ** 0.5)
    theirs = net.state_dict()
    base = [name for name in HarmoView(SMALL_WAN).state_dict() if not name.startswith(NEW_PREFIXES)]
    assert sorted(map(their_name, base)) == sorted(theirs)
    return net, {name: theirs[their_name(name)].clone() for name in base}


def write(folder, tensors, shards=1):
    """Tensors as a Wan folder, in one file or in shards with an index."""
    folder.mkdir(exist_ok=True)
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
        return folder
    weight_map = {name: f"diffusion_pytorch_model-{i % shards}.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, folder / shard)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wan_weights_load_exactly(oracle, tmp_path, layout, shards, device):
    net, tensors = oracle
    named = {their_name(k) if layout == "diffusers" else k: v for k, v in tensors.items()}
    with torch.device(device):
        ours = HarmoView(SMALL_WAN)
    absent = load_wan(ours, write(tmp_path / "wan", named, shards))
    assert absent == [name for name in ours.state_dict() if name.startswith(NEW_PREFIXES)]
    assert len(absent) == 7
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(3, 16, 3, 6, 10, generator=g), torch.randn(3, 512, 24, generator=g)
    t = torch.tensor([999.0, 500.0, 3.0])
    with torch.no_grad():
        truth = net(x, t, text, return_dict=False)[0]
        for refs, vit in ((None, None), (None, [torch.randn(3, 2, 5, 20), torch.randn(3, 2, 5, 20)])):
            mine = ours(x, t, text[:, :480], refs, vit)
            short = net(x, t, F.pad(text[:, :480], (0, 0, 0, 32)), return_dict=False)[0]
            assert (mine - short).norm() <= 1e-5 * short.norm()
        mine = ours(x, t, text)
    error = float((mine - truth).norm() / truth.norm())
    print(f"relative error {error:.1e}")
    assert error <= 1e-5
    assert not any(p.is_meta for p in ours.parameters())


def test_a_new_mfi_keeps_wan_bit_for_bit_and_long_captions_work():
    net = HarmoView(SMALL_WAN)
    x, t, text = torch.randn(1, 16, 2, 4, 4), torch.tensor([700.0]), torch.randn(1, 500, 24)
    vit = [torch.randn(1, 2, 6, 20), None]
    for p in (p for name, p in net.named_parameters() if not name.startswith(NEW_PREFIXES)):
        p.data = torch.randn_like(p) / p.shape[-1] ** 0.5
    assert torch.equal(net(x, t, text), net(x, t, text, None, vit))  # 12 rows fill the padding
    longer = net(x, t, torch.cat((text, text[:, :7]), dim=1), None, vit)  # 507 + 12: longer than 512
    assert longer.isfinite().all()


@pytest.mark.parametrize("name, parameters, tensors",
                         [("1.3b", 1_418_996_800, 825), ("14b", 14_288_491_584, 1095)])
def test_full_sizes_are_wans(name, parameters, tensors):
    """Names and shapes of diffusers' network of this size, and counts of the released files."""
    c = CONFIGS[name]
    with torch.device("meta"):
        net = HarmoView(c)
        theirs = diffusers.WanTransformer3DModel(
            num_attention_heads=c.num_heads, attention_head_dim=c.dim // c.num_heads, in_channels=c.in_dim,
            out_channels=c.out_dim, text_dim=c.text_dim, freq_dim=c.freq_dim, ffn_dim=c.ffn_dim,
            num_layers=c.num_layers, eps=c.eps)
    base = {name: p.shape for name, p in net.named_parameters() if not name.startswith(NEW_PREFIXES)}
    assert base == {original_name(name): p.shape for name, p in theirs.state_dict().items()}
    assert (sum(shape.numel() for shape in base.values()), len(base)) == (parameters, tensors)


def test_flops_are_those_of_the_literature():
    with torch.device("meta"):
        flops = [HarmoView(CONFIGS[name]).flops(39_000) / 1e12 for name in ("1.3b", "14b")]
    assert flops == pytest.approx([382, 2197], rel=0.01)  # shared/PERF.md


def test_config_is_read_from_the_file(tmp_path):
    config = replace(SMALL_WAN, dim=128, num_heads=1, eps=1e-6, **WAN)
    net = HarmoView(config)
    base = {k: v for k, v in net.state_dict().items() if not k.startswith(NEW_PREFIXES)}
    assert on_meta(write(tmp_path / "wan", base)).config == config


@pytest.mark.parametrize("channels", [48, 36])  # Wan2.2's TI2V-5B; image-to-video, which also gets an image
def test_other_latents_than_of_wans_text_to_video_are_refused(channels, tmp_path):
    net = HarmoView(replace(SMALL_WAN, dim=128, num_heads=1, in_dim=channels))
    base = {k: v for k, v in net.state_dict().items() if not k.startswith(NEW_PREFIXES)}
    folder = write(tmp_path / "wan", base)
    with pytest.raises(UserError) as error:
        on_meta(folder)
    assert f"{folder} works on latents of {channels} channels, expected 16: take Wan2.1's" in str(error.value)


# All that can be wrong with a file or a folder is in test_weights.py; here, that load_wan passes it on.
def test_a_wrong_wan_checkpoint_is_refused(oracle, tmp_path):
    net = HarmoView(SMALL_WAN)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    tensors = oracle[1] | {"img_emb.proj.weight": torch.zeros(2),
                           "blocks.0.ffn.0.weight": oracle[1]["blocks.0.ffn.0.weight"].T.contiguous()}
    del tensors["blocks.1.ffn.0.bias"]
    with pytest.raises(UserError, match="does not fit HarmoView") as error:
        load_wan(net, write(tmp_path / "wan", tensors, 3))
    assert str(error.value).endswith(
        "; 1 missing ('blocks.1.ffn.0.bias'); 1 unknown ('img_emb.proj.weight'); "
        "1 mis-shaped ('blocks.0.ffn.0.weight' (48, 96) instead of (96, 48))")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_damaged_shard_and_a_folder_without_a_network_are_refused(oracle, tmp_path):
    folder = write(tmp_path / "wan", oracle[1], 3)
    (folder / "diffusion_pytorch_model-1.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="diffusion_pytorch_model-1.safetensors is empty"):
        load_wan(HarmoView(SMALL_WAN), folder)
    (tmp_path / "pair" / "high_noise_model").mkdir(parents=True)
    with pytest.raises(UserError, match="two experts"):
        load_wan(HarmoView(SMALL_WAN), tmp_path / "pair")


# ---------------------------------------------------------------------------------------- one-way references
@pytest.mark.parametrize("views, grid", [([VIEWS], GRID), (MIXED, GRID), ([(), ()], GRID),
                                         (MIXED, (3, 38, 40))])  # so long that a CPU takes SDPA
@pytest.mark.parametrize("changes", [{}, {"rope_layout": "before"}, {"rope_jump": 7}])
@pytest.mark.parametrize("attention", CHOICES["reference_attention"])
def test_attention_is_as_defined_with_a_mask(views, grid, changes, attention):
    net = network(reference_attention=attention, **changes)
    x, t, text, refs, vit = inputs(views, grid=grid)
    with torch.no_grad():
        expected = net.reference_forward(x, t, text, refs, vit)
        found = net(x, t, text, refs, vit)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    [other] = {*CHOICES["reference_attention"]} - {attention}
    net.config = replace(net.config, reference_attention=other)
    assert (net(x, t, text, refs, vit) - expected).abs().max() > 1e-3 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("views", [[VIEWS], MIXED, [()]])
def test_a_cache_of_one_way_references_changes_nothing(views):
    net, cache = network(), {}
    x, t, text, refs, vit = inputs(views)
    for step, times in enumerate((t, t / 2, t / 7)):
        cached, plain = net(x + step, times, text, refs, vit, cache), net(x + step, times, text, refs, vit)
        assert (cached - plain).abs().max() <= 1e-5 * plain.abs().max()
    keys, values = cache[0]
    tokens = sum(8 if view in given else TINY.proxy_tokens for given in views for view in VIEWS)
    assert len(cache) == TINY.num_layers and keys.shape == values.shape
    assert keys.shape == (B, TINY.num_heads, tokens, TINY.dim // TINY.num_heads)
    joint, unused = network(reference_attention="joint"), {}
    joint(x, t, text, refs, vit, unused)
    assert not unused


def test_one_way_references_learn_from_the_video():
    net = network()
    net(*inputs(MIXED)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())
    recomputed = network()
    recomputed.recompute = True
    recomputed(*inputs(MIXED)).square().mean().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), recomputed.parameters()))


def test_only_distances_of_positions_count():
    """Layout `before` has negative times; a network sees the same if all positions are shifted."""
    grids, device = ((3, 4, 4), (4, 4)), torch.device("cpu")
    positions, _ = positions_and_tables(("before", 0, 16, 8), (("front",),), *grids, device)
    assert positions.amin() == 0 and positions[-1, 0] == 0 and positions[0].tolist() == [1, 0, 0]


def test_flops_of_one_way_references_with_and_without_a_cache():
    """81 frames of 480x832: what joint references cost, over one-way ones that were kept, by people."""
    with torch.device("meta"):
        net = HarmoView(CONFIGS["14b"])
    joint_config = replace(CONFIGS["14b"], reference_attention="joint")
    for people, expected in ((1, 1.19), (2, 1.38)):
        video, refs = 32_760, people * 6_240
        joint = HarmoView.flops(SimpleNamespace(config=joint_config), video, refs)
        assert joint / net.flops(video, refs, cached=True) == pytest.approx(expected, abs=0.005)
        assert net.flops(video, refs, cached=True) < net.flops(video, refs) < joint


# -------------------------------------------------------------------------------------------------- precision
def test_precision_is_a_flag_then_the_environment_then_the_hardware(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("HARMOVIEW_PRECISION", raising=False)
    for hardware in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": hardware})
        assert uses_bf16(cpu) is hardware and uses_bf16(cpu, "bf16") and not uses_bf16(cpu, "fp32")
        for forced in ("bf16", "fp32"):
            monkeypatch.setenv("HARMOVIEW_PRECISION", forced)
            assert uses_bf16(cpu) is (forced == "bf16") and uses_bf16(cpu, "bf16")
        monkeypatch.delenv("HARMOVIEW_PRECISION")
    monkeypatch.setenv("HARMOVIEW_PRECISION", "half")
    with pytest.raises(UserError, match="HARMOVIEW_PRECISION=half: expected bf16 or fp32"):
        uses_bf16(cpu)


# ---------------------------------------------------------------------------------------------------- picture
@pytest.mark.parametrize("panel", ["one-way", "joint"])
@torch.no_grad()
def test_the_picture_draws_who_reads_whom(panel):
    """Each group of tokens is changed in turn: what comes out of a block for another group changes where the
    picture has that square filled."""
    squares = {(square["reader"], square["read"]): square["reads"] == "1" for square in (
        dict(re.findall(r'data-(\w+)="([^"]+)"', line)) for line in
        (ROOT / "images/method.svg").read_text().splitlines() if f'data-panel="{panel}"' in line)}
    assert len(squares) == 5 * 6
    net = network(reference_attention=panel)
    x, t, text, refs, _ = inputs([("front", "left", "right"), ("right", "back", "front")])

    def tokens(change=None):
        """{group: its tokens behind the first block}; proxies are of slot 3, and of slot 1 of person 2."""
        people = [{view: r + (change == name) for view, r in views.items()}
                  for name, views in zip(("A", "B"), refs)]
        net.proxies[3] *= -1 if change == "A proxies" else 1  # added up, LayerNorm would take it away
        net.proxies[1] *= -1 if change == "B proxies" else 1
        found = []
        handle = net.blocks[0].register_forward_hook(lambda module, given, out: found.extend(out[:2]))
        net(x + (change == "video"), t, text + (change == "text"), people)
        handle.remove()
        net.proxies[3] *= -1 if change == "A proxies" else 1
        net.proxies[1] *= -1 if change == "B proxies" else 1
        out = torch.cat([part for part in found if part is not None], dim=1)
        P = TINY.proxy_tokens
        video, front_a, proxies_a, front_b, proxies_b, back_b = out.split((45, 24, P, 8, P, 16), dim=1)
        return {"video": video, "A": front_a, "A proxies": proxies_a, "B proxies": proxies_b,
                "B": torch.cat((front_b, back_b), dim=1)}

    before = tokens()
    for change in ("video", "A", "A proxies", "B", "B proxies", "text"):
        after = tokens(change)
        for reader in before:
            reads = (before[reader] - after[reader]).abs().max() > 1e-4
            assert bool(reads) == squares[reader, change], (reader, change)
