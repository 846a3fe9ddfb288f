"""csrc/sm80's kernels for rows with adapters of their own, played on the CPU, against float64."""

import ctypes
import mmap

import pytest
import torch

from fused_lora import segments
from tests.csrc import emulation
from tests.csrc.emulation import BackwardParams, BackwardPart, Dropout, ForwardParams, ForwardPart, operand, result
from tests.csrc.test_sm80 import BOUNDS, CARDS, empty, launches, padded, random  # noqa: F401
from tests.segments.divisions import DIVISIONS, Division, places_of

pytestmark = pytest.mark.timeout(900)  # the first test waits for the compiler
NOTHING = Dropout(None, 0, 1.0)
NO_ACCESS = 0
MANY = {
    # Several slices of a gradient, whose windows go on in the next one; more windows than a block has boxes.
    "slices": Division((16, 64, 8), ((0, 2500), (None, 300), (1, 1700), (2, 100))),
    # Windows of two slices, which end where those of the next ones begin; with so many blocks all slices run at once.
    "meeting slices": Division((64,) * 3, ((0, 4096), (1, 4096))),
    "64 of 70": Division((16,) * 64, tuple((i, 70) for i in range(64))),
}


def assert_close(got, expected):
    """Also where all is zero."""
    assert (got.double() - expected).norm() <= BOUNDS[got.dtype] * expected.norm()


def guarded(rows, cols, dtype):
    """Zeros at the end of memory, behind which nobody may read."""
    size = rows * cols * dtype.itemsize
    pages = -(-size // mmap.PAGESIZE) + 1
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    last = ctypes.c_void_p(begin + (pages - 1) * mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(last, mmap.PAGESIZE, NO_ACCESS) == 0
    end = (pages - 1) * mmap.PAGESIZE
    return torch.frombuffer(memory, dtype=dtype, offset=end - size, count=rows * cols).view(rows, cols)


class Linear:
    """One of a pass, and its results."""

    def __init__(self, division, K, N, dtype, scale, places, R):
        window = max([segments.BOX, *(places[a].size for path in division.paths() for a in path)])
        self.plan = segments.make_plan([[places[a] for a in path] for path in division.paths()], window)
        self.weight, self.bias = random(N, K, dtype), torch.randn(1, N).to(dtype)
        self.A, self.up, self.scales = guarded(R, K, dtype), guarded(R, N, dtype), guarded(R // 16, 1, torch.float32)
        self.scales = self.scales.flatten()
        for i, (place, r) in enumerate(zip(places, division.ranks, strict=True)):
            rows = slice(place.rank, place.rank + r)
            self.A[rows], self.up[rows] = torch.randn(r, K), torch.randn(r, N)
            self.scales[place.rank // 16 : (place.rank + place.size) // 16] = scale * (0.5 + 0.25 * (i % 5))
        of = segments.constants(self.plan, torch.device("cpu"))
        self.tables = segments.tables(self.plan, of, division.ends(), division.M)
        (levels, blocks, _), windows = self.tables.blocks.shape, len(self.tables.windows)
        boxes = self.plan.window // segments.BOX * (levels * (blocks - 1) + windows)
        self.xa, self.dxa = (empty(boxes * segments.BLOCK, segments.BOX, dtype) for _ in range(2))
        self.y, self.dy = empty(division.M, N, dtype), random(division.M, N, dtype)
        self.dA, self.dB = empty(self.plan.ranks, K, dtype), empty(self.plan.ranks, N, dtype)

    def segments(self):
        blocks, windows, _ = self.tables
        pointers = (table.data_ptr() for table in self.tables)
        return emulation.Segments(*pointers, len(windows), len(blocks), blocks.shape[1], len(self.A))

    def forward(self):
        matrices = (operand(tensor) for tensor in (self.weight, self.A, self.up))
        results = (operand(self.xa), result(self.y))
        return ForwardPart(
            *matrices, result(self.bias), *results, None, self.scales.data_ptr(), NOTHING, self.segments()
        )

    def backward(self, x):
        matrices = (self.dy, x, self.weight, self.A, self.up, self.xa, self.dxa)
        grads = (result(self.dA), result(self.dB), result(None))
        part = BackwardPart(*map(operand, matrices), *grads, None, self.scales.data_ptr(), NOTHING)
        part.segments = self.segments()
        return part

    def check(self, x):
        """What it adds to dx."""
        of = (self.scales.double(), self.tables, self.plan.window)
        x, weight, A, B, bias, dy = (t.double() for t in (x, self.weight, self.A, self.up.t(), self.bias[0], self.dy))
        y, xa = segments.forward_ref(x, weight, A, B, bias, *of)
        dxa = segments.dxa_ref(dy, B, *of)
        dx, dA, dB = segments.backward_ref(dy, x, weight, A, B, xa, dxa, *of, (True, True, True))
        assert_close(self.y, y)
        assert_close(self.dA, dA)
        assert_close(self.dB, dB.t())
        return dx


def check(launches, card, division, K, widths, scale=1.5, blocks=None, slab=None):  # noqa: F811
    dtype, sms, shared_bytes = CARDS[card]
    torch.manual_seed(0)
    launches.play_on(blocks or sms, shared_bytes, False)
    x, dx = random(division.M, K, dtype), empty(division.M, K, dtype)
    places, R = slab or places_of(division.ranks)
    parts = [Linear(division, K, N, dtype, scale, places, R) for N in widths]
    window = parts[0].plan.window
    forward = ForwardParams(x=operand(x), parts=len(parts), window=window)
    backward = BackwardParams(dx=result(dx), parts=len(parts), summed=len(parts), window=window)
    for i, part in enumerate(parts):
        forward.part[i], backward.part[i] = part.forward(), part.backward(x)
    assert launches.forward(ctypes.byref(forward)) == 0
    assert launches.backward(ctypes.byref(backward)) == 0
    assert_close(dx, sum(part.check(x) for part in parts))


@pytest.mark.parametrize("card", range(len(CARDS)), ids=["A100", "Ada"])
@pytest.mark.parametrize("name", [name for name in DIVISIONS if name != "nothing but rows behind"])
def test_divisions(launches, name, card):  # noqa: F811
    division = DIVISIONS[name]
    if CARDS[card][0] is torch.float16 and len(division.plan().levels) > 1:
        pytest.skip("rows with several adapters have no room of one size")
    check(launches, card, division, 72, (136, 40) if name == "mixed" else (72,))


@pytest.mark.parametrize("name", MANY)
def test_many_rows(launches, name):  # noqa: F811
    if name == "meeting slices":
        check(launches, 0, MANY[name], 8, (8,), blocks=64)
    else:
        check(launches, 0, MANY[name], 40, (72,))


@pytest.mark.parametrize("card", range(len(CARDS)), ids=["A100", "Ada"])
def test_a_slab_that_ends_within_a_window(launches, card):  # noqa: F811
    """As one has grown in which adapters came one by one."""
    division = Division((16, 128, 64, 64), ((1, 200), (3, 120), (0, 30)))
    places = [segments.Place(*each) for each in ((0, 16), (128, 128), (64, 64), (256, 64))]
    check(launches, card, division, 64, (64,), slab=(places, 320))
