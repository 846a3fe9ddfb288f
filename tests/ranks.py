"""Two ranks, which are processes of their own that talk by gloo."""

import traceback

import torch
import torch.distributed as dist
from torch import multiprocessing as mp

RANKS = 2


def _serve(rank, address, how, argument, results):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    try:
        results.put((rank, how(rank, argument), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    results.join()
    dist.destroy_process_group()


def on_all_ranks(how, argument, folder):
    """What how(rank, argument) gives on each rank, which start with one seed. Raises the first error of any."""
    folder.mkdir(exist_ok=True)
    context = mp.get_context("spawn")
    results = context.JoinableQueue()
    address = f"file://{folder}/rendezvous"
    processes = [
        context.Process(target=_serve, args=(rank, address, how, argument, results), daemon=True)
        for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    found = {}
    for _ in processes:
        rank, found[rank], error = results.get(timeout=120)
        if error is not None:
            raise RuntimeError(f"on rank {rank}: {error}")
    for _ in processes:
        results.task_done()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    return found
