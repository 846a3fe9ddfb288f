"""Errors that name the argument and what was got. Called before anything is computed or changed."""

import math

import torch
from torch import Tensor, nn

from .formats import Stored

MAX_RANK = 512
COMPUTE_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
STORED_DTYPES = COMPUTE_DTYPES - {torch.float64}  # beside a quantised weight


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _check_dense(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got layout {tensor.layout}")
    if type(tensor).__name__ == "DTensor":
        raise TypeError(f"{name} must be a plain tensor, got a DTensor: ColwiseLoRA and RowwiseLoRA compute in shards")


def computes_in(dtype: torch.dtype) -> bool:
    """Whether it is a real floating-point type of 16 bits or more."""
    return dtype in COMPUTE_DTYPES


def check_dtype(name: str, dtype: torch.dtype) -> None:
    if not computes_in(dtype):
        quantised = ": a quantised base is not supported" if dtype.itemsize == 1 else ""
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {dtype}{quantised}")


def check_matrix(name: str, tensor: Tensor) -> None:
    """A plain, dense, real floating-point matrix."""
    _check_dense(name, tensor)
    check_dtype(name, tensor.dtype)
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions, got shape {_shape(tensor)}")


def check_base(linear: nn.Linear) -> None:
    """A linear whose place LoRALinear can take: what a subclass of it or of its weight adds would be lost."""
    if type(linear) is not nn.Linear:
        raise TypeError(f"linear must be an nn.Linear itself, got {type(linear).__name__}")
    if type(linear.weight) is not nn.Parameter:
        raise TypeError(f"linear.weight must be a plain nn.Parameter, got {type(linear.weight).__name__}")


def check_rank(r: int) -> None:
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r must be an int, got {type(r).__name__}")
    if not 1 <= r <= MAX_RANK:
        raise ValueError(f"r must be between 1 and {MAX_RANK}, got {r}")


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_count(name: str, count: int, least: int = 0) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name} must be an int, got {type(count).__name__}")
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}")


def check_probability(name: str, p: float) -> None:
    _check_number(name, p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {p}")


def check_scale(name: str, scale: float) -> None:
    _check_number(name, scale)
    if not -math.inf < scale < math.inf:  # which torch.compile can trace; NaN fails it too
        raise ValueError(f"{name} must be finite, got {scale}")


def check_weight(name: str, weight: Tensor | Stored) -> None:
    """A matrix, or one in a format."""
    if not isinstance(weight, Stored):
        check_matrix(name, weight)


def check_in_full(name: str, weight: Tensor | Stored) -> None:
    """Whether an update can be merged into a weight for good, and all of it arrives."""
    if isinstance(weight, Stored):
        raise NotImplementedError(f"{name} is quantised, and would lose what its codes cannot hold of an update")


MUCH = 0.5  # of an update, in codes: where less arrives, somebody is told


def little_arrived(what: str, share: float) -> str:
    return f"{share:.1%} of {what} arrived in its quantised weight: the rest is lost in rounding"


def check_beside(name: str, x: Tensor, weight: Tensor | Stored) -> None:
    """Whether activations have a weight's dtype; beside codes they have one that scales lose nothing of."""
    if isinstance(weight, Stored):
        if x.dtype not in STORED_DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16 or float32 beside a quantised weight, got {x.dtype}")
    elif x.dtype != weight.dtype:
        raise TypeError(f"{name} must have weight's dtype {weight.dtype}, got {x.dtype} (torch.autocast casts both)")


def scale_dtype(weight: Tensor | Stored) -> torch.dtype:
    """In which a scale loses nothing beside a weight: float32, or float64."""
    if isinstance(weight, Stored):
        return torch.float32
    return torch.promote_types(weight.dtype, torch.float32)


def check_scale_on(name: str, scale: float | Tensor, weight: Tensor) -> None:
    """A finite number, or one float32 element beside the weight (whose value is not looked at: that would wait)."""
    if not isinstance(scale, Tensor):
        return check_scale(name, scale)
    if scale.dtype not in (torch.float32, scale_dtype(weight)):
        wide = "float64" if scale_dtype(weight) is torch.float64 else "float32"
        raise TypeError(f"{name} must be a float or a {wide} tensor, got {scale.dtype}")
    if scale.requires_grad:
        raise ValueError(f"{name} must not require a gradient: there is none of it here")
    if scale.numel() != 1 or scale.dim() > 1 or scale.device != weight.device:
        raise ValueError(f"{name} must be one element on {weight.device}, got {_shape(scale)} on {scale.device}")


def check_factors(weight: Tensor, A: Tensor, B: Tensor) -> None:
    """weight (N, K), A (r, K), B (N, r) on one device."""
    check_weight("weight", weight)
    for name, tensor in (("A", A), ("B", B)):
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


def _check_bias(bias: Tensor, weight: Tensor) -> None:
    _check_dense("bias", bias)
    if not computes_in(bias.dtype):
        raise TypeError(f"bias must be floating point of 16 bits or more, got {bias.dtype}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {_shape(bias)}")
    if bias.device != weight.device:
        raise ValueError(f"bias must be on {weight.device} like weight, got {bias.device}")


def _check_seed(seed: Tensor, weight: Tensor) -> None:
    if not isinstance(seed, Tensor) or seed.dtype is not torch.int64 or seed.numel() != 1:
        got = f"{seed.dtype} {_shape(seed)}" if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"seed must be one element of int64, got {got}")
    if seed.device != weight.device:
        raise ValueError(f"seed must be on {weight.device} like weight, got {seed.device}")


