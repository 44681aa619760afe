"""Speed and memory of the network, on random latents and random weights; nothing is downloaded.

  python bench.py forward --config 1.3b       times a forward: seconds, tokens/s, model TFLOP/s, peak memory
  python bench.py train --config 1.3b --recompute --compile       the same of a training step
  python bench.py references --config 1.3b    a forward with joint, one-way and kept references, side by side
  python bench.py dry-run --ckpt 1.3b         memory by phase and FLOPs of a video, from shapes only
  python bench.py plan --config 1.3b          memory, TFLOP and hours of training, by --train and cards

On a new GPU run, in this order and each under ten minutes (LOG.md has what was expected of an H200):
  python kernels.py --out out/kernels.json
  python bench.py train --config 1.3b --frames 81 --size 480x832 --recompute --compile
  python bench.py forward --config 14b --frames 81 --size 480x832 --compile
  pytest && torchrun train.py --stage all && python eval.py
"""
from argparse import Namespace
from dataclasses import replace

import torch
from torch.utils.benchmark import Timer

import sample
import train
from kernels import use_fused
from model import CHOICES, CONFIGS, PATCH, HarmoView
from networks.encoders import UMT5, DINOv2, WanEncoders, WanVAE, check_tile
from networks.lora import NEW_PREFIXES, TRAINS, new_names, set_trained
from rope import VIEWS
from support.monitor import GIB, peak_memory
from support.optimizers import make_optimizers
from support.processes import compile_blocks
from support.script import Parser, UserError, autocast, count, in_range, nonempty, uses_bf16
from videos import toy
from videos.pictures import frame_count, picture_size, view_of

H200_TFLOPS = 989  # its peak in bf16
PLANNED_TFLOPS = 400  # of training, our goal on an H200 (not measured)
SHARDS = (2, 4, 8, 16, 32)  # cards


def random_inputs(config, shape, batch, device, people=1):
    """x, t, text, refs, vit for timing: people with all views. shape (C, T, H, W): a video's latents."""
    def normal(*sizes):
        return torch.randn(batch, *sizes, device=device)
    refs = [{view: normal(shape[0], *shape[2:]) for view in VIEWS} for _ in range(people)]
    vit = [normal(config.vit_levels, 17, config.vit_dim) for _ in refs] if config.vit_dim else None
    return normal(*shape), torch.full((batch,), 500.0, device=device), normal(64, config.text_dim), refs, vit


