"""Files of weights, whoever wrote them.

  weight files   any .safetensors or torch.save file, read tensor by tensor; shards and foreign names
  Wan's files    a transformer or two experts, as Wan, diffusers and ComfyUI store them
  frozen bases   the network that adapters were trained on is the one that they are used with
"""
import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn as nn

from support.checkpoints import check_files, read_meta
from support.script import UserError, as_user_error, fingerprint


# ----------------------------------------------------------------------------------------------- weight files


class WeightFile(NamedTuple):
    """The named tensors of one .safetensors or torch.save file, memory-mapped."""
    path: Path
    shapes: dict  # name -> tuple
    get: Callable  # name -> tensor as stored, on the CPU; perhaps the file's own pages, so do not write to it
    refused: str = ""  # why no network can be filled from it


QUANTISED = re.compile(  # names of what goes with weights of few bits
    r"(?:.*\.)?(scaled_fp8|scale_(weight|input)|(weight|input)_scale(_\w+)?|comfy_quant|absmax)")
NESTED = "state_dict", "model_state_dict", "model", "module"  # what torch.save files hold the tensors below


def refuse_quantised(path, dtypes):
    """dtypes: {name: its dtype as text} -> why such a file is not read, or ""."""
    for name, dtype in dtypes.items():
        fp8 = re.search("float8|^F8", dtype)
        if fp8 or QUANTISED.fullmatch(name):
            other = re.sub(r"fp8(_e\dm\d\w*)?(_scaled)?", "fp16", Path(path).name)
            what = f"in {dtype}, fp8" if fp8 else "there: scaled fp8 or the like"
            return (f"{path} is quantised ({name!r} is {what}), which is not read: take the fp16 or bf16 "
                    "file" + (f", such as {other}" if other != Path(path).name else ""))
    return ""


def read_weights(path):
    """-> WeightFile; UserError in one line for a file that is missing, empty, damaged or something else."""
    with as_user_error(path):
        if not Path(path).is_file():  # a folder, or a pipe that would never end
            raise UserError(f"{path}: {'not a file' if Path(path).exists() else 'no such file'}")
        with open(path, "rb") as file:
            head = file.read(64).lstrip().lower()
        if not head:
            raise UserError(f"{path} is empty")
        if head.startswith(b"version https://git-lfs"):
            raise UserError(f"{path} is a git-LFS pointer, not the weights; run `git lfs pull` beside it")
        if head.startswith((b"<!doctype", b"<html")):
            raise UserError(f"{path} is a web page, not weights; download it again")
        if head.startswith(b"gguf"):
            raise UserError(f"{path} is a GGUF file, quantised: take the .safetensors in fp16 or bf16")
        if str(path).endswith(".safetensors"):
            file = safetensors.safe_open(path, "pt")
            slices = {name: file.get_slice(name) for name in file.keys()}
            refused = refuse_quantised(path, {name: part.get_dtype() for name, part in slices.items()})
            return WeightFile(path, {name: tuple(part.get_shape()) for name, part in slices.items()},
                              file.get_tensor, refused)
        # torch maps zip files only; those of torch < 1.6 are read whole
        with warnings.catch_warnings(action="ignore"):  # its hints at a pickle that is refused
            tensors = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        for name in NESTED:
            if isinstance(tensors, dict) and isinstance(tensors.get(name), dict):
                tensors = tensors[name]
        if not isinstance(tensors, dict) or not all(
                isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in tensors.items()):
            raise UserError(f"{path} holds a {type(tensors).__name__}, expected a dict of tensors only")
        refused = refuse_quantised(path, {name: str(tensor.dtype) for name, tensor in tensors.items()})
        return WeightFile(path, {name: tuple(t.shape) for name, t in tensors.items()}, tensors.__getitem__,
                          refused)


SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".gguf")  # the last one, to say why not
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<suffix>\.\w+)")


def shards_of(path):
    """A weight file, one of several shards, or their index -> all files of that network."""
    path = Path(path)
    shard = SHARD.fullmatch(path.name)
    if shard and 1 <= int(shard["number"]) <= int(shard["total"]) <= 1000:
        return [path.with_name(f"{shard['stem']}-{n:05d}-of-{shard['total']}{shard['suffix']}")
                for n in range(1, int(shard["total"]) + 1)]
    if not path.name.endswith(".index.json"):
        return [path]
    if not path.is_file():
        raise UserError(f"{path}: not a file")
    try:
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        if any(Path(shard).name != shard or shard in ("", "..") for shard in shards):
            raise ValueError("a shard lies outside its folder")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: no index of shards ({type(error).__name__}: {error})") from None
    return [path.with_name(shard) for shard in shards]


