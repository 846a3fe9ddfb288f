"""Random numbers of a place: hashes of (seed, row, column) in plain torch, the same bits as the kernels make."""

import torch
from torch import Tensor

_U32 = 0xFFFFFFFF


def _mix(h: Tensor) -> Tensor:
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & _U32
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B) & _U32
    return h ^ (h >> 16)


def hash_bits(M: int, K: int, seed: Tensor, first: int = 0) -> Tensor:
    """(M, K) int64 in [0, 2^32), rows from `first` on: a hash of (seed, row, column), the same wherever it is made."""
    rows = torch.arange(first, first + M, device=seed.device, dtype=torch.int64)
    cols = torch.arange(K, device=seed.device, dtype=torch.int64)
    # Two keys a row: with one, rows whose keys lie close together would share shifted masks.
    key_in = _mix((_mix((rows ^ seed) & _U32) + ((seed >> 32) & _U32)) & _U32)
    key_mid = _mix((key_in + 0x9E3779B9) & _U32)
    h = key_in[:, None] ^ ((cols * 0x9E3779B9) & _U32)[None, :]
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & _U32
    h = h ^ (h >> 15)
    h = (h + key_mid[:, None]) & _U32
    h = (h * 0x846CA68B) & _U32
    return h ^ (h >> 16)


def half_bits(rows: int, cols: int, seed: Tensor, first: int = 0) -> Tensor:
    """(rows, cols) int64 in [0, 2^16), rows from `first` on: two neighbours share the halves of one hash."""
    h = hash_bits(rows, (cols + 1) // 2, seed, first)
    return torch.stack((h & 0xFFFF, h >> 16), dim=-1).flatten(-2)[:, :cols]


# Of a group of 32 columns: what its hash is multiplied by for each pair of them.
_FACTORS = [(pair * 0x9E3779B9 ^ 0xC2B2AE35) & _U32 | 1 for pair in range(16)]


def _fold(a: Tensor, b: Tensor | int) -> Tensor:
    """A product of 64 bits: its upper half, exclusive or its lower one."""
    product = a * b
    return ((product >> 32) ^ product) & _U32


def mask_numbers(M: int, K: int, seed: Tensor, first: int = 0) -> Tensor:
    """(M, K) int64 in [0, 2^15), rows from `first` on: one hash of (seed, row, 32 columns) for 32 entries."""
    # The seed is mixed before rows are: rows of neighbouring seeds would be each other's otherwise.
    low = _mix(((seed & _U32) + 0x9E3779B9) & _U32)
    high = _mix(((low ^ (seed >> 32 & _U32)) + 0x9E3779B9) & _U32)
    rows = torch.arange(first, first + M, device=seed.device, dtype=torch.int64)
    groups = torch.arange((K + 31) // 32, device=seed.device, dtype=torch.int64)
    row_keys = _mix((_mix(rows ^ low) + high) & _U32)
    group_keys = _fold(row_keys[:, None] ^ (groups * 0x9E3779B9 & _U32), 0x7FEB352D)
    words = torch.stack([_fold(group_keys, factor) for factor in _FACTORS], dim=-1)
    return torch.stack((words & 0x7FFF, words >> 16 & 0x7FFF), dim=-1).flatten(1)[:, :K]


_LAST_PICKED = 0x7C00  # infinity, where numbers are read as float16, which is how CUDA compares them, two at once


def mask_threshold(p: float) -> int:
    """Which entries are dropped, p to the nearest 2^-15: those whose numbers are from this one to 0x7C00. For p above
    31 / 32, where no interval is as long, these are the kept ones, 1 - p of all, and 2^16 is added."""
    keeps = p > 31 / 32
    return _LAST_PICKED + 1 - round((1 - p if keeps else p) * 2**15) + (keeps << 16)


def kept(numbers: Tensor, threshold: int | Tensor) -> Tensor:
    """Which of mask_numbers' entries are kept, by one threshold or by one of each."""
    picked = (numbers >= (threshold & 0xFFFF)) & (numbers <= _LAST_PICKED)
    return picked == (threshold > 0xFFFF)
