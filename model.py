"""The network: Wan's video transformer, which also sees several views of each person it has to show.

HarmoView adds three things to Wan (arXiv 2606.10839; what the paper leaves open is decided in README.md):
  references    clean latents of each view ride behind the video tokens in self-attention,
                placed by Jump-RoPE;
  proxy tokens  a missing view's slot holds learnable tokens, so one to four views are one layout
                and need no mask;
  MFI           ViT features of each frontal reference ride in the text context, in rows that Wan
                leaves as padding.
Every parameter that Wan has too carries the name it has in the released checkpoints.

Dimension key
  B batch       L tokens        D width            N heads      K head width, D = N*K
  C channels    T H W latent grid of the video, in tokens       h w the same of one reference
  S text rows   M MFI rows      E text width       V view slots (4)    I identities    P proxy tokens
"""
import functools
import hashlib
import json
import math
import os
import re
import shutil
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from encoders import layers_of, one_line, put_tensor, read_weights, refuse_mismatch, whole
from kernels import gate_residual_norm_modulate, norm_modulate, qk_norm_rope, rope_tables
from rope import VIEWS, UserError, check_layout, reference_positions, video_positions

PATCH = 2  # Wan's patch is (1, 2, 2)
GATE_SA, GATE_FFN = 2, 5  # rows of a block's modulation; the others are shifts and scales
# what --recompute keeps: attention's output costs the most to make again and little to hold
KEPT = [getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default for kind in
        ("cudnn_attention", "flash_attention", "efficient_attention", "flash_attention_for_cpu")
        if hasattr(torch.ops.aten, f"_scaled_dot_product_{kind}")]
SIGMA_MIN = 0.05  # below this noise level an x0 prediction's velocity is no longer divided by sigma


@dataclass
class DiTConfig:
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16  # latent channels in
    out_dim: int = 16  # latent channels out
    freq_dim: int = 256  # width of the sinusoidal time embedding
    text_dim: int = 4096  # E: width of the text encoder's rows
    text_len: int = 512  # S: rows of text context, padding included; MFI's rows are among them
    vit_dim: int = 0  # width of the ViT features; 0 builds no MFI
    vit_levels: int = 0  # hidden layers of the ViT that MFI reads
    proxy_tokens: int = 16  # P: learnable tokens for a missing view; 0 leaves the view out
    rope_layout: str = "jump"  # a key of rope.LAYOUTS
    rope_jump: int = 16  # Jump-RoPE's gap between identities
    prediction: str = "velocity"  # by the head: "velocity" (Wan) or "x0" (better on pixel-like latents)
    eps: float = 1e-6
    max_identities: int = 2  # I: people that MFI can tell apart
    coordinates: int = 0  # planes that tell a token its place, added to the latent's channels; 0 is Wan


TOY = dict(in_dim=48, out_dim=48, freq_dim=128, text_dim=96, text_len=128, vit_dim=96, vit_levels=2,
           proxy_tokens=4, prediction="x0", coordinates=18)
# two levels of 65 rows (DINOv2-L at 112 pixels): two people fit beside a caption of 252 tokens
WAN = dict(vit_dim=1024, vit_levels=2)
CONFIGS = {
    "tiny": DiTConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=2, **TOY),  # for tests: fast, learns little
    "toy": DiTConfig(dim=96, ffn_dim=384, num_heads=4, num_layers=4, **TOY),  # 32x32, 2 laptop cores, 10 min
    "toy64": DiTConfig(dim=384, ffn_dim=1536, num_heads=6, num_layers=12, **TOY),  # 64x64, one GPU
    # Wan2.1 T2V, and each expert of Wan2.2 T2V-A14B is a 14b
    "1.3b": DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, **WAN),
    "14b": DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, **WAN),
}
OWN = ("proxies", "mfi.")  # how the names of HarmoView's own parameters start; Wan has all the others


