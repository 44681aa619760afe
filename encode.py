"""Encoded sets: clips, references and captions, once through the frozen networks, so that training reads
latents only. Mv2ID's region masks are painted here, before any network sees a reference.

`python data.py encode` makes one of a manifest; the toy world makes its own.
"""
import json
import sys
import zlib
from pathlib import Path

import safetensors.torch
import torch

from checkpoint import (UserError, atomic_file, count, fingerprint, fraction, frame_rate, in_range, lock,
                        nonempty, probe_writable, progress, read_lines, uses_bf16)
from encoders import WanEncoders
from manifest import samples_of
from parallel import World
from pictures import from_bytes, picture_size, to_bytes

# An encoded set is a folder: settings.json, index.jsonl with a line a sample, and a file each, which holds
# "latents" [C, T, H, W], "text" [S, E] at its true length, and for person k "refs.k.VIEW" [variants, C, h,
# w] and, of the frontal view, "vit.k" [variants, levels, tokens, width]. The sample "empty" has the text of
# an empty caption. A line's "views" are, for each person, {view: is it from another clip}.
# A file's name is a hash of all that it depends on: a restart skips what is there, a changed input gets a new
# file, and processes never meet.
VERSION = 3


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
    """Encode those of the Samples whose files are not in the set yet; process `rank` of `size` takes every
    size-th.

    settings  JSON-able; a set that was made with others is refused
    mask      region masking: this fraction of each reference is hidden before any network sees it
    variants  differently masked versions of each reference
    Each process that ends writes index.jsonl, in the order of `samples`, with all that is there by then, and
    failed.jsonl, with reasons. Returns how many are encoded and how many failed; None while others work.
    """
    folder = Path(folder)
    settings = {"schema": "harmoview encoded set", "version": VERSION, "mask": mask,
                "variants": variants if mask else 1, "vit": encoders.vit_shape, **settings}
    folder.mkdir(parents=True, exist_ok=True)
    new = not (folder / "settings.json").exists()
    stored = settings if new else read_settings(folder)
    if different := [f"{name} {stored.get(name)} there, {value} here" for name, value in settings.items()
                     if stored.get(name) != value]:
        raise UserError(f"{folder} was encoded with other settings ({'; '.join(different)}): "
                        "give the same, or another --out")
    named = {fingerprint(sample.name, sample.stamp, settings): sample for sample in samples}
    there, mine = names_in(folder), list(named)[rank::size]  # cut before anything is left out: all cut alike
    todo = [name for name in mine if name not in there]
    if new or "empty" not in there:
        write_sample(folder, "empty", {"text": encoders.text([""])[0].half()})
        with atomic_file(folder / "settings.json") as path:
            path.write_text(json.dumps(settings, indent=1))
    failed = {}
    with progress(None, "encoding", "clips", total=len(todo), show=rank == 0) as bar:
        for first in range(0, len(todo), 64):  # so many at a time, as each network is loaded once for them
            batch = {name: named[name] for name in todo[first:first + 64]}
            failed |= encode_samples(batch, folder, encoders, settings)
            bar.update(len(batch))
    with lock(folder, wait=True):
        return write_index(folder, named, set(mine), failed)


def names_in(folder):
    """The names of the samples whose files are in the set."""
    return {path.stem for path in folder.glob("??/[!.]*.safetensors")}


def write_index(folder, named, mine, failed):
    """Write index.jsonl and failed.jsonl: of the samples `mine` this process knows how it went, of the others
    what is in the folder. named: {name: Sample}; failed: {name: reason}"""
    there = names_in(folder)
    shapes = {line["name"]: line["shape"] for line in read_lines(folder / "index.jsonl")}
    reasons = {line["name"]: line["error"] for line in read_lines(folder / "failed.jsonl")}
    reasons = {name: reason for name, reason in reasons.items() if name not in mine} | failed
    lines, without = [], []
    for name, sample in named.items():
        line = {"name": name, "source": sample.source}
        if name in there:
            shape = shapes.get(name) or shape_of(folder, name)
            lines.append(line | {"people": sample.ids, "shape": shape, "views": sample.cross})
        elif name in reasons:
            without.append(line | {"error": reasons[name]})
    for name, entries in (("index", lines), ("failed", without)):
        with atomic_file(folder / f"{name}.jsonl") as path:
            path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    if len(lines) + len(without) < len(named):
        return None
    remove_unused(folder, there - named.keys() - {"empty"})
    return len(lines), len(without)


def remove_unused(folder, names):
    """Files that no sample has any more are listed in unused.txt, and go when the next run finds them still
    unused: a manifest whose videos were out of reach for once does not cost its latents."""
    path = folder / "unused.txt"
    listed = set(path.read_text().split()) if path.exists() else set()
    for name in names & listed:
        sample_path(folder, name).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    if left := sorted(names - listed):
        path.write_text("\n".join(left))
        print(f"{folder}: {len(left)} files are of no sample any more (unused.txt), the next run removes "
              "them")


def read_settings(folder):
    try:
        settings = json.loads((folder / "settings.json").read_text())
        if settings["version"] != VERSION:
            raise ValueError(f"version {settings['version']}, expected {VERSION}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not an encoded set of this version ({error}): "
                        "make one with `python data.py encode`") from None
    return settings


