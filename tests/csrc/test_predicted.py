"""What fused_lora.predict says of csrc's lists of work and of their bytes, beside the lists themselves."""

import pytest

from bench.shapes import GPU_SHAPES
from fused_lora.cards import CARDS
from fused_lora.predict import predict
from fused_lora.predict.csrc import work_of
from fused_lora.predict.rates import HOPPER
from fused_lora.predict.work import makespan
from tests.csrc.items import SHRINK, TILE
from tests.csrc.passes import PAIR_ROWS, Part, Pass
from tests.csrc.test_traffic import SHAPES
from tests.csrc.traffic import CARDS as PLAYED
from tests.csrc.traffic import memory_bytes

CARD = CARDS["H200"]


def planned(shape, backward, work):
    """The pass of csrc's planner."""
    cols, depth = (shape.K, shape.N) if backward else (shape.N, shape.K)
    block_n = 256 if work.cols == -(-cols // 256) else 128
    part = Part(cols, depth, shape.r, backward, backward)
    return Pass(shape.M, backward, False, True, False, block_n, CARD.sm_count // 2, (part,), 1)


def time_of(item, work):
    if item.work == TILE:
        return work.riding if item.rides else work.tile
    return len(item.shrunk_rows) * work.shrink if item.work == SHRINK else item.rows / PAIR_ROWS * work.gradient


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_the_list_takes_as_long_as_the_planners(list_work, shape, backward):
    M, N, depth = (shape.M, shape.K, shape.N) if backward else (shape.M, shape.N, shape.K)
    work = work_of(M, N, depth, shape.r, CARD, HOPPER, backward)
    ((_, items),) = list_work([planned(shape, backward, work)])
    times = [time_of(item, work) for item in items]
    assert sum(times) == pytest.approx(sum(work.times()), rel=0.02)
    assert makespan(times, work.workers) == pytest.approx(makespan(work.times(), work.workers), rel=0.03)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("name", PLAYED)
def test_bytes_are_near_those_of_a_cache(list_sm80, name, sizes, backward):
    card = PLAYED[name]
    played = memory_bytes(sizes, list_sm80(sizes, backward, card), backward, card)
    found = predict(*sizes, card)
    (launch,) = found.backward if backward else found.forward
    assert 0.6 < launch.bytes / played < 1.1
