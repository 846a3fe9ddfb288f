"""A run, a step at a time: the model, its optimizer, schedule and restarts, whole or resumed."""

from pathlib import Path

import torch
from torch import Tensor, nn

from .. import checks
from ..relora.seeds import mix
from . import checkpoint
from .data import Data, Tokens
from .llama import Llama, next_token_loss
from .options import Options
from .ranks import Ranks, accumulating

CLIP = 1.0


class Trainer:
    """One rank's share of a run."""

    def __init__(
        self, options: Options, data: Data, ranks: Ranks, micro_batch_size: int | None = None, compiled: bool = False
    ):
        self.options, self.data, self.ranks, self.compiled = options, data, ranks, compiled
        share = ranks.share(options.preset.batch_size)
        if micro_batch_size is not None:
            checks.check_count("micro_batch_size", micro_batch_size, least=1)
        self.micro_batch_size = min(micro_batch_size or share, share)
        torch.manual_seed(options.seed)
        with ranks.device:
            self.model = Llama(options.llama).to(options.dtype)
        fused = ranks.device.type == "cuda"
        self.optimizer = torch.optim.Adam(self.model.parameters(), options.preset.learning_rate, fused=fused)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, options.schedule())
        self.relora = options.relora(self.model, self.optimizer, self.scheduler)
        self.steps, self.learning_rate = 0, 0.0  # of the last step
        self._loss = torch.compile(next_token_loss) if compiled else next_token_loss
        self._attach()

    @property
    def wrapped(self) -> bool:
        """Whether the low-rank phase has begun."""
        return self.relora is not None and bool(self.relora.layers)

    @property
    def restarts(self) -> int:
        return self.relora.cycle if self.relora else 0

    def step(self) -> Tensor:
        """One optimizer step; the mean loss of this rank's part of the batch, on the device."""
        preset = self.options.preset
        torch.manual_seed(mix(self.options.seed, self.steps, self.ranks.rank))  # of dropout: nothing to resume
        batch = self.data.train.batch(self.steps, preset.batch_size, preset.seq_len, self.options.seed)
        loss = self._backward(self._on_device(self.ranks.part(batch)))
        nn.utils.clip_grad_norm_(self._trained(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.learning_rate, was_wrapped = self.scheduler.get_last_lr()[0], self.wrapped
        (self.relora or self.scheduler).step()
        if self.wrapped != was_wrapped:
            self._attach()
        self.steps += 1
        return loss

    @torch.no_grad()
    def held_out_loss(self, tokens: Tokens) -> float:
        """The mean over every whole window."""
        seq_len = self.options.preset.seq_len
        total = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        self.model.eval()
        mine = range(self.ranks.rank, tokens.windows(seq_len), self.ranks.world)
        for start in range(0, len(mine), self.micro_batch_size):
            windows = [tokens.window(i, seq_len) for i in mine[start : start + self.micro_batch_size]]
            batch = self._on_device(torch.stack(windows))
            logits = self.model.forward(batch[:, :-1])  # not the compiled one: of another mode, for a few calls
            total[0] += next_token_loss(logits, batch[:, 1:], "sum")
            total[1] += batch[:, 1:].numel()
        self.model.train()
        loss, count = self.ranks.total(total).tolist()
        return loss / count

    def save(self, folder: Path, keep: int = 2) -> None:
        """A checkpoint, by the rank that writes."""
        if not self.ranks.first:
            return
        state = {
            "options": self._remembered(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "relora": self.relora.state_dict() if self.relora else None,
        }
        checkpoint.save(folder, self.steps, self.model.state_dict(), state, keep)

    def load(self, place: Path) -> None:
        """Goes on from a checkpoint of the same options; ValueError, with nothing changed, for any other."""
        model, state = checkpoint.load(place, self.ranks.device)
        mine = self._remembered()
        for name, theirs in state["options"].items():
            if mine.get(name) != theirs:
                raise ValueError(f"{place} was made with {name}={theirs}, this run has {mine.get(name)}")
        if self.relora:
            self.relora.load_state_dict(state["relora"])
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.steps = self.scheduler.last_epoch
        self._attach()

    def _remembered(self) -> dict[str, str]:
        """All that the weights depend on."""
        return self.options.flat() | {"text": self.data.fingerprint, "ranks": str(self.ranks.world)}

    def _attach(self) -> None:
        """Compiles the model as it is now, and ties its gradients to the other ranks'."""
        if self.compiled:
            self.model.compile()
        self._replica = self.ranks.replica(self.model)

    def _backward(self, batch: Tensor) -> Tensor:
        """Accumulates the gradients of a batch's mean loss, which it returns."""
        micro_batches = batch.split(self.micro_batch_size)
        losses = []
        for i, micro in enumerate(micro_batches):
            with accumulating(self._replica, last=i == len(micro_batches) - 1):
                loss = self._loss(self._replica(micro[:, :-1]), micro[:, 1:]) * (len(micro) / len(batch))
                loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _on_device(self, batch: Tensor) -> Tensor:
        if self.ranks.device.type == "cuda":
            batch = batch.pin_memory()
        return batch.to(self.ranks.device, non_blocking=True)
