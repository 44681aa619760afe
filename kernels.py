"""Fused Triton kernels for what is memory-bound in a block, forward and backward, each beside its reference.

  qk_norm_rope                  RMSNorm over the full width, then rotary by each token's (t, h, w); q and k
  norm_modulate                 LayerNorm, then x * (1 + scale) + shift
  gate_residual_norm_modulate   x + gate * y, and norm_modulate of that sum

Tensors on a GPU go through Triton, all others through the references in PyTorch; use_fused() overrides that.
Positions are data, an integer tensor [L, 3]: every layout of rope.py runs through the same kernel.

  python kernels.py    checks, then a table of times against the copy bandwidth of this GPU;
                       without a GPU the checks alone, in Triton's interpreter

B batch, L tokens, D width, N heads, K head width, D = N*K, P rows of the rotary tables.
"""
import argparse
import json
import os
from collections import namedtuple
from itertools import product
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from rope import UserError, apply_rope, axis_pairs, rope_table, run_script

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it decorates, that is below
try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.language import constexpr  # by this name: the interpreter compares it as a string
except ImportError:  # no wheels outside Linux
    triton, jit, constexpr = None, lambda f: f, None

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
    fused = triton and torch.cuda.is_available() and not INTERPRET if choice is None else choice
    return f"fused Triton kernels{' (interpreted)' * INTERPRET}" if fused else "PyTorch reference kernels"


def _runs_fused(x):
    if _fused and not (x.is_cuda or INTERPRET):
        raise UserError(f"fused kernels were asked for a tensor on {x.device}; they need a GPU, "
                        "or TRITON_INTERPRET=1 before the start")
    return triton is not None and x.is_cuda and not INTERPRET if _fused is None else _fused


# ------------------------------------------------------------------------------------------ positions, tables
# cos and sin of every position by every pair of a head, float32 [P, K // 2]; a token's row is gathered pair
# by pair: the first pairs at its t, the next at its h, the last at its w (rope.axis_pairs)
RopeTables = namedtuple("RopeTables", "cos sin")
_tables, _checked = {}, WeakIdKeyDictionary()


def _highest(positions, size, what):
    low, high = (int(x) for x in positions.aminmax()) if positions.numel() else (0, 0)  # waits for the GPU
    if low < 0 or high >= size:
        raise UserError(f"positions go from {low} to {high}; {what} 0 to {size - 1}")
    return high


def rope_tables(positions, head_dim, theta=1e4):
    """Tables, computed in float64 as Wan does, that hold these positions (int [L, 3]); cached and, on demand,
    grown to the next power of two. Waits for the GPU: call it where a layout is built, not in every block.
    Raises UserError for positions of another shape or dtype, negative or beyond MAX_POSITION."""
    _expect(positions.device, positions=(positions, (*positions.shape[:1], 3), torch.int64, torch.int32))
    high = _highest(positions, MAX_POSITION, "expected")
    key = head_dim, theta, positions.device
    if key not in _tables or len(_tables[key].cos) <= high:
        with torch.inference_mode(False):  # a table made while sampling has to serve training too
            every = torch.arange(max(64, 1 << high.bit_length()), device=positions.device)
            _tables[key] = RopeTables(*rope_table(every[:, None].expand(-1, 3), head_dim, theta))
    return _tables[key]


def check_positions(positions, tables):
    """Raise UserError for a position that the tables do not hold. A tensor is looked at once, and again after
    a change in place or with shorter tables; not while compiling: then, and for all that slips through, the
    kernels give NaN for such a token and read nothing out of bounds."""
    if not torch.compiler.is_compiling():
        seen = (None if positions.is_inference() else positions._version), len(tables.cos)
        if _checked.get(positions) != seen:
            _highest(positions, len(tables.cos), "the tables hold")
            _checked[positions] = seen


# ------------------------------------------------------------------------------------------------- references
def _math(dtype):
    return torch.promote_types(dtype, torch.float32)


def qk_norm_rope_reference(q, k, weight_q, weight_k, positions, tables, eps):
    pair = torch.arange(tables.cos.shape[1], device=q.device)
    t, h, _ = axis_pairs(2 * len(pair))
    at = positions[:, (pair >= t).long() + (pair >= t + h).long()].long()  # [L, K/2]

    def one(x, weight):
        math = _math(x.dtype)
        y = F.rms_norm(x.to(math), x.shape[-1:], weight.to(math), eps).unflatten(-1, (-1, 2 * len(pair)))
        return apply_rope(y, tables.cos[at, pair], tables.sin[at, pair]).to(x.dtype)  # [B, L, N, K]
    return one(q, weight_q), one(k, weight_k)


