import argparse
import copy
import json
import re

import diffusers
import pytest
import torch
from conftest import WAN_SMALL
from safetensors.torch import save_file
from test_model import their_name

from checkpoint import UserError, load_weights, original_name, read_weights, save_tensors
from lora import LoraLinear, add_lora, apply_lora, merge_lora, read_lora_argument
from model import CONFIGS, NEW_PREFIXES, DiTConfig, HarmoView

RANK = 4
IN_BLOCK = [f"{a}_attn.{p}" for a in ("self", "cross") for p in "qkvo"] + ["ffn.0", "ffn.2"]
IN_BLOCKS = [f"blocks.{n}.{layer}" for n in range(2) for layer in IN_BLOCK]
OUTSIDE = ["text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1"]
OUTSIDE += ["head.head"]


def network(config=None):
    torch.manual_seed(0)
    net = HarmoView(config or DiTConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=2, **WAN_SMALL))
    for p in net.parameters():
        p.data = torch.randn_like(p) / p.shape[-1] ** 0.5
    return net


def inputs(c, seed=1):
    g = torch.Generator().manual_seed(seed)
    x, text = torch.randn(2, c.in_dim, 2, 6, 4, generator=g), torch.randn(2, c.text_len, c.text_dim, generator=g)
    return x, torch.tensor([900.0, 300.0]), text


def difference(a, b):
    return float((a - b).norm() / b.norm())


def stir(net):
    """Adapters as after training: B is not zero."""
    for name, p in net.named_parameters():
        if name.endswith("lora_B"):
            p.data = torch.randn_like(p) / RANK
    return net


# --------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("stored, bf16", [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_a_fresh_adapter_changes_no_bit_and_no_name(stored, bf16):
    net = network(CONFIGS["tiny"]).to(stored)
    names, base = list(net.state_dict()), dict(net.named_parameters())
    x, t, text = inputs(net.config)
    batch = x, t, text.to(stored)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        before = net(*batch)
        add_lora(net, RANK)
        assert torch.equal(net(*batch), before)
    new = {f"{layer}.lora_{half}" for layer in IN_BLOCKS for half in "AB"}
    parameters = dict(net.named_parameters())
    assert set(parameters) - set(names) == new
    assert [name for name in net.state_dict() if name not in new] == names
    assert all(parameters[name] is p for name, p in base.items())
    assert all(parameters[name].dtype == torch.float32 for name in new)
    ffn = net.blocks[0].ffn[0]
    assert ffn.lora_A.shape == (RANK, 48) and ffn.lora_B.shape == (96, RANK)
    assert float(ffn.lora_A.detach().std()) == pytest.approx(48**-0.5, rel=0.3)
    with pytest.raises(AssertionError, match="adapters already"):
        add_lora(net, RANK)


@pytest.mark.parametrize("stored, bf16", [(torch.float32, False), (torch.bfloat16, True)])
def test_gradients_reach_the_adapters_and_nothing_frozen(stored, bf16):
    net = network(CONFIGS["tiny"]).to(stored).requires_grad_(False)
    add_lora(net, RANK)
    stir(net)
    grads = []
    for net.recompute in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            net(*inputs(net.config)).square().mean().backward()
        reached = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached == {f"{layer}.lora_{half}" for layer in IN_BLOCKS for half in "AB"}
        grads.append([p.grad.clone() for p in net.parameters() if p.requires_grad])
    assert all(g.dtype == torch.float32 for g in grads[0]) and all(map(torch.equal, *grads))


def test_compiled_blocks_run_with_adapters():
    net = network(CONFIGS["tiny"]).requires_grad_(False)
    add_lora(net, RANK)
    stir(net)
    plain, names = net(*inputs(net.config)).detach(), list(net.state_dict())
    for block in net.blocks:
        block.compile(fullgraph=True, backend="eager")  # as compile_blocks, but in seconds
    compiled = net(*inputs(net.config))
    compiled.square().mean().backward()
    assert difference(compiled.detach(), plain) <= 1e-6 and list(net.state_dict()) == names
    assert net.blocks[1].ffn[2].lora_A.grad.any()
    torch._dynamo.reset()