def check_frozen(weight: Tensor) -> None:
    """A parameter; a weight that was made from something else is its maker's business, and so is torch.func's."""
    if not (weight.requires_grad and weight.is_leaf and torch.is_grad_enabled()):
        return
    if not torch._C._are_functorch_transforms_active():
        raise ValueError("weight must be frozen, got requires_grad=True: it has no gradient here")


def _check_gain(gain: Tensor, weight: Tensor) -> None:
    _check_dense("gain", gain)
    if gain.dtype is not scale_dtype(weight):
        raise TypeError(f"gain must be {scale_dtype(weight)} beside weight, got {gain.dtype}")
    if gain.shape != weight.shape[:1]:
        raise ValueError(f"gain must have shape ({weight.shape[0]},), got {_shape(gain)}")
    if gain.device != weight.device:
        raise ValueError(f"gain must be on {weight.device} like weight, got {gain.device}")


def check_lora_linear(x, weight, A, B, bias, scale, p, seed, gain=None) -> None:
    """All of lora_linear's arguments."""
    if torch.jit.is_tracing():  # whose sizes are tensors
        return
    check_factors(weight, A, B)
    _check_dense("x", x)
    if x.device != weight.device:
        raise ValueError(f"x must be on {weight.device} like weight, got {x.device}")
    K = weight.shape[1]
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x must have {K} as its last dimension to match weight {_shape(weight)}, got {_shape(x)}")
    check_beside("x", x, weight)
    if bias is not None:
        _check_bias(bias, weight)
    if gain is not None:
        _check_gain(gain, weight)
    check_frozen(weight)
    check_scale_on("scale", scale, weight)
    check_probability("p", p)
    if seed is not None:
        _check_seed(seed, weight)


def check_same_rows(name: str, weight: Tensor, other: str, like: Tensor) -> None:
    """Of two parts' weights."""
    if weight.shape[0] != like.shape[0]:
        raise ValueError(f"{name}: weight must have {like.shape[0]} rows like {other}'s, got {weight.shape[0]}")


def check_in_memory(name: str, tensor: Tensor) -> None:
    """Whether a tensor is not elsewhere: offloaded."""
    if tensor.is_meta:
        raise ValueError(f"{name} must be in memory to be merged, got one on meta: bring back what is offloaded first")


def check_at_hand(name: str, tensor: Tensor) -> None:
    """Whether a parameter is a plain tensor with memory, and not in shards."""
    check_in_memory(name, tensor)
    if type(tensor) not in (Tensor, nn.Parameter):
        raise TypeError(
            f"{name} must be a plain tensor to be merged, got {type(tensor).__name__} (ReLoRA merges shards)"
        )


def check_own(name: str, tensor: Tensor) -> None:
    """Whether a tensor is a parameter, and not made from one for this moment (parametrized, pruned, lent by FSDP1), in
    which a merge would be lost."""
    if not isinstance(tensor, nn.Parameter):
        raise ValueError(f"{name} must be a parameter to be merged, got a tensor that is made from others at each use")


def check_writable(name: str, tensor: Tensor) -> None:
    """Whether a tensor can be changed in place and keep its meaning."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name} must be writable, got an inference tensor")
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ValueError(f"{name} must be writable, got an expanded tensor with strides {tensor.stride()}")
    reach = 1  # elements that one step along the next larger stride must clear
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            raise ValueError(f"{name} must be writable, got entries that share memory: strides {tensor.stride()}")
        reach = max(reach, stride * (size - 1) + 1)


def check_restart(weights, As, Bs, scales, seeds, lows, rounding) -> None:
    """All of merge_and_reinit_'s arguments."""
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding must be nearest or stochastic, got {rounding!r}")
    for name, entries in (("As", As), ("Bs", Bs), ("scales", scales), ("seeds", seeds), ("lows", lows)):
        if len(entries) != len(weights):
            raise ValueError(f"{name} must have an entry for each of the {len(weights)} weights, got {len(entries)}")
    if any(low is None for low in lows) and any(low is not None for low in lows):
        raise ValueError("lows must have a tensor for every layer, or none at all")
    owners = {}
    for i, (weight, A, B, scale, seed, low) in enumerate(zip(weights, As, Bs, scales, seeds, lows, strict=True)):
        try:
            _check_restart_of(weight, A, B, scale, seed, low)
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {i}: {error}") from None
        for name, tensor in (("weight", weight), ("A", A), ("B", B), ("low", low)):
            if tensor is not None and tensor.numel() > 0:
                owner = owners.setdefault((tensor.device, tensor.data_ptr()), f"layer {i}'s {name}")
                if owner != f"layer {i}'s {name}":
                    raise ValueError(f"layer {i}: {name} must be a tensor of its own, got {owner}")


def _check_restart_of(weight, A, B, scale, seed, low) -> None:
    check_factors(weight, A, B)
    check_scale_on("scale", scale, weight)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63 - 1:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")
    if low is not None:
        _check_dense("low", low)
        if low.dtype is not torch.int16 or weight.dtype.itemsize != 2:
            raise TypeError(f"low must be int16 beside a 16-bit weight, got {low.dtype} beside {weight.dtype}")
        if low.shape != weight.shape or low.device not in (weight.device, torch.device("cpu")):
            raise ValueError(
                f"low must have weight's shape {_shape(weight)} on {weight.device} or in the host's memory, "
                f"got {_shape(low)} on {low.device}"
            )
        if low.device != weight.device and not low.is_contiguous():
            raise ValueError(f"low must be contiguous in the host's memory, got strides {low.stride()}")
    for name, tensor in (("weight", weight), ("A", A), ("B", B), ("low", low)):
        if tensor is not None:
            check_writable(name, tensor)
