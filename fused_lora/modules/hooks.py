"""What only a call of a module itself would run."""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def why_alone(module: nn.Module, forward) -> str | None:
    """Why nobody may compute a module but by calling it, or None; forward is the one that its class is known for."""
    return _own_reason(module, forward) or why_none_alone()


def why_none_alone() -> str | None:
    """The same of all modules."""
    return "hooks are registered for all modules" if _has_any_global_hook() else None


def why_not_known(module: nn.Module, known: dict) -> str | None:
    """Why nobody may compute a module by what is known of its class, or None; known: classes with their forwards. Of
    all modules why_none_alone has to be asked once."""
    forward = known.get(type(module))
    return f"it is a {type(module).__name__}" if forward is None else _own_reason(module, forward)


def _own_reason(module: nn.Module, forward) -> str | None:
    own = vars(module)  # asked for several modules in every call of a layer: in tenths of a microsecond
    if type(module).forward is not forward or "forward" in own:
        return "it has a forward of its own"
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return "it has hooks"
    if module._compiled_call_impl is not None:
        return "it is compiled by itself"
    return None