def sinusoid(t, dim):
    """t [B] -> float32 [B, dim], cos first, computed in float64 as Wan does."""
    freq = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device=t.device) / (dim // 2))
    angle = t.double()[:, None] * freq
    return torch.cat((angle.cos(), angle.sin()), dim=1).float()


def normal_(tensor, std):
    """Normal values, in place; nothing on meta, where drawing them would import torch._dynamo (3 s)."""
    return tensor if tensor.is_meta else nn.init.normal_(tensor, std=std)


def float32(sequential, x):
    """Run Linears and activations in float32, whatever dtype their weights are stored in."""
    for m in sequential:
        x = F.linear(x, m.weight.float(), m.bias.float()) if isinstance(m, nn.Linear) else m(x)
    return x


@functools.lru_cache
def say_once(message):
    print(message, file=sys.stderr)


def uses_bf16(device, precision="auto"):
    """auto: bf16 on GPUs and on CPUs that multiply it in hardware (1.5x a step)."""
    if precision == "auto":
        return device.type == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return precision == "bf16"


def autocast(device, precision="auto"):
    """Matmuls in bf16 or fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device, precision))


class RMSNorm(nn.RMSNorm):
    """Over the full width, before the split into heads; float32 inside."""

    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


def attend(q, k, v):
    """Softmax attention without a mask, q [B, N, L, K]. At toy lengths on a CPU plain matmuls are 2-3x
    faster than SDPA."""
    if q.device.type == "cpu" and k.shape[2] <= 1024:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Wan's attention, self or cross: RMSNorm of q and k, no mask. Rotary only where rope is given."""

    def __init__(self, dim, num_heads, eps):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def forward(self, x, context, rope=None):
        """x [B, L, D] attends to context [B, S, D] (itself in self-attention) -> [B, L, D]."""
        q, k = self.q(x), self.k(context)
        if rope is not None:
            q, k = qk_norm_rope(q, k, self.norm_q.weight, self.norm_k.weight, *rope, self.norm_q.eps)
        else:
            q = self.norm_q(q).unflatten(-1, (self.num_heads, -1))  # [B, L, N, K]
            k = self.norm_k(k).unflatten(-1, (self.num_heads, -1))  # [B, S, N, K]
        v = self.v(context).unflatten(-1, (self.num_heads, -1))
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # [B, N, L, K]
        return self.o(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn = Attention(c.dim, c.num_heads, c.eps)
        self.norm3 = nn.LayerNorm(c.dim, c.eps)  # only its weights are used; Wan's norm1 and norm2 have none
        self.cross_attn = Attention(c.dim, c.num_heads, c.eps)
        self.ffn = nn.Sequential(nn.Linear(c.dim, c.ffn_dim), nn.GELU("tanh"), nn.Linear(c.ffn_dim, c.dim))
        self.modulation = nn.Parameter(normal_(torch.empty(1, 6, c.dim), c.dim**-0.5))

    def forward(self, x, time, context, rope):
        """x float32 [B, L, D], time float32 [B, 6, D], context [B, S, D] -> float32 [B, L, D]."""
        modulation = (self.modulation.float() + time).unbind(1)  # [B, D] each
        shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = modulation
        dtype, eps = context.dtype, self.norm3.eps
        # norm3 has weights of its own in the place of a modulation, and what follows it has no gate
        shift_ca = self.norm3.bias.float().expand_as(shift_sa)
        scale_ca = (self.norm3.weight.float() - 1).expand_as(scale_sa)
        h = norm_modulate(x, shift_sa, scale_sa, eps, dtype)
        y = self.self_attn(h, h, rope)
        x, h = gate_residual_norm_modulate(x, y, gate_sa, shift_ca, scale_ca, eps, dtype)
        y = self.cross_attn(h, context)
        x, h = gate_residual_norm_modulate(x, y, None, shift_ffn, scale_ffn, eps, dtype)
        return x + self.ffn(h) * gate_ffn[:, None]


class Head(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.eps = c.eps
        self.head = nn.Linear(c.dim, c.out_dim * PATCH * PATCH)
        self.modulation = nn.Parameter(normal_(torch.empty(1, 2, c.dim), c.dim**-0.5))

    def forward(self, x, time):
        """x float32 [B, L, D], time float32 [B, D] -> [B, L, PATCH*PATCH*C]."""
        shift, scale = (self.modulation.float() + time[:, None]).unbind(1)
        return self.head(norm_modulate(x, shift, scale, self.eps, self.head.weight.dtype))


class MFI(nn.Module):
    """Multi-level Feature Injection: hidden states of a frozen ViT as further rows of the text context.

    Everything that can move a row away from zero starts at zero, and Wan pads its text with zero rows and
    attends to them, so a network that has just been given an MFI is bit for bit the base model.
    """

    def __init__(self, c):
        super().__init__()
        self.norm = nn.LayerNorm(c.vit_dim)
        self.proj = nn.Linear(c.vit_dim, c.text_dim)
        self.identity = nn.Parameter(torch.zeros(c.max_identities, c.text_dim))
        self.level = nn.Parameter(torch.zeros(c.vit_levels, c.text_dim))

    def init_weights(self):
        """HarmoView.init_own calls it: when the network is made, and when Wan's weights lack these."""
        self.norm.reset_parameters()
        for p in (self.proj.weight, self.proj.bias, self.identity, self.level):
            nn.init.zeros_(p)

    def forward(self, features, k):
        """features [B, levels, tokens, vit_dim] of identity k -> rows [B, levels*tokens, E]."""
        n = self.norm
        rows = F.layer_norm(features.float(), n.normalized_shape, n.weight.float(), n.bias.float(), n.eps)
        rows = self.proj(rows.to(self.proj.weight.dtype))
        rows = rows + self.identity[k] + self.level[:, None]
        return rows.flatten(1, 2)


@functools.lru_cache(maxsize=64)
def rope_of(layout, present, grid, ref_hw, proxy_tokens, jump, head_dim, device):
    """Positions [L, 3] of the video's tokens and the reference tokens behind them, and tables for them."""
    positions = video_positions(*grid)
    if present is not None:
        refs = reference_positions(layout, present, *grid, ref_hw, proxy_tokens, jump)
        positions = torch.cat((positions, refs))
    positions = positions.to(device)
    return positions, rope_tables(positions, head_dim)


@functools.lru_cache(maxsize=64)
def place_planes(n, T, H, W, device):
    """n planes [n, T, H, W], sines and cosines of a token's place. Rotary tells distances; finding places
    from those costs a network from scratch more steps than the toy has (+1 dB after 250 steps)."""
    # h and w in the same unit, so that a square of a wider picture looks like a square picture
    axes = torch.linspace(-1, 1, T), *(2 * torch.arange(size) / max(1, H - 1) - 1 for size in (H, W))
    axes = torch.meshgrid(*axes, indexing="ij")
    waves = [wave(2**k * torch.pi / 4 * axis) for k in range(n // 6)
             for wave in (torch.sin, torch.cos) for axis in axes]
    return 1.5 * torch.stack(waves).to(device)


class HarmoView(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if c.dim % (2 * c.num_heads):
            raise UserError(f"dim {c.dim} is no multiple of 2 x {c.num_heads} heads: rotary turns pairs")
        check_layout(c.rope_layout, c.rope_jump)
        channels = c.in_dim + c.coordinates
        self.patch_embedding = nn.Conv3d(channels, c.dim, (1, PATCH, PATCH), (1, PATCH, PATCH))
        self.text_embedding = nn.Sequential(nn.Linear(c.text_dim, c.dim), nn.GELU("tanh"),
                                            nn.Linear(c.dim, c.dim))
        self.time_embedding = nn.Sequential(nn.Linear(c.freq_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.head = Head(c)
        # HarmoView's own
        self.proxies = (nn.Parameter(torch.empty(len(VIEWS), c.proxy_tokens, c.dim))
                        if c.proxy_tokens else None)
        self.mfi = MFI(c) if c.vit_dim else None
        self.recompute = False  # activations of a block again in its backward pass, instead of holding them
        self.init_weights()
        self.init_own()

    def init_weights(self):
        """For training from scratch: every block starts as the identity with open gates (+0.5 dB on the toy
        over Wan's own initialisation). MFI keeps its zeros."""
        for name, m in self.named_modules():
            if isinstance(m, nn.Linear) and not name.startswith("mfi"):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for block in self.blocks:
            nn.init.zeros_(block.modulation)
            block.modulation.data[:, [GATE_SA, GATE_FFN]] = 1
            # equal biases: q times k peaks where positions agree, so that attention starts local (+0.5 dB)
            nn.init.ones_(block.self_attn.q.bias)
            nn.init.ones_(block.self_attn.k.bias)
            for last in (block.self_attn.o, block.cross_attn.o, block.ffn[2]):
                nn.init.zeros_(last.weight)
        nn.init.zeros_(self.head.modulation)
        nn.init.zeros_(self.head.head.weight)

    def init_own(self):
        """HarmoView's own parameters, which no Wan checkpoint holds."""
        if self.proxies is not None:
            normal_(self.proxies, std=0.02)
        if self.mfi is not None:
            self.mfi.init_weights()

    def forward(self, x, t, text, refs=None, vit=None):
        """Velocity (noise - x0) of the noisy video latents x, float32, same shape as x.

        x     [B, C, T, H, W], H and W even
        t     [B] in 0..1000, 1000 * sigma
        text  [B, S, E], S <= text_len; short ones are zero-padded here
        refs  None: plain Wan. Else one dict per identity, {view: clean latent [B, C, h, w]};
              a missing view is its proxies
        vit   None, or one entry per identity: features [B, levels, tokens, vit_dim] of the
              frontal reference, or None
        Raises UserError where a shape, a view or the number of identities does not fit the config.
        """
        c = self.config
        self.check(x, text, refs, vit)
        context = self.text_embedding(self.context(text, vit))  # [B, S, D]
        tokens = self.embed(x)  # [B, D, T, H, W] in tokens
        grid = tokens.shape[2:]
        tokens = tokens.flatten(2).transpose(1, 2)  # [B, L, D]
        video_len, present, ref_hw = tokens.shape[1], None, tuple(grid[1:])
        if refs is not None:
            present = tuple(tuple(view for view in VIEWS if view in views) for views in refs)
            ref_tokens, ref_hw = self.embed_references(refs, len(x), ref_hw)
            tokens = torch.cat((tokens, *ref_tokens), dim=1)  # [B, L + references, D]
        rope = rope_of(c.rope_layout, present, tuple(grid), ref_hw, c.proxy_tokens, c.rope_jump,
                       c.dim // c.num_heads, x.device)

        with torch.autocast(x.device.type, enabled=False):  # time and modulation stay in float32
            time = float32(self.time_embedding, sinusoid(t, c.freq_dim))  # [B, D]
            time6 = float32(self.time_projection, time).unflatten(1, (6, -1))  # [B, 6, D]
        tokens = tokens.float()
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, time6, context, rope, use_reentrant=False,
                                    context_fn=lambda: create_selective_checkpoint_contexts(KEPT))
            else:
                tokens = block(tokens, time6, context, rope)
        out = self.head(tokens[:, :video_len], time).float()  # [B, L, 4C]
        out = unpatchify(out, grid)  # [B, C, T, H, W] in latents
        if c.prediction == "x0":
            sigma = (t.float() / 1000).clamp(min=SIGMA_MIN).view(-1, 1, 1, 1, 1)
            out = (x.float() - out) / sigma
        return out

    def compile_blocks(self):
        """torch.compile every block, all with one compilation a layout. Parameters keep their names."""
        from torch._functorch import config
        # GELU again in the backward: 3.0 GB held a block of 1.3b at 39,000 tokens, instead of 3.9
        config.ban_recompute_materialized_backward = False
        for block in self.blocks:
            block.compile(fullgraph=True)

    def flops(self, tokens):
        """Of one forward of one sample with that many tokens, references included: two for every weight and
        token, and 4 L S D an attention."""
        c, rows = self.config, self.config.text_len
        linear = 6 * c.dim**2 + 2 * c.dim * c.ffn_dim  # q k v o, cross-attention's q and o, FFN
        attention = 4 * tokens * (tokens + rows) * c.dim
        return c.num_layers * (2 * tokens * linear + 4 * rows * c.dim**2 + attention)

    def embed(self, latent):
        """[B, C, T, H, W] -> [B, D, T, H/PATCH, W/PATCH]."""
        if self.config.coordinates:
            B, _, T, H, W = latent.shape
            place = place_planes(self.config.coordinates, T, H, W, latent.device)
            latent = torch.cat((latent, place.expand(B, -1, -1, -1, -1)), dim=1)
        return self.patch_embedding(latent.to(self.patch_embedding.weight.dtype))

    def context(self, text, vit):
        """Text rows, zero padding, MFI rows: [B, S, E]. Cross-attention has no positions,
        so only the padding is given up."""
        given = enumerate(vit or ()) if self.mfi is not None else ()
        rows = [self.mfi(features, k) for k, features in given if features is not None]
        mfi = torch.cat(rows, dim=1) if rows else text[:, :0]
        padding = self.config.text_len - text.shape[1] - mfi.shape[1]
        if padding < 0:
            say_once(f"captions of {text.shape[1]} rows leave no padding for MFI's {mfi.shape[1]}: "
                     f"the context grows from {self.config.text_len} rows "
                     f"to {self.config.text_len - padding}")
        return torch.cat((F.pad(text, (0, 0, 0, max(0, padding))), mfi.to(text.dtype)), dim=1)

    def embed_references(self, refs, batch, ref_hw):
        """One [B, tokens, D] per slot that holds any, in the order of rope.reference_positions;
        and their grid (h, w)."""
        slots = []
        for views in refs:
            for v, view in enumerate(VIEWS):
                if view in views:
                    tokens = self.embed(views[view][:, :, None])  # [B, D, 1, h, w]
                    ref_hw = tuple(tokens.shape[3:])
                    slots.append(tokens.flatten(2).transpose(1, 2))
                elif self.proxies is not None:
                    slots.append(self.proxies[v].expand(batch, -1, -1))
        return slots, ref_hw

    def check(self, x, text, refs, vit):
        """Raise UserError, with what came and what fits, before anything is computed."""
        c = self.config
        if x.ndim != 5 or x.shape[1] != c.in_dim or x.shape[3] % PATCH or x.shape[4] % PATCH:
            raise UserError(f"latents are {list(x.shape)}; "
                            f"expected [B, {c.in_dim}, T, H, W] with even H and W")
        if text.ndim != 3 or text.shape[1] > c.text_len or text.shape[2] != c.text_dim:
            raise UserError(f"text is {list(text.shape)}; expected [B, at most {c.text_len}, {c.text_dim}]")
        for features in vit or () if self.mfi is not None else ():
            if features is not None and features.shape[:2] + features.shape[3:] != (
                    x.shape[0], c.vit_levels, c.vit_dim):
                raise UserError(f"vit features are {list(features.shape)}; "
                                f"expected [{x.shape[0]}, {c.vit_levels}, tokens, {c.vit_dim}]")
        for name, entries in (("refs", refs), ("vit", vit)):
            if entries is not None and len(entries) > c.max_identities:
                raise UserError(f"{name} holds {len(entries)} identities; "
                                f"this model holds {c.max_identities}")
        latents = [(view, latent) for views in refs or () for view, latent in views.items()]
        for view, latent in latents:
            if view not in VIEWS:
                raise UserError(f"unknown view {view!r}; expected one of {', '.join(VIEWS)}")
            if latent.shape[:2] != x.shape[:2] or latent.shape != latents[0][1].shape or latent.ndim != 4:
                raise UserError(f"reference {view!r} is {list(latent.shape)}; expected "
                                f"[{x.shape[0]}, {c.in_dim}, h, w], the same h and w for every reference")


def unpatchify(x, grid):
    """x [B, T*H*W, PATCH*PATCH*C] -> [B, C, T, PATCH*H, PATCH*W]; the channel is the fastest index,
    as in Wan's head."""
    B, (T, H, W) = len(x), grid
    x = x.view(B, T, H, W, PATCH, PATCH, -1)
    return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(B, -1, T, PATCH * H, PATCH * W)


# ------------------------------------------------------------------------------------------------------ speed
def random_inputs(config, shape, batch, device):
    """x, t, text, refs, vit for timing: one person with all views. shape (C, T, H, W): a video's latents."""
    def normal(*sizes):
        return torch.randn(batch, *sizes, device=device)
    refs = [{view: normal(shape[0], *shape[2:]) for view in VIEWS}]
    vit = [normal(config.vit_levels, 17, config.vit_dim)] if config.vit_dim else None
    return normal(*shape), torch.full((batch,), 500.0, device=device), normal(64, config.text_dim), refs, vit


def peak_memory():
    """GiB that this process held at most: of the GPU's memory, or of the CPU's; nan on Windows."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def report_speed(step, model, shape, batch, passes, device):
    """Time step() and print a table. Model TFLOP/s: passes * HarmoView.flops of the tokens a second, where
    a forward is one pass and its backward two; recomputation is not counted. Fills the model with noise: a
    GPU multiplies the zeros that a new one starts with faster."""
    from torch.utils.benchmark import Timer  # half a second, and nothing else needs it
    c, gpu = model.config, device.type == "cuda"

    for p in model.parameters():
        nn.init.normal_(p.data, std=0.02)
    if gpu:
        torch.cuda.reset_peak_memory_stats()  # of making the model in float32

    def seconds(fn, n):  # torch's timer calls it twice to warm up, and waits for the GPU
        return Timer("fn()", globals={"fn": fn}, num_threads=torch.get_num_threads()).timeit(n).mean
    took = seconds(step, 5)
    held = peak_memory()
    C, T, H, W = shape
    tokens = (T + len(VIEWS)) * (H // PATCH) * (W // PATCH)
    rate = passes * batch * model.flops(tokens) / took / 1e12
    n, dtype = 8192 if gpu else 1024, torch.bfloat16 if uses_bf16(device) else torch.float32
    a = torch.randn(n, n, device=device, dtype=dtype)
    matmul = 2 * n**3 / seconds(lambda: a @ a, 10) / 1e12
    q = torch.empty(1, c.num_heads, tokens, c.dim // c.num_heads, device=device, dtype=dtype)
    plain = not gpu and tokens <= 1024  # attend's own matmuls
    backend = "matmuls" if plain else torch.nn.attention.SDPBackend(torch._fused_sdp_choice(q, q, q)).name
    print(f"{batch} x {tokens:,} tokens, attention by {backend}: {took:.3g} seconds a step, "
          f"{batch * tokens / took:,.0f} tokens/s")
    print(f"{rate:.3g} model TFLOP/s, {rate / matmul:.0%} of this machine's {dtype} matmul ({matmul:.3g})"
          + (f", {rate / 989:.0%} of an H200's 989" if gpu else "") + f"\npeak memory {held:.1f} GiB")


# ---------------------------------------------------------------------------------------- Wan's checkpoints
DIFFUSERS_NAMES = [(re.compile(pattern), ours) for pattern, ours in (
    (r"^condition_embedder\.(time|text)_embedder\.linear_1", r"\1_embedding.0"),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2", r"\1_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"^scale_shift_table", "head.modulation"), (r"\.scale_shift_table", ".modulation"),
    (r"^proj_out", "head.head"),
    (r"\.attn1\.", ".self_attn."), (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])\.", r".\1."), (r"\.to_out\.0\.", ".o."),
    (r"\.norm2\.", ".norm3."),  # diffusers numbers the norms in order of use; Wan's norm2 has no weights
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."), (r"\.ffn\.net\.2\.", ".ffn.2."))]


def original_name(name):
    """A tensor's name in diffusers' layout -> its name in Wan's own."""
    for pattern, ours in DIFFUSERS_NAMES:
        name = pattern.sub(ours, name)
    return name


def wan_files(path):
    """A weight file, its index, or a folder with either -> the files that hold the network."""
    path = Path(path)
    if path.is_dir():
        if (path / "high_noise_model").is_dir():
            raise UserError(f"{path} holds two experts: give its high_noise_model or low_noise_model")
        path = path / "transformer" if (path / "transformer").is_dir() else path  # diffusers' pipelines
        indexes, files = sorted(path.glob("*.safetensors.index.json")), sorted(path.glob("*.safetensors"))
        if not indexes and len(files) != 1:
            raise UserError(f"{path}: {len(files)} .safetensors files and no index; expected the folder of a "
                            "Wan text-to-video transformer: one file, or shards with their .index.json")
        path = indexes[0] if indexes else files[0]
    if path.name.endswith(".index.json"):
        try:
            shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: no index of shards ({type(error).__name__}: {error})") from None
        return [path.with_name(shard) for shard in shards]
    return [path]


def wan_tensors(path):
    """{name in Wan's own layout: (WeightFile, name there)} of a checkpoint in either layout, in any number of
    files."""
    tensors = {}
    for file in map(read_weights, wan_files(path)):
        diffusers = any(re.search(r"^condition_embedder\.|\.attn1\.|^proj_out", name) for name in file.shapes)
        for name in file.shapes:
            ours = original_name(name) if diffusers else name
            if ours in tensors:
                raise UserError(f"{file.path}: {name!r} came before, in {tensors[ours][0].path}")
            tensors[ours] = file, name
    return tensors


def wan_config(path):
    """The DiTConfig of a Wan checkpoint, read from its tensors' shapes; heads are 128 wide in all of them."""
    shapes = {name: file.shapes[theirs] for name, (file, theirs) in wan_tensors(path).items()}
    try:
        dim, in_dim = shapes["patch_embedding.weight"][:2]
        return DiTConfig(dim=dim, ffn_dim=shapes["blocks.0.ffn.0.bias"][0], num_heads=dim // 128,
                         num_layers=layers_of(shapes), in_dim=in_dim,
                         out_dim=shapes["head.head.bias"][0] // PATCH**2,
                         freq_dim=shapes["time_embedding.0.weight"][1],
                         text_dim=shapes["text_embedding.0.weight"][1], **WAN)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{path} is no Wan transformer: {error} among its {len(shapes)} tensors") from None


def load_wan(model, path):
    """Fill model's base network from a released checkpoint -> the names of its own parameters that the file
    does not hold (a plain Wan file holds none of them).

    path  a file, a folder of one file or of shards with their index, in Wan's or in diffusers' layout, any
          dtype. One tensor at a time is cast to the model's dtype; model may be on the meta device.
    Raises UserError for anything else: a missing, unknown, doubled or mis-shaped tensor, a damaged file.
    """
    tensors = wan_tensors(path)
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    absent = [name for name in shapes if name.startswith(OWN) and name not in tensors]
    refuse_mismatch(path, f"a network of width {model.config.dim} and {model.config.num_layers} layers",
                    {name: file.shapes[theirs] for name, (file, theirs) in tensors.items()},
                    {name: shape for name, shape in shapes.items() if name not in absent})
    if absent and model.get_parameter(absent[0]).is_meta:
        for name in absent:
            put_tensor(model, name, torch.empty(shapes[name]))
        model.init_own()
    for name, (file, theirs) in tensors.items():
        with one_line(file.path):
            put_tensor(model, name, file.get(theirs))
    return absent


# ------------------------------------------------------------------------------------------------ checkpoints
def save_checkpoint(folder, tensors, meta, files=(), keep=None):
    """Write a checkpoint folder that is either there whole or not at all, and remove all but the newest
    `keep` steps beside it, where a number is given.

    tensors  {"model": state dict, ...}, one safetensors file each
    meta     JSON-able; "sha256" of every file is added
    files    further files that the checkpoint needs, copied into it
    """
    folder = Path(folder)
    with whole(folder) as build:
        for name, state in tensors.items():
            state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
            safetensors.torch.save_file(state, build / f"{name}.safetensors")
        for file in files:
            shutil.copy(file, build)
        sha256 = {f.name: sha256_of(f) for f in sorted(build.iterdir())}
        (build / "checkpoint.json").write_text(json.dumps({**meta, "sha256": sha256}, indent=1))
        for f in build.iterdir():
            with open(f, "rb") as opened:
                os.fsync(opened.fileno())
    if keep:
        for old in sorted(folder.parent.glob("step-*"), key=step_of)[:-keep]:
            shutil.rmtree(old)


def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def step_of(folder):
    return int(folder.name.split("-")[1])


def find_checkpoint(path):
    """The checkpoint folder at `path`, or the newest one below it (of a stage, or of a run's last stage),
    or None."""
    path = Path(path)
    if (path / "checkpoint.json").exists():
        return path
    found = [f.parent for at in ("step-*", "stage*/step-*") for f in path.glob(f"{at}/checkpoint.json")]
    return max(found, key=lambda folder: (folder.parent.name, step_of(folder)), default=None)


def read_meta(folder):
    """What checkpoint.json of a checkpoint folder holds."""
    try:
        meta = json.loads((Path(folder) / "checkpoint.json").read_text())
        config, kinds = dict(meta["config"]), {f.name: f.type for f in fields(DiTConfig)}
        dict(meta["sha256"]), int(meta.get("step", 0))  # of the kinds that others read them as
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder}/checkpoint.json is damaged ({error}): use another checkpoint") from None
    if unknown := config.keys() ^ kinds:
        raise UserError(f"{folder}: its config and this version's differ in {', '.join(sorted(unknown))}")
    if wrong := [f"{name} {value!r}" for name, value in config.items() if not isinstance(value, kinds[name])]:
        raise UserError(f"{folder}/checkpoint.json is damaged ({', '.join(wrong)}): use another checkpoint")
    return meta


def load_tensors(folder, name):
    """One tensor file of a checkpoint folder, checked against the sha256 that was written beside it."""
    path = Path(folder) / f"{name}.safetensors"
    expected = read_meta(folder)["sha256"].get(path.name)
    if not path.exists() or sha256_of(path) != expected:
        raise UserError(f"{path} is missing or damaged (its sha256 is not the one in checkpoint.json): "
                        "use another checkpoint")
    return safetensors.torch.load_file(path)


def load_checkpoint(folder, weights="ema"):
    """A checkpoint folder -> HarmoView with its "ema" (or "model") weights, and what checkpoint.json holds.
    Raises UserError for a damaged file, and for keys or shapes that do not fit its config."""
    meta = read_meta(folder)
    with torch.device("meta"):  # initial values would take longer than reading, and twice the memory
        model = HarmoView(DiTConfig(**meta["config"]))
    try:
        model.load_state_dict(load_tensors(folder, weights), assign=True)
    except RuntimeError as error:
        raise UserError(f"{folder}: {' '.join(str(error).split())}") from None
    return model, meta
