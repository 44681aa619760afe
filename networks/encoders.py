"""The frozen networks around the transformer: what it sees of text, of pictures and of references.
None of them is trained here.

Module trees carry the key names of the released files; NAMES maps those of transformers and diffusers, which
ComfyUI's files have too. The toy world uses the same classes, small and
randomly initialised from a fixed seed (toy.py).
  UMT5               umT5 text encoder, as Wan uses it; its tokenizer is in text.py
  DINOv2             the ViT whose hidden states feed MFI
  WanVAE             Wan2.1's causal video VAE
  WanEncoders        Wan's own, from its checkpoint folder; one after the other, so one is in memory at a time
"""
import itertools
import math
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

from networks.text import Tokenizer
from networks.weights import (check_fit, layers_of, load_weights, read_network, read_weights, release_folder,
                              weight_sets)
from support.script import UserError, fingerprint


# ---------------------------------------------------------------------------------------- loading, offloading
def open_network(kind, files):
    """A UMT5, WanVAE or DINOv2 as wide and deep as its files hold it, on the meta device, and the WeightFile;
    reads no weights. UserError where a name or a shape does not fit."""
    file = read_network(files, kind.NAMES)
    if file.refused:
        raise UserError(file.refused)
    try:
        with torch.device("meta"):
            network = kind.from_shapes(file.shapes)
    except UserError as error:
        raise UserError(f"{file.path} {error}") from None
    except Exception as error:  # tensors of any names and shapes
        raise UserError(f"{file.path} holds no {kind.__name__}: {type(error).__name__} {error} "
                        f"among its {len(file.shapes)} tensors") from None
    check_fit(network, file)
    return network, file


def load_network(kind, files, dtype, device):
    """A frozen UMT5, WanVAE or DINOv2 as wide and deep as its files hold it."""
    network, file = open_network(kind, files)
    return load_weights(network, file, dtype, device).requires_grad_(False).eval()


def find_network(kind, folder):
    """The files of that network in a folder: those that Wan names so, or else what in it, or in its folders
    two levels deep, holds such a network. [] where there is none, and a file that could not be read, as a
    UserError, or None. Raises one where the network does not fit or there are several."""
    named = sorted(path for path in folder.glob(kind.FILE) if path.is_file())
    if len(named) == 1:
        return named, None
    found, misfits, unread = [], [], None
    for files in weight_sets(folder, depth=2):
        try:
            shapes = read_network(files, kind.NAMES).shapes
        except UserError as error:
            unread = unread or error
            continue
        try:
            if kind.KEY in shapes:
                open_network(kind, files)
                found.append(files)
        except UserError as error:
            misfits.append(error)
    if len(found) > 1:
        names = ", ".join(str(files[0].relative_to(folder)) for files in found[:4])
        raise UserError(f"{folder} holds {len(found)} networks {kind.__name__} ({names}): "
                        "move all but one away")
    if misfits and not found:
        raise misfits[0]
    return (found[0], None) if found else ([], unread)


def stream_blocks(module, device):
    """For cards that cannot hold a network: module.blocks stay where they are, on the CPU, and visit the
    device one at a time; everything else moves there."""
    inside = set(module.blocks.parameters())
    for p in module.parameters():
        if p not in inside:
            p.data = p.data.to(device)
    for block in module.blocks:
        home = {p: p.data for p in block.parameters()}

        def fetch(*_, home=home):
            for p, data in home.items():
                p.data = data.to(device)

        def release(*_, home=home):
            for p, data in home.items():
                p.data = data
        block.register_forward_pre_hook(fetch)
        block.register_forward_hook(release)


# ------------------------------------------------------------------------------------------------------- text
class T5Norm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(self.weight.dtype)


