"""Two ranks whose torch generators differ: after every merge they hold the same factors and weights."""

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from fused_lora.relora import ReLoRA
from tests.relora.test_controller import Net

RANKS = 2


def train(rank, address, ddp, results):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    net = Net().bfloat16()
    torch.manual_seed(100 + rank)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    options = {
        "r": 3,
        "exclude_modules": ["head"],
        "reset_mode": "random",
        "reset_ratio": 0.5,
        "precision": "stochastic",
    }
    relora = ReLoRA(net, optimizer, reset_every=3, warm_start_steps=2, **options)
    states = []
    model = None
    for step in range(8):
        if model is None or step == 2:  # a reducer holds the parameters it was made with
            model = DistributedDataParallel(net) if ddp else net
        generator = torch.Generator().manual_seed(10 * step + rank)
        model(torch.randn(8, 12, generator=generator).bfloat16()).float().square().mean().backward()
        if not ddp:
            for parameter in net.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        relora.step()
        states.append({name: value.clone() for name, value in net.state_dict().items()})
    results.put((rank, states))
    results.join()
    dist.destroy_process_group()


@pytest.mark.parametrize("ddp", [True, False], ids=["ddp", "all_reduce"])
def test_ranks_stay_together(ddp, tmp_path):
    context = mp.get_context("spawn")
    results = context.JoinableQueue()
    address = f"file://{tmp_path}/rendezvous"
    processes = [context.Process(target=train, args=(rank, address, ddp, results)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    states = {}
    for _ in processes:
        rank, states[rank] = results.get(timeout=120)
    for _ in processes:
        results.task_done()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    for step, (first, second) in enumerate(zip(states[0], states[1], strict=True)):
        for name, value in first.items():
            assert torch.equal(value, second[name]), f"{name} after step {step}"
    for before, after in zip(states[0][4:7], states[0][5:8], strict=True):
        assert any(not torch.equal(before[name], after[name]) for name in after)
