"""How linears become LoRALinear in a model and in its optimizer and are linears again, and what has to hold before."""

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from .. import checks
from ..formats import Format, Stored, dequantise
from ..modules import ReplaceReport, replace_linear
from ..modules.protocol import LoRALayer, is_lora
from ..modules.selection import Selection
from ..modules.targets import find_linears
from ..modules.unload import linear_of, unloaded
from ..ops import Part
from .merging import tensors_of
from .schedule import jagged_cosines
from .shards import check_rows, is_sharded


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """By name."""
    return {name: module for name, module in model.named_modules() if is_lora(module)}


def parts_of(layers: dict[str, LoRALayer]) -> dict[str, Part]:
    return {name: layer.lora_part() for name, layer in layers.items()}


def forms_of(layers: dict[str, LoRALayer]) -> dict[str, Format]:
    """Of those whose weight is in one."""
    return {name: layer.base for name, layer in layers.items() if is_stored(layer.lora_part())}


def weights_to_train(model: nn.Module, lora: dict) -> dict[str, Tensor]:
    """The weights of the LoRA layers that a model has, or else would have after wrap(), by their names."""
    parts = parts_of(lora_layers(model))
    if parts:
        return {name: part.weight for name, part in parts.items()}
    report, linears = find_linears(model, Selection(lora["target_modules"], lora["exclude_modules"]))
    return {name: linear.weight for name, linear in zip(report.replaced, linears, strict=True)}


def parameters_to_train(model: nn.Module, lora: dict) -> dict[str, Tensor]:
    """Of the linears or of their factors, by name."""
    parts = parts_of(lora_layers(model))
    factors = {f"{name}.lora_{which}": getattr(part, which) for name, part in parts.items() for which in "AB"}
    return factors or {f"{name}.weight": weight for name, weight in weights_to_train(model, lora).items()}


def check_model(model: nn.Module, optimizer: Optimizer | None, lora: dict, warm_start_steps: int) -> None:
    """Raises ValueError or TypeError for what wrap() could not make sense of. The optimizer may be yet to be made."""
    checks.check_rank(lora["r"])
    checks.check_scale("lora_alpha", lora["lora_alpha"])
    checks.check_probability("lora_dropout", lora["lora_dropout"])
    if lora["lora_dtype"] is not None:
        checks.check_dtype("lora_dtype", lora["lora_dtype"])
    layers = lora_layers(model)
    if layers and warm_start_steps > 0:
        raise ValueError(f"warm_start_steps must be 0 for a model that has LoRA layers already ({next(iter(layers))})")
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} is merged: unmerge_() it first")
        reason = layer.why_not()
        if reason is not None:
            raise ValueError(f"{name} has no update that could be merged: {reason}")
        _check_codes(name, layer.lora_part())
        if layer.lora_part().gain is not None:
            raise ValueError(f"{name} is DoRA, whose gain a restart would leave behind: ReLoRA merges plain updates")
        for what, tensor in tensors_of(name, layer.lora_part()).items():
            checks.check_own(what, tensor)
            check_rows(what, tensor)
    if not layers and any(map(is_sharded, model.parameters())):
        raise ValueError("model is sharded already: call replace_linear before fully_shard")
    for name, parameter in parameters_to_train(model, lora).items():
        checks.check_own(name, parameter)
        if parameter.is_meta:
            raise ValueError(f"{name} is on meta, where nothing trains: bring back what is offloaded first")
        if not parameter.requires_grad:
            raise ValueError(
                f"{name} is frozen, and ReLoRA would train it: let it require gradients, or leave its layer out by "
                "exclude_modules"
            )
    if optimizer is None:
        return
    needed = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in needed.items() if id(parameter) not in held]
    if missing:
        raise ValueError(f"optimizer must hold every parameter that is trained, it lacks {', '.join(missing[:3])}")


def _check_codes(name: str, part: Part) -> None:
    """Shards of codes end within a block."""
    if is_stored(part) and any(map(is_sharded, (*part.weight.tensors, part.A, part.B))):
        raise NotImplementedError(f"{name}.weight is quantised and in shards: ReLoRA merges shards of matrices alone")


