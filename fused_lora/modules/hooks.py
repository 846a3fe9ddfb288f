"""What only a call of a module itself would run."""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def why_alone(module: nn.Module, forward) -> str | None:
    """Why nobody may compute a module but by calling it, or None; forward is the one that its class is known for."""
    own = vars(module)  # asked for several modules in every call of a layer: in tenths of a microsecond
    if type(module).forward is not forward or "forward" in own:
        return "it has a forward of its own"
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return "it has hooks"
    if _has_any_global_hook():
        return "hooks are registered for all modules"
    if module._compiled_call_impl is not None:
        return "it is compiled by itself"
    return None


def why_not_known(module: nn.Module, known: dict) -> str | None:
    """Why nobody may compute a module by what is known of its class, or None; known: classes with their forwards."""
    forward = known.get(type(module))
    return f"it is a {type(module).__name__}" if forward is None else why_alone(module, forward)
