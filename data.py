"""What a training step is made of: which views it gets, how much noise, batches from an encoded set.

  python data.py toy --out DIR                    the toy world's clips, references and captions, as files
  python data.py curate --videos DIR --out SET    a folder of videos of people as a manifest
  python data.py import mead --root DIR --out SET a public set, or a trainer's folder, as a manifest
  python data.py encode --data SET --wan WAN      a manifest's clips, once through Wan's frozen networks
  python data.py show --data SET                  a summary of a set, and a contact sheet of its clips

Clips are encoded once, so the training loop reads latents only. The toy and Wan have the same encoded sets.
"""
import array
import collections
import contextlib
import functools
import importlib
import json
import math
import sys
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import safetensors
import torch
import torch.nn as nn

from networks.solvers import shifted
from rope import VIEWS
from support.script import Lines, Parser, UserError, in_range, nonempty, progress, run_script
from videos import manifest
from videos.encode import read_sample, read_settings, sample_path, unpack

DAMAGE = (OSError, ValueError, safetensors.SafetensorError)  # what reading a damaged sample raises

# -------------------------------------------------------------------------- which clips and views a step gets
def draw_views(stage, progress, rng, available):
    """Which reference views each person of a step gets.

    stage      a row of train.STAGES
    progress   0..1 through the stage, which moves the dropout from drop[0] to drop[1]
    available  the views of each person that the step's clips have
    returns    one tuple of view names per person; all samples of a step share it, so shapes and work are
               equal on all ranks. Dropout leaves everybody a view; in a share all_drop of the steps nobody
               has any.
    """
    if rng.random() < stage.all_drop:
        return ((),) * len(available)
    drop = stage.drop[0] + (stage.drop[1] - stage.drop[0]) * progress
    drawn = []
    for views in available:
        views = allowed(views, stage.views)
        kept = tuple(v for v in views if rng.random() >= (stage.drop_front if v == "front" else drop))
        if views and not kept:
            kept = (rng.choice(views),)
        drawn.append(kept)
    return tuple(drawn)


def allowed(views, kind):
    """Of some views, those that a stage of this kind ("none", "front" or "all") gives."""
    return tuple(view for view in views if kind == "all" or view == kind)


class Bucket(NamedTuple):
    """Clips of one shape that share steps."""
    views: tuple  # of each person, those that all of the clips have
    clips: np.ndarray  # their numbers in the set, in order


