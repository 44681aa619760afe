"""networks/weights.py: weight files of any kind, and Wan's, as people have them: sound, damaged, hostile."""

import json
import math
import weakref
from pathlib import Path

import pytest
import torch
from helpers import LiveBytes, randomise
from safetensors.torch import save_file

from networks.encoders import UMT5
from networks.weights import load_weights, read_network, read_wan, read_weights, wan_files, weight_sets
from support.script import UserError


# ------------------------------------------------------------------------------------------------ Wan's files
@pytest.mark.parametrize(
    "index",
    ["", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": ["x"]}}',
     '{"weight_map": {"a": "x", "b": 3}}', '{"weight_map": {"a": "../x.safetensors"}}',
     '{"weight_map": {"a": "/x.safetensors"}}', '{"weight_map": {"a": "sub/x.safetensors"}}',
     '{"weight_map": {"a": ".."}}', '{"weight_map": {"a": ""}}', "[" * 100_000, b"\xff\xfe"],
    ids=lambda index: ascii(index[:48]),
)
def test_a_shard_index_of_junk_or_with_a_way_out_is_one_line(index, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(index if isinstance(index, bytes) else index.encode())
    for place in (path, tmp_path):
        with pytest.raises(UserError, match="model.safetensors.index.json: no index of shards") as caught:
            wan_files(place)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shard", ["absent.safetensors", "a\0b", ".", "x" * 5000])
def test_a_shard_that_cannot_be_opened_is_one_line(shard, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UserError) as caught:
        read_wan(tmp_path)
    assert "\n" not in str(caught.value)


def test_shards_and_both_styles_of_names_are_read(tmp_path):
    query = "blocks.0.attn1.to_q.weight"
    shards = {"1.safetensors": ["proj_out.weight"], "2.safetensors": [query, "proj_out.bias"]}
    weight_map = {}
    for shard, tensors in shards.items():
        save_file({name: torch.ones(1) for name in tensors}, tmp_path / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    file = read_wan(tmp_path)
    assert set(file.shapes) == {"head.head.weight", "head.head.bias", "blocks.0.self_attn.q.weight"}
    assert all(torch.equal(file.get(name), torch.ones(1)) for name in file.shapes)
    save_file({"proj_out.weight": torch.ones(1)}, tmp_path / "2.safetensors")
    with pytest.raises(UserError, match="'proj_out.weight' came before, in .*1.safetensors"):
        read_wan(tmp_path)


def test_a_folder_of_wan_without_one_network_says_what_is_expected(tmp_path):
    with pytest.raises(UserError, match="holds 0 Wan transformers; expected one, in a file or in shards"):
        wan_files(tmp_path)
    for name in "ab":
        save_file({"patch_embedding.weight": torch.ones(1), "scale_shift_table": torch.ones(1)},
                  tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"holds 2 Wan transformers \(a.safetensors, b.safetensors\); exp"):
        wan_files(tmp_path)
    (tmp_path / "high_noise_model").mkdir()
    with pytest.raises(UserError, match="two experts: give its high_noise_model or low_noise_model"):
        wan_files(tmp_path)


# ----------------------------------------------------------------------------------------------- weight files
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_network_that_is_not_finite_names_its_file(suffix, value, dtype, tmp_path):
    state = {name: tensor.to(dtype) for name, tensor in small().state_dict().items()}
    name = list(state)[7]
    state[name].view(-1)[3] = value
    path = write(tmp_path / f"net{suffix}", state)
    with pytest.raises(UserError, match=f"net{suffix}: '{name}' is not finite: the file is damaged"):
        load_weights(small(), read_weights(path))


FP8 = torch.float8_e4m3fn
QUANTISED = {
    "umt5_xxl_fp8_e4m3fn_scaled": ({"norm.weight": torch.ones(4).to(FP8)}, "fp8.*such as umt5_xxl_fp16.safe"),
    "wan2.1_t2v_14B_fp8_scaled": ({"scaled_fp8": torch.ones(2)}, "scaled fp8 .*as wan2.1_t2v_14B_fp16.safe"),
    "a": ({"blocks.0.ffn.0.scale_weight": torch.ones(1)}, "scaled fp8 .*take the fp16 or bf16 file"),
    "b": ({"blocks.0.ffn.0.weight_scale": torch.ones(1)}, "'blocks.0.ffn.0.weight_scale' .*scaled fp8"),
    "c": ({"x.comfy_quant": torch.ones(9).byte()}, "scaled fp8 or the like"),
    "d": ({"x": torch.ones(4).to(torch.float8_e5m2)}, "fp8"),
}


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_quantised_networks_are_refused_with_that_word_and_a_hint(name, suffix, tmp_path):
    tensors, says = QUANTISED[name]
    path = write(tmp_path / f"{name}{suffix}", tensors)
    with pytest.raises(UserError, match=says.replace(".safe", suffix)) as caught:
        load_weights(small(), read_weights(path))
    assert "quantised" in str(caught.value) and "\n" not in str(caught.value)


def test_gguf_is_said(tmp_path):
    (tmp_path / "umt5-xxl-encoder-Q8_0.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match="Q8_0.gguf is a GGUF file, quantised: take the .safetensors"):
        read_weights(tmp_path / "umt5-xxl-encoder-Q8_0.gguf")


@pytest.mark.parametrize("wrap", [lambda s: {"module." + k: v for k, v in s.items()},
                                  lambda s: {"_orig_mod." + k: v for k, v in s.items()},
                                  lambda s: {"model.diffusion_model." + k: v for k, v in s.items()},
                                  lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s, "x": "y"},
                                  lambda s: {"module": {"module." + k: v for k, v in s.items()}}])
def test_wrapped_networks_are_read(wrap, tmp_path):
    state = small().state_dict()
    torch.save(wrap(state), tmp_path / "net.pt")
    file = read_network([tmp_path / "net.pt"])
    assert file.shapes.keys() == state.keys() and all(torch.equal(file.get(k), v) for k, v in state.items())


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_without_an_index_are_read_and_a_missing_one_is_named(suffix, tmp_path):
    state = small().state_dict()
    names = list(state)
    for n in range(3):
        write(tmp_path / f"model-0000{n + 1}-of-00003{suffix}", {name: state[name] for name in names[n::3]})
    (files,) = weight_sets(tmp_path)
    assert read_network(files).shapes.keys() == state.keys()
    assert wan_files(tmp_path / f"model-00002-of-00003{suffix}") == files
    files[1].unlink()
    with pytest.raises(UserError, match=f"model-00002-of-00003{suffix}: no such file"):
        read_network(*weight_sets(tmp_path))
    write(tmp_path / f"model-00009-of-00003{suffix}", state)
    assert weight_sets(tmp_path)[-1] == [tmp_path / f"model-00009-of-00003{suffix}"]


def test_a_networks_older_twin_is_no_second_network(tmp_path):
    """diffusers' repositories hold both for a while."""
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        write(tmp_path / name, small().state_dict())
    assert weight_sets(tmp_path) == [[tmp_path / "diffusion_pytorch_model.safetensors"]]


def small():
    return randomise(UMT5(vocab=40, dim=16, ffn_dim=24, num_heads=2, num_layers=2))


def write(path, state):
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_files_load_as_saved_with_a_cast(tmp_path, suffix, dtype):
    source = small()
    path = write(tmp_path / f"net{suffix}", source.state_dict())
    with torch.device("meta"):
        meta = UMT5(vocab=40, dim=16, ffn_dim=24, num_heads=2, num_layers=2)
    for net in (meta, UMT5(vocab=40, dim=16, ffn_dim=24, num_heads=2, num_layers=2).requires_grad_(False)):
        frozen = not net.norm.weight.requires_grad
        assert load_weights(net, read_weights(path), dtype) is net
        for name, p in net.named_parameters():
            assert torch.equal(p, source.get_parameter(name).to(dtype or torch.float32)), name
            assert p.requires_grad != frozen
    path.write_bytes(b"\0" * 10)  # what was loaded does not live in the file
    net(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3))


def test_reader_and_old_files(tmp_path):
    state = small().state_dict()
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for path in (tmp_path / "old.pth", write(tmp_path / "new.safetensors", state)):
        file = read_weights(path)
        assert set(file.shapes) == set(state) and file.shapes["norm.weight"] == (16,)
        assert torch.equal(file.get("token_embedding.weight"), state["token_embedding.weight"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_loading_never_holds_two_networks(tmp_path, suffix):
    source = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(20)))
    path = write(tmp_path / f"net{suffix}", source.state_dict())
    with torch.device("meta"):
        net = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(20)))
    with LiveBytes() as live:
        load_weights(net, read_weights(path), torch.float64)
    size = sum(p.nbytes for p in net.parameters())
    mapped = size // 2 if suffix == ".pth" else 0  # all of the float32 file's tensors exist, but in its pages
    assert size <= live.peak - mapped <= size * 1.1
    old = [weakref.ref(p) for p in net.parameters()]
    load_weights(net, read_weights(path), torch.float32)
    assert not any(p() for p in old)
    file = read_weights(path)
    at, maps = file.get("0.weight").data_ptr(), Path("/proc/self/maps")
    if maps.exists():  # Linux: the tensor lies in the file's own pages
        spans = [line.split()[0].split("-") for line in maps.read_text().splitlines() if str(path) in line]
        assert any(int(start, 16) <= at < int(end, 16) for start, end in spans)


