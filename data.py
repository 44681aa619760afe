"""What a training step is made of: which views it gets, how much noise, batches from an encoded set.

  python data.py import mead --root SET --out DIR   a public set, or a trainer's folder, as a manifest
  python data.py encode --data DIR --wan WAN      a manifest's clips, once through Wan's frozen networks
  python data.py show --data DIR                  a summary of a set, and a contact sheet of a sample

Clips are encoded once, so the training loop reads latents only. The toy and Wan have the same encoded sets.
"""
import collections
import concurrent.futures
import functools
import math
import os
import random
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn as nn
from tqdm import tqdm

import importers
import manifest
from checkpoint import (Parser, UserError, as_user_error, count, fraction, frame_rate, in_range, nonempty,
                        probe_writable, read_lines, run_script, sha256_of, uses_bf16)
from encode import encode, is_sound, read_settings, sample_path, unpack
from encoders import WanEncoders
from pictures import picture_size
from rope import VIEWS


# ------------------------------------------------------------------------------------ which views a step gets
def draw_views(stage, progress, rng, available=VIEWS):
    """Which reference views each person of this step gets.

    stage      a row of train.STAGES
    progress   0..1 through the stage, which moves the dropout from drop[0] to drop[1]
    available  the views that the training set has
    returns    one tuple of view names per person; all samples of a step share it, so shapes and work are
               equal on all ranks. A person is without views only where all are (all_drop).
    """
    if stage.views == "none" or rng.random() < stage.all_drop:
        return ((),) * rng.choice(stage.people)
    candidates = ("front",) if stage.views == "front" else available
    drop = stage.drop[0] + (stage.drop[1] - stage.drop[0]) * progress

    def one_person():
        views = tuple(v for v in candidates
                      if rng.random() >= (stage.drop_front if v == "front" else drop))
        return views or (rng.choice(candidates),)
    return tuple(one_person() for _ in range(rng.choice(stage.people)))


def noise_of(shape, generators):
    """Normal noise [B, *shape], each sample's from its own torch.Generator."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def shifted(sigma, shift):
    """Noise levels in 0..1 after the timestep shift: more than 1 moves them to more noise."""
    return shift * sigma / (1 + (shift - 1) * sigma)


class NoiseLevels(NamedTuple):
    """How sigma is drawn for a training sample: logit-normal or uniform, then shifted. An expert's slice of
    the shifted levels, low <= sigma < high, is cut out: what lies outside is drawn again, so that inside it
    the law is as it was."""
    shift: float
    kind: str = "logit-normal"
    low: float = 0.0
    high: float = math.inf

    def draw(self, generator):
        while True:
            u = (torch.rand if self.kind == "uniform" else torch.randn)((), generator=generator)
            sigma = shifted(u if self.kind == "uniform" else u.sigmoid(), self.shift)
            if self.low <= sigma < self.high:
                return sigma

    def share(self):
        """Share of all draws that the slice holds."""
        return self.below(min(self.high, 1)) - self.below(self.low)

    def below(self, sigma):
        """Share of all draws, the slice's or not, that lie below sigma."""
        u = sigma / (self.shift - (self.shift - 1) * sigma)
        if self.kind == "uniform" or u in (0, 1):
            return u
        return NormalDist().cdf(math.log(u / (1 - u)))

    def quantile(self, q):
        """The sigma below which a share q of the slice's draws lies."""
        p = self.below(self.low) + q * self.share()
        u = p if self.kind == "uniform" else 1 / (1 + math.exp(-NormalDist().inv_cdf(p)))
        return shifted(u, self.shift)


