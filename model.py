"""The network: Wan's video transformer, which also sees several views of each person it has to show.

HarmoView adds three things to Wan (arXiv 2606.10839; what the paper leaves open is decided in README.md):
  references    clean latents of each view, placed by Jump-RoPE, which the video reads in self-attention.
                They are one-way: they read each other, but not the video, and are modulated as at t = 0, so
                a sample computes them once. Or "joint", as in the papers: they read the video too;
  proxy tokens  a missing view's slot holds learnable tokens, so one to four views are one layout
                and need no mask;
  MFI           ViT features of each frontal reference join the text tokens of cross-attention,
                in rows that Wan leaves as padding.
Every parameter that Wan has too carries the name it has in the released checkpoints.

Dimension key
  B batch       L tokens        D width            N heads      K head width, D = N*K
  C channels    T H W grid of the video (latents or, where it says so, tokens)     h w of one reference
  S rows of the text context, MFI's included     E text width     V view slots (4)     I identities
  P proxy tokens
"""
import functools
import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from kernels import qk_norm_rope, rope_tables
from networks.lora import init_lora, merge_lora, new_names, set_trained
from networks.weights import (check_fit, load_weights, put_tensor, read_checked, read_frozen, read_wan,
                              read_weights, wan_config)
from rope import VIEWS, check_layout, reference_positions, video_positions
from support.checkpoints import read_meta
from support.script import UserError

PATCH = 2  # Wan's patch is (1, 2, 2)
GATE_SA, GATE_FFN = 2, 5  # rows of a block's modulation; the others are shifts and scales
SIGMA_MIN = 0.05  # an x0 prediction's velocity is divided by sigma, but by no less than this
# config fields that are one of a few words
CHOICES = {"prediction": ("velocity", "x0"), "reference_attention": ("joint", "one-way")}


@dataclass
class DiTConfig:
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16  # latent channels in
    out_dim: int = 16  # latent channels out
    freq_dim: int = 256  # width of the sinusoidal time embedding
    text_dim: int = 4096  # E: width of the text encoder's output
    text_len: int = 512  # S: rows of the text context, padding included; MFI's are among them
    vit_dim: int = 0  # width of the ViT features; 0 builds no MFI
    vit_levels: int = 0  # hidden layers of the ViT that MFI reads; for the toy as many as toy.VIT_LEVELS
    proxy_tokens: int = 16  # P: learnable tokens for a missing view; 0 leaves the view out
    rope_layout: str = "jump"  # a key of rope.LAYOUTS
    rope_jump: int = 16  # Jump-RoPE's gap between identities
    reference_attention: str = "one-way"  # references do not read the video, and are at t = 0; or "joint"
    prediction: str = "velocity"  # by the head: "velocity" (Wan) or "x0" (better on pixel-like latents)
    eps: float = 1e-6
    max_identities: int = 2  # I: most people in a clip
    coord_channels: int = 0  # sin/cos coordinate channels added to the latent (toy 18, Wan 0)

    def __post_init__(self):
        """Raise UserError for a config that no network can have."""
        for field in fields(self):
            value, most = getattr(self, field.name), 1000 if field.name == "num_layers" else 2**18
            if field.type is int and not (isinstance(value, int) and 0 <= value <= most):
                raise UserError(f"config {field.name} is {str(value)[:40]}; expected an int from 0 to {most}")
        if not self.num_heads or self.dim % (2 * self.num_heads):
            raise UserError(f"dim {self.dim} is not a multiple of 2 x {self.num_heads} heads: "
                            "rotary rotates pairs")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"config {name} is {getattr(self, name)!r}; expected {' or '.join(choices)}")
        if self.coord_channels % 6:
            raise UserError(f"config coord_channels is {self.coord_channels}; expected a multiple of 6: sine "
                            "and cosine of t, h and w")
        try:
            check_layout(self.rope_layout, self.rope_jump)
        except ValueError as error:
            raise UserError(str(error)) from None

    @property
    def is_wan(self):
        """Does it work on the latents of Wan's VAE (else on the toy's)."""
        return self.in_dim == 16


