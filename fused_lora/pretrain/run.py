"""A run from its first step, or its last checkpoint, to its end."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint
from .data import Data
from .logs import Logs
from .plot import plot
from .trainer import Trainer

CHECKPOINTS, BEGIN, CURVES = "checkpoints", "begin", "curves.png"


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class Intervals:
    """In steps; the last step is of each."""

    log: int = 10
    evaluate: int = 500
    save: int = 500


def run(trainer: Trainer, data: Data, output: Path, intervals: Intervals, resume: bool) -> float:
    """Trains to the end; the held-out perplexity there.

    In `output`: checkpoints/ with the newest two, begin/ with the one at the end of the warm start (what came after is
    measured from it), train.csv, held_out.csv, tensorboard/ and curves.png.
    Raises ValueError for a folder with a run in it, unless it is to be resumed; DivergedError for a loss of NaN.
    """
    options, preset = trainer.options, trainer.options.preset
    saved = checkpoint.checkpoints(output / CHECKPOINTS)
    if saved and not resume:
        raise ValueError(f"{output} holds a run already ({saved[-1].name}): resume it, or choose another folder")
    if saved:
        trainer.load(saved[-1])
    total, begin = preset.total_steps, preset.warm_start_steps
    if trainer.steps == begin:
        trainer.save(output / BEGIN)
    with Logs(output, trainer.steps, total, f"{options.method}, seed {options.seed}", trainer.ranks.first) as logs:
        meter = _Meter(trainer)
        while trainer.steps < total:
            meter.add(trainer.step())
            step = trainer.steps
            tokens, last = step * options.tokens_per_step, step == total
            if last or step % intervals.log == 0:
                logs.train(step, tokens, *meter.read(), trainer.learning_rate, trainer.restarts)
            if last or step % intervals.evaluate == 0:
                logs.held_out(step, tokens, trainer.held_out_loss(data.held_out))
            if last or step % intervals.save == 0:
                trainer.save(output / CHECKPOINTS)
            if step == begin:
                trainer.save(output / BEGIN)
    if trainer.ranks.first:
        plot({output.name: output}, output / CURVES)
    return logs.perplexity


class _Meter:
    """Mean loss and tokens a second since it was last read. Reading waits for the GPU, adding does not."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.losses, self.since = trainer, [], time.perf_counter()

    def add(self, loss: Tensor) -> None:
        if not self.losses:
            self.since = time.perf_counter()
        self.losses.append(loss)

    def read(self) -> tuple[float, float]:
        ranks, steps = self.trainer.ranks, len(self.losses)
        loss = ranks.total(torch.stack(self.losses).mean()).item() / ranks.world
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at step {self.trainer.steps}")
        self.losses = []
        return loss, steps * self.trainer.options.tokens_per_step / (time.perf_counter() - self.since)