# ------------------------------------------------------------------------------------------------ the dataset
class Dataset:
    """Batches from an encoded set. Samples are drawn in an order that (seed, epoch) decides, and all that is
    random in one comes from a generator of its own, so batches are the same for any number of ranks and
    micro-batches. A sample that cannot be read is named once, and the next one with its views stands in.

    text_dropout  share of the samples that lose their caption
    front_only    no other view is ever drawn
    """

    def __init__(self, folder, text_dropout=0.1, front_only=False):
        self.folder, self.text_dropout = Path(folder), text_dropout
        self.settings = read_settings(self.folder)
        lines = read_lines(self.folder / "index.jsonl")
        self.index = [line for line in lines if is_sound(line) and "error" not in line]
        if lost := len(lines) - len(self.index):
            print(f"{folder}/index.jsonl: {lost} of {len(lines)} lines are damaged, left out: encode again")
        if not self.index:
            raise UserError(f"{folder} holds no encoded sample: see the output of `python data.py encode`")
        self.people = sorted({len(entry["views"]) for entry in self.index})
        self.views = ["front"] if front_only else [
            v for v in VIEWS if any(v in person for e in self.index for person in e["views"])]
        with as_user_error(sample_path(self.folder, "empty")):
            self.empty = self.load("empty", ["text"])["text"]
        # samples drawn so far by group (a tuple of numbers); views that the same samples have share one order
        self.taken = collections.Counter()
        self.checked, self.broken = set(), set()

    def draw(self, stage, progress, rng, batch, seed):
        """What one step trains on: its views, as from draw_views, and the numbers of `batch` samples of one
        shape that have them. Call it for every step from a stage's first one on, in order.

        stage  a row of train.STAGES; with probability stage.cross only samples are drawn whose references
               are all from other clips, where there are any
        """
        views = draw_views(stage, progress, rng, self.views)
        cross = rng.random() < stage.cross
        by_shape = self.having(views, cross) or self.having(views, False)
        if not by_shape:  # nobody has all of these: those that one sample has
            entry = rng.choice([entry for entry in self.index if len(entry["views"]) == len(views)])
            views = tuple(tuple(v for v in names if v in person)
                          or tuple(v for v in self.views if v in person)
                          for names, person in zip(views, entry["views"]))
            by_shape = self.having(views, False)
        shape = rng.choices(list(by_shape), [len(members) for members in by_shape.values()])[0]
        members = by_shape[shape]
        start = self.taken[members]
        self.taken[members] += batch
        return views, [shuffled(members, seed, n // len(members))[n % len(members)]
                       for n in range(start, start + batch)]

    @functools.lru_cache(maxsize=1000)
    def having(self, views, cross):
        """{shape: numbers} of the samples with as many people and at least these views of each, if cross
        from other clips."""
        def fits(person, names):
            return all(view in person and (person[view] or not cross) for view in names)
        by_shape = {}
        for n, entry in enumerate(self.index):
            if len(entry["views"]) == len(views) and all(map(fits, entry["views"], views)):
                by_shape.setdefault(tuple(entry["shape"]), []).append(n)
        return {shape: tuple(members) for shape, members in by_shape.items()}

    def load(self, name, keys, sha256=None):
        path = sample_path(self.folder, name)
        if sha256 and sha256_of(path) != sha256:
            raise ValueError("its sha256 is not the one in index.jsonl")
        with safetensors.safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in keys}

    def sample(self, number, views):
        """The tensors of a sample that these views need, or of the next one where it is damaged."""
        keys = ["latents", "text"]
        for k, names in enumerate(views):
            keys += [f"refs.{k}.{view}" for view in names]
            if "front" in names and self.settings["vit"]:
                keys.append(f"vit.{k}")
        while True:
            entry = self.index[number]
            try:
                if number not in self.broken:
                    sha256 = None if number in self.checked else entry["sha256"]  # read whole at first only
                    tensors = self.load(entry["name"], keys, sha256)
                    self.check_shapes(tensors, entry)
                    self.checked.add(number)
                    return tensors
            except (OSError, ValueError, safetensors.SafetensorError) as error:
                tqdm.write(f"sample {entry['name']} ({entry['source']}) is damaged ({error}) and left out: "
                           "delete its file and encode again")
                self.broken.add(number)
            members = self.having(views, False)[tuple(entry["shape"])]
            others = [n for n in members if n not in self.broken]
            if not others:
                raise UserError(f"{self.folder}: no whole sample is left for views {views}: encode it again")
            number = min((n for n in others if n > number), default=others[0])

    def check_shapes(self, tensors, entry):
        """ValueError where tensors of a sample are not as index.jsonl and settings.json say."""
        for key, tensor in tensors.items():
            found, expected = list(tensor.shape), entry["shape"] if key == "latents" else None
            if key.startswith("refs."):
                found, expected = found[:1], [self.settings["variants"]]
            if key.startswith("vit."):
                found, expected = found[:2] + found[3:], [self.settings["variants"], *self.settings["vit"]]
            if expected and found != expected:
                raise ValueError(f"{key} is {found}, expected {expected}")

    def batch(self, views, numbers, generators, device):
        """views and numbers from draw, one torch.Generator a sample -> latents x0 [B, C, T, H, W],
        text [B, S, E], refs, vit, the last two as HarmoView.forward takes them."""
        samples = [self.sample(number, views) for number in numbers]
        text, variants = [], []
        for sample, generator in zip(samples, generators):
            dropped = torch.rand((), generator=generator) < self.text_dropout
            text.append((self.empty if dropped else sample["text"]).float())
            variants.append(int(torch.randint(self.settings["variants"], (), generator=generator)))
        refs, vit = [], []
        for k, names in enumerate(views):
            latents = {view: [s[f"refs.{k}.{view}"][v] for s, v in zip(samples, variants)] for view in names}
            refs.append({view: unpack(torch.stack(some)).to(device) for view, some in latents.items()})
            vit.append(None)
            if "front" in names and f"vit.{k}" in samples[0]:
                features = torch.stack([s[f"vit.{k}"][v] for s, v in zip(samples, variants)])
                vit[k] = features.float().to(device)
        x0 = unpack(torch.stack([sample["latents"] for sample in samples])).to(device)
        return x0, nn.utils.rnn.pad_sequence(text, batch_first=True).to(device), refs, vit

    def check(self, config):
        """UserError where a network of this DiTConfig cannot train on the set."""
        found = {"in_dim": self.index[0]["shape"][0], "text_dim": self.empty.shape[1]}
        if config.vit_dim:
            found |= dict(zip(("vit_levels", "vit_dim"), self.settings["vit"] or (0, 0)))
        wrong = [f"{name} {value}, the network has {getattr(config, name)}" for name, value in found.items()
                 if value != getattr(config, name)]
        if wrong:
            raise UserError(f"{self.folder} is encoded with {'; '.join(wrong)}: encode with other networks")


