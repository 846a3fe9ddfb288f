"""ReLoRA's reset of Adam's moments, for the parameters that restart and for no other."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import checks
from .shards import local

MODES = ("magnitude", "random", "zero")
MOMENTS = ("exp_avg", "exp_avg_sq")


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

    * mode "magnitude" keeps the entries with the largest |exp_avg|, "random" some of them, drawn from `generator` (on
      the moments' device, or a seed for any); "zero" keeps none, whatever the ratio. What is kept is counted,
      n - round(ratio n) of n entries, so that equal entries can neither empty a tensor nor fill it. Both moments, and
      amsgrad's maximum, keep the same entries: one that lost its second moment alone would move by hundreds of times
      its learning rate.
    * reset_step sets Adam's step to zero, so that its bias correction knows how young the moments are. Without it, as
      published, the first updates after a reset are several times the learning rate.

    In place: tensors keep their memory, which CUDA graphs and fused optimizers hold on to. Every other state keeps its
    bits. A parameter that has no state yet has nothing to reset. Sharded states are reset shard by shard.

    For torch's Adam and AdamW (fused, foreach, capturable, amsgrad) and any optimizer with exp_avg and exp_avg_sq.
    Raises ValueError or TypeError before anything is changed: an unknown mode, a ratio outside [0, 1], a parameter that
    the optimizer does not hold, a state without these moments.
    ReLoRA: Lialin et al. 2023, arXiv:2307.05695.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    checks.check_probability("ratio", ratio)
    states = states_of(optimizer, parameters)
    generators = {}
    zeroed, total = dict.fromkeys(MOMENTS, 0), 0
    for state in states:
        moments = {name: local(state[name]) for name in (*MOMENTS, "max_exp_avg_sq") if name in state}
        device = moments["exp_avg"].device
        if isinstance(generator, int) and device not in generators:
            generators[device] = torch.Generator(device).manual_seed(generator)
        keep = _kept(moments["exp_avg"], mode, ratio, generators.get(device, generator))
        for moment in moments.values():
            moment.masked_fill_(~keep, 0)
        for name in MOMENTS:
            zeroed[name] += keep.numel() - int(keep.sum())
        total += keep.numel()
        if reset_step and "step" in state:
            state["step"] = state["step"].zero_() if isinstance(state["step"], Tensor) else 0
    return {name: count / max(total, 1) for name, count in zeroed.items()}


def states_of(optimizer: Optimizer, parameters: Iterable[Tensor]) -> list[dict]:
    """The states that a reset would change, each once, all of them checked."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    states = {}
    for i, parameter in enumerate(parameters):
        if id(parameter) not in held:
            raise ValueError(f"parameters[{i}], of shape {tuple(parameter.shape)}, is not held by the optimizer")
        state = optimizer.state.get(parameter)
        if not state:
            continue
        missing = [name for name in MOMENTS if not isinstance(state.get(name), Tensor)]
        if missing:
            raise ValueError(f"the optimizer's state of parameters[{i}] has no {' and no '.join(missing)}: not an Adam")
        states[id(parameter)] = state
    return list(states.values())


def _kept(moment: Tensor, mode: str, ratio: float, generator: torch.Generator | None) -> Tensor:
    count = 0 if mode == "zero" else moment.numel() - round(ratio * moment.numel())
    keep = torch.zeros(moment.numel(), dtype=torch.bool, device=moment.device)
    if mode == "random":
        scores = torch.rand(moment.numel(), generator=generator, device=moment.device)
    else:
        scores = moment.abs().flatten().float()
    keep[scores.topk(count).indices] = True
    return keep.view(moment.shape)