def weight_sets(folder, depth=0):
    """The files of each network in a folder, and in its folders to that depth: [[file, ...], ...]. Not those
    of our own checkpoints below it; .bin files, diffusers' older twins, only where no .safetensors is."""
    folder, sets = Path(folder), []
    if not folder.is_dir():
        return sets
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in entries if path.name.endswith(SUFFIXES) and path.is_file()]
    indexes = [path for path in entries if re.fullmatch(r".+\.(safetensors|bin)\.index\.json", path.name)]
    for path in [*indexes, *files]:
        if not any(path in files for files in sets):
            sets.append(shards_of(path))
    safe = any(path.suffix == ".safetensors" for path in files)
    sets = [files for files in sets if not (safe and files[0].suffix == ".bin")]
    for path in entries if depth else ():
        if not (path / "checkpoint.json").is_file():
            sets += weight_sets(path, depth - 1)
    return sets


# around all names: of wrappers, of ComfyUI's and of trainers' files
WRAPPED = re.compile(r"^(?:(?:module|_orig_mod|model|diffusion_model|dit|dinov2)\.)+")


def read_network(files, names=()):
    """The files of one network -> WeightFile with our names. names: a table of (regular expression, what
    takes its place, or None to leave the tensor out). "NAME|i" is the i-th part of NAME's rows."""
    sources, refused = {}, ""
    for file in map(read_weights, files):
        refused = refused or file.refused
        for stored, shape in file.shapes.items():
            ours = rename(stored, names)
            name, _, part = (ours or "").partition("|")
            if part in sources.get(name, ()):
                raise UserError(f"{file.path}: {stored!r} came before, in {sources[name][part][0].path}")
            if name:
                sources.setdefault(name, {})[part] = file, stored, shape
    shapes = {}
    for name, parts in sources.items():
        rows = [shape for _, _, shape in parts.values()]
        shapes[name] = rows[0] if len(rows) == 1 else (sum(shape[0] for shape in rows), *rows[0][1:])

    def get(name):
        tensors = []
        for _, (file, stored, _) in sorted(sources[name].items()):
            with as_user_error(file.path):
                tensors.append(file.get(stored))
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    path = files[0] if len(files) == 1 else files[0].parent
    return WeightFile(path, shapes, get, refused)


def rename(name, names):
    """A stored tensor's name in ours, by such a table; None where the tensor is to be left out."""
    name = WRAPPED.sub("", name)
    for pattern, ours in names:
        if ours is not None:
            name = re.sub(pattern, ours, name)
        elif re.match(pattern, name):
            return None
    return name


def check_fit(module, file, may_lack=()):
    """UserError, one line with the differences, where a WeightFile's names and shapes are not module's;
    returns the names that only module has, which all begin with one of `may_lack`. Reads no weights."""
    if file.refused:
        raise UserError(file.refused)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    absent = [name for name in expected if name.startswith(tuple(may_lack)) and name not in file.shapes]
    both = [name for name in expected if name in file.shapes and file.shapes[name] != expected[name]]
    wrong = {"missing": [repr(name) for name in expected if name not in file.shapes and name not in absent],
             "unknown": [repr(name) for name in file.shapes if name not in expected],
             "mis-shaped": [f"{name!r} {file.shapes[name]} instead of {expected[name]}" for name in both]}
    parts = [f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
             for kind, names in wrong.items() if names]
    if parts:
        raise UserError(f"{file.path} does not fit {type(module).__name__}: {len(file.shapes)} tensors came, "
                        f"{len(expected) - len(absent)} expected; " + "; ".join(parts))
    return absent