class Sampler:
    """Draws the clips of a step. Every clip with as many people as a stage shows is drawn equally often,
    whatever the others have: a step takes one bucket, with a probability that is the bucket's size.

    groups      {(shape, for each person ((view, is it from another clip), ...)): numbers of clips}
    front_only  no other view is ever drawn
    """

    def __init__(self, groups, front_only=False):
        self.groups = {key: np.array(numbers) for key, numbers in groups.items()}
        self.front_only = front_only
        self.views = {view for _, persons in groups for person in persons  # that are ever drawn
                      for view in self.usable(dict(person), "all", False)}

    def draw(self, stage, progress, rng, batch):
        """-> the views of a step, as from draw_views, the numbers of its `batch` clips, and their Bucket.
        stage: a row of train.STAGES; rng: a random.Random of this step's own"""
        buckets = self.buckets(stage.views, stage.people, rng.random() < stage.cross, batch)
        bucket, = rng.choices(buckets, [len(bucket.clips) for bucket in buckets])
        places = range(len(bucket.clips))
        places = rng.sample(places, batch) if batch <= len(places) else rng.choices(places, k=batch)
        return draw_views(stage, progress, rng, bucket.views), bucket.clips[places].tolist(), bucket

    @functools.cache
    def buckets(self, kind, people, cross, batch):
        """[Bucket] of a stage of this kind, for these numbers of people. cross: whoever has references from
        other clips is given no others. A bucket with too few clips for a step joins one with fewer views; or
        another small one, and their common views stay."""
        parts, alone = {}, set()
        for (shape, persons), numbers in self.groups.items():
            if len(persons) in people:
                key = shape, tuple(self.usable(dict(person), kind, cross) for person in persons)
                parts.setdefault(key, []).append(numbers)
        found = {key: np.concatenate(arrays) for key, arrays in parts.items()}
        while small := [key for key in found if len(found[key]) < batch and key not in alone]:
            key = max(small, key=count_views)
            joint = {other: shared_views(key, other) for other in found if other != key}
            fits = [other for other, shared in joint.items()
                    if shared and (shared == other or other in small)]
            if not fits:
                alone.add(key)  # its steps have clips twice
                continue
            best = max(fits, key=lambda other: (count_views(joint[other]), len(found[other])))
            arrays = [found.pop(key), found.pop(best)]
            arrays += [found[joint[best]]] if joint[best] in found else []
            found[joint[best]] = np.concatenate(arrays)
        return [Bucket(views, np.sort(numbers)) for (_, views), numbers in found.items()]

    def having(self, views):
        """The largest Bucket of one shape with as many people and at least these views of each, or None."""
        shapes = {}
        for (shape, persons), numbers in self.groups.items():
            if len(persons) == len(views) and all(
                    set(names) <= set(self.usable(dict(person), "all", False))
                    for names, person in zip(views, persons)):
                shapes.setdefault(shape, []).append(numbers)
        found = [np.sort(np.concatenate(parts)) for parts in shapes.values()]
        return Bucket(views, max(found, key=len)) if found else None

    def usable(self, person, kind, cross):
        """Of a person's {view: is it from another clip}, the views that a step may give."""
        views = [view for view in VIEWS if view in person and (view == "front" or not self.front_only)]
        views = allowed(views, kind)
        from_elsewhere = tuple(view for view in views if person[view])
        return from_elsewhere if cross and from_elsewhere else views

    def describe(self, stage, batch):
        """In words, what a stage will draw: how often its rarest and its commonest clip come, and what share
        of the steps gets which views, before dropout. UserError where it has no clip to draw."""
        steps, clips = collections.Counter(), np.zeros(1 + max(map(np.max, self.groups.values())))
        for cross, weight in ((True, stage.cross), (False, 1 - stage.cross)):
            buckets = self.buckets(stage.views, stage.people, cross, batch)
            total = sum(len(bucket.clips) for bucket in buckets)
            for bucket in buckets:
                steps[bucket.views] += weight * len(bucket.clips) / total
                clips[bucket.clips] += weight * batch / total
        drawn = 1000 * clips[clips > 0]
        if not len(drawn):
            raise UserError(f"stage {stage.name} shows {' or '.join(map(str, stage.people))} people, and the "
                            "set has no clip of as many: leave the stage out")
        shares = [f"{' / '.join('+'.join(views) or 'none' for views in persons)} {share:.1%}"
                  for persons, share in steps.most_common(6)]
        more = f" and {len(steps) - 6} others" if len(steps) > 6 else ""
        return (f"{len(drawn):,} clips, each {drawn.min():.3g} to {drawn.max():.3g} times in 1,000 steps; "
                f"views, of the steps: {', '.join(shares)}{more}")


def count_views(key):
    """Of a key of Sampler.buckets, how many references it gives."""
    return sum(map(len, key[1]))


def shared_views(a, b):
    """The key of the clips of two keys of Sampler.buckets, or None where these cannot share a step, or where
    somebody would keep no view."""
    if a[0] != b[0] or len(a[1]) != len(b[1]):
        return None
    shared = tuple(tuple(view for view in x if view in y) for x, y in zip(a[1], b[1]))
    lost = any((x or y) and not kept for x, y, kept in zip(a[1], b[1], shared))
    return None if lost else (a[0], shared)