@torch.no_grad()
def encode_samples(named, folder, encoders, settings):
    """Write the file of each Sample, one network after the other, since the real ones do not fit into memory
    together -> {name: reason} of those that cannot be read. named: {name: Sample}"""
    def pictures(name, k, view):
        """[variants, 3, h, w], the same at every call."""
        picture = named[name].people[k][view]()
        if not settings["mask"]:
            return picture[None]
        generator = torch.Generator().manual_seed(int(fingerprint(name, k, view)[:15], 16))
        return torch.stack([mask_regions(picture, settings["mask"], encoders.mask_block, generator)
                            for _ in range(settings["variants"])])

    def add_features(tensors, name, sample):
        for k, views in enumerate(sample.people):
            if "front" in views and encoders.vit_shape:
                tensors[f"vit.{k}"] = encoders.features(pictures(name, k, "front")).half()

    def add_latents(tensors, name, sample):
        tensors["latents"] = pack(encoders.encode(sample.read_video()[None])[0], encoders.latent_dtype)
        for k, views in enumerate(sample.people):
            for view in views:
                refs = [encoders.encode(p[None, :, None])[0, :, 0] for p in pictures(name, k, view)]
                tensors[f"refs.{k}.{view}"] = pack(torch.stack(refs), encoders.latent_dtype)
        write_sample(folder, name, tensors)
    text, failed = encoders.text([sample.caption for sample in named.values()]), {}
    tensors = {name: {"text": tokens[:int(tokens.any(dim=1).nonzero().max()) + 1].half()}
               for name, tokens in zip(named, text)}
    for add in (add_features, add_latents):
        for name, sample in named.items():
            try:
                if name not in failed:
                    add(tensors[name], name, sample)
            except UserError as error:
                failed[name] = str(error)
                progress.write(f"{sample.source} is left out: {error}", file=sys.stderr)
    encoders.drop()
    return failed


def checksum(tensor):
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy())


def write_sample(folder, name, tensors):
    """Write a sample's file, whole or not at all, with a checksum of each tensor."""
    path = sample_path(folder, name)
    path.parent.mkdir(exist_ok=True)
    tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    sums = json.dumps({key: checksum(tensor) for key, tensor in tensors.items()})
    with atomic_file(path) as temporary:  # not save_file, whose own temporary files no lock would sweep up
        temporary.write_bytes(safetensors.torch.save(tensors, {"checksums": sums}))


def read_sample(folder, name, keys):
    """{key: tensor} of a sample. Raises OSError, ValueError or SafetensorError where its file is damaged."""
    with safetensors.safe_open(sample_path(folder, name), "pt") as file:
        sums = json.loads((file.metadata() or {}).get("checksums", "{}"))
        tensors = {key: file.get_tensor(key) for key in keys}
    for key, tensor in tensors.items():
        if checksum(tensor) != sums.get(key):
            raise ValueError(f"{key} does not fit its checksum")
    return tensors


def shape_of(folder, name):
    """The shape of a sample's latents."""
    with safetensors.safe_open(sample_path(folder, name), "pt") as file:
        return file.get_slice("latents").get_shape()


# -------------------------------------------------------------------------------------------------------- CLI
def encode_flags(parser):
    """`python data.py encode`"""
    add = parser.add_argument
    add("--data", required=True, type=nonempty, help="folder with manifest.jsonl")
    add("--wan", required=True, type=nonempty, metavar="DIR", help="a Wan checkpoint's folder: its encoders")
    add("--out", type=nonempty, help="folder of the encoded set (default: encoded, in --data)")
    add("--size", type=picture_size, nargs="+", default=[(480, 832)], help="HEIGHTxWIDTH; of several, the "
        "nearest in shape is a clip's (default: 480x832)")
    add("--frames", type=count, nargs="+", default=[81], help="4n+1; the largest that fits (default: 81)")
    add("--fps", type=frame_rate, default=16, help="frames per second")
    add("--mask", type=fraction, default=0.0, help="region masking: share of a reference hidden (Mv2ID: 0.6)")
    add("--mask-variants", type=in_range(int, 1, 100, "1 to 100"), default=4, help="masked versions of each")
    add("--offload", action="store_true", help="umT5 stays in CPU memory, block by block on the GPU")
    add("--tile", type=count, help="pixels a side that the VAE works on at a time, for example 256")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="of umT5 and the ViT")


def encode_manifest(args):
    if bad := [f"{h}x{w}" for h, w in args.size if h < 16 or w < 16 or h % 16 or w % 16]:
        raise UserError(f"--size {' '.join(bad)}: expected multiples of 16")
    if bad := [str(n) for n in args.frames if n % 4 != 1]:
        raise UserError(f"--frames {' '.join(bad)}: expected 4n+1, such as 81")
    world = World.here()
    dtype = torch.bfloat16 if uses_bf16(world.device, args.precision) else torch.float32
    encoders = WanEncoders(args.wan, world.device, dtype, args.offload, args.tile)
    samples = samples_of(args.data, args.size, args.frames, args.fps)
    settings = {"size": sorted(map(list, args.size)), "frames": sorted(args.frames), "fps": args.fps,
                "networks": encoders.sizes, "tile": args.tile, "precision": str(dtype)}
    out = Path(args.out or f"{args.data}/encoded")
    probe_writable(out)
    done = encode(samples, out, encoders, settings, args.mask, args.mask_variants, world.rank, world.size)
    if done:
        encoded, failed = done
        left_out = f"{failed} left out (failed.jsonl has the reasons)"
        if not encoded:
            raise UserError(f"{out}: no clip is encoded, {left_out}")
        print(f"{out}: {encoded} clips encoded, {left_out}")
