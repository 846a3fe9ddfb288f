"""Attributes of modules, read where nn.Module keeps them: its own way to one takes the host as long as four of these,
and several are read in every call."""

from torch import Tensor, nn


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """One that it has, or what lends it by another way: FSDP's first version does, and parametrizations."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)
