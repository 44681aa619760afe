"""QK-norm and Jump-RoPE in one fused Triton kernel, forward and backward, next to their PyTorch reference.

  q, k [B, L, D] -> RMSNorm over the full width D, times a weight [D]
                 -> each pair of neighbouring channels rotated, by an angle that the token's (t, h, w) sets
                 -> q, k [B, L, N, K] for attention: read once and written once, instead of many times

`python kernels.py` checks it, and times it against this GPU's copy bandwidth and PyTorch's operations.
Without a GPU it only checks, in Triton's interpreter.
B batch, L tokens, D width, N heads, K head width, D = N*K, P positions in the rotary tables.
"""
import os
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rope import apply_rope, axis_pairs, rope_table

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it decorates, so set it before
try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.language import constexpr  # by this name: the interpreter compares it as a string
except ImportError:  # no wheels outside Linux
    triton, jit, constexpr, INTERPRET = None, lambda function: function, None, False

RopeTables = NamedTuple("RopeTables", [("cos", Tensor), ("sin", Tensor)])  # each float32 [P, K/2]
FLOATS, INTEGERS = (torch.float32, torch.bfloat16, torch.float16, torch.float64), (torch.int64, torch.int32)
EPS, TOKENS = 1e-6, 39_000  # of checks and bench: 81 frames at 480x832 and four views
_choice = None  # what use_fused remembers


def use_fused(choice=None):
    """Choose the path: None (Triton for tensors on a GPU, PyTorch for others), True (Triton or an error) or
    False (PyTorch). Returns the choice in words."""
    global _choice
    if choice and not INTERPRET and (triton is None or not torch.cuda.is_available()):
        raise ValueError("fused kernels need Triton and a GPU, or TRITON_INTERPRET=1 before the start")
    _choice = choice
    if not _runs_fused(torch.cuda.is_available()):
        return "PyTorch reference kernels"
    return "fused Triton kernels (interpreted)" if INTERPRET else "fused Triton kernels"


def _runs_fused(on_gpu):
    if _choice is None:
        return on_gpu and triton is not None and not INTERPRET
    return _choice


# ------------------------------------------------------------------------------------------ tables, reference
def rope_tables(positions, head_dim, theta=1e4):
    """RopeTables, computed in float64 as Wan does, that hold these positions (int [L, 3], from 0 on); their
    length is a power of two, so that few lengths are compiled. Waits for the GPU: call it where a layout is
    built, not in a block."""
    low, high = (int(x) for x in positions.aminmax()) if len(positions) else (0, 0)
    assert 0 <= low and high < 2**20, f"positions go from {low} to {high}"  # else tables of more than 100 MB
    with torch.inference_mode(False):  # a table made while sampling has to serve training too
        numbers = torch.arange(max(64, 1 << high.bit_length()), device=positions.device)
        return RopeTables(*rope_table(numbers[:, None].expand(-1, 3), head_dim, theta))


def token_angles(positions, tables):
    """cos and sin [L, K/2] of every token: the first pairs of a head rotate by its t, the next by h, the last
    by w (rope.axis_pairs). NaN for a position outside the tables, as in the kernel."""
    size, pairs = tables.cos.shape
    pair = torch.arange(pairs, device=positions.device)
    t, h, _ = axis_pairs(2 * pairs)
    position = positions[:, (pair >= t).long() + (pair >= t + h).long()].long()  # [L, K/2]
    inside = (position >= 0) & (position < size)
    return [table[position.clamp(0, size - 1), pair].where(inside, torch.nan) for table in tables]


def qk_norm_rope_reference(q, k, weight_q, weight_k, positions, tables, eps):
    """qk_norm_rope in PyTorch's own operations, without its checks."""
    cos, sin = token_angles(positions, tables)

    def norm_rope(x, weight):
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = F.rms_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), eps)
        return apply_rope(y.unflatten(-1, (-1, 2 * cos.shape[1])), cos, sin).to(x.dtype)  # [B, L, N, K]
    return norm_rope(q, weight_q), norm_rope(k, weight_k)


