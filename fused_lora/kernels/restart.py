"""The kernels of ReLoRA's restart, each a launch for many layers: weight += scale * B @ A, and A anew.

A launch finds its layers in a table of int64 in device memory, a row each: addresses, sizes, strides, seeds. A merge
reads factors with 16-byte accesses only: adjacent columns, aligned rows, filled up with zeros to multiples of 8. What
is not like that is copied before, by a third kernel.
"""

import triton
import triton.language as tl

from .primitives import accumulate, load_tile, row_order, store_tile
from .random import half_bits, hash_bits
from .rounding import join, round_randomly, split

# The columns of a merge's table; the strides of a matrix are its row's and its column's.
SCALE, ROWS, COLS, COLS_FILLED, RANKS, SEED, FIRST = (tl.constexpr(i) for i in range(7))
WEIGHT, LOW, FACTOR_A, FACTOR_B = (tl.constexpr(i) for i in range(7, 19, 3))  # address, strides
FIELDS = tl.constexpr(19)
# And of a new beginning's.
NEW_RANKS, NEW_COLS, NEW_SEED, NEW_SPACING, NEW_FIRST, NEW_A = (tl.constexpr(i) for i in range(6))
NEW_FIELDS = tl.constexpr(8)
# And of a copy's.
OLD_ROWS, OLD_COLS, COPY_ROWS, COPY_COLS, COPY, COPY_FIRST, ORIGINAL = (tl.constexpr(i) for i in range(7))
COPY_FIELDS = tl.constexpr(9)


