"""float32 in 16 bits: in two halves, or rounded at random. reference.py has the same functions in torch."""

import triton
import triton.language as tl


@triton.jit
def join(high, low):
    """The float32 that split gave."""
    if high.dtype == tl.bfloat16:
        upper = high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        lower = (low.to(tl.uint16, bitcast=True) ^ 0x8000).to(tl.uint32)
        return ((upper | lower) - 0x8000).to(tl.float32, bitcast=True)
    else:
        wide = high.to(tl.float32)
        magnitude = tl.abs(wide) + low.to(tl.float32) * _power(_exponent(wide) - 26)
        return tl.where(_is_finite(wide), _with_sign_of(magnitude, wide), wide)


@triton.jit
def split(values, DTYPE: tl.constexpr):
    """(high, low): the rounding of float32 to a 16-bit dtype, ties away from zero, and the rest as int16."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        # A NaN of all ones would turn into a zero.
        bits = (tl.minimum(values.to(tl.int32, bitcast=True), 0x7FFF7FFF) + 0x8000).to(tl.uint32, bitcast=True)
        high = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        return high, (bits.to(tl.uint16) ^ 0x8000).to(tl.int16, bitcast=True)
    else:
        high = values.to(DTYPE)
        tie = _rest(values, high) == 32768.0
        high = tl.where(tie, (high.to(tl.int16, bitcast=True) + 1).to(tl.int16).to(DTYPE, bitcast=True), high)
        low = _rest(values, high).to(tl.int32)
        high = tl.where(_is_finite(values), high, values.to(DTYPE))
        return high, tl.where(_is_finite(high.to(tl.float32)), low, 0).to(tl.int16)


@triton.jit
def round_randomly(values, random, DTYPE: tl.constexpr):
    """To one of the two neighbours in a 16-bit dtype, by 16 random bits each: as likely as it is near."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = tl.minimum(values.to(tl.int32, bitcast=True), 0x7FFF0000)  # a NaN of all ones would turn into a zero
        return ((bits + random) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        exponent = _exponent(values)
        steps = tl.abs(values) * _power(10 - exponent)
        below = tl.floor(steps)
        up = tl.floor(steps - below + random.to(tl.float32) * (1.0 / 65536.0))
        rounded = _with_sign_of((below + up) * _power(exponent - 10), values).to(DTYPE)
        return tl.where(_is_finite(values), rounded, values.to(DTYPE))


@triton.jit
def _rest(values, high):
    """What float16 leaves of a magnitude, in units of its ulp / 2^16."""
    wide = high.to(tl.float32)
    return tl.floor((tl.abs(values) - tl.abs(wide)) * _power(26 - _exponent(wide)) + 0.5)


@triton.jit
def _exponent(values):
    """Of float16's spacing around float32 values."""
    return tl.maximum(((values.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127, -14)


@triton.jit
def _power(exponent):
    """2^exponent of a normal float32."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _is_finite(values):
    return (values.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000


@triton.jit
def _with_sign_of(magnitude, values):
    sign = values.to(tl.int32, bitcast=True) & -2147483648
    return (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
