"""RMSNorm of q and k over the full width, then rotary by each token's (t, h, w), as one fused Triton kernel,
forward and backward, beside its reference.

Tensors on a GPU go through Triton, all others through the reference in PyTorch; use_fused() overrides that.
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

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import UserError, run_script
from rope import apply_rope, axis_pairs, rope_table

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
_tables = {}


def rope_tables(positions, head_dim, theta=1e4):
    """Tables, computed in float64 as Wan does, that hold these positions (int [L, 3]); cached and, on demand,
    grown to the next power of two. Waits for the GPU: call it where a layout is built, not in every block.
    Raises UserError for positions of another shape or dtype, negative or beyond MAX_POSITION."""
    _expect(positions.device, positions=(positions, (*positions.shape[:1], 3), torch.int64, torch.int32))
    low, high = (int(x) for x in positions.aminmax()) if positions.numel() else (0, 0)  # waits for the GPU
    if low < 0 or high >= MAX_POSITION:
        raise UserError(f"positions go from {low} to {high}; expected 0 to {MAX_POSITION - 1}")
    key = head_dim, theta, positions.device
    if key not in _tables or len(_tables[key].cos) <= high:
        with torch.inference_mode(False):  # a table made while sampling has to serve training too
            every = torch.arange(max(64, 1 << high.bit_length()), device=positions.device)
            _tables[key] = RopeTables(*rope_table(every[:, None].expand(-1, 3), head_dim, theta))
    return _tables[key]


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
def _forward(x, y, scale, gate, positions, cos, sin, out, total, stats, L, P, EPS: constexpr, D: constexpr,
             K: constexpr, T: constexpr, H: constexpr, SPAN: constexpr, BLOCK: constexpr, CHUNKS: constexpr,
             F: constexpr):
    """Grid (B*L, 2), one row a program: x, scale and out are q, its weight and its output, and y, gate and
    total those of k. stats [B*L, 2]: 1/rms of q and of k."""
    row = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 1:
        x, scale, out = y, gate, total
    at = row * D
    given = _row(x + at, D, BLOCK, CHUNKS)
    co, si = _angles(positions, cos, sin, row % L, P, K, T, H, SPAN, F)
    xs, squares = (), tl.zeros((BLOCK,), F)
    for c in tl.static_range(CHUNKS):
        xs = xs + (given[c].to(F),)
        squares += xs[c] * xs[c]
    r = tl.rsqrt(tl.sum(squares) / D + EPS)
    tl.store(stats + row * 2 + tl.program_id(1), r)
    for c in tl.static_range(CHUNKS):
        z = _turn(xs[c] * r * _get(scale, c, D, BLOCK).to(F), co, si, SPAN, BLOCK)
        _put(out + at, c, z, D, BLOCK)


@jit
def _backward(x, y, scale, gate, positions, cos, sin, stats, out_grad, total_grad, dx, dy, partial, ROWS, L,
              P, D: constexpr, K: constexpr, T: constexpr, H: constexpr, SPAN: constexpr, BLOCK: constexpr,
              CHUNKS: constexpr, STEPS: constexpr, F: constexpr):
    """Grid (programs, 2): STEPS of the ROWS of q or of k each: x, scale, out_grad, dx are q's, and y, gate,
    total_grad and dy k's. Their sums for the weights in partial [2, programs, D].
    With hat = x * r and g = dout, turned back, * weight: dx = r * (g - hat * mean(g * hat)).
    The trip count is compiled in because the interpreter of triton 3.6 cannot loop over a runtime range with
    numpy >= 2.4."""
    b = tl.program_id(1).to(tl.int64)
    partial += (b * tl.num_programs(0) + tl.program_id(0)) * D
    stats += b
    if b == 1:
        x, scale, out_grad, dx = y, gate, total_grad, dy
    dscale = (tl.zeros((BLOCK,), F),) * CHUNKS
    for step in tl.range(STEPS, num_stages=1):  # with two the loop still waits for each row's loads
        row = tl.program_id(0) + step * tl.num_programs(0)
        live = (row < ROWS).to(F)  # a program without a row left repeats the last one and does not count it
        row = tl.minimum(row, ROWS - 1).to(tl.int64)
        at = row * D
        given, grads = _row(x + at, D, BLOCK, CHUNKS), _row(out_grad + at, D, BLOCK, CHUNKS)
        r = tl.load(stats + row * 2)
        co, si = _angles(positions, cos, sin, row % L, P, K, T, H, SPAN, F)
        hats, gs, scales, dots = (), (), (), tl.zeros((BLOCK,), F)
        for c in tl.static_range(CHUNKS):
            g = _turn(grads[c].to(F), co, -si, SPAN, BLOCK)
            hats = hats + (given[c].to(F) * r,)
            scales = scales + (dscale[c] + g * hats[c] * live,)
            gs = gs + (g * _get(scale, c, D, BLOCK).to(F),)
            dots += gs[c] * hats[c]
        dscale = scales
        dot = tl.sum(dots) / D
        for c in tl.static_range(CHUNKS):
            _put(dx + at, c, r * (gs[c] - hats[c] * dot), D, BLOCK)
    for c in tl.static_range(CHUNKS):
        _put(partial, c, dscale[c], D, BLOCK)


# ---------------------------------------------------------------------------------- launch as torch operators
def _plan(D, dtype, K, backward=False):
    """How a row is cut, and a thread's share: 16 bytes a load of x, and as few registers as a compile for
    sm_90 needs without spilling (tests do that): 28 and `live` per element. Fewer let more programs share an
    SM."""
    block = D & -D
    if block < 256 or block % K or D // block > 8:
        block = 1 << (D - 1).bit_length()
    chunks, (t, h, _) = -(-D // block), axis_pairs(K)
    live = 3.5 if backward else 1.1
    warps = min(8, max(1, block * dtype.itemsize // 512))
    registers = -(-(28 + live * block * chunks / (32 * warps)) // 8) * 8
    return dict(D=D, K=K, T=t, H=h, SPAN=block if K & (K - 1) else K, BLOCK=block, CHUNKS=chunks,
                F=tl.float64 if dtype == torch.float64 else tl.float32,
                num_warps=warps, maxnreg=int(min(248, max(64, registers))))


def _launch(kernel, grid, *args, **options):
    if all(grid):
        with torch.cuda.device_of(args[0]):
            kernel[grid](*(x.contiguous() if isinstance(x, Tensor) else x for x in args), **options)


@torch.library.custom_op("harmoview::norm", mutates_args=())
def _norm(x: Tensor, y: Tensor, scale: Tensor, gate: Tensor, positions: Tensor, cos: Tensor, sin: Tensor,
          eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm and rotary of q and k, and 1/rms for the backward: q and its weight are x and scale, k and its
    weight y and gate."""
    (B, L, D), (P, half) = x.shape, cos.shape
    outputs = _norm_fake(x, y, scale, gate, positions, cos, sin, eps)
    _launch(_forward, (B * L, 2), x, y, scale, gate, positions, cos, sin, *outputs, L, P, EPS=eps,
            **_plan(D, x.dtype, 2 * half))
    return outputs


