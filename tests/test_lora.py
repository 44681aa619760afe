import argparse
import json
from functools import partial

import diffusers
import pytest
import safetensors.torch
import torch
from conftest import WAN_SMALL
from safetensors.torch import load_file
from test_model import their_name

from model import CONFIGS, DiTConfig, HarmoView
from networks.lora import (NEW_PREFIXES, add_lora, apply_lora, check_loras, experts_of, merge_lora,
                           read_lora_argument)
from networks.weights import ROLES, load_weights, read_weights
from support.script import UserError

F32, BF16 = torch.float32, torch.bfloat16
IN_BLOCK = [f"{a}_attn.{p}" for a in ("self", "cross") for p in "qkvo"] + ["ffn.0", "ffn.2"]
IN_BLOCKS = [f"blocks.{n}.{layer}" for n in range(2) for layer in IN_BLOCK]
EMBEDDINGS = ["text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"]
TENSORS = len([*HarmoView(DiTConfig(128, 64, 1, 2, **WAN_SMALL)).parameters()])
ADAPTERS = {f"{layer}.lora_{half}" for layer in IN_BLOCKS for half in "AB"}


def network(config=DiTConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=2, **WAN_SMALL), trained=0):
    """A random network; trained: frozen, with adapters of that rank, whose B is not zero."""
    torch.manual_seed(0)
    net = HarmoView(config)
    for p in net.parameters():
        p.data = torch.randn_like(p) / p.shape[-1] ** 0.5
    if trained:
        add_lora(net.requires_grad_(False), trained)
        for name, p in net.named_parameters():
            p.data = torch.randn_like(p) / trained if name.endswith("lora_B") else p.data
    return net


def inputs(c, dtype=F32):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, c.in_dim, 2, 6, 4, generator=g)
    return x, torch.tensor([900.0, 300.0]), torch.randn(2, c.text_len, c.text_dim, generator=g).to(dtype)


def difference(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


def save(path, tensors, metadata=None):
    tensors = {key: torch.as_tensor(t).clone().contiguous() for key, t in tensors.items()}
    safetensors.torch.save_file(tensors, path, metadata)
    return path


# --------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("stored, bf16", [(F32, False), (F32, True), (BF16, False), (BF16, True)])
def test_a_fresh_adapter_changes_no_bit_and_no_name(stored, bf16):
    net = network(CONFIGS["tiny"]).to(stored)
    base = dict(net.named_parameters())
    with torch.no_grad(), torch.autocast("cpu", BF16, enabled=bf16):
        before = net(*inputs(net.config, stored))
        add_lora(net, 4)
        assert torch.equal(net(*inputs(net.config, stored)), before)
    now, a = dict(net.named_parameters()), net.blocks[0].ffn[2].lora_A.detach()
    assert now.keys() - base.keys() == ADAPTERS and all(now[name] is p for name, p in base.items())
    assert a.dtype == F32 and a.shape == (4, 96) and float(a.std()) == pytest.approx(96**-0.5, rel=0.2)
    with pytest.raises(AssertionError, match="adapters already"):
        add_lora(net, 4)


@pytest.mark.parametrize("stored, bf16", [(F32, False), (BF16, True)])
def test_gradients_reach_the_adapters_and_nothing_frozen(stored, bf16):
    net, grads = network(CONFIGS["tiny"], trained=4), []
    for p in net.parameters():
        p.data = p.data if p.requires_grad else p.data.to(stored)
    for net.recompute in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", BF16, enabled=bf16):
            net(*inputs(net.config)).square().mean().backward()
        assert {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()} == ADAPTERS
        grads.append([p.grad.clone() for p in net.parameters() if p.requires_grad])
    assert all(g.dtype == torch.float32 for g in grads[0]) and all(map(torch.equal, *grads))


def test_compiled_blocks_run_with_adapters():
    net = network(CONFIGS["tiny"], trained=4)
    plain, names = net(*inputs(net.config)), list(net.state_dict())
    net.blocks[1].compile(fullgraph=True, backend="eager")  # as compile_blocks, but in seconds
    compiled = net(*inputs(net.config))
    compiled.mean().backward()
    assert difference(compiled, plain) <= 1e-6 and net.blocks[1].ffn[2].lora_A.grad.any()
    assert list(net.state_dict()) == names
    torch._dynamo.reset()


def test_merged_is_unmerged_and_files_hold_adapters(tmp_path):
    source, public = network(trained=6).state_dict(), network()
    with torch.device("meta"):
        net = HarmoView(public.config)
        add_lora(net, 6)
    load_weights(net, read_weights(save(tmp_path / "all.safetensors", source)))
    unmerged, weight = net(*inputs(net.config)), net.blocks[0].ffn[0].weight
    merge_lora(net)
    error, moved = (difference(n(*inputs(n.config)), unmerged) for n in (net, public))
    print(f"relative error {error:.1e} (moved by {moved:.1e})")
    assert error <= 1e-6 and moved > 1e-2 and net.blocks[0].ffn[0].weight is weight
    assert [*net.state_dict()] == [*public.state_dict()] and type(net.blocks[0].ffn[0]) is torch.nn.Linear
    assert apply_lora(public, save(tmp_path / "a.safetensors", {k: source[k] for k in ADAPTERS})) == (20, [])
    assert all(map(torch.equal, public.parameters(), net.parameters()))


# ----------------------------------------------------------------------------------------------- public files
def diffusers_network():
    """diffusers' transformer with the weights of network()."""
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=2)
    base = {name: p for name, p in network().state_dict().items() if not name.startswith(NEW_PREFIXES)}
    theirs.load_state_dict({their_name(name): p for name, p in base.items()})
    return theirs.eval()


