"""`pytest bench --benchmark-only -k step`: whole training steps of the paper's models, by every way to train them.

All arms of a (model, mode) are measured together, their steps in turn; see steps.py.
"""

import pytest
import torch

from .clock import CLOCK, remembered, show
from .step_arms import ARMS
from .step_cases import CASES, CPU_CASES, FULL, flops
from .steps import COMPILED, EAGER, ROUNDS, available, measure

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


@remembered
def results(case, mode):
    return measure(case, mode, list(ARMS), ROUNDS, DEVICE)


def cases():
    """(case, mode, arm), a case's arms in a row."""
    for case in CASES if ON_GPU else CPU_CASES:
        for mode in (EAGER, COMPILED):
            for arm in ARMS:
                yield pytest.param(case, mode, arm, id=f"{case}-{mode}-{arm}")


# The libraries that are compared warn of their own affairs; that is worth seeing and no reason to stop.
@pytest.mark.filterwarnings("default")
@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.parametrize(("case", "mode", "arm"), list(cases()))
def test_step(benchmark, case, mode, arm):
    if arm not in available([arm]):
        pytest.skip("peft is not installed")
    found = results(case, mode)
    own = dict(found[arm])
    samples = own.pop("samples")
    own["over full-rank"] = own["tokens_per_second"] / found[FULL]["tokens_per_second"]
    own["ceiling over full-rank"] = flops(case, FULL) / flops(case, arm)
    benchmark.group = f"{case}, {mode}"
    benchmark.extra_info.update(own)
    show(benchmark, samples)
