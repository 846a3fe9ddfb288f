"""What is drawn by torch's generators, and leaves no trace there."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The generators of the host and of a device begin at a seed, and are as they were afterwards. No other device's
    is touched."""
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if on_cuda else [], device_type=device.type):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield
