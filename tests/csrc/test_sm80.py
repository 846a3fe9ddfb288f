"""csrc/sm80's kernels, played on the CPU, against float64."""

import ctypes
import os
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from fused_lora import reference
from tests.csrc.emulation import (
    Activation,
    BackwardParams,
    BackwardPart,
    Dropout,
    ForwardParams,
    ForwardPart,
    Operand,
    build,
    load,
    operand,
    result,
)

pytestmark = pytest.mark.timeout(900)  # the first test waits for the compiler
# Above 1: in float16 its power of two stays out of xa.
SCALE = 2.7
SEED = torch.tensor(0x1234_5678_9ABC)
BOUNDS = {torch.bfloat16: 5e-3, torch.float16: 1e-3}
# SMs and the bytes of shared memory that a block may have: those of an A100, and of newer cards.
CARDS = [(torch.bfloat16, 3, 166912), (torch.float16, 1, 101376)]
# M, K, N of each part, r of each part: one tile and several, edges in every dimension, sums of less than a step,
# groups, no ranks and many, rows that start anywhere.
PASSES = [
    (256, 64, [128], [16]), (300, 200, [130], [5]), (70, 33, [40], [16]), (300, 264, [392], [40]),
    (530, 136, [257], [100]), (1100, 72, [136], [128]), (600, 200, [136, 72, 264], [24, 128, 0]),
    (300, 100, [72], [200]),
]  # fmt: skip


def headers() -> list[str]:
    """Where CUDA's are: the toolkit's, and those in Triton's package."""
    found = []
    if shutil.which("nvcc"):
        nvcc = Path(os.path.realpath(shutil.which("nvcc")))
        found = [*nvcc.parents[1].glob("include"), *Path("/usr/local").glob("cuda*/include")]
    triton = pytest.importorskip("triton")
    found.append(Path(triton.__file__).parent / "backends" / "nvidia" / "include")
    return [str(path) for path in found if (path / "cuda_runtime_api.h").exists()]


@pytest.fixture(scope="session")
def launches(tmp_path_factory, worker_id):
    """Built by one of the processes that test beside each other."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "emulated"
    with FileLock(f"{folder}.lock", timeout=600):
        if not (folder / "csrc" / "launches.so").exists():
            build(folder, headers())
    return load(folder)


def padded(rows, cols, dtype):
    """Rows as operands have them, with NaN behind."""
    return torch.full((rows, -(-cols // 8) * 8), float("nan"), dtype=dtype)[:, :cols]


def random(rows, cols, dtype):
    return padded(rows, cols, dtype).copy_(torch.randn(rows, cols))


def empty(rows, cols, dtype):
    return torch.full((rows, cols), float("nan"), dtype=dtype)


def assert_close(got, expected):
    if expected.numel():
        error = (got.double() - expected).norm() / expected.norm()
        assert error < BOUNDS[got.dtype if got.dtype in BOUNDS else torch.bfloat16]


class Linear:
    """A part and its results. p: of x's entries, the share that is dropped."""

    def __init__(self, x, N, r, grad_dtype, p, seed=SEED):
        (M, K), dtype = x.shape, x.dtype
        self.weight, self.A, self.B = random(N, K, dtype), random(r, K, dtype), random(N, r, dtype)
        self.bias, self.scale = torch.randn(1, N).to(dtype), torch.tensor([SCALE])
        self.gain = torch.rand(N) + 0.5 if r % 2 == 0 else None
        self.xa, self.y = padded(M, r, dtype), empty(M, N, dtype)
        self.dy, self.dxa = random(M, N, dtype), padded(M, r, dtype)
        self.p, self.seed, self.kept = p, seed, reference.keep_mask(M, K, p, seed) / (1 - p)
        # What low is made with.
        self.rounded = SCALE / 4 if dtype is torch.float16 else SCALE
        self.dA, self.dB, self.dbias = empty(r, K, grad_dtype), empty(N, r, grad_dtype), empty(1, N, dtype)

    def dropout(self):
        return Dropout(self.seed.data_ptr() if self.p else None, reference.mask_threshold(self.p), 1 / (1 - self.p))

    def forward(self):
        matrices = [operand(tensor) for tensor in (self.weight, self.A, self.B)]
        gain = None if self.gain is None else self.gain.data_ptr()
        return ForwardPart(
            *matrices, result(self.bias), operand(self.xa), result(self.y), gain, self.scale.data_ptr(), self.dropout()
        )

    def output(self, x, low):
        """y of x and of xa before its scale."""
        sums = x.double() @ self.weight.double().T + SCALE * low @ self.B.double().T
        return (sums if self.gain is None else sums * self.gain.double()) + self.bias.double()

    def backward(self, x):
        matrices = (self.dy, x, self.weight, self.A, self.B, self.xa, self.dxa)
        grads = [result(tensor) for tensor in (self.dA, self.dB, self.dbias)]
        return BackwardPart(*map(operand, matrices), *grads, None, self.scale.data_ptr(), self.dropout())

    def check_forward(self, x):
        low = (x.double() * self.kept) @ self.A.double().T
        assert_close(self.xa, self.rounded * low)
        assert_close(self.y, self.output(x, low))

    def check_backward(self, x):
        """What it adds to dx."""
        dxa = SCALE * self.dy.double() @ self.B.double()
        assert_close(self.dxa, dxa / (1 - self.p))
        assert_close(self.dA, dxa.T @ (x.double() * self.kept))
        assert_close(self.dB, self.dy.double().T @ self.xa.double() * (SCALE / self.rounded))
        assert_close(self.dbias, self.dy.double().sum(0, keepdim=True))
        return self.dy.double() @ self.weight.double() + dxa @ self.A.double() * self.kept