def test_merged_is_unmerged():
    net = network()
    names = list(net.state_dict())
    add_lora(net, RANK)
    stir(net)
    with torch.no_grad():
        unmerged = net(*inputs(net.config))
        weight = net.blocks[0].ffn[0].weight
        merge_lora(net)
        error = difference(net(*inputs(net.config)), unmerged)
    print(f"relative error {error:.1e}")
    assert error <= 1e-6
    assert list(net.state_dict()) == names and net.blocks[0].ffn[0].weight is weight
    assert not any(isinstance(m, LoraLinear) for m in net.modules())
    half = network().to(torch.bfloat16)
    add_lora(half, RANK)
    stir(half)
    q = half.blocks[1].self_attn.q
    expected = (q.weight.double() + q.lora_B.double() @ q.lora_A.double()).bfloat16()
    merge_lora(half)
    assert q.weight.dtype == torch.bfloat16
    assert float((q.weight == expected).float().mean()) > 0.999  # rounded once, from float32


def test_adapters_are_saved_and_loaded_on_the_meta_device(tmp_path):
    net = network()
    add_lora(net, RANK)
    stir(net)
    save_tensors(tmp_path / "all.safetensors", net.state_dict())
    with torch.device("meta"):
        again = HarmoView(net.config)
        add_lora(again, RANK)
    assert all(p.is_meta for p in again.parameters())
    load_weights(again, read_weights(tmp_path / "all.safetensors"))
    adapters = {name: p for name, p in net.state_dict().items() if "lora_" in name}
    save_tensors(tmp_path / "adapters.safetensors", adapters)
    public = network()
    assert apply_lora(public, tmp_path / "adapters.safetensors") == (20, [])
    merge_lora(net)
    merge_lora(again)
    for name, p in net.state_dict().items():
        assert torch.equal(p, again.get_parameter(name)) and torch.equal(p, public.get_parameter(name)), name


# ----------------------------------------------------------------------------------------------- public files
@pytest.fixture(scope="module")
def oracle():
    """diffusers' transformer with the weights of network()."""
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=2
    )
    ours = network().state_dict().items()
    theirs.load_state_dict({their_name(n): p for n, p in ours if not n.startswith(NEW_PREFIXES)})
    return theirs.eval()


def pairs(layers, seed=0):
    """layer -> down, up of a random LoRA whose ranks differ from layer to layer."""
    torch.manual_seed(seed)
    net, found = network(), {}
    for n, layer in enumerate(layers):
        weight, rank = net.get_submodule(layer).weight, 2 + n % 3
        up = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2))
        found[layer] = torch.randn(rank, *weight.shape[1:]) / weight[0].numel() ** 0.5, up
    return found


def their_layer(layer):
    return their_name(layer + ".weight").removesuffix(".weight")


STYLES = {  # name of a pair's layer and of its halves; whether diffusers reads it
    "original": (lambda layer: f"diffusion_model.{layer}", ".lora_A.weight", ".lora_B.weight", True),
    "down up": (lambda layer: f"diffusion_model.{layer}", ".lora_down.weight", ".lora_up.weight", True),
    "bare": (lambda layer: layer, ".lora_down.weight", ".lora_up.weight", False),
    "diffusers": (lambda layer: f"transformer.{their_layer(layer)}", ".lora_A.weight", ".lora_B.weight", True),
    "peft": (lambda layer: f"base_model.model.{layer}", ".lora_A.default.weight", ".lora_B.default.weight", False),
    "kohya": (
        lambda layer: "lora_unet_" + layer.replace(".", "_"), ".lora_down.weight", ".lora_up.weight", True
    ),
}


def write(path, style, found, alpha=None, metadata=None):
    name, down, up, _ = STYLES[style]
    tensors = {}
    for layer, (a, b) in found.items():
        tensors |= {name(layer) + down: a, name(layer) + up: b}
        if alpha:
            tensors[name(layer) + ".alpha"] = torch.tensor(alpha)
    save_file(tensors, path, metadata)
    return path


