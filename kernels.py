"""Fused Triton kernels for what is memory-bound in a block, forward and backward, each beside its reference.

  qk_norm_rope                  RMSNorm over the full width, then rotary by each token's (t, h, w);
                                q and k in one launch
  norm_modulate                 LayerNorm, then x * (1 + scale) + shift
  gate_residual_norm_modulate   x + gate * y, and norm_modulate of that sum

Tensors on a GPU go through Triton, all others through the references in PyTorch; use_fused() says which, and
overrides it.
Positions are data, an integer tensor [L, 3]: every layout of rope.py runs through the same kernel.

  python kernels.py                       checks, then a table of times against the copy bandwidth of this GPU
  TRITON_INTERPRET=1 python kernels.py    the checks alone, in Triton's interpreter, without a GPU

Dimension key: B batch, L tokens, D width, N heads, K head width, D = N*K, P rows of the rotary tables.
"""
import argparse
import functools
import itertools
import json
import os
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from rope import UserError, apply_rope, axis_pairs, rope_table

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it decorates, that is below
try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # no wheels outside Linux
    triton, tl, jit = None, SimpleNamespace(constexpr=None), lambda f: f

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # the last one for gradcheck
MAX_POSITION = 2**20  # a table for more than this many positions is a mistake in the positions
_fused = None


def use_fused(choice=None):
    """Choose the path: None (Triton for tensors on a GPU, where there is Triton), True (Triton or an error)
    or False (PyTorch). Returns the choice in words."""
    global _fused
    if choice and triton is None:
        raise UserError("fused kernels need Triton, which cannot be imported here")
    _fused = choice
    on_gpu = triton is not None and torch.cuda.is_available() and not INTERPRET
    fused = on_gpu if choice is None else choice
    return f"fused Triton kernels{' (interpreted)' * INTERPRET}" if fused else "PyTorch reference kernels"


def _runs_fused(x):
    if _fused is None:
        return triton is not None and x.is_cuda and not INTERPRET
    if _fused and not (x.is_cuda or INTERPRET):
        raise UserError(f"fused kernels were asked for a tensor on {x.device}; they need a GPU, "
                        "or TRITON_INTERPRET=1 before the start")
    return _fused


# ------------------------------------------------------------------------------------------ positions, tables
class RopeTables(NamedTuple):
    """cos and sin of every position by every pair of a head, float32 [P, K // 2]; a token's row is gathered
    pair by pair: the first pairs at its t, the next at its h, the last at its w (rope.axis_pairs)."""
    cos: Tensor
    sin: Tensor


_tables, _checked = {}, WeakIdKeyDictionary()


def rope_tables(positions, head_dim, theta=1e4):
    """Tables, computed in float64 as Wan does, that hold these positions (int [L, 3]). They are cached and
    grow on demand, to the next power of two, at head_dim * 4 bytes a position. Waits for the GPU: call it
    where a layout is built, not in every block.
    Raises UserError for positions of another shape or dtype, negative or beyond MAX_POSITION."""
    if positions.ndim != 2 or positions.shape[1] != 3 or positions.dtype not in (torch.int32, torch.int64):
        raise UserError(f"positions are {positions.dtype} {list(positions.shape)}; expected integers [L, 3]")
    low, high = (int(x) for x in positions.aminmax()) if positions.numel() else (0, 0)
    if low < 0 or high >= MAX_POSITION:
        raise UserError(f"positions go from {low} to {high}; expected 0 to {MAX_POSITION - 1}")
    key = head_dim, theta, positions.device
    if key not in _tables or len(_tables[key].cos) <= high:
        with torch.inference_mode(False):  # a table made while sampling has to serve training too
            every = torch.arange(max(64, 1 << high.bit_length()), device=positions.device)
            _tables[key] = RopeTables(*rope_table(every[:, None].expand(-1, 3), head_dim, theta))
    return _tables[key]


def check_positions(positions, tables):
    """Raise UserError for a position that the tables do not hold. It waits for the GPU, so a tensor is looked
    at once, and again after a change in place or with shorter tables. Not while compiling: then, and for all
    that slips through, the kernels give NaN for such a token and read nothing out of bounds."""
    if torch.compiler.is_compiling():
        return
    seen = (None if positions.is_inference() else positions._version), len(tables.cos)
    if _checked.get(positions) != seen:
        low, high = (int(x) for x in positions.aminmax()) if positions.numel() else (0, 0)
        if low < 0 or high >= len(tables.cos):
            raise UserError(f"positions go from {low} to {high}; the tables hold 0 to {len(tables.cos) - 1}")
        _checked[positions] = seen


# ------------------------------------------------------------------------------------------------- references
def _math(dtype):
    return torch.promote_types(dtype, torch.float32)