def count_tokens(T, H, W, people=1):
    """Tokens of a video's latents of this size, and of the references of people with four views each."""
    return [pictures * (H // PATCH) * (W // PATCH) for pictures in (T, people * len(VIEWS))]


def seconds(fn, calls):
    """Mean of `calls` calls; torch's timer warms up with two more, and waits for the GPU."""
    return Timer("fn()", globals={"fn": fn}, num_threads=torch.get_num_threads()).timeit(calls).mean


def report_speed(step, model, shape, batch, passes, device, dtype):
    """Time step() and print a table. passes: 1 for inference, 3 for training (backward costs two forwards);
    model TFLOP/s are passes times HarmoView.flops a second, recomputation is not counted."""
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()  # making the model in float32 does not count
    tokens = sum(count_tokens(*shape[1:]))
    print(f"{batch} x {tokens:,} tokens, seven times", flush=True)
    took, memory = seconds(step, 5), peak_memory()
    rate = passes * batch * model.flops(*count_tokens(*shape[1:])) / took / 1e12
    n = 8192 if gpu else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    matmul = 2 * n**3 / seconds(lambda: a @ a, 10) / 1e12
    print(f"{took:.3g} seconds a step, {batch * tokens / took:,.0f} tokens/s")
    print(f"{rate:.3g} model TFLOP/s, {rate / matmul:.0%} of this machine's {dtype} matmul ({matmul:.3g})"
          + (f", {rate / H200_TFLOPS:.0%} of an H200's {H200_TFLOPS}" if gpu else ""))
    print(f"peak memory {memory:.1f} GiB")


def set_up(args):
    """The network of --config with random weights, its device and dtype, and a clip's shape (C, T, H, W)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, default = CONFIGS[args.config], toy.WORLDS[args.config]
    frames, size = args.frames or default["frames"], args.size or (default["size"], default["size"])
    codec = WanEncoders if config.is_wan else toy.ToyCodec(default["size"])
    if config.is_wan:
        sample.check_wan_size(frames, size)
    elif not all(side and side % (PATCH * codec.stride) == 0 for side in size):
        raise UserError(f"--size {size[0]}x{size[1]}: expected multiples of {PATCH * codec.stride}")
    print("kernels:", use_fused(False if args.no_fused else None))
    with device:
        model = HarmoView(config)
    for p in model.parameters():  # a GPU multiplies the zeros that a new model starts with faster
        torch.nn.init.normal_(p.data, std=0.02)
    model.recompute = args.recompute
    if args.compile:
        compile_blocks(model)
    dtype = torch.bfloat16 if uses_bf16(device, args.precision) else torch.float32
    return model, device, dtype, codec.latent_shape(frames, size)


@torch.no_grad()
def time_references(args):
    """A forward as sampling makes it, side by side: joint references, one-way ones, and one-way ones whose
    keys and values were kept; with --people times four views."""
    model, device, dtype, shape = set_up(args)
    inputs, model = random_inputs(model.config, shape, args.batch, device, args.people), model.to(dtype)
    video, references = count_tokens(*shape[1:], args.people)
    print(f"{args.batch} x {video:,} tokens of video and {references:,} of references")
    cache, rows = {}, []
    for words, attention, kept in (("joint", "joint", None), ("one-way", "one-way", None),
                                   ("one-way, kept", "one-way", cache)):
        model.config = replace(model.config, reference_attention=attention)
        with autocast(device, args.precision):
            took = seconds(lambda: model(*inputs, kept), 5)
        rows.append((words, took, model.flops(video, references, cached=kept is cache)))
    for words, took, flops in rows:
        print(f"{words:14}{took:9.3g} s, {rows[0][1] / took:5.2f} x as fast as joint; "
              f"by FLOPs {rows[0][2] / flops:5.2f} x")
    size = sum(x.numel() * x.element_size() for pair in cache.values() for x in pair)
    print(f"kept: {size / 1e9:.3g} GB")


def time_network(args, training):
    """Forwards, or whole training steps: forward, backward, clipping and optimizers."""
    model, device, dtype, shape = set_up(args)
    config = model.config
    x, t, text, refs, vit = random_inputs(config, shape, args.batch, device)
    recipe = train.TRAIN_RECIPES[args.config]
    flags = dict(optimizer="adamw" if config.is_wan else "muon", weight_decay=0.01, new_lr=recipe["adamw_lr"])
    optimizers = make_optimizers(model, Namespace(**flags | recipe), new_names(model))
    noise = torch.randn_like(x)

    @torch.no_grad()
    def forward():
        with autocast(device, args.precision):
            model(x, t, text, refs, vit)

    def training_step():
        with autocast(device, args.precision):
            loss = train.loss_of(model, (x, text, refs, vit), t / 1000, noise)
        loss.backward()  # outside, as train.py's: what recomputes casts weights anew there
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if training:
        report_speed(training_step, model, shape, args.batch, 3, device, dtype)
    else:
        report_speed(forward, model.to(dtype), shape, args.batch, 1, device, dtype)


def count_parameters(module, prefixes=""):
    return sum(p.numel() for name, p in module.named_parameters() if name.startswith(prefixes))


def dry_run(args):
    """Print modules, parameters, memory by phase and FLOPs a step, from shapes only."""
    config, experts, kind = CONFIGS.get(args.ckpt), 1, "wan2.1"
    if not config:
        found = sample.find(args.ckpt)
        config, experts, kind = found.config, len(found.networks), found.kind
    if args.reference_attention:
        config = replace(config, reference_attention=args.reference_attention)
    if not config.is_wan:
        raise UserError(f"--ckpt {args.ckpt}: the dry run is for Wan's sizes; the toy runs in seconds")
    recipe, frames, (H, W) = sample.SAMPLE_RECIPES[kind], args.frames or 81, args.size or (480, 832)
    sample.check_wan_size(frames, (H, W))
    check_tile(args.tile)
    people = [dict(map(view_of, files)) for files in args.refs or ()]
    if len(people) > config.max_identities:
        raise UserError(f"{len(people)} people (one --refs each): expected at most {config.max_identities}")
    with torch.device("meta"):
        networks = {"transformer": HarmoView(config), "umT5": UMT5(), "VAE": WanVAE(), "ViT": DINOv2()}
    parameters = {name: count_parameters(network) for name, network in networks.items()}
    new = count_parameters(networks["transformer"], NEW_PREFIXES)
    notes = {"transformer": f", {new:,} of them HarmoView's own; x {experts} expert(s)"}
    for name, n in parameters.items():
        print(f"{name:12}{n:>16,} parameters{notes.get(name, '')}")
    video, four = count_tokens(*WanEncoders.latent_shape(frames, (H, W))[1:])
    per_frame = four // len(VIEWS)  # tokens of one latent frame or reference
    proxies = len(people) * len(VIEWS) * config.proxy_tokens  # where no view is given
    references = proxies + sum(map(len, people)) * (per_frame - config.proxy_tokens)
    tokens, one_way = video + references, config.reference_attention == "one-way"
    scale = recipe["guide_text"][0]
    weights = sample.guidance_weights(scale, recipe["guide_refs"] if people else None)
    branches = [n for weight, n in zip(weights, (references, proxies, proxies)) if weight]
    tflop = [networks["transformer"].flops(video, n, cached=one_way) / 1e12 for n in branches]
    print(f"{frames} frames of {H}x{W}: {video:,} tokens, with references {tokens:,}")
    kept = [2 * 2 * config.num_layers * config.dim * n * one_way for n in branches]  # keys and values in bf16
    if one_way:
        print(f"one-way references: their keys and values are computed once and kept, {kept[0] / 1e9:.1f} GB"
              f" for given views, {sum(kept[1:]) / 1e9:.1f} GB for the proxies of guidance")
    held = {name: 2 * n for name, n in parameters.items()}  # bytes on the GPU, in bf16
    if args.offload:
        for name in ("transformer", "umT5"):
            held[name] -= 2 * count_parameters(networks[name].blocks[1:])
    hidden = tokens * (3 * 4 * config.dim + 2 * (4 * config.dim + 2 * config.ffn_dim))
    # four frames at the VAE's full width, of which it holds 10 and 12.5 (measured on a CPU)
    pixels = 4 * 4 * 96 * min(H, args.tile or H) * min(W, args.tile or W)
    phases = {"umT5, bf16": held["umT5"], "VAE encode, float32": 2 * held["VAE"] + 10 * pixels,
              "ViT, bf16": held["ViT"], "denoising, bf16": held["transformer"] + hidden + sum(kept),
              "VAE decode, float32": 2 * held["VAE"] + 12.5 * pixels}
    print("expected memory, one phase after the other (weights exact, activations estimated):")
    for phase, size in phases.items():
        print(f"  {phase:22}{size / GIB:6.1f} GiB")
    print(f"{tflop[0]:,.0f} TFLOP a forward, {len(tflop)} forwards a step with guidance, "
          f"{sum(tflop):,.0f} TFLOP a step, {recipe['steps']} steps")


def plan(args):
    """Print the memory of a training step on each of N cards, and its TFLOP, for everything that --train
    offers; from shapes only. Weights and what the optimizer holds are exact, activations an estimate."""
    config, recipe, (H, W) = CONFIGS[args.config], train.TRAIN_RECIPES[args.config], args.size
    sample.check_wan_size(args.frames, args.size)
    video, references = count_tokens(*WanEncoders.latent_shape(args.frames, args.size)[1:], args.people)
    tokens = video + references
    # a block keeps its input in float32 and the outputs of two attentions; the one that is computed again
    # holds about 27 D + 4 F bytes a token (3.0 GB at 39,000 tokens of 1.3b)
    kept = config.num_layers * tokens * 8 * config.dim
    activations = kept + tokens * (27 * config.dim + 4 * config.ffn_dim)
    print(f"{args.config}, {args.frames} frames of {H}x{W}, {args.people} person(s) of four views, "
          f"{tokens:,} tokens; GiB on a card with --recompute")
    cards = "".join(f"  --shard {n:2}" for n in SHARDS)
    print(f"train     trained parameters  TFLOP a clip     1 card{cards}")
    for what in TRAINS:
        with torch.device("meta"):
            model = HarmoView(config)
            set_trained(model, what, args.rank, torch.bfloat16)
        total = count_parameters(model)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        # float32: weight, gradient, average, two moments; and bf16 copies while it computes
        one = trained * (5 * 4 + 2) + (total - trained) * 2 + activations
        gathered = 3 * 2 * count_parameters(model.blocks[0]) + activations
        needs = [one] + [(20 * trained + 4 * (total - trained)) / n + gathered for n in SHARDS]
        # a frozen weight needs no gradient: two thirds of the work
        passes, forward = 3 if what == "all" else 2, model.flops(video, references) / 1e12
        print(f"{what:8}{trained:>20,}{passes * forward:>14,.0f}"
              + "".join(f"{n / GIB:>11,.0f}" for n in needs))
    hours = [steps * recipe["batch"] * 3 * forward / PLANNED_TFLOPS / 3600 for steps in recipe["steps"]]
    print(f"stages 1 to {len(hours)} of {recipe['steps']} steps of {recipe['batch']} clips with --train all, "
          f"at {PLANNED_TFLOPS} TFLOP/s a card: {', '.join(f'{h:,.0f}' for h in hours)} card hours")


def main(argv=None):
    p = Parser(prog="eval.py speed", description=__doc__)
    what = p.add_subparsers(dest="what", required=True, metavar="train|forward|references|dry-run|plan")
    for name, help in (("train", "time training steps"), ("forward", "time forwards"),
                       ("references", "time forwards with joint and one-way references")):
        speed = what.add_parser(name, help=help).add_argument
        speed("--config", default="toy", choices=CONFIGS, help="a preset of model.CONFIGS")
        speed("--frames", type=frame_count, help="of a clip (default: the toy's; for Wan 17)")
        speed("--size", type=picture_size, help="HEIGHTxWIDTH (default: the toy's; for Wan 256x256)")
        speed("--batch", type=in_range(int, 1, 1024, "1 to 1024 samples"), default=1, help="of a forward")
        for flag in ("--recompute", "--compile", "--no-fused"):
            speed(flag, action="store_true", help="as in train.py")
        speed("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="as train.py's")
        if name == "references":
            speed("--people", type=in_range(int, 1, 2, "1 or 2"), default=1, help="with four views each")
    dry = what.add_parser("dry-run", help="memory and FLOPs of sample.py at Wan's sizes").add_argument
    dry("--ckpt", type=nonempty, default="1.3b", help="a preset of model.CONFIGS, or a folder of Wan's size")
    dry("--refs", nargs="+", action="append", help="one person's views, as a_front.png; not read")
    dry("--frames", type=frame_count, help="frames (default: 81)")
    dry("--size", type=picture_size, help="HEIGHTxWIDTH in pixels (default: 480x832)")
    dry("--offload", action="store_true", help="as in sample.py")
    dry("--tile", type=count, help="as in sample.py")
    dry("--reference-attention", choices=CHOICES["reference_attention"], help="(default: --ckpt's own)")
    how = what.add_parser("plan", help="memory and FLOPs of train.py at Wan's sizes").add_argument
    how("--config", default="1.3b", choices=[name for name in CONFIGS if CONFIGS[name].is_wan],
        help="a preset of model.CONFIGS")
    how("--frames", type=frame_count, default=81, help="frames of a clip")
    how("--size", type=picture_size, default="480x832", help="HEIGHTxWIDTH in pixels")
    how("--people", type=in_range(int, 1, 2, "1 or 2"), default=1, help="in the clip, with four views each")
    how("--rank", type=count, default=32, help="of --train lora")
    args = p.parse_args(argv)
    if args.what == "dry-run":
        return dry_run(args)
    if args.what == "plan":
        return plan(args)
    if args.what == "references":
        return time_references(args)
    time_network(args, args.what == "train")