def same_as_diffusers(oracle, path, theirs_path, scale=1.0):
    """Merge a file with apply_lora, and it or another one with diffusers -> how many weights changed."""
    net, before, theirs = network(), network().state_dict(), copy.deepcopy(oracle)
    changed, unknown = apply_lora(net, path, scale)
    pipeline = diffusers.WanPipeline(None, None, None, None, theirs)
    pipeline.load_lora_weights(str(theirs_path))
    pipeline.fuse_lora(lora_scale=scale)
    x, t, text = inputs(net.config)
    with torch.no_grad():
        truth = theirs(x, t, text, return_dict=False)[0]
        error, moved = difference(net(x, t, text), truth), difference(network()(x, t, text), truth)
    pipeline.unload_lora_weights()  # and leave what is fused
    steps = []
    for name, p in net.state_dict().items():
        if name.startswith(NEW_PREFIXES):
            assert torch.equal(p, before[name])
        elif not torch.equal(p, before[name]):
            step = theirs.state_dict()[their_name(name)] - before[name]
            steps.append(difference(p - before[name], step))
        else:
            assert torch.equal(theirs.state_dict()[their_name(name)], p)
    print(f"relative error of outputs {error:.1e} (moved by {moved:.1e}), of changes {max(steps):.1e}")
    assert error <= 1e-5 and moved > 1e-2 and max(steps) <= 1e-5
    assert not unknown and len(steps) == changed
    return changed


@pytest.mark.parametrize("style, alpha, scale, outside", [
    ("original", None, 1.0, OUTSIDE), ("original", 6.0, 0.7, []), ("down up", 6.0, 0.7, []),
    ("bare", 6.0, 0.7, []), ("diffusers", None, 0.7, [*OUTSIDE, "patch_embedding"]), ("peft", None, 0.7, []),
    ("kohya", 1.0, 0.7, []), ("kohya", 6.0, 1.0, []),
])
def test_public_styles_are_what_diffusers_makes_of_them(oracle, tmp_path, style, alpha, scale, outside):
    pytest.importorskip("peft")
    found = pairs(IN_BLOCKS + outside)
    mine = write(tmp_path / "mine.safetensors", style, found, alpha)
    theirs = mine if STYLES[style][3] else write(tmp_path / "theirs.safetensors", "original", found, alpha)
    assert same_as_diffusers(oracle, mine, theirs, scale) == len(found)


