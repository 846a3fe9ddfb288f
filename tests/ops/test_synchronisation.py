"""No op waits for the GPU: torch sees its own waiting, and a stream that sleeps shows everybody's, csrc's too."""

import pytest
import torch

from fused_lora import lora_linear, merge_
from tests.ops import test_lora_group, test_lora_mlp
from tests.ops.problem import SCALE, make_dy, make_inputs, run

pytestmark = pytest.mark.gpu
SLEEP = 4_000_000_000  # cycles, two seconds or more; an op takes the host a millisecond
TRIALS = 3


def linear(dtype):
    inputs, scale = make_inputs(300, 264, 136, 16, "cuda", dtype), torch.tensor(SCALE, device="cuda")
    dy = make_dy(inputs)
    return lambda: run(lora_linear, inputs, dy, scale=scale, p=0.2)


def group(dtype):
    x, parts = test_lora_group.make_group(300, 264, [(392, 24), (136, 8), (40, 0)], "cuda", dtype)
    dys = [x.new_ones(300, len(part["weight"])) for part in parts]
    return lambda: test_lora_group.results(test_lora_group.grouped, x, parts, dys, p=0.2)


def mlp(dtype):
    x, parts = test_lora_mlp.make_mlp(300, 264, 391, 264, (16, 8, 5), "cuda", dtype)
    return lambda: test_lora_mlp.results(test_lora_mlp.fused, x, parts, torch.ones_like(x), "silu")


def merge(dtype):
    inputs, scale = make_inputs(1, 264, 136, 16, "cuda", dtype), torch.tensor(SCALE, device="cuda")
    return lambda: merge_(inputs["weight"], inputs["A"], inputs["B"], scale)


steps = pytest.mark.parametrize("make", [linear, group, mlp, merge])
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


def returns_while_the_stream_sleeps(step) -> bool:
    slept = torch.cuda.Event()
    torch.cuda._sleep(SLEEP)
    slept.record()
    step()
    returned = not slept.query()
    torch.cuda.synchronize()
    return returned


def waits(step) -> bool:
    """In each trial: a host that does other work may once be later than the stream."""
    step()  # compiles, and takes its memory
    torch.cuda.synchronize()
    return not any(returns_while_the_stream_sleeps(step) for _ in range(TRIALS))


@steps
@dtypes
def test_nobody_waits_for_a_stream_that_sleeps(make, dtype):
    assert not waits(make(dtype))


def test_who_waits_is_found():
    assert waits(lambda: torch.cuda.current_stream().synchronize())


@steps
@dtypes
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_torch_sees_no_synchronisation(make, dtype):
    step = make(dtype)
    step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
