"""Ranks and their micro-batches."""

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fused_lora.pretrain.ranks import accumulating


@pytest.fixture
def replica(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield DistributedDataParallel(nn.Linear(3, 2))
    distributed.destroy_process_group()


def test_gradients_travel_with_the_last_micro_batch_only(replica):
    travelled = []

    def note(_, bucket):
        travelled.append(bucket.index())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    replica.register_comm_hook(None, note)
    for i in range(3):
        with accumulating(replica, last=i == 2):
            replica(torch.ones(1, 3)).sum().backward()
        assert bool(travelled) == (i == 2)


def test_one_process_has_nothing_to_wait_for():
    model = nn.Linear(3, 2)
    with accumulating(model, last=False):
        model(torch.ones(1, 3)).sum().backward()
    assert model.weight.grad is not None
