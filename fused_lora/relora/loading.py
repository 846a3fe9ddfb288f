"""What of a checkpoint a run cannot take. An optimizer's state is of one phase: of the weights in the warm start, or of
the factors after it."""

from itertools import chain

from torch import Tensor
from torch.optim import Optimizer

from .optimizer_reset import MOMENTS


def refuse_other_phases(optimizer: Optimizer) -> None:
    """From now on its load_state_dict raises ValueError for a state of the other phase, with nothing changed.

    Torch's own message is of group sizes, and where these agree it has none.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # wrappers, such as Accelerate's, load by it
    inner.register_load_state_dict_pre_hook(_check)


def _check(optimizer: Optimizer, saved: dict) -> None:
    theirs, ours = saved["param_groups"], optimizer.param_groups
    fits = [len(group["params"]) for group in theirs] == [len(group["params"]) for group in ours]
    pairs = zip(*(chain.from_iterable(group["params"] for group in groups) for groups in (theirs, ours)), strict=fits)
    if not fits or any(_differ(saved["state"].get(key, {}), parameter) for key, parameter in pairs):
        raise ValueError(
            "the state is of other parameters than the optimizer's: load ReLoRA's state before it, which wraps the "
            "model if the checkpoint was wrapped"
        )


def _differ(state: dict, parameter: Tensor) -> bool:
    moments = (state.get(name) for name in MOMENTS)
    return any(isinstance(moment, Tensor) and moment.shape != parameter.shape for moment in moments)


def check_shapes(state: dict, weights: dict[str, Tensor], lows: dict[str, Tensor]) -> None:
    """Raises ValueError where a controller's state is of other weights, or of other residuals beside them."""
    for what, theirs, ours in (("linear", state["shapes"], weights), ("residual", state["lows"], lows)):
        for name in {**theirs, **ours}:
            found, wanted = _shape(theirs.get(name)), _shape(ours.get(name))
            if found != wanted:
                raise ValueError(f"the checkpoint's {what} at {name} is {found}, this run's is {wanted}")
    for name, low in state["lows"].items():
        wanted = lows[name].dtype
        if low.dtype is not wanted:
            raise ValueError(f"the checkpoint's residual at {name} must be {str(wanted)[6:]}, got {low.dtype}")


def _shape(found: Tensor | tuple | None) -> tuple | str:
    """Of a tensor; a shape itself."""
    return "missing" if found is None else tuple(getattr(found, "shape", found))