TOY = dict(in_dim=48, out_dim=48, freq_dim=128, text_dim=96, text_len=128, vit_dim=96, vit_levels=2,
           proxy_tokens=4, prediction="x0", coord_channels=18)
# two levels of 65 tokens (DINOv2-L at 112 pixels): two people fit next to a caption of 252 tokens
WAN = dict(vit_dim=1024, vit_levels=2)
CONFIGS = {
    "tiny": DiTConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=2, **TOY),  # for tests: fast, learns little
    "toy": DiTConfig(dim=96, ffn_dim=384, num_heads=4, num_layers=4, **TOY),  # 32x32, 2 laptop cores, 10 min
    # 64x64 in as many tokens, since a latent is of 8x8 pixels
    "toy64": DiTConfig(dim=192, ffn_dim=768, num_heads=6, num_layers=6,
                       **TOY | dict(in_dim=192, out_dim=192)),
    # Wan2.1 T2V, and each expert of Wan2.2 T2V-A14B is a 14b
    "1.3b": DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, **WAN),
    "14b": DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, **WAN),
}


def sinusoid(t, dim):
    """t [B] -> float32 [B, dim], cos first, computed in float64 as Wan does."""
    freq = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device=t.device) / (dim // 2))
    angle = t.double()[:, None] * freq
    return torch.cat((angle.cos(), angle.sin()), dim=1).float()


def in_float32(sequential, x):
    """Run Linears and activations in float32, whatever dtype their weights are stored in."""
    for m in sequential:
        x = F.linear(x, m.weight.float(), m.bias.float()) if isinstance(m, nn.Linear) else m(x)
    return x


class RMSNorm(nn.RMSNorm):
    """Over the full width, before the split into heads; float32 inside."""

    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


def attend(q, k, v, ref_kv=None, seen=None):
    """Softmax attention of q [B, N, L, K]. ref_kv: further keys and values; seen bool [B, S]: the keys that
    a sample has, None: all. At toy lengths on a CPU plain matmuls are 2-3x faster than SDPA."""
    if ref_kv is not None:
        k, v = (torch.cat(pair, dim=2) for pair in zip((k, v), ref_kv))
    mask = None if seen is None else seen[:, None, None]  # [B, 1, 1, S]
    if q.device.type == "cpu" and k.shape[2] <= 1024:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, mask)


class Attention(nn.Module):
    """Wan's attention, self or cross: RMSNorm of q and k. Rotary only where rope is given."""
    attend = staticmethod(attend)

    def __init__(self, dim, num_heads, eps):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def forward(self, x, context, rope=None, ref_kv=None, seen=None, return_kv=False):
        """x [B, L, D] attends to context [B, S, D] (itself in self-attention), to the rows of it that are
        `seen`, and to keys and values ref_kv of references, [B, N, M, K] each -> [B, L, D], and, if asked,
        its own keys and values."""
        q, k = self.q(x), self.k(context)
        if rope is not None:
            q, k = qk_norm_rope(q, k, self.norm_q.weight, self.norm_k.weight, *rope, self.norm_q.eps)
        else:
            q = self.norm_q(q).unflatten(-1, (self.num_heads, -1))  # [B, L, N, K]
            k = self.norm_k(k).unflatten(-1, (self.num_heads, -1))  # [B, S, N, K]
        v = self.v(context).unflatten(-1, (self.num_heads, -1))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, N, L, K]
        y = self.attend(q, k, v, ref_kv, seen).transpose(1, 2).flatten(2)  # [B, L, D]
        return self.o(y), (k, v) if return_kv else None


