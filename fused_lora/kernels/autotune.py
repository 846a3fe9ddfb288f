"""Opt-in tile choice by measurement, remembered on disk: one file a GPU and pair of versions, one entry a shape bucket.

Only kernels that write fresh outputs are tuned, so running one many times changes nothing.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import astuple
from functools import cache
from pathlib import Path

import torch
import triton
from triton.runtime.errors import OutOfResources

from .tiles import Gpu, Tile


def bucket(kernel: str, M: int, N: int, K: int, r: int, dtype: torch.dtype, *flags: bool) -> str:
    """The key of a shape: M up to the next power of two, the layer's own sizes exactly."""
    marks = "".join("ft"[flag] for flag in flags)
    return f"{kernel}/M{1 << max(M - 1, 0).bit_length()}/N{N}/K{K}/r{r}/{str(dtype).removeprefix('torch.')}/{marks}"


@cache
def _load(path: str) -> dict[str, list[int]]:
    file = Path(path)
    return json.loads(file.read_text()) if file.exists() else {}


def _store(path: str, tiles: dict[str, list[int]]) -> None:
    """Whole or not at all, whoever else is tuning."""
    folder = Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
        json.dump(tiles, file, indent=1, sort_keys=True)
    os.replace(file.name, path)


def _measure(run: Callable[[Tile], object], tile: Tile) -> float:
    try:
        return triton.testing.do_bench(lambda: run(tile), warmup=5, rep=30, return_mode="median")
    except OutOfResources:
        return float("inf")


def tuned(gpu: Gpu, key: str, default: Tile, candidates: Iterable[Tile], run: Callable[[Tile], object], like) -> Tile:
    """The fastest candidate for `key`, measured once; the default without autotuning, or where nothing can be timed.

    like is an operand of the call: on `meta`, or inside a CUDA graph's capture, there is no timing.
    """
    if gpu.tile_cache is None:
        return default
    known = _load(gpu.tile_cache)
    if key not in known:
        if not like.is_cuda or torch.cuda.is_current_stream_capturing():
            return default
        known[key] = astuple(min(dict.fromkeys([default, *candidates]), key=lambda tile: _measure(run, tile)))
        _store(gpu.tile_cache, known)
    return Tile(*known[key])