class T5Attention(nn.Module):
    """No 1/sqrt(d), no biases; softmax in float32."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x, bias):
        """x [B, S, D], bias [B, N, S, S] -> [B, S, D]."""
        q, k, v = (m(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-1, -2)).float() + bias
        return self.o((scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2))


class T5FFN(nn.Module):
    def __init__(self, dim, ffn_dim):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, ffn_dim, bias=False), nn.GELU("tanh"))
        self.fc1 = nn.Linear(dim, ffn_dim, bias=False)
        self.fc2 = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x):
        return self.fc2(self.fc1(x) * self.gate(x))


class RelativeBias(nn.Module):
    """T5's bidirectional relative position bias; umT5 has one for every layer."""

    def __init__(self, num_heads, buckets=32, max_distance=128):
        super().__init__()
        self.embedding = nn.Embedding(buckets, num_heads)
        self.max_distance = max_distance

    def forward(self, length):
        """-> [N, S, S]. Half the buckets for each direction; half of those exact,
        the others logarithmic in distance."""
        at = torch.arange(length, device=self.embedding.weight.device)
        offset = at[None] - at[:, None]  # key minus query
        half = self.embedding.num_embeddings // 2
        exact = half // 2
        distance = offset.abs()
        ratio = torch.log(distance.clamp(min=1) / exact) / math.log(self.max_distance / exact)
        far = exact + (ratio * (half - exact)).long()
        bucket = (offset > 0) * half + torch.where(distance < exact, distance, far.clamp(max=half - 1))
        return self.embedding(bucket).permute(2, 0, 1)


class T5Block(nn.Module):
    def __init__(self, dim, ffn_dim, num_heads):
        super().__init__()
        self.norm1, self.attn = T5Norm(dim), T5Attention(dim, num_heads)
        self.norm2, self.ffn = T5Norm(dim), T5FFN(dim, ffn_dim)
        self.pos_embedding = RelativeBias(num_heads)

    def forward(self, x, mask_bias):
        x = x + self.attn(self.norm1(x), self.pos_embedding(x.shape[1]) + mask_bias)
        return x + self.ffn(self.norm2(x))


class UMT5(nn.Module):
    """umT5 encoder (Chung et al. 2023), key names of Wan's models_t5_umt5-xxl-enc-bf16.pth;
    defaults are umT5-XXL."""
    FILE, KEY = "models_t5_*", "blocks.0.pos_embedding.embedding.weight"
    NAMES = (
        (r"(encoder\.embed_tokens|decoder|lm_head|spiece_model)\b", None),  # tied, unused, the tokenizer
        (r"^shared\.", "token_embedding."), (r"^encoder\.final_layer_norm\.", "norm."),
        (r"^encoder\.block\.", "blocks."), (r"\.layer\.0\.layer_norm\.", ".norm1."),
        (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
        (r"\.layer\.0\.SelfAttention\.", ".attn."), (r"\.layer\.1\.layer_norm\.", ".norm2."),
        (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
        (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."),
        (r"\.layer\.1\.DenseReluDense\.wo\.", ".ffn.fc2."))

    def __init__(self, vocab=256384, dim=4096, ffn_dim=10240, num_heads=64, num_layers=24):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(T5Block(dim, ffn_dim, num_heads) for _ in range(num_layers))
        self.norm = T5Norm(dim)

    @classmethod
    def from_shapes(cls, shapes):
        vocab, dim = shapes["token_embedding.weight"]
        return cls(vocab, dim, shapes["blocks.0.ffn.fc1.weight"][0],
                   shapes["blocks.0.pos_embedding.embedding.weight"][1], layers_of(shapes))

    def forward(self, ids, mask):
        """ids, mask [B, S] -> [B, S, dim]; rows where mask is 0 hold nothing of use."""
        x = self.token_embedding(ids)
        mask_bias = torch.where(mask[:, None, None] > 0, 0.0, torch.finfo(torch.float32).min)  # [B, 1, 1, S]
        for block in self.blocks:
            x = block(x, mask_bias)
        return self.norm(x)


# -------------------------------------------------------------------------------------------------------- ViT
class ViTAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, N, L, K]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ViTBlock(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), ViTAttention(dim, num_heads)
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(dim)})  # layer scale
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), gelu=nn.GELU(),
                                             fc2=nn.Linear(4 * dim, dim)))
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(dim)})

    def forward(self, x):
        x = x + self.attn(self.norm1(x)) * self.ls1["gamma"]
        return x + self.mlp(self.norm2(x)) * self.ls2["gamma"]