def modulate(x, shift, scale, eps):
    """LayerNorm of x float32 [B, L, D] without weights, then x * (1 + scale) + shift, both [B, 1, D]."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn = Attention(c.dim, c.num_heads, c.eps)
        self.norm3 = nn.LayerNorm(c.dim, c.eps)  # Wan's norm1 and norm2 have no weights
        self.cross_attn = Attention(c.dim, c.num_heads, c.eps)
        self.ffn = nn.Sequential(nn.Linear(c.dim, c.ffn_dim), nn.GELU("tanh"), nn.Linear(c.ffn_dim, c.dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, c.dim))

    def forward(self, video, references, context, seen=None, ref_kv=None, return_kv=False):
        """One call for both, so weights are cast, gathered and recomputed once.

        video       (x float32 [B, L, D], time6 float32 [B, 6, D], rope)
        references  one-way ones, the same; they come first, and the video reads their keys and values. None
                    where there are none, or where an earlier call returned these as ref_kv
        context     [B, S, D], of which a sample sees the rows in seen, bool [B, S] or None
        Returns x of the video, x of the references, and, if asked, ref_kv.
        """
        ref_x = None
        if references is not None:
            ref_x, ref_kv = self.layer(references, context, seen, return_kv=True)
        x, _ = self.layer(video, context, seen, ref_kv)
        return x, ref_x, ref_kv if return_kv else None

    def layer(self, tokens, context, seen, ref_kv=None, return_kv=False):
        """tokens (x, time6, rope) -> x float32 [B, L, D], and its keys and values, if asked."""
        x, time6, rope = tokens
        modulation = (self.modulation.float() + time6).chunk(6, dim=1)  # [B, 1, D] each
        shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = modulation
        dtype, norm3 = context.dtype, self.norm3
        h = modulate(x, shift_sa, scale_sa, norm3.eps).to(dtype)
        y, kv = self.self_attn(h, h, rope, ref_kv, return_kv=return_kv)
        x = x + gate_sa * y
        # before cross-attention: norm3 is affine, not modulated, and its residual has no gate
        h = F.layer_norm(x, x.shape[-1:], norm3.weight.float(), norm3.bias.float(), norm3.eps).to(dtype)
        x = x + self.cross_attn(h, context, seen=seen)[0]
        h = modulate(x, shift_ffn, scale_ffn, norm3.eps).to(dtype)
        return x + gate_ffn * self.ffn(h), kv


# with --recompute, keep attention outputs: expensive to recompute, cheap to store
SAVED_OPS = [getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default for kind in
             ("cudnn_attention", "flash_attention", "efficient_attention", "flash_attention_for_cpu")
             if hasattr(torch.ops.aten, f"_scaled_dot_product_{kind}")]


class Head(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.eps = c.eps
        self.head = nn.Linear(c.dim, c.out_dim * PATCH * PATCH)
        self.modulation = nn.Parameter(torch.randn(1, 2, c.dim))

    def forward(self, x, time):
        """x float32 [B, L, D], time float32 [B, D] -> [B, L, PATCH*PATCH*C]."""
        shift, scale = (self.modulation.float() + time[:, None]).chunk(2, dim=1)  # [B, 1, D] each
        return self.head(modulate(x, shift, scale, self.eps).to(self.head.weight.dtype))


class MFI(nn.Module):
    """Multi-level Feature Injection: hidden states of a frozen ViT as further tokens of the text context.

    proj, identity and level start at zero, so MFI's tokens are zeros at first, and Wan pads its text with
    zeros and attends to them: a network that has just been given an MFI is bit for bit the base model.
    """

    def __init__(self, c):
        super().__init__()
        self.norm = nn.LayerNorm(c.vit_dim)
        self.proj = nn.Linear(c.vit_dim, c.text_dim)
        self.identity = nn.Parameter(torch.zeros(c.max_identities, c.text_dim))
        self.level = nn.Parameter(torch.zeros(c.vit_levels, c.text_dim))

    def forward(self, features, k):
        """features [B, levels, tokens, vit_dim] of identity k -> tokens [B, levels*tokens, E]."""
        n, expected = self.norm, (len(self.level), self.norm.normalized_shape[0])
        assert features.shape[1::2] == expected, f"{list(features.shape)}, levels and width {expected}"
        tokens = F.layer_norm(features.float(), n.normalized_shape, n.weight.float(), n.bias.float(), n.eps)
        tokens = self.proj(tokens.to(self.proj.weight.dtype))
        tokens = tokens + self.identity[k] + self.level[:, None]
        return tokens.flatten(1, 2)


@functools.lru_cache(maxsize=64)
def positions_and_tables(c, views, grid, ref_hw, device):
    """Positions [L, 3] of the video's tokens and of the references' behind them, and rotary tables for them.
    c: (layout, proxy_tokens, jump, head_dim); views: the views given of each person"""
    layout, proxy_tokens, jump, head_dim = c
    references = reference_positions(layout, views, *grid, ref_hw, proxy_tokens, jump)
    positions = torch.cat((video_positions(*grid), references))
    positions -= positions.amin(dim=0).clamp(max=0)  # a layout may go below 0: only distances count
    positions = positions.to(device)
    return positions, rope_tables(positions, head_dim)


@functools.lru_cache(maxsize=64)
def coordinate_planes(n, T, H, W, device):
    """n channels [n, T, H, W], sines and cosines of a latent's place. Rotary tells distances; finding places
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
        channels = c.in_dim + c.coord_channels
        self.patch_embedding = nn.Conv3d(channels, c.dim, (1, PATCH, PATCH), (1, PATCH, PATCH))
        self.text_embedding = nn.Sequential(nn.Linear(c.text_dim, c.dim), nn.GELU("tanh"),
                                            nn.Linear(c.dim, c.dim))
        self.time_embedding = nn.Sequential(nn.Linear(c.freq_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.head = Head(c)
        # new in HarmoView
        self.proxies = (nn.Parameter(torch.empty(len(VIEWS), c.proxy_tokens, c.dim))
                        if c.proxy_tokens else None)
        self.mfi = MFI(c) if c.vit_dim else None
        self.recompute = False  # activation checkpointing: recompute blocks in backward, store little
        self.init_weights()
        self.init_new()

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
            # biases of one: q times k peaks where positions agree, so that attention starts local (+0.5 dB)
            nn.init.ones_(block.self_attn.q.bias)
            nn.init.ones_(block.self_attn.k.bias)
            for last in (block.self_attn.o, block.cross_attn.o, block.ffn[2]):
                nn.init.zeros_(last.weight)
        nn.init.zeros_(self.head.modulation)
        nn.init.zeros_(self.head.head.weight)

    def make_new(self):
        """Initial values for those parameters that Wan lacks which are still on the meta device."""
        for name in new_names(self):
            if self.get_parameter(name).is_meta:
                put_tensor(self, name, torch.empty(self.get_parameter(name).shape))
        self.init_new()

    def init_new(self):
        """The parameters that HarmoView adds, which no Wan checkpoint holds, and those of adapters."""
        if self.proxies is not None:
            self.proxies.data = 0.02 * torch.randn_like(self.proxies)
        if self.mfi is not None:
            self.mfi.norm.reset_parameters()
            for p in (self.mfi.proj.weight, self.mfi.proj.bias, self.mfi.identity, self.mfi.level):
                nn.init.zeros_(p)
        init_lora(self)

    def forward(self, x, t, text, refs=None, vit=None, kv_cache=None):
        """Velocity (noise - x0) of the noisy video latents x, float32, same shape as x.

        x     [B, C, T, H, W], H and W even
        t     [B] in 0..1000, 1000 * sigma
        text  [B, S, E], S <= text_len; short ones are zero-padded here
        refs  None: plain Wan. Else one dict per identity, {view: clean latent [B, C, h, w]};
              a missing view is its proxies
        vit   None, or one entry per identity: features [B, levels, tokens, vit_dim] of the
              frontal reference, or None
        kv_cache  pass the same dict, empty at first, to every step of one sample: one-way references are then
              computed once
        Raises UserError where a shape, a view or the number of identities does not fit the config.
        """
        c = self.config
        self.check(x, text, refs or (), vit or ())
        context, seen = self.text_and_mfi(text, vit)
        context = self.text_embedding(context)  # [B, S, D]
        time, time6 = self.embed_time(t)
        tokens, ref_tokens, grid, positions, tables = self.embed_all(x, refs)  # [B, L, D], [B, M, D]
        L, references = tokens.shape[1], None
        if c.reference_attention == "joint":
            tokens = torch.cat((tokens, ref_tokens), dim=1)  # [B, L + M, D]
        elif ref_tokens.shape[1] and not kv_cache:
            _, ref_time6 = self.embed_time(torch.zeros_like(t))
            references = ref_tokens.float(), ref_time6, (positions[L:], tables)
        video = tokens.float(), time6, (positions[:tokens.shape[1]], tables)
        tokens = self.through_blocks(video, references, context, seen, kv_cache)
        out = unpatchify(self.head(tokens[:, :L], time).float(), grid)  # [B, C, T, H, W] in latents
        return self.velocity(out, x, t)

    def through_blocks(self, video, references, context, seen, kv_cache):
        """Arguments as of Block.forward -> the video's x. kv_cache: {block: keys and values of one-way
        references}; an empty one is filled, None is not."""
        known = kv_cache or {}
        for i, block in enumerate(self.blocks):
            x, ref_x, ref_kv = self.run(block, video, references, context, seen, known.get(i),
                                        kv_cache is not None)
            video = x, *video[1:]
            if references is not None:
                references = ref_x, *references[1:]
            if ref_kv is not None:
                kv_cache[i] = ref_kv
        return video[0]

    def velocity(self, out, x, t):
        """What the head predicts -> velocity. out, x [B, C, T, H, W]; t [B]"""
        if self.config.prediction == "velocity":
            return out
        sigma = (t.float() / 1000).clamp(min=SIGMA_MIN).view(-1, 1, 1, 1, 1)
        return (x.float() - out) / sigma

    def reference_forward(self, x, t, text, refs, vit=None):
        """forward as the papers draw it, for readers and tests: one sequence of video and reference tokens, a
        time for each token, and a mask of who reads whom. No cache, no kernels; float32."""
        c = self.config
        context = self.text_embedding(self.text_and_mfi(text, vit)[0])
        video, ref_tokens, grid, positions, tables = self.embed_all(x, refs)
        L, tokens = video.shape[1], torch.cat((video, ref_tokens), dim=1)
        is_video = torch.arange(tokens.shape[1], device=x.device) < L
        reads = torch.ones(len(is_video), len(is_video), dtype=torch.bool, device=x.device)
        ref_t = t
        if c.reference_attention == "one-way":
            reads[L:, :L] = False  # references do not read the video
            ref_t = torch.zeros_like(t)  # and are clean
        (time, video_time6), (_, ref_time6) = self.embed_time(t), self.embed_time(ref_t)
        time6 = torch.where(is_video[:, None, None], video_time6[:, None], ref_time6[:, None])
        for block in self.blocks:
            modulation = (block.modulation[:, None] + time6).unbind(2)  # six of [B, L + M, D]
            shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = modulation
            a, h = block.self_attn, modulate(tokens, shift, scale, c.eps)
            q, k = qk_norm_rope(a.q(h), a.k(h), a.norm_q.weight, a.norm_k.weight, positions, tables, c.eps)
            v = a.v(h).unflatten(-1, (c.num_heads, -1))
            y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), attn_mask=reads)
            tokens = tokens + gate * a.o(y.transpose(1, 2).flatten(2))
            tokens = tokens + block.cross_attn(block.norm3(tokens), context)[0]
            tokens = tokens + gate_ffn * block.ffn(modulate(tokens, shift_ffn, scale_ffn, c.eps))
        return self.velocity(unpatchify(self.head(tokens[:, :L], time), grid), x, t)

    def embed_time(self, t):
        """t [B] in 0..1000 -> [B, D] for the head and [B, 6, D] for the blocks, which stay in float32."""
        with torch.autocast(t.device.type, enabled=False):
            time = in_float32(self.time_embedding, sinusoid(t, self.config.freq_dim))
            return time, in_float32(self.time_projection, time).unflatten(1, (6, -1))

    def run(self, block, *inputs):
        """block(*inputs), which is computed again in the backward if self.recompute."""
        if not (self.recompute and torch.is_grad_enabled()):
            return block(*inputs)
        return checkpoint(block, *inputs, use_reentrant=False,
                          context_fn=lambda: create_selective_checkpoint_contexts(SAVED_OPS))

    def count_tokens(self, x, refs):
        """How many tokens a sample of x [B, C, T, H, W] has, and how many its refs, as forward takes them."""
        references = sum(latent.shape[2] * latent.shape[3] for views in refs for latent in views.values())
        proxies = sum(len(VIEWS) - len(views) for views in refs) * self.config.proxy_tokens
        return math.prod(x.shape[2:]) // PATCH**2, references // PATCH**2 + proxies

    def flops(self, video, references=0, cached=False):
        """Of one forward of one sample with that many tokens: two for every weight and token, and 4 L S D an
        attention. cached: one-way references were computed before."""
        c, S = self.config, self.config.text_len
        tokens = video if cached else video + references
        linear = 6 * c.dim**2 + 2 * c.dim * c.ffn_dim  # q k v o, cross-attention's q and o, FFN
        pairs = tokens * (video + references + S)
        if c.reference_attention == "one-way" and not cached:
            pairs -= references * video
        return c.num_layers * (2 * tokens * linear + 4 * S * c.dim**2 + 4 * pairs * c.dim)

    def embed(self, latent):
        """[B, C, T, H, W] -> tokens [B, L, D], and their grid (T, H/PATCH, W/PATCH)."""
        if self.config.coord_channels:
            B, _, T, H, W = latent.shape
            planes = coordinate_planes(self.config.coord_channels, T, H, W, latent.device)
            latent = torch.cat((latent, planes.expand(B, -1, -1, -1, -1)), dim=1)
        tokens = self.patch_embedding(latent.to(self.patch_embedding.weight.dtype))
        return tokens.flatten(2).transpose(1, 2).contiguous(), tuple(tokens.shape[2:])

    def text_and_mfi(self, text, vit):
        """Text, zero padding, MFI's tokens: [B, S, E]; and which rows each sample sees, bool [B, S] or None.

        MFI replaces padding, so S is text_len, and a new MFI is the base model bit for bit: cross-attention
        has no positions. Where a caption is so long that it leaves MFI no room, MFI's tokens follow the
        text_len rows, which a shorter caption of the same batch does not see: no sample depends on others."""
        c, mfi = self.config, []
        if self.mfi is not None and vit is not None:
            mfi = [self.mfi(features, k).to(text.dtype) for k, features in enumerate(vit)
                   if features is not None]
        length = sum(tokens.shape[1] for tokens in mfi)
        room, seen = max(0, c.text_len - length), None
        if text.shape[1] > room:
            long = text[:, room:].any(dim=2).any(dim=1)  # [B]
            if long.any():
                row = torch.arange(c.text_len + length, device=text.device)
                seen = None if long.all() else (row < room) | (row >= c.text_len) | long[:, None]
                room = c.text_len
        text = F.pad(text, (0, 0, 0, room - text.shape[1]))  # or cut, where only zeros are
        return torch.cat((text, *mfi), dim=1), seen

    def embed_all(self, x, refs):
        """Tokens of the video [B, L, D] and of all references [B, M, D], slot by slot; the video's grid; and
        of both the positions [L + M, 3] and rotary tables."""
        c, refs, slots = self.config, refs or (), []
        video, grid = self.embed(x)
        ref_hw = grid[1:]
        for views in refs:
            for v, view in enumerate(VIEWS):
                if view in views:
                    tokens, (_, *ref_hw) = self.embed(views[view][:, :, None])
                    slots.append(tokens)
                elif self.proxies is not None:
                    slots.append(self.proxies[v].expand(len(x), -1, -1))
        given = tuple(tuple(views) for views in refs)
        layout = c.rope_layout, c.proxy_tokens, c.rope_jump, c.dim // c.num_heads
        positions, tables = positions_and_tables(layout, given, grid, tuple(ref_hw), x.device)
        return video, torch.cat(slots or [video[:, :0]], dim=1), grid, positions, tables

    def check(self, x, text, refs, vit):
        """UserError, with what came and what fits, before anything is computed."""
        c, B = self.config, len(x)
        if x.ndim != 5 or x.shape[1] != c.in_dim or x.shape[3] % PATCH or x.shape[4] % PATCH:
            raise UserError(f"latents are {list(x.shape)}; "
                            f"expected [B, {c.in_dim}, T, H, W] with even H and W")
        if text.ndim != 3 or text.shape[1] > c.text_len or text.shape[2] != c.text_dim:
            raise UserError(f"text is {list(text.shape)}; expected [B, at most {c.text_len}, {c.text_dim}]")
        if max(len(refs), len(vit)) > c.max_identities:
            raise UserError(f"refs hold {len(refs)} identities; this model holds {c.max_identities}")
        shapes = sorted({tuple(latent.shape) for views in refs for latent in views.values()})
        for h, w in (shape[2:] for shape in shapes):
            if len(shapes) > 1 or shapes[0][:2] != (B, c.in_dim) or h % PATCH or w % PATCH:
                raise UserError(f"references are {' and '.join(map(str, shapes))}; expected [{B}, "
                                f"{c.in_dim}, h, w], the same even h and w for every one")


