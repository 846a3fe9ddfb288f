"""How linears become LoRALinear in a model and in its optimizer, and what has to hold before."""

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from .. import checks
from ..modules import LoRALinear, ReplaceReport, replace_linear
from ..modules.targets import find_linears
from .schedule import JaggedCosine
from .shards import check_rows, is_sharded


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """By name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def weights_to_train(model: nn.Module, lora: dict) -> dict[str, Tensor]:
    """The weights of the LoRALinear layers that a model has, or else would have after wrap(), by their names."""
    layers = lora_layers(model)
    if layers:
        return {name: layer.weight for name, layer in layers.items()}
    report, linears = find_linears(model, lora["target_modules"], lora["exclude_modules"])
    return {name: linear.weight for name, linear in zip(report.replaced, linears, strict=True)}


def check_model(model: nn.Module, optimizer: Optimizer, lora: dict, warm_start_steps: int) -> None:
    """Raises ValueError or TypeError for what wrap() could not make sense of."""
    checks.check_rank(lora["r"])
    checks.check_scale("lora_alpha", lora["lora_alpha"])
    checks.check_probability("lora_dropout", lora["lora_dropout"])
    if lora["lora_dtype"] is not None:
        checks.check_dtype("lora_dtype", lora["lora_dtype"])
    layers = lora_layers(model)
    if layers and warm_start_steps > 0:
        raise ValueError(f"the model has LoRALinear layers already ({next(iter(layers))}): warm_start_steps must be 0")
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} is merged: unmerge_() it first")
        for part in ("weight", "lora_A", "lora_B"):
            check_rows(f"{name}.{part}", getattr(layer, part))
    if not layers and any(map(is_sharded, model.parameters())):
        raise ValueError("model is sharded already: call replace_linear before fully_shard")
    needed = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not layers:  # factors take their weights' places in the optimizer's groups
        needed |= {f"{name}.weight": weight for name, weight in weights_to_train(model, lora).items()}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in needed.items() if id(parameter) not in held]
    if missing:
        raise ValueError(f"optimizer must hold every parameter that is trained, it lacks {', '.join(missing[:3])}")


def check_scheduler(
    scheduler: LRScheduler | None, reset_every: int | None, warm_start_steps: int, lr_factor: float
) -> None:
    """Raises ValueError or TypeError for a scheduler that does not fit the restarts."""
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError("scheduler must step without a metric: step a ReduceLROnPlateau yourself")
    if lr_factor != 1 and scheduler is not None and not hasattr(scheduler, "base_lrs"):
        raise TypeError(f"lr_factor needs a scheduler with base_lrs, got {type(scheduler).__name__}")
    for factor in getattr(scheduler, "lr_lambdas", ()):
        if not isinstance(factor, JaggedCosine):
            continue
        ours, theirs = (reset_every, warm_start_steps), (factor.reset_every, factor.warm_start_steps)
        if None in (reset_every, factor.reset_every):  # one of them has no restarts
            ours, theirs = ours[1:], theirs[1:]
        if ours != theirs:
            raise ValueError(
                "reset_every and warm_start_steps must be the scheduler's, or its jags come between the restarts: "
                f"got {ours} and {theirs}"
            )


def wrap(model: nn.Module, optimizer: Optimizer, lora: dict) -> ReplaceReport | None:
    """LoRALinear in the place of the model's linears, their factors in that of the weights in the optimizer's groups,
    and no states: those of a new optimizer. A model that has such layers stays as it is."""
    if lora_layers(model):
        return None
    report = replace_linear(model, **lora)
    factors_of = {id(layer.weight): [layer.lora_A, layer.lora_B] for layer in report.layers(model)}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not parameter.requires_grad:
                parameter.grad = None  # which nothing would clear any more
        params = [new for old in group["params"] for new in factors_of.get(id(old), [old])]
        group["params"] = [parameter for parameter in params if parameter.requires_grad]
    optimizer.state.clear()
    return report


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