@functools.lru_cache(maxsize=16)
def shuffled(members, seed, epoch):
    members = list(members)
    random.Random(f"{seed}-{epoch}").shuffle(members)
    return members


def prefetch(items):
    """Yield the items of an iterator, each prepared by a thread while the one before it is in use."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        end = object()
        following = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield item


# -------------------------------------------------------------------------------------------------------- CLI
def main(argv=None):
    p = Parser(description=__doc__)
    what = p.add_subparsers(dest="what", required=True, metavar="import|encode|show")
    add = what.add_parser("encode", help="a manifest's clips; restartable, spread by torchrun").add_argument
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
    add = what.add_parser("import", help="a public set's folders as a manifest").add_argument
    add("kind", choices=sorted(importers.KINDS))
    add("--root", required=True, type=nonempty, help="the set's folder; nothing in it is changed")
    add("--out", required=True, type=nonempty, help="folder to write to")
    add("--mirror", action="store_true", help="exchange left and right: the set's are the person's own")
    add = what.add_parser("show", help="summary of a set, contact sheet of a sample").add_argument
    add("--data", required=True, type=nonempty, help="folder with manifest.jsonl")
    add("--index", type=in_range(int, 0, 10**9, "a number from 0 on"), default=0, help="which clip")
    add("--out", type=nonempty, default="out/show.png", help="PNG to write")
    args = p.parse_args(argv)
    if args.what == "import":
        return importers.import_set(args.kind, args.root, args.out, args.mirror)
    if args.what == "show":
        return manifest.show(args.data, args.index, Path(args.out))
    if bad := [f"{h}x{w}" for h, w in args.size if h < 16 or w < 16 or h % 16 or w % 16]:
        raise UserError(f"--size {' '.join(bad)}: expected multiples of 16")
    if bad := [str(n) for n in args.frames if n % 4 != 1]:
        raise UserError(f"--frames {' '.join(bad)}: expected 4n+1, such as 81")
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    dtype = torch.bfloat16 if uses_bf16(device, args.precision) else torch.float32
    encoders = WanEncoders(args.wan, device, dtype, args.offload, args.tile)
    samples = manifest.samples_of(args.data, args.size, args.frames, args.fps)
    settings = {"size": sorted(map(list, args.size)), "frames": sorted(args.frames), "fps": args.fps,
                "networks": encoders.sizes}
    out = Path(args.out or f"{args.data}/encoded")
    probe_writable(out)
    if encode(samples, out, encoders, settings, args.mask, args.mask_variants, rank, size):
        encoded, failed = (len(read_lines(out / f"{name}.jsonl")) for name in ("index", "failed"))
        if not encoded:
            raise UserError(f"{out}: no clip is encoded, {failed} left out (failed.jsonl has the reasons)")
        print(f"{out}: {encoded} clips encoded, {failed} left out (failed.jsonl has the reasons)")


if __name__ == "__main__":
    run_script(main, "--tile 256 or --offload")
