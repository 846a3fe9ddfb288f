"""ReLoRA as training sees it: one object, stepped once after each optimizer step."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .. import checks, reference
from ..modules import LoRALinear, ReplaceReport, replace_linear
from ..ops import merge_and_reinit_
from .optimizer_reset import MODES, optimizer_reset, states_of
from .schedule import JaggedCosine
from .seeds import mix
from .shards import check_rows, is_sharded, keep, local, whole

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

    A model that has LoRALinear layers already is trained as it is, without a warm start. That is the way under FSDP2:
    replace_linear, fully_shard, the optimizer, ReLoRA. Its state is then this rank's.

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
        _check(reset_every, warm_start_steps, precision, residual_device, base, reset_mode, reset_ratio, seed)
        checks.check_scale("lr_factor", lr_factor)
        _check_schedule(scheduler, reset_every, warm_start_steps)
        _check_held(model, optimizer)
        _check_layers(model, warm_start_steps)
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.reset_every, self.warm_start_steps, self.seed = reset_every, warm_start_steps, seed
        self.precision, self.residual_device, self.base, self.lr_factor = precision, residual_device, base, lr_factor
        self._lora = {
            "r": r, "lora_alpha": lora_alpha, "target_modules": target_modules, "exclude_modules": exclude_modules,
            "lora_dropout": lora_dropout, "lora_dtype": lora_dtype,
        }  # fmt: skip
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
        factors = [factor for layer in self.layers.values() for factor in (layer.lora_A, layer.lora_B)]
        states_of(self.optimizer, factors)  # which may not be an Adam's: raises before anything is merged
        self.cycle += 1
        rounding = "stochastic" if self.precision == "stochastic" else "nearest"
        for names in ([n for n in self.layers if n in self.lows], [n for n in self.layers if n not in self.lows]):
            layers = [self.layers[name] for name in names]
            As = [whole(layer.lora_A) for layer in layers]
            merge_and_reinit_(
                [local(layer.weight) for layer in layers],
                As,
                [local(layer.lora_B) for layer in layers],
                [layer.scale for layer in layers],
                [self._seed_of(name) for name in names],
                [self.lows[name] for name in names if name in self.lows] or None,
                rounding,
            )
            for layer, A in zip(layers, As, strict=True):
                if is_sharded(layer.lora_A):
                    keep(layer.lora_A, A)
        generator = torch.Generator(factors[0].device).manual_seed(mix(self.seed, self.cycle, -1))
        return optimizer_reset(self.optimizer, factors, generator=generator, **self._reset)

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
        modules = dict(self.model.named_modules())
        for name, shape in state["shapes"].items():
            weight = getattr(modules.get(name), "weight", None)
            if weight is None or tuple(weight.shape) != tuple(shape):
                found = "nothing" if weight is None else f"one of {tuple(weight.shape)}"
                raise ValueError(f"the checkpoint has a linear of {tuple(shape)} at {name}, this model {found}")
        if state["shapes"] and not self.layers:
            self._wrap()
        self.steps, self.cycle = state["steps"], state["cycle"]
        for name, low in self.lows.items():
            low.copy_(state["lows"][name])

    def _options(self) -> dict:
        names = ("reset_every", "warm_start_steps", "seed", "precision", "base", "lr_factor")
        return {name: getattr(self, name) for name in names} | {
            "r": self._lora["r"],
            "lora_alpha": self._lora["lora_alpha"],
        }

    def _seed_of(self, name: str) -> int:
        return mix(self.seed, self.cycle, list(self.layers).index(name))

    @torch.no_grad()
    def _wrap(self) -> None:
        if not _lora_layers(self.model):
            self.report = replace_linear(self.model, **self._lora)
        self.layers = _lora_layers(self.model)
        factors_of = {id(layer.weight): [layer.lora_A, layer.lora_B] for layer in self.layers.values()}
        frozen = {id(p) for p in self.model.parameters() if not p.requires_grad}
        for group in self.optimizer.param_groups:
            params = [new for old in group["params"] for new in factors_of.get(id(old), [old])]
            group["params"] = [p for p in params if id(p) not in frozen]
            for rate in {"lr", "initial_lr"} & group.keys():
                group[rate] *= self.lr_factor
        if self.scheduler is not None:
            self.scheduler.base_lrs = [rate * self.lr_factor for rate in self.scheduler.base_lrs]
        self.optimizer.state.clear()
        for name, layer in self.layers.items():
            self._begin(name, layer)

    def _begin(self, name: str, layer: LoRALinear) -> None:
        """The first cycle's factors, by the counter too: torch's own generator differs between ranks."""
        weight = local(layer.weight)
        seed = torch.tensor(self._seed_of(name), device=weight.device)
        keep(layer.lora_A, reference.uniform(layer.r, layer.in_features, layer.in_features**-0.5, seed))
        if self.base != "trained":
            weight.zero_()
            keep(layer.lora_B, reference.uniform(layer.out_features, layer.r, layer.r**-0.5, seed + 1))
        if self.precision in ("auto", "residual") and weight.dtype.itemsize == 2:
            place = {"device": weight.device}
            if self.residual_device == "cpu":
                place = {"device": "cpu", "pin_memory": weight.is_cuda}
            self.lows[name] = torch.zeros(weight.shape, dtype=torch.int16, **place)


def _lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


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


def _check_schedule(scheduler, reset_every, warm_start_steps) -> None:
    for factor in getattr(scheduler, "lr_lambdas", ()):
        if isinstance(factor, JaggedCosine) and None not in (reset_every, factor.reset_every):
            ours, theirs = (reset_every, warm_start_steps), (factor.reset_every, factor.warm_start_steps)
            if ours != theirs:
                raise ValueError(
                    "reset_every and warm_start_steps must be the scheduler's, or its jags come between the restarts: "
                    f"got {ours} and {theirs}"
                )


def _check_held(model: nn.Module, optimizer: Optimizer) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise ValueError(f"optimizer must hold every parameter that is trained, it lacks {', '.join(missing[:3])}")


def _check_layers(model: nn.Module, warm_start_steps: int) -> None:
    layers = _lora_layers(model)
    if layers and warm_start_steps > 0:
        raise ValueError(f"the model has LoRALinear layers already ({next(iter(layers))}): warm_start_steps must be 0")
    for name, layer in layers.items():
        for part in ("weight", "lora_A", "lora_B"):
            check_rows(f"{name}.{part}", getattr(layer, part))
    if not layers and any(map(is_sharded, model.parameters())):
        raise ValueError("model is sharded already: call replace_linear before fully_shard")
