"""Errors that name the argument and what was got. Called before anything is computed or changed."""

import math

import torch
from torch import Tensor

MAX_RANK = 512


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_matrix(name: str, tensor: Tensor) -> None:
    """A plain, dense, real floating-point matrix."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got layout {tensor.layout}")
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
            + (": a quantised base is not supported" if tensor.dtype.itemsize == 1 else "")
        )
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions, got shape {_shape(tensor)}")


def check_rank(r: int) -> None:
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r must be an int, got {type(r).__name__}")
    if not 1 <= r <= MAX_RANK:
        raise ValueError(f"r must be between 1 and {MAX_RANK}, got {r}")


def check_probability(name: str, p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {p}")


def check_scale(name: str, scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"{name} must be finite, got {scale}")


def check_scale_on(name: str, scale: float | Tensor, weight: Tensor) -> None:
    """A finite number, or one float32 element beside the weight (whose value is not looked at: that would wait)."""
    if not isinstance(scale, Tensor):
        return check_scale(name, scale)
    if scale.dtype is not torch.float32:
        raise TypeError(f"{name} must be a float or a float32 tensor, got {scale.dtype}")
    if scale.numel() != 1 or scale.device != weight.device:
        raise ValueError(f"{name} must be one element on {weight.device}, got {_shape(scale)} on {scale.device}")


def check_factors(weight: Tensor, A: Tensor, B: Tensor) -> None:
    """weight (N, K), A (r, K), B (N, r) on one device."""
    for name, tensor in (("weight", weight), ("A", A), ("B", B)):
        check_matrix(name, tensor)
    N, K = weight.shape
    check_rank(A.shape[0])
    if A.shape[1] != K:
        raise ValueError(f"A must have shape (r, {K}) to match weight {_shape(weight)}, got {_shape(A)}")
    if B.shape != (N, A.shape[0]):
        raise ValueError(f"B must have shape ({N}, {A.shape[0]}) to match weight and A, got {_shape(B)}")
    for name, tensor in (("A", A), ("B", B)):
        if tensor.device != weight.device:
            raise ValueError(f"{name} must be on {weight.device} like weight, got {tensor.device}")


def check_lora_linear(x, weight, A, B, bias, scale, p) -> None:
    """All of lora_linear's arguments."""
    check_factors(weight, A, B)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x must have {K} as its last dimension to match weight {_shape(weight)}, got {_shape(x)}")
    if x.dtype != weight.dtype:
        raise TypeError(f"x must have weight's dtype {weight.dtype}, got {x.dtype} (torch.autocast casts both)")
    if x.layout is not torch.strided:
        raise TypeError(f"x must be dense, got layout {x.layout}")
    if x.device != weight.device:
        raise ValueError(f"x must be on {weight.device} like weight, got {x.device}")
    if bias is not None:
        if bias.shape != (N,):
            raise ValueError(f"bias must have shape ({N},), got {_shape(bias)}")
        if bias.device != weight.device:
            raise ValueError(f"bias must be on {weight.device} like weight, got {bias.device}")
        if not bias.is_floating_point():
            raise TypeError(f"bias must be floating point, got {bias.dtype}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight must be frozen, got requires_grad=True: there is no gradient of weight here")
    check_scale_on("scale", scale, weight)
    check_probability("p", p)


def check_writable(name: str, tensor: Tensor) -> None:
    """Whether a tensor can be changed in place and keep its meaning."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name} must be writable, got an inference tensor")
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ValueError(f"{name} must be writable, got an expanded tensor with strides {tensor.stride()}")