AB, DOWN_UP = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
STYLES = {"original": ("diffusion_model.", *AB), "bare": ("", *DOWN_UP), "kohya": ("lora_unet_", *DOWN_UP),
          "diffusers": ("transformer.", *AB),
          "peft": ("base_model.model.", ".lora_A.default.weight", ".lora_B.default.weight")}


def write(path, style, layers, alpha):
    """A random LoRA of ranks 2, 3 and 4."""
    (prefix, down, up), net, tensors = STYLES[style], network(), {}
    for n, layer in enumerate(layers):
        weight, rank = net.get_submodule(layer).weight, 2 + n % 3
        theirs = their_name(layer + ".weight").removesuffix(".weight")
        name = prefix + {"diffusers": theirs, "kohya": layer.replace(".", "_")}.get(style, layer)
        tensors[name + down] = torch.randn(rank, *weight.shape[1:]) / weight[0].numel() ** 0.5
        tensors[name + up] = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2))
        tensors |= {name + ".alpha": alpha} if alpha else {}
    return save(path, tensors)


def same_as_diffusers(path, theirs_path, scale=1.0):
    """Merge a file with apply_lora, and it or its like with diffusers -> how many weights changed."""
    net, before, theirs, steps = network(), network().state_dict(), diffusers_network(), []
    changed, unknown = apply_lora(net, path, scale)
    pipeline = diffusers.WanPipeline(None, None, None, None, theirs)
    pipeline.load_lora_weights(str(theirs_path))
    pipeline.fuse_lora(lora_scale=scale)
    x, t, text = inputs(net.config)
    with torch.no_grad():
        truth = theirs(x, t, text, return_dict=False)[0]
        error, moved = difference(net(x, t, text), truth), difference(network()(x, t, text), truth)
    pipeline.unload_lora_weights()  # what is fused stays
    for name, p in net.state_dict().items():
        if not torch.equal(p, before[name]):
            steps.append(difference(p - before[name], theirs.state_dict()[their_name(name)] - before[name]))
    print(f"relative error of outputs {error:.1e} (moved by {moved:.1e}), of changes {max(steps):.1e}")
    assert error <= 1e-5 and moved > 5e-3 and max(steps) <= 1e-5 and not unknown and len(steps) == changed
    return changed


@pytest.mark.parametrize("style, alpha, scale, outside", [
    ("original", None, 1.0, [*EMBEDDINGS, "time_projection.1", "head.head"]), ("original", 6.0, 0.7, []),
    ("bare", 6.0, 0.7, []), ("diffusers", None, 0.7, [*EMBEDDINGS, "patch_embedding"]),
    ("peft", None, 0.7, []), ("kohya", 1.0, 0.7, []), ("kohya", 6.0, 1.0, [])])
