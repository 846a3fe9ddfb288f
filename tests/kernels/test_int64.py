"""Offsets beyond 2^31 elements: a view of widely spaced rows over memory that is reserved but hardly touched."""

import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import INTERPRETING

ROWS, SPACING = 300, 2**23  # the last row starts at element 2.5e9

PROGRAM = f"""
import numpy as np, torch
from tests.accuracy import assert_accurate
from tests.kernels.problem import DEVICE, RESULTS, Problem, gpus

def spaced(matrix):
    if DEVICE == "cuda":
        buffer = torch.empty({ROWS} * {SPACING}, dtype=matrix.dtype, device=DEVICE)
    else:  # np.empty commits nothing until it is touched
        buffer = torch.from_numpy(np.empty({ROWS} * {SPACING}, dtype=np.float16))
    view = buffer.as_strided(matrix.shape, ({SPACING}, 1))
    view.copy_(matrix)
    return view

for argument, shape in (("x", ({ROWS}, 16, 24, 8)), ("dy", ({ROWS}, 24, 16, 8)), ("weight", (16, 16, {ROWS}, 8))):
    problem = Problem.random(*shape, torch.float16)
    exact, unfused = problem.exact(), problem.torch()
    setattr(problem, argument, spaced(getattr(problem, argument)))
    for path, gpu in gpus().items():
        got = problem.kernels(gpu)
        for name in RESULTS:
            assert_accurate(f"{{name}}, {{argument}} spaced, {{path}}", got[name], exact[name], unfused[name])
    setattr(problem, argument, None)
print("right")
"""


@pytest.mark.interpreter
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 12 * 2**30, reason="needs 12 GiB of device memory"
)
def test_rows_beyond_two_billion_elements():
    """In a process of its own: an int32 offset would end it."""
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if INTERPRETING else {})
    program = "from tests.kernels.interpreter_bf16 import repair_bf16\n" if INTERPRETING else ""
    done = subprocess.run(
        [sys.executable, "-c", program + PROGRAM], capture_output=True, text=True, env=environment, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "right" in done.stdout
