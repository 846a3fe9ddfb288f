"""Which tests run where: CPU, CUDA, or Triton's interpreter (a process of its own, TRITON_INTERPRET=1)."""

import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config):
    # Small matmuls wait for threads longer than they compute, the more so beside other workers; and so they do in the
    # processes that tests start: two ranks of a tiny model on two busy cores take 180 s or 40.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if INTERPRETING:
        from tests.kernels.interpreter_bf16 import repair_bf16

        repair_bf16()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        runs_kernels = item.get_closest_marker("interpreter")
        if runs_kernels and not (INTERPRETING or torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 or a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def card(monkeypatch, tmp_path):
    """Pretends that there is a GPU of a capability: see cards.py."""
    from tests.cards import pretended

    with pretended(monkeypatch, tmp_path / "cache") as pretend:
        yield pretend


@pytest.fixture
def on_hopper():
    """For tests of csrc's kernels, which run nowhere else."""
    from fused_lora import backends

    obstacle = backends._cuda_obstacle(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)
    if obstacle is not None:
        pytest.skip(obstacle)