def test_public_styles_are_what_diffusers_makes_of_them(tmp_path, style, alpha, scale, outside):
    pytest.importorskip("peft")
    path = theirs = write(tmp_path / "mine.safetensors", style, IN_BLOCKS + outside, alpha)
    if style in ("bare", "peft"):  # which diffusers does not read
        theirs = write(tmp_path / "theirs.safetensors", "original", IN_BLOCKS + outside, alpha)
    assert same_as_diffusers(path, theirs, scale) == len(IN_BLOCKS + outside)


@pytest.mark.parametrize("alpha", [4, 8])
def test_an_alpha_that_diffusers_or_peft_noted_counts(tmp_path, alpha):
    peft = pytest.importorskip("peft")
    theirs, net, again, layers = diffusers_network(), network(), network(), ["to_q", "ffn.net.2"]
    config = peft.LoraConfig(r=4, lora_alpha=alpha, init_lora_weights=False, target_modules=layers)
    theirs.add_adapter(config)
    noted, layers = config.to_dict() | {"target_modules": layers}, peft.get_peft_model_state_dict(theirs)
    diffusers.WanPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=noted)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    assert same_as_diffusers(path, path) == 6
    save(tmp_path / "adapter_model.safetensors", {f"base_model.model.{key}": t for key, t in layers.items()})
    (tmp_path / "adapter_config.json").write_text(json.dumps(noted, default=str))
    assert apply_lora(net, tmp_path / "adapter_model.safetensors") == apply_lora(again, path) == (6, [])
    assert all(map(torch.equal, net.parameters(), again.parameters()))


def test_a_pairs_own_alpha_comes_before_one_that_was_noted(tmp_path):
    a, b = network(), network()
    for net, noted in ((a, None), (b, {"lora_adapter_metadata": json.dumps({"lora_alpha": 9})})):
        tensors = GOOD | {f"{Q}.alpha": 5.0}
        assert apply_lora(net, save(tmp_path / "x.safetensors", tensors, noted)) == (1, [])
    assert all(map(torch.equal, a.parameters(), b.parameters()))
    step = a.blocks[0].self_attn.q.weight - network().blocks[0].self_attn.q.weight
    torch.testing.assert_close(step.detach(), torch.full((128, 128), 2 * 5 / 2))


def test_differences_pairs_and_keys_that_fit_nothing(tmp_path):
    """As in the distilled adapters of lightx2v and CausVid; summed in float32, rounded once."""
    net, base, steps, tensors = network().bfloat16(), network().bfloat16().state_dict(), {}, {}
    leaves = dict(diff="weight", diff_b="bias", diff_m="modulation", bias="bias")
    for key in ("patch_embedding.diff patch_embedding.diff_b blocks.1.norm3.diff blocks.1.norm3.diff_b "
                "head.head.diff_b head.diff_m blocks.0.diff_m blocks.0.self_attn.norm_q.diff "
                "blocks.0.self_attn.q.diff_b blocks.0.self_attn.k.diff blocks.1.ffn.2.lora_B.bias").split():
        layer, _, end = key.rpartition(".")
        name = f"{layer.removesuffix('.lora_B')}.{leaves[end]}"
        steps[name] = tensors["diffusion_model." + key] = torch.randn(base[name].shape)
    k, a, b = "blocks.0.self_attn.k", torch.randn(2, 128), torch.randn(128, 2)
    steps[k + ".weight"] = steps[k + ".weight"] + 3 / 2 * b @ a  # beside its diff
    unknown = {"diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight", "transformer.blocks.0.ffn.9.diff",
               "diffusion_model.blocks.9.self_attn.q.lora_A.weight", "text_encoder.x", "blocks.0.ffn.diff_m"}
    tensors |= {f"{k}.lora_A": a, f"{k}.lora_B": b, f"{k}.alpha": [3], "blocks.1.ffn.0.alpha": 2.0}
    tensors |= dict.fromkeys(unknown, a)
    changed, left = apply_lora(net, save(tmp_path / "x.safetensors", tensors), 0.5)
    assert changed == len(steps) == 11 and sorted(left) == sorted(unknown)
    for name, p in net.state_dict().items():
        expected = (base[name].double() + 0.5 * steps.get(name, 0)).bfloat16()
        assert p.dtype == torch.bfloat16 and float((p == expected).float().mean()) > 0.999, name


