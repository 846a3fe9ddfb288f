"""The restart's kernels and their rounding: bit for bit the reference's, where both add the same numbers."""

import contextlib
import dataclasses
import itertools
from typing import ClassVar

import pytest
import torch
import triton
import triton.language as tl

from fused_lora import reference
from fused_lora.kernels import merge_and_reinit as kernels
from fused_lora.kernels.merge_and_reinit import Layer, merge_and_reinit_
from fused_lora.kernels.random import half_bits
from fused_lora.kernels.restart_tables import Launch, filled, is_open, table_bytes
from fused_lora.kernels.rounding import join, round_randomly, split
from fused_lora.kernels.tiles import KNOWN_GPUS
from tests.kernels.problem import DEVICE, randn
from tests.test_reference import hard_cases

pytestmark = pytest.mark.interpreter
DTYPES_16 = [torch.bfloat16, torch.float16]
TRITON = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
SEED = 0x1234_5678_9ABC


@triton.jit
def round_kernel(values, high, low, back, random, seed_ptr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(values + offs)
    h, rest = split(v, DTYPE)
    tl.store(high + offs, h)
    tl.store(low + offs, rest)
    tl.store(back + offs, join(h, rest))
    bits = tl.reshape(half_bits(tl.load(seed_ptr), 0, tl.program_id(0) * BLOCK, 1, BLOCK), (BLOCK,))
    tl.store(random + offs, round_randomly(v, bits, DTYPE))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's NumPy, at infinities
@pytest.mark.parametrize("dtype", DTYPES_16, ids=str)
def test_rounding_is_the_reference_bit_for_bit(dtype):
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 3.4e38, -3.4e38])
    values = torch.cat([hard_cases(dtype), special, torch.randn(5000)])
    values = values[values.abs() >= 2**-17] if dtype is torch.float16 else values  # below, halves may round apart
    block = 1024
    count = -(-values.numel() // block) * block
    values = torch.nn.functional.pad(values, (0, count - values.numel())).to(DEVICE)
    seed = torch.tensor(SEED, device=DEVICE)
    high, random = (torch.empty(count, dtype=dtype, device=DEVICE) for _ in range(2))
    low, back = torch.empty(count, dtype=torch.int16, device=DEVICE), torch.empty(count, device=DEVICE)
    round_kernel[(count // block,)](values, high, low, back, random, seed, TRITON[dtype], block)
    want_high, want_low = reference.split(values, dtype)
    assert torch.equal(high.view(torch.int16), want_high.view(torch.int16))
    assert torch.equal(low, want_low)
    assert torch.equal(back, reference.join(want_high, want_low))
    want = reference.round_randomly(values[None], dtype, seed)[0]
    assert torch.equal(random.view(torch.int16), want.view(torch.int16))


def make_layers(shapes, dtype, lora_dtype, mode):
    layers = []
    for i, (N, K, r) in enumerate(shapes):
        low = torch.randint(-(2**15), 2**15, (N, K), device=DEVICE).to(torch.int16) if mode == "low" else None
        layers.append(Layer(
            randn(N, K, dtype=dtype, scale=0.02), randn(r, K, dtype=lora_dtype or dtype, scale=K**-0.5),
            randn(N, r, dtype=lora_dtype or dtype, scale=0.02), torch.tensor(0.625, device=DEVICE), 7 - 9 * i, low,
        ))  # fmt: skip
    return layers


def copy(layer):
    tensors = (None if t is None else t.clone() for t in (layer.weight, layer.A, layer.B, layer.scale))
    return Layer(*tensors, layer.seed, None if layer.low is None else layer.low.clone())


# Rows that 16-byte accesses can start at and rows that they cannot, several ranks: several launches.
SHAPES = [(75, 101, 5), (128, 64, 16), (33, 40, 8), (200, 136, 40), (70, 1200, 8), (66, 80, 264), (65, 607, 131)]


@pytest.mark.parametrize("mode", ["nearest", "stochastic", "low"])
@pytest.mark.parametrize("lora_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES_16, ids=str)
def test_restarts(dtype, lora_dtype, mode):
    layers = make_layers(SHAPES, dtype, lora_dtype or dtype, mode)
    wanted = [copy(layer) for layer in layers]
    merge_and_reinit_(layers, mode == "stochastic", KNOWN_GPUS["RTX 3090"])
    for layer, want in zip(layers, wanted, strict=True):
        exact = want.weight.float() if want.low is None else reference.join(want.weight, want.low)
        exact = exact.double() + 0.625 * want.B.double() @ want.A.double()
        seed = torch.tensor(want.seed, device=DEVICE)
        reference.merge_and_reinit_ref_(want.weight, want.A, want.B, want.scale, seed, want.low, mode == "stochastic")
        assert torch.equal(layer.A, want.A)
        assert not layer.B.any()
        # The products are summed in another order, so that a few sums are rounded to the other neighbour.
        assert (layer.weight == want.weight).float().mean() > 0.99
        if mode == "low":
            assert (reference.join(layer.weight, layer.low) - exact).abs().max() < 1e-7
        else:
            ulp = reference._ulp(exact.float(), dtype)
            room = ulp * (0.501 if mode == "nearest" else 1) + 1e-8  # float32 sums of numbers of 1e-2
            assert ((layer.weight.double() - exact).abs() <= room).all()


def filled_up(matrix):
    """The same matrix with rows of a multiple of 8 columns, and what lies between them."""
    storage = torch.full((len(matrix), filled(matrix.shape[1])), 7, dtype=matrix.dtype, device=matrix.device)
    view, between = storage[:, : matrix.shape[1]], storage[:, matrix.shape[1] :]
    view.copy_(matrix)
    return view, between


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's NumPy, at the infinity
@pytest.mark.parametrize("mode", ["nearest", "stochastic", "low"])
def test_rows_that_are_filled_up(mode):
    """Their 16-byte accesses reach beyond the last column, and change nothing there."""
    layers = make_layers([(75, 101, 5), (66, 79, 16)], torch.bfloat16, torch.bfloat16, mode)
    wanted = [copy(layer) for layer in layers]
    weights = [filled_up(layer.weight) for layer in layers]
    lows = [(None, None) if layer.low is None else filled_up(layer.low) for layer in layers]
    layers = [
        dataclasses.replace(layer, weight=weight, low=low)
        for layer, (weight, _), (low, _) in zip(layers, weights, lows, strict=True)
    ]
    assert all(is_open(layer.weight) for layer in layers)
    for some in (layers, wanted):
        some[0].B[3, 2] = float("inf")  # which times the zeros of the filling is not zero
    merge_and_reinit_(layers, mode == "stochastic", KNOWN_GPUS["RTX 3090"])
    merge_and_reinit_(wanted, mode == "stochastic", KNOWN_GPUS["RTX 3090"])
    for layer, want in zip(layers, wanted, strict=True):
        finite = torch.arange(len(layer.B)) != 3
        # Other tiles add up the same products in another order, and a few sums are rounded to the other neighbour.
        differences = (layer.weight.float() - want.weight.float())[finite].abs()
        assert (differences <= reference._ulp(want.weight.float(), torch.bfloat16)[finite]).all()
        assert (differences == 0).float().mean() > 0.999
        if mode == "low":
            values, others = (reference.join(one.weight, one.low)[finite] for one in (layer, want))
            assert (values - others).abs().max() < 1e-7
    assert all((between == 7).all() for _, between in (*weights, *lows) if between is not None)


def test_factors_of_two_dtypes_and_any_layout():
    """They are copied, a few layers at a time where the workspace is small."""
    layers = make_layers([(75, 104, 8), (66, 80, 16), (40, 64, 13)], torch.bfloat16, torch.bfloat16, "low")
    wanted = [copy(layer) for layer in layers]
    layers = [
        dataclasses.replace(layer, A=layer.A.T.contiguous().T, B=layer.B.double() if i else layer.B)
        for i, layer in enumerate(layers)
    ]
    merge_and_reinit_(layers, False, KNOWN_GPUS["RTX 3090"])
    merge_and_reinit_(wanted, False, KNOWN_GPUS["RTX 3090"])
    for layer, want in zip(layers, wanted, strict=True):
        assert torch.equal(layer.A, want.A)
        assert not layer.B.any()
        difference = reference.join(layer.weight, layer.low) - reference.join(want.weight, want.low)
        assert difference.abs().max() < 1e-7


def test_float32_weights():
    layers = make_layers(SHAPES, torch.float32, torch.float32, "nearest")
    wanted = [copy(layer) for layer in layers]
    merge_and_reinit_(layers, True, KNOWN_GPUS["RTX 3090"])
    for layer, want in zip(layers, wanted, strict=True):
        reference.merge_and_reinit_ref_(want.weight, want.A, want.B, want.scale, torch.tensor(want.seed, device=DEVICE))
        assert (layer.weight - want.weight).abs().max() < 1e-7
        assert torch.equal(layer.A, want.A)


def test_nothing_added_keeps_its_bits():
    (layer,) = make_layers([(40, 72, 8)], torch.bfloat16, torch.bfloat16, "low")
    layer.B.zero_()
    layer.weight[3, 5], layer.weight[4], layer.low[4] = float("nan"), -0.0, 3
    before = layer.weight.clone(), layer.low.clone()
    merge_and_reinit_([layer], False, KNOWN_GPUS["RTX 3090"])
    assert torch.equal(layer.weight.view(torch.int16), before[0].view(torch.int16))
    assert torch.equal(layer.low, before[1])


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [True, False])
def test_low_halves_in_the_hosts_memory(pinned, monkeypatch):
    """Streamed by a few rows at a time through a small workspace: the same bits as beside the weight."""
    monkeypatch.setattr(kernels, "SLOT_BYTES", 2**16)
    layers = make_layers([(75, 101, 5), (128, 64, 16), (400, 136, 40), (300, 607, 131)], torch.bfloat16, None, "low")
    here = [copy(layer) for layer in layers]
    lows = [layer.low.cpu().pin_memory() if pinned else layer.low.cpu() for layer in layers]
    layers = [dataclasses.replace(layer, low=low) for layer, low in zip(layers, lows, strict=True)]
    for _ in range(3):
        merge_and_reinit_(layers, False, KNOWN_GPUS["RTX 3090"])
        merge_and_reinit_(here, False, KNOWN_GPUS["RTX 3090"])
        for layer, want in zip(layers, here, strict=True):
            assert torch.equal(layer.weight, want.weight)
            assert torch.equal(layer.low, want.low.cpu())
            layer.B.normal_(std=0.02)
            want.B.copy_(layer.B)


class OneStream:
    """Of a device that does everything at once, and remembers what it was told to wait for."""

    told: ClassVar[list] = []
    count = itertools.count()

    def __init__(self):
        self.name = ("here", "arriving", "leaving")[next(OneStream.count) % 3]

    def wait_event(self, event):
        self.told.append((self.name, "waits for", event))

    def wait_stream(self, other):
        self.told.append((self.name, "waits for", other.name))

    def record_event(self):
        event = len(self.told)
        self.told.append((self.name, "records", event))
        return event

    def synchronize(self):
        self.told.append((self.name, "ends", None))


@pytest.fixture
def one_stream(monkeypatch):
    """Streams layers that lie in one memory, a few rows at a time, without a GPU."""
    if torch.cuda.is_available():
        pytest.skip("a GPU has streams of its own")
    monkeypatch.setattr(kernels, "SLOT_BYTES", 2**16)
    monkeypatch.setattr(kernels.Layer, "is_streamed", True)
    monkeypatch.setattr(OneStream, "told", [])
    monkeypatch.setattr(OneStream, "count", itertools.count())
    monkeypatch.setattr(torch.cuda, "Stream", OneStream)
    monkeypatch.setattr(torch.cuda, "current_stream", OneStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


STREAMED = [(75, 101, 5), (128, 64, 16), (400, 136, 40), (300, 607, 131)]


def test_pieces_that_pass_through_a_small_workspace(one_stream):
    """What is streamed, in order: a few rows at a time, of several layers and kinds, factors filled up or not."""
    layers = make_layers(STREAMED, torch.bfloat16, None, "low")
    wanted = [copy(layer) for layer in layers]
    pieces = [piece for layer in layers for piece in layer.pieces()]
    assert len(pieces) > 2 * len(layers)
    assert sum(len(piece.weight) for piece in pieces) == sum(N for N, _, _ in STREAMED)
    merge_and_reinit_(layers, False, KNOWN_GPUS["RTX 3090"])
    check_against_the_reference(layers, wanted)


def test_streams_wait_for_one_another(one_stream):
    """Low halves arrive in a slot that was left, are merged when they are there, and leave when they are merged."""
    layers = make_layers(STREAMED, torch.bfloat16, None, "low")
    merge_and_reinit_(layers, False, KNOWN_GPUS["RTX 3090"])
    *told, last_but_one, last = OneStream.told
    assert {last_but_one, last} == {("arriving", "ends", None), ("leaving", "ends", None)}
    free = [event for _, _, event in told[: kernels.SLOTS]]
    assert told[: kernels.SLOTS] == [("here", "records", event) for event in free]
    portions = [told[i : i + 4] for i in range(kernels.SLOTS, len(told), 4)]
    assert len(portions) > 2 * kernels.SLOTS
    for i, portion in enumerate(portions):
        assert portion[:3] == [
            ("arriving", "waits for", free[i % kernels.SLOTS]), ("here", "waits for", "arriving"),
            ("leaving", "waits for", "here"),
        ]  # fmt: skip
        name, verb, free[i % kernels.SLOTS] = portion[3]
        assert (name, verb) == ("leaving", "records")


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("mode", ["nearest", "low"])
def test_what_is_grouped_can_share_a_launch(mode, streamed, one_stream, monkeypatch):
    """Layers are grouped before there are copies of them; merges by what is written and read, copies too."""
    monkeypatch.setattr(kernels, "SLOT_BYTES", 2**20)
    monkeypatch.setattr(kernels.Layer, "is_streamed", streamed and mode == "low")
    shapes = [*SHAPES, *STREAMED, (64, 128, 16), (64, 120, 12)]
    layers = make_layers(shapes, torch.bfloat16, None, mode) + make_layers(shapes, torch.bfloat16, torch.float32, mode)
    layers += [
        dataclasses.replace(layer, weight=randn(*layer.weight.T.shape, dtype=torch.bfloat16).T) for layer in layers
    ]
    seen = []
    monkeypatch.setattr(kernels, "merge_launch", lambda updates, *_: seen.append({each.kind() for each in updates}))
    groups = kernels._groups(layers)
    slot = torch.empty(max(map(kernels._size, groups)), dtype=torch.uint8)
    for group in groups:
        kernels.Portion(group, slot, False, KNOWN_GPUS["RTX 3090"])
    assert all(len(kinds) == 1 for kinds in seen)
    assert len(set.union(*seen)) > 6


def test_tables_of_many_small_layers_have_room(one_stream, monkeypatch):
    monkeypatch.setattr(kernels, "SLOT_BYTES", 2**20)
    layers = make_layers(
        [(1, 8, 8), (1, 5, 3)] * 300 + [(600, 8, 8), (9, 5000, 3)], torch.bfloat16, torch.float32, "low"
    )
    groups = kernels._groups(layers)
    assert len(groups) > 5
    slot = torch.empty(max(map(kernels._size, groups)), dtype=torch.uint8)
    for group in groups:
        launches = kernels.Portion(group, slot, False, KNOWN_GPUS["RTX 3090"]).launches
        assert table_bytes(launches) <= kernels._most_table_bytes(slot)


def test_a_launch_that_fails_changes_no_layers_function(monkeypatch):
    """Layers of two kinds that are merged where they lie; the second kind's merge fails."""
    layers = make_layers([(75, 104, 16), (66, 80, 264)], torch.bfloat16, None, "low")
    before = [copy(layer) for layer in layers]
    run, merges = Launch.run, itertools.count()

    def fail(launch):
        if launch.plan.name == "restart_kernel" and next(merges) == 1:
            raise RuntimeError("no launch")
        run(launch)

    monkeypatch.setattr(Launch, "run", fail)
    with pytest.raises(RuntimeError, match="no launch"):
        merge_and_reinit_(layers, False, KNOWN_GPUS["RTX 3090"])
    assert not torch.equal(layers[0].weight, before[0].weight)
    for layer, want in zip(layers, before, strict=True):
        assert (function(layer) - function(want)).abs().max() < 1e-7


def test_streaming_that_breaks_off_changes_no_layers_function(one_stream, monkeypatch):
    """Some rows are merged by then; a second call restarts them all the same."""
    layers = make_layers(STREAMED, torch.bfloat16, None, "low")
    before = [copy(layer) for layer in layers]
    uploads, upload = itertools.count(), kernels.upload

    def break_off(launches, space):
        if next(uploads) == 6:
            raise RuntimeError("no more memory")
        upload(launches, space)

    monkeypatch.setattr(kernels, "upload", break_off)
    with pytest.raises(RuntimeError, match="no more memory"):
        merge_and_reinit_(layers, False, KNOWN_GPUS["RTX 3090"])
    assert any(not torch.equal(layer.weight, want.weight) for layer, want in zip(layers, before, strict=True))
    for layer, want in zip(layers, before, strict=True):
        assert torch.equal(layer.A, want.A)
        assert (function(layer) - function(want)).abs().max() < 1e-7
    merge_and_reinit_(layers, False, KNOWN_GPUS["RTX 3090"])
    check_against_the_reference(layers, before)


def function(layer):
    """The matrix that a layer multiplies by."""
    update = layer.scale.double() * (layer.B.double() @ layer.A.double())
    return reference.join(layer.weight, layer.low).double() + update


def check_against_the_reference(layers, before):
    for layer, want in zip(layers, before, strict=True):
        exact = function(want)
        assert (reference.join(layer.weight, layer.low) - exact).abs().max() < 1e-7
        assert torch.equal(layer.A, reference.new_A(*layer.A.shape, torch.tensor(layer.seed)).to(layer.A.dtype))
        assert not layer.B.any()