def broken_files(folder):
    """name -> (file, what the one line says)."""
    state, cases = small().state_dict(), {}
    good = {
        suffix: write(folder / f"good{suffix}", state).read_bytes() for suffix in (".safetensors", ".pth")
    }

    def case(name, content, says):
        (folder / name).write_bytes(content)
        cases[name] = says

    for suffix, content in good.items():
        case(f"empty{suffix}", b"", "is empty")
        case(f"lfs{suffix}", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git-LFS")
        case(f"html{suffix}", b"\n<!DOCTYPE html><html>", "web page")
        case(f"html2{suffix}", b"<HTML><body>", "web page")
        for at in (1, 7, 9, 100, len(content) // 2, len(content) - 1):
            case(f"cut{at}{suffix}", content[:at], "cannot be read")
        case(f"noise{suffix}", bytes(range(256)) * 40, "cannot be read")
    case("swapped.safetensors", good[".pth"], "cannot be read")
    case("swapped.pth", good[".safetensors"], "cannot be read")
    entry = '{"a":{"dtype":"%s","shape":%s,"data_offsets":%s}}'
    hostile = {"huge": b"\xff" * 8 + b"{}", "list": b"[]", "json": b'{"a":',
               "dtype": (entry % ("Q7", "[1]", "[0,4]")).encode(),
               "negative": (entry % ("F32", "[-1]", "[0,4]")).encode(),
               "beyond": (entry % ("F32", "[9]", "[0,36]")).encode(),
               "overflow": (entry % ("F32", "[4294967296,4294967296,4]", "[0,4]")).encode(),
               "backwards": (entry % ("F32", "[1]", "[4,0]")).encode()}
    for name, header in hostile.items():
        content = header if name == "huge" else len(header).to_bytes(8, "little") + header + bytes(4)
        case(f"{name}.safetensors", content, "cannot be read")
    pickles = {"code": {"a": print}, "list": [1], "nested": {"step": 3, "weights": state}, "number": 3}
    pickles["numbered"] = {0: torch.ones(1)}
    for name, value in pickles.items():
        torch.save(value, folder / f"{name}.pth")
        cases[f"{name}.pth"] = "cannot be read" if name == "code" else "expected a dict of tensors"

    for suffix in good:

        def altered(name, says, suffix=suffix, **changes):
            new = {key: value for key, value in {**state, **changes}.items() if value is not None}
            write(folder / f"{name}{suffix}", new)
            cases[f"{name}{suffix}"] = says

        fc2 = "blocks.1.ffn.fc2.weight"
        altered("missing", "21 tensors came, 22 expected; 1 missing ('norm.weight')", **{"norm.weight": None})
        altered("extra", "23 tensors came, 22 expected; 1 unknown ('bias')", bias=torch.zeros(3))
        altered("renamed",
                "22 tensors came, 22 expected; 1 missing ('norm.weight'); 1 unknown ('norm.gamma')",
                **{"norm.weight": None, "norm.gamma": torch.ones(16)})
        altered("transposed", f"1 mis-shaped ('{fc2}' (24, 16) instead of (16, 24))",
                **{fc2: state[fc2].T.contiguous()})
        altered("integers", "is torch.int64, expected torch.float32",
                **{"norm.weight": torch.ones(16).long()})
        blank = dict.fromkeys(state)
        altered("other", "22 missing ('token_embedding.weight', 'blocks.0.norm1.weight', '", x=torch.ones(1),
                **blank)
    cases["absent.pth"] = "no such file"
    (folder / "folder.pth").mkdir()
    cases["folder.pth"] = "not a file"
    return cases


def test_every_bad_file_gives_one_clear_line(tmp_path):
    for name, says in broken_files(tmp_path).items():
        with pytest.raises(UserError) as caught:
            load_weights(small(), read_weights(tmp_path / name))
        line = str(caught.value)
        assert says in line and name in line and "\n" not in line and len(line) < 600, line


def test_mutated_safetensors_never_surprise(tmp_path):
    """Any flipped byte of the header: the network loads, or one UserError."""
    good, path = (write(tmp_path / "good.safetensors", small().state_dict()).read_bytes(),
                  tmp_path / "bad.safetensors")
    torch.manual_seed(0)
    refused = 0
    for at in torch.randint(0, 8 + int.from_bytes(good[:8], "little"), (150,)).tolist():
        path.write_bytes(good[:at] + bytes([good[at] ^ int(torch.randint(1, 256, ()))]) + good[at + 1 :])
        try:
            load_weights(small(), read_weights(path))
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 100