def check_scheduler(
    scheduler: LRScheduler | None, reset_every: int | None, warm_start_steps: int, lr_factor: float
) -> None:
    """Raises ValueError or TypeError for a scheduler that does not fit the restarts."""
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError("scheduler must step without a metric: step a ReduceLROnPlateau yourself")
    if lr_factor != 1 and scheduler is not None and not hasattr(scheduler, "base_lrs"):
        raise TypeError(f"lr_factor needs a scheduler with base_lrs, got {type(scheduler).__name__}")
    if lr_factor != 1 and (isinstance(scheduler, (CyclicLR, OneCycleLR)) or getattr(scheduler, "eta_min", 0) != 0):
        raise TypeError(
            f"lr_factor needs a scheduler whose rates are multiples of base_lrs, got {type(scheduler).__name__}"
        )
    for factor in jagged_cosines(scheduler):
        ours, theirs = (reset_every, warm_start_steps), (factor.reset_every, factor.warm_start_steps)
        if None in (reset_every, factor.reset_every):  # one of them has no restarts
            ours, theirs = ours[1:], theirs[1:]
        if ours != theirs:
            raise ValueError(
                "reset_every and warm_start_steps must be the scheduler's, or its jags come between the restarts: "
                f"got {ours} and {theirs}"
            )


def wrap(model: nn.Module, optimizer: Optimizer | None, lora: dict) -> ReplaceReport | None:
    """LoRALinear in the place of the model's linears, their factors in that of the weights in the optimizer's groups if
    there is one, and no states: those of a new optimizer. A model that has such layers stays as it is, and so does
    whatever its user froze."""
    if lora_layers(model):
        return None
    frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    report = replace_linear(model, **lora)
    layers = report.layers(model)
    for layer in layers:
        if id(layer.bias) in frozen:
            layer.bias.requires_grad_(False)  # which train_bias is not meant for
    if optimizer is None:
        return report
    successors = {id(layer.weight): {"lora_A": layer.lora_A, "lora_B": layer.lora_B} for layer in layers}
    stopped = [layer.bias for layer in layers if layer.bias is not None and not layer.bias.requires_grad]
    successors |= {id(bias): {} for bias in stopped if id(bias) not in frozen}
    _exchange(optimizer, successors)
    optimizer.state.clear()
    return report


def unwrap(model: nn.Module, optimizer: Optimizer, lows: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """The reverse, for layers whose update is merged: each an nn.Linear again, on its weight and bias, which train. A
    weight in a format is what its codes and its residual are together, rounded once to the layer's compute_dtype.

    The optimizer loses the factors and their states. Returns the model, or what takes its place if it is a layer, and
    the low halves that are still beside weights."""
    layers = lora_layers(model)
    parts = parts_of(layers)
    factors = [factor for part in parts.values() for factor in (part.A, part.B)]
    full = {name: _in_full(layers[name], lows.get(name)) for name, part in parts.items() if is_stored(part)}
    plain = unloaded(model, {layer: linear_of(layer, full.get(name)) for name, layer in layers.items()})
    _exchange(optimizer, {id(factor): {} for factor in factors})
    for factor in factors:
        optimizer.state.pop(factor, None)
    return plain, {name: low for name, low in lows.items() if name not in full}


def is_stored(part: Part) -> bool:
    return isinstance(part.weight, Stored)


def _in_full(layer: LoRALayer, low: Tensor | None) -> Tensor:
    weight = dequantise(layer.lora_part().weight)
    return (weight if low is None else weight + low.to(weight.device)).to(layer.compute_dtype)


def _exchange(optimizer: Optimizer, successors: dict[int, dict[str, Tensor]]) -> None:
    """Puts parameters in the place of others, which are given by their ids, in the optimizer's groups."""
    for group in optimizer.param_groups:
        names = group.get("param_names", [""] * len(group["params"]))
        exchanged = []
        for name, old in zip(names, group["params"], strict=True):
            if id(old) in successors:
                old.grad = None  # which nothing would clear any more
                layer = name.rpartition(".")[0]
                exchanged += [(f"{layer}.{part}".lstrip("."), new) for part, new in successors[id(old)].items()]
            else:
                exchanged.append((name, old))
        group["params"] = [parameter for _, parameter in exchanged]
        if "param_names" in group:
            group["param_names"] = [name for name, _ in exchanged]


def scale_learning_rates(optimizer: Optimizer, scheduler: LRScheduler | None, factor: float) -> None:
    """All of them, those that a scheduler starts from too."""
    if factor == 1:
        return
    scaled: set[int] = set()  # groups can share a tensor
    for group in optimizer.param_groups:
        for rate in {"lr", "initial_lr"} & group.keys():
            if not isinstance(group[rate], Tensor):
                group[rate] *= factor
            elif id(group[rate]) not in scaled:
                scaled.add(id(group[rate]))
                group[rate].mul_(factor)
    if scheduler is not None:
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
