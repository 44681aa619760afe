"""Encoded sets: clips, references and captions, once through the frozen networks, so that training reads
latents only. Mv2ID's region masks are painted here, before any network sees a reference.

`python data.py encode` makes one of a manifest; the toy world makes its own.
"""
import concurrent.futures
import contextlib
import json
import sys
import zlib
from pathlib import Path

import safetensors.torch
import torch

from networks.encoders import WanEncoders
from rope import VIEWS
from support.processes import World
from support.script import (Parser, UserError, atomic_file, count, fingerprint, fraction, frame_rate,
                            in_range, lock, nonempty, probe_writable, progress, uses_bf16)
from videos.manifest import Samples
from videos.pictures import from_bytes, picture_size, to_bytes

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
    size-th, and asks for no other.

    samples   a sequence; one that cannot be had raises UserError when it is asked for
    settings  JSON-able; a set that was made with others is refused
    mask      region masking: this fraction of each reference is hidden before any network sees it
    variants  differently masked versions of each reference
    The process that ends last writes index.jsonl and failed.jsonl, with reasons, in the order of `samples`.
    Returns how many are encoded and how many failed; None while others work.
    """
    folder = Path(folder)
    settings = {"schema": "harmoview encoded set", "version": VERSION, "mask": mask,
                "variants": variants if mask else 1, "vit": encoders.vit_shape, **settings}
    open_set(folder, settings, rank)
    if not sample_path(folder, "empty").exists():
        write_sample(folder, "empty", {"text": encoders.text([""])[0].half()})
    mine, lines, todo, done = range(rank, len(samples), size), [], {}, []
    with progress(None, "encoding", "clips", total=len(mine), show=rank == 0) as bar:
        for number in mine:
            try:
                sample = samples[number]
                name = fingerprint(sample.name, sample.stamp, settings)
                lines.append({"name": name, "source": sample.source, "people": sample.ids, "shape": None,
                              "views": sample.cross})
                if not sample_path(folder, name).exists():
                    todo[name] = sample
            except UserError as error:
                lines.append({"source": f"sample {number + 1}", "error": str(error)})
                print(f"left out: {error}", file=sys.stderr)
            # so many at a time, as each network is loaded once for them
            if len(todo) == 64 or len(lines) == 4096 or number == mine[-1]:
                failed = encode_samples(todo, folder, encoders, settings) if todo else {}
                done += [finished(line, failed, folder) for line in lines]
                bar.update(len(lines))
                lines, todo = [], {}
    # a part is of these samples and settings: one that an earlier run left is of no use
    key = fingerprint(settings, len(samples), getattr(samples, "key", None))
    parts = [folder / f"part-{n}-of-{size}-{key}.jsonl" for n in range(size)]
    return write_index(folder, done, len(samples), parts, parts[rank])


def open_set(folder, settings, rank):
    """Make a new set's folder, or look whether the one there was made with these settings."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "settings.json").exists():
        visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
        if visible and not sample_path(folder, "empty").exists():
            raise UserError(f"{folder} holds files, and is no encoded set: give another --out")
        with atomic_file(folder / "settings.json") as path:
            path.write_text(json.dumps(settings, indent=1))
    stored = read_settings(folder)
    if different := [f"{name} {stored.get(name)} there, {value} here" for name, value in settings.items()
                     if stored.get(name) != value]:
        raise UserError(f"{folder} was encoded with other settings ({'; '.join(different)}): "
                        "give the same, or another --out")
    for part in folder.glob(f"part-{rank}-of-*-*.jsonl"):  # of a run that others did not end
        part.unlink(missing_ok=True)


def finished(line, failed, folder):
    """A line of the index, or with the reason why there is none, as it is written."""
    if reason := failed.get(line.get("name")):
        line = {"name": line["name"], "source": line["source"], "error": reason}
    elif "error" not in line:
        line["shape"] = shape_of(folder, line["name"])
    return json.dumps(line) + "\n"


def names_in(folder):
    """The names of the samples whose files are in the set."""
    return {path.stem for path in folder.glob("??/[!.]*.safetensors")}