@triton.jit
def restart_kernel(
    table, layer_of,
    WEIGHT_TYPE: tl.constexpr, FACTOR_TYPE: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr,
    FILLED: tl.constexpr, HAS_LOW: tl.constexpr, STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SPAN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The merge: one program per SPAN tiles along a weight's rows. Entries to which nothing is added keep their bits.

    UNIT: a weight's columns are adjacent; ALIGNED: and its rows begin at 16 bytes and may be written up to a multiple
    of 8 columns; FILLED: some of which are not the weight's; WHOLE: r fits a block, so that B is read once.
    """
    entry = table + tl.load(layer_of + tl.program_id(0)) * FIELDS
    scale = tl.load(tl.load(entry + SCALE).to(tl.pointer_type(tl.float32)))
    N, R = tl.load(entry + ROWS).to(tl.int32), tl.multiple_of(tl.load(entry + RANKS).to(tl.int32), 8)
    K = tl.multiple_of(tl.load(entry + COLS_FILLED).to(tl.int32), 8)
    A, stride_A, step_A = _matrix(entry + FACTOR_A, FACTOR_TYPE, True, True)
    B, stride_B, step_B = _matrix(entry + FACTOR_B, FACTOR_TYPE, True, True)
    weight, stride_weight, step_weight = _matrix(entry + WEIGHT, WEIGHT_TYPE, UNIT, ALIGNED)
    if HAS_LOW:
        low, stride_low, step_low = _matrix(entry + LOW, tl.int16, UNIT, ALIGNED)
    if ALIGNED:
        cols = K
    else:
        cols = tl.load(entry + COLS).to(tl.int32)
    strip = tl.program_id(0) - tl.load(entry + FIRST).to(tl.int32)
    row, first = row_order(strip, K, BLOCK_N, SPAN * BLOCK_K)
    if WHOLE:
        b = load_tile(B, row, 0, N, R, stride_B, step_B, BLOCK_N, BLOCK_R, False)
    # These roundings give back every bfloat16, whatever its bits, that they are given.
    BITWISE: tl.constexpr = tl.bfloat16 == WEIGHT_TYPE and (HAS_LOW or STOCHASTIC)
    for col in tl.range(first, min(first + SPAN * BLOCK_K, K), BLOCK_K):
        if WHOLE:
            a = load_tile(A, 0, col, R, K, stride_A, step_A, BLOCK_R, BLOCK_K, False)
        old = load_tile(weight, row, col, N, cols, stride_weight, step_weight, BLOCK_N, BLOCK_K, False)
        if HAS_LOW:
            old_low = load_tile(low, row, col, N, cols, stride_low, step_low, BLOCK_N, BLOCK_K, False).to(tl.int16)
        if WHOLE:
            delta = tl.dot(b, a, input_precision=PRECISION)
        else:
            delta = accumulate(
                tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32), B, A, row, col, N, K, R, 0, R,
                stride_B, step_B, stride_A, step_A, 0, 0,
                BLOCK_N, BLOCK_K, BLOCK_R, False, False, False, False, PRECISION,
            )  # fmt: skip
        delta *= scale
        if FILLED:  # 0 times an infinity would change what lies between the rows
            delta = tl.where((col + tl.arange(0, BLOCK_K) < tl.load(entry + COLS))[None, :], delta, 0.0)
        whole = join(old, old_low) if HAS_LOW else old.to(tl.float32)
        added = tl.where(delta == 0, whole, whole + delta)  # not the same for -0 and NaN
        if HAS_LOW:
            new, new_low = split(added, WEIGHT_TYPE)
            if not BITWISE:
                new_low = tl.where(delta == 0, old_low, new_low)
            store_tile(low, new_low, row, col, N, cols, stride_low, step_low, BLOCK_N, BLOCK_K, False)
        elif STOCHASTIC:
            random = half_bits(tl.load(entry + SEED) + 1, row, col, BLOCK_N, BLOCK_K)
            new = round_randomly(added, random, WEIGHT_TYPE)
        else:
            new = added.to(WEIGHT_TYPE)
        if not BITWISE:
            new = tl.where(delta == 0, old, new)
        store_tile(weight, new, row, col, N, cols, stride_weight, step_weight, BLOCK_N, BLOCK_K, False)


@triton.jit
def _matrix(fields, TYPE: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr):
    """A matrix of the table: its pointer and its strides, with what the compiler may rely on."""
    pointer = tl.load(fields).to(tl.pointer_type(TYPE))
    stride = tl.load(fields + 1)
    if ALIGNED:
        pointer, stride = tl.multiple_of(pointer, 16), tl.multiple_of(stride, 8)
    if UNIT:
        return pointer, stride, 1
    else:
        return pointer, stride, tl.load(fields + 2)


@triton.jit
def reinit_kernel(
    table, layer_of, FACTOR_TYPE: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A uniform in (-1, 1) / sqrt(K): one program per tile of an A. ALIGNED: and K is a multiple of 8."""
    entry = table + tl.load(layer_of + tl.program_id(0)) * NEW_FIELDS
    R, K = tl.load(entry + NEW_RANKS).to(tl.int32), tl.load(entry + NEW_COLS).to(tl.int32)
    if ALIGNED:
        K = tl.multiple_of(K, 8)
    A, stride_A, step_A = _matrix(entry + NEW_A, FACTOR_TYPE, UNIT, ALIGNED)
    tile = tl.program_id(0) - tl.load(entry + NEW_FIRST).to(tl.int32)
    row, col = row_order(tile, K, BLOCK_R, BLOCK_K)
    odd = 2 * (hash_bits(tl.load(entry + NEW_SEED), row, col, BLOCK_R, BLOCK_K) >> 8).to(tl.int32) + 1 - 16777216
    spacing = tl.load(entry + NEW_SPACING).to(tl.int32).to(tl.float32, bitcast=True)
    store_tile(A, odd.to(tl.float32) * spacing, row, col, R, K, stride_A, step_A, BLOCK_R, BLOCK_K, False)


@triton.jit
def fill_up_kernel(
    table, layer_of, OLD_TYPE: tl.constexpr, COPY_TYPE: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """A factor's copy, in another dtype and with zeros beyond its last row and column: one program per tile of it."""
    entry = table + tl.load(layer_of + tl.program_id(0)) * COPY_FIELDS
    old, stride_old, step_old = _matrix(entry + ORIGINAL, OLD_TYPE, UNIT, False)
    new = tl.multiple_of(tl.load(entry + COPY).to(tl.pointer_type(COPY_TYPE)), 16)
    rows, cols = tl.load(entry + COPY_ROWS).to(tl.int32), tl.multiple_of(tl.load(entry + COPY_COLS).to(tl.int32), 8)
    old_rows, old_cols = tl.load(entry + OLD_ROWS).to(tl.int32), tl.load(entry + OLD_COLS).to(tl.int32)
    tile = tl.program_id(0) - tl.load(entry + COPY_FIRST).to(tl.int32)
    row, col = row_order(tile, cols, BLOCK_ROWS, BLOCK_COLS)
    values = load_tile(old, row, col, old_rows, old_cols, stride_old, step_old, BLOCK_ROWS, BLOCK_COLS, False)
    store_tile(new, values, row, col, rows, cols, cols, 1, BLOCK_ROWS, BLOCK_COLS, False)
