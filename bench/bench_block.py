"""`pytest bench --benchmark-only -k test_block`: groups, gated MLPs and layers of odd widths, by each way.

All ways of a block are measured together, interleaved; see blocks.py.
"""

import pytest
import torch

from . import timing
from .block_ways import CPU_BLOCKS, GPU_BLOCKS
from .blocks import measure
from .clock import CLOCK, remembered, show
from .shapes import PASSES
from .variants import FLOOR

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


@remembered
def results(block):
    """See blocks.measure."""
    return measure(block, timing.ROUNDS, DEVICE)


def cases():
    """(block, pass, way), a block's cases in a row."""
    for block in GPU_BLOCKS if ON_GPU else CPU_BLOCKS:
        for pass_name in PASSES:
            for way in block.ways():
                yield pytest.param(block, pass_name, way, id=f"{block}-{pass_name}-{way}")


# torch.compile warns of its own affairs; that is worth seeing and no reason to stop.
@pytest.mark.filterwarnings("default")
@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.parametrize(("block", "pass_name", "way"), list(cases()))
def test_block(benchmark, block, pass_name, way):
    found = results(block)
    if "reason" in found[way]:
        pytest.fail(f"{way}: {found[way]['reason']}")
    seconds = found[way]["seconds"][pass_name]
    benchmark.group = f"{block}, {pass_name}"
    if "seconds" in found[FLOOR]:
        floor = found[FLOOR]["seconds"][pass_name]["median"]
        benchmark.extra_info["over the frozen floor"] = seconds["median"] / floor
    if "kept_bytes" in found[way]:
        benchmark.extra_info["bytes that the forward pass keeps"] = found[way]["kept_bytes"]
    show(benchmark, seconds["samples"])
