"""Opt-in tile choice by measurement, remembered on disk: one file a GPU and pair of versions, one entry a shape bucket.

Only kernels that write fresh outputs are tuned, so running one many times changes nothing.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import astuple
from functools import cache
from pathlib import Path
from threading import Lock

import torch
import triton
from torch import distributed
from triton.runtime.errors import OutOfResources

from ..measured_file import MeasuredFile
from .tiles import Gpu, Tile, legal

_file = cache(MeasuredFile)
_choices: dict[tuple[str, str], Tile] = {}  # by file and key
_choosing = Lock()


def _as_tile(entry: object) -> Tile | None:
    """An entry of the file; None for what is missing or no tile. Whether it may be launched is for `legal` to say."""
    is_tile = isinstance(entry, list) and [type(number) for number in entry] == [int] * 5
    return Tile(*entry) if is_tile else None


def _measure(run: Callable[[Tile], object], tile: Tile) -> float:
    try:
        return triton.testing.do_bench(lambda: run(tile), warmup=5, rep=30, return_mode="median")
    except OutOfResources:
        return float("inf")


def tuned(
    gpu: Gpu, key: str, default: Tile, candidates: Iterable[Tile], run: Callable[[Tile], object], like, tma: bool
) -> Tile:
    """The fastest candidate for `key`, measured once; the default without autotuning, or where nothing can be timed.

    like is an operand of the call: on `meta`, or inside a CUDA graph's capture, there is no timing. tma: whether the
    copy engine reads the kernel's operands; a tile of the file that is not legal then is measured anew.
    What a process has chosen, it keeps; in a process group it is what the first rank chose that came to `key`.
    """
    if gpu.tile_cache is None:
        return default
    with _choosing:  # one thread measures at a time
        choice = _choices.get((gpu.tile_cache, key))
        return _choose(gpu, key, default, candidates, run, like, tma) if choice is None else choice


def _choose(gpu: Gpu, key: str, default: Tile, candidates, run, like, tma: bool) -> Tile:
    file = _file(gpu.tile_cache)
    known = _as_tile(file.get(key))
    if known is not None and not legal(known, gpu, like.dtype.itemsize, tma):
        known = None
    if not like.is_cuda:  # nothing is computed, and nothing decided
        return known or default
    choice = known or default
    measures = known is None and not torch.cuda.is_current_stream_capturing()
    if measures:
        choice = min(dict.fromkeys([default, *candidates]), key=lambda tile: _measure(run, tile))
    choice = _choices[gpu.tile_cache, key] = _of_all_ranks(f"{Path(gpu.tile_cache).name}/{key}", choice)
    if measures:
        file.put(key, list(astuple(choice)))
    return choice


def _of_all_ranks(name: str, choice: Tile) -> Tile:
    """The first choice of this process group under `name`.

    Ranks may tune different shapes, or at different times, so that any collective could wait for ever. The group's
    store keeps the first value that it is given and answers at once. What was chosen before the group was there stays.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return choice
    store = distributed.distributed_c10d._get_default_store()
    try:
        return Tile(*json.loads(store.compare_set(f"fused_lora/{name}", "", json.dumps(astuple(choice)))))
    except RuntimeError:  # its server has ended, or it only pretends to be one
        return choice
