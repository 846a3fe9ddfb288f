"""Stored weights by Triton's kernels, a chunk at a time, on a GPU or in the interpreter, against float64."""

import pytest
import torch

from fused_lora import backends, padding
from fused_lora.formats import FP8, INT8, NF4, Stored, dequantise
from fused_lora.kernels import chunked
from fused_lora.ops import lora_linear
from fused_lora.ops.lora_parts import choice
from fused_lora.ops.parts import Part
from tests.kernels.problem import DEVICE
from tests.ops import test_stored as in_torch
from tests.ops.problem import SCALE, make_dy, make_inputs, seed_on
from tests.ops.segments_problem import Problem, assert_near
from tests.segments.divisions import DIVISIONS

pytestmark = pytest.mark.interpreter

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FORMATS = [FP8("rows"), FP8("blocks"), FP8("tensor"), INT8(), NF4(), NF4(nested=True)]
every_format = pytest.mark.parametrize("form", FORMATS, ids=str)


@pytest.fixture(autouse=True)
def _triton():
    with backends.forcing("triton"):
        yield


@pytest.fixture(autouse=True)
def scratches(monkeypatch):
    """Of one chunk of 256 columns, and with NaN in it: the shapes that were asked for."""
    shapes, empty = [], padding.empty

    def poisoned(rows, cols, like):
        shapes.append((rows, cols))
        whole = empty(rows, cols, like)
        whole._base.fill_(float("nan"))
        return whole

    monkeypatch.setattr(chunked, "SCRATCH", 1)
    monkeypatch.setattr(chunked.padding, "empty", poisoned)
    return shapes


def solve(form, M, K, N, r, dtype, lora_dtype=None, p=0.0, **options):
    inputs, plain = in_torch.quantised(make_inputs(M, K, N, r, DEVICE, dtype, lora_dtype), form, dtype)
    dy, options = make_dy(plain), {"scale": SCALE, "p": p, "seed": seed_on(DEVICE) if p else None} | options
    in_torch.check(in_torch.differentiated(lora_linear, inputs, dy, **options), plain, dy, **options)


@every_format
@pytest.mark.parametrize(("shape", "p"), [((33, 65, 600, 3), 0.0), ((50, 520, 48, 24), 0.3)])
def test_lora_linear(shape, p, form, scratches):
    """Three chunks of rows, then one of columns; or the other way round."""
    solve(form, *shape, BF16, p=p)
    _, K, N, _ = shape
    assert scratches == [(min(N, 256), K), (N, min(K, 256))]


@pytest.mark.parametrize(("form", "dtype", "lora_dtype", "scale"), [
    (FP8("blocks"), FP16, None, SCALE), (NF4(), FP16, None, 30.0), (INT8(), BF16, FP32, SCALE),
    (NF4(nested=True), FP32, None, SCALE), (FP8("rows"), FP32, None, SCALE),
], ids=str)  # fmt: skip
def test_dtypes(form, dtype, lora_dtype, scale):
    solve(form, 40, 300, 264, 5, dtype, lora_dtype, 0.3, scale=scale)


@every_format
def test_in_one_chunk(form, monkeypatch):
    monkeypatch.setattr(chunked, "SCRATCH", 1 << 22)
    solve(form, (3, 20), 64, 300, 16, BF16, p=0.3)


@pytest.mark.parametrize("M", [1, 300])
def test_rows(M):
    solve(NF4(), M, 264, 257, 8, BF16)


@every_format
def test_a_gain(form):
    in_torch.test_a_gain(form, DEVICE, BF16)
    gain = (torch.rand(520) + 0.5).to(DEVICE)
    solve(form, 30, 72, 520, 5, FP16, gain=gain)


@every_format
def test_groups_and_mlps(form):
    in_torch.test_groups_and_mlps(form, DEVICE, BF16)


