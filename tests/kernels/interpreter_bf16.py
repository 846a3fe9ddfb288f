"""Triton's interpreter keeps bf16 as uint16: its dot multiplies the bit patterns and its float32 -> bf16 truncates.

Upstream declined a repair, so the tests bring one: products of the real values, rounding to nearest even.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_stock_dot = InterpreterBuilder.create_dot
_stock_cast = InterpreterBuilder.cast_impl


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 as bf16 bit patterns, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    if a.dtype.scalar != tl.bfloat16:
        return _stock_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
    product = np.matmul(widen(a.data), widen(b.data), dtype=d.data.dtype)
    return TensorHandle(product + d.data, d.dtype.scalar)


def _cast(self, src, dst_type):
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        return TensorHandle(narrow(src.data), tl.bfloat16)
    if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
        return TensorHandle(widen(src.data), tl.float32)
    return _stock_cast(self, src, dst_type)


def repair_bf16() -> None:
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.cast_impl = _cast
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(InterpreterBuilder, name, _cast)
