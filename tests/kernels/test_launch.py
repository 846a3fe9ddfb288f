"""Plans are made once per layout: what a compiled kernel depends on must be in their keys."""

import pytest
import torch

from fused_lora.kernels import launch
from fused_lora.kernels.launch import Layout, record_launches
from fused_lora.kernels.tiles import KNOWN_GPUS
from tests.accuracy import assert_accurate
from tests.kernels.problem import DEVICE, RESULTS, Problem, gpus, randn

PATHS = [pytest.param(gpu, id=name) for name, gpu in gpus().items()]


@pytest.mark.interpreter
@pytest.mark.parametrize("gpu", PATHS)
def test_a_second_call_makes_no_plan(gpu):
    problem = Problem.random(96, 64, 72, 8, torch.float16)
    problem.kernels(gpu)
    made = len(launch._plans)
    problem.kernels(gpu)
    assert len(launch._plans) == made


@pytest.mark.interpreter
@pytest.mark.parametrize("gpu", PATHS)
def test_alignment_strides_and_dtypes_change_under_a_plan(gpu):
    """The same shapes, one after the other, each behind another pointer, stride or dtype."""
    shape = (96, 64, 72, 8)
    for change in (None, "x offset", "bias offset", "bias dtype", "weight stride", "lora dtype", None):
        problem = Problem.random(*shape, torch.float16, lora_dtype=torch.float32 if change == "lora dtype" else None)
        if change == "x offset":
            problem.x = torch.cat([problem.x.flatten()[:1], problem.x.flatten()])[1:].view(problem.x.shape)
        elif change == "bias offset":
            problem.bias = torch.cat([problem.bias[:1], problem.bias])[1:]
        elif change == "bias dtype":
            problem.bias = problem.bias.float()
        elif change == "weight stride":
            problem.weight = randn(72, 80, dtype=torch.float16, scale=0.125)[:, :64]
        got, exact = problem.kernels(gpu), problem.exact()
        if change == "bias dtype":
            problem.bias = problem.bias.half()
        unfused = problem.torch()
        for name in RESULTS:
            assert_accurate(f"{name} after {change}", got[name], exact[name], unfused[name])


def test_recorded_launches_do_not_run():
    with record_launches() as records:
        Problem.random(64, 64, 64, 8, torch.float16).kernels(KNOWN_GPUS["H100"])
    assert [plan.name for plan, _ in records][:2] == ["shrink_kernel", "expand_kernel"]


def test_overlapping_rows_are_not_for_the_copy_engine():
    rows = torch.zeros(64, dtype=torch.float16, device=DEVICE).expand(8, 64)
    assert not Layout.of(rows).tma_ready(KNOWN_GPUS["H100"])
