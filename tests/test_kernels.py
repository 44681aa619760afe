"""Triton's interpreter runs the kernels here, so no test needs a GPU; the offline compile needs none."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton; conftest.py does it too
import kernels
from kernels import check, eager_norm_rope, example_inputs, qk_norm_rope, relative_error, rope_tables
from rope import LAYOUTS, axis_pairs, reference_positions, rope_table, video_positions
from support.script import UserError
from conftest import ROOT, run

CPU = torch.device("cpu")
EPS = 0.1  # beside squares of about 1; of Wan's, a millionth, no float32 would show that it was forgotten
interpreted = pytest.mark.skipif(kernels.triton is None or not kernels.INTERPRET,
                                 reason="needs Triton, imported with TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def an_eps_that_counts(monkeypatch):
    monkeypatch.setattr(kernels, "EPS", EPS)


@pytest.fixture(params=["reference", pytest.param("fused", marks=interpreted)])
def path(request):
    """Both paths, one after the other."""
    kernels.use_fused(request.param == "fused")
    yield request.param
    kernels.use_fused(None)


@pytest.fixture
def fused():
    kernels.use_fused(True)
    yield
    kernels.use_fused(None)


def qk(B, L, N, K, dtype=torch.float32, grad=False, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(B, L, N * K)] * 2 + [(N * K,)] * 2
    return [torch.randn(s, generator=draw).to(dtype).requires_grad_(grad) for s in shapes]


def positions(L, top=100, seed=0):
    return torch.randint(0, top, (L, 3), generator=torch.Generator().manual_seed(seed))


def truth_of(q, k, weight_q, weight_k, at, K, eps=EPS):
    """Wan's arithmetic in float64 and complex128, with the angles by their formula."""
    angles = []
    for axis, pairs in enumerate(axis_pairs(K)):
        angles.append(at[:, axis, None] * 1e4 ** -(torch.arange(pairs).double() / max(pairs, 1)))
    angle = torch.cat(angles, 1)
    rotation = torch.polar(torch.ones_like(angle), angle)[:, None]  # [L, 1, K/2]
    outputs = []
    for x, weight in ((q.double(), weight_q.double()), (k.double(), weight_k.double())):
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, K // 2, 2)))
        outputs.append(torch.view_as_real(pairs * rotation).flatten(-2))
    return outputs


# ---------------------------------------------------------------------------------------------------- numbers
@interpreted
def test_gradcheck_in_float64(fused):
    """Forward and backward of the kernels themselves, B*L rows over 2 programs, a padded width."""
    inputs, rope, _ = example_inputs(1, 3, 1, 6, torch.float64, CPU)
    assert torch.autograd.gradcheck(lambda *leaves: qk_norm_rope(*leaves, *rope, EPS), inputs, fast_mode=True,
                                    check_undefined_grad=False)


def test_gradcheck_of_the_reference():
    inputs, rope, _ = example_inputs(2, 3, 2, 6, torch.float64, CPU)
    assert torch.autograd.gradcheck(lambda *x: qk_norm_rope(*x, *rope, EPS), inputs)


@pytest.mark.parametrize(
    "L, N, K",
    [(1, 1, 32), (7, 3, 64), (5, 12, 128), (1, 40, 128), (3, 40, 32), (3, 5, 96), (3, 2, 24), (3, 1, 2)],
)
def test_float32_against_complex128(path, L, N, K):
    """One token, odd lengths, 1 to 40 heads, head widths 2 to 128; D in one block, padded, in several."""
    args, at = qk(1, L, N, K), positions(L)
    found = qk_norm_rope(*args, at, rope_tables(at, K), EPS)
    truth = truth_of(*args, at, K)
    assert found[0].shape == (1, L, N, K) and found[0].is_contiguous()
    assert max(relative_error(f, t) for f, t in zip(found, truth)) <= 4e-7