def qk_norm_rope_reference(q, k, weight_q, weight_k, positions, tables, eps):
    pair = torch.arange(tables.cos.shape[1], device=q.device)
    t, h, _ = axis_pairs(2 * len(pair))
    at = positions[:, (pair >= t).long() + (pair >= t + h).long()].long()  # [L, K/2]
    cos, sin = tables.cos[at, pair], tables.sin[at, pair]

    def one(x, weight):
        math = _math(x.dtype)
        y = F.rms_norm(x.to(math), x.shape[-1:], weight.to(math), eps).unflatten(-1, (-1, 2 * len(pair)))
        return apply_rope(y, cos, sin).to(x.dtype)  # [B, L, N, K]
    return one(q, weight_q), one(k, weight_k)


def norm_modulate_reference(x, shift, scale, eps, out_dtype):
    y = F.layer_norm(x.to(_math(x.dtype)), x.shape[-1:], eps=eps)
    return (y * (1 + scale[:, None]) + shift[:, None]).to(out_dtype)


def gate_residual_norm_modulate_reference(x, y, gate, shift, scale, eps, out_dtype):
    y = y.to(_math(x.dtype))
    x = (x + (y if gate is None else y * gate[:, None])).to(x.dtype)
    return x, norm_modulate_reference(x, shift, scale, eps, out_dtype)


# ---------------------------------------------------------------------------------------------------- kernels
# A program owns whole rows and holds one as a tuple of blocks: 5120 is 5 * 1024 and 1536 is 3 * 512, so that
# no lane idles as it would in the next power of two. A thread's 16 bytes hold whole pairs, which split and
# join turn in registers without giving up 128-bit loads. F is the dtype of the mathematics.
@jit
def _get(row, c, D: tl.constexpr, BLOCK: tl.constexpr, F: tl.constexpr, KEEP: tl.constexpr = False):
    """Block c of a row in dtype F, zero beyond its end; KEEP in L1 what the next row needs again."""
    i = tl.arange(0, BLOCK)
    row += c * BLOCK  # on the scalar: on the lanes' offsets it takes 40 registers for addresses, and spills
    policy: tl.constexpr = "evict_last" if KEEP else "evict_first"
    if D % BLOCK == 0:
        x = tl.load(row + i, eviction_policy=policy)
    else:
        x = tl.load(row + i, mask=i < D - c * BLOCK, other=0.0, eviction_policy=policy)
    return x.to(F)


