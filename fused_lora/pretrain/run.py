"""A run from its first step, or its last checkpoint, to its end."""

import math
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import checks
from . import checkpoint
from .data import Data
from .logs import Logs
from .plot import plot
from .trainer import Trainer

CHECKPOINTS, BEGIN, CURVES, TOKENIZER = "checkpoints", "begin", "curves.png", "tokenizer.json"


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


class StoppedError(RuntimeError):
    """By a signal; there is a checkpoint of the last step."""


@dataclass(frozen=True)
class Intervals:
    """In steps; the last step is of each."""

    log: int
    evaluate: int
    save: int

    def __post_init__(self):
        for name in ("log", "evaluate", "save"):
            checks.check_count(f"{name}_every", getattr(self, name), least=1)


def run(trainer: Trainer, data: Data, output: Path, intervals: Intervals, resume: bool) -> float:
    """Trains to the end; the held-out perplexity there.

    In `output`: checkpoints/ with the newest two, begin/ with the one at the end of the warm start (what came after is
    measured from it), train.csv, held_out.csv, tensorboard/, curves.png and tokenizer.json.
    Raises ValueError for a folder with a run in it, unless it is to be resumed, and for a text whose held-out part is
    shorter than a window; DivergedError for a loss of NaN; StoppedError after SIGINT and SIGTERM.
    """
    options, preset = trainer.options, trainer.options.preset
    if data.held_out.windows(preset.seq_len) == 0:
        raise ValueError(f"the held-out part has {len(data.held_out)} tokens, too few for seq_len={preset.seq_len}")
    saved = checkpoint.checkpoints(output / CHECKPOINTS)
    if saved and not resume:
        raise ValueError(f"{output} holds a run already ({saved[-1].name}): --resume it, or choose another --output")
    if saved:
        trainer.load(saved[-1])
    elif trainer.ranks.first:
        shutil.rmtree(output / BEGIN, ignore_errors=True)  # of a run that left nothing else
    if trainer.ranks.first:
        output.mkdir(parents=True, exist_ok=True)
        data.tokenizer.save(str(output / TOKENIZER))
    total = preset.total_steps
    begin = preset.warm_start_steps if preset.warm_start_steps < total else 0
    if trainer.steps == begin:
        trainer.save(output / BEGIN)
    title = f"{options.method}, seed {options.seed}"
    with _signals() as received, Logs(output, trainer.steps, total, title, trainer.ranks.first) as logs:
        meter = _Meter(trainer)
        while trainer.steps < total:
            meter.add(trainer.step())
            step = trainer.steps
            tokens, last = step * options.tokens_per_step, step == total
            if last or step % intervals.log == 0:
                logs.train(step, tokens, *meter.read(), trainer.learning_rate, trainer.restarts)
            if last or received or step % intervals.save == 0:
                meter.check()
                trainer.save(output / CHECKPOINTS)
                meter.skip()
            if received:
                raise StoppedError(f"stopped at step {step}, which is saved: --resume goes on from there")
            if step == begin:
                trainer.save(output / BEGIN)
                meter.skip()
            if last or step % intervals.evaluate == 0:
                loss = trainer.held_out_loss(data.held_out)
                if math.isnan(loss):
                    raise DivergedError(f"the held-out loss is {loss} at step {step}")
                logs.held_out(step, tokens, loss)
                meter.skip()
    if trainer.ranks.first:
        plot({output.name: output}, output / CURVES)
    return logs.perplexity


@contextmanager
def _signals() -> Iterator[list[int]]:
    """What has been received of SIGINT and SIGTERM inside, so that a step is finished before the run stops."""
    received: list[int] = []

    def note(number: int, _) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Meter:
    """Mean loss and tokens a second since it was last read. Reading waits for the GPU, adding does not."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.losses, self.seconds, self.since = trainer, [], 0.0, time.perf_counter()

    def add(self, loss: Tensor) -> None:
        self.losses.append(loss)

    def skip(self) -> None:
        """What was done since the last step is none of its time."""
        self.since = time.perf_counter()

    def check(self) -> float:
        """The mean loss over steps and ranks; DivergedError if it is not a number. Also takes the time."""
        if not self.losses:
            return 0.0
        ranks = self.trainer.ranks
        loss = ranks.total(torch.stack(self.losses).mean()).item() / ranks.world
        self.seconds += time.perf_counter() - self.since
        self.skip()
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at step {self.trainer.steps}")
        return loss

    def read(self) -> tuple[float, float]:
        loss, tokens = self.check(), len(self.losses) * self.trainer.options.tokens_per_step
        speed = tokens / self.seconds
        self.losses, self.seconds = [], 0.0
        return loss, speed