def unpatchify(x, grid):
    """x [B, T*H*W, PATCH*PATCH*C] -> [B, C, T, PATCH*H, PATCH*W]; the channel is the fastest index,
    as in Wan's head."""
    B, (T, H, W) = len(x), grid
    x = x.view(B, T, H, W, PATCH, PATCH, -1)
    return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(B, -1, T, PATCH * H, PATCH * W)


# ---------------------------------------------------------------------------------------------------- loading
def on_meta(path, weights="ema"):
    """The network of a checkpoint folder of train.py, with what trained of it, or of a Wan checkpoint, on the
    meta device. Names and shapes of the file are checked, no weights are read."""
    if (Path(path) / "checkpoint.json").is_file():
        meta, file = read_meta(path), read_weights(Path(path) / f"{weights}.safetensors")
        meta["config"] = stored_config(meta)
    else:
        file = read_wan(path)
        meta = {"config": wan_config(file) | WAN}
    try:
        with torch.device("meta"):  # initial values would take longer than reading, and twice the memory
            model = HarmoView(DiTConfig(**meta["config"]))
        if frozen := meta.get("base"):
            set_trained(model, frozen["train"], frozen["rank"])
    except (TypeError, KeyError, RuntimeError, UserError) as error:
        raise UserError(f"{path}: its config does not fit this version ({error})") from None
    untrained = [name for name, p in model.named_parameters() if not p.requires_grad]
    check_fit(model, file, untrained if "sha256" in meta else new_names(model))
    return model


