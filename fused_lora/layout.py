"""How a tensor lies in memory, as far as a kernel's launch depends on it."""

from torch import Tensor


def layout_of(tensor: Tensor | None) -> tuple | None:
    """All that a pass depends on but the values."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16