def norm_modulate_reference(x, shift, scale, eps, out_dtype):
    y = F.layer_norm(x.to(_math(x.dtype)), x.shape[-1:], eps=eps)
    return (y * (1 + scale[:, None]) + shift[:, None]).to(out_dtype)


def gate_residual_norm_modulate_reference(x, y, gate, shift, scale, eps, out_dtype):
    if y is not None:
        y = y.to(_math(x.dtype))
        x = (x + (y if gate is None else y * gate[:, None])).to(x.dtype)
    return x, norm_modulate_reference(x, shift, scale, eps, out_dtype)


# ---------------------------------------------------------------------------------------------------- kernels
# A program owns whole rows and holds one as a tuple of blocks: 5120 is 5 * 1024 and 1536 is 3 * 512, so that
# no lane idles as it would in the next power of two. A thread's 16 bytes hold whole pairs, which split and
# join turn in registers without giving up 128-bit loads. F is the dtype of the mathematics.
@jit
def _get(row, c, D: constexpr, BLOCK: constexpr, KEEP: constexpr = True):
    """Block c of a row, zero beyond its end; KEEP in L1 what the next row needs again."""
    i = tl.arange(0, BLOCK)
    policy: constexpr = "evict_last" if KEEP else "evict_first"
    row += c * BLOCK  # on the scalar: on the lanes' offsets it takes 40 registers for addresses, and spills
    return tl.load(row + i, mask=i < D - c * BLOCK, other=0.0, eviction_policy=policy)


@jit
def _row(row, D: constexpr, BLOCK: constexpr, CHUNKS: constexpr):
    """A whole row, read once. A program asks for all that it reads of it before it computes: no load moves up
    over a store or a barrier, and behind one it would wait for memory once more."""
    xs = ()
    for c in tl.static_range(CHUNKS):
        xs = xs + (_get(row, c, D, BLOCK, False),)
    return xs


