"""LoRA (Hu et al., arXiv 2106.09685): adapters to train, and public files for Wan to merge.

  add_lora, merge_lora   y = W x + b + B (A x) in every Linear of the blocks, with A [rank, in], B [out, rank]
  apply_lora             the LoRA files that people share, in all the ways they name their keys
"""
import argparse
import json
import math
import re
from pathlib import Path

import safetensors
import torch
import torch.nn as nn
import torch.nn.functional as F

from networks.weights import ROLES, original_name, read_weights, role_of
from support.script import UserError, as_user_error


NEW_PREFIXES = ("proxies", "mfi.")  # parameters that HarmoView adds to Wan
TRAINS = ("all", "new", "lora")  # what of a network trains, see set_trained


# --------------------------------------------------------------------------------------------------- training
def new_names(model):
    """The names of the parameters that no Wan checkpoint holds."""
    return [name for name, _ in model.named_parameters()
            if name.startswith(NEW_PREFIXES) or name.endswith(("lora_A", "lora_B"))]


def set_trained(model, what, rank=0, frozen=torch.float32):
    """What of a network trains: "all"; "new", the parameters that Wan lacks; or "lora", those and adapters of
    that rank beside the blocks' matrices. The others are stored as `frozen`."""
    if what == "lora":
        add_lora(model, rank)
    new = set(new_names(model))
    for name, p in model.named_parameters():
        p.requires_grad_(what == "all" or name in new)
        if not p.requires_grad:
            p.data = p.data.to(frozen)


class LoraLinear(nn.Linear):
    """A Linear with lora_A [rank, in] and lora_B [out, rank], float32 beside a weight of any dtype."""

    def forward(self, x):
        low = F.linear(x, self.lora_A.to(x.dtype))  # [..., rank]
        return F.linear(x, self.weight, self.bias) + F.linear(low, self.lora_B.to(low.dtype))


def add_lora(model, rank):
    """Give every Linear of model's blocks an adapter: q, k, v, o of both attentions and ffn.0, ffn.2.

    The network computes what it did, as B is zero; alpha is the rank, so the scale is 1. No name changes and
    the base's parameters stay the same objects, trained or frozen as before. The new ones are lora_A and
    lora_B of each Linear. For weights from a file: load Wan's before this, and adapters after it.
    """
    for linear in model.blocks.modules():
        if isinstance(linear, nn.Linear):
            assert type(linear) is nn.Linear, "these blocks have adapters already"
            linear.__class__ = LoraLinear  # a new module would change names, or lose hooks
            like = dict(device=linear.weight.device, dtype=torch.float32)
            linear.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, **like))
            linear.lora_B = nn.Parameter(torch.empty(linear.out_features, rank, **like))
    init_lora(model)


@torch.no_grad()
def init_lora(model):
    """Adapters that change nothing yet: A random, B zero. A model from the meta device needs it once more."""
    for linear in model.modules():
        if isinstance(linear, LoraLinear):
            linear.lora_A.normal_(std=linear.in_features**-0.5)
            linear.lora_B.zero_()


@torch.no_grad()
def merge_lora(model):
    """Fold the adapters into the weights, in place, and leave plain Linears."""
    for linear in model.modules():
        if isinstance(linear, LoraLinear):
            linear.weight.copy_(with_product(linear.weight, linear.lora_B, linear.lora_A))
            del linear.lora_A, linear.lora_B
            linear.__class__ = nn.Linear


def with_product(weight, up, down, scale=1.0):
    """weight + scale * up @ down in float32, of weight's shape, which may be a convolution's."""
    matrix, up, down = (t.float().reshape(len(t), -1) for t in (weight, up, down))
    return matrix.addmm(scale * up, down).view(weight.shape)  # addmm's alpha lets a NaN pass


# ----------------------------------------------------------------------------------------------- public files
# of PEFT, wrappers and ComfyUI, diffusers, kohya
PREFIXES = r"base_model\.model\.|(?:module|model|diffusion_model|dit|transformer|transformer_2)\.|lora_unet_"
LOW = re.compile(r"(?:base_model\.model\.)?transformer_2\.")  # diffusers' name of the expert for low noise
# how a key ends: what it holds, and which parameter of its layer that changes
KINDS = {
    "lora_A": ("down", "weight"), "lora_down": ("down", "weight"), "alpha": ("alpha", "weight"),
    "lora_B": ("up", "weight"), "lora_up": ("up", "weight"),
    # whole differences, which the distilled adapters of lightx2v and CausVid have beside their pairs
    "diff": ("diff", "weight"), "diff_b": ("diff", "bias"), "lora_B.bias": ("diff", "bias"),
    "diff_m": ("diff", "modulation")}