# ---------------------------------------------------------------------------------------------------- kernels
# A program works on whole rows, a row being one token of q or of k, held as a tuple of CHUNKS blocks: 5120 is
# 5 * 1024 and 1536 is 3 * 512, so no lane idles as it would in the next power of two. The 16 bytes a thread
# loads at a time hold whole pairs, which split and join rotate in registers. F is the mathematics' dtype.
@jit
def _load(row, c, D: constexpr, BLOCK: constexpr, POLICY: constexpr):
    i = tl.arange(0, BLOCK)
    row += c * BLOCK  # on the scalar: on the lanes' offsets it takes 40 registers for addresses, and spills
    return tl.load(row + i, mask=i < D - c * BLOCK, other=0.0, eviction_policy=POLICY)


@jit
def _angles(positions, cos, sin, token, P, K: constexpr, T: constexpr, H: constexpr, SPAN: constexpr):
    """token_angles of one token, [1, SPAN // 2]: of a head, or of a block if K is not a power of two. T pairs
    of a head rotate by t, the next H by h. To gather takes 384 instructions, sin and cos would take 1,040."""
    pair = tl.arange(0, SPAN // 2) % (K // 2)
    position = tl.load(positions + token * 3 + (pair >= T).to(tl.int32) + (pair >= T + H).to(tl.int32))
    inside = (position >= 0) & (position < P)
    at = position * (K // 2) + pair
    cos = tl.load(cos + at, mask=inside, other=float("nan"), eviction_policy="evict_last")
    sin = tl.load(sin + at, mask=inside, other=float("nan"), eviction_policy="evict_last")
    return cos[None, :], sin[None, :]


@jit
def _rotate(x, cos, sin, SPAN: constexpr, BLOCK: constexpr):
    a, b = tl.split(tl.reshape(x, (BLOCK // SPAN, SPAN // 2, 2)))  # the neighbours of each pair
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (BLOCK,))


@jit
def _forward(q, k, weight_q, weight_k, positions, cos, sin, q_out, k_out, rstd, L, P, EPS: constexpr,
             D: constexpr, K: constexpr, T: constexpr, H: constexpr, SPAN: constexpr, BLOCK: constexpr,
             CHUNKS: constexpr, F: constexpr):
    """Grid (B*L, 2): one row of q or, where axis 1 is 1, of k. With rotation R
    out = R (weight * x * rstd), rstd = 1 / sqrt(mean(x^2) + eps), stored in [2, B*L] for the backward."""
    row, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x, weight, out = q, weight_q, q_out
    if which == 1:
        x, weight, out = k, weight_k, k_out
    i = tl.arange(0, BLOCK)
    xs, squares = (), tl.zeros((BLOCK,), F)
    for c in tl.static_range(CHUNKS):
        xs = xs + (_load(x + row * D, c, D, BLOCK, "evict_first"),)
        squares += xs[c].to(F) * xs[c].to(F)
    cosine, sine = _angles(positions, cos, sin, row % L, P, K, T, H, SPAN)
    r = tl.rsqrt(tl.sum(squares) / D + EPS)
    tl.store(rstd + which * tl.num_programs(0) + row, r)
    for c in tl.static_range(CHUNKS):
        y = xs[c].to(F) * r * _load(weight, c, D, BLOCK, "evict_last").to(F)
        y = _rotate(y, cosine, sine, SPAN, BLOCK)
        tl.store(out + row * D + c * BLOCK + i, y, mask=i < D - c * BLOCK)


@jit
def _backward(q_out_grad, k_out_grad, q, k, weight_q, weight_k, positions, cos, sin, rstd, q_grad, k_grad,
              weight_grads, ROWS, L, P, D: constexpr, K: constexpr, T: constexpr, H: constexpr,
              SPAN: constexpr, BLOCK: constexpr, CHUNKS: constexpr, STEPS: constexpr, F: constexpr):
    """Grid (programs, 2): STEPS of the ROWS of q or, where axis 1 is 1, of k; and each program's part of the
    gradient of its weight, in weight_grads [2, programs, D].
    Let n = x * rstd and y = weight * n, so out = R y. Back through it, with dz for dloss/dz:
      dy = R' dout      a rotation's transpose is its inverse: rotate by the negative angles
      dweight = sum over rows of dy * n
      dn = dy * weight
      dx = rstd * (dn - n * mean(dn * n))      as x also moves rstd: drstd/dx = -rstd^2 * n / D
    """
    which = tl.program_id(1).to(tl.int64)
    out_grad, x, weight, x_grad = q_out_grad, q, weight_q, q_grad
    if which == 1:
        out_grad, x, weight, x_grad = k_out_grad, k, weight_k, k_grad
    i = tl.arange(0, BLOCK)
    weight_grad = (tl.zeros((BLOCK,), F),) * CHUNKS
    # STEPS is compiled in: the interpreter of triton 3.6 cannot loop over a runtime range with numpy >= 2.4
    for step in tl.range(STEPS, num_stages=1):  # with two it would still wait for each row's loads
        row = tl.program_id(0) + step * tl.num_programs(0)
        counts = (row < ROWS).to(F)  # a program without a row left repeats the last one and does not count it
        row = tl.minimum(row, ROWS - 1).to(tl.int64)
        xs, grads = (), ()  # all loads come first: behind a store or a barrier they would be a second wait
        for c in tl.static_range(CHUNKS):
            xs = xs + (_load(x + row * D, c, D, BLOCK, "evict_first"),)
            grads = grads + (_load(out_grad + row * D, c, D, BLOCK, "evict_first"),)
        r = tl.load(rstd + which * ROWS + row)
        cosine, sine = _angles(positions, cos, sin, row % L, P, K, T, H, SPAN)
        ns, dns, sums, dots = (), (), (), tl.zeros((BLOCK,), F)
        for c in tl.static_range(CHUNKS):
            n = xs[c].to(F) * r
            dy = _rotate(grads[c].to(F), cosine, -sine, SPAN, BLOCK)
            dn = dy * _load(weight, c, D, BLOCK, "evict_last").to(F)
            ns, dns, sums = ns + (n,), dns + (dn,), sums + (weight_grad[c] + dy * n * counts,)
            dots += dn * n
        weight_grad = sums
        mean = tl.sum(dots) / D
        for c in tl.static_range(CHUNKS):
            dx = r * (dns[c] - ns[c] * mean)
            tl.store(x_grad + row * D + c * BLOCK + i, dx, mask=i < D - c * BLOCK)
    weight_grads += (which * tl.num_programs(0) + tl.program_id(0)) * D
    for c in tl.static_range(CHUNKS):
        tl.store(weight_grads + c * BLOCK + i, weight_grad[c], mask=i < D - c * BLOCK)


# ---------------------------------------------------------------------------- torch operators, qk_norm_rope
def _plan(D, dtype, K, backward=False):
    """The kernels' constants: how a row is cut into blocks, and the threads and registers of a program."""
    block = D & -D  # the largest power of two that divides D; or the padded row
    if block < 256 or block % K or D // block > 8:
        block = triton.next_power_of_2(D)
    chunks, (t, h, _) = triton.cdiv(D, block), axis_pairs(K)
    warps = min(8, max(1, block * dtype.itemsize // 512))  # a thread loads 16 bytes of x at a time
    # 28 and these for each element of a thread do not spill on sm_90 (a test); with fewer more programs fit
    registers = 28 + int((3.5 if backward else 1.1) * block * chunks / (32 * warps))
    return dict(D=D, K=K, T=t, H=h, SPAN=block if K & (K - 1) else K, BLOCK=block, CHUNKS=chunks,
                F=tl.float64 if dtype == torch.float64 else tl.float32,
                num_warps=warps, maxnreg=min(248, max(64, 8 * triton.cdiv(registers, 8))))


def _launch(kernel, grid, *args, **constants):
    if all(grid):
        with torch.cuda.device_of(args[0]):
            kernel[grid](*(x.contiguous() if isinstance(x, Tensor) else x for x in args), **constants)


@torch.library.custom_op("harmoview::qk_norm_rope", mutates_args=())
def _fused(q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, positions: Tensor, cos: Tensor,
           sin: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """qk_norm_rope's two outputs, and rstd [2, B, L] for the backward."""
    (B, L, D), (P, pairs) = q.shape, cos.shape
    outputs = _fused_fake(q, k, weight_q, weight_k, positions, cos, sin, eps)
    _launch(_forward, (B * L, 2), q, k, weight_q, weight_k, positions, cos, sin, *outputs, L, P, EPS=eps,
            **_plan(D, q.dtype, 2 * pairs))
    return outputs


@_fused.register_fake
def _fused_fake(q, k, weight_q, weight_k, positions, cos, sin, eps):
    shape = q.unflatten(-1, (-1, 2 * cos.shape[1])).shape  # [B, L, N, K]
    rstd = q.new_empty(2, *q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(shape), q.new_empty(shape), rstd


@torch.library.custom_op("harmoview::qk_norm_rope_backward", mutates_args=())
def _fused_backward(q_out_grad: Tensor, k_out_grad: Tensor, q: Tensor, k: Tensor, weight_q: Tensor,
                    weight_k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor,
                    rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q and of k, and of both weights [2, D] in the dtype of rstd."""
    (B, L, D), (P, pairs) = q.shape, cos.shape
    rows, plan, programs = B * L, _plan(D, q.dtype, 2 * pairs, backward=True), 2
    if q.is_cuda:  # as many as just fill the GPU by their registers, as each adds a line to weight_grads
        sms = torch.cuda.get_device_properties(q.device).multi_processor_count
        programs = max(1, sms * max(1, 65536 // (plan["maxnreg"] * 32 * plan["num_warps"])) // 2)
    steps = triton.cdiv(rows, programs)
    if steps > 64:  # every STEPS is a kernel of its own, and L changes with the references
        steps = 8 * triton.cdiv(steps, 8)
    programs = triton.cdiv(rows, max(1, steps))
    q_grad, k_grad, weight_grads = q.new_empty(q.shape), k.new_empty(k.shape), rstd.new_empty(2, programs, D)
    _launch(_backward, (programs, 2), q_out_grad, k_out_grad, q, k, weight_q, weight_k, positions, cos, sin,
            rstd, q_grad, k_grad, weight_grads, rows, L, P, STEPS=steps, **plan)
    return q_grad, k_grad, weight_grads.sum(1)


@_fused_backward.register_fake
def _fused_backward_fake(q_out_grad, k_out_grad, q, k, weight_q, weight_k, positions, cos, sin, rstd):
    return q.new_empty(q.shape), k.new_empty(k.shape), rstd.new_empty(2, q.shape[-1])


def _differentiate(ctx, q_out_grad, k_out_grad, _):
    q_grad, k_grad, weight_grads = _fused_backward(q_out_grad, k_out_grad, *ctx.saved_tensors)
    return q_grad, k_grad, *weight_grads.to(ctx.saved_tensors[2].dtype), None, None, None, None


_fused.register_autograd(_differentiate, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(
    *inputs[:-1], output[-1]))  # the tensors that came, and rstd


def qk_norm_rope(q, k, weight_q, weight_k, positions, tables, eps):
    """RMSNorm of q and k over the full width, then rotary of adjacent pairs by each token's (t, h, w).
    q, k          [B, L, D], both float32, bfloat16 or float16; the mathematics is float32, rounded once
    weight_q, _k  [D], both of one of these dtypes
    positions     int [L, 3], each below len(tables.cos); NaN comes out for any other
    tables        rope_tables(positions, K): K comes from here
    Returns q, k [B, L, N, K], contiguous, in the dtype that came; differentiable in the first four, once. At
    the video's own positions it is Wan 2.1's WanRMSNorm and rope_apply.
    """
    (B, L, D), (cos, sin) = q.shape, tables
    for x, shape, kinds in ((q, (B, L, D), FLOATS), (k, (B, L, D), [q.dtype]), (weight_q, (D,), FLOATS),
                            (weight_k, (D,), [weight_q.dtype]), (positions, (L, 3), INTEGERS)):
        fits = x.shape == shape and x.dtype in kinds and x.device == q.device
        assert fits, f"{x.dtype} {list(x.shape)} on {x.device}, expected {kinds} {shape} on {q.device}"
    assert D % (2 * cos.shape[1]) == 0, f"width {D}, heads of {2 * cos.shape[1]}"
    if not _runs_fused(q.is_cuda):
        return qk_norm_rope_reference(q, k, weight_q, weight_k, positions, tables, eps)
    return _fused(q, k, weight_q, weight_k, positions, cos, sin, eps)[:2]


# ------------------------------------------------------------------------------------------- checks and bench
def eager_norm_rope(x, weight, cos, sin):
    """What one writes without a kernel: F.rms_norm in the dtype of x, rotary by even and odd halves."""
    x = F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), EPS)
    a, b = x.unflatten(-1, (-1, cos.shape[1], 2)).unbind(-1)  # [B, L, N, K/2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


def example_inputs(B, L, N, K, dtype, device):
    """Random [q, k, weight_q, weight_k], (positions, tables), and gradients of both outputs."""
    generator = torch.Generator(device).manual_seed(L * N + K)
    shapes = [(B, L, N * K), (B, L, N * K), (N * K,), (N * K,), (B, L, N, K), (B, L, N, K)]
    *inputs, q_grad, k_grad = [torch.randn(s, device=device, generator=generator).to(dtype) for s in shapes]
    positions = torch.randint(0, 150, (L, 3), device=device, generator=generator)
    return [x.requires_grad_() for x in inputs], (positions, rope_tables(positions, K)), [q_grad, k_grad]


def relative_error(value, truth):
    """The largest error as a share of the largest value."""
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


def check(shape, dtype, device):
    """Compare outputs and gradients with the reference in float64. Computed in float32 and rounded once, they
    are off by half a unit in the last place, or by a whole one in the interpreter, which cuts digits off."""
    inputs, rope, output_grads = example_inputs(*shape, dtype, device)
    results = []
    for fused, kind in (True, dtype), (False, torch.float64):
        use_fused(fused)
        leaves = [x.detach().to(kind).requires_grad_() for x in inputs]
        outputs = qk_norm_rope(*leaves, *rope, EPS)
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, [g.to(kind) for g in output_grads])])
    use_fused(None)
    errors = [relative_error(value, truth) for value, truth in zip(*results)]
    allowed = 1e-5 + torch.finfo(dtype).eps / (1 if INTERPRET else 2)
    line = f"{str(dtype)[6:]:9} B L N K {str(shape):18} {max(errors):.1e} off, {allowed:.1e} allowed"
    if not all(error <= allowed for error in errors):  # nan is not
        raise ValueError(f"FAILED: {line}")
    print(line, flush=True)


def bench(device):
    """q and k at the widths of Wan's two networks: prints one table and returns its rows."""
    from triton.testing import do_bench
    a = torch.empty(2, 2**31, dtype=torch.uint8, device=device)
    copy = a.numel() / do_bench(lambda: a[1].copy_(a[0]))  # bytes a millisecond, read and written
    gpu, rows = torch.cuda.get_device_name(device), []
    print(f"\n{gpu}, copy {copy / 1e9:.2f} TB/s; L {TOKENS}, bf16; forward and backward: ms, share of copy")
    for base, heads in {"1.3B": 12, "14B": 40}.items():
        inputs, rope, grads = example_inputs(1, TOKENS, heads, 128, torch.bfloat16, device)
        cos, sin = token_angles(*rope)

        def both(norm_rope):
            return lambda q, k, *weights: [norm_rope(x, w, cos, sin) for x, w in zip((q, k), weights)]
        ways = {"fused": lambda *inputs: qk_norm_rope(*inputs, *rope, EPS),
                "compiled": torch.compile(both(eager_norm_rope), dynamic=False),
                "eager": both(eager_norm_rope)}
        for way, fn in ways.items():
            with torch.no_grad():
                forward = do_bench(lambda: fn(*inputs))
            backward = do_bench(lambda: torch.autograd.grad(fn(*inputs), inputs, grads)) - forward
            size = inputs[0].nbytes  # a forward has to move 4 such tensors, a backward 6
            rows.append(dict(base=base, way=way, forward_ms=forward, forward_share=4 * size / forward / copy,
                             backward_ms=backward, backward_share=6 * size / backward / copy))
            print("{base:5} {way:9} {forward_ms:9.3f} {forward_share:7.1%} {backward_ms:9.3f} "
                  "{backward_share:7.1%}".format(**rows[-1]), flush=True)
    return rows


def main(argv=None):
    from support.script import Parser, UserError

    Parser(description=__doc__).parse_args(argv)
    if triton is None:
        raise UserError("the fused kernels need Triton, which has wheels for Linux only")
    shapes = [(1, 1, 1, 32), (2, 3, 3, 24), (1, 5, 12, 128)]
    if not INTERPRET:
        shapes += [(2, 129, 3, 24), (2, 257, 12, 128), (1, 515, 40, 128)]
    try:
        for dtype, shape in product((torch.float32, torch.bfloat16, torch.float16), shapes):
            check(shape, dtype, torch.device("cpu" if INTERPRET else "cuda"))
    except ValueError as error:
        raise UserError(str(error)) from None
    if INTERPRET:
        print("all checks passed; timing needs a GPU")
    else:
        bench(torch.device("cuda"))


if __name__ == "__main__":
    from support.script import run_script

    run_script(main)
