"""ReLoRA's reset of an optimizer's moments, for the parameters that restart and for no other.

The rule: a parameter's state can be reset where zeros in all its moments, and its counts as they begin, are the state
of a new optimizer. What keeps anything else of a parameter is refused, since zeros would mean something else there.
"""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

from .. import checks
from .shards import local

MODES = ("magnitude", "random", "zero")
# Sums over gradients, entry by entry, that begin at zero. Of those that a state has, the first says what is kept.
MOMENTS = (
    "exp_avg", "momentum_buffer", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "acc_delta",
)  # fmt: skip
COUNTS = {"step": 0, "mu_product": 1}  # and what they begin at
# Torch's own that keep more than this, or other things. Others are known by their states, from their first step on.
REFUSED = (optim.Adafactor, optim.Adagrad, optim.ASGD, optim.LBFGS, optim.Rprop)


@torch.no_grad()
def optimizer_reset(
    optimizer: Optimizer,
    parameters: Iterable[Tensor],
    mode: str = "magnitude",
    ratio: float = 0.99,
    reset_step: bool = True,
    generator: torch.Generator | int | None = None,
) -> dict[str, float]:
    """Zeros a share `ratio` of the moments of `parameters`; the share that was zeroed, by moment.

    * mode "magnitude" keeps the entries with the largest |exp_avg| (or of another first moment), "random" some of them,
      drawn from `generator` (on the moments' device, or a seed for any); "zero" keeps none, whatever the ratio. What is
      kept is counted, n - round(ratio n) of n entries, so that equal entries can neither empty a tensor nor fill it.
      All moments of a parameter keep the same entries: one that lost its second moment alone would move by hundreds
      of times its learning rate.
    * reset_step sets Adam's step to zero, so that its bias correction knows how young the moments are, and NAdam's
      mu_product with it. Without it, as published, the first updates after a reset are several times the learning rate:
      right where that climbs again meanwhile, and the better choice there (docs/reproduction.md).

    In place: tensors keep their memory, which CUDA graphs and fused optimizers hold on to. Every other state keeps its
    bits. A parameter that has no state has nothing to reset: before its first step, or by SGD without momentum. Sharded
    states are reset shard by shard.

    For torch's Adam, AdamW, NAdam, RAdam, Adamax, SGD, RMSprop, Adadelta and Muon, in all their forms, and any
    optimizer that keeps the same, such as Lion with its exp_avg. Not for others: Adafactor keeps sums over rows and
    columns, Adagrad's sum is one that should never shrink, those of 8 bits keep codes.
    Raises ValueError or TypeError before anything is changed: an unknown mode, a ratio outside [0, 1], a parameter that
    the optimizer does not hold, a state that cannot be reset.
    ReLoRA: Lialin et al. 2023, arXiv:2307.05695.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    checks.check_probability("ratio", ratio)
    generators = {}
    zeroed, total = Counter(), Counter()
    for state in states_of(optimizer, parameters):
        moments = {name: local(state[name]) for name in MOMENTS if state.get(name) is not None}
        keep = None
        for name, moment in moments.items():
            if keep is None:
                keep = _kept(moment, mode, ratio, _on(moment.device, generator, generators))
            moment.masked_fill_(~keep, 0)
            zeroed[name] += keep.numel() - int(keep.sum())
            total[name] += keep.numel()
        if reset_step:
            _begin_counting(state)
    return {name: zeroed[name] / max(total[name], 1) for name in total}


def check_kind(optimizer: Optimizer) -> None:
    """Raises ValueError for an optimizer that is known to have states which cannot be reset, before it has any."""
    inner = getattr(optimizer, "optimizer", optimizer)  # wrappers, such as Accelerate's
    if isinstance(inner, REFUSED):
        raise ValueError(_refusal(inner, "keeps other things"))


def states_of(optimizer: Optimizer, parameters: Iterable[Tensor]) -> list[dict]:
    """The states that a reset would change, each once, all of them checked."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    states = {}
    for i, parameter in enumerate(parameters):
        if id(parameter) not in held:
            raise ValueError(f"parameters[{i}], of shape {tuple(parameter.shape)}, is not held by the optimizer")
        state = optimizer.state.get(parameter) or {}
        for name, value in state.items():
            if not (name in COUNTS or value is None or _is_moment(name, value, parameter)):
                raise ValueError(_refusal(optimizer, f"keeps {name} ({type(value).__name__})"))
        if state:
            states[id(parameter)] = state
    return list(states.values())


def _is_moment(name: str, value, parameter: Tensor) -> bool:
    """Plain numbers, one for each entry: subclasses of Tensor keep codes."""
    if name not in MOMENTS or type(local(value)) is not Tensor:
        return False
    return value.is_floating_point() and value.shape == parameter.shape


def _refusal(optimizer: Optimizer, why: str) -> str:
    optimizer = getattr(optimizer, "optimizer", optimizer)  # what Accelerate has wrapped
    return (
        f"optimizer must be one that restarts can reset, with nothing but {', '.join((*MOMENTS, *COUNTS))} of a "
        f"parameter: {type(optimizer).__name__} {why}"
    )


def _begin_counting(state: dict) -> None:
    for name, value in COUNTS.items():
        if name in state:
            state[name] = state[name].fill_(value) if isinstance(state[name], Tensor) else value


def _on(device: torch.device, generator: torch.Generator | int | None, made: dict) -> torch.Generator | None:
    """The generator, or the one of a device that begins at a seed."""
    if not isinstance(generator, int):
        return generator
    if device not in made:
        made[device] = torch.Generator(device).manual_seed(generator)
    return made[device]


def _kept(moment: Tensor, mode: str, ratio: float, generator: torch.Generator | None) -> Tensor:
    count = 0 if mode == "zero" else moment.numel() - round(ratio * moment.numel())
    keep = torch.zeros(moment.numel(), dtype=torch.bool, device=moment.device)
    if mode == "random":
        scores = torch.rand(moment.numel(), generator=generator, device=moment.device)
    else:
        scores = moment.abs().flatten().float()
    keep[scores.topk(count).indices] = True
    return keep.view(moment.shape)
