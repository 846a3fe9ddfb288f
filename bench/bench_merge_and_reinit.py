"""`pytest bench --benchmark-only -k merge_and_reinit`: the restart of a whole model, beside its floors.

The 168 linears of the paper's 1.3B model on a GPU, those of a tiny one on a CPU. All variants are measured together,
interleaved; a GPU's times are the device's own: the host issues a restart while the GPU still waits.
"""

import functools
import statistics

import pytest
import torch

from . import timing
from .clock import CLOCK, show
from .restarts import COPY, TRANSFER, Model, variants

ON_GPU = torch.cuda.is_available()
PRESET = "1.3b" if ON_GPU else "tiny"
NAMES = [
    COPY, "the reference's loop", "addmm_", "nearest", "stochastic", "residual",
    *([TRANSFER, "residual in the host's memory"] if ON_GPU else []),
]  # fmt: skip
ROUNDS = 10


@functools.cache
def measured() -> dict[str, tuple[tuple[float, ...], int]]:
    """(samples in seconds, bytes moved) of each variant."""
    device = torch.device("cuda" if ON_GPU else "cpu")
    model = Model.make(PRESET, device, torch.bfloat16)
    found = variants(model)
    calls = {name: call for name, (call, _) in found.items()}
    if ON_GPU:
        samples = timing.time_device(calls, ROUNDS, model.train)
    else:
        samples = timing.time_eager(calls, ROUNDS, "cpu", model.train)
    return {name: (tuple(samples[name]), found[name][1]) for name in found}


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.parametrize("name", NAMES)
def test_merge_and_reinit(benchmark, name):
    samples, moved = measured()[name]
    floor = TRANSFER if "host" in name else COPY
    rate = moved / statistics.median(samples)
    floor_samples, floor_moved = measured()[floor]
    benchmark.group = f"restart of the {PRESET} model's linears"
    benchmark.extra_info.update({
        "GB/s": round(rate * 1e-9, 1),
        "time over the floor's for the same bytes": round(floor_moved / statistics.median(floor_samples) / rate, 3),
        "floor": floor,
    })  # fmt: skip
    show(benchmark, samples)
