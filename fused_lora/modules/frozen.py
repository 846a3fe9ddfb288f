"""Frozen: the weight that a layer does not train, as a matrix, or in a format its codes and scales."""

from collections.abc import Callable, Iterable
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import checks, ops
from ..formats import FP8, NAMED, Format, Stored
from ..formats.fp8 import CODES
from .attributes import parameter
from .loading import TENSORS, base_errors
from .protocol import PLAIN
from .quantised import Taken, taken

FORMATS = tuple({type(form) for form in NAMED.values()})
BITS = {1: torch.uint8, 4: torch.int32}  # what stands for a tensor's bits, by the size of an entry


def asked_base(base: str | Format | None) -> Format | None:
    """A format by its name, or as it is. Raises ValueError or TypeError."""
    if isinstance(base, str) and base in NAMED:
        return NAMED[base]
    if base is None or isinstance(base, FORMATS):
        return base
    error = ValueError if isinstance(base, str) else TypeError
    raise error(f"base must be one of {', '.join(NAMED)}, a format of fused_lora.formats or None, got {base!r}")


def check_linear(linear: nn.Linear) -> None:
    """Whether it is an nn.Linear itself, or one that is quantised in a way that is known."""
    if taken(linear) is None:
        checks.check_base(linear)


def found_in(linear: nn.Linear, base: Format | None) -> Taken | None:
    """The weight of a linear that is quantised already; None where it is as nn.Linear has it, and can be quantised if a
    base is asked for."""
    found = taken(linear, base)
    if found is None:
        checks.check_matrix("linear.weight", linear.weight)
        if base is not None:
            check_quantisable("linear.weight", linear.weight)
    return found


def check_quantisable(name: str, weight: Tensor) -> None:
    """What a format's quantise would raise, by name. Waits for the device."""
    if weight.dtype not in checks.STORED_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16 or float32 to be quantised, got {weight.dtype}")
    if weight.numel() == 0:
        raise ValueError(f"{name} must have entries to be quantised, got {tuple(weight.shape)}")
    if not weight.is_meta and not weight.isfinite().all():
        raise ValueError(f"{name} must be finite to be quantised, got an infinity or a NaN")


def naming(name: str, function: Callable, *arguments):
    """A function's result, or its errors with the name of the layer they are of."""
    try:
        return function(*arguments)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise type(error)(f"{name}: {error}" if name else str(error)) from None


def names_of_bases(layers: Iterable["Frozen"]) -> str | None:
    """The formats that weights of layers are in."""
    return ", ".join(sorted({layer.base.name for layer in layers if layer.base is not None})) or None