def stored_config(meta):
    """The config of a checkpoint.json as a dict, with the defaults of fields that are newer than it."""
    defaults = {field.name: field.default for field in fields(DiTConfig) if field.default is not MISSING}
    return defaults | {"reference_attention": "joint"} | meta["config"]  # joint before 2026-11-30


def load_wan(model, path):
    """Fill model's base network from a released checkpoint -> the names of the parameters that it lacks.

    path  a file, or a folder of one or of shards, with Wan's, diffusers' or ComfyUI's names, any dtype.
          One tensor at a time is cast to the model's dtype; model may be on the meta device.
    Raises UserError for anything else: a missing, unknown, doubled or mis-shaped tensor, a damaged file.
    """
    return load_base(model, read_wan(path))


def load_base(model, file, dtype=None):
    """Fill model from a WeightFile that may lack the new parameters, which start anew where they are on the
    meta device -> their names."""
    new = new_names(model)
    absent = check_fit(model, file, new)
    if absent and model.get_parameter(absent[0]).is_meta:
        model.make_new()
    load_weights(model, file, dtype, may_lack=new)
    return absent


def load_trained(model, folder, weights, dtype=None):
    """Fill what of model trains from a checkpoint that holds nothing else."""
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    load_weights(model, read_checked(folder, weights), dtype, may_lack=frozen)


def load_checkpoint(folder, weights="ema", dtype=None):
    """A checkpoint folder of train.py -> HarmoView with its "ema" (or "model") weights in dtype (default
    float32), adapters merged, and what checkpoint.json holds. UserError for a file that is damaged or does
    not fit."""
    model, meta = on_meta(folder, weights), read_meta(folder)
    if "base" in meta:
        load_base(model, read_frozen(meta["base"]), dtype)
    load_trained(model, folder, weights, dtype)
    merge_lora(model)
    return model, meta
