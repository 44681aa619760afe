"""Encoded sets: clips, references and captions, once through the frozen networks, so that training reads
latents only. Mv2ID's region masks are painted here, before any network sees a reference.

`python data.py encode` makes one of a manifest; the toy world makes its own.
"""
import contextlib
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import safetensors.torch
import torch
from tqdm import tqdm

from checkpoint import UserError, atomic_file, is_text, lock, read_lines
from pictures import from_bytes, to_bytes
from rope import VIEWS

# An encoded set is a folder: settings.json, index.jsonl with a line a sample, and a file each, which holds
# "latents" [C, T, H, W], "text" [S, E] at its true length, and for person k "refs.k.VIEW" [variants, C, h,
# w] and, of the frontal view, "vit.k" [variants, levels, tokens, width]. The sample "empty" has the text of
# an empty caption. A line's "views" are, for each person, {view: is it from another clip}.
VERSION = 2


def sample_path(folder, name):
    return folder / name[:2] / f"{name}.safetensors"


def mask_regions(image, fraction, block, generator):
    """Mv2ID's region masking: image [3, H, W] in -1..1, sides multiples of block, with a random `fraction` of
    its block x block squares painted grey (0)."""
    _, H, W = image.shape
    squares = (H // block) * (W // block)
    mask = torch.randperm(squares, generator=generator) < round(fraction * squares)
    mask = mask.view(H // block, W // block).repeat_interleave(block, 0).repeat_interleave(block, 1)
    return torch.where(mask, torch.zeros(()), image)


def pack(latent, dtype):
    """A latent as it is stored; uint8 is for latents that are pixels in -1..1."""
    return to_bytes(latent) if dtype == torch.uint8 else latent.to(dtype)


def unpack(stored):
    return from_bytes(stored) if stored.dtype == torch.uint8 else stored.float()


def encode(samples, folder, encoders, settings, mask=0.0, variants=4, rank=0, size=1):
    """Encode those of the Samples that are not in the set yet, or whose files were replaced or damaged since;
    process `rank` of `size` takes every size-th.

    settings  JSON-able; a set that was made with others is refused
    mask      region masking: this fraction of each reference is hidden before any network sees it
    variants  differently masked versions of each reference
    Whoever finishes last writes index.jsonl, in the order of `samples`, and failed.jsonl, with reasons;
    returns whether this process did.
    """
    folder = Path(folder)
    settings = {"schema": "harmoview encoded set", "version": VERSION, "mask": mask,
                "variants": variants if mask else 1, "vit": encoders.vit_shape, **settings}
    folder.mkdir(parents=True, exist_ok=True)
    # each line says what it was made from, so a set whose settings.json is lost can be trusted
    made_from = {sample.name: hashlib.sha256(json.dumps([settings, sample.stamp], sort_keys=True).encode())
                 .hexdigest()[:16] for sample in samples}
    done, stored = finished(folder, made_from), None  # None: settings.json is lost or damaged
    with contextlib.suppress(OSError, ValueError, RecursionError):
        stored = json.loads((folder / "settings.json").read_text())
    ours = done or stored or (folder / "index.jsonl").exists() or not (folder / "settings.json").exists()
    if not ours or not isinstance(stored, dict | None):
        read_settings(folder)  # raises, as it is no encoded set
    different = [f"{name} {stored.get(name)} there, {value} here" for name, value in settings.items()
                 if stored is not None and stored.get(name) != value]
    if different:
        raise UserError(f"{folder} was encoded with other settings ({'; '.join(different)}): "
                        "give the same, or another --out")
    todo = [sample for sample in samples[rank::size] if sample.name not in done]
    if todo or stored is None or not is_readable(sample_path(folder, "empty")):
        write_sample(folder, "empty", {"text": encoders.text([""])[0].half()})
        with atomic_file(folder / "settings.json") as path:
            path.write_text(json.dumps(settings, indent=1))
    with (open(folder / f"done-{rank}-{size}.jsonl", "a") as log,
          tqdm(total=len(todo), desc="encoding", unit=" clips", disable=None if rank == 0 else True) as bar):
        for first in range(0, len(todo), 64):  # so many at a time, as each network is loaded once for them
            for entry in encode_samples(todo[first:first + 64], folder, encoders, mask, settings["variants"]):
                entry["made_from"] = made_from[entry["name"]]
                if "error" in entry:
                    tqdm.write(f"{entry['source']} is left out: {entry['error']}", file=sys.stderr)
                log.write(f"\n{json.dumps(entry)}\n")  # the line before may have been cut off
                log.flush()
                bar.update()
    with lock(folder, wait=True):
        entries = finished(folder, made_from)
        if not all(sample.name in entries for sample in samples):
            return False
        for name, failed in (("index", False), ("failed", True)):
            with atomic_file(folder / f"{name}.jsonl") as path:
                lines = [entries[sample.name] for sample in samples]
                lines = [line for line in lines if ("error" in line) == failed]
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        for log in folder.glob("done-*.jsonl"):
            log.unlink()
    return True


def finished(folder, made_from):
    """{name: line} of the samples that are made from the same as now and whose files are whole, and of those
    that failed since the last index."""
    logs = [line for log in sorted(folder.glob("done-*.jsonl")) for line in read_lines(log)]
    lines = [line for line in read_lines(folder / "index.jsonl") + logs
             if is_sound(line) and line.get("made_from") == made_from.get(line["name"], "")]
    return {line["name"]: line for line in lines if "error" in line or
            os.path.isfile(path := sample_path(folder, line["name"])) and
            os.path.getsize(path) == line.get("bytes")}


def is_sound(line):
    """Is a line of index.jsonl or of a log as encode_samples writes them."""
    shape, views = line.get("shape"), line.get("views")
    if not is_text(line.get("name")) or not re.fullmatch(r"[\w-]{1,99}", line["name"]):
        return False  # a name leads nowhere else
    return is_text(line.get("source")) and (is_text(line.get("error")) or (
        is_text(line.get("sha256")) and are_counts(shape, 4) and isinstance(views, list)
        and all(isinstance(person, dict) and set(VIEWS).issuperset(person) for person in views)))


def are_counts(value, length):
    return isinstance(value, list) and len(value) == length and all(type(n) is int and n > 0 for n in value)


def is_readable(path):
    with contextlib.suppress(OSError, safetensors.SafetensorError), safetensors.safe_open(path, "pt") as file:
        return "text" in file.keys()


def read_settings(folder):
    try:
        settings = json.loads((folder / "settings.json").read_text())
        if settings["version"] != VERSION:
            raise ValueError(f"version {settings['version']}, expected {VERSION}")
        variants, vit = settings["variants"], settings["vit"]
        if not are_counts([variants], 1) or not (vit is None or are_counts(vit, 2)):
            raise ValueError(f"variants {variants} and vit {vit}, expected a number, and two or null")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not an encoded set of this version ({error}): "
                        "make one with `python data.py encode`") from None
    return settings


@torch.no_grad()
def encode_samples(samples, folder, encoders, mask, variants):
    """Write the file of each Sample, one network after the other, since the real ones do not fit into memory
    together; yields index lines, or {"name", "source", "error"} for one that cannot be read."""
    def pictures(sample, k, view):
        """[variants, 3, h, w], the same at every call."""
        picture = sample.people[k][view]()
        if not mask:
            return picture[None]
        seed = int(hashlib.sha256(f"{sample.name}-{k}-{view}".encode()).hexdigest()[:15], 16)
        generator = torch.Generator().manual_seed(seed)
        return torch.stack([mask_regions(picture, mask, encoders.mask_block, generator)
                            for _ in range(variants)])
    text = encoders.text([sample.caption for sample in samples])
    features, errors = {}, {}
    for sample in samples:
        for k, views in enumerate(sample.people):
            try:
                if "front" in views and encoders.vit_shape:
                    features[sample.name, k] = encoders.features(pictures(sample, k, "front")).half()
            except UserError as error:
                errors[sample.name] = str(error)
    for sample, tokens in zip(samples, text):
        tensors = {"text": tokens[:int(tokens.any(dim=1).nonzero().max()) + 1].half()}
        try:
            if sample.name in errors:
                raise UserError(errors[sample.name])
            tensors["latents"] = pack(encoders.encode(sample.read_video()[None])[0], encoders.latent_dtype)
            for k, views in enumerate(sample.people):
                if (sample.name, k) in features:
                    tensors[f"vit.{k}"] = features[sample.name, k]
                for view in views:
                    refs = [encoders.encode(p[None, :, None])[0, :, 0] for p in pictures(sample, k, view)]
                    tensors[f"refs.{k}.{view}"] = pack(torch.stack(refs), encoders.latent_dtype)
        except UserError as error:
            yield {"name": sample.name, "source": sample.source, "error": str(error)}
            continue
        sha256 = write_sample(folder, sample.name, tensors)
        yield {"name": sample.name, "source": sample.source, "sha256": sha256,
               "bytes": sample_path(folder, sample.name).stat().st_size, "caption": sample.caption,
               "shape": list(tensors["latents"].shape), "views": sample.cross}
    encoders.drop()


def write_sample(folder, name, tensors):
    """Write a sample's file, whole or not at all; returns its sha256."""
    path = sample_path(folder, name)
    path.parent.mkdir(exist_ok=True)
    # not save_file, whose own temporary files no lock would sweep up
    content = safetensors.torch.save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()})
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)
    return hashlib.sha256(content).hexdigest()
