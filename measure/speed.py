"""Speed and memory of the network, on random latents and random weights; nothing is downloaded.

  python eval.py speed forward --config 1.3b     times a forward: tokens/s, model TFLOP/s, peak memory
  python eval.py speed train --config 1.3b --recompute --compile        the same of a training step
  python eval.py speed plan --config 1.3b        memory of sampling and of training, from shapes only

On a new GPU run kernels.py, then both times with --frames 81 --size 480x832 --compile; LOG.md has what was
expected of an H200.
"""
from argparse import Namespace

import torch
from torch.utils.benchmark import Timer

import sample
import train
from kernels import use_fused
from model import CONFIGS, PATCH, HarmoView
from networks.encoders import UMT5, DINOv2, WanEncoders, WanVAE, check_tile
from networks.lora import NEW_PREFIXES, TRAINS, new_names, set_trained
from rope import VIEWS
from support.monitor import GIB, peak_memory
from support.optimizers import make_optimizers
from support.processes import compile_blocks
from support.script import Parser, UserError, autocast, count, in_range, uses_bf16
from videos import toy
from videos.pictures import frame_count, picture_size

H200_TFLOPS = 989  # its peak in bf16
PLANNED_TFLOPS = 400  # of training, our goal on an H200 (not measured)
SHARDS = (2, 4, 8, 16, 32)  # cards


def random_inputs(config, shape, batch, device):
    """x, t, text, refs, vit for timing: one person with all views. shape (C, T, H, W): a video's latents."""
    def normal(*sizes):
        return torch.randn(batch, *sizes, device=device)
    refs = [{view: normal(shape[0], *shape[2:]) for view in VIEWS}]
    vit = [normal(config.vit_levels, 17, config.vit_dim)] if config.vit_dim else None
    return normal(*shape), torch.full((batch,), 500.0, device=device), normal(64, config.text_dim), refs, vit


def count_tokens(T, H, W):
    """Tokens of a video's latents of this size, and of one reference."""
    per_picture = (H // PATCH) * (W // PATCH)
    return T * per_picture, per_picture


def seconds(fn, calls):
    """Mean of `calls` calls; torch's timer warms up with two more, and waits for the GPU."""
    return Timer("fn()", globals={"fn": fn}, num_threads=torch.get_num_threads()).timeit(calls).mean


def set_up(args):
    """The network of --config with random weights, its device and dtype, and a clip's shape (C, T, H, W)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, world = CONFIGS[args.config], toy.WORLDS[args.config]
    frames, size = args.frames or world["frames"], args.size or (world["size"], world["size"])
    codec = WanEncoders
    if not config.is_wan:
        codec = toy.ToyCodec(world["size"])
        if not all(side and side % (PATCH * codec.stride) == 0 for side in size):
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


def time_network(args, training):
    """Time forwards, or whole training steps (forward, backward, clipping and optimizers), and print a table.
    Model TFLOP/s are those of HarmoView.flops; backward costs two forwards, recomputation is not counted."""
    model, device, dtype, shape = set_up(args)
    inputs = random_inputs(model.config, shape, args.batch, device)

    def forward():
        with torch.no_grad(), autocast(device, args.precision):
            model(*inputs)
    run, passes = forward, 1
    if training:
        run, passes = training_step(model, inputs, args), 3
    else:
        model.to(dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # making the model in float32 does not count
    video, reference = count_tokens(*shape[1:])
    references = len(VIEWS) * reference
    tokens = args.batch * (video + references)
    print(f"{args.batch} x {video + references:,} tokens, seven times", flush=True)
    took, memory = seconds(run, 5), peak_memory()
    rate = passes * args.batch * model.flops(video, references) / took / 1e12
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    matmul = 2 * n**3 / seconds(lambda: a @ a, 10) / 1e12
    print(f"{took:.3g} seconds a step, {tokens / took:,.0f} tokens/s, peak memory {memory:.1f} GiB\n"
          f"{rate:.3g} model TFLOP/s: {rate / matmul:.0%} of this machine's {dtype} matmul ({matmul:.3g}), "
          f"{rate / H200_TFLOPS:.0%} of an H200's {H200_TFLOPS}")


def training_step(model, inputs, args):
    """-> a function that makes a step of training."""
    x, t, text, refs, vit = inputs
    recipe, noise = train.TRAIN_RECIPES[args.config], torch.randn_like(x)
    flags = dict(optimizer="adamw" if model.config.is_wan else "muon", weight_decay=0.01,
                 new_lr=recipe["adamw_lr"])
    optimizers = make_optimizers(model, Namespace(**flags | recipe), new_names(model))

    def run():
        with autocast(x.device, args.precision):
            loss = train.loss_of(model, (x, text, refs, vit), t / 1000, noise)
        loss.backward()  # outside, as train.py's: what recomputes casts weights anew there
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return run


# --------------------------------------------------------------------------------------------------- planning
def count_parameters(module, prefixes=""):
    return sum(p.numel() for name, p in module.named_parameters() if name.startswith(prefixes))


def plan(args):
    """Print what sampling and training need at Wan's sizes, from shapes only: weights are exact, activations
    an estimate."""
    check_tile(args.tile)
    config, (H, W) = CONFIGS[args.config], args.size
    video, reference = count_tokens(*WanEncoders.latent_shape(args.frames, args.size)[1:])
    slots, given = len(VIEWS) * args.people, args.views * args.people
    references = given * reference + (slots - given) * config.proxy_tokens
    print(f"{args.config}, {args.frames} frames of {H}x{W}, {args.people} person(s) of {args.views} views: "
          f"{video:,} tokens, with references {video + references:,}")
    plan_sampling(args, config, video, references, slots * config.proxy_tokens)
    plan_training(args, config, video, references)


def plan_sampling(args, config, video, references, proxies):
    """Parameters, memory of each phase in bf16, FLOPs. video, references, proxies (of people without any
    view): tokens"""
    recipe, (H, W) = sample.SAMPLE_RECIPES["wan2.1"], args.size
    with torch.device("meta"):
        networks = {"transformer": HarmoView(config), "umT5": UMT5(), "VAE": WanVAE(), "ViT": DINOv2()}
    parameters = {name: count_parameters(network) for name, network in networks.items()}
    for name, n in parameters.items():
        print(f"{name:12}{n:>16,} parameters")
    print(f"{count_parameters(networks['transformer'], NEW_PREFIXES):,} are HarmoView's own")
    branches = [references, proxies]  # of Wan's guidance: v(text, refs), and v(-, -)
    cached = config.reference_attention == "one-way"
    tflop = [networks["transformer"].flops(video, n, cached=cached) / 1e12 for n in branches]
    kv = [4 * config.num_layers * config.dim * n * cached for n in branches]  # bytes of a bf16 k and v
    if cached:
        print(f"one-way references: their keys and values are computed once and kept, {kv[0] / 1e9:.1f} GB "
              f"for given views, {sum(kv[1:]) / 1e9:.1f} GB for the proxies of guidance")
    on_card = {name: 2 * n for name, n in parameters.items()}  # bytes in bf16
    if args.offload:
        for name in ("transformer", "umT5"):
            on_card[name] -= 2 * count_parameters(networks[name].blocks[1:])
    hidden = (video + references) * (3 * 4 * config.dim + 2 * (4 * config.dim + 2 * config.ffn_dim))
    # four frames at the VAE's full width, of which it holds 10 and 12.5 (measured on a CPU)
    pixels = 4 * 4 * 96 * min(H, args.tile or H) * min(W, args.tile or W)
    phases = {"umT5, bf16": on_card["umT5"], "VAE encode, float32": 2 * on_card["VAE"] + 10 * pixels,
              "ViT, bf16": on_card["ViT"], "denoising, bf16": on_card["transformer"] + hidden + sum(kv),
              "VAE decode, float32": 2 * on_card["VAE"] + 12.5 * pixels}
    print("memory of sampling, one phase after the other:")
    for phase, size in phases.items():
        print(f"  {phase:22}{size / GIB:6.1f} GiB")
    print(f"{tflop[0]:,.0f} TFLOP a forward, {len(tflop)} forwards a step with guidance, "
          f"{sum(tflop):,.0f} TFLOP a step, {recipe['steps']} steps")


def plan_training(args, config, video, references):
    """Memory of a training step on each of N cards, and its TFLOP, for everything that --train offers."""
    recipe, tokens = train.TRAIN_RECIPES[args.config], video + references
    # a block keeps its input in float32 and the outputs of two attentions; the one that is computed again
    # holds about 27 D + 4 F bytes a token (3.0 GB at 39,000 tokens of 1.3b)
    blocks = config.num_layers * tokens * 8 * config.dim
    activations = blocks + tokens * (27 * config.dim + 4 * config.ffn_dim)
    cards = "".join(f"  --shard {n:2}" for n in SHARDS)
    print(f"memory of training, GiB on a card with --recompute:\n"
          f"train     trained parameters  TFLOP a clip     1 card{cards}")
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
    what = p.add_subparsers(dest="what", required=True, metavar="forward|train|plan")
    for name, help in (("forward", "time forwards"), ("train", "time training steps")):
        add = what.add_parser(name, help=help).add_argument
        add("--config", default="toy", choices=CONFIGS, help="a preset of model.CONFIGS")
        add("--frames", type=frame_count, help="of a clip (default: the toy's; for Wan 17)")
        add("--size", type=picture_size, help="HEIGHTxWIDTH (default: the toy's; for Wan 256x256)")
        add("--batch", type=in_range(int, 1, 1024, "1 to 1024 samples"), default=1, help="of a forward")
        for flag in ("--recompute", "--compile", "--no-fused"):
            add(flag, action="store_true", help="as in train.py")
        add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="as train.py's")
    add = what.add_parser("plan", help="memory and FLOPs of sampling and training Wan").add_argument
    add("--config", default="1.3b", choices=[name for name in CONFIGS if CONFIGS[name].is_wan],
        help="a preset of model.CONFIGS; each of Wan2.2's experts is a 14b")
    add("--frames", type=frame_count, default=81, help="frames of a clip")
    add("--size", type=picture_size, default="480x832", help="HEIGHTxWIDTH in pixels")
    add("--people", type=in_range(int, 0, 2, "0 to 2"), default=1, help="with references, in the clip")
    add("--views", type=in_range(int, 1, 4, "1 to 4"), default=4, help="of each of them")
    add("--offload", action="store_true", help="as in sample.py")
    add("--tile", type=count, help="as in sample.py")
    add("--rank", type=count, default=32, help="of --train lora")
    args = p.parse_args(argv)
    if args.what == "plan":
        return plan(args)
    time_network(args, args.what == "train")