@pytest.mark.parametrize("size, eps", [(1e-3, 1e-6), (1e-6, 1e-6), (0.0, 1e-6), (1.0, 0.3)])
def test_eps_counts_where_a_row_is_small(path, size, eps):
    """Forward and backward against float64; beside rows of mean square one, 1e-6 is within rounding."""
    L, N, K = 3, 2, 24
    leaves, at = qk(2, L, N, K), positions(L)
    leaves = [(size * x if x.ndim == 3 else x).requires_grad_() for x in leaves]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    found = qk_norm_rope(*leaves, at, rope_tables(at, K), eps)
    truth = truth_of(*exact, at, K, eps)
    g = torch.randn(2, L, N, K, generator=torch.Generator().manual_seed(0))
    found = *found, *torch.autograd.grad(found, leaves, [g, g])
    truth = *truth, *torch.autograd.grad(truth, exact, [g.double(), g.double()])
    for ours, right in zip(found, truth, strict=True):
        if right.any():
            assert relative_error(ours, right) <= 1e-5
        else:
            assert not ours.any()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_equals_reference(dtype, capsys):
    """Outputs and all gradients, two samples, more rows than programs, a padded width."""
    check((2, 3, 3, 24), dtype, CPU)
    assert "allowed" in capsys.readouterr().out


@interpreted
@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_kernel_that_is_off_fails_the_check(factor, monkeypatch):
    fused = kernels._fused
    monkeypatch.setattr(kernels, "_fused", lambda *args: [x * factor for x in fused(*args)])
    with pytest.raises(ValueError, match="FAILED: bfloat16"):
        check((1, 2, 1, 8), torch.bfloat16, CPU)


def test_bf16_is_at_most_twice_as_far_off_as_eager_bf16(path):
    """Outputs and gradients of q and k, against float64; eager is F.rms_norm in bf16, then rotary."""
    L, N, K = 5, 4, 64
    places, args = positions(L), qk(2, L, N, K, torch.bfloat16, grad=True)
    tables, (cos, sin) = rope_tables(places, K), rope_table(places, K)
    exact = [x.detach().double().requires_grad_() for x in args]
    outputs = (qk_norm_rope(*args, places, tables, EPS),
               [eager_norm_rope(x, weight, cos, sin) for x, weight in zip(args[:2], args[2:])],
               truth_of(*exact, places, K))
    draw = torch.Generator().manual_seed(0)
    grads = [torch.randn(2, L, N, K, generator=draw).bfloat16() for _ in range(2)]
    found = []
    for y, leaves in zip(outputs, (args, args, exact)):
        found.append((*y, *torch.autograd.grad(y, leaves, [g.to(y[0].dtype) for g in grads])))
    for ours, eager, truth in zip(*found):
        assert relative_error(ours, truth) <= 2 * relative_error(eager, truth)


