"""Two processes by DDP: the same weights on both, resumed too; and a warm start is refused."""

import os
import socket

import pytest
import torch
import transformers
from torch import multiprocessing as mp

from fused_lora.integrations.transformers import ReLoRACallback

from .runs import OPTIONS, model_of, trainer_of

RANKS = 2


def run(folder, resume=None, **options):
    callback = ReLoRACallback(**OPTIONS | {"warm_start_steps": 0} | options)
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "ddp_backend": "gloo", "data_seed": 0}
    model = model_of(torch.bfloat16)
    torch.manual_seed(int(os.environ["RANK"]))
    trainer = trainer_of(folder, callback, model, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model.state_dict()


def work(rank, port, folder):
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    whole = run(folder)
    # Version 4 asks torch for the device cpu:0 here, which torch does not load to.
    again = whole if transformers.__version__.startswith("4.") else run(folder, f"{folder}/checkpoint-3")
    try:
        run(folder, warm_start_steps=2)
        error = ""
    except ValueError as refused:
        error = str(refused)
    torch.save((whole, again, error), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(folder)), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def test_the_ranks_agree_and_resume(results):
    (first, again, _), (second, again_second, _) = results
    for other in (again, second, again_second):
        assert first.keys() == other.keys()
        assert [name for name in first if not torch.equal(first[name], other[name])] == []


def test_a_warm_start_is_refused(results):
    assert all(error.startswith("warm_start_steps must be 0 under DDP") for *_, error in results)
