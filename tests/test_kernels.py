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
from checkpoint import UserError
from conftest import ROOT, run
from kernels import (
    KERNELS,
    check,
    complex_norm_rope,
    off,
    plain_norm_rope,
    qk_norm_rope,
    rope_tables,
)
from rope import LAYOUTS, axis_pairs, reference_positions, rope_table, video_positions

EPS = 1e-6
interpreted = pytest.mark.skipif(
    kernels.triton is None or not kernels.INTERPRET,
    reason="needs Triton, imported with TRITON_INTERPRET=1",
)


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


def both(norm_rope, q, k, weight_q, weight_k, *more):
    return norm_rope(q, weight_q, *more, EPS), norm_rope(k, weight_k, *more, EPS)


def positions(L, top=100, seed=0):
    return torch.randint(0, top, (L, 3), generator=torch.Generator().manual_seed(seed))


def turn_of(at, K):
    """complex128 [L, K/2]: the angles, by the formula."""
    axes = enumerate(axis_pairs(K))
    angle = torch.cat([at[:, a, None] * 1e4 ** -(torch.arange(n).double() / max(n, 1)) for a, n in axes], 1)
    return torch.polar(torch.ones_like(angle), angle)


# ---------------------------------------------------------------------------------------------------- numbers
@interpreted
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradcheck_in_float64(kernel, fused):
    """Forward and backward of the kernels themselves, B*L rows over 2 programs, a padded width."""
    fn, args, _ = kernels.case(kernel, 1, 3, 1, 6, torch.float64, torch.device("cpu"))
    assert torch.autograd.gradcheck(fn, args, fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradcheck_of_the_reference(kernel):
    fn, args, _ = kernels.case(kernel, 2, 3, 2, 6, torch.float64, torch.device("cpu"))
    assert torch.autograd.gradcheck(fn, args)


@pytest.mark.parametrize(
    "L, N, K", [(1, 1, 32), (7, 3, 64), (5, 12, 128), (1, 40, 128), (3, 40, 32), (3, 5, 96), (3, 2, 24)]
)
def test_float32_against_complex128(path, L, N, K):
    """One token, odd lengths, 1 to 40 heads, head widths 24 to 128; D in one block, padded, in several."""
    args, at = qk(1, L, N, K), positions(L)
    found = qk_norm_rope(*args, at, rope_tables(at, K), EPS)
    truth = both(complex_norm_rope, *(x.double() for x in args), turn_of(at, K))
    assert found[0].shape == (1, L, N, K) and found[0].is_contiguous()
    assert max(off(f, t) for f, t in zip(found, truth)) <= 1e-5


@interpreted
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_equals_reference(kernel, dtype):
    """Outputs and all gradients, two samples, more rows than programs, a padded width."""
    worst, line = check(kernel, (2, 3, 3, 24), dtype, torch.device("cpu"))
    assert worst <= 1, line


def test_bf16_is_at_most_twice_as_far_off_as_eager_bf16(path):
    """Outputs and gradients of q and k, against float64; eager is F.rms_norm in bf16, then rotary."""
    L, N, K = 5, 4, 64
    places, args = positions(L), qk(2, L, N, K, torch.bfloat16, grad=True)
    tables, (cos, sin), turn = rope_tables(places, K), rope_table(places, K), turn_of(places, K)
    exact = [x.detach().double().requires_grad_() for x in args]
    outputs = (
        qk_norm_rope(*args, places, tables, EPS),
        both(plain_norm_rope, *args, cos, sin),
        both(complex_norm_rope, *exact, turn),
    )
    draw = torch.Generator().manual_seed(0)
    grads = [torch.randn(2, L, N, K, generator=draw).bfloat16() for _ in range(2)]
    found = []
    for y, leaves in zip(outputs, (args, args, exact)):
        found.append((*y, *torch.autograd.grad(y, leaves, [g.to(y[0].dtype) for g in grads])))
    for ours, eager, truth in zip(*found):
        assert off(ours, truth) <= 2 * off(eager, truth)


def test_equals_wan_on_its_dense_grid(path):
    """Wan turns a [T, H, W] grid by a broadcast product of three axes' powers; ours gathers by position."""
    (T, H, W), N, K = (2, 3, 2), 2, 44  # 8, 7 and 7 pairs
    q, k, weight_q, weight_k = qk(1, T * H * W, N, K)
    freqs = []
    for size, pairs in zip((T, H, W), axis_pairs(K)):
        power = 1e4 ** -(torch.arange(0, 2 * pairs, 2).double() / (2 * pairs))
        angle = torch.outer(torch.arange(size).double(), power)
        freqs.append(torch.polar(torch.ones_like(angle), angle))
    t, h, w = freqs
    grid = torch.cat(
        (
            t[:, None, None].expand(T, H, W, -1),
            h[None, :, None].expand(T, H, W, -1),
            w[None, None].expand(T, H, W, -1),
        ),
        dim=-1,
    ).reshape(T * H * W, K // 2)
    at = video_positions(T, H, W)
    found = qk_norm_rope(q, k, weight_q, weight_k, at, rope_tables(at, K), EPS)
    for x, weight, y in ((q, weight_q, found[0]), (k, weight_k, found[1])):
        x = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight
        x = torch.view_as_complex(x.reshape(T * H * W, N, K // 2, 2)) * grid[:, None]
        assert off(y[0], torch.view_as_real(x).flatten(-2)) <= 1e-5


def test_shifting_every_t_leaves_scores_unchanged(path):
    args, at = qk(1, 5, 2, 32), positions(5, 20)
    scores = []
    for shift in (0, 37):
        places = at + torch.tensor([shift, 0, 0])
        q, k = qk_norm_rope(*args, places, rope_tables(places, 32), EPS)
        scores.append(torch.einsum("blnk,bmnk->bnlm", q, k))
    assert torch.allclose(*scores, atol=1e-4)
    assert off(*scores) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_goes_through_the_same_kernel(path, layout):
    """Two identities, dropped views, proxies; a far jump makes the table grow."""
    present = [("front", "left"), ("front", "back")]
    refs = reference_positions(layout, present, 1, 1, 2, (1, 2), 1, jump=300)
    at, K = torch.cat((video_positions(1, 1, 2), refs)), 24
    args = qk(1, len(at), 1, K)
    found = qk_norm_rope(*args, at, rope_tables(at, K), EPS)
    truth = both(complex_norm_rope, *(x.double() for x in args), turn_of(at, K))
    assert max(off(f, t) for f, t in zip(found, truth)) <= 1e-5


def test_tables_grow_and_equal_rope_table():
    K = 34  # a head width of no other test
    near, far = torch.tensor([[1, 2, 3]]), torch.tensor([[1000, 2, 3]])
    small = rope_tables(near, K)
    large = rope_tables(far, K)
    assert len(small.cos) == 64 and len(large.cos) == 1024 and rope_tables(near, K) is large
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
def test_wrong_inputs_are_one_clear_error(path):
    (q, k, wq, wk), at = qk(1, 3, 2, 32), positions(3)
    tables = rope_tables(at, 32)
    wrong = {
        "expected .B, L, D. with D a multiple": (q[..., :40], k[..., :40], wq[:40], wk[:40], at, tables),
        r"k is .*\[1, 2, 64\] on cpu; expected": (q, k[:, :2], wq, wk, at, tables),
        r"k is torch.bfloat16 .*; expected torch.float32 \[1, 3, 64\]": (q, k.bfloat16(), wq, wk, at, tables),
        "q is torch.int64": (q.long(), k.long(), wq, wk, at, tables),
        r"weight_k is .*\[32\]": (q, k, wq, wk[:32], at, tables),
        r"positions is .*\[2, 3\]": (q, k, wq, wk, at[:2], tables),
        "positions is torch.float32": (q, k, wq, wk, at.float(), tables),
        "k is .* on meta; expected .* on cpu": (q, k.to("meta"), wq, wk, at, tables),
    }
    for message, args in wrong.items():
        with pytest.raises(UserError, match=message):
            qk_norm_rope(*args, EPS)
    for bad, message in (
        (at - 200, "positions go from -"),
        (at + 2**20, "expected 0 to"),
        (at[:, :2], r"expected torch.int64 or torch.int32 \[3, 3\]"),
        (at.float(), "positions is torch.float32"),
    ):
        with pytest.raises(UserError, match=message):
            rope_tables(bad, 32)


@interpreted
def test_kernel_gives_nan_for_a_position_outside_the_tables(fused):
    tables = rope_tables(positions(1), 32)
    at = torch.tensor([[0, 0, 0], [0, -1, 0], [0, 0, len(tables.cos)]])
    q, _ = qk_norm_rope(*qk(1, 3, 1, 32), at, tables, EPS)
    at_h, at_w = slice(12, 22), slice(22, 32)  # 6, 5 and 5 pairs
    assert q[0, 0].isfinite().all() and q[0, 1, :, at_w].isfinite().all()
    assert q[0, 1, :, at_h].isnan().all() and q[0, 2, :, at_w].isnan().all()


def test_the_switch():
    assert kernels.use_fused(False) == kernels.use_fused(None) == "PyTorch reference kernels"
    at = positions(2)
    if kernels.triton is None:
        with pytest.raises(UserError, match="Triton"):
            kernels.use_fused(True)
        return
    try:
        if kernels.INTERPRET:
            assert kernels.use_fused(True) == "fused Triton kernels (interpreted)"
        else:
            kernels.use_fused(True)
            with pytest.raises(UserError, match="need a GPU"):
                qk_norm_rope(*qk(1, 2, 1, 8), at, rope_tables(at, 8), EPS)
    finally:
        kernels.use_fused(None)


def test_without_triton_the_references_serve(tmp_path):
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
@pytest.mark.parametrize("kernel", KERNELS)
def test_opcheck(kernel, fused):
    """Schema, fake tensors, autograd registration and AOT dispatch with dynamic shapes."""
    _, args, _ = kernels.case(kernel, 2, 3, 1, 8, torch.float32, torch.device("cpu"))
    at = positions(3)
    torch.library.opcheck(kernels._norm, (*args, at, *rope_tables(at, 8), EPS))


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_without_a_graph_break(path, kernel):
    fn, args, grads = kernels.case(kernel, 2, 3, 1, 8, torch.float32, torch.device("cpu"))
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)
    found = []
    for f in (fn, compiled):
        y = f(*args)
        found.append([*y, *torch.autograd.grad(y, args, grads)])
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
        kernel, plan, ["x", "y", "out", "total", "out_grad", "total_grad", "dx", "dy"], EPS=1e-6, STEPS=200)
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
    """Its checks are those of test_kernel_equals_reference; here, what it does with their result."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kernels.main(["--out", str(tmp_path / "kernels.json")])
    out = capsys.readouterr().out
    assert "timing needs a GPU" in out and "FAILED" not in out and not list(tmp_path.iterdir())
    monkeypatch.setattr(kernels, "check", lambda *_: (1.5, "a line"))
    with pytest.raises(UserError, match="FAILED"):
        kernels.main([])


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
    errors = {name: off(a, b) for name, a, b in zip(names, *found)}
    assert max(errors.values()) < 1e-5, max(errors.items(), key=lambda item: item[1])
