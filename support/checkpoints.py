"""Our checkpoints: a folder with safetensors and a readable checkpoint.json, there whole or not at all."""
import functools
import hashlib
import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import torch

from support.script import (UserError, as_user_error, atomic_folder, remove, save_tensors, sha256_of,
                            temporary_name)


def save_checkpoint(folder, tensors, meta, files=(), keep=None, shards=None):
    """Write a checkpoint folder that is either there whole or not at all, and remove all but the newest
    `keep` steps next to it, where a number is given.

    tensors  {"model": state dict, ...}, one safetensors file each
    meta     JSON-able; "sha256" of every file is added
    files    further files that the checkpoint needs, copied into it
    shards   a folder of files of torch.distributed.checkpoint, which move into it
    """
    folder = Path(folder)
    check_replaceable(folder)
    with atomic_folder(folder) as build:
        for name, state in tensors.items():
            save_tensors(build / f"{name}.safetensors", state)
        for file in files:
            shutil.copy(file, build)
        for file in shards.iterdir() if shards else ():
            os.replace(file, build / file.name)
        if shards:
            shards.rmdir()
        sha256 = {f.name: checksum_of(f) for f in sorted(build.iterdir())}
        (build / "checkpoint.json").write_text(json.dumps({**meta, "sha256": sha256}, indent=1))
    if keep:
        others = [step for step in steps_in(folder.parent) if step != folder]
        for old in others[:max(0, len(others) + 1 - keep)]:
            delete_checkpoint(old)


def delete_checkpoint(folder):
    os.replace(folder, temporary_name(folder))  # a kill must not leave half of it under its name
    remove(temporary_name(folder))


def check_replaceable(folder):
    """UserError where a checkpoint saved at `folder` would destroy what is there and is none.
    A training asks for all its names before its first step."""
    folder = Path(folder)
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not empty and not (folder / "checkpoint.json").is_file():
        raise UserError(f"{folder} is not a checkpoint and would be replaced by one: move it away")


CHUNK = 2**26  # bytes that a thread hashes at a time
TREE = "tree:"  # before the hash of a longer file: the sha256 of its chunks' sha256s


def checksum_of(path, tree=None):
    """What checkpoint.json keeps of a file: its sha256, or, above CHUNK bytes, TREE and the tree's, which all
    cores compute together. tree: which of the two, whatever the length."""
    size = os.path.getsize(path)
    if not (size > CHUNK if tree is None else tree):
        return sha256_of(path)

    def hash_chunk(start):
        digest, end = hashlib.sha256(), min(start + CHUNK, size)
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while piece := file.read(min(2**20, end - file.tell())):
                digest.update(piece)
        return digest.digest()
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as threads:
        return TREE + hashlib.sha256(b"".join(threads.map(hash_chunk, range(0, size, CHUNK)))).hexdigest()


@functools.lru_cache(maxsize=1024)
def checksum_once(path, tree, *_):
    return checksum_of(path, tree)


def is_as_written(path, checksum):
    """Does a file have that checksum. A long one is read once by a process, unless its time stamp changes;
    and by one process of a machine: where that one stops, torchrun ends the others."""
    stat, tree = path.stat(), str(checksum).startswith(TREE)
    if stat.st_size <= CHUNK:
        return checksum_of(path, tree) == checksum
    if torch.distributed.is_initialized() and os.environ.get("LOCAL_RANK", "0") != "0":
        return True
    return checksum_once(path, tree, stat.st_size, stat.st_mtime_ns, stat.st_ino) == checksum


def steps_in(folder):
    """The checkpoints step-NNN of a stage's folder, oldest first; nothing else counts as one."""
    steps = [f for f in Path(folder).glob("step-*")
             if re.fullmatch(r"step-\d{1,12}", f.name) and (f / "checkpoint.json").is_file()]
    return sorted(steps, key=lambda f: int(f.name[5:]))