def test_float32_weights_beside_bf16_inputs_are_not_rounded(path):
    """As under autocast. Off by half a unit in the last place, or by a whole one in the interpreter."""
    (q, k, *_), (*_, weight_q, weight_k), at = qk(2, 5, 3, 24, torch.bfloat16), qk(2, 5, 3, 24), positions(5)
    leaves = [x.requires_grad_() for x in (q, k, weight_q, weight_k)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    outputs, truth = qk_norm_rope(*leaves, at, rope_tables(at, 24), EPS), truth_of(*exact, at, 24)
    grads = [torch.randn(y.shape, generator=torch.Generator().manual_seed(i)).bfloat16()
             for i, y in enumerate(truth)]
    found = torch.autograd.grad(outputs, leaves, grads)
    wanted = torch.autograd.grad(truth, exact, [g.double() for g in grads])
    for a, b in zip((*outputs, *found[:2]), (*truth, *wanted[:2]), strict=True):
        units = (a.double() - b).abs() / 2 ** (b.abs().log2().floor() - 7)
        assert a.dtype == torch.bfloat16 and units.max() < (1.1 if path == "fused" else 0.6)
    for a, b in zip(found[2:], wanted[2:], strict=True):
        assert a.dtype == torch.float32 and relative_error(a, b) < 1e-5


def test_equals_wan_on_its_dense_grid(path):
    """Wan rotates a [T, H, W] grid by a broadcast product of three axes' powers; ours gathers by position."""
    (T, H, W), N, K = (2, 3, 2), 2, 44  # 8, 7 and 7 pairs
    q, k, weight_q, weight_k = qk(1, T * H * W, N, K)
    freqs = []
    for size, pairs in zip((T, H, W), axis_pairs(K)):
        power = 1e4 ** -(torch.arange(0, 2 * pairs, 2).double() / (2 * pairs))
        angle = torch.outer(torch.arange(size).double(), power)
        freqs.append(torch.polar(torch.ones_like(angle), angle))
    t, h, w = freqs
    grid = torch.cat(
        (t[:, None, None].expand(T, H, W, -1), h[None, :, None].expand(T, H, W, -1),
         w[None, None].expand(T, H, W, -1)),
        dim=-1,
    ).reshape(T * H * W, K // 2)
    at = video_positions(T, H, W)
    found = qk_norm_rope(q, k, weight_q, weight_k, at, rope_tables(at, K), EPS)
    for x, weight, y in ((q, weight_q, found[0]), (k, weight_k, found[1])):
        x = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight
        x = torch.view_as_complex(x.reshape(T * H * W, N, K // 2, 2)) * grid[:, None]
        assert relative_error(y[0], torch.view_as_real(x).flatten(-2)) <= 4e-7


def test_shifting_every_t_leaves_scores_unchanged(path):
    args, at = qk(1, 5, 2, 32), positions(5, 20)
    scores = []
    for shift in (0, 37):
        places = at + torch.tensor([shift, 0, 0])
        q, k = qk_norm_rope(*args, places, rope_tables(places, 32), EPS)
        scores.append(torch.einsum("blnk,bmnk->bnlm", q, k))
    assert torch.allclose(*scores, atol=1e-4)
    assert relative_error(*scores) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_goes_through_the_same_kernel(path, layout):
    """Two identities, dropped views, proxies; a far jump makes the table grow."""
    present = [("front", "left"), ("front", "back")]
    refs = reference_positions(layout, present, 1, 1, 2, (1, 2), 1, jump=300)
    at, K = torch.cat((video_positions(1, 1, 2), refs)), 24
    at -= at.amin(dim=0).clamp(max=0)  # as in model.rope_of
    args = qk(1, len(at), 1, K)
    found = qk_norm_rope(*args, at, rope_tables(at, K), EPS)
    truth = truth_of(*args, at, K)
    assert max(relative_error(f, t) for f, t in zip(found, truth)) <= 4e-7


def test_tables_hold_their_positions_and_equal_rope_table():
    K = 34
    near, far = torch.tensor([[1, 2, 3]]), torch.tensor([[1000, 2, 3]])
    small = rope_tables(near, K)
    large = rope_tables(far, K)
    assert len(small.cos) == 64 and len(large.cos) == 1024
    every = torch.arange(1024)[:, None].expand(-1, 3)
    assert torch.equal(large.cos, rope_table(every, K)[0]) and torch.equal(large.sin, rope_table(every, K)[1])
    with torch.inference_mode():
        made = rope_tables(torch.tensor([[5000, 0, 0]]), K)
    assert not made.cos.is_inference()


# ----------------------------------------------------------------------------------------------------- inputs
def test_inputs_stay_untouched(path):
    args, at = qk(2, 3, 2, 32), positions(3)
    tables = rope_tables(at, 32)
    before = [y.clone() for y in (*args, at, *tables)]
    qk_norm_rope(*args, at, tables, EPS)
    assert all(torch.equal(a, b) for a, b in zip(before, (*args, at, *tables)))


def test_non_contiguous_inputs_and_gradients(path):
    """q, k cut out of one projection, positions by columns, gradients as attention's transposed views."""
    L, N, K = 3, 2, 32
    places = positions(L).T.contiguous().T
    tables = rope_tables(places, K)
    weights = qk(1, 1, N, K)[2:]
    both = torch.randn(2, L, 2 * N * K)
    g = torch.randn(2, N, L, K).transpose(1, 2)
    grads = []
    for make in (lambda x: x, torch.Tensor.contiguous):
        leaf = both.clone().requires_grad_()
        q, k = (make(x) for x in leaf.chunk(2, -1))
        y = qk_norm_rope(q, k, *weights, make(places), tables, EPS)
        grads.append((*y, *torch.autograd.grad(y, leaf, [make(g), make(g)])))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_no_tokens_and_no_samples(path):
    for B, L in ((2, 0), (0, 3)):
        args, at = qk(B, L, 2, 32, grad=True), positions(L)
        q, k = qk_norm_rope(*args, at, rope_tables(at, 32), EPS)
        assert q.shape == k.shape == (B, L, 2, 32)
        grads = torch.autograd.grad(q.sum() + k.sum(), args)
        assert [g.shape for g in grads] == [x.shape for x in args] and not grads[2].any()


def test_only_one_output_used(path):
    """The other's gradient is zero, not missing."""
    args, at = qk(1, 3, 2, 32, grad=True), positions(3)
    q, _ = qk_norm_rope(*args, at, rope_tables(at, 32), EPS)
    dq, dk = torch.autograd.grad(q.sum(), args[:2], allow_unused=True)
    assert dq.abs().sum() > 0 and (dk is None or not dk.any())


# ----------------------------------------------------------------------------------------------------- errors
def test_wrong_inputs_are_an_assertion_with_both_shapes(path):
    (q, k, wq, wk), at = qk(1, 3, 2, 32), positions(3)
    tables = rope_tables(at, 32)
    wrong = {
        "width 40, heads of 32": (q[..., :40], k[..., :40], wq[:40], wk[:40], at, tables),
        r"\[1, 2, 64\] on cpu, expected .* \(1, 3, 64\)": (q, k[:, :2], wq, wk, at, tables),
        r"torch.bfloat16 .*, expected \[torch.float32\]": (q, k.bfloat16(), wq, wk, at, tables),
        "torch.int64 ": (q.long(), k.long(), wq, wk, at, tables),
        r"\[32\] on cpu": (q, k, wq, wk[:32], at, tables),
        r"\[2, 3\] on cpu": (q, k, wq, wk, at[:2], tables),
        "torch.float32 .*torch.int64": (q, k, wq, wk, at.float(), tables),
        "on meta, expected .* on cpu": (q, k.to("meta"), wq, wk, at, tables)}
    for message, args in wrong.items():
        with pytest.raises(AssertionError, match=message):
            qk_norm_rope(*args, EPS)
    for bad in (at - 200, at + 2**20):
        with pytest.raises(AssertionError, match="positions go from"):
            rope_tables(bad, 32)


def test_a_position_outside_the_tables_gives_nan(path):
    tables = rope_tables(positions(1), 32)
    at = torch.tensor([[0, 0, 0], [0, -1, 0], [0, 0, len(tables.cos)]])
    q, _ = qk_norm_rope(*qk(1, 3, 1, 32), at, tables, EPS)
    at_h, at_w = slice(12, 22), slice(22, 32)  # 6, 5 and 5 pairs
    assert q[0, 0].isfinite().all() and q[0, 1, :, at_w].isfinite().all()
    assert q[0, 1, :, at_h].isnan().all() and q[0, 2, :, at_w].isnan().all()


@pytest.mark.parametrize(
    "triton, interpret, gpu, automatic, chosen",
    [(True, True, False, "PyTorch reference kernels", "fused Triton kernels (interpreted)"),
     (True, True, True, "PyTorch reference kernels", "fused Triton kernels (interpreted)"),
     (True, False, True, "fused Triton kernels", "fused Triton kernels"),
     (True, False, False, "PyTorch reference kernels", None),
     (False, False, True, "PyTorch reference kernels", None),
     (False, False, False, "PyTorch reference kernels", None)],
)
def test_the_switch(triton, interpret, gpu, automatic, chosen, monkeypatch):
    """With and without Triton, its interpreter and a GPU, on any machine."""
    monkeypatch.setattr(kernels, "triton", "is there" if triton else None)
    monkeypatch.setattr(kernels, "INTERPRET", interpret)
    monkeypatch.setattr(kernels, "_choice", None)  # also when this ends
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert kernels.use_fused() == automatic and kernels.use_fused(False) == "PyTorch reference kernels"
    if chosen:
        assert kernels.use_fused(True) == chosen
    else:
        with pytest.raises(ValueError, match="need Triton and a GPU"):
            kernels.use_fused(True)
    assert kernels.use_fused(None) == automatic


def test_without_triton_the_references_serve():
    """In a process where importing it fails."""
    program = (
        "import sys; sys.modules['triton'] = None; import torch, kernels\n"
        "x, w, at = torch.randn(1, 2, 8), torch.ones(8), torch.zeros(2, 3, dtype=torch.int64)\n"
        "q, k = kernels.qk_norm_rope(x, x, w, w, at, kernels.rope_tables(at, 8), 1e-6)\n"
        "print(kernels.use_fused(), q.shape)\n"
        "kernels.use_fused(True)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "PyTorch reference kernels torch.Size([1, 2, 1, 8])" in done.stdout
    assert "need Triton" in done.stderr.splitlines()[-1]


@interpreted
def test_one_launch_for_q_and_k(fused, monkeypatch):
    """Forward and backward each: a program for every row of q and of k."""
    launched = []

    class Counted:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(kernels, name)

        def __getitem__(self, grid):
            launched.append((self.name, grid))
            return self.kernel[grid]

    for name in ("_forward", "_backward"):
        monkeypatch.setattr(kernels, name, Counted(name))
    args, at = qk(2, 3, 2, 32, grad=True), positions(3)
    y = qk_norm_rope(*args, at, rope_tables(at, 32), EPS)
    assert launched == [("_forward", (6, 2))]
    torch.autograd.grad(y, args, y)
    assert launched[1:] == [("_backward", (2, 2))]  # two programs on a CPU


# ---------------------------------------------------------------------------------------------- torch.compile
@interpreted
def test_opcheck(fused):
    """Schema, fake tensors, autograd registration and AOT dispatch with dynamic shapes."""
    inputs, rope, _ = example_inputs(2, 3, 1, 8, torch.float32, CPU)
    torch.library.opcheck(kernels._fused, (*inputs, rope[0], *rope[1], EPS))


def test_compiles_without_a_graph_break(path):
    inputs, rope, grads = example_inputs(2, 3, 1, 8, torch.float32, CPU)
    torch._dynamo.reset()
    found = []
    for fn in (qk_norm_rope, torch.compile(qk_norm_rope, backend="aot_eager", fullgraph=True)):
        y = fn(*inputs, *rope, EPS)
        found.append([*y, *torch.autograd.grad(y, inputs, grads)])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found))


# -------------------------------------------------------------------------------------------- offline compile
OFFLINE = '''
import collections, itertools, json, re, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
import triton.backends.nvidia as nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import kernels

INTS = dict(L="i32", P="i32", ROWS="i32", positions="*i64")


def compile(kernel, plan, bf16, **more):
    """Registers, bytes of stack, global accesses by width, of one kernel for sm_90; and loads of rows, those
    behind the first store or barrier, and other instructions between the first and the last of them."""
    options = {name: plan.pop(name) for name in ("num_warps", "maxnreg")}
    constants = {k: v for k, v in {**plan, **more}.items() if k in kernel.arg_names}
    types = {n: "constexpr" if n in constants else INTS.get(n, "*bf16" if n in bf16 else "*fp32")
             for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(types) if types[n].startswith("*")}
    source = ASTSource(kernel, types, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        usage, sass = (subprocess.run([tool, what, cubin.name], capture_output=True, text=True, check=True)
                       for what in ("-res-usage", "-sass"))
    use = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\\d+)", usage.stdout + usage.stderr)}
    code = re.findall(r"/\\*[0-9a-f]{4,}\\*/ +(?:@\\S+ +)?([A-Z][\\w.]*)", sass.stdout)
    loads = [at for at, name in enumerate(code) if name.startswith("LDG.E.EF")]
    stop = next(at for at, name in enumerate(code) if name.startswith(("STG.", "BAR.")))
    use |= dict(rows=len(loads), late=sum(at > stop for at in loads),
                between=loads[-1] - loads[0] + 1 - len(loads))
    widths = collections.Counter(
        f"{op} {width or 'v1'}.{bits}" for op, width, bits in
        re.findall(r"\\b(ld|st)\\.global[.\\w:]*?(?:\\.(v\\d))?\\.(b\\d+)", built.asm["ptx"]))
    return dict(use, limit=options["maxnreg"], warps=options["num_warps"], **widths)


found = {}
for D, kernel in itertools.product((1536, 5120), (kernels._forward, kernels._backward)):
    plan = kernels._plan(D, torch.bfloat16, 128, kernel is kernels._backward)
    found[f"{kernel.__name__} {D}"] = compile(
        kernel, plan, ["q", "k", "q_out", "k_out", "q_out_grad", "k_out_grad", "q_grad", "k_grad"], EPS=1e-6,
        STEPS=200)
print(json.dumps(found))
'''


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_offline_compile_for_sm_90(tmp_path):
    """At the widths of 1.3B and 14B, without a GPU: no spills, nothing on the stack, and 128-bit accesses to
    every large tensor."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), TRITON_CACHE_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", OFFLINE], env=env, capture_output=True, text=True)
    if "FileNotFoundError" in done.stderr or "Cannot find" in done.stderr:
        pytest.skip(f"Triton came without its assembler: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    for name, use in json.loads(done.stdout.splitlines()[-1]).items():
        print(name, use)
        assert use["STACK"] == use["LOCAL"] == 0 and use["REG"] <= use["limit"], (name, use)
        chunks = 5 if "5120" in name else 3
        # one wait for memory a row: all its loads are asked for before anything is done with the first
        assert use["late"] == 0 and use["rows"] >= chunks and use["between"] < 40, (name, use)
        loads, stores = use.get("ld v4.b32", 0), use.get("st v4.b32", 0)
        # a block: x (and its gradient), float32 weights in two; dx, dw in two
        assert loads == chunks * (4 if "backward" in name else 3), (name, use)
        assert stores == chunks * (3 if "backward" in name else 1), (name, use)
        assert use.get("ld v2.b32", 0) == use.get("st v2.b32", 0) == 0, (name, use)


@interpreted
def test_the_script_checks_without_a_gpu(monkeypatch, capsys, tmp_path):
    """Its checks are those of test_kernel_equals_reference; here, what it does after them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kernels, "check", lambda *_: None)
    kernels.main([])
    assert "timing needs a GPU" in capsys.readouterr().out and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="unrecognized"):
        kernels.main(["--sweep"])
    kernels.use_fused(None)


def test_on_a_gpu_the_script_checks_and_then_times(monkeypatch):
    calls = []
    monkeypatch.setattr(kernels, "INTERPRET", False)
    monkeypatch.setattr(kernels, "check", lambda *_: calls.append("check"))
    monkeypatch.setattr(kernels, "bench", calls.append)
    kernels.main([])
    assert calls == ["check"] * 6 * 3 + [torch.device("cuda")]


@interpreted
def test_the_bench_times_three_ways_at_two_widths(fused, monkeypatch, capsys):
    """On a CPU, with a clock that says one millisecond more at each call."""
    clock = []

    def do_bench(fn):
        if clock:  # not the first one, which copies 2 GiB
            fn()
        clock.append(fn)
        return float(len(clock))

    monkeypatch.setattr(kernels.triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "no GPU")
    monkeypatch.setattr(torch, "compile", lambda fn, dynamic: fn)
    monkeypatch.setattr(kernels, "TOKENS", 1)
    rows = kernels.bench(CPU)
    assert [row["base"] for row in rows] == ["1.3B"] * 3 + ["14B"] * 3
    assert [row["way"] for row in rows] == ["fused", "compiled", "eager"] * 2
    # 2**32 bytes copied in the first millisecond; forward took two, and the backward one more
    assert rows[0]["forward_ms"] == 2 and rows[0]["backward_ms"] == 1
    assert rows[0]["forward_share"] == 4 * 1536 * 2 / 2 / 2**32
    assert rows[0]["backward_share"] == 6 * 1536 * 2 / 2**32
    assert len(capsys.readouterr().out.strip().splitlines()) == 1 + 6


def test_the_script_needs_no_variable_set(tmp_path, monkeypatch):
    if torch.cuda.is_available() or kernels.triton is None:
        pytest.skip("here it would run the whole bench, or nothing")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    *checks, last = run(ROOT / "kernels.py", cwd=tmp_path).splitlines()
    assert len(checks) == 3 * 3 and "all checks passed" in last and not list(tmp_path.iterdir())


@interpreted
def test_the_network_is_the_same_with_and_without():
    """Forward and every gradient, two people, dropped views; weights that are not at their gentle start."""
    from model import CONFIGS, HarmoView

    torch.manual_seed(0)
    config = dataclasses.replace(CONFIGS["tiny"], proxy_tokens=1)  # 11 tokens: the interpreter is slow
    network = HarmoView(config)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, text = torch.randn(1, config.in_dim, 3, 2, 2), torch.randn(1, 3, config.text_dim)
    views = ("front", "left"), ("front",)
    refs = [{v: torch.randn(1, config.in_dim, 2, 2) for v in shown} for shown in views]
    vit = [torch.randn(1, config.vit_levels, 2, config.vit_dim), None]
    t, target = torch.tensor([300.0]), torch.randn(x.shape)
    found = []
    for fused in (True, False):
        kernels.use_fused(fused)
        y = network(x, t, text, refs, vit)
        loss = (y - target).square().mean()
        found.append([y.detach(), *torch.autograd.grad(loss, list(network.parameters()))])
    kernels.use_fused(None)
    names = ["velocity", *(name for name, _ in network.named_parameters())]
    errors = {name: relative_error(a, b) for name, a, b in zip(names, *found)}
    assert max(errors.values()) < 1e-5, max(errors.items(), key=lambda item: item[1])