def write_index(folder, lines, total, parts, mine):
    """Write this process's lines into the file `mine`, one of `parts`, and once all of these are there,
    index.jsonl and failed.jsonl of them."""
    names, failed, unknown = set(), 0, False
    with lock(folder, wait=True):
        with atomic_file(mine) as path:
            path.write_text("".join(lines))
        if not all(part.exists() for part in parts):
            return None
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(part)) for part in parts]
            index, without = (stack.enter_context(open(stack.enter_context(atomic_file(folder / name)), "w"))
                              for name in ("index.jsonl", "failed.jsonl"))
            for number in range(total):
                line = json.loads(files[number % len(parts)].readline())
                unknown = unknown or "name" not in line
                if line.get("name") in names:
                    line = {"source": line["source"], "error": "the same clip, caption and pictures again"}
                if "error" not in line:
                    names.add(line["name"])
                failed += "error" in line
                (without if "error" in line else index).write(json.dumps(line) + "\n")
        if not unknown:  # else files may be of a sample that cannot be had for once
            remove_unused(folder, names_in(folder) - names - {"empty"})
        for part in folder.glob("part-*-of-*.jsonl"):
            part.unlink()
    return len(names), failed


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
    text, failed = encoders.text([sample.caption for sample in named.values()]), {}
    tensors = {name: {"text": tokens[:int(tokens.any(dim=1).nonzero().max()) + 1].half()}
               for name, tokens in zip(named, text)}

    def pictures(name, views=VIEWS):
        """{(person, view): [variants, 3, h, w]} of a Sample, the same at every call."""
        return {(k, view): variants_of(read(), (name, k, view), settings, encoders.mask_block)
                for k, person in enumerate(named[name].people) for view, read in person.items()
                if view in views}

    def inputs(read):
        """Yield the samples' names and what `read` gives of each; of the next one meanwhile."""
        def attempt(name):
            try:
                return name, read(name)
            except UserError as error:
                failed[name] = str(error)
                progress.write(f"{named[name].source} is left out: {error}", file=sys.stderr)
        yield from filter(None, prefetch(map(attempt, [name for name in named if name not in failed])))
    if encoders.vit_shape:
        for name, fronts in inputs(lambda name: pictures(name, ("front",))):
            for (k, _), variants in fronts.items():
                tensors[name][f"vit.{k}"] = encoders.features(variants).half()
    for name, (video, references) in inputs(lambda name: (named[name].read_video(), pictures(name))):
        found = tensors.pop(name)
        found["latents"] = pack(encoders.encode(video[None])[0], encoders.latent_dtype)
        for (k, view), variants in references.items():
            latents = [encoders.encode(picture[None, :, None])[0, :, 0] for picture in variants]
            found[f"refs.{k}.{view}"] = pack(torch.stack(latents), encoders.latent_dtype)
        write_sample(folder, name, found)
    encoders.drop()
    return failed


def variants_of(picture, key, settings, block):
    """A picture [3, h, w] -> [variants, 3, h, w], each with regions masked as `key` decides."""
    if not settings["mask"]:
        return picture[None]
    generator = torch.Generator().manual_seed(int(fingerprint(*key)[:15], 16))
    return torch.stack([mask_regions(picture, settings["mask"], block, generator)
                        for _ in range(settings["variants"])])


def prefetch(items):
    """Yield the items of an iterator, each prepared by a thread while the one before it is in use."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        end = object()
        following = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield item


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
def main(argv):
    p = Parser(prog="data.py encode", description="a manifest's clips, once through Wan's frozen "
               "networks, or the toy's (--wan toy); restartable, spread by torchrun")
    add = p.add_argument
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
    args = p.parse_args(argv)
    if args.wan == "toy":
        from videos.toy import encode_films  # which imports this file
        return encode_films(args)
    encode_manifest(args)


def networks_of(encoders, folder):
    """What tells the networks of a set from others: their contents, or, where an older version made the set,
    their sizes."""
    if (folder / "settings.json").is_file() and read_settings(folder).get("networks") == encoders.sizes():
        return encoders.sizes()
    return encoders.contents()


def encode_manifest(args):
    if bad := [f"{h}x{w}" for h, w in args.size if h < 16 or w < 16 or h % 16 or w % 16]:
        raise UserError(f"--size {' '.join(bad)}: expected multiples of 16")
    if bad := [str(n) for n in args.frames if n % 4 != 1]:
        raise UserError(f"--frames {' '.join(bad)}: expected 4n+1, such as 81")
    world = World.here()
    dtype = torch.bfloat16 if uses_bf16(world.device, args.precision) else torch.float32
    encoders = WanEncoders(args.wan, world.device, dtype, args.offload, args.tile)
    samples = Samples(args.data, args.size, args.frames, args.fps)
    out = Path(args.out or f"{args.data}/encoded")
    settings = {"size": sorted(map(list, args.size)), "frames": sorted(args.frames), "fps": args.fps,
                "networks": networks_of(encoders, out), "tile": args.tile, "precision": str(dtype)}
    probe_writable(out)
    done = encode(samples, out, encoders, settings, args.mask, args.mask_variants, world.rank, world.size)
    if done is None:
        print(f"process {world.rank} of {world.size} is done; the one that ends last writes the set's list")
    else:
        encoded, failed = done
        left_out = f"{failed} left out (failed.jsonl has the reasons)"
        if not encoded:
            raise UserError(f"{out}: no clip is encoded, {left_out}")
        print(f"{out}: {encoded} clips encoded, {left_out}")