class Frozen(nn.Module):
    """What LoRALinear and LoRABank have of it.

        base           the format, or None for a matrix
        weight         (N, K), or the format's codes
        weight_scale, weight_outer    the format's scales, in a layer with a base alone

    All are parameters that require no gradients, so that they are saved, loaded and sharded as a matrix is. Casts leave
    the bits of a format alone: only compute_dtype follows them. The one scale of a whole weight is kept as (1,), since
    fully_shard takes no parameter without a dimension.
    """

    in_features: int
    out_features: int
    base: Format | None = None  # of layers that were pickled before there were formats
    _compute_dtype: torch.dtype | None = None

    def _start_on(self, linear: nn.Linear, found: Taken | None) -> None:
        """On a linear's tensors, and its weight as found where that is quantised already."""
        if found is None:
            self.weight = linear.weight
        else:
            self._hold(*found)
        self.bias = linear.bias

    def quantise(self, linear: nn.Linear, base: Format | None) -> None:
        """The linear's weight, which the layer holds until now, in a format. The linear lets go of it: two copies of a
        model may not fit into memory."""
        if base is not None and self.base is None:
            stored = base.quantise(self.weight)
            # Scales may be a part of what they were computed in, and files want memory of their own size.
            self._hold(stored._replace(scale=stored.scale.clone()), base, self.weight.dtype)
            linear.weight = None

    def _freeze(self) -> None:
        for tensor in self.frozen_tensors():
            if tensor is not None:
                tensor.requires_grad_(False)

    def _hold(self, stored: Stored, base: Format, dtype: torch.dtype) -> None:
        """Codes and scales in the place of whatever weight there was."""
        for name, tensor in zip(TENSORS, stored.tensors, strict=True):
            if tensor is not None:
                tensor = nn.Parameter(tensor if tensor.dim() else tensor[None], requires_grad=False)
            self.register_parameter(name, tensor)
        self.base, self._compute_dtype = base, dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """The activations' own: weight's dtype; in a format the one that the linear had, as casts have changed it."""
        return self.weight.dtype if self.base is None else self._compute_dtype

    @property
    def frozen_weight(self) -> Tensor | Stored:
        """W (N, K): weight, or the format's tensors as one."""
        weight = parameter(self, "weight")
        return weight if self.base is None else self._stored(weight)

    def _stored(self, codes: Tensor) -> Stored:
        scale, outer = parameter(self, "weight_scale"), parameter(self, "weight_outer")
        if codes.dtype.itemsize > 1 or scale.dtype.itemsize == 2 or (outer is not None and outer.dtype.itemsize == 2):
            _raise_cast(codes, scale)
        if getattr(self.base, "by", None) == "tensor" and type(scale) in PLAIN:  # shards stay as they are
            scale = scale.view(())
        return Stored(codes, scale, outer, self.out_features, self.in_features)

    def frozen_tensors(self) -> tuple[Tensor | None, ...]:
        """What W is made of: the same objects as long as it is the same."""
        if self.base is None:
            return (parameter(self, "weight"),)
        return tuple(parameter(self, name) for name in TENSORS)

    def _plainly(self, x: Tensor) -> Tensor:
        """x W^T + bias, without any update."""
        weight, bias = self.frozen_weight, parameter(self, "bias")
        if self.base is None:
            return F.linear(x, weight, bias)
        N, K = weight.shape
        return ops.lora_group(x, [ops.Part(weight, x.new_empty(0, K), x.new_empty(N, 0), bias)])[0]

    def _apply(self, fn, recurse=True):
        if self.base is None:
            return super()._apply(fn, recurse)
        bits = {id(tensor) for tensor in self.frozen_tensors()}
        super()._apply(lambda tensor: _moved(fn, tensor) if id(tensor) in bits else fn(tensor), recurse)
        self._compute_dtype = fn(torch.empty(0, dtype=self._compute_dtype)).dtype
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        errors = base_errors(self, state_dict, prefix)
        if errors:
            error_msgs += errors
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __getstate__(self) -> dict:
        """Codes as integers, since pickle cannot read 8-bit floats again."""
        above = getattr(super(), "__getstate__", None)
        state = dict(vars(self)) if above is None else dict(above())
        if isinstance(self.base, FP8) and type(self.weight) is nn.Parameter:
            bits = nn.Parameter(self.weight.view(torch.uint8), requires_grad=False)
            state["_parameters"] = state["_parameters"] | {"weight": bits}
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if isinstance(self.base, FP8) and self.weight.dtype is torch.uint8:
            self.weight = nn.Parameter(self.weight.view(CODES), requires_grad=False)


def _moved(fn, tensor: Tensor) -> Tensor:
    """A tensor where fn puts it, with the bits that it had: fn is handed integers, which casts leave alone."""
    bits = tensor.view(BITS[tensor.dtype.itemsize])
    moved = fn(bits)
    if moved.dtype is not bits.dtype:  # Module.type casts integers too
        moved = bits.to(moved.device)
    return moved.view(tensor.dtype)


def _raise_cast(codes: Tensor, scale: Tensor) -> NoReturn:
    raise TypeError(
        f"weight and its scales must stay as the format has them, got {codes.dtype} and {scale.dtype}: fully_shard's "
        "param_dtype casts them on their way to a forward (leave it out: factors may have another dtype than x)"
    )
