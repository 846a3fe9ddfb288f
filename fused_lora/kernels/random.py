"""Random bits by counter: a hash of (seed, row, column), computed wherever it is needed, never stored."""

import triton
import triton.language as tl


@triton.jit
def mix(h):
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= h >> 15
    h *= 0x846CA68B
    h ^= h >> 16
    return h


@triton.jit
def hash_bits(seed, row, col, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """32 bits for each entry of the tile at (row, col); hashing.hash_bits is the same function in torch."""
    offs_row = (row + tl.arange(0, BLOCK_ROWS)).to(tl.uint32)
    offs_col = (col + tl.arange(0, BLOCK_COLS)).to(tl.uint32)
    seed_lo = seed.to(tl.uint32)
    seed_hi = (seed >> 32).to(tl.uint32)
    # Two keys a row: with one, rows whose keys lie close together would share shifted masks.
    key_in = mix(mix(offs_row ^ seed_lo) + seed_hi)
    key_mid = mix(key_in + 0x9E3779B9)
    h = key_in[:, None] ^ (offs_col * 0x9E3779B9)[None, :]
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= h >> 15
    h += key_mid[:, None]
    h *= 0x846CA68B
    h ^= h >> 16
    return h


@triton.jit
def half_bits(seed, row, col, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """16 bits for each entry of the tile at (row, col), which begins at an even column; as hashing.half_bits."""
    h = hash_bits(seed, row, col // 2, BLOCK_ROWS, BLOCK_COLS // 2)
    return tl.interleave((h & 0xFFFF).to(tl.int32), (h >> 16).to(tl.int32))