def put_tensor(module, name, tensor, dtype=None, device=None):
    """Put a copy of tensor where module has `name`, cast and moved; module may be on the meta device.
    dtype, device: None keeps the module's own (for meta, the CPU). Of a sharded module this process's part.
    A parameter is replaced, not written to: load before an optimizer is built."""
    owner, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner)
    old = getattr(owner, leaf)
    if tensor.is_floating_point() != old.is_floating_point():
        raise UserError(f"{name!r} is {tensor.dtype}, expected {old.dtype}")
    dtype = dtype if dtype and old.is_floating_point() else old.dtype
    if hasattr(old, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor
        tensor = distribute_tensor(tensor.to(old.device_mesh.device_type, dtype, copy=True), old.device_mesh,
                                   old.placements, src_data_rank=None)  # None: every process has the tensor
    else:
        tensor = tensor.to(device or ("cpu" if old.is_meta else old.device), dtype, copy=True)
    setattr(owner, leaf, nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor)


def load_weights(module, file, dtype=None, device=None, may_lack=()):
    """Fill module from a WeightFile and return it; names and shapes must agree as check_fit says.
    Tensor by tensor, as put_tensor, so no second copy of the network ever exists. UserError for a NaN."""
    check_fit(module, file, may_lack)
    for name in file.shapes:
        with as_user_error(file.path):
            tensor = file.get(name)
            if tensor.is_floating_point() and tensor.numel():
                if not torch.stack(tensor.aminmax()).isfinite().all():
                    raise UserError(f"{name!r} is not finite: the file is damaged, or its training diverged")
            put_tensor(module, name, tensor, dtype, device)
    return module


# ------------------------------------------------------------------------------------------------ Wan's files
DIFFUSERS_NAMES = (
    (r"^condition_embedder\.(time|text)_embedder\.linear_1", r"\1_embedding.0"),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2", r"\1_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"^scale_shift_table", "head.modulation"), (r"\.scale_shift_table", ".modulation"),
    (r"^proj_out", "head.head"),
    (r"\.attn1\.", ".self_attn."), (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])\.", r".\1."), (r"\.to_out\.0\.", ".o."),
    (r"\.norm2\.", ".norm3."),  # diffusers numbers the norms in order of use; Wan's norm2 has no weights
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."), (r"\.ffn\.net\.2\.", ".ffn.2."))


def original_name(name):
    """A tensor's name in diffusers' style -> its name in Wan's own."""
    return rename(name, DIFFUSERS_NAMES)


# folders of Wan2.2's two experts, the one for high noise first: Wan's own names, and diffusers'
EXPERTS = ("high_noise_model", "low_noise_model"), ("transformer", "transformer_2")
ROLES = ("high", "low")  # by the noise that each works at


def role_of(path):
    """The expert that the name of a file or folder tells: "high", "low" or None."""
    if Path(path).name == EXPERTS[1][1]:  # while any single network of diffusers is a `transformer`
        return "low"
    begins = "(?:(?<![A-Za-z])|(?=[A-Z]))"  # of a word, also inside oneLikeThis
    words = {w.lower() for w in re.findall(f"{begins}((?i:high|low))[-_ ]?(?i:noise)", Path(path).name)}
    # in capitals these words need no "noise"; "high_quality" is no expert
    words = words or {w.lower() for w in re.findall("(?<![A-Za-z])(HIGH|LOW)(?![A-Za-z])", Path(path).name)}
    return words.pop() if len(words) == 1 else None


def expert_folders(path):
    """The two networks of a Wan2.2 checkpoint, high noise first: folders, or, as ComfyUI has them, files (or
    the first shard of each). None where there is no pair; `transformer` alone is none."""
    own, diffusers = ([Path(path) / name for name in pair] for pair in EXPERTS)
    if own[0].is_dir() or own[1].is_dir():
        return own
    if diffusers[1].is_dir() or (Path(path) / "checkpoint.json").is_file():
        return diffusers if diffusers[1].is_dir() else None
    files = [network[0] for network in find_wan(path)]
    return sorted(files, key=role_of) if sorted(map(str, map(role_of, files))) == list(ROLES) else None


def boundary_of(path):
    """The noise level where Wan2.2's experts change, as diffusers noted it in model_index.json, or None."""
    try:
        boundary = json.loads((Path(path) / "model_index.json").read_text())["boundary_ratio"]
        return float(boundary) if 0 < boundary < 1 else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def release_folder(path):
    """The folder of a release that has a text encoder: path, or, of a transformer's folder or file, one or
    two levels up; path where there is none."""
    path = Path(path)
    for folder in (path, *Path(os.path.abspath(path)).parents[:2], *path.resolve().parents[:2]):
        if any(any(folder.glob(name)) for name in ("models_t5*", "*umt5*", "text_encoder*", "google/umt5*")):
            return folder
    return path


