"""ReLoRA's learning rate: a cosine whose every restart climbs back to it in a few steps."""

import math
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, LRScheduler

from .. import checks


@dataclass(frozen=True)
class JaggedCosine:
    """The factor of the learning rate at a step t, counted from 0; N = total_steps, w = warmup_steps, m = min_ratio:

        cosine(t) = m + (1 - m) / 2 (1 + cos(pi (t - w) / (N - w))),   m from N on

    and before it a linear climb: over the first w steps to 1, and over the restart_warmup_steps after each restart to
    the cosine's value at their end. Restarts come every reset_every steps, counted from the end of the warm start,
    which is one itself (a new optimizer begins there). Without a warm start the first is at reset_every. With
    reset_every=None there are none but the end of the warm start.

    A climb of n steps goes through 1 / (n + 1), ..., n / (n + 1), so that no step has a rate of zero. With
    published=True it goes through 0, ..., (n - 1) / n, as in the paper's code, and wastes the step at 0.

    Raises ValueError or TypeError naming the argument; reset_every has to divide the steps after the warm start.
    ReLoRA: Lialin et al. 2023, arXiv:2307.05695.
    """

    total_steps: int
    warmup_steps: int
    restart_warmup_steps: int
    reset_every: int | None
    min_ratio: float = 0.1
    warm_start_steps: int = 0
    published: bool = False

    def __post_init__(self) -> None:
        for name in ("total_steps", "warmup_steps", "restart_warmup_steps", "warm_start_steps"):
            checks.check_count(name, getattr(self, name), least=1 if name == "total_steps" else 0)
        checks.check_probability("min_ratio", self.min_ratio)
        if self.warm_start_steps >= self.total_steps:
            raise ValueError(
                f"warm_start_steps must be below total_steps={self.total_steps}, got {self.warm_start_steps}"
            )
        steps = self.total_steps - self.warm_start_steps
        if self.reset_every is not None:
            checks.check_count("reset_every", self.reset_every, least=1)
            if steps % self.reset_every:
                raise ValueError(
                    f"reset_every must divide the {steps} steps after the warm start, or the last cycle is cut short; "
                    f"got {self.reset_every}"
                )
        if self.restart_warmup_steps >= self.cycle_steps:
            name = "reset_every" if self.reset_every else "the steps after the warm start"
            raise ValueError(
                f"restart_warmup_steps must be below {name}={self.cycle_steps}, got {self.restart_warmup_steps}"
            )
        if self.warmup_steps > self.first_restart:
            end = "the first restart" if self.first_restart < self.total_steps else "the last step"
            raise ValueError(f"warmup_steps must end by {end}, step {self.first_restart}, got {self.warmup_steps}")

    @property
    def cycle_steps(self) -> int:
        return self.reset_every or self.total_steps - self.warm_start_steps

    @property
    def first_restart(self) -> int:
        return self.warm_start_steps or self.cycle_steps

    def restarts(self) -> range:
        """The steps at which a climb begins; the end of the run is none."""
        return range(self.first_restart, self.total_steps, self.cycle_steps)

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self._climb(step, self.warmup_steps)
        since = (step - self.warm_start_steps) % self.cycle_steps
        if self.first_restart <= step < self.total_steps and since < self.restart_warmup_steps:
            reached = self._cosine(step - since + self.restart_warmup_steps)
            return self._climb(since, self.restart_warmup_steps) * reached
        return self._cosine(step)

    def _climb(self, step: int, steps: int) -> float:
        return step / steps if self.published else (step + 1) / (steps + 1)

    def _cosine(self, step: int) -> float:
        if step >= self.total_steps:
            return self.min_ratio
        share = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.min_ratio + (1 - self.min_ratio) / 2 * (1 + math.cos(math.pi * share))


def climbs(scheduler: LRScheduler | None) -> bool:
    """Whether its rates are known to climb again after each restart."""
    return any(factor.reset_every and factor.restart_warmup_steps for factor in jagged_cosines(scheduler))


def jagged_cosines(scheduler: LRScheduler | None) -> list[JaggedCosine]:
    """Those of a scheduler, of one that Accelerate wraps, and of those that torch's ChainedScheduler steps together."""
    if isinstance(scheduler, ChainedScheduler):
        return [factor for each in scheduler._schedulers for factor in jagged_cosines(each)]
    inner = getattr(scheduler, "scheduler", scheduler)
    return [factor for factor in getattr(inner, "lr_lambdas", ()) if isinstance(factor, JaggedCosine)]


def make_jagged(scheduler: LRScheduler, factor: JaggedCosine) -> None:
    """Lets a LambdaLR go by another factor from the step on at which it is; TypeError for any other scheduler."""
    if not isinstance(scheduler, LambdaLR):
        raise TypeError(f"scheduler must be a LambdaLR to become a jagged one, got {type(scheduler).__name__}")
    scheduler.lr_lambdas = [factor for _ in scheduler.lr_lambdas]
    if scheduler.last_epoch > 0:
        return  # the rates of the next step are those that were loaded
    scheduler._last_lr = [rate * factor(0) for rate in scheduler.base_lrs]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


def jagged_cosine_schedule(
    optimizer: Optimizer,
    total_steps: int,
    warmup_steps: int,
    restart_warmup_steps: int,
    reset_every: int | None,
    min_ratio: float = 0.1,
    warm_start_steps: int = 0,
    published: bool = False,
    last_epoch: int = -1,
) -> LambdaLR:
    """A scheduler that multiplies every group's rate by JaggedCosine; .step() once after each optimizer step."""
    factor = JaggedCosine(
        total_steps, warmup_steps, restart_warmup_steps, reset_every, min_ratio, warm_start_steps, published
    )
    return LambdaLR(optimizer, factor, last_epoch)
