"""ReLoRA as training sees it: one object, stepped once after each optimizer step."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..formats import Arrived
from ..modules import ReplaceReport
from ..modules.protocol import LoRALayer
from ..modules.selection import listed
from .beginning import begin, check_forgets
from .loading import check_shapes, refuse_other_phases
from .merging import merge_parts, warn_of_losses
from .optimizer_reset import check_kind, optimizer_reset, states_of
from .options import check_options
from .residuals import lows_beside, new_lows
from .schedule import climbs
from .seeds import mix
from .shards import is_sharded, local, reshard
from .uninterrupted import uninterrupted
from .wrapping import (
    check_model,
    check_scheduler,
    forms_of,
    lora_layers,
    parameters_to_train,
    parts_of,
    scale_learning_rates,
    unwrap,
    weights_to_train,
    wrap,
)


class ReLoRA:
    """Trains a model's linears by low-rank updates that are merged and begun anew every `reset_every` steps.

        for batch in batches:
            loss(model(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
            relora.step()  # also steps the scheduler, so that its jags cannot drift from the restarts

    The first `warm_start_steps` train the model as it is. Then replace_linear puts LoRALinear in the place of its
    linears (r, lora_alpha, target_modules, exclude_modules, lora_dropout, lora_dtype, train_bias as there), without
    changing the function, and the optimizer goes on with the factors in the place of the weights, its states empty as a
    new one's. Every reset_every steps after that merge_and_reinit_ merges the updates and begins the factors anew, and
    optimizer_reset (reset_mode, reset_ratio, reset_step) forgets their moments. The last step of a run whose length
    reset_every divides ends in a merge, so that the weights are all there is. reset_every=None never restarts: LoRA.
    finish() ends a run anywhere, and gives a plain model back.

    A model that has LoRALinear layers already is trained with those, as they are, without a warm start: r, lora_alpha,
    target_modules and the like are then theirs. That is the way under FSDP2: replace_linear, fully_shard, the
    optimizer, ReLoRA. The controller's state is then this rank's, and stochastic rounding differs with their number.

    * reset_step: whether a restart sets Adam's step back too. By default it is kept, as in the paper, where the
      scheduler is a jagged_cosine_schedule whose rates climb again after it, and set back otherwise: without a climb, a
      kept step makes the first updates several times the learning rate (docs/reproduction.md).
    * lr_factor: the learning rates of all groups after the warm start, in units of those before.
    * precision: how weights of 16 bits and fewer take an update, "residual" (the default, by "auto": an int16 beside
      each of 16 bits, exact; a bf16 beside each in a format, nearly so), "stochastic" or "nearest". What arrived in
      those in a format at the last merge is in `arrived`, by layer.
    * steps_scheduler: False where another steps the scheduler after each optimizer step, as Trainer does.
    * state: what state_dict() gave for a model, optimizer and scheduler that are as they were then, the model's layers
      included. The run goes on from there. load_state_dict is for those that are still new.
    * residual_device: "weight" keeps those int16 beside the weights, "cpu" in the host's pinned memory, from which they
      are streamed at each restart.
    * base: "trained" keeps the weights. For the rows of the paper's first table, without a warm start: "zero" starts
      from weights of zero with both factors random, "absent" is that without restarts.
    * step(), restart() and finish() are done or not begun: Ctrl-C waits for their end.
    * Every random number comes from (seed, cycle, layer), so that all ranks begin each cycle with the same factors.

    Raises ValueError or TypeError naming the argument, before anything is changed. An optimizer that is not torch's own
    is known by its states: step() raises after its first if they cannot be reset.
    ReLoRA: Lialin et al. 2023, arXiv:2307.05695.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | None = None,
        *,
        reset_every: int | None,
        warm_start_steps: int = 0,
        r: int = 128,
        lora_alpha: float = 32.0,
        target_modules: str | Iterable[str] | None = None,
        exclude_modules: str | Iterable[str] | None = None,
        lora_dropout: float = 0.0,
        lora_dtype: torch.dtype | None = None,
        train_bias: bool = False,
        lr_factor: float = 1.0,
        precision: str = "auto",
        residual_device: str = "weight",
        base: str = "trained",
        reset_mode: str = "magnitude",
        reset_ratio: float = 0.99,
        reset_step: bool | None = None,
        seed: int = 0,
        steps_scheduler: bool = True,
        state: dict | None = None,
    ):
        lora = {
            "r": r, "lora_alpha": lora_alpha, "target_modules": listed(target_modules),
            "exclude_modules": listed(exclude_modules), "lora_dropout": lora_dropout, "lora_dtype": lora_dtype,
            "train_bias": train_bias,
        }  # fmt: skip
        check_options(
            reset_every, warm_start_steps, lr_factor, precision, residual_device, base, reset_mode, reset_ratio, seed
        )
        check_scheduler(scheduler, reset_every, warm_start_steps, lr_factor)
        check_model(model, optimizer, lora, warm_start_steps if state is None else 0)
        check_forgets(lora_layers(model), base)
        if reset_every is not None:
            check_kind(optimizer)
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.reset_every, self.warm_start_steps, self.seed = reset_every, warm_start_steps, seed
        self.precision, self.residual_device, self.base, self.lr_factor = precision, residual_device, base, lr_factor
        self._lora, self.steps_scheduler = lora, steps_scheduler
        reset_step = not climbs(scheduler) if reset_step is None else reset_step
        self._reset = {"mode": reset_mode, "ratio": reset_ratio, "reset_step": reset_step}
        self.steps = self.cycle = 0
        self.finished = False
        self.report: ReplaceReport | None = None
        self.layers: dict[str, LoRALayer] = {}
        self.lows: dict[str, Tensor] = {}
        self.arrived: dict[str, Arrived] = {}
        self._knows_states = self._check_states()
        if state is not None:
            self._know_layers()
            self.load_state_dict(state)
        elif warm_start_steps == 0:
            self._check_new()
            self._wrap()
        refuse_other_phases(optimizer)

    @torch.no_grad()
    @uninterrupted()
    def step(self) -> dict[str, float] | None:
        """Counts an optimizer step, and restarts if one is due: then the shares of the moments that were zeroed."""
        self._check_running()
        self._knows_states = self._knows_states or self._check_states()
        if not self.layers and self.steps + 1 == self.warm_start_steps:
            # What has been done to the model since it was looked at.
            check_model(self.model, self.optimizer, self._lora, self.warm_start_steps)
            self._wrap()
        since = self.steps + 1 - self.warm_start_steps
        restarts = self.reset_every and since > 0 and since % self.reset_every == 0
        shares = self._restart() if restarts else None  # what is refused was not counted, and is tried again
        self.steps += 1
        if self.scheduler is not None and self.steps_scheduler:
            self.scheduler.step()
        warn_of_losses(self.arrived if restarts else {})
        return shares

    @torch.no_grad()
    @uninterrupted()
    def restart(self) -> dict[str, float]:
        """Merges every layer's update, begins its factors anew, and resets the optimizer's moments of them."""
        shares = self._restart()
        warn_of_losses(self.arrived)
        return shares

    def _restart(self) -> dict[str, float]:
        self._check_running()
        if not self.layers:
            raise RuntimeError("the warm start is not over")
        reshard(self.model)
        states_of(self.optimizer, self._factors())  # raises before anything is merged
        self._merge()
        seed = mix(self.seed, self.cycle, -1)
        return optimizer_reset(self.optimizer, self._factors(), generator=seed, **self._reset)

    @torch.no_grad()
    @uninterrupted()
    def finish(self) -> nn.Module:
        """Ends the run, at its last step or anywhere: the model without a trace of ReLoRA, which it also returns.

        Updates are merged as at a restart. Each LoRALinear becomes an nn.Linear on the same weight and bias, trainable
        as in a new one; hooks of the layers are gone with them. What 16 bits do not hold of a weight stays in `lows`:
        reference.join(weight, low) is its float32. A weight in a format is dequantised, and has its residual in it. The
        optimizer loses the factors, and has nothing in their place: to go on training, make a new one. A second call
        only returns the model; step, restart and state_dict then raise RuntimeError.

        Raises RuntimeError, with nothing changed, for layers that are merged by hand, and for a model that FSDP2
        shards, whose layers cannot be exchanged: there restart() merges, and the weights alone are the model.
        """
        if self.finished:
            return self.model
        if any(map(is_sharded, self.model.parameters())):
            raise RuntimeError("model is sharded, and its layers cannot be exchanged: restart() merges their updates")
        if self.layers:
            self._merge()
            self.model, self.lows = unwrap(self.model, self.optimizer, self.lows)
            self.layers = {}
        self.finished = True
        warn_of_losses(self.arrived)
        return self.model

    def _merge(self) -> None:
        """Every layer's update into its weight, and the next cycle's factors in the place of these."""
        merged = [name for name, layer in self.layers.items() if layer.merged]
        if merged:
            raise RuntimeError(f"{merged[0]} is merged: unmerge_() it first")
        cycle = self.cycle + 1
        rounding = "stochastic" if self.precision == "stochastic" else "nearest"
        seeds = {name: self._seed_of(name, cycle) for name in self.layers}
        self.arrived = merge_parts(parts_of(self.layers), forms_of(self.layers), seeds, self.lows, rounding)
        self.cycle = cycle

    def state_dict(self) -> dict:
        """Counters, options and residuals. The model, the optimizer and the scheduler have state dicts of their own."""
        self._check_running()
        return {
            "steps": self.steps,
            "cycle": self.cycle,
            "options": self._options(),
            "shapes": {name: tuple(part.weight.shape) for name, part in parts_of(self.layers).items()},
            "lows": dict(self.lows),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Before the model's, the optimizer's and the scheduler's: it wraps the model if the checkpoint was wrapped.

        Raises ValueError, before anything is changed, for a checkpoint of another model or of other options, and for
        an optimizer that has states already, which the wrap would forget.
        """
        self._check_running()
        own, theirs = self._options(), {"train_bias": False} | state["options"]  # older ones had not the choice
        differing = [name for name in own if theirs.get(name) != own[name]]
        if differing:
            name = differing[0]
            raise ValueError(f"the checkpoint has {name}={theirs.get(name)!r}, this run {own[name]!r}")
        if self.layers and not state["shapes"]:
            raise ValueError("the checkpoint is of the warm start, which this run has behind it: make a new one")
        if state["shapes"]:
            weights = weights_to_train(self.model, self._lora)
            own = {name: local(weight) for name, weight in weights.items()}
            check_shapes(state, weights, lows_beside(own, self.precision))
        steps, cycle = state["steps"], state["cycle"]
        if state["shapes"] and not self.layers:
            self._check_new()
            self._wrap()
        self.steps, self.cycle = steps, cycle
        for name, low in self.lows.items():
            low.copy_(state["lows"][name])

    def _options(self) -> dict:
        names = ("reset_every", "warm_start_steps", "seed", "precision", "base", "lr_factor")
        lora = ("r", "lora_alpha", "train_bias")
        return {name: getattr(self, name) for name in names} | {name: self._lora[name] for name in lora}

    def _check_running(self) -> None:
        if self.finished:
            raise RuntimeError("the run is finished: its model is a plain one")

    def _check_new(self) -> None:
        """A wrap makes the optimizer a new one. Whatever it knows at another time than the warm start's end was loaded
        too early, or is somebody's who does not expect that."""
        if self.lr_factor != 1 and getattr(self.scheduler, "last_epoch", 0) > self.steps:
            raise ValueError("scheduler was loaded before ReLoRA, whose lr_factor would scale it twice: load it after")
        states = [state for state in self.optimizer.state.values() if state]
        if not lora_layers(self.model) and any(state.get("step", 1) != 0 for state in states):
            raise ValueError(
                "optimizer has states already, which it would lose when the linears become LoRALinear: give a new one, "
                "and load its state after ReLoRA's"
            )

    def _check_states(self) -> bool:
        """Whether the optimizer's states are known, or need not be; ValueError if a restart could not reset them."""
        if self.reset_every is None or not self.optimizer.state:
            return self.reset_every is None
        reshard(self.model)
        return bool(states_of(self.optimizer, parameters_to_train(self.model, self._lora).values()))

    def _factors(self) -> list[Tensor]:
        return [factor for part in parts_of(self.layers).values() for factor in (part.A, part.B)]

    def _seed_of(self, name: str, cycle: int) -> int:
        return mix(self.seed, cycle, list(self.layers).index(name))

    @torch.no_grad()
    def _wrap(self) -> None:
        self.report = wrap(self.model, self.optimizer, self._lora)
        self._know_layers()
        scale_learning_rates(self.optimizer, self.scheduler, self.lr_factor)
        for name, part in parts_of(self.layers).items():
            begin(part, self._seed_of(name, 0), self.base)

    def _know_layers(self) -> None:
        """Those that the model has, with residuals of zero."""
        self.layers = lora_layers(self.model)
        weights = {name: local(part.weight) for name, part in parts_of(self.layers).items()}
        self.lows = new_lows(weights, self.precision, self.residual_device)