class DINOv2(nn.Module):
    """DINOv2 ViT (Oquab et al. 2023), key names of the released dinov2_vit*14_pretrain.pth;
    defaults are ViT-L/14 at 518 pixels.

    levels  the blocks whose outputs are the result; None: the middle one and the last"""
    FILE, KEY = "dinov2_vit*14_pretrain.*", "blocks.0.ls1.gamma"
    NAMES = (
        (r"^embeddings\.(cls_token|mask_token)$", r"\1"), (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^encoder\.layer\.", "blocks."), (r"^layernorm\.", "norm."),
        (r"\.attention\.(?:attention\.query|q_proj)\.(\w+)", r".attn.qkv.\1|0"),
        (r"\.attention\.(?:attention\.key|k_proj)\.(\w+)", r".attn.qkv.\1|1"),
        (r"\.attention\.(?:attention\.value|v_proj)\.(\w+)", r".attn.qkv.\1|2"),
        (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.layer_scale(\d)\.lambda1", r".ls\1.gamma"))

    def __init__(self, dim=1024, num_layers=24, num_heads=16, patch=14, image_size=518, levels=None):
        super().__init__()
        self.levels = levels or (num_layers // 2 - 1, num_layers - 1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # unused here, in the released files
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})
        self.blocks = nn.ModuleList(ViTBlock(dim, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    @classmethod
    def from_shapes(cls, shapes):
        """Heads are 64 wide in all released sizes."""
        dim, _, _, patch = shapes["patch_embed.proj.weight"]
        side = math.isqrt(shapes["pos_embed"][1] - 1)
        return cls(dim, layers_of(shapes), max(dim // 64, 1), patch, side * patch)

    def positions(self, h, w):
        """The position embedding [1, 1 + h*w, D], bicubically resized to h x w patches;
        0.1 added to the scale as the release does."""
        cls, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        side = math.isqrt(grid.shape[1])
        if (h, w) != (side, side):
            grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2)
            scale = ((h + 0.1) / side, (w + 0.1) / side)
            resized = F.interpolate(grid.float(), scale_factor=scale, mode="bicubic")
            grid = resized.to(cls.dtype).flatten(2).transpose(1, 2)
        return torch.cat((cls, grid), dim=1)

    def forward(self, image):
        """image [B, 3, H, W], ImageNet-normalised, sides a multiple of the patch -> the chosen layers'
        outputs [B, levels, 1 + H*W/patch^2, dim], CLS first, before the final norm."""
        x = self.patch_embed["proj"](image)
        h, w = x.shape[2:]
        tokens = torch.cat((self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)), dim=1)
        x = tokens + self.positions(h, w)
        states = []
        for block in self.blocks:
            x = block(x)
            states.append(x)
        return torch.stack([states[level] for level in self.levels], dim=1)


# -------------------------------------------------------------------------------------------------------- VAE
# Layers are called as layer(x [B, C, F, H, W], cache). The cache is one dict per video, keyed by module: what
# looks back in time keeps its last input frames there, so a video may come in pieces of any number of frames.
# A module that is not yet in the cache sees the video's first piece.
class CausalConv3d(nn.Conv3d):
    """Looks back in time only: kernel - stride earlier frames, zeros before the video begins."""

    def __init__(self, dim_in, dim_out, kernel, stride=1):
        kernel = kernel if isinstance(kernel, tuple) else (kernel,) * 3
        super().__init__(dim_in, dim_out, kernel, (stride, 1, 1), padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x, cache):
        history = self.kernel_size[0] - self.stride[0]
        if history:
            past = cache.get(self)
            x = F.pad(x, (0, 0, 0, 0, history, 0)) if past is None else torch.cat((past, x), dim=2)
            cache[self] = x[:, :, -history:].clone()  # a view would keep all of x alive
        return super().forward(x)


class VAENorm(nn.Module):
    """RMS norm over the channels, in float32."""

    def __init__(self, dim, axes):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * axes))

    def forward(self, x):
        return F.normalize(x.float(), dim=1).to(x.dtype) * (self.gamma * len(self.gamma) ** 0.5)


class VAEResidual(nn.Module):
    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.residual = nn.ModuleDict({  # Wan's indices; 1, 4 and 5 are SiLU, SiLU and dropout there
            "0": VAENorm(dim_in, 3), "2": CausalConv3d(dim_in, dim_out, 3),
            "3": VAENorm(dim_out, 3), "6": CausalConv3d(dim_out, dim_out, 3)})
        self.shortcut = CausalConv3d(dim_in, dim_out, 1) if dim_in != dim_out else None

    def forward(self, x, cache):
        layer = self.residual
        y = layer["2"](F.silu(layer["0"](x)), cache)
        y = layer["6"](F.silu(layer["3"](y)), cache)
        return y + (x if self.shortcut is None else self.shortcut(x, cache))


class VAEAttention(nn.Module):
    """One head over the pixels of each frame."""

    def __init__(self, dim):
        super().__init__()
        self.norm = VAENorm(dim, 2)
        self.to_qkv, self.proj = nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x, cache):
        frames = x.transpose(1, 2).flatten(0, 1)  # [B*F, C, H, W]
        q, k, v = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)  # [B*F, C, H*W]
        y = self.proj(y.unflatten(2, frames.shape[2:]))
        return x + y.unflatten(0, (len(x), -1)).transpose(1, 2)


