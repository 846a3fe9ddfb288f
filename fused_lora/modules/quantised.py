"""Linears that another library has quantised, found by their attributes: their weight is taken as it is, bit for bit.

    bitsandbytes    Linear4bit of NF4, with nested scales or without (weight.quant_state); Linear8bitLt (SCB)
    Hugging Face    FP8Linear (weight_scale_inv, block_size); FbgemmFp8Linear and the like (weight_scale by rows)

compute_dtype is what the library kept of the weight's dtype, else the bias's; where nothing says it, that of models
which come so: float16 for INT8, bfloat16 for FP8.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import checks
from ..formats import FP8, INT8, NF4, Format, Stored
from ..formats.fp8 import BLOCK, CODES
from ..formats.nf4 import BLOCK as NF4_BLOCK
from ..formats.nf4 import COUNT, NESTED_BLOCK, VALUES

# What such modules hold beside weight and bias; the scales of activations are of no use where x stays in 16 bits.
HELD = {"weight_scale_inv", "weight_scale", "activation_scale", "input_scale_ub"}


class Taken(NamedTuple):
    """A weight in a format, and the dtype of its activations."""

    stored: Stored
    base: Format
    dtype: torch.dtype


class _RefusedError(Exception):
    """Why a quantised weight cannot be taken."""


def read(module: nn.Module) -> Taken | str | None:
    """What a quantised linear's weight is, or why it cannot be taken; None for a linear that is not quantised."""
    reader = _reader(module) if isinstance(module, nn.Linear) and type(module) is not nn.Linear else None
    if reader is None:
        return None
    try:
        return reader(module, module.weight)
    except _RefusedError as refused:
        return str(refused)


def taken(module: nn.Module, base: Format | None = None) -> Taken | None:
    """The same, where a layer is to be made of it, with a base or with the one that it has. Raises NotImplementedError
    or ValueError for one that cannot be taken so."""
    found = read(module)
    if isinstance(found, str):
        raise NotImplementedError(f"linear cannot be replaced: {found}")
    if found is not None and base not in (None, found.base):
        raise ValueError(f"base must be None for a weight that is quantised already, got {base.name}")
    return found


def size_and_dtype(module: nn.Module) -> tuple[torch.Size, torch.dtype]:
    """Of the matrix that a linear, or a layer in its place, stands for, and of its activations."""
    if hasattr(type(module), "frozen_weight"):
        return module.frozen_weight.shape, module.compute_dtype
    found = read(module)
    if isinstance(found, Taken):
        return found.stored.shape, found.dtype
    return module.weight.shape, module.weight.dtype


def _reader(linear: nn.Linear):
    weight, kinds = getattr(linear, "weight", None), {cls.__name__ for cls in type(linear).__mro__}
    if getattr(weight, "quant_state", None) is not None or "Linear4bit" in kinds:
        return _four_bits
    if hasattr(weight, "SCB") or "Linear8bitLt" in kinds:
        return _int8
    if hasattr(linear, "weight_scale_inv"):
        return _fp8_of_blocks
    if hasattr(linear, "weight_scale") and getattr(weight, "dtype", None) is CODES:
        return _fp8_of_rows
    return None


