"""W out of a stored weight, or a part of it: out[r, c] = W[first_row + r, first_col + c], computed in fp32 and rounded
once. formats/ has the same functions in torch.

A piece is 64 neighbours in a row. It has one scale, or two where NF4's blocks run on from row to row.
"""

from math import ceil, gcd

import torch
import triton
import triton.language as tl

from ..formats import FP8, INT8, Stored, format_of, nf4
from .launch import Layout, Plan, planned, pointers_aligned

PIECE = 64
_PIECE = tl.constexpr(PIECE)
_NF4_VALUES = tl.constexpr(nf4.VALUES)
_SIGN_AND_SEVEN = tl.constexpr(0x87F00000 - 2**32)
_TO_THE_120 = tl.constexpr(2.0**120)


@triton.jit
def _e4m3(codes):
    """Codes as float32: Triton converts them itself on the newer cards alone. Exponent and mantissa become float32's
    lower four and upper three bits, which is 2^120 too small, denormals too; 480 would be what stands for NaN."""
    bits = (codes.to(tl.int8, bitcast=True).to(tl.int32) << 20) & _SIGN_AND_SEVEN
    values = bits.to(tl.float32, bitcast=True) * _TO_THE_120
    return tl.where(tl.abs(values) > 448.0, float("nan"), values)


@triton.jit
def _nf4_values():
    codes = tl.arange(0, 16)
    values = tl.zeros((16,), dtype=tl.float32)
    for i in tl.static_range(16):
        values = tl.where(codes == i, _NF4_VALUES[i], values)
    return values