Q, A, UP = "diffusion_model.blocks.0.self_attn.q", torch.ones(2, 128), torch.ones(128, 2)
GOOD = {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": UP}
NOTED = ["{", "[]", '{"lora_alpha": "a lot"}', '{"lora_alpha": true}', '{"lora_alpha": 1%s}' % ("0" * 999),
         '{"lora_alpha": NaN}', '{"alpha_pattern": [3]}', '{"use_dora": 1}', '{"lora_bias": 1, "r": 2}']


@pytest.mark.parametrize("tensors, says", [
    ({f"{Q}.lora_A.weight": A}, rf"'{Q}.lora_A.weight' came without its other half, expected both lora_A"),
    ({"lora_unet_blocks_1_ffn_0.lora_up.weight": UP}, "lora_up.weight' came without its other half"),
    (GOOD | {f"{Q}.lora_B.weight": UP[:64]}, r"B.weight' is \[64, 2\], expected \[128, 2\]: is it for"),
    (GOOD | {f"{Q}.lora_A.weight": A[:0]}, r"is \[0, 128\], expected \[1, 128\]"),
    (GOOD | {f"{Q}.lora_A.weight": 1.0}, r"is \[1\], exp"), ({f"{Q}.alpha": [1.0, 2.0]}, r"expected \[1\]"),
    ({"patch_embedding.diff": torch.ones(128, 36, 1, 2, 2)}, r"expected \[128, 16, 1, 2, 2\]"),
    (GOOD | {"blocks.0.self_attn.q.lora_down": A}, "both change 'blocks.0.self_attn.q.weight', expected one"),
    (GOOD | {f"{Q}.dora_scale": A}, "is of a DoRA"), (GOOD | {f"{Q}.lora_A.weight": A.char()}, "int8, exp"),
    (GOOD | {f"{Q}.lora_A.weight": A * float("nan")}, "would not be finite with .*lora_A.weight, .*: the"),
    (GOOD | {f"{Q}.alpha": torch.nan}, "not be"), ({k: 1e30 * t for k, t in GOOD.items()}, "or the scale"),
    ({"x\n": A, "y": A, "z": A}, r"none of its 3 keys fits: \['.*', '.*'\]; expected a LoRA"),
    ({f"{Q}.alpha": 1.0, "blocks.0.hada_w1_a": A}, "none of its 2 keys"), ({}, "none of its 0 keys"),
    *((noted, "cannot be read|made with|not be finite") for noted in NOTED)])
def test_a_file_that_cannot_be_merged_is_one_line(tmp_path, tensors, says):
    noted, tensors = ("{}", tensors) if isinstance(tensors, dict) else (tensors, GOOD)
    net, path = network(), save(tmp_path / "bad.safetensors", tensors, {"lora_adapter_metadata": noted})
    with pytest.raises(UserError, match=says) as caught:
        apply_lora(net, path)
    line = str(caught.value)
    assert "\n" not in line and str(path) in line and len(line) < 500
    assert all(map(torch.equal, net.parameters(), network().parameters()))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="cannot be read"):
        apply_lora(net, path)


