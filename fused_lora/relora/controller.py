"""ReLoRA as training sees it: one object, stepped once after each optimizer step."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .. import checks, reference
from ..modules import LoRALinear, ReplaceReport
from ..modules.targets import listed
from ..ops import merge_and_reinit_
from .optimizer_reset import MODES, optimizer_reset, states_of
from .seeds import mix
from .shards import is_sharded, keep, local, reshard, whole
from .wrapping import check_model, check_scheduler, lora_layers, scale_learning_rates, weights_to_train, wrap

BASES = ("trained", "zero", "absent")
PRECISIONS = ("auto", "residual", "stochastic", "nearest")


class ReLoRA:
    """Trains a model's linears by low-rank updates that are merged and begun anew every `reset_every` steps.

        for batch in batches:
            loss(model(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
            relora.step()  # also steps the scheduler, so that its jags cannot drift from the restarts

    The first `warm_start_steps` train the model as it is. Then replace_linear puts LoRALinear in the place of its
    linears (r, lora_alpha, target_modules, exclude_modules, lora_dropout, lora_dtype as there), without changing the
    function, and the optimizer goes on with the factors in the place of the weights, its states empty as a new one's.
    Every reset_every steps after that merge_and_reinit_ merges the updates and begins the factors anew, and
    optimizer_reset (reset_mode, reset_ratio, reset_step) forgets their moments. The last step of a run whose length
    reset_every divides ends in a merge, so that the weights are all there is. reset_every=None never restarts: LoRA.

    A model that has LoRALinear layers already is trained with those, as they are, without a warm start: r, lora_alpha,
    target_modules and the like are then theirs. That is the way under FSDP2: replace_linear, fully_shard, the
    optimizer, ReLoRA. The controller's state is then this rank's, and stochastic rounding differs with their number.

    * lr_factor: the learning rates of all groups after the warm start, in units of those before.
    * precision: how 16-bit weights take an update, "residual" (exact; an int16 for each weight), "stochastic" or
      "nearest"; "auto" is residual for 16-bit weights, and wider ones need none.
    * residual_device: "weight" keeps those int16 beside the weights, "cpu" in the host's pinned memory, from which they
      are streamed at each restart.
    * base: "trained" keeps the weights. For the rows of the paper's first table, without a warm start: "zero" starts
      from weights of zero with both factors random, "absent" is that without restarts.
    * Every random number comes from (seed, cycle, layer), so that all ranks begin each cycle with the same factors.

    Raises ValueError or TypeError naming the argument, before anything is changed.
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
        lr_factor: float = 1.0,
        precision: str = "auto",
        residual_device: str = "weight",
        base: str = "trained",
        reset_mode: str = "magnitude",
        reset_ratio: float = 0.99,
        reset_step: bool = True,
        seed: int = 0,
    ):
        lora = {
            "r": r, "lora_alpha": lora_alpha, "target_modules": listed(target_modules),
            "exclude_modules": listed(exclude_modules), "lora_dropout": lora_dropout, "lora_dtype": lora_dtype,
        }  # fmt: skip
        _check(reset_every, warm_start_steps, precision, residual_device, base, reset_mode, reset_ratio, seed)
        checks.check_scale("lr_factor", lr_factor)
        check_scheduler(scheduler, reset_every, warm_start_steps, lr_factor)
        check_model(model, optimizer, lora, warm_start_steps)
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.reset_every, self.warm_start_steps, self.seed = reset_every, warm_start_steps, seed
        self.precision, self.residual_device, self.base, self.lr_factor = precision, residual_device, base, lr_factor
        self._lora = lora
        self._reset = {"mode": reset_mode, "ratio": reset_ratio, "reset_step": reset_step}
        self.steps = self.cycle = 0
        self.report: ReplaceReport | None = None
        self.layers: dict[str, LoRALinear] = {}
        self.lows: dict[str, Tensor] = {}
        if warm_start_steps == 0:
            self._wrap()

    @torch.no_grad()
    def step(self) -> dict[str, float] | None:
        """Counts an optimizer step, and restarts if one is due: then the shares of the moments that were zeroed."""
        self.steps += 1
        if self.scheduler is not None:
            self.scheduler.step()
        if not self.layers:
            if self.steps == self.warm_start_steps:
                self._wrap()
            return None
        since = self.steps - self.warm_start_steps
        return self.restart() if self.reset_every is not None and since % self.reset_every == 0 else None

    @torch.no_grad()
    def restart(self) -> dict[str, float]:
        """Merges every layer's update, begins its factors anew, and resets the optimizer's moments of them."""
        merged = [name for name, layer in self.layers.items() if layer.merged]
        if merged or not self.layers:
            raise RuntimeError(
                f"{merged[0]} is merged: unmerge_() it first" if merged else "the warm start is not over"
            )
        reshard(self.model)
        factors = [factor for layer in self.layers.values() for factor in (layer.lora_A, layer.lora_B)]
        states_of(self.optimizer, factors)  # which may not be an Adam's: raises before anything is merged
        cycle = self.cycle + 1
        rounding = "stochastic" if self.precision == "stochastic" else "nearest"
        for names in ([n for n in self.layers if n in self.lows], [n for n in self.layers if n not in self.lows]):
            layers = [self.layers[name] for name in names]
            As = [whole(layer.lora_A) for layer in layers]
            merge_and_reinit_(
                [local(layer.weight) for layer in layers],
                As,
                [local(layer.lora_B) for layer in layers],
                [layer.scale for layer in layers],
                [self._seed_of(name, cycle) for name in names],
                [self.lows[name] for name in names if name in self.lows] or None,
                rounding,
            )
            for layer, A in zip(layers, As, strict=True):
                if is_sharded(layer.lora_A):
                    keep(layer.lora_A, A)
        self.cycle = cycle
        return optimizer_reset(self.optimizer, factors, generator=mix(self.seed, cycle, -1), **self._reset)

    def state_dict(self) -> dict:
        """Counters, options and residuals. The model, the optimizer and the scheduler have state dicts of their own."""
        return {
            "steps": self.steps,
            "cycle": self.cycle,
            "options": self._options(),
            "shapes": {name: tuple(layer.weight.shape) for name, layer in self.layers.items()},
            "lows": dict(self.lows),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Before the model's, the optimizer's and the scheduler's: it wraps the model if the checkpoint was wrapped.

        Raises ValueError, before anything is changed, for a checkpoint of another model or of other options.
        """
        own = self._options()
        differing = [name for name in own if state["options"].get(name) != own[name]]
        if differing:
            name = differing[0]
            raise ValueError(f"the checkpoint has {name}={state['options'].get(name)!r}, this run {own[name]!r}")
        if self.layers and not state["shapes"]:
            raise ValueError("the checkpoint is of the warm start, which this run has behind it: make a new one")
        if state["shapes"]:
            self._check_shapes(state)
        if state["shapes"] and not self.layers:
            self._wrap()
        self.steps, self.cycle = state["steps"], state["cycle"]
        for name, low in self.lows.items():
            low.copy_(state["lows"][name])

    def _check_shapes(self, state: dict) -> None:
        weights = weights_to_train(self.model, self._lora)
        lows = {name: local(weight) for name, weight in weights.items() if self._needs_low(weight)}
        for what, theirs, ours in (("linear", state["shapes"], weights), ("residual", state["lows"], lows)):
            for name in {**theirs, **ours}:
                found, wanted = _shape(theirs.get(name)), _shape(ours.get(name))
                if found != wanted:
                    raise ValueError(f"the checkpoint's {what} at {name} is {found}, this run's is {wanted}")

    def _options(self) -> dict:
        names = ("reset_every", "warm_start_steps", "seed", "precision", "base", "lr_factor")
        return {name: getattr(self, name) for name in names} | {
            "r": self._lora["r"],
            "lora_alpha": self._lora["lora_alpha"],
        }

    def _seed_of(self, name: str, cycle: int) -> int:
        return mix(self.seed, cycle, list(self.layers).index(name))

    def _needs_low(self, weight: Tensor) -> bool:
        return self.precision in ("auto", "residual") and weight.dtype.itemsize == 2

    @torch.no_grad()
    def _wrap(self) -> None:
        self.report = wrap(self.model, self.optimizer, self._lora)
        self.layers = lora_layers(self.model)
        scale_learning_rates(self.optimizer, self.scheduler, self.lr_factor)
        for name, layer in self.layers.items():
            self._begin(name, layer)

    def _begin(self, name: str, layer: LoRALinear) -> None:
        """The first cycle's factors, by the counter too: torch's own generator differs between ranks."""
        weight = local(layer.weight)
        seed = torch.tensor(self._seed_of(name, 0), device=weight.device)
        if not whole(layer.lora_B).any():  # else the layer has begun already
            keep(layer.lora_A, reference.new_A(layer.r, layer.in_features, seed))
        if self.base != "trained":
            weight.zero_()
            keep(layer.lora_B, reference.uniform(layer.out_features, layer.r, layer.r**-0.5, seed + 1))
        if self._needs_low(weight):
            place = {"device": weight.device}
            if self.residual_device == "cpu":
                place = {"device": "cpu", "pin_memory": weight.is_cuda}
            self.lows[name] = torch.zeros(weight.shape, dtype=torch.int16, **place)


def _shape(found: Tensor | tuple | None) -> tuple | str:
    """Of a tensor; a shape itself."""
    return "missing" if found is None else tuple(getattr(found, "shape", found))


def _check(reset_every, warm_start_steps, precision, residual_device, base, reset_mode, reset_ratio, seed) -> None:
    if reset_every is not None:
        checks.check_count("reset_every", reset_every, least=1)
    checks.check_count("warm_start_steps", warm_start_steps)
    checks.check_count("seed", seed)
    checks.check_probability("reset_ratio", reset_ratio)
    for name, value, known in (
        ("precision", precision, PRECISIONS),
        ("residual_device", residual_device, ("weight", "cpu")),
        ("base", base, BASES),
        ("reset_mode", reset_mode, MODES),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if base != "trained" and warm_start_steps > 0:
        raise ValueError(f"base={base!r} forgets the weights: a warm start would be for nothing")
    if base == "absent" and reset_every is not None:
        raise ValueError("base='absent' has no weights to merge into: reset_every must be None")