@jit
def _put(row, c, x, D: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row += c * BLOCK
    if D % BLOCK == 0:
        tl.store(row + i, x)
    else:
        tl.store(row + i, x, mask=i < D - c * BLOCK)


@jit
def _zeros(BLOCK: tl.constexpr, CHUNKS: tl.constexpr, F: tl.constexpr):
    row = ()
    for _ in tl.static_range(CHUNKS):
        row = row + (tl.zeros((BLOCK,), F),)
    return row


@jit
def _angles(positions, cos, sin, token, P, K: tl.constexpr, T: tl.constexpr, H: tl.constexpr,
            BLOCK: tl.constexpr, F: tl.constexpr):
    """cos and sin of a token for the pairs of one block, the same for every block (_plan sees to it).
    Gathered, since computing them takes 2.7 times the instructions and loses digits far out."""
    i = tl.arange(0, BLOCK // 2) % (K // 2)
    p = tl.load(positions + token * 3 + (i >= T).to(tl.int32) + (i >= T + H).to(tl.int32))
    inside = (p >= 0) & (p < P)
    cos = tl.load(cos + p * (K // 2) + i, mask=inside, other=float("nan"), eviction_policy="evict_last")
    sin = tl.load(sin + p * (K // 2) + i, mask=inside, other=float("nan"), eviction_policy="evict_last")
    return cos.to(F), sin.to(F)


@jit
def _turn(x, cos, sin, BLOCK: tl.constexpr):
    a, b = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (BLOCK,))


@jit
def _qk_forward(q, k, weight_q, weight_k, positions, cos, sin, q_out, k_out, rstd, L, P,
                EPS: tl.constexpr, D: tl.constexpr, K: tl.constexpr, T: tl.constexpr, H: tl.constexpr,
                BLOCK: tl.constexpr, CHUNKS: tl.constexpr, F: tl.constexpr):
    """Grid (B*L, 2): one row of q or of k a program. rstd [2, B*L] is r below."""
    row = tl.program_id(0).to(tl.int64)
    x, weight, out = q, weight_q, q_out
    if tl.program_id(1) == 1:
        x, weight, out = k, weight_k, k_out
    co, si = _angles(positions, cos, sin, row % L, P, K, T, H, BLOCK, F)
    xs = ()
    squares = tl.zeros((BLOCK,), F)
    for c in tl.static_range(CHUNKS):
        xs = xs + (_get(x + row * D, c, D, BLOCK, F),)
        squares += xs[c] * xs[c]
    r = tl.rsqrt(tl.sum(squares) / D + EPS)
    tl.store(rstd + tl.program_id(1) * tl.num_programs(0) + row, r)
    for c in tl.static_range(CHUNKS):
        y = xs[c] * r * _get(weight, c, D, BLOCK, F, True)
        _put(out + row * D, c, _turn(y, co, si, BLOCK), D, BLOCK)


@jit
def _qk_backward(q, k, weight_q, weight_k, positions, cos, sin, rstd, q_grad, k_grad, dq, dk, partial,
                 rows, L, P, D: tl.constexpr, K: tl.constexpr, T: tl.constexpr, H: tl.constexpr,
                 BLOCK: tl.constexpr, CHUNKS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
                 F: tl.constexpr):
    """Grid (programs, 2): STEPS rows of q or of k each, and their sum for the weight in partial
    [2, programs, D]. With y = hat * w, hat = x * r and r = 1/rms(x): dw = sum of dy * hat,
    dx = r * (dy * w - hat * mean(dy * w * hat)). The trip count is compiled in because the interpreter of
    triton 3.6 cannot loop over a runtime range with numpy >= 2.4."""
    x, weight, grad, dx = q, weight_q, q_grad, dq
    if tl.program_id(1) == 1:
        x, weight, grad, dx = k, weight_k, k_grad, dk
    rstd += tl.program_id(1) * rows
    dw = _zeros(BLOCK, CHUNKS, F)
    for step in tl.range(STEPS, num_stages=STAGES):
        row = tl.program_id(0) + step * tl.num_programs(0)
        live = (row < rows).to(F)  # a program without a row left repeats the last one and does not count it
        row = tl.minimum(row, rows - 1).to(tl.int64)
        co, si = _angles(positions, cos, sin, row % L, P, K, T, H, BLOCK, F)
        r = tl.load(rstd + row)
        sums, hats, dys = (), (), ()
        dots = tl.zeros((BLOCK,), F)
        for c in tl.static_range(CHUNKS):
            dy = _turn(_get(grad + row * D, c, D, BLOCK, F), co, -si, BLOCK)  # turned back
            hat = _get(x + row * D, c, D, BLOCK, F) * r
            sums = sums + (dw[c] + dy * hat * live,)
            dy = dy * _get(weight, c, D, BLOCK, F, True)
            dots += dy * hat
            hats, dys = hats + (hat,), dys + (dy,)
        dw = sums
        mean = tl.sum(dots) / D
        for c in tl.static_range(CHUNKS):
            _put(dx + row * D, c, r * (dys[c] - hats[c] * mean), D, BLOCK)
    partial += (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * D
    for c in tl.static_range(CHUNKS):
        _put(partial, c, dw[c], D, BLOCK)


@jit
def _modulate_forward(x, y, gate, shift, scale, total, out, stats, L, EPS: tl.constexpr, D: tl.constexpr,
                      BLOCK: tl.constexpr, CHUNKS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
                      F: tl.constexpr):
    """Grid (B*L,): one row a program. stats [2, B*L]: mean and 1/std."""
    row = tl.program_id(0).to(tl.int64)
    at, b = row * D, row // L * D
    xs = ()
    sums = tl.zeros((BLOCK,), F)
    for c in tl.static_range(CHUNKS):
        v = _get(x + at, c, D, BLOCK, F)
        if RESIDUAL:
            add = _get(y + at, c, D, BLOCK, F)
            if GATED:
                add = add * _get(gate + b, c, D, BLOCK, F, True)
            v = (v + add).to(total.dtype.element_ty)  # the norm of what is stored, as the backward sees it
            _put(total + at, c, v, D, BLOCK)
            v = v.to(F)
        xs = xs + (v,)
        sums += v
    mean = tl.sum(sums) / D
    squares = tl.zeros((BLOCK,), F)
    for c in tl.static_range(CHUNKS):
        off = xs[c] - mean
        if D % BLOCK != 0:
            off = tl.where(c * BLOCK + tl.arange(0, BLOCK) < D, off, 0.0)
        squares += off * off
    r = tl.rsqrt(tl.sum(squares) / D + EPS)
    tl.store(stats + row, mean)
    tl.store(stats + tl.num_programs(0) + row, r)
    for c in tl.static_range(CHUNKS):
        hat = (xs[c] - mean) * r
        by = 1 + _get(scale + b, c, D, BLOCK, F, True)
        _put(out + at, c, hat * by + _get(shift + b, c, D, BLOCK, F, True), D, BLOCK)


@jit
def _modulate_backward(total, y, gate, scale, stats, total_grad, out_grad, dx, dy, partial, rows, L,
                       D: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, STEPS: tl.constexpr,
                       STAGES: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, F: tl.constexpr):
    """Grid (programs, B): STEPS rows of one sample each, and their sums for shift, scale and gate in partial
    [3, B, programs, D]. With hat = (x - mean) * r and g = dout * (1 + scale):
    dx = r * (g - mean(g) - hat * mean(g * hat)), plus the sum's own gradient."""
    b = tl.program_id(1).to(tl.int64)
    dshift, dscale = _zeros(BLOCK, CHUNKS, F), _zeros(BLOCK, CHUNKS, F)
    dgate = _zeros(BLOCK, CHUNKS, F)
    for step in tl.range(STEPS, num_stages=STAGES):
        row = tl.program_id(0) + step * tl.num_programs(0)
        live = (row < L).to(F)
        row = b * L + tl.minimum(row, L - 1)
        at = row * D
        mean = tl.load(stats + row)
        r = tl.load(stats + rows + row)
        hats, gs, shifts, scales, gates = (), (), (), (), ()
        ones, dots = tl.zeros((BLOCK,), F), tl.zeros((BLOCK,), F)
        for c in tl.static_range(CHUNKS):
            g = _get(out_grad + at, c, D, BLOCK, F)
            hat = (_get(total + at, c, D, BLOCK, F) - mean) * r
            shifts, scales = shifts + (dshift[c] + g * live,), scales + (dscale[c] + g * hat * live,)
            g = g + g * _get(scale + b * D, c, D, BLOCK, F, True)
            ones += g
            dots += g * hat
            hats, gs = hats + (hat,), gs + (g,)
        dshift, dscale = shifts, scales
        one, dot = tl.sum(ones) / D, tl.sum(dots) / D
        for c in tl.static_range(CHUNKS):
            d = r * (gs[c] - one - hats[c] * dot)
            if RESIDUAL:
                d += _get(total_grad + at, c, D, BLOCK, F)
            _put(dx + at, c, d, D, BLOCK)
            if GATED:
                gates = gates + (dgate[c] + d * _get(y + at, c, D, BLOCK, F) * live,)
                d = d * _get(gate + b * D, c, D, BLOCK, F, True)
            if RESIDUAL:
                _put(dy + at, c, d, D, BLOCK)
        if GATED:
            dgate = gates
    partial += (b * tl.num_programs(0) + tl.program_id(0)) * D
    size = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * D
    for c in tl.static_range(CHUNKS):
        _put(partial, c, dshift[c], D, BLOCK)
        _put(partial + size, c, dscale[c], D, BLOCK)
        if GATED:
            _put(partial + 2 * size, c, dgate[c], D, BLOCK)


# ----------------------------------------------------------------------------------------------------- launch
SWEPT = {}  # what `--sweep` tries instead of _plan's choice


def _plan(D, K, dtype, itemsize, live):
    """How a row is cut, and a thread's share: 16 bytes a load, and as few registers as a compile for sm_90
    needs without spilling (tests do that): 28 and `live` per element. Fewer let more programs share an SM."""
    block = D & -D
    if block < 256 or block % K or D // block > 8:
        block = 1 << (D - 1).bit_length()
    chunks = -(-D // block)
    warps = SWEPT.get("num_warps") or min(8, max(1, block * itemsize // 512))
    registers = 28 + live * block * chunks / (32 * warps)
    registers = SWEPT.get("maxnreg") or int(min(248, max(64, -(-registers // 8) * 8)))
    return dict(D=D, BLOCK=block, CHUNKS=chunks, F=tl.float64 if dtype == torch.float64 else tl.float32,
                num_warps=warps, maxnreg=registers)


def _qk_plan(D, K, dtype, backward=False):
    t, h, _ = axis_pairs(K)
    return dict(_plan(D, K, dtype, dtype.itemsize, 3.5 if backward else 1.1), K=K, T=t, H=h)


def _modulate_plan(D, dtype, residual, gated, backward=False):
    """16 bytes of the float32 residual stream, 8 of what is bf16 beside it: the sums need the registers."""
    live = 1.1 if not backward else 7.5 if gated else 5
    return dict(_plan(D, 1, dtype, 4, live), RESIDUAL=residual, GATED=gated)


def _spread(rows, plan, device, shares):
    """Programs of a backward launch, and how many rows each of them walks. They fill the GPU once, so that
    the partial sums are [programs, D]. Steps are rounded up: they are compiled in, and L changes with the
    references."""
    if device.type == "cuda":
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        full = sms * (65536 // (plan["maxnreg"] * 32 * plan["num_warps"])) // shares
    else:
        full = 2
    programs = max(1, min(rows, full))
    steps = -(-rows // programs)
    steps += -steps % (8 if steps > 64 else 1)
    return -(-rows // steps) if rows else 0, steps


def _launch(kernel, grid, *args, **options):
    if all(grid):
        with torch.cuda.device_of(args[0]):
            kernel[grid](*args, **options)


# -------------------------------------------------------------------------------------------- torch operators
@torch.library.custom_op("harmoview::qk_norm_rope", mutates_args=())
def _qk(q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor,
        eps: float) -> tuple[Tensor, Tensor, Tensor]:
    B, L, D = q.shape
    q, k, weight_q, weight_k, positions, cos, sin = (
        x.contiguous() for x in (q, k, weight_q, weight_k, positions, cos, sin))
    q_out, k_out, rstd = _qk_fake(q, k, weight_q, weight_k, positions, cos, sin, eps)
    _launch(_qk_forward, (B * L, 2), q, k, weight_q, weight_k, positions, cos, sin, q_out, k_out, rstd,
            L, len(cos), EPS=eps, **_qk_plan(D, q_out.shape[-1], q.dtype))
    return q_out, k_out, rstd


@_qk.register_fake
def _qk_fake(q, k, weight_q, weight_k, positions, cos, sin, eps):
    B, L, D = q.shape
    K = 2 * cos.shape[1]
    return (q.new_empty(B, L, D // K, K), q.new_empty(B, L, D // K, K),
            q.new_empty(2, B, L, dtype=_math(q.dtype)))  # 1/rms of q's and k's rows


@torch.library.custom_op("harmoview::qk_norm_rope_backward", mutates_args=())
def _qk_grad(q_grad: Tensor, k_grad: Tensor, q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor,
             positions: Tensor, cos: Tensor, sin: Tensor, rstd: Tensor
             ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, L, D = q.shape
    q_grad, k_grad, q, k, weight_q, weight_k, positions, cos, sin = (
        x.contiguous() for x in (q_grad, k_grad, q, k, weight_q, weight_k, positions, cos, sin))
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    plan = _qk_plan(D, 2 * cos.shape[1], q.dtype, backward=True)
    programs, steps = _spread(B * L, plan, q.device, shares=2)
    partial = rstd.new_empty(2, programs, D)
    _launch(_qk_backward, (programs, 2), q, k, weight_q, weight_k, positions, cos, sin, rstd, q_grad, k_grad,
            dq, dk, partial, B * L, L, len(cos), STEPS=steps, STAGES=SWEPT.get("stages", 1), **plan)
    return dq, dk, partial[0].sum(0).to(weight_q.dtype), partial[1].sum(0).to(weight_k.dtype)


@_qk_grad.register_fake
def _(q_grad, k_grad, q, k, weight_q, weight_k, positions, cos, sin, rstd):
    return tuple(x.new_empty(x.shape) for x in (q, k, weight_q, weight_k))


def _qk_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-1], output[2])


def _qk_autograd(ctx, q_grad, k_grad, _):
    return *_qk_grad(q_grad, k_grad, *ctx.saved_tensors), None, None, None, None


_qk.register_autograd(_qk_autograd, setup_context=_qk_setup)


@torch.library.custom_op("harmoview::modulate", mutates_args=())
def _modulate(x: Tensor, y: Optional[Tensor], gate: Optional[Tensor], shift: Tensor, scale: Tensor,
              eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    B, L, D = x.shape
    x, y, gate, shift, scale = (None if z is None else z.contiguous() for z in (x, y, gate, shift, scale))
    total, out, stats = _modulate_fake(x, y, gate, shift, scale, eps, out_dtype)
    _launch(_modulate_forward, (B * L,), x, y, gate, shift, scale, total, out, stats, L, EPS=eps,
            **_modulate_plan(D, x.dtype, y is not None, gate is not None))
    return total, out, stats


@_modulate.register_fake
def _modulate_fake(x, y, gate, shift, scale, eps, out_dtype):
    total = x.new_empty(x.shape if y is not None else 0)  # without y there is no new sum
    return total, x.new_empty(x.shape, dtype=out_dtype), x.new_empty(2, *x.shape[:2], dtype=_math(x.dtype))


@torch.library.custom_op("harmoview::modulate_backward", mutates_args=())
def _modulate_grad(total_grad: Tensor, out_grad: Tensor, total: Tensor, y: Optional[Tensor],
                   gate: Optional[Tensor], shift: Tensor, scale: Tensor, stats: Tensor
                   ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, L, D = total.shape
    total_grad, out_grad, total, y, gate, scale = (
        None if z is None else z.contiguous() for z in (total_grad, out_grad, total, y, gate, scale))
    grads = _modulate_grad_fake(total_grad, out_grad, total, y, gate, shift, scale, stats)
    dx, dy, dgate, dshift, dscale = grads
    plan = _modulate_plan(D, total.dtype, y is not None, gate is not None, backward=True)
    programs, steps = _spread(L, plan, total.device, shares=max(B, 1))
    partial = stats.new_empty(2 + (gate is not None), B, programs, D)
    _launch(_modulate_backward, (programs, B), total, y, gate, scale, stats, total_grad, out_grad, dx, dy,
            partial, B * L, L, STEPS=steps, STAGES=SWEPT.get("stages", 1), **plan)
    sums = partial.sum(2)  # [2 or 3, B, D]
    for grad, value in zip((dshift, dscale, dgate), sums):
        grad.copy_(value)
    return grads


@_modulate_grad.register_fake
def _modulate_grad_fake(total_grad, out_grad, total, y, gate, shift, scale, stats):
    return tuple(total.new_empty(0) if x is None else x.new_empty(x.shape)
                 for x in (total, y, gate, shift, scale))


def _modulate_setup(ctx, inputs, output):
    x, y, gate, shift, scale, _, _ = inputs
    ctx.save_for_backward(x if y is None else output[0], y, gate, shift, scale, output[2])


def _modulate_autograd(ctx, total_grad, out_grad, _):
    _, y, gate, *_ = ctx.saved_tensors
    dx, dy, dgate, dshift, dscale = _modulate_grad(total_grad, out_grad, *ctx.saved_tensors)
    return dx, None if y is None else dy, None if gate is None else dgate, dshift, dscale, None, None


_modulate.register_autograd(_modulate_autograd, setup_context=_modulate_setup)


# -------------------------------------------------------------------------------------------------- functions
def _expect(name, x, shape, device, dtypes=DTYPES):
    if list(x.shape) != list(shape):
        raise UserError(f"{name} is {list(x.shape)}; expected {list(shape)}")
    if x.dtype not in dtypes:
        raise UserError(f"{name} is {x.dtype}; expected {' or '.join(str(d).split('.')[1] for d in dtypes)}")
    if x.device != device:
        raise UserError(f"{name} is on {x.device}, the first argument on {device}")


def qk_norm_rope(q, k, weight_q, weight_k, positions, tables, eps):
    """RMSNorm of q and k over the full width, then rotary of adjacent pairs by each token's (t, h, w).

    q, k          [B, L, D], both float32, bfloat16 or float16; the mathematics is float32, rounded once
    weight_q, _k  [D], both of one of these dtypes
    positions     int [L, 3], each below len(tables.cos)
    tables        rope_tables(positions, K): K comes from here
    Returns q, k [B, L, D/K, K], contiguous, in the dtype that came.
    Differentiable in the first four, once; saved for it are its inputs and two floats a token.
    Raises UserError where a shape, dtype, device or position does not fit. On the video's own positions it is
    Wan 2.1's WanRMSNorm and rope_apply.
    """
    K = 2 * tables.cos.shape[1]
    if q.ndim != 3 or q.shape[2] % K:
        raise UserError(f"q is {list(q.shape)}; expected [B, L, D] with D a multiple of the head width {K}")
    _expect("q", q, q.shape, q.device)
    _expect("k", k, q.shape, q.device, (q.dtype,))
    _expect("weight_q", weight_q, q.shape[2:], q.device)
    _expect("weight_k", weight_k, q.shape[2:], q.device, (weight_q.dtype,))
    _expect("positions", positions, (q.shape[1], 3), q.device, (torch.int64, torch.int32))
    _expect("tables.cos", tables.cos, tables.cos.shape, q.device, (torch.float32,))
    _expect("tables.sin", tables.sin, tables.cos.shape, q.device, (torch.float32,))
    check_positions(positions, tables)
    if _runs_fused(q):
        return _qk(q, k, weight_q, weight_k, positions, *tables, eps)[:2]
    return qk_norm_rope_reference(q, k, weight_q, weight_k, positions, tables, eps)


def _expect_modulation(x, **rows):
    if x.ndim != 3:
        raise UserError(f"x is {list(x.shape)}; expected [B, L, D]")
    _expect("x", x, x.shape, x.device)
    for name, row in rows.items():
        if row is not None:
            _expect(name, row, (x.shape[0], x.shape[2]), x.device)


def norm_modulate(x, shift, scale, eps, out_dtype=None):
    """LayerNorm of x [B, L, D] without weights, times 1 + scale, plus shift, both [B, D]; float32 inside,
    returned in out_dtype (None: that of x). Raises UserError where a shape, dtype or device does not fit."""
    out_dtype = out_dtype or x.dtype
    _expect_modulation(x, shift=shift, scale=scale)
    if _runs_fused(x):
        return _modulate(x, None, None, shift, scale, eps, out_dtype)[1]
    return norm_modulate_reference(x, shift, scale, eps, out_dtype)


def gate_residual_norm_modulate(x, y, gate, shift, scale, eps, out_dtype=None):
    """x + gate * y in the dtype of x, and norm_modulate of it in out_dtype.

    x, y  [B, L, D], not necessarily of one dtype    gate, shift, scale  [B, D]; gate None is x + y
    A LayerNorm with weight and bias [D] is shift = bias, scale = weight - 1, expanded to [B, D].
    Raises UserError where a shape, dtype or device does not fit.
    """
    out_dtype = out_dtype or x.dtype
    _expect_modulation(x, gate=gate, shift=shift, scale=scale)
    _expect("y", y, x.shape, x.device)
    if _runs_fused(x):
        return _modulate(x, y, gate, shift, scale, eps, out_dtype)[:2]
    return gate_residual_norm_modulate_reference(x, y, gate, shift, scale, eps, out_dtype)


# ------------------------------------------------------------------------------------------- checks and bench
KERNELS = {  # bytes an element, forward and backward, for bf16 beside a float32 residual stream
    "qk_norm_rope": (8, 12), "norm_modulate": (6, 10),
    "residual_norm_modulate": (12, 16), "gate_residual_norm_modulate": (12, 18)}
BASES = {"1.3B": (12, 128), "14B": (40, 128)}  # N, K
TOKENS, TOP = 39_000, 150  # of the bench: 81 frames at 480x832 and four views; positions below TOP


def plain_qk_norm_rope(q, k, weight_q, weight_k, cos, sin, eps):
    """What one writes without a kernel: F.rms_norm in the dtype of q, rotary by even and odd halves."""
    def one(x, weight):
        x = F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
        a, b = x.unflatten(-1, (-1, cos.shape[1], 2)).unbind(-1)  # [B, L, N, K/2]
        c, s = cos[:, None], sin[:, None]
        return torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2).to(x.dtype)
    return one(q, weight_q), one(k, weight_k)


def complex_qk_norm_rope(q, k, weight_q, weight_k, turn, eps):
    """The arithmetic of Wan's official code, written afresh: float32 norm, rotary in complex128 [L, K/2]."""
    def one(x, weight):
        y = x.to(_math(x.dtype))
        y = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
        y = torch.view_as_complex(y.double().unflatten(-1, (-1, turn.shape[1], 2)))  # [B, L, N, K/2]
        return torch.view_as_real(y * turn[:, None]).flatten(-2).to(x.dtype)
    return one(q, weight_q), one(k, weight_k)


def case(kernel, B, L, N, K, dtype, device):
    """Random inputs for one of KERNELS: a function of them that returns a tuple, the inputs, and gradients of
    what it returns. Residual stream and modulation are float32 or wider, as in model.py."""
    draw = torch.Generator(device).manual_seed(L * N + K)

    def rand(*shape, dtype=_math(dtype)):
        return torch.randn(shape, device=device, generator=draw).to(dtype).requires_grad_()
    x, y, q, k = rand(B, L, N * K), *(rand(B, L, N * K, dtype=dtype) for _ in range(3))
    gate, shift, scale = (rand(B, N * K) for _ in range(3))
    x_grad, out_grad = rand(B, L, N * K).detach(), rand(B, L, N * K, dtype=dtype).detach()
    if kernel == "qk_norm_rope":
        positions = torch.randint(0, TOP, (L, 3), device=device, generator=draw)
        tables = rope_tables(positions, K)
        return (lambda *x: qk_norm_rope(*x, positions, tables, 1e-6),
                [q, k, rand(N * K, dtype=dtype), rand(N * K, dtype=dtype)],
                [out_grad.unflatten(-1, (N, K)), y.detach().unflatten(-1, (N, K))])
    if kernel == "norm_modulate":
        return lambda *x: (norm_modulate(*x, 1e-6, dtype),), [x, shift, scale], [out_grad]
    if kernel == "residual_norm_modulate":
        return (lambda x, y, *m: gate_residual_norm_modulate(x, y, None, *m, 1e-6, dtype),
                [x, y, shift, scale], [x_grad, out_grad])
    return (lambda *x: gate_residual_norm_modulate(*x, 1e-6, dtype),
            [x, y, gate, shift, scale], [x_grad, out_grad])


def off(found, truth):
    """The largest error as a share of the largest value."""
    found, truth = found.detach().double(), truth.detach().double()
    return float((found - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


def check(kernel, B, L, N, K, dtype, device):
    """The kernel's worst error over outputs and gradients, as a share of what is allowed, and a line on it.
    Truth is the reference in float64. float32 may be off by 1e-5; bf16 and fp16 by twice what the reference
    in that dtype is, and by one bf16 ulp in the interpreter, which cuts digits where a GPU rounds."""
    fn, args, grads = case(kernel, B, L, N, K, dtype, device)
    exact = case(kernel, B, L, N, K, torch.float64, device)[0]
    found = []
    for fused, fn, to in ((True, fn, torch.Tensor.detach), (False, fn, torch.Tensor.detach),
                          (False, exact, torch.Tensor.double)):
        use_fused(fused)
        leaves = [to(x.detach()).requires_grad_() for x in args]
        outputs = fn(*leaves)
        found.append([*outputs, *torch.autograd.grad(outputs, leaves, [to(g) for g in grads])])
    use_fused(None)
    fused, eager = ([off(x, truth) for x, truth in zip(way, found[2])] for way in found[:2])
    allowed = [1e-5 if dtype == torch.float32 else 2 * error + INTERPRET * 2**-8 for error in eager]
    worst, n = max(error / (bound + 1e-12) for error, bound in zip(fused, allowed)), len(grads)
    return worst, (f"{kernel:28} {str(dtype)[6:]:9} B {B} L {L:3} N {N:2} K {K:3}  "
                   f"forward {max(fused[:n]):.1e}  backward {max(fused[n:]):.1e}  "
                   f"{worst:6.1%} of what is allowed")


def check_all(device):
    """Print every check; True where all passed."""
    shapes = [(1, 1, 1, 32), (2, 3, 3, 24), (1, 5, 12, 128)] if INTERPRET else [
        (1, 1, 1, 64), (2, 129, 3, 24), (2, 257, 12, 128), (1, 515, 40, 128)]
    passed = True
    for kernel, dtype, shape in itertools.product(KERNELS, DTYPES[:3], shapes):
        worst, line = check(kernel, *shape, dtype, device)
        passed &= worst <= 1
        print(line if worst <= 1 else f"{line}  FAILED", flush=True)
    return passed


def microseconds(fn, calls=10):
    """Median of five batches. The GPU first sleeps while calls queue up, so that launching costs nothing, and
    a call moves far more than the cache holds."""
    times = []
    for _ in range(6):  # the first one warms up
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(40_000_000)
        start.record()
        for _ in range(calls):
            fn()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls * 1000)
    return statistics.median(times[1:])


def time_both(fn, args, grads, fused):
    """Microseconds of the forward and of the backward."""
    use_fused(fused)
    with torch.no_grad():
        forward = microseconds(lambda: fn(*args))
    outputs = fn(*args)
    return forward, microseconds(lambda: torch.autograd.grad(outputs, args, grads, retain_graph=True))


def bench(device):
    """Every kernel forward and backward at the shapes of BASES, in bf16: prints and returns the table."""
    from torch._functorch import config
    config.donated_buffer = False  # else compiled code refuses to run one backward again
    a = torch.empty(2, 2**31, dtype=torch.uint8, device=device)
    copy = a.numel() / microseconds(lambda: a[1].copy_(a[0])) * 1e6  # read and written
    print(f"\n{torch.cuda.get_device_name(device)}, copy {copy / 1e12:.2f} TB/s; L {TOKENS}, bf16; how many "
          f"times faster than\n{'':43} {'us':>7} {'GB/s':>6} of copy  official   eager compiled")
    rows = []
    for kernel, (base, (N, K)) in itertools.product(KERNELS, BASES.items()):
        fn, args, grads = case(kernel, 1, TOKENS, N, K, torch.bfloat16, device)
        ways = {"eager": fn, "compiled": torch.compile(fn, dynamic=False)}
        if kernel == "qk_norm_rope":
            cos, sin = rope_table(torch.randint(0, TOP, (TOKENS, 3), device=device), K)
            turn = torch.complex(cos.double(), sin.double())
            # without complex numbers, for which torch.compile generates no code
            plain = functools.partial(plain_qk_norm_rope, cos=cos, sin=sin, eps=1e-6)
            ways = {"official": functools.partial(complex_qk_norm_rope, turn=turn, eps=1e-6),
                    "eager": plain, "compiled": torch.compile(plain, dynamic=False)}
        ours = time_both(fn, args, grads, True)
        others = {name: time_both(way, args, grads, False) for name, way in ways.items()}
        for i, direction in enumerate(("forward", "backward")):
            rate = KERNELS[kernel][i] * TOKENS * N * K / ours[i] * 1e6
            rows.append(dict(kernel=kernel, base=base, direction=direction, us=round(ours[i], 1),
                             gb_s=round(rate / 1e9), of_copy=round(rate / copy, 3),
                             **{name: round(times[i] / ours[i], 2) for name, times in others.items()}))
            print(f"{kernel:28} {base:5} {direction:8} {ours[i]:7.1f} {rate / 1e9:6.0f} {rate / copy:7.1%}  "
                  f"{rows[-1].get('official', '-'):>8} {rows[-1]['eager']:>7} {rows[-1]['compiled']:>8}",
                  flush=True)
    use_fused(None)
    return dict(gpu=torch.cuda.get_device_name(device), torch=torch.__version__, triton=triton.__version__,
                tokens=TOKENS, dtype="bfloat16", copy_gb_s=round(copy / 1e9), rows=rows)


def sweep(device):
    """Times of every backward for other choices than _plan's: what to write there for another GPU."""
    for kernel, (base, (N, K)) in itertools.product(KERNELS, BASES.items()):
        tried = []
        for choice in itertools.product((2, 4, 8) if N < 40 else (4, 8, 16), (104, 168, 248), (1, 2)):
            SWEPT.update(zip(("num_warps", "maxnreg", "stages"), choice))
            try:
                us = time_both(*case(kernel, 1, TOKENS, N, K, torch.bfloat16, device), True)[1]
                tried.append((round(us), *choice))
            except Exception as error:  # more registers or shared memory than there are
                print(f"{kernel} {base} {choice}: {str(error).splitlines()[0]}")
        SWEPT.clear()
        print(f"{kernel} {base} backward, (us, warps, registers, stages):", *sorted(tried)[:6], flush=True)
    use_fused(None)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Check the fused kernels and time them.")
    parser.add_argument("--out", type=Path, default=Path("out/kernels.json"), help="the table as JSON")
    parser.add_argument("--sweep", action="store_true", help="also time other launch choices (minutes)")
    args = parser.parse_args(argv)
    if triton is None:
        raise UserError("Triton cannot be imported here: there is nothing to check")
    gpu = torch.cuda.is_available() and not INTERPRET
    if not gpu and not INTERPRET:
        print("no GPU here: timing needs one. To check the kernels without, set TRITON_INTERPRET=1")
        return
    if not check_all(torch.device("cuda" if gpu else "cpu")):
        raise UserError("a kernel is off by more than is allowed: see FAILED above")
    if not gpu:
        print("all checks passed in Triton's interpreter; timing needs a GPU")
        return
    table = bench(torch.device("cuda"))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(table, indent=1))
    print(f"wrote {args.out}")
    if args.sweep:
        sweep(torch.device("cuda"))


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"kernels.py: {error}")