@pytest.mark.parametrize("alpha", [None, 8])
def test_what_diffusers_and_peft_save_is_read(oracle, tmp_path, alpha):
    """Their alpha is in the file's header, or beside the file."""
    peft = pytest.importorskip("peft")
    theirs, net = copy.deepcopy(oracle), network()
    config = peft.LoraConfig(r=RANK, lora_alpha=alpha or RANK, target_modules=["to_q", "ffn.net.2"])
    theirs.add_adapter(config)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn_like(p) / RANK
    layers = peft.get_peft_model_state_dict(theirs)
    metadata = config.to_dict() | {"target_modules": sorted(config.target_modules)}
    diffusers.WanPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=metadata)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    assert same_as_diffusers(oracle, path, path) == 6
    pipeline_weight = network()
    apply_lora(pipeline_weight, path)
    save_file({f"base_model.model.{k}": v for k, v in layers.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(metadata, default=str))
    assert apply_lora(net, tmp_path / "adapter_model.safetensors") == (6, [])
    assert all(map(torch.equal, net.parameters(), pipeline_weight.parameters()))


def save(path, tensors):
    save_file({key: t.contiguous() if torch.is_tensor(t) else torch.tensor(t) for key, t in tensors.items()}, path)
    return path


def test_differences_pairs_and_keys_that_fit_nothing(tmp_path):
    """As in the distilled adapters of lightx2v and CausVid; summed in float32, rounded once."""
    net, base, g = network().bfloat16(), network().bfloat16().state_dict(), torch.Generator().manual_seed(1)
    names = {  # how keys end -> the parameters
        "diff": ["patch_embedding.weight", "blocks.1.norm3.weight", "blocks.0.self_attn.norm_q.weight"],
        "diff_b": ["blocks.0.self_attn.q.bias", "blocks.1.norm3.bias", "head.head.bias", "patch_embedding.bias"],
        "diff_m": ["blocks.0.modulation", "head.modulation"],
        "lora_B.bias": ["blocks.1.ffn.2.bias"],
    }
    tensors, steps = {}, {}
    for end, parameters in names.items():
        for name in parameters:
            steps[name] = torch.randn(base[name].shape, generator=g)
            tensors[f"diffusion_model.{name.rpartition('.')[0]}.{end}"] = steps[name]
    q, (a, b) = "blocks.0.self_attn.q", pairs(["blocks.0.self_attn.q"])["blocks.0.self_attn.q"]
    steps[f"{q}.weight"] = torch.randn(128, 128, generator=g)
    tensors |= {f"{q}.lora_A": a, f"{q}.lora_B": b, f"{q}.alpha": [3], f"{q}.diff": steps[f"{q}.weight"]}
    steps[f"{q}.weight"] = steps[f"{q}.weight"] + 3 / len(a) * b @ a
    unknown = ["diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight", "transformer_2.blocks.0.ffn.0.diff",
               "diffusion_model.blocks.9.self_attn.q.lora_down.weight", "text_encoder.x", "blocks.0.ffn.diff_m"]
    tensors |= {key: torch.ones(2, 2) for key in unknown} | {"blocks.1.ffn.0.alpha": 2.0}
    changed, left = apply_lora(net, save(tmp_path / "x.safetensors", tensors), 0.5)
    assert (changed, sorted(left)) == (len(steps), sorted(unknown)) == (11, sorted(unknown))
    for name, p in net.state_dict().items():
        expected = (base[name].double() + 0.5 * steps.get(name, 0)).bfloat16()
        assert float((p == expected).float().mean()) > (0.999 if name in steps else 1 - 1e-9), name
        assert p.dtype == torch.bfloat16


Q, FFN = "diffusion_model.blocks.0.self_attn.q", "lora_unet_blocks_1_ffn_0"
A, UP = torch.ones(2, 128), torch.ones(128, 2)
GOOD = {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": UP}


@pytest.mark.parametrize("tensors, says", [
    ({f"{Q}.lora_A.weight": A}, rf"'{Q}.lora_A.weight' came without its other half, expected both lora_A and"),
    ({f"{FFN}.lora_up.weight": UP}, f"'{FFN}.lora_up.weight' came without its other half"),
    (GOOD | {f"{Q}.lora_B.weight": UP[:64]}, r"lora_B.weight' is \[64, 2\], expected \[128, 2\]: is it for another"),
    (GOOD | {f"{Q}.lora_B.weight": UP.T}, r"lora_B.weight' is \[2, 128\], expected \[128, 2\]"),
    (GOOD | {f"{Q}.lora_A.weight": A[:, :64]}, r"lora_A.weight' is \[2, 64\], expected \[2, 128\]"),
    (GOOD | {f"{Q}.lora_A.weight": A[:0]}, r"lora_A.weight' is \[0, 128\], expected \[1, 128\]"),
    (GOOD | {f"{Q}.lora_A.weight": 1.0}, r"lora_A.weight' is \[1\], expected \[1, 128\]"),
    (GOOD | {f"{Q}.alpha": [1.0, 2.0]}, r"alpha' is \[2\], expected \[1\]"),
    ({f"{Q}.diff": torch.ones(128)}, r"diff' is \[128\], expected \[128, 128\]"),
    ({f"{Q}.diff_b": torch.ones(128, 1)}, r"diff_b' is \[128, 1\], expected \[128\]"),
    ({"patch_embedding.diff": torch.ones(128, 36, 1, 2, 2)}, r"expected \[128, 16, 1, 2, 2\]"),
    (GOOD | {"blocks.0.self_attn.q.lora_down": A}, "both change 'blocks.0.self_attn.q.weight', expected one of"),
    (GOOD | {f"{Q}.dora_scale": A}, "is of a DoRA, which does not merge here; expected a LoRA"),
    (GOOD | {f"{Q}.lora_A.weight": A.to(torch.int8)}, "lora_A.weight' is torch.int8, expected floats"),
    (GOOD | {f"{Q}.lora_A.weight": A * float("nan")}, "would not be finite with .*lora_A.weight, .*: the file is"),
    (GOOD | {f"{Q}.alpha": float("nan")}, "would not be finite"),
    (GOOD | {f"{Q}.lora_A.weight": A * 1e30, f"{Q}.lora_B.weight": UP * 1e30}, "or the scale too large"),
    ({"unet.x\n.weight": A, "y": A, "z": A}, r"none of its 3 keys \('.*', '.*', ...\) fits; expected a LoRA for Wan"),
    ({f"{Q}.alpha": 1.0, "blocks.0.hada_w1_a": A}, "none of its 2 keys"),
    ({}, "none of its 0 keys"),
])
def test_a_file_that_cannot_be_merged_is_one_line(tmp_path, tensors, says):
    net = network()
    with pytest.raises(UserError, match=says) as caught:
        apply_lora(net, save(tmp_path / "bad.safetensors", tensors))
    assert "\n" not in str(caught.value) and str(tmp_path / "bad.safetensors") in str(caught.value)
    assert all(map(torch.equal, net.parameters(), network().parameters()))


@pytest.mark.parametrize("noted", [
    "{", "[]", "3", '{"lora_alpha": "a lot"}', '{"lora_alpha": true}', '{"lora_alpha": 1%s}' % ("0" * 999),
    '{"lora_alpha": NaN}', '{"alpha_pattern": {"q": 3}}', '{"use_dora": true}', '{"lora_bias": true, "r": 2}'])
def test_a_noted_alpha_that_cannot_be_used_is_one_line(tmp_path, noted):
    for place in ("header", "beside"):
        metadata = {"lora_adapter_metadata": noted} if place == "header" else None
        path = tmp_path / f"{'x' if metadata else 'adapter_model'}.safetensors"
        save_file(GOOD, path, metadata)
        (tmp_path / "adapter_config.json").write_text(noted)
        with pytest.raises(UserError, match=re.escape(str(path))) as caught:
            apply_lora(network(), path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_damaged_file_is_one_line(tmp_path):
    good = save(tmp_path / "good.safetensors", GOOD).read_bytes()
    for cut in (0, 4, 60, len(good) - 1):
        (tmp_path / "cut.safetensors").write_bytes(good[:cut])
        with pytest.raises(UserError, match="cut.safetensors (is empty|cannot be read)"):
            apply_lora(network(), tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="no such file"):
        apply_lora(network(), tmp_path / "absent.safetensors")


@pytest.mark.parametrize("text, expected", [
    ("a.safetensors", ("a.safetensors", 1.0, None)), ("a.safetensors:0.7", ("a.safetensors", 0.7, None)),
    ("high=b/a:-1", ("b/a", -1.0, "high")), ("low=a", ("a", 1.0, "low")), ("mid=a:2", ("mid=a", 2.0, None)),
    (r"C:\a.safetensors", (r"C:\a.safetensors", 1.0, None)), (r"low=C:\a:1e-1", (r"C:\a", 0.1, "low")),
    ("a:b", ("a:b", 1.0, None)), ("a:", ("a:", 1.0, None)), ("high", ("high", 1.0, None)),
    ("", None), (":0.5", None), ("high=", None), ("a:nan", None), ("a:inf", None), ("a:1e999", None),
])
def test_the_argument(text, expected):
    if expected:
        assert read_lora_argument(text) == expected
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="expected FILE or FILE:SCALE, a finite number"):
            read_lora_argument(text)