def find_wan(path):
    """The files of each Wan transformer at path, which is one of its files or a folder of them, perhaps with
    other networks. Found by name, or else by what the files hold; [] where there is none."""
    path = Path(path)
    if not path.is_dir():
        return [shards_of(path)] if path.is_file() or path.name.endswith(".index.json") else []
    here = weight_sets(path)
    named = [files for files in here if re.search(r"diffusion\w*_model", files[0].name)]
    if len(named) == 1:
        return named
    everything, found, faults = weight_sets(path, depth=2), {}, []
    if len(everything) == 1:
        return everything
    for files in everything:
        try:
            file = read_network(files, DIFFUSERS_NAMES)
            if {"patch_embedding.weight", "head.modulation"} <= file.shapes.keys():
                found[tuple(files)] = file.refused
        except UserError as error:
            faults.append(error)
    whole = [list(files) for files, refused in found.items() if not refused]
    if not found and faults:
        raise faults[0]
    return whole or [list(files) for files in found]


def wan_files(path):
    """A weight file, its index, or a folder with either -> the files that hold the network."""
    path = Path(path)
    if not path.is_dir():
        return shards_of(path)
    if experts := expert_folders(path):
        raise UserError(f"{path} holds two experts: give its {' or '.join(f.name for f in experts)}, or "
                        "train.py's --expert")
    path = path / "transformer" if (path / "transformer").is_dir() else path  # diffusers' pipelines
    found = find_wan(path)
    if len(found) != 1:
        names = f" ({', '.join(files[0].name for files in found[:4])})" if found else ""
        raise UserError(f"{path} holds {len(found)} Wan transformers{names}; expected one, in a file or in "
                        "shards: give the file, or another folder")
    return found[0]


def read_wan(path):
    """A checkpoint with any of the known names, in any number of files -> WeightFile with Wan's own names."""
    return read_network(wan_files(path), DIFFUSERS_NAMES)._replace(path=path)


def layers_of(shapes):
    """How many blocks a network has whose tensors bear these names."""
    return len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})


def wan_config(file):
    """What the shapes of a Wan transformer's WeightFile say of its config, as a dict."""
    shapes = file.shapes
    try:
        dim, in_dim, _, *patch = shapes["patch_embedding.weight"]
        config = dict(dim=dim, in_dim=in_dim, out_dim=shapes["head.head.bias"][0] // math.prod(patch),
                      num_heads=dim // 128,  # 128 wide in all of them
                      ffn_dim=shapes["blocks.0.ffn.0.bias"][0], num_layers=layers_of(shapes),
                      freq_dim=shapes["time_embedding.0.weight"][1],
                      text_dim=shapes["text_embedding.0.weight"][1])
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{file.path}, of {len(shapes)} tensors, is not a Wan transformer "
                        f"({error})") from None
    if in_dim != 16:  # image-to-video, or Wan2.2's 5B
        raise UserError(f"{file.path} works on latents of {in_dim} channels, expected 16: take Wan2.1's or "
                        "Wan2.2-A14B's text-to-video")
    return config


def check_base(base):
    """UserError where the network that adapters were trained on is another one by now. base: as in
    checkpoint.json; one older than 2026-12-01 does not say which release it was."""
    path = Path(base["path"])
    if base["sha256"]:  # a folder of train.py
        if not path.is_dir() or read_meta(path)["sha256"].get("ema.safetensors") != base["sha256"]:
            raise UserError(f"the frozen network that this was trained on, {path}, is gone or was trained "
                            "again")
        return
    came, expected = fingerprint(wan_files(path)), base.get("content")
    if expected not in (None, came):
        raise UserError(f"{base['path']}, the frozen network that this was trained on, is another one now: "
                        f"its content is {came}, expected {expected}; put the old files back")


def moved_base(source, base, wan):
    """What checkpoint.json of `source` says of its frozen base, once --wan was given: wan is its place now.
    UserError where another network is there."""
    if base["sha256"] or not base.get("content") or wan == base["path"]:
        return base
    if fingerprint(wan_files(wan)) != base["content"]:
        raise UserError(f"{source} was trained on {base['path']}, and --wan {wan} holds another network: "
                        "give the one that it had")
    return base | {"path": wan}


def read_checked(folder, weights):
    """A tensor file of a checkpoint folder of train.py, "ema" or "model", as it was written -> WeightFile."""
    check_files(folder, [f"{weights}.safetensors"])
    return read_weights(Path(folder) / f"{weights}.safetensors")


def read_frozen(base):
    """The frozen network of --train new or lora -> WeightFile. base: what checkpoint.json says of it,
    {"path", "sha256", "content", ...}, path a Wan checkpoint or a folder of train.py."""
    check_base(base)
    return read_checked(base["path"], "ema") if base["sha256"] else read_wan(base["path"])
