"""The LoRALinear layers of a model, by the names that they have in the model before anything was wrapped around it."""

from torch import Tensor, nn

from ..modules import LoRALinear

# What torch.compile and checkpointing put into names of modules.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


def bare(model: nn.Module) -> nn.Module:
    """The model inside torch.compile and data parallelism."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return model


def bare_name(name: str) -> str:
    """Without what wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """By bare name, under which a wrapper is what it is wrapped around."""
    return {bare_name(name): module for name, module in model.named_modules()}


def layers_of(model: nn.Module) -> dict[str, LoRALinear]:
    """By name. Raises ValueError for layers that are PEFT's or the model itself, TypeError for those in shards."""
    layers = {name: module for name, module in modules_of(model).items() if isinstance(module, LoRALinear)}
    if "" in layers:
        raise ValueError("model is a LoRALinear itself, which has no name in a file: put it into a module")
    for name, layer in layers.items():
        for which, tensor in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            _check_at_hand(f"{name}.{which}", tensor)
    return layers


def _check_at_hand(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(f"{name} is on meta: bring back what is offloaded first")
    if type(tensor) not in (Tensor, nn.Parameter):
        raise TypeError(f"{name} must be a plain tensor, got {type(tensor).__name__}: gather what is sharded first")