@triton.jit
def _nf4_codes(codes_ptr, row, piece, width, K, UNIT: tl.constexpr):
    """Of rows' pieces of these numbers. The first code of a pair is the upper half of its byte."""
    if UNIT > 1:
        pairs = tl.arange(0, _PIECE // 2)
        at = row * (K // UNIT * (UNIT // 2)) + piece * (_PIECE // 2)
        inside = pairs[None, :] < (width // UNIT * (UNIT // 2))[:, None]
        both = tl.load(codes_ptr + at[:, None] + pairs[None, :], mask=inside, other=0)
        return tl.interleave(both >> 4, both & 15)
    else:  # rows begin in the middle of a byte
        offsets = tl.arange(0, _PIECE)
        at = (row * K + piece * _PIECE)[:, None] + offsets[None, :]
        both = tl.load(codes_ptr + at // 2, mask=offsets[None, :] < width[:, None], other=0)
        return tl.where(at % 2 == 0, both >> 4, both & 15)


@triton.jit
def _absmax(scale_ptr, outer_ptr, block, mask, NESTED: tl.constexpr):
    if NESTED:
        values = tl.load(outer_ptr + 1 + tl.load(scale_ptr + block, mask=mask, other=0).to(tl.int32))
        factors = tl.load(outer_ptr + 257 + block // 256, mask=mask, other=0.0)
        return values * factors + tl.load(outer_ptr)
    else:
        return tl.load(scale_ptr + block, mask=mask, other=0.0)


@triton.jit
def _nf4_scales(scale_ptr, outer_ptr, start, width, NESTED: tl.constexpr, ALIGNED: tl.constexpr):
    """Of pieces that begin at a flat `start`: a column, or, where they are in two blocks, of each entry."""
    first = _absmax(scale_ptr, outer_ptr, start // _PIECE, width > 0, NESTED)
    if ALIGNED:
        return first[:, None]
    else:
        before = (start % _PIECE).to(tl.int32)
        second = _absmax(scale_ptr, outer_ptr, start // _PIECE + 1, before + width > _PIECE, NESTED)
        return tl.where(before[:, None] + tl.arange(0, _PIECE)[None, :] < _PIECE, first[:, None], second[:, None])


@triton.jit
def _scales(scale_ptr, row, col, K, mask, FORMAT: tl.constexpr):
    """Of FP8 and INT8."""
    if FORMAT == "fp8 by tensor":
        return tl.load(scale_ptr).to(tl.float32)
    elif FORMAT == "fp8 by blocks":
        return tl.load(scale_ptr + row // 128 * tl.cdiv(K, 128) + col // 128, mask=mask, other=0.0).to(tl.float32)
    else:
        scales = tl.load(scale_ptr + row, mask=mask, other=0.0).to(tl.float32)
        return tl.div_rn(scales, 127.0) if FORMAT == "int8" else scales


@triton.jit(do_not_specialize=["first_row", "first_piece", "K"])
def dequantise_kernel(
    codes_ptr, scale_ptr, outer_ptr, out_ptr, first_row, first_piece, rows, cols, K, stride_out,
    FORMAT: tl.constexpr, NF4: tl.constexpr, ALIGNED: tl.constexpr, UNIT: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """UNIT columns are a power of two of which all rows are multiples. ALIGNED: every piece is a block of NF4."""
    K, cols, stride_out = K // UNIT * UNIT, cols // UNIT * UNIT, stride_out // UNIT * UNIT
    in_row = tl.cdiv(cols, _PIECE)
    number = tl.program_id(0) * PIECES + tl.arange(0, PIECES)
    out_row, out_col = number // in_row, number % in_row * _PIECE
    row, piece = (first_row + out_row).to(tl.int64), first_piece + number % in_row
    col = piece * _PIECE
    width = tl.where(out_row < rows, tl.minimum(cols - out_col, _PIECE), 0)
    offsets = tl.arange(0, _PIECE)
    mask = offsets[None, :] < width[:, None]
    if NF4:
        codes = _nf4_codes(codes_ptr, row, piece, width, K, UNIT)
        flat = tl.reshape(codes.to(tl.int32), (PIECES * _PIECE,))
        values = tl.reshape(tl.gather(_nf4_values(), flat, 0), (PIECES, _PIECE))
        scales = _nf4_scales(scale_ptr, outer_ptr, row * K + col, width, outer_ptr is not None, ALIGNED)
    else:
        codes = tl.load(codes_ptr + (row * K + col)[:, None] + offsets[None, :], mask=mask, other=0)
        values = codes.to(tl.float32) if FORMAT == "int8" else _e4m3(codes)
        scales = _scales(scale_ptr, row, col, K, width > 0, FORMAT)
        if FORMAT != "fp8 by tensor":
            scales = scales[:, None]
    out = out_ptr + (out_row.to(tl.int64) * stride_out + out_col)[:, None] + offsets[None, :]
    tl.store(out, (values * scales).to(out_ptr.dtype.element_ty), mask=mask)


def dequantise(weight: Stored, out: torch.Tensor, first_row: int = 0, first_col: int = 0) -> None:
    """W[first_row:, first_col:] as far as out goes, whose columns are adjacent. first_col is a multiple of PIECE."""
    form = format_of(weight)
    codes, scale, outer = (None if each is None else each.contiguous() for each in weight.tensors)
    if isinstance(form, FP8):
        codes = codes.view(torch.uint8)
    dtypes = scale.dtype, None if outer is None else outer.dtype
    key = (form, weight.K, Layout.of(out), *dtypes)
    plan = planned((dequantise, *key, *pointers_aligned(codes, scale, outer)), lambda: _plan(form, weight.K, out))
    plan.run((), (codes, scale, outer, out, first_row, first_col // PIECE))


def _plan(form, K: int, out: torch.Tensor) -> Plan:
    rows, cols = out.shape
    is_nf4 = not isinstance(form, (FP8, INT8))
    unit = gcd(K, cols, out.stride(0), 8)
    pieces = 8 * unit  # of a program; an access takes a register an entry where rows are aligned to nothing
    return Plan(
        dequantise_kernel,
        (ceil(rows * ceil(cols / PIECE) / pieces), 1, 1),
        dict(
            FORMAT=form.name, NF4=is_nf4, ALIGNED=is_nf4 and K % PIECE == 0, UNIT=unit, PIECES=pieces,
            num_warps=4, enable_fp_fusion=False,  # a product and a sum are rounded one after the other, as in torch
        ),
        sizes=(rows, cols, K, out.stride(0)),
    )  # fmt: skip