def test_the_argument():
    for text, *expected in (
            ("a.safetensors", "a.safetensors", 1, None), ("high=b/a:-1", "b/a", -1, "high"),
            ("low=a", "a", 1, "low"), ("mid=a:2", "mid=a", 2, None), (r"C:\a", r"C:\a", 1, None),
            ("a:b", "a:b", 1, None), (r"low=C:\a:.1", r"C:\a", 0.1, "low"), ("high", "high", 1, None)):
        assert read_lora_argument(text) == tuple(expected)
    for text in ("", ":0.5", "high=", "a:nan", "a:inf", "a:1e999"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected FILE or FILE:SCALE, a finite number"):
            read_lora_argument(text)


# --------------------------------------------------------------------------------------------- two experts
def halves(tmp_path, wrap="", alphas=None):
    """A LoRA of diffusers for both experts, and each one's half in a file of its own."""
    parts = {}
    for half, layers in (("transformer.", IN_BLOCKS[:4]), ("transformer_2.", IN_BLOCKS[2:7])):
        tensors = load_file(write(tmp_path / "half.safetensors", "diffusers", layers, None))
        parts[half] = {wrap + half + key.removeprefix("transformer."): t for key, t in tensors.items()}


    def noted(halves):
        alpha = {f"{half}lora_alpha": alphas[half] for half in halves if alphas}
        return {"lora_adapter_metadata": json.dumps(alpha)}

    both = save(tmp_path / "both.safetensors", parts["transformer."] | parts["transformer_2."], noted(parts))
    alone = []
    for role, (half, part) in zip(ROLES, parts.items(), strict=True):
        tensors = {key.removeprefix(wrap).removeprefix(half): t for key, t in part.items()}
        alpha = {name: value.replace(half, "transformer.") for name, value in noted([half]).items()}
        alone.append(save(tmp_path / f"{role}.safetensors", tensors, alpha))
    return both, alone


@pytest.mark.parametrize("wrap", ["", "base_model.model."])
@pytest.mark.parametrize("alphas", [None, {"transformer.": 6, "transformer_2.": 1}])
def test_each_expert_gets_its_half_of_a_lora_of_diffusers(wrap, alphas, tmp_path):
    both, alone = halves(tmp_path, wrap, alphas)
    for role, file, count in zip(ROLES, alone, (4, 5), strict=True):
        mine, truth = network(), network()
        assert apply_lora(mine, both, 0.7, role) == apply_lora(truth, file, 0.7, role) == (count, [])
        assert all(map(torch.equal, mine.parameters(), truth.parameters()))
        assert sum(map(torch.equal, mine.parameters(), network().parameters())) == TENSORS - count
    with pytest.raises(UserError, match="is for two experts .*; this checkpoint is one network"):
        apply_lora(network(), both)


@pytest.mark.parametrize("name, keys, given, roles", [
    ("x", ["transformer.a", "transformer_2.b"], None, ROLES), ("x", ["transformer_2.b"], None, ("low",)),
    ("x", ["transformer.a"], None, ROLES), ("x", ["transformer_2.b"], "high", ("high",)),
    ("lora_high_noise", ["blocks.a"], None, ("high",)), ("Wan22-LowNoise-v1", ["blocks.a"], None, ("low",)),
    ("high_noise_model", ["transformer.a", "transformer_2.b"], None, ROLES),
    ("Lightning_4steps-lora_HIGH_fp16", ["blocks.a"], None, ("high",)),
    ("A14B_LOW", ["blocks.a"], None, ("low",)),
    ("HIGH-noise", ["blocks.a"], "low", ("low",)), ("high-kick", ["blocks.a"], None, ROLES),
    ("high_noise_and_low_noise", ["blocks.a"], None, ROLES), ("follow_noise", ["blocks.a"], None, ROLES)])
def test_which_expert_a_file_is_for(name, keys, given, roles, tmp_path, capsys):
    path = save(tmp_path / f"{name}.safetensors", dict.fromkeys(keys, torch.ones(1)))
    assert experts_of(path, given, ROLES) == roles
    by_name = len(roles) == 1 and not given and "_2" not in keys[0]
    assert ("as its name says" in capsys.readouterr().out) == by_name
    assert experts_of(path, None, (None,)) == (None,)


@pytest.mark.parametrize("prefix", [
    "model.diffusion_model.", "module.", "dit.", "transformer.base_model.model."])
def test_prefixes_of_other_trainers(prefix, tmp_path):
    pair = {f"{prefix}blocks.0.self_attn.q.lora_{half}.weight": t for half, t in (("A", A), ("B", UP))}
    assert apply_lora(network(), save(tmp_path / "x.safetensors", pair)) == (1, [])


def test_an_expert_that_gets_no_lora_is_named(tmp_path, capsys):
    both, (high, low) = halves(tmp_path)
    check = partial(check_loras, roles=ROLES, networks=[network, network])
    assert check([(both, 1.0, None)]) == [(both, 1.0, ROLES)]
    assert check([(high, 1.0, "high"), (low, 0.5, "low")]) == [(high, 1.0, ("high",)), (low, 0.5, ("low",))]
    assert not capsys.readouterr().out
    check([(high, 1.0, "high")])
    assert capsys.readouterr().out == "no --lora is for the expert for low noise, which stays as it is\n"
    with pytest.raises(UserError, match="is for two experts"):
        check_loras([(both, 1.0, None)], (None,), [network])