def _four_bits(linear: nn.Linear, weight: Tensor) -> Taken:
    state = getattr(weight, "quant_state", None)
    _require(state is not None, "its weight is not quantised yet: move the model to where it computes first")
    _require(state.quant_type == "nf4", f"its weight is in {state.quant_type}, which is no format here: nf4 is one")
    _require(state.blocksize == NF4_BLOCK, f"its weight has blocks of {state.blocksize}, and {NF4_BLOCK} are read")
    _require(
        not getattr(state, "packing_format_for_cpu", False), "its weight is packed for a CPU: state_dict() unpacks it"
    )
    _require(_is_nf4(state.code), "its weight has other values than nf4's")
    N, K = _shape(linear)
    _require(tuple(state.shape) == (N, K), f"its weight has the shape {tuple(state.shape)} where {(N, K)} is expected")
    codes, blocks = weight.data.view(torch.uint8).view(-1, 1), -(-N * K // NF4_BLOCK)  # of whatever dtype it is kept in
    _check("weight", codes, torch.uint8, (-(-N * K // 2), 1))
    if not state.nested:
        _check("absmax", state.absmax, torch.float32, (blocks,))
        return Taken(Stored(codes, state.absmax, None, N, K), NF4(), state.dtype)
    inner = state.state2
    _require(inner.blocksize == NESTED_BLOCK, f"its scales have blocks of {inner.blocksize}, not {NESTED_BLOCK}")
    _check("absmax", state.absmax, torch.uint8, (blocks,))
    _check("nested_absmax", inner.absmax, torch.float32, (-(-blocks // NESTED_BLOCK),))
    _check("nested_quant_map", inner.code, torch.float32, (COUNT,))
    _check("offset", state.offset, torch.float32, ())
    outer = torch.cat([state.offset[None], inner.code, inner.absmax])
    return Taken(Stored(codes, state.absmax, outer, N, K), NF4(nested=True), state.dtype)


def _is_nf4(values: Tensor) -> bool:
    return torch.equal(values.cpu().float(), torch.tensor(VALUES))


def _int8(linear: nn.Linear, weight: Tensor) -> Taken:
    state = getattr(linear, "state", None)
    kept = getattr(weight, "has_fp16_weights", False) or getattr(state, "has_fp16_weights", False)
    _require(not kept, "its weight is kept in 16 bits: has_fp16_weights=False quantises it")
    scale = getattr(weight, "SCB", None)
    scale = getattr(state, "SCB", None) if scale is None else scale  # where the first forward puts it
    moved = weight.dtype is torch.int8 and scale is not None
    _require(moved, "its weight is not quantised yet: move the model to where it computes first")
    N, K = _shape(linear)
    _check("weight", weight, torch.int8, (N, K))
    _check("SCB", scale, torch.float32, (N,))
    return Taken(Stored(weight.data, scale, None, N, K), INT8(), _dtype(linear, torch.float16))


def _fp8_of_blocks(linear: nn.Linear, weight: Tensor) -> Taken:
    """block_size says what the scales are of; None that there is one."""
    N, K = _shape(linear)
    _check("weight", weight, CODES, (N, K))
    _require(hasattr(linear, "block_size"), "nothing says the size of its blocks: it has no block_size")
    size, scale = linear.block_size, linear.weight_scale_inv.data
    _require(scale.is_floating_point(), f"its weight_scale_inv is {scale.dtype}")
    if size is None:
        _require(scale.numel() == 1, f"its weight_scale_inv has {scale.numel()} entries and no block_size")
        return Taken(Stored(weight.data, _wide(scale).view(()), None, N, K), FP8("tensor"), _dtype(linear))
    is_known = tuple(size) == (BLOCK, BLOCK)
    _require(is_known, f"its weight has blocks of {' x '.join(map(str, size))}, and {BLOCK} x {BLOCK} are read")
    blocks = (-(-N // BLOCK), -(-K // BLOCK))
    _check("weight_scale_inv", scale, scale.dtype, blocks)
    powers = str(scale.dtype) == "torch.float8_e8m0fnu"  # which can be nothing else, and which older torch has not
    return Taken(Stored(weight.data, _wide(scale), None, N, K), FP8("blocks", powers), _dtype(linear))


def _fp8_of_rows(linear: nn.Linear, weight: Tensor) -> Taken:
    N, K = _shape(linear)
    _check("weight", weight, CODES, (N, K))
    scale = linear.weight_scale.data
    _check("weight_scale", scale, scale.dtype, (N, 1))
    _require(checks.computes_in(scale.dtype), f"its weight_scale is {scale.dtype}")
    return Taken(Stored(weight.data, _wide(scale), None, N, K), FP8("rows"), _dtype(linear))


def _wide(scale: Tensor) -> Tensor:
    """In float32, which holds all that 8 and 16 bits hold."""
    return scale.to(torch.float32)


def _shape(linear: nn.Linear) -> tuple[int, int]:
    return linear.out_features, linear.in_features


def _dtype(linear: nn.Linear, default: torch.dtype = torch.bfloat16) -> torch.dtype:
    return default if linear.bias is None else linear.bias.dtype


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    got = f"{tensor.dtype} {tuple(tensor.shape)}"
    _require(tensor.dtype is dtype and tensor.shape == shape, f"its {name} is {got} where {dtype} {shape} is expected")


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise _RefusedError(reason)
