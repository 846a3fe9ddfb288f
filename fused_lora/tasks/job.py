"""Job: a task that runs, with its optimizer and what it has accumulated."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from .batches import Tokens, tokens_of
from .task import Task


class Step(NamedTuple):
    """What one step of a task's optimizer came to: the mean loss over its labelled tokens, in nats, and the gradient's
    norm before it was clipped. A skipped one, whose loss or gradient was no number or which had no tokens, changed
    nothing but the count of steps."""

    step: int  # the first is 1
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    skipped: bool


class Job:
    """The factors and AdamW's two moments of each are all its memory. Gradients are added up here and not in .grad, so
    that a pass can be taken back."""

    def __init__(self, task: Task, parameters: Sequence[nn.Parameter]):
        self.task, self.parameters = task, list(parameters)
        is_fused = self.parameters[0].is_cuda
        self.optimizer = torch.optim.AdamW(self.parameters, task.lr, weight_decay=task.weight_decay, fused=is_fused)
        self.steps = 0
        self._begin()

    def _begin(self) -> None:
        """A step."""
        self._passes, self._loss, self._is_spoilt = 0, 0.0, False
        self._grads: list[Tensor] | None = None
        self._sequences: list[Tokens] = []

    @property
    def is_done(self) -> bool:
        return self.steps >= self.task.steps

    @property
    def _tokens(self) -> int:
        """Labelled ones of the whole step, which its loss is the mean of: so all its sequences are read at once."""
        if not self._sequences:
            name, data = self.task.name, self.task.data
            numbers = self.task.numbers(self.steps)
            self._sequences = [tokens_of(data[number], f"{name}, sequence {number}") for number in numbers]
        return sum(each.labelled for each in self._sequences)

    def share(self) -> tuple[list[Tokens], float]:
        """Its sequences of the next pass, and by what their summed losses enter the step's."""
        weight = 1 / max(1, self._tokens)
        first = self._passes * self.task.batch_size
        return self._sequences[first : first + self.task.batch_size], weight

    def with_accumulated(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """A pass's gradients and those of the step's passes before it."""
        if self._grads is None:  # views of what a pass has of all tasks
            return [grad.clone() for grad in grads] if self.task.accumulate > 1 else list(grads)
        return [a + b for a, b in zip(self._grads, grads, strict=True)]

    def take(self, grads: list[Tensor], loss: float, norm: Tensor, norm_read: float) -> Step | None:
        """A pass: with_accumulated's gradients, their norm on the device and as it was read. With the last pass of a
        step the optimizer steps."""
        is_finite = math.isfinite(loss) and math.isfinite(norm_read)
        is_spoilt, passes, loss = self._is_spoilt or not is_finite, self._passes + 1, self._loss + loss
        if passes < self.task.accumulate:
            self._grads = grads if is_finite else None  # what is no number would spoil the passes that follow
            self._is_spoilt, self._passes, self._loss = is_spoilt, passes, loss
            return None
        lr, tokens = self.task.lr_after(self.steps), self._tokens
        skipped = is_spoilt or tokens == 0
        if not skipped:
            self._step(grads, norm, lr)  # where it fails, nothing of the pass is counted
        self.steps += 1
        done = Step(self.steps, loss, lr, norm_read, tokens, skipped)
        self._begin()
        return done

    def _step(self, grads: list[Tensor], norm: Tensor, lr: float) -> None:
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad
        if self.task.max_grad_norm is not None:
            clip_grads_with_norm_(self.parameters, self.task.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    # ---- checkpoints

    def state_dict(self) -> dict:
        """All but the factors. What data comes next follows from the counts."""
        return {
            "task": self.task.remembered(),
            "steps": self.steps,
            "passes": self._passes,
            "loss": self._loss,
            "is_spoilt": self._is_spoilt,
            "grads": self._grads,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Of the same task."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self._passes, self._loss = state["steps"], state["passes"], state["loss"]
        self._is_spoilt, self._grads = state["is_spoilt"], state["grads"]