# With dropout on one card, without it on the other; some in halves.
@pytest.mark.parametrize(("number", "sizes"), list(enumerate(PASSES)), ids=str)
@pytest.mark.parametrize("card", range(len(CARDS)), ids=["A100", "Ada"])
def test_a_pass(launches, card, number, sizes):
    (dtype, sms, shared_bytes), p, halves = CARDS[card], 0.3 * ((number + card) % 2), (number // 2 + card) % 2 == 1
    M, K, widths, ranks = sizes
    torch.manual_seed(0)
    launches.play_on(sms, shared_bytes, halves)
    x, dx = random(M, K, dtype), empty(M, K, dtype)
    grad_dtype = torch.float32 if M % 100 else dtype
    parts = [Linear(x, N, r, grad_dtype, p) for N, r in zip(widths, ranks, strict=True)]
    forward = ForwardParams(x=operand(x), parts=len(parts))
    backward = BackwardParams(dx=result(dx), parts=len(parts), summed=len(parts))
    for i, part in enumerate(parts):
        forward.part[i], backward.part[i] = part.forward(), part.backward(x)
    assert launches.forward(ctypes.byref(forward)) == 0
    for part in parts:
        part.check_forward(x)
    assert launches.backward(ctypes.byref(backward)) == 0
    assert_close(dx, sum(part.check_backward(x) for part in parts))


@pytest.mark.parametrize("p", [0.0, 0.3, 63 / 64])
def test_factors_of_another_x(launches, p):
    """As in an MLP's backward: a part that has its dxa already, with its own seed, beside one that dx is made of."""
    dtype, M = torch.bfloat16, 600
    torch.manual_seed(0)
    launches.play_on(3, 166912, False)
    x, hidden, dx = random(M, 136, dtype), random(M, 391, dtype), empty(M, 136, dtype)
    first, other = Linear(x, 200, 24, dtype, p), Linear(hidden, 72, 40, dtype, p, seed=SEED + 2**32)
    other.dxa.copy_(SCALE * other.dy.double() @ other.B.double() / (1 - p))
    backward = BackwardParams(dx=result(dx), parts=2, summed=1)
    for i, (part, read) in enumerate(((first, x), (other, hidden))):
        part.xa.copy_(torch.randn(M, part.A.shape[0]))
        backward.part[i] = part.backward(read)
    backward.part[1].weight = Operand()
    assert launches.backward(ctypes.byref(backward)) == 0
    assert_close(dx, first.check_backward(x))
    other.check_backward(hidden)


def results(count, rows, cols, dtype):
    """Of gated passes: one stride, NaN behind."""
    return [padded(rows, cols, dtype) for _ in range(count)]


@pytest.mark.parametrize(
    ("card", "p", "act", "factors", "halves"),
    [(0, 0.0, "silu", True, False), (0, 0.3, "gelu_tanh", False, True), (1, 0.3, "silu", True, True)],
)
def test_a_gated_pass(launches, card, p, act, factors, halves):
    """act(gate) up of two parts, tiles with edges, and the gradients of both from down's."""
    (dtype, sms, shared_bytes), M, K, F, N = CARDS[card], 70, 40, 81, 72
    torch.manual_seed(0)
    launches.play_on(sms, shared_bytes, halves)
    numbers = reference.ACTIVATIONS[act]
    x = random(M, K, dtype).mul_(0.03)  # where neither side of the activation is flat
    sides = [Linear(x, F, r, dtype, p) for r in (40, 5)]
    gate, up, hidden = results(3, M, F, dtype)
    forward = ForwardParams(x=operand(x), parts=2, gated=True, factors=factors, activation=Activation(*numbers))
    for i, (part, y) in enumerate(zip(sides, (gate, up), strict=True)):
        forward.part[i] = part.forward()
        forward.part[i].y = operand(y)
    forward.hidden = operand(hidden)
    assert launches.forward(ctypes.byref(forward)) == 0
    low = [(x.double() * part.kept) @ part.A.double().T for part in sides]
    ys = [part.output(x, xa) for part, xa in zip(sides, low, strict=True)]
    for part, xa in zip(sides, low, strict=True):
        assert_close(part.xa, part.rounded * xa)
    kept = reference.gated_factors(*ys, *numbers) if factors else ys
    for got, expected in zip((gate, up, hidden), (*kept, reference.gated(*ys, *numbers)), strict=True):
        assert_close(got, expected)

    down = Linear(hidden, N, 24, dtype, p)
    dgate, dup, again = results(3, M, F, dtype)
    backward = BackwardParams(parts=1, summed=1, gated=True, factors=factors, activation=Activation(*numbers))
    backward.part[0] = down.backward(hidden)
    for name in ("dA", "dB", "dbias"):
        setattr(backward.part[0], name, Operand())
    for name, tensor in {"gate": gate, "up": up, "dgate": dgate, "dup": dup, "hidden": again}.items():
        setattr(backward, name, Operand() if factors and name == "hidden" else operand(tensor))
    assert launches.backward(ctypes.byref(backward)) == 0
    dxa = SCALE * down.dy.double() @ down.B.double()
    dhidden = down.dy.double() @ down.weight.double() + dxa @ down.A.double() * down.kept
    first, second = gate.double(), up.double()
    if factors:
        assert_close(dgate, dhidden * second)
        assert_close(dup, dhidden * first)
    else:
        for got, expected in zip((dgate, dup), reference.gated_backward(dhidden, first, second, *numbers), strict=True):
            assert_close(got, expected)
        assert_close(again, reference.gated(first, second, *numbers))
