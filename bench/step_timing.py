"""Time and memory of training steps, arms in turn."""

import time

import torch

from .step_arms import Arm
from .timing import interleave, no_garbage_collection, seconds_of


def time_steps(arms: dict[str, Arm], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds, the arms' steps in turn."""
    if device.type != "cuda":

        def time_once(arm):
            start = time.perf_counter()
            arm.step()
            return time.perf_counter() - start

        return interleave(arms, rounds, time_once)

    def time_once(arm):
        torch.cuda.synchronize()
        return seconds_of(arm.step)

    return interleave(arms, rounds, time_once)


def peak_bytes(arm: Arm) -> int:
    """What the arm holds, and what a step takes beside it: as if it were alone."""
    with no_garbage_collection():  # what other arms' steps left in cycles would be freed during this one
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        arm.step()
        torch.cuda.synchronize()
        return arm.bytes_held() + torch.cuda.max_memory_allocated() - before