def noise_of(shape, generators):
    """Normal noise [B, *shape], each sample's from its own torch.Generator."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


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
GIVEN = {"no references": ((),)} | {f"{n} view{'s' * (n > 1)}": (VIEWS[:n],) for n in range(1, 5)}
GIVEN |= {"two people": (("front",), ("front",))}  # the views of a validation's cases


class Dataset:
    """Batches from an encoded set. All that is random in a sample comes from a generator of its own, so they
    are the same for any number of ranks and micro-batches. index.jsonl stays on disk: in memory a clip is a
    number. A sample that is damaged is named once, and the next one of its Bucket stands in.

    text_dropout  share of the samples that lose their caption
    front_only    no other view is ever drawn
    """

    def __init__(self, folder, text_dropout=0.1, front_only=False):
        self.folder, self.text_dropout = Path(folder), text_dropout
        self.settings = read_settings(self.folder)
        self.ids = set()  # who is in the clips, where that is known
        self.lines, groups, lost = Lines(self.folder / "index.jsonl"), {}, 0
        for number, line in enumerate(self.lines):
            try:
                entry = json.loads(line)
                persons = tuple(tuple(person.items()) for person in entry["views"])
                groups.setdefault((tuple(entry["shape"]), persons), array.array("q")).append(number)
                self.ids.update(name for name in entry["people"] if name is not None)
            except (ValueError, LookupError, TypeError, AttributeError):
                lost += 1
        if lost:
            print(f"{folder}/index.jsonl: {lost} of {len(self.lines)} lines are damaged, left out: "
                  "encode again")
        if not groups:
            raise UserError(f"{folder} holds no encoded sample: see the output of `python data.py encode`")
        self.sampler, self.broken = Sampler(groups, front_only), set()
        try:
            self.empty = read_sample(self.folder, "empty", ["text"])["text"]
        except DAMAGE as error:
            raise UserError(f"{sample_path(self.folder, 'empty')} is damaged ({error}): delete it, and "
                            "encode again") from None

    def entry(self, number):
        """A line of index.jsonl."""
        return json.loads(self.lines[number])

    def commonest_shape(self):
        """The shape [C, T, H, W] of most clips' latents."""
        counts = collections.Counter()
        for (shape, _), clips in self.sampler.groups.items():
            counts[shape] += len(clips)
        return counts.most_common(1)[0][0]

    def sample(self, number, views, bucket):
        """The tensors of a sample that these views need, or of the next one in its Bucket."""
        keys = ["latents", "text"]
        for k, names in enumerate(views):
            keys += [f"refs.{k}.{view}" for view in names]
            if "front" in names and self.settings["vit"]:
                keys.append(f"vit.{k}")
        clips, first = bucket.clips, int(np.searchsorted(bucket.clips, number))
        for place in range(first, first + len(clips)):
            number = int(clips[place % len(clips)])
            if number in self.broken:
                continue
            entry = self.entry(number)
            try:
                return read_sample(self.folder, entry["name"], keys)
            except DAMAGE as error:
                progress.write(f"sample {entry['name']} ({entry['source']}) is damaged ({error}) and left "
                               "out: delete its file and encode again")
                self.broken.add(number)
        raise UserError(f"{self.folder}: no whole sample is left for views {views}: encode it again")

    def batch(self, views, numbers, bucket, generators, device):
        """views, numbers and their Bucket from Sampler.draw, one torch.Generator a sample -> latents x0
        [B, C, T, H, W], text [B, S, E], refs, vit, the last two as HarmoView.forward takes them."""
        samples = [self.sample(number, views, bucket) for number in numbers]
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
        found = {"in_dim": next(iter(self.sampler.groups))[0][0], "text_dim": self.empty.shape[1]}
        if config.vit_dim:
            found |= dict(zip(("vit_levels", "vit_dim"), self.settings["vit"] or (0, 0)))
        wrong = [f"{name} {value}, the network has {getattr(config, name)}" for name, value in found.items()
                 if value != getattr(config, name)]
        if wrong:
            raise UserError(f"{self.folder} is encoded with {'; '.join(wrong)}: encode with other networks")


# -------------------------------------------------------------------------------------------------------- CLI
class Kind(NamedTuple):
    """What of a row of train.STAGES decides which clips it draws."""
    name: str
    views: str
    people: tuple
    cross: float


def show_draws(groups, batch=8):
    """Print how steps would draw these groups of clips, were all of one shape."""
    print(f"what steps of {batch} clips draw:")
    for kind in (Kind("front", "front", (1,), 0), Kind("all views", "all", (1, 2), 0),
                 Kind("all views, from other clips where there are any", "all", (1, 2), 1)):
        with contextlib.suppress(UserError):  # there may be no clip of one person
            print(f"  {kind.name}: {Sampler(groups).describe(kind, batch)}")


DOORS = {  # python data.py NAME ...: the module whose main it is
    "toy": "videos.toy", "curate": "videos.curate", "import": "videos.importers", "encode": "videos.encode"}


def main(argv=None, **options):
    """options: further arguments of the main that is called."""
    argv = sys.argv[1:] if argv is None else argv
    p = Parser(description=__doc__, usage="data.py {toy,curate,import,encode,show} ... [--help]")
    p.add_argument("what", choices=[*DOORS, "show"], help="each has its own --help")
    what = p.parse_args(argv[:1]).what
    if what != "show":
        return importlib.import_module(DOORS[what]).main(argv[1:], **options)
    p = Parser(prog="data.py show", description="summary of a set, sheet of its clips, what steps draw")
    p.add_argument("--data", required=True, type=nonempty, help="folder with manifest.jsonl")
    p.add_argument("--index", type=in_range(int, 0, 10**9, "a number from 0 on"),
                   help="this clip alone (default: a page of 20)")
    p.add_argument("--out", type=nonempty, default="out/show.png", help="PNG to write")
    args = p.parse_args(argv[1:])
    show_draws(manifest.show(args.data, args.index, Path(args.out)))


if __name__ == "__main__":
    run_script(main, "a smaller --size or fewer --frames, or --tile 256 or --offload")