@jit
def _put(row, c, x, D: constexpr, BLOCK: constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(row + c * BLOCK + i, x, mask=i < D - c * BLOCK)  # where BLOCK divides D, both compile without


@jit
def _angles(positions, cos, sin, token, P, K: constexpr, T: constexpr, H: constexpr, SPAN: constexpr,
            F: constexpr):
    """cos and sin [1, SPAN // 2] of a token, for the pairs of one head (of a block where a head's width is no
    power of two): where there are more threads than that, as at 5120, each gathers just those that it needs,
    and none pass through shared memory. Computing them takes 2.7 times the instructions and loses digits far
    out."""
    i = tl.arange(0, SPAN // 2) % (K // 2)
    p = tl.load(positions + token * 3 + (i >= T).to(tl.int32) + (i >= T + H).to(tl.int32))
    inside = (p >= 0) & (p < P)
    cos = tl.load(cos + p * (K // 2) + i, mask=inside, other=float("nan"), eviction_policy="evict_last")
    sin = tl.load(sin + p * (K // 2) + i, mask=inside, other=float("nan"), eviction_policy="evict_last")
    return cos.to(F)[None, :], sin.to(F)[None, :]


@jit
def _turn(x, cos, sin, SPAN: constexpr, BLOCK: constexpr):
    a, b = tl.split(tl.reshape(x, (BLOCK // SPAN, SPAN // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (BLOCK,))


@jit
def _forward(x, y, gate, shift, scale, positions, cos, sin, total, out, stats, L, P, EPS: constexpr,
             D: constexpr, K: constexpr, T: constexpr, H: constexpr, SPAN: constexpr, BLOCK: constexpr,
             CHUNKS: constexpr, RESIDUAL: constexpr, GATED: constexpr, F: constexpr):
    """Grid (B*L, 1), one row a program; before a rotary (B*L, 2): x, scale and out are q, its weight and its
    output, and y, gate and total those of k. stats [B*L, 2]: 1/std and mean, or 1/rms of q and of k."""
    row = tl.program_id(0).to(tl.int64)
    if K:  # known when compiling, so not joined with the next by `and`
        if tl.program_id(1) == 1:
            x, scale, out = y, gate, total
    at, b = row * D, row // L * D
    given = _row(x + at, D, BLOCK, CHUNKS)
    if RESIDUAL:
        adds = _row(y + at, D, BLOCK, CHUNKS)
        tl.debug_barrier()  # see the backward
    if K:
        co, si = _angles(positions, cos, sin, row % L, P, K, T, H, SPAN, F)
    xs, sums, squares = (), tl.zeros((BLOCK,), F), tl.zeros((BLOCK,), F)
    for c in tl.static_range(CHUNKS):
        v = given[c].to(F)
        if RESIDUAL:
            add = adds[c].to(F)
            if GATED:
                add = add * _get(gate + b, c, D, BLOCK).to(F)
            v = (v + add).to(total.dtype.element_ty)  # the norm of what is stored, as the backward sees it
            _put(total + at, c, v, D, BLOCK)
        xs = xs + (v.to(F),)
        sums += xs[c]
    mean = 0.0 if K else tl.sum(sums) / D
    for c in tl.static_range(CHUNKS):
        off = tl.where(c * BLOCK + tl.arange(0, BLOCK) < D, xs[c] - mean, 0.0)
        squares += off * off
    r = tl.rsqrt(tl.sum(squares) / D + EPS)
    tl.store(stats + row * 2 + tl.program_id(1), r)
    if not K:
        tl.store(stats + row * 2 + 1, mean)
    for c in tl.static_range(CHUNKS):
        if K:
            z = _turn(xs[c] * r * _get(scale, c, D, BLOCK).to(F), co, si, SPAN, BLOCK)
        else:
            by = 1 + _get(scale + b, c, D, BLOCK).to(F)
            z = (xs[c] - mean) * r * by + _get(shift + b, c, D, BLOCK).to(F)
        _put(out + at, c, z, D, BLOCK)


@jit
def _backward(x, y, gate, scale, positions, cos, sin, stats, total_grad, out_grad, dx, dy, partial, ROWS, L,
              P, D: constexpr, K: constexpr, T: constexpr, H: constexpr, SPAN: constexpr, BLOCK: constexpr,
              CHUNKS: constexpr, STEPS: constexpr, RESIDUAL: constexpr, GATED: constexpr, F: constexpr):
    """Grid (programs, B): STEPS of a sample's ROWS each, and their sums for scale, shift and gate in partial
    [2 or 3, B, programs, D]. Before a rotary (programs, 2), of all rows of q or of k: x, scale, out_grad and
    dx are q's, and y, gate, total_grad and dy k's; partial is [2, programs, D].
    With hat = (x - mean) * r and g = dout * (1 + scale), or, turned back, dout * weight:
    dx = r * (g - mean(g) - hat * mean(g * hat)), plus the sum's own gradient; without mean(g) for RMSNorm.
    The trip count is compiled in because the interpreter of triton 3.6 cannot loop over a runtime range with
    numpy >= 2.4."""
    b = tl.program_id(1).to(tl.int64)
    partial += (b * tl.num_programs(0) + tl.program_id(0)) * D
    if K:
        stats += b
        if b == 1:
            x, scale, out_grad, dx = y, gate, total_grad, dy
        b = 0  # its rows are those of all samples
    dshift, dscale, dgate = ((tl.zeros((BLOCK,), F),) * CHUNKS,) * 3  # in another order triton 3.6 spills
    for step in tl.range(STEPS, num_stages=1):  # with two the loop still waits for each row's loads
        row = tl.program_id(0) + step * tl.num_programs(0)
        live = (row < ROWS).to(F)  # a program without a row left repeats the last one and does not count it
        row = b * ROWS + tl.minimum(row, ROWS - 1).to(tl.int64)
        at = row * D
        given, grads = _row(x + at, D, BLOCK, CHUNKS), _row(out_grad + at, D, BLOCK, CHUNKS)
        if RESIDUAL:
            totals = _row(total_grad + at, D, BLOCK, CHUNKS)
            if GATED:
                adds = _row(y + at, D, BLOCK, CHUNKS)
            tl.debug_barrier()  # else the assembler moves the last loads down, behind the wait for the first
        r, mean = tl.load(stats + row * 2), 0.0
        if K:
            co, si = _angles(positions, cos, sin, row % L, P, K, T, H, SPAN, F)
        else:
            mean = tl.load(stats + row * 2 + 1)
        hats, gs, shifts, scales, gates = (), (), (), (), ()
        ones, dots = tl.zeros((BLOCK,), F), tl.zeros((BLOCK,), F)
        for c in tl.static_range(CHUNKS):
            g = grads[c].to(F)
            if K:
                g = _turn(g, co, -si, SPAN, BLOCK)
            hats = hats + ((given[c].to(F) - mean) * r,)
            shifts, scales = shifts + (dshift[c] + g * live,), scales + (dscale[c] + g * hats[c] * live,)
            by = _get(scale + b * D, c, D, BLOCK).to(F)
            gs = gs + (g * by if K else g + g * by,)
            ones += gs[c]
            dots += gs[c] * hats[c]
        dshift, dscale = shifts, scales
        if K:
            one, dot = 0.0, tl.sum(dots) / D
        else:
            one, dot = tl.split(tl.sum(tl.join(ones, dots), 0) / D)  # one round of barriers for both
        for c in tl.static_range(CHUNKS):
            # made again from bf16: held, the float32 takes ten registers that two programs an SM do not have
            # (and g + g * by, as above, spills)
            g = gs[c] if K else grads[c].to(F) * (1 + _get(scale + b * D, c, D, BLOCK).to(F))
            d = r * (g - one - hats[c] * dot)
            if RESIDUAL:
                d += totals[c].to(F)
            _put(dx + at, c, d, D, BLOCK)
            if GATED:
                gates = gates + (dgate[c] + d * adds[c].to(F) * live,)
                d = d * _get(gate + b * D, c, D, BLOCK).to(F)
            if RESIDUAL:
                _put(dy + at, c, d, D, BLOCK)
        if GATED:
            dgate = gates
    size = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * D
    for c in tl.static_range(CHUNKS):
        _put(partial, c, dscale[c], D, BLOCK)
        if not K:
            _put(partial + size, c, dshift[c], D, BLOCK)
        if GATED:
            _put(partial + 2 * size, c, dgate[c], D, BLOCK)


# ---------------------------------------------------------------------------------- launch as torch operators
SWEPT = {}  # what `--sweep` tries instead of _plan's choice


def _plan(D, dtype, K=0, residual=False, gated=False, backward=False):
    """How a row is cut, and a thread's share: 16 bytes a load of x (with a residual stream in float32 8 of
    what is bf16 beside it), and as few registers as a compile for sm_90 needs without spilling (tests do
    that): 28 and `live` per element. Fewer let more programs share an SM. K is 0 where nothing is turned."""
    block = D & -D
    if block < 256 or (K and block % K) or D // block > 8:
        block = 1 << (D - 1).bit_length()
    chunks, (t, h, _) = -(-D // block), axis_pairs(K)
    live = 1.1 if not backward else 3.5 if K else 7.5 if gated else 5
    warps = SWEPT.get("num_warps") or min(8, max(1, block * (dtype.itemsize if K else 4) // 512))
    registers = -(-(28 + live * block * chunks / (32 * warps)) // 8) * 8
    return dict(D=D, K=K, T=t, H=h, SPAN=block if K & (K - 1) else K, BLOCK=block, CHUNKS=chunks,
                RESIDUAL=residual and not K, GATED=gated and not K,
                F=tl.float64 if dtype == torch.float64 else tl.float32,
                num_warps=warps, maxnreg=SWEPT.get("maxnreg") or int(min(248, max(64, registers))))


def _launch(kernel, grid, *args, **options):
    if all(grid):
        with torch.cuda.device_of(args[0]):
            kernel[grid](*(x.contiguous() if isinstance(x, Tensor) else x for x in args), **options)


@torch.library.custom_op("harmoview::norm", mutates_args=())
def _norm(x: Tensor, y: Optional[Tensor], gate: Optional[Tensor], shift: Optional[Tensor], scale: Tensor,
          positions: Optional[Tensor], cos: Optional[Tensor], sin: Optional[Tensor], eps: float,
          out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x + gate * y (empty without y), its LayerNorm modulated by the rows in scale and shift, and the norm's
    statistics for the backward. With positions RMSNorm and rotary of two tensors at once: q and its weight
    are x and scale, k and its weight y and gate, and k comes back first."""
    (B, L, D), (P, half) = x.shape, (0, 0) if cos is None else cos.shape
    outputs = _norm_fake(x, y, gate, shift, scale, positions, cos, sin, eps, out_dtype)
    _launch(_forward, (B * L, 1 if cos is None else 2), x, y, gate, shift, scale, positions, cos, sin,
            *outputs, L, P, EPS=eps, **_plan(D, x.dtype, 2 * half, y is not None, gate is not None))
    return outputs


@_norm.register_fake
def _norm_fake(x, y, gate, shift, scale, positions, cos, sin, eps, out_dtype):
    out = x if cos is None else x.unflatten(-1, (-1, 2 * cos.shape[1]))  # [B, L, D] or [B, L, N, K]
    return (x.new_empty(0 if y is None else out.shape), x.new_empty(out.shape, dtype=out_dtype),
            x.new_empty(*x.shape[:2], 2, dtype=_math(x.dtype)))


@torch.library.custom_op("harmoview::norm_backward", mutates_args=())
def _norm_grad(total_grad: Tensor, out_grad: Tensor, x: Tensor, y: Optional[Tensor], gate: Optional[Tensor],
               scale: Tensor, positions: Optional[Tensor], cos: Optional[Tensor], sin: Optional[Tensor],
               stats: Tensor, y_dtype: Optional[torch.dtype]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of y, and, stacked in float32, of scale, shift and gate as far as there are such."""
    (B, L, D), (P, half) = x.shape, (0, 0) if cos is None else cos.shape
    dx, dy, sums = _norm_grad_fake(total_grad, out_grad, x, y, gate, scale, positions, cos, sin, stats,
                                   y_dtype)
    samples, rows = (B, L) if cos is None else (2, B * L)
    plan = _plan(D, x.dtype, 2 * half, y_dtype is not None, gate is not None, backward=True)
    programs = 2
    if x.is_cuda:  # as many as just fill it, for each adds its sums to partial
        sms = torch.cuda.get_device_properties(x.device).multi_processor_count
        fit = max(1, 65536 // (plan["maxnreg"] * 32 * plan["num_warps"]))  # on an SM, by registers
        programs = max(1, sms * fit // max(samples, 1))
    steps = -(-rows // programs)
    steps += -steps % (8 if steps > 64 else 1)  # they are compiled in, and L changes with the references
    programs = -(-rows // max(steps, 1))
    partial = sums.new_empty(*sums.shape[:-1], programs, D)
    _launch(_backward, (programs, samples), x, y, gate, scale, positions, cos, sin, stats, total_grad,
            out_grad, dx, dy, partial, rows, L, P, STEPS=steps, **plan)
    return dx, dy, partial.sum(-2)


@_norm_grad.register_fake
def _norm_grad_fake(total_grad, out_grad, x, y, gate, scale, positions, cos, sin, stats, y_dtype):
    return (x.new_empty(x.shape), x.new_empty(0) if y_dtype is None else x.new_empty(x.shape, dtype=y_dtype),
            stats.new_empty((cos is None) + 1 + (gate is not None), *scale.shape))


def _norm_setup(ctx, inputs, output):
    x, y, gate, shift, scale, *rotary, _, _ = inputs
    x = x if y is None or rotary[0] is not None else output[0]
    # without a gate the sum's gradient does not need y, but only its dtype
    ctx.dtypes = [None if z is None else z.dtype for z in (y, scale, shift, gate)]
    ctx.save_for_backward(x, None if gate is None else y, gate, scale, *rotary, output[2])


def _norm_autograd(ctx, total_grad, out_grad, _):
    y_dtype, *dtypes = ctx.dtypes
    dx, dy, sums = _norm_grad(total_grad, out_grad, *ctx.saved_tensors, y_dtype)
    sums = iter(sums)
    dscale, dshift, dgate = (None if dtype is None else next(sums).to(dtype) for dtype in dtypes)
    return dx, None if y_dtype is None else dy, dgate, dshift, dscale, *[None] * 5


_norm.register_autograd(_norm_autograd, setup_context=_norm_setup)


# -------------------------------------------------------------------------------------------------- functions
def _expect(device, **arguments):
    """Raise UserError for an argument, name=(tensor or None, shape, *dtypes), that is not as it says."""
    for name, (x, shape, *dtypes) in arguments.items():
        dtypes = dtypes or DTYPES
        if x is not None and (list(x.shape) != list(shape) or x.dtype not in dtypes or x.device != device):
            raise UserError(f"{name} is {x.dtype} {list(x.shape)} on {x.device}; expected "
                            f"{' or '.join(map(str, dtypes))} {list(shape)} on {device}")


def qk_norm_rope(q, k, weight_q, weight_k, positions, tables, eps):
    """RMSNorm of q and k over the full width, then rotary of adjacent pairs by each token's (t, h, w).

    q, k          [B, L, D], both float32, bfloat16 or float16; the mathematics is float32, rounded once
    weight_q, _k  [D], both of one of these dtypes
    positions     int [L, 3], each below len(tables.cos)
    tables        rope_tables(positions, K): K comes from here
    Returns q, k [B, L, D/K, K], contiguous, in the dtype that came.
    Differentiable in the first four, once; saved for it are its inputs and two floats a token. On the video's
    own positions it is Wan 2.1's WanRMSNorm and rope_apply. Raises UserError where something does not fit.
    """
    cos, sin = tables
    K = 2 * cos.shape[1]
    if q.ndim != 3 or q.shape[2] % K:
        raise UserError(f"q is {list(q.shape)}; expected [B, L, D] with D a multiple of the head width {K}")
    _, L, D = q.shape
    _expect(q.device, q=(q, q.shape), k=(k, q.shape, q.dtype),
            weight_q=(weight_q, (D,)), weight_k=(weight_k, (D,), weight_q.dtype),
            positions=(positions, (L, 3), torch.int64, torch.int32),
            cos=(cos, cos.shape, torch.float32), sin=(sin, cos.shape, torch.float32))
    check_positions(positions, tables)
    if _runs_fused(q):
        k, q, _ = _norm(q, k, weight_k, None, weight_q, positions, cos, sin, eps, q.dtype)
        return q, k
    return qk_norm_rope_reference(q, k, weight_q, weight_k, positions, tables, eps)


def norm_modulate(x, shift, scale, eps, out_dtype=None):
    """LayerNorm of x [B, L, D] without weights, times 1 + scale, plus shift, both [B, D]; float32 inside,
    returned in out_dtype (None: that of x). Raises UserError where a shape, dtype or device does not fit."""
    return gate_residual_norm_modulate(x, None, None, shift, scale, eps, out_dtype)[1]


def gate_residual_norm_modulate(x, y, gate, shift, scale, eps, out_dtype=None):
    """x + gate * y in the dtype of x, and norm_modulate of it in out_dtype.

    x, y  [B, L, D], not necessarily of one dtype    gate, shift, scale  [B, D]
    gate None is x + y, and y None (then gate too) is x itself.
    A LayerNorm with weight and bias [D] is shift = bias, scale = weight - 1, expanded to [B, D].
    """
    if x.ndim != 3 or (y is None and gate is not None):
        raise UserError(f"x is {list(x.shape)}; expected [B, L, D], and a gate only where there is a y")
    (B, _, D), out_dtype = x.shape, out_dtype or x.dtype
    _expect(x.device, x=(x, x.shape), y=(y, x.shape), gate=(gate, (B, D)), shift=(shift, (B, D)),
            scale=(scale, (B, D)))
    if not _runs_fused(x):
        return gate_residual_norm_modulate_reference(x, y, gate, shift, scale, eps, out_dtype)
    total, out, _ = _norm(x, y, gate, shift, scale, None, None, None, eps, out_dtype)
    return x if y is None else total, out


# ------------------------------------------------------------------------------------------- checks and bench
KERNELS = {  # bytes an element forward and backward, for bf16 beside a float32 residual stream, and inputs:
    "qk_norm_rope": (8, 12, "yyww"),  # x the residual stream [B, L, D], y [B, L, D], r [B, D], w [D]
    "norm_modulate": (6, 10, "xrr"), "residual_norm_modulate": (12, 16, "xyrr"),
    "gate_residual_norm_modulate": (12, 18, "xyrrr")}
BASES = {"1.3B": (12, 128), "14B": (40, 128)}  # N, K
TOKENS, TOP = 39_000, 150  # of the bench: 81 frames at 480x832 and four views; positions below TOP


def plain_norm_rope(x, weight, cos, sin, eps):
    """What one writes without a kernel: F.rms_norm in the dtype of x, rotary by even and odd halves."""
    x = F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
    a, b = x.unflatten(-1, (-1, cos.shape[1], 2)).unbind(-1)  # [B, L, N, K/2]
    c, s = cos[:, None], sin[:, None]
    return torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2).to(x.dtype)


def complex_norm_rope(x, weight, turn, eps):
    """The arithmetic of Wan's official code, written afresh: float32 norm, rotary in complex128 [L, K/2]."""
    y = x.to(_math(x.dtype))
    y = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
    y = torch.view_as_complex(y.double().unflatten(-1, (-1, turn.shape[1], 2)))  # [B, L, N, K/2]
    return torch.view_as_real(y * turn[:, None]).flatten(-2).to(x.dtype)


def case(kernel, B, L, N, K, dtype, device):
    """One of KERNELS as a function of its tensors that returns a tuple, random tensors, and gradients of what
    it returns. Residual stream and modulation are float32 or wider, as in model.py."""
    draw = torch.Generator(device).manual_seed(L * N + K)
    at = torch.randint(0, TOP, (L, 3), device=device, generator=draw)
    tables, shapes = rope_tables(at, K), dict(x=(B, L, N * K), y=(B, L, N * K), r=(B, N * K), w=(N * K,))

    def rand(shape, dtype):
        return torch.randn(shape, device=device, generator=draw).to(dtype).requires_grad_()

    def fn(x, y, *rows):
        if kernel == "qk_norm_rope":
            return qk_norm_rope(x, y, *rows, at, tables, 1e-6)
        if kernel == "norm_modulate":
            return norm_modulate(x, y, *rows, 1e-6, dtype),
        gate = [None] * (3 - len(rows))
        return gate_residual_norm_modulate(x, y, *gate, *rows, 1e-6, dtype)
    args = [rand(shapes[which], _math(dtype) if which in "xr" else dtype) for which in KERNELS[kernel][2]]
    return fn, args, [rand(y.shape, y.dtype) for y in fn(*args)]


def off(found, truth):
    """The largest error as a share of the largest value."""
    found, truth = found.detach().double(), truth.detach().double()
    return float((found - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


def check(kernel, shape, dtype, device):
    """The kernel's worst error over outputs and gradients, as a share of what is allowed, and a line on it.
    Truth is the reference in float64. float32 may be off by 1e-5; bf16 and fp16 by twice what the reference
    in that dtype is, and by one bf16 ulp in the interpreter, which cuts digits where a GPU rounds; what is
    float32 beside them, a residual stream or a modulation's gradient, by 1e-5 too."""
    fn, args, grads = case(kernel, *shape, dtype, device)
    exact = case(kernel, *shape, torch.float64, device)[0]
    found = []
    for fused, fn, to in (True, fn, Tensor.detach), (False, fn, Tensor.detach), (False, exact, Tensor.double):
        use_fused(fused)
        leaves = [to(x.detach()).requires_grad_() for x in args]
        outputs = fn(*leaves)
        found.append([*outputs, *torch.autograd.grad(outputs, leaves, [to(g) for g in grads])])
    use_fused(None)
    fused, eager = ([off(x, truth) for x, truth in zip(way, found[2])] for way in found[:2])
    allowed = [1e-5 if x.dtype == torch.float32 else 2 * error + INTERPRET * 2**-8
               for x, error in zip(found[0], eager)]
    worst = max(error / (bound + 1e-12) for error, bound in zip(fused, allowed))
    return worst, (f"{kernel:28} {str(dtype)[6:]:9} B L N K {str(shape):18} {max(fused):.1e} off, "
                   f"{worst:6.1%} of what is allowed")


def microseconds(fn, calls=10):
    """Median of five batches. The GPU first sleeps while calls queue up, so that launching costs nothing, and
    a call moves far more than the cache holds."""
    times = []
    for _ in range(6):  # the first one warms up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(40_000_000)
        start.record()
        for _ in range(calls):
            fn()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls * 1000)
    return sorted(times[1:])[2]


def time_both(fn, args, grads, fused):
    """Microseconds of the forward and of the backward."""
    use_fused(fused)
    with torch.no_grad():
        forward = microseconds(lambda: fn(*args))
    outputs = fn(*args)
    return forward, microseconds(lambda: torch.autograd.grad(outputs, args, grads, retain_graph=True))


def bench(device, sweep):
    """Every kernel forward and backward at the shapes of BASES, in bf16: prints and returns the table. With
    sweep also with other choices than _plan's, the three best printed: what to write there for this GPU."""
    from torch._functorch import config
    config.donated_buffer = False  # else compiled code refuses to run one backward again
    a = torch.empty(2, 2**31, dtype=torch.uint8, device=device)
    copy = a.numel() / microseconds(lambda: a[1].copy_(a[0])) * 1e6  # read and written
    gpu, rows = torch.cuda.get_device_name(device), []
    print(f"\n{gpu}, copy {copy / 1e12:.2f} TB/s; L {TOKENS}, bf16; how many times faster than\n"
          f"{'':43} {'us':>7} {'GB/s':>6} of copy  official   eager compiled")
    for kernel, (base, (N, K)) in product(KERNELS, BASES.items()):
        fn, args, grads = case(kernel, 1, TOKENS, N, K, torch.bfloat16, device)
        ways = {"eager": fn}
        if kernel == "qk_norm_rope":
            cos, sin = rope_table(torch.randint(0, TOP, (TOKENS, 3), device=device), K)
            turn = torch.complex(cos.double(), sin.double())
            ways = {"official": lambda q, k, *w: [complex_norm_rope(*x, turn, 1e-6) for x in zip((q, k), w)],
                    "eager": lambda q, k, *w: [plain_norm_rope(*x, cos, sin, 1e-6) for x in zip((q, k), w)]}
        torch._dynamo.reset()  # eight compilations of one function are its limit; then it runs eagerly
        ways["compiled"] = torch.compile(ways["eager"], dynamic=False)
        ours = time_both(fn, args, grads, True)
        others = {name: time_both(way, args, grads, False) for name, way in ways.items()}
        for i, direction in enumerate(("forward", "backward")):
            rate = KERNELS[kernel][i] * TOKENS * N * K / ours[i] * 1e6
            faster = {name: round(times[i] / ours[i], 2) for name, times in others.items()}
            rows.append(dict(kernel=kernel, base=base, direction=direction, us=round(ours[i], 1),
                             gb_s=round(rate / 1e9), of_copy=round(rate / copy, 3), **faster))
            print(f"{kernel:28} {base:5} {direction:8} {ours[i]:7.1f} {rate / 1e9:6.0f} {rate / copy:7.1%}  "
                  f"{faster.get('official', '-'):>8} {faster['eager']:>7} {faster['compiled']:>8}")
        swept = []
        for choice in product((2, 4, 8) if N < 40 else (4, 8, 16), (64, 104, 168, 248)) if sweep else ():
            SWEPT.update(zip(("num_warps", "maxnreg"), choice))
            try:
                swept.append((*time_both(fn, args, grads, True), choice))
            except Exception as error:  # more registers or shared memory than there are
                print(f"  {choice}: {str(error).splitlines()[0][:80]}")
        for i, row in enumerate(rows[-2:] if swept else ()):
            row["swept"] = sorted((way[i], way[2]) for way in swept)
            for us, choice in row["swept"][:3]:
                print(f"  {row['direction']:8} {us:7.1f} us with {', '.join(SWEPT)} {choice}", flush=True)
        SWEPT.clear()
    use_fused(None)
    return dict(gpu=gpu, torch=torch.__version__, triton=triton.__version__, tokens=TOKENS, dtype="bfloat16",
                copy_gb_s=round(copy / 1e9), rows=rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Check the fused kernels and time them.")
    parser.add_argument("--out", type=Path, default=Path("out/kernels.json"), help="the table as JSON")
    parser.add_argument("--sweep", action="store_true", help="also time other launch choices (minutes)")
    args = parser.parse_args(argv)
    device = torch.device("cpu" if INTERPRET else "cuda")
    shapes = [(1, 1, 1, 32), (2, 3, 3, 24), (1, 5, 12, 128)] if INTERPRET else [
        (1, 1, 1, 64), (2, 129, 3, 24), (2, 257, 12, 128), (1, 515, 40, 128)]
    found = []
    for kernel, dtype, shape in product(KERNELS, DTYPES[:3], shapes):
        worst, line = check(kernel, shape, dtype, device)
        found.append(worst <= 1)
        print(line if found[-1] else f"{line}  FAILED", flush=True)
    if not all(found):
        raise UserError("a kernel is off by more than is allowed: see FAILED above")
    if INTERPRET:
        return print("all checks passed in Triton's interpreter; timing needs a GPU")
    args.out.parent.mkdir(parents=True, exist_ok=True)  # an error now, not after minutes
    args.out.write_text(json.dumps(bench(device, args.sweep), indent=1))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main)