KEY = re.compile(rf"(?:{PREFIXES})*(?P<layer>.+?)\.(?P<kind>{'|'.join(map(re.escape, KINDS))})")


@torch.no_grad()
def apply_lora(model, path, scale=1.0, role=None):
    """Merge a LoRA file for Wan into model's weights, in place, weight by weight.

    role  which of two experts model is, "high" or "low": of a file for both it gets its own half

    Keys may be in Wan's, diffusers', PEFT's or kohya's style. A pair adds scale * alpha / rank * up @ down,
    where alpha is the pair's own, or the one of all pairs that diffusers or PEFT noted, or else the rank.
    A difference adds scale * diff.
    Returns how many weights (and biases) changed, and the keys that fit nothing here.
    Raises UserError for a damaged file, one for another network, and values that are not finite. Names and
    shapes are checked before anything changes, values on the way: after that error model is half merged.
    """
    file, found, unknown = check_lora(model, path, role)
    common_alpha, changed = noted_alpha(Path(path), role), 0
    for name, keys in found.items():
        if keys.keys() == {"alpha"}:  # changes nothing alone
            continue
        weight = model.get_parameter(name)
        parts = {what: read_float(file, key).to(weight.device) for what, key in keys.items()}
        total = weight.float()
        if "down" in parts:
            rank = len(parts["down"])
            alpha = parts["alpha"].item() if "alpha" in parts else common_alpha or rank
            total = with_product(total, parts["up"], parts["down"], scale * alpha / rank)
        if "diff" in parts:
            total = total + scale * parts["diff"]
        if not total.to(weight.dtype).isfinite().all():
            raise UserError(f"{path}: {name!r} would not be finite with {', '.join(keys.values())}: "
                            "the file is damaged, or the scale too large")
        weight.copy_(total)
        changed += 1
    return changed, unknown


def check_lora(model, path, role=None):
    """Check a LoRA file's names and shapes; model may be on the meta device. -> the WeightFile, {parameter's
    name: {what it holds: key}}, keys that fit nothing."""
    file = read_weights(path)
    found, unknown = sort_keys(model, file, role)
    for name, keys in found.items():
        check_shapes(file, keys, list(model.get_parameter(name).shape))
    if all(keys.keys() == {"alpha"} for keys in found.values()):
        raise UserError(f"{path}: none of its {len(file.shapes)} keys fits: {str([*file.shapes][:2])[:99]}; "
                        "expected a LoRA for Wan's text-to-video ('blocks.0.self_attn.q.lora_A.weight', ...)")
    return file, found, unknown


def sort_keys(model, file, role):
    """-> {parameter's name in model: {what it holds: key}} in the file's order, and keys that fit nothing."""
    for_low = list(filter(LOW.match, file.shapes))
    if for_low and not role:
        raise UserError(f"{file.path} is for two experts ({for_low[0]!r}); this checkpoint is one network")
    layers = {name.replace(".", "_"): name for name, _ in model.named_modules()}  # kohya's have no dots
    parameters, found, unknown = dict(model.named_parameters()), {}, []
    for key in file.shapes:
        if for_low and (role == "low") != bool(LOW.match(key)):
            continue  # the other expert's
        if re.search("dora_scale|lora_magnitude_vector", key):
            raise UserError(f"{file.path}: {key!r} is of a DoRA, which does not merge here; expected a LoRA")
        match = KEY.fullmatch(key.replace(".default.", ".").removesuffix(".weight"))
        what, leaf = KINDS[match["kind"]] if match else (None, None)
        layer = original_name(match["layer"] + ".").replace(".", "_")[:-1] if match else None
        name = f"{layers.get(layer)}.{leaf}"
        if name not in parameters:
            unknown.append(key)
            continue
        other = found.setdefault(name, {}).setdefault(what, key)
        if other != key:
            raise UserError(f"{file.path}: {other!r} and {key!r} both change {name!r}, expected one of them")
    return found, unknown


