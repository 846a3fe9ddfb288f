"""Task: what one training is to be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch

from .. import checks
from ..modules.config import fields_of
from ..modules.routing import check_name
from ..relora.seeds import mix

SCHEDULES = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 + 0.5 * math.cos(math.pi * done),
}


@dataclass(frozen=True, eq=False)
class Task:
    """One training: an adapter of its own, by AdamW, on data of its own.

        name        of the adapter, and of its files
        data        sequences by number (a list, a map-style torch Dataset): each of them 1-D token ids, or a dict with
                    input_ids and, where not every token is to be learned, labels, which are -100 at the others
        config      the adapter: PEFT's LoraConfig, a folder with one, or a dict of its fields (r, lora_alpha, ...)
        steps, lr   of the optimizer; lr rises over the first `warmup` steps and then follows `schedule` (constant,
                    linear, cosine), which the last two bring to 0 behind the last step
        batch_size  sequences a pass; a step has `accumulate` passes, and its loss is the mean over all their labelled
                    tokens
        seed        of the adapter's first values and of the order of its data: every sequence once an epoch

    weight_decay is AdamW's, and gradients of a norm above max_grad_norm (None: any) are scaled down to it.

    Raises ValueError or TypeError naming the argument.
    """

    name: str
    data: Sequence
    config: Any
    steps: int
    lr: float
    batch_size: int = 1
    seed: int = 0
    accumulate: int = 1
    max_grad_norm: float | None = 1.0
    weight_decay: float = 0.0
    warmup: int = 0
    schedule: str = "constant"

    def __post_init__(self):
        check_name("name", self.name)
        if "/" in self.name or "\\" in self.name:
            raise ValueError(f"name must have no slashes, since files have it too, got {self.name!r}")
        for name, least in (("steps", 1), ("batch_size", 1), ("seed", 0), ("accumulate", 1), ("warmup", 0)):
            checks.check_count(name, getattr(self, name), least)
        for name in ("lr", "weight_decay", *(() if self.max_grad_norm is None else ("max_grad_norm",))):
            checks.check_scale(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
            object.__setattr__(self, name, float(getattr(self, name)))  # numpy's too
        if self.max_grad_norm == 0:
            raise ValueError("max_grad_norm must be above 0, got 0.0: None is for gradients of any norm")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.warmup > self.steps:
            raise ValueError(f"warmup must be at most steps={self.steps}, got {self.warmup}")
        if len(self.data) == 0:
            raise ValueError("data must have at least one sequence")
        object.__setattr__(self, "config", fields_of(self.config))  # a folder may be gone when it is asked again

    def lr_after(self, steps: int) -> float:
        """The rate of the step that follows so many."""
        if steps < self.warmup:
            return self.lr * (steps + 1) / self.warmup
        return self.lr * SCHEDULES[self.schedule]((steps - self.warmup) / max(1, self.steps - self.warmup))

    def numbers(self, step: int) -> list[int]:
        """Which sequences step number `step`, the first is 0, learns from: they depend on it and the seed alone."""
        size, count = self.batch_size * self.accumulate, len(self.data)
        places = [divmod(step * size + i, count) for i in range(size)]
        orders = {epoch: _order(count, mix(self.seed, epoch)) for epoch, _ in places}
        return [orders[epoch][i] for epoch, i in places]

    def remembered(self) -> dict:
        """All that its results depend on, but for the sequences themselves: what a checkpoint keeps of it."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("data", "config")}
        return _plain(own | {"config": self.config, "sequences": len(self.data)})


@lru_cache(maxsize=64)  # a step asks for that of the last one
def _order(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def _plain(value):
    """numpy's numbers are Python's, and a checkpoint that is read without trust takes those alone."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    return float(value) if isinstance(value, float) else value