class VAEResample(nn.Module):
    """Halve or double height and width, and, if temporal, the frames: all but the video's first, which stays
    one frame on either side and which the up-sampler's convolution in time never sees."""

    def __init__(self, dim, up, temporal):
        super().__init__()
        self.up = up
        conv = nn.Conv2d(dim, dim // 2, 3, padding=1) if up else nn.Conv2d(dim, dim, 3, stride=2)
        self.resample = nn.ModuleDict({"1": conv})
        self.time_conv = None
        if temporal:
            self.time_conv = CausalConv3d(dim, 2 * dim if up else dim, (3, 1, 1), stride=1 if up else 2)

    def in_time(self, x, cache):
        first = x[:, :, :0]
        if self.time_conv not in cache:
            first, x = x[:, :, :1], x[:, :, 1:]
            cache[self.time_conv] = None if self.up else first
        if x.shape[2]:
            x = self.time_conv(x, cache)
            if self.up:  # [B, 2*C, F, H, W] -> [B, C, 2*F, H, W]
                x = x.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        return torch.cat((first, x), dim=2)

    def forward(self, x, cache):
        if self.up and self.time_conv is not None:
            x = self.in_time(x, cache)
        frames = x.transpose(1, 2).flatten(0, 1)
        if self.up:  # Wan does this in float32; it only copies, so the dtype changes nothing
            frames = F.interpolate(frames, scale_factor=2, mode="nearest-exact")
        else:
            frames = F.pad(frames, (0, 1, 0, 1))
        x = self.resample["1"](frames).unflatten(0, (len(x), -1)).transpose(1, 2)
        if not self.up and self.time_conv is not None:
            x = self.in_time(x, cache)
        return x


class VAECoder(nn.Module):
    """The encoder (pixels to 2 * z_dim channels) or, if up, the decoder."""

    def __init__(self, dim, z_dim, up):
        super().__init__()
        levels = ((4, 4), (2, 4), (2, 2), (1, 1)) if up else ((1, 1), (1, 2), (2, 4), (4, 4))
        first, last = (4 * dim, dim) if up else (dim, 4 * dim)
        layers = nn.ModuleList()
        for level, (dim_in, dim_out) in enumerate(levels):
            layers.append(VAEResidual(dim_in * dim, dim_out * dim))
            layers += [VAEResidual(dim_out * dim, dim_out * dim) for _ in range(2 if up else 1)]
            if level < 3:
                layers.append(VAEResample(dim_out * dim, up, temporal=level < 2 if up else level > 0))
        middle = nn.ModuleList((VAEResidual(4 * dim, 4 * dim), VAEAttention(4 * dim),
                                VAEResidual(4 * dim, 4 * dim)))
        self.conv1 = CausalConv3d(z_dim if up else 3, first, 3)
        self.up, self.middle = up, middle
        self.add_module("upsamples" if up else "downsamples", layers)
        self.head = nn.ModuleDict({"0": VAENorm(last, 3),
                                   "2": CausalConv3d(last, 3 if up else 2 * z_dim, 3)})

    def forward(self, x, cache):
        x = self.conv1(x, cache)
        for layer in (*self.middle, *self.upsamples) if self.up else (*self.downsamples, *self.middle):
            x = layer(x, cache)
        return self.head["2"](F.silu(self.head["0"](x)), cache)


def check_tile(tile):
    if tile is not None and (tile % 8 or tile < 32):
        raise UserError(f"VAE tile {tile}: expected a multiple of 8 pixels, 32 or more")


def tile_windows(length, tile, scale):
    """Windows of at most `tile` that cover `length` and overlap by a quarter or more: [(start, end, weight
    [(end - start) * scale])]. The weights fall off linearly in the overlaps and add up to one."""
    tile = min(tile, length)
    overlap = max(tile // 4, 1)
    count = 1 + math.ceil((length - tile) / max(tile - overlap, 1))
    starts = [i * (length - tile) // max(count - 1, 1) for i in range(count)]
    ramp = torch.arange(tile * scale) + 0.5
    ramp = torch.minimum(ramp, ramp.flip(0)).clamp(max=overlap * scale)
    total = torch.zeros(length * scale)
    for start in starts:
        total[start * scale : (start + tile) * scale] += ramp
    return [(a, a + tile, ramp / total[a * scale : (a + tile) * scale]) for a in starts]


class WanVAE(nn.Module):
    """Wan2.1's VAE (Wan team 2025, arXiv 2503.20314), key names of Wan2.1_VAE.pth: one latent of 16 channels
    for 4 x 8 x 8 pixels, the first frame alone.

    encode and decode take `chunk` latent frames at a time (None: all; the result is the same), so memory does
    not grow with the video, but for the result. With `tile` (pixels) they also go square by square and blend
    the overlaps, which is not the same: a tile does not see past its edge. Rms of the difference over rms of
    the result, measured on ten random networks: below 0.1 (encode) and 0.2 (decode) with tiles of 128 pixels,
    below 0.03 and 0.07 with 256.
    The input may stay on another device than the weights: pieces move, the float32 result joins the input."""
    FILE, KEY = "Wan2.1_VAE.*", "decoder.conv1.weight"
    NAMES = (
        (r"^quant_conv\.", "conv1."), (r"^post_quant_conv\.", "conv2."),
        (r"coder\.conv_in\.", "coder.conv1."), (r"coder\.norm_out\.", "coder.head.0."),
        (r"coder\.conv_out\.", "coder.head.2."),
        (r"\.mid_block\.resnets\.0\.", ".middle.0."), (r"\.mid_block\.attentions\.0\.", ".middle.1."),
        (r"\.mid_block\.resnets\.1\.", ".middle.2."), (r"\.down_blocks\.", ".downsamples."),
        # diffusers counts four levels of three residual blocks and an up-sampler, Wan all in one row
        (r"\.up_blocks\.(\d+)\.(?:resnets\.(\d)|upsamplers\.0)\.",
         lambda match: f".upsamples.{4 * int(match[1]) + int(match[2] or 3)}."),
        (r"\.conv_shortcut\.", ".shortcut."),
        (r"(samples|middle)\.(\d+)\.norm1\.", r"\1.\2.residual.0."),
        (r"(samples|middle)\.(\d+)\.conv1\.", r"\1.\2.residual.2."),
        (r"(samples|middle)\.(\d+)\.norm2\.", r"\1.\2.residual.3."),
        (r"(samples|middle)\.(\d+)\.conv2\.", r"\1.\2.residual.6."))

    mean = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
    std = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)

    def __init__(self, dim=96, z_dim=16):
        super().__init__()
        self.z_dim = z_dim
        self.encoder, self.conv1 = VAECoder(dim, z_dim, up=False), CausalConv3d(2 * z_dim, 2 * z_dim, 1)
        self.decoder, self.conv2 = VAECoder(dim, z_dim, up=True), CausalConv3d(z_dim, z_dim, 1)

    @classmethod
    def from_shapes(cls, shapes):
        channels = shapes["conv2.weight"][0]
        if channels != 16:  # before many names that do not fit
            raise UserError(f"is a VAE of {channels} channels, such as Wan2.2's for its 5B; expected "
                            "Wan2.1's, of 16, which Wan2.2-A14B has too")
        return cls(shapes["encoder.conv1.weight"][0])

    def statistics(self, device):
        """mean, std, each [z_dim, 1, 1, 1]; no buffers, which would stay on the meta device."""
        return torch.tensor((self.mean, self.std), device=device)[..., None, None, None]

    def stream(self, net, x, out, cuts, tile):
        """Fill out with net over x, cut in time before the frames `cuts` and in space into tiles."""
        check_tile(tile)
        height, width = (min(sides) for sides in zip(x.shape[3:], out.shape[3:]))
        in_scale, out_scale = x.shape[3] // height, out.shape[3] // height  # 8 for pixels, 1 for latents
        tile = tile // 8 if tile else max(height, width)
        for (y0, y1, fade_y), (x0, x1, fade_x) in itertools.product(tile_windows(height, tile, out_scale),
                                                                    tile_windows(width, tile, out_scale)):
            window = x[..., y0 * in_scale : y1 * in_scale, x0 * in_scale : x1 * in_scale]
            target = out[..., y0 * out_scale : y1 * out_scale, x0 * out_scale : x1 * out_scale]
            done, cache = 0, {}
            for piece in window.tensor_split(cuts, dim=2):
                y = net(piece.to(self.conv1.weight), cache).to(out)
                target[:, :, done : done + y.shape[2]] += y * (fade_y[:, None] * fade_x).to(out)
                done += y.shape[2]
        return out

    @torch.no_grad()
    def encode(self, video, chunk=1, tile=None):
        """[B, 3, F, H, W] in -1..1 -> normalised mean float32 [B, 16, (F+3)/4, H/8, W/8]."""
        B, C, frames, H, W = video.shape
        if C != 3 or frames % 4 != 1 or H % 8 or W % 8 or not H * W:
            raise UserError(f"the VAE got {C} channels, {frames} frames of {H}x{W} pixels; expected "
                            "3 channels, 4n+1 frames and sides that are multiples of 8")
        out = video.new_zeros(B, self.z_dim, (frames + 3) // 4, H // 8, W // 8, dtype=torch.float32)
        cuts = tuple(range(4 * chunk - 3, frames, 4 * chunk)) if chunk else ()
        self.stream(lambda x, cache: self.conv1(self.encoder(x, cache), cache)[:, : self.z_dim],
                    video, out, cuts, tile)
        mean, std = self.statistics(out.device)
        return (out - mean) / std

    @torch.no_grad()
    def decode(self, latent, chunk=1, tile=None):
        """[B, 16, f, h, w] -> video float32 [B, 3, 4f-3, 8h, 8w], clamped to -1..1."""
        B, C, frames, h, w = latent.shape
        if C != self.z_dim or not frames * h * w:
            raise UserError(f"the VAE got latents {list(latent.shape)}; expected [B, {self.z_dim}, f, h, w]")
        mean, std = self.statistics(latent.device)
        out = latent.new_zeros(B, 3, 4 * frames - 3, 8 * h, 8 * w, dtype=torch.float32)
        cuts = tuple(range(chunk, frames, chunk)) if chunk else ()
        self.stream(lambda z, cache: self.decoder(self.conv2(z, cache), cache),
                    latent * std + mean, out, cuts, tile)
        return out.clamp_(-1, 1)


# ---------------------------------------------------------------------------------------------- all of Wan's
# Wan's own, for the unconditional branch of guidance
NEGATIVE_PROMPT = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，"
                   "最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，"
                   "画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
                   "杂乱的背景，三条腿，背景人很多，倒着走")
# side of the ViT's picture: 8 x 8 patches of 14, so that two people's tokens fit next to a caption
MFI_PIXELS = 112


def find_tokenizer(folder, text_encoder):
    """umT5's tokenizer in a release: a file, or the bytes that ComfyUI's text encoders hold."""
    wans = folder / "google/umt5-xxl/spiece.model"
    for path in (wans, *(folder / "tokenizer" / name for name in ("spiece.model", "tokenizer.json")),
                 folder / "spiece.model", folder / "tokenizer.json", wans.with_name("tokenizer.json")):
        if path.exists():
            return path
    for file in map(read_weights, text_encoder):
        if "spiece_model" in file.shapes:
            return file.get("spiece_model").numpy().tobytes()
    return wans


class WanEncoders:
    """Wan's frozen networks from its checkpoint folder, with the methods of toy.ToyEncoders. All files are
    checked at once, but for the weights in them. A network is loaded when it is first needed and dropped for
    the next one, so at most one is in memory; every width is read from the files.

    folder    a release as Wan or diffusers makes it, or ComfyUI's files of one: umT5, its tokenizer, VAE and,
              for MFI, a DINOv2. Or what is in such a folder: the transformer's, one of its files
    dtype     of umT5 and the ViT; the VAE is float32, as Wan runs it
    offload   umT5's blocks stay on the CPU and visit the device one by one
    tile      side in pixels of the squares that the VAE works on; None: the whole picture
    need_vit  a missing ViT is an error now, not when features() needs it
    """
    name = "wan"
    files = ()  # a checkpoint needs no copies of these
    latent_dtype = torch.bfloat16
    mask_block = 16  # pixels of a token: 2 latents of 8

    def __init__(self, folder, device, dtype=torch.float32, offload=False, tile=None, need_vit=False):
        check_tile(tile)
        self.folder, self.device, self.dtype = release_folder(folder), device, dtype
        self.offload, self.tile, self.network = offload, tile, None
        found = {kind: find_network(kind, self.folder) for kind in (UMT5, WanVAE, DINOv2)}
        self.paths, self.faults = ({kind: pair[i] for kind, pair in found.items()} for i in range(2))
        self.tokenizer = Tokenizer(find_tokenizer(self.folder, self.paths[UMT5]))
        for kind in (UMT5, WanVAE, DINOv2) if need_vit else (UMT5, WanVAE):
            self.need(kind)
        networks = {kind: open_network(kind, files)[0] for kind, files in self.paths.items() if files}
        vit = networks.get(DINOv2)
        self.vit_shape = [len(vit.levels), vit.cls_token.shape[2]] if vit else None  # levels, width
        vocab, pieces = networks[UMT5].token_embedding.num_embeddings, len(self.tokenizer.model)
        if not vocab - 512 <= pieces <= vocab:  # umT5-XXL has 384 rows for which there are no pieces
            raise UserError(f"{self.folder}: the tokenizer has {pieces} pieces, the UMT5 {vocab}")

    def need(self, kind):
        """The files of that network; UserError where there are none."""
        if not self.paths[kind]:
            if self.faults[kind]:
                raise self.faults[kind]
            raise UserError(f"{self.folder} holds no {kind.__name__} ({kind.FILE}, or such a network under "
                            "another name); see networks/README.md")
        return self.paths[kind]

    def contents(self):
        """What tells these networks from others, whatever their files are called."""
        names = {kind.__name__: fingerprint(files) for kind, files in self.paths.items() if files}
        return names | {"tokenizer": fingerprint(self.tokenizer.model.serialized_model_proto().hex())}

    def sizes(self):
        """What sets that were encoded before 2026-12-01 hold instead of `contents`."""
        return {path.name: path.stat().st_size for files in self.paths.values() for path in files}

    def drop(self):
        """Free the network in memory."""
        self.network = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def load(self, kind):
        """The network of that kind, on the device; any other is dropped first."""
        if type(self.network) is not kind:
            self.drop()
            streamed = self.offload and kind is UMT5
            dtype = torch.float32 if kind is WanVAE else self.dtype
            self.network = load_network(kind, self.need(kind), dtype, "cpu" if streamed else self.device)
            if streamed:
                stream_blocks(self.network, self.device)
        return self.network

    @staticmethod
    def latent_shape(frames, size):
        """Frames and (H, W) in pixels -> the shape of what encode gives for one video. UserError where Wan
        makes none of that size."""
        height, width = size
        if frames % 4 != 1 or not all(side and side % 16 == 0 for side in size):
            raise UserError(f"{frames} frames of {height}x{width}: expected 4n+1 frames (81) and sides that "
                            "are multiples of 16 (480x832)")
        return 16, (frames + 3) // 4, height // 8, width // 8

    @torch.no_grad()
    def text(self, captions):
        """Captions -> tokens [B, S, E] float32, zero beyond each one's length. One by one: padding costs
        memory."""
        network = self.load(UMT5)
        tokens = [network(*(a.to(self.device) for a in self.tokenizer([caption])))[0].float()
                  for caption in captions]
        return nn.utils.rnn.pad_sequence(tokens, batch_first=True)

    @torch.no_grad()
    def features(self, image):
        """Frontal references [B, 3, H, W] in -1..1 -> [B, 2 levels, 65, width]: the middle and the last
        layer's states of the picture's middle square."""
        side = min(image.shape[2:])
        top, left = (image.shape[2] - side) // 2, (image.shape[3] - side) // 2
        square = F.interpolate(image[:, :, top:top + side, left:left + side], (MFI_PIXELS, MFI_PIXELS),
                               mode="bicubic", antialias=True)
        mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        network = self.load(DINOv2)
        return network(((square + 1) / 2 - mean).div(std).to(self.device, self.dtype)).float()

    def encode(self, video):
        return self.load(WanVAE).encode(video, tile=self.tile)

    def decode(self, latent):
        return self.load(WanVAE).decode(latent, tile=self.tile)