def check_shapes(file, keys, shape):
    """UserError where what is for one parameter is incomplete or does not have its shape."""
    if ("down" in keys) != ("up" in keys):
        raise UserError(f"{file.path}: {keys.get('down') or keys['up']!r} came without its other half, "
                        "expected both lora_A and lora_B (lora_down and lora_up): download the file again")
    rank = max((1, *file.shapes[keys["down"]][:1])) if "down" in keys else 1
    expected = {"down": [rank, math.prod(shape[1:])], "up": [shape[0], rank], "alpha": [1], "diff": shape}
    for what, key in keys.items():
        came, want = list(file.shapes[key]) or [1], expected[what]
        # halves may have more dimensions: [rank, in, 1, 2, 2] of a convolution
        fits = came == want if what == "diff" else came[0] == want[0] and math.prod(came) == math.prod(want)
        if not fits:
            raise UserError(f"{file.path}: {key!r} is {came}, expected {want}: is it for another network?")


def read_float(file, key):
    with as_user_error(file.path):
        tensor = file.get(key)
        if not tensor.is_floating_point() and not key.endswith(".alpha"):
            raise UserError(f"{key!r} is {tensor.dtype}, expected floats: use a file that is not quantised")
        return tensor.float()


def noted_alpha(path, role=None):
    """The alpha of all pairs, where diffusers noted one in the file's header or PEFT beside the file."""
    config, beside = {}, path.with_name("adapter_config.json")
    with as_user_error(path):
        if path.stem == "adapter_model" and beside.is_file():
            config = json.loads(beside.read_text())
        elif path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                config = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        half = "transformer_2." if role == "low" and any(map(LOW.match, config)) else "transformer."
        config = {name.removeprefix(half): value for name, value in config.items()}
        alpha = config.get("lora_alpha")
        others = ["alpha_pattern", "use_rslora", "use_dora"] + ["lora_bias"] * (alpha != config.get("r"))
        others = [name for name in others if config.get(name)]
        if others or type(alpha) not in (int, float, type(None)):
            raise UserError(f"made with lora_alpha {str(alpha)[:40]} and {', '.join(others) or 'no more'}; "
                            "expected one number lora_alpha for all pairs, which scales them by alpha / rank")
        return alpha and float(alpha)


def experts_of(path, given, roles):
    """Which of two experts a LoRA file is merged into: the one that was `given`, or those whose names begin
    its keys, or the one in its own name, or both. roles: ("high", "low"), or (None,) for one network."""
    if given or roles == (None,):
        return (given,)
    low = [bool(LOW.match(key)) for key in read_weights(path).shapes]
    if any(low):
        return ROLES if not all(low) else ROLES[1:]
    if role := role_of(path):
        print(f"{path}: merged into the expert for {role} noise, as its name says; high= or low= before it "
              "says otherwise")
        return (role,)
    return ROLES


def check_loras(loras, roles, networks):
    """--lora's (file, scale, expert or None) -> (file, scale, roles of the networks that it is merged into).
    UserError where one does not fit; says which expert gets none. networks: for each role, a function that
    returns it, perhaps on the meta device."""
    if roles == (None,) and any(given for _, _, given in loras):
        raise UserError("--lora high= and low= are for two experts, and this checkpoint is one network")
    loras = [(file, scale, experts_of(file, given, roles)) for file, scale, given in loras]
    for role, network in zip(roles, networks):
        mine = [file for file, _, experts in loras if role in experts]
        for file in mine:
            check_lora(network(), file, role)
        if loras and not mine:
            print(f"no --lora is for the expert for {role} noise, which stays as it is")
    return loras


def read_lora_argument(text):
    """A type for add_argument: "[high=|low=]FILE[:SCALE]" -> path, scale (1 without one), and its expert:
    "high", "low" or None. What follows a colon and is no number is part of the path."""
    role, equals, path = text.partition("=")
    if not equals or role not in ROLES:
        role, path = None, text
    file, colon, number = path.rpartition(":")
    try:
        path, scale = (file, float(number)) if colon else (path, 1.0)
    except ValueError:
        scale = 1.0
    if not path.strip() or not math.isfinite(scale):
        raise argparse.ArgumentTypeError(f"got {text[:80]!r}, expected FILE or FILE:SCALE, a finite number, "
                                         "after high= or low= where it is for one expert")
    return path, scale, role