@_norm.register_fake
def _norm_fake(x, y, scale, gate, positions, cos, sin, eps):
    shape = x.unflatten(-1, (-1, 2 * cos.shape[1])).shape  # [B, L, N, K]
    return x.new_empty(shape), x.new_empty(shape), x.new_empty(*x.shape[:2], 2, dtype=_math(x.dtype))


@torch.library.custom_op("harmoview::norm_backward", mutates_args=())
def _norm_grad(out_grad: Tensor, total_grad: Tensor, x: Tensor, y: Tensor, scale: Tensor, gate: Tensor,
               positions: Tensor, cos: Tensor, sin: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, of k and, stacked in float32, of their weights."""
    (B, L, D), (P, half) = x.shape, cos.shape
    dx, dy, sums = _norm_grad_fake(out_grad, total_grad, x, y, scale, gate, positions, cos, sin, stats)
    rows, plan = B * L, _plan(D, x.dtype, 2 * half, backward=True)
    programs = 2
    if x.is_cuda:  # as many as just fill it, for each adds its sums to partial
        sms = torch.cuda.get_device_properties(x.device).multi_processor_count
        fit = max(1, 65536 // (plan["maxnreg"] * 32 * plan["num_warps"]))  # on an SM, by registers
        programs = max(1, sms * fit // 2)
    steps = -(-rows // programs)
    steps += -steps % (8 if steps > 64 else 1)  # they are compiled in, and L changes with the references
    programs = -(-rows // max(steps, 1))
    partial = sums.new_empty(2, programs, D)
    _launch(_backward, (programs, 2), x, y, scale, gate, positions, cos, sin, stats, out_grad, total_grad, dx,
            dy, partial, rows, L, P, STEPS=steps, **plan)
    return dx, dy, partial.sum(-2)


@_norm_grad.register_fake
def _norm_grad_fake(out_grad, total_grad, x, y, scale, gate, positions, cos, sin, stats):
    return x.new_empty(x.shape), y.new_empty(y.shape), stats.new_empty(2, *scale.shape)


def _norm_setup(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, output[2])


def _norm_autograd(ctx, out_grad, total_grad, _):
    dx, dy, sums = _norm_grad(out_grad, total_grad, *ctx.saved_tensors)
    dscale, dgate = sums.to(ctx.saved_tensors[2].dtype)
    return dx, dy, dscale, dgate, *[None] * 4


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
    positions     int [L, 3], each below len(tables.cos): the kernel gives NaN for others
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
    if _runs_fused(q):
        return _norm(q, k, weight_q, weight_k, positions, cos, sin, eps)[:2]
    return qk_norm_rope_reference(q, k, weight_q, weight_k, positions, tables, eps)


# ------------------------------------------------------------------------------------------- checks and bench
KERNELS = {"qk_norm_rope": (8, 12)}  # bytes an element forward and backward, in bf16
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
    """The kernel as a function of its tensors, random tensors, and gradients of what it returns."""
    draw = torch.Generator(device).manual_seed(L * N + K)
    at = torch.randint(0, TOP, (L, 3), device=device, generator=draw)
    tables = rope_tables(at, K)

    def rand(shape):
        return torch.randn(shape, device=device, generator=draw).to(dtype).requires_grad_()

    def fn(*args):
        return qk_norm_rope(*args, at, tables, 1e-6)
    args = [rand(shape) for shape in [(B, L, N * K)] * 2 + [(N * K,)] * 2]
    return fn, args, [rand(y.shape) for y in fn(*args)]


def off(found, truth):
    """The largest error as a share of the largest value."""
    found, truth = found.detach().double(), truth.detach().double()
    return float((found - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


def check(kernel, shape, dtype, device):
    """The kernel's worst error over outputs and gradients, as a share of what is allowed, and a line on it.
    Truth is the reference in float64. float32 may be off by 1e-5; bf16 and fp16 by twice what the reference
    in that dtype is, and by one bf16 ulp in the interpreter, which cuts digits where a GPU rounds."""
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


def bench(device):
    """Every kernel forward and backward at the shapes of BASES, in bf16: prints and returns the table."""
    from torch._functorch import config
    config.donated_buffer = False  # else compiled code refuses to run one backward again
    a = torch.empty(2, 2**31, dtype=torch.uint8, device=device)
    copy = a.numel() / microseconds(lambda: a[1].copy_(a[0])) * 1e6  # read and written
    gpu, rows = torch.cuda.get_device_name(device), []
    print(f"\n{gpu}, copy {copy / 1e12:.2f} TB/s; L {TOKENS}, bf16; how many times faster than\n"
          f"{'':43} {'us':>7} {'GB/s':>6} of copy  official   eager compiled")
    for kernel, (base, (N, K)) in product(KERNELS, BASES.items()):
        fn, args, grads = case(kernel, 1, TOKENS, N, K, torch.bfloat16, device)
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
                  f"{faster['official']:>8} {faster['eager']:>7} {faster['compiled']:>8}")
    use_fused(None)
    return dict(gpu=gpu, torch=torch.__version__, triton=triton.__version__, tokens=TOKENS, dtype="bfloat16",
                copy_gb_s=round(copy / 1e9), rows=rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Check the fused kernels and time them.")
    parser.add_argument("--out", type=Path, default=Path("out/kernels.json"), help="the table as JSON")
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
    args.out.write_text(json.dumps(bench(device), indent=1))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main)
