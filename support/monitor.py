"""How a training is doing: metrics.jsonl, validation on fixed cases, loss.svg, and sample sheets.

A line of metrics.jsonl is of training (loss, gradient norm, seconds a step, tokens and TFLOP a second, peak
memory, share of the time spent waiting for data) or of a validation (losses of the averaged weights).
"""
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from support.charts import plot
from support.processes import TORCHRUN
from support.script import ROOT, UserError, atomic_file, autocast, read_lines

GIB = 2**30
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)  # noise levels of a validation, of the law that training draws from
PATIENCE = 3000  # seconds for a sample sheet; the other processes wait for an hour at most
VALID_CLIPS = 4  # of each kind, in a validation


def peak_memory():
    """GiB that this process held at most: of the GPU's memory, or of the CPU's; nan on Windows."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (GIB if sys.platform == "darwin" else 2**20)


class Metrics:
    """metrics.jsonl of a stage, from a step on; lines after it, from a run that went further, are dropped."""

    def __init__(self, folder, step, model, world, passes=3):
        """passes: forwards that a step costs, its backward included; frozen weights need no gradient"""
        self.model, self.world, self.passes, self.file = model, world, passes, None
        if world.rank == 0:
            path = folder / "metrics.jsonl"
            lines = [line for line in read_lines(path)
                     if isinstance(line.get("step"), int) and line["step"] <= step]
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
            self.file = open(path, "a")
        self.reset()

    def reset(self):
        self.steps = self.seconds = self.waited = self.tokens = self.flops = 0

    def next(self, batches):
        """A step begins: the next of an iterator."""
        self.began = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - self.began
        return batch

    def step_ends(self):
        self.seconds += time.perf_counter() - self.began
        self.steps += 1

    def count(self, x0, refs):
        """The work of a forward and backward: tokens, and FLOPs without recomputation."""
        video, references = self.model.count_tokens(x0, refs)
        self.tokens += len(x0) * (video + references)
        self.flops += self.passes * len(x0) * self.model.flops(video, references)

    def speed(self):
        """What a step took since the last call."""
        line = {"seconds": self.seconds / self.steps,
                "tokens_per_s": self.world.size * self.tokens / self.seconds,
                "tflops_per_process": self.flops / self.seconds / 1e12, "memory_gib": peak_memory(),
                "waiting": self.waited / self.seconds}
        self.reset()
        return {name: round(value, 4) for name, value in line.items()}

    def write(self, **line):
        if self.file:
            print(json.dumps(without_nan(line)), file=self.file, flush=True)


def without_nan(value):
    """A value as JSON can hold it: None for what is not finite, in dicts too."""
    if isinstance(value, dict):
        return {name: without_nan(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Validation:
    """Losses on fixed clips with fixed noise, of people that training does not see: by noise level, by number
    of views, with two people, and without references, which shows how far the base's prior has drifted."""

    def __init__(self, dataset, given, world, training):
        """dataset: a Dataset without text dropout; given: {a name: the views of each person}; training: the
        Dataset that is trained on; what no clip of it has is not measured"""
        self.dataset, self.world, folder = dataset, world, dataset.folder
        if shared := sorted(map(str, self.dataset.ids & training.ids)):
            raise UserError(f"--valid {folder} shows people of the training set: {', '.join(shared[:3])}"
                            f"{', ...' if shared[3:] else ''}; give a set of other people")
        self.cases = {}
        for name, views in given.items():
            bucket = self.dataset.sampler.having(views)
            if bucket and training.sampler.views.issuperset(views[0]):
                clips = bucket.clips[::max(1, len(bucket.clips) // VALID_CLIPS)][:VALID_CLIPS].tolist()
                self.cases[name] = views, clips, bucket
        if not self.cases:
            raise UserError(f"{folder} holds no clip of one or two people: give another --valid")
        for views, clips, bucket in self.cases.values():  # damage is found now, not at the first validation
            for clip in clips:
                self.dataset.sample(clip, views, bucket)
        if self.dataset.broken:
            raise UserError(f"{folder} holds damaged clips: encode it again, or give another --valid")

    @torch.no_grad()
    def losses(self, loss_of, model, levels, precision):
        """{"t 995": loss, ..., "no references": loss, ...}, the same for any number of processes, each of
        which makes every size-th case. Where there are fewer cases than processes, some are made twice, since
        sharded weights need all processes in every forward."""
        sigmas = [levels.quantile(q) for q in QUANTILES]
        found = torch.zeros(len(self.cases), len(sigmas), VALID_CLIPS, dtype=torch.float64)
        for g, (views, clips, bucket) in enumerate(self.cases.values()):
            for first in range(0, len(clips), self.world.size):
                case = first + self.world.rank
                clip = clips[case % len(clips)]
                generators = [torch.Generator().manual_seed(clip)]
                batch = self.dataset.batch(views, [clip], bucket, generators, self.world.device)
                for s, sigma in enumerate(sigmas):
                    generator = torch.Generator().manual_seed(clip + 10**6 * s)
                    noise = torch.randn(batch[0].shape[1:], generator=generator)[None].to(self.world.device)
                    sigma = torch.tensor([sigma], device=self.world.device)
                    with autocast(self.world.device, precision):
                        loss = loss_of(model, batch, sigma, noise)
                    if case < len(clips):
                        found[g, s, case] = loss.double()
        if self.world.size > 1:
            found = found.to(self.world.device)
            dist.all_reduce(found)
        counts = [len(clips) for _, clips, _ in self.cases.values()]
        means = torch.stack([part[:, :n].mean(1) for part, n in zip(found.cpu(), counts)])  # [given, sigma]
        return ({f"t {1000 * sigma:.0f}": loss for sigma, loss in zip(sigmas, means.mean(0).tolist())} |
                dict(zip(self.cases, means.mean(1).tolist())))


@contextlib.contextmanager
def averaged(model, weights, averages):
    """Inside this block the model runs with its EMA weights. Both are {name: tensor}."""
    @torch.no_grad()
    def swap():
        for name, p in weights.items():
            kept = p.detach().clone()
            p.copy_(averages[name])
            averages[name].copy_(kept)
        for module in model.modules():  # FSDP may still hold weights gathered before the swap
            if isinstance(module, FSDPModule):
                module.reshard()
    swap()
    yield
    swap()


# --------------------------------------------------------------------------------------------------- loss.svg
def draw_losses(out, stage):
    """Write loss.svg of a run: training's loss and the validations', over all steps up to this stage's.
    Those of later stages, if there are any, are an older run's."""
    curves, labels, start = {}, {}, 0
    for path in [Path(out, f"stage{number}", "metrics.jsonl") for number in range(1, stage + 1)]:
        lines = [line for line in read_lines(path) if isinstance(line.get("step"), int)]
        if not lines:
            continue
        labels[start] = path.parent.name
        for line in lines:
            values = {"training": line.get("loss")} | (line.get("valid") or {})
            for name, value in values.items():
                if isinstance(value, float) and 0 < value < math.inf and not name.startswith("t "):
                    curves.setdefault(name, {})[start + line["step"]] = math.log10(value), math.nan, math.nan
        start += max(line["step"] for line in lines)
    heading = "Loss over steps: training, and the averaged weights on people it never saw"
    if picture := plot(heading, labels, curves, log=True):
        with atomic_file(Path(out) / "loss.svg") as path:
            path.write_text(picture.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n")


# ----------------------------------------------------------------------------------------------------- sheets
def write_sheet(folder, step, last, args, config, shape):
    """What a user would run on the newest checkpoint of a stage, as a process of its own, since training does
    not import sample.py; for Wan of the set's commonest shape [C, T, H, W] in latents. There is none for Wan
    without prompts, none of sharded weights before a stage's end, and none of one expert alone."""
    prompts = ["--prompts", args.sample_prompts] if args.sample_prompts else []
    if args.no_samples or args.expert or config.is_wan and not prompts or args.shard and not last:
        return
    name = folder / ("sample" if last else f"sample-{step:06d}")
    if config.is_wan:  # 4n+1 frames a latent of 8 pixels a side
        _, T, H, W = shape
        prompts += ["--frames", str(4 * T - 3), "--size", f"{8 * H}x{8 * W}"]
    alone = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    torch.cuda.empty_cache()
    missing = f"no sample sheet {name}.png:"
    command = [sys.executable, ROOT / "sample.py", *prompts, "--ckpt", folder, "--out", name]
    try:
        if code := subprocess.run(command, env=alone, timeout=PATIENCE).returncode:
            print(f"{missing} sample.py ended with {code}, training goes on", file=sys.stderr)
    except subprocess.TimeoutExpired:
        print(f"{missing} it took over {PATIENCE // 60} minutes and was ended; give fewer --sample-prompts, "
              "or --no-samples", file=sys.stderr)