@pytest.mark.parametrize(("K", "N", "name", "drops"), [(40, 300, "odd", False), (300, 40, "sums of two", True)])
@every_format
def test_rows_with_adapters_of_their_own(form, K, N, name, drops):
    problem = Problem(DIVISIONS[name], K, (N,), backend="triton", drops=drops)
    (linear,) = problem.linears
    stored = form.quantise(linear.weight)
    linear.weight = stored
    got = problem.run()
    linear.weight = dequantise(stored, BF16)
    expected = zip(got, problem.by_formula(torch.float64), problem.by_formula(BF16), strict=True)
    for i, (one, exact, torchs) in enumerate(expected):
        assert_near(f"result {i}", one, exact, torchs, BF16)


@pytest.mark.parametrize("needs", [("x",), ("A",), ("B",), ("x", "B")])
def test_some_gradients(needs):
    inputs, plain = in_torch.quantised(make_inputs(20, 72, 300, 3, DEVICE, BF16), NF4(), BF16)
    inputs, plain = ({n: t.detach() if n != "weight" else t for n, t in of.items()} for of in (inputs, plain))
    for name in needs:
        plain[name] = inputs[name] = inputs[name].requires_grad_()
    dy = make_dy(plain)
    in_torch.check(in_torch.differentiated(lora_linear, inputs, dy, scale=SCALE), plain, dy, scale=SCALE)


def test_who_computes():
    """Without being forced, too."""
    inputs, _ = in_torch.quantised(make_inputs(20, 72, 40, 3, DEVICE, BF16), INT8(), BF16)
    part = Part(*(inputs[name] for name in ("weight", "A", "B")))
    with backends.forcing("auto"):
        assert choice(inputs["x"], part, 0.0).name == "triton"


@pytest.mark.parametrize("depth", [1, 65, 4096, 11008, 28672, 10**6])
@pytest.mark.parametrize("size", [1, 255, 256, 257, 4096, 11008, 128256])
def test_chunks(size, depth, monkeypatch):
    monkeypatch.setattr(chunked, "SCRATCH", 1 << 22)
    found = chunked.chunks(size, depth)
    assert [first for first, _ in found] + [size] == [0, *(last for _, last in found)]
    widths = [last - first for first, last in found]
    assert all(width == widths[0] and width % 256 == 0 for width in widths[:-1])
    assert 0 < widths[-1] <= widths[0]
    assert widths[0] <= 256 or widths[0] * depth <= chunked.SCRATCH


@pytest.mark.gpu
@pytest.mark.parametrize("form", [FP8("blocks"), INT8(), NF4(nested=True)], ids=str)
def test_many_rows_in_a_graph(form, monkeypatch):
    """Chunks as they are, whose bits are those of the products with W itself up to the order of sums; and what a graph
    replays after the inputs have changed."""
    monkeypatch.setattr(chunked, "SCRATCH", 1 << 22)
    solve(form, 2048, 2048, 4352, 16, BF16, p=0.1)
    inputs, _ = in_torch.quantised(make_inputs(512, 2048, 4352, 16, DEVICE, BF16), form, BF16)
    dy = torch.randn(512, 4352, device=DEVICE, dtype=BF16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        in_torch.differentiated(lora_linear, inputs, dy, scale=SCALE)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = in_torch.differentiated(lora_linear, inputs, dy, scale=SCALE)
    with torch.no_grad():
        inputs["x"].normal_()
        inputs["weight"].codes.copy_(inputs["weight"].codes.flip(0))
    graph.replay()
    for name, want in in_torch.differentiated(lora_linear, inputs, dy, scale=SCALE).items():
        assert torch.equal(got[name], want), name


@pytest.mark.gpu
@every_format
def test_memory(form, monkeypatch):
    """What a pass takes besides its results is about its scratch, not W."""
    monkeypatch.undo()
    N, K = 16384, 8192
    stored = form.quantise(torch.randn(N, K, device=DEVICE))
    x = torch.randn(64, K, device=DEVICE, dtype=BF16)
    A, B = torch.randn(8, K, device=DEVICE, dtype=BF16), torch.randn(N, 8, device=DEVICE, dtype=BF16)
    assert isinstance(stored, Stored)
    with backends.forcing("triton"):
        lora_linear(x, stored, A, B)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        lora_linear(x, stored, A, B)
    assert torch.cuda.max_memory_allocated() - before < 3 * chunked.SCRATCH * 2 < N * K * 2