def find_checkpoint(path):
    """The checkpoint folder at `path`, or the newest one below it (of a stage, or of a run's last stage),
    or None. A stage whose predecessor was trained again since then does not count: it is of an older run."""
    path = Path(path)
    if (path / "checkpoint.json").is_file():
        return path
    newest = (steps_in(path) or [None])[-1]
    before = None
    stages = [f for f in path.glob("stage*") if re.fullmatch(r"stage[1-9]\d?", f.name)]
    for stage in sorted(stages, key=lambda f: int(f.name[5:])):
        steps = steps_in(stage)
        if steps and before and read_meta(steps[-1]).get("parent") not in (None, parent_of(before)):
            break
        before = steps[-1] if steps else None
        newest = before or newest
    return newest


def newest_undamaged(folder):
    """The newest checkpoint of a stage's folder whose files are all as they were written, or None. Names
    those that are not."""
    for step in reversed(steps_in(folder)):
        try:
            check_files(step)
            return step
        except UserError as error:
            print(f"{error}; going on from the one before, if there is one", file=sys.stderr)
    return None


def parent_of(folder):
    """What a stage's checkpoint.json records of the checkpoint that it started from."""
    return read_meta(folder)["sha256"].get("ema.safetensors")


def read_meta(folder):
    """What checkpoint.json of a checkpoint folder holds; its config is for model.DiTConfig to check."""
    path = Path(folder) / "checkpoint.json"
    try:
        meta = json.loads(path.read_text())
        kinds = {"config": dict, "sha256": dict, "world": dict, "flags": dict, "step": int, "stage": int,
                 "name": str, "preset": str, "finished": bool, "wan": str, "base": dict, "expert": dict}
        for name in ("config", "sha256", *meta):
            if name in kinds and type(meta[name]) is not kinds[name]:
                raise ValueError(f"{name} is {str(meta[name])[:40]!r}")
        named = re.fullmatch(r"step-(\d{1,12})", path.parent.name)
        if named and meta.setdefault("step", int(named[1])) != int(named[1]):
            raise ValueError(f"step {str(meta['step'])[:40]} in {path.parent.name}")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected the folder of a checkpoint") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): "
                        "delete its folder, or use another checkpoint") from None
    return meta


def check_files(folder, names=None):
    """UserError where a file of a checkpoint is not what was written there. names: None for all of them."""
    sha256 = read_meta(folder)["sha256"]
    for name in sha256 if names is None else names:
        path = Path(folder) / name
        if Path(name).name != name or not path.is_file() or not is_as_written(path, sha256.get(name)):
            raise UserError(f"{path} is missing or damaged (its sha256 is not the one in checkpoint.json): "
                            "delete its folder, or use another checkpoint")


def load_tensors(folder, name):
    """One tensor file of a checkpoint folder, checked against the sha256 that was written with it."""
    check_files(folder, [f"{name}.safetensors"])
    path = Path(folder) / f"{name}.safetensors"
    with as_user_error(path):
        return safetensors.torch.load_file(path)


def compare(checkpoint, stored, current):
    """UserError where a checkpoint's config or flags differ from these."""
    differences = [f"{name} {str(value)[:40]} there, {current[name]} here" for name, value in stored.items()
                   if name in current and current[name] != value]
    if differences:
        raise UserError(f"{checkpoint} was trained otherwise ({'; '.join(differences)}): "
                        "give the same flags, or another --out")


def pack_optimizers(optimizers):
    """The optimizers' states as {"optimizer.parameter.name": tensor}; unpack_optimizers puts them back."""
    return {f"{o}.{p}.{name}": value for o, optimizer in enumerate(optimizers)
            for p, state in optimizer.state_dict()["state"].items() for name, value in state.items()}


def unpack_optimizers(optimizers, packed):
    states = [{} for _ in optimizers]
    for key, value in packed.items():
        o, p, name = key.split(".")
        groups = optimizers[int(o)].param_groups
        parameter = [parameter for group in groups for parameter in group["params"]][int(p)]
        if value.shape not in ((), parameter.shape) or not value.is_floating_point():
            raise UserError(f"{key} is {value.dtype} {list(value.shape)}; expected {list(parameter.shape)}")
        states[int(o)].setdefault(int(p), {})[name] = value
    for optimizer, state in zip(optimizers, states):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
