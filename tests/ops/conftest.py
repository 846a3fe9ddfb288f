import pytest
import torch

from fused_lora import backends


@pytest.fixture
def on_hopper():
    """For tests of csrc's kernels, which run nowhere else."""
    obstacle = backends._cuda_obstacle(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)
    if obstacle is not None:
        pytest.skip(obstacle)
