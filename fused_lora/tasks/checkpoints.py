"""Checkpoints of all tasks of a loop at one moment, each in a folder of its own: all of them are there, or none.

A checkpoint is a folder with a number: index.json, and for each task that ran a folder by its name, with its adapter
and training.pt. It is written beside its place, flushed to the disk and renamed. One process at a time writes.
"""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..adapters.layers import modules_of
from ..whole_files import flush, write

INDEX, STATE, BEGUN = "index.json", "training.pt", ".being-written"
FIELDS = ("passes", "running", "ended", "lora_dtype", "base")  # of the index
MARKED = 64  # entries of a weight, by which it is known again
NUMBERED = "[0-9]" * 7  # whoever keeps something beside them calls it otherwise


def save(folder: Path, index: dict, tasks: dict[str, Callable[[Path], object]], keep: int = 2) -> Path:
    """Writes the next one, tasks by functions that fill their folders, and deletes all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    begun, place = folder / BEGUN, folder / f"{_number(folder) + 1:07d}"
    shutil.rmtree(begun, ignore_errors=True)  # a killed process's
    begun.mkdir()
    for name, fill in tasks.items():
        (begun / name).mkdir()
        fill(begun / name)
        flush(begun / name)
    write(begun / INDEX, lambda path: path.write_text(json.dumps(index, indent=2)))
    flush(begun)
    begun.rename(place)
    flush(folder)
    for old in set(folder.glob(NUMBERED)) - set(_all(folder)[-keep:]):
        (old / INDEX).unlink(missing_ok=True)  # so that half of one is none
        shutil.rmtree(old)
    return place


def newest(folder: Path) -> Path | None:
    """The last one that is whole, or None."""
    return found[-1] if (found := _all(folder)) else None


def read_index(place: Path) -> dict:
    """What save was given; ValueError where it is damaged."""
    try:
        return json.loads((place / INDEX).read_text())
    except ValueError as error:
        raise ValueError(f"{place / INDEX} is damaged: remove {place} to go on from an earlier one ({error})") from None


def marks(modules: dict[str, nn.Module]) -> dict[str, int]:
    """By which modules' weights are known again: a hash of some entries. The device is asked once."""
    if not modules:
        return {}
    own = [module.weight.detach().flatten()[:MARKED].double() for module in modules.values()]
    rows = torch.stack([nn.functional.pad(each, (0, MARKED - len(each))) for each in own]).cpu()
    return {name: zlib.crc32(row.numpy().tobytes()) for name, row in zip(modules, rows, strict=True)}


def check_same(place: Path, index: dict, model: nn.Module, lora_dtype: torch.dtype | None) -> None:
    """Whether a checkpoint is of tasks over this model; ValueError naming the argument where it is not."""
    lacking = [field for field in FIELDS if field not in index]
    if lacking:
        raise ValueError(f"{place / INDEX} is damaged, or of another version: it has no {lacking[0]}")
    if index["lora_dtype"] != str(lora_dtype):
        raise ValueError(f"lora_dtype must be {index['lora_dtype']} as in {place}, got {lora_dtype}")
    modules, base = modules_of(model), index["base"]
    missing = sorted(name for name in base if not hasattr(modules.get(name), "weight"))
    if missing:
        raise ValueError(f"model must be that of {place}, and has no {missing[0]}")
    for name, mark in marks({name: modules[name] for name in base}).items():
        if mark != base[name]:
            raise ValueError(f"model must be that of {place}, and {name}.weight is another")


def write_state(place: Path, state: dict) -> None:
    """What a task has beside its adapter."""
    write(place / STATE, lambda path: torch.save(state, path))


def read_state(place: Path, task: dict, device: torch.device) -> dict:
    """What write_state wrote; ValueError where it is damaged, or not of what is remembered of a task."""
    try:
        state = torch.load(place / STATE, map_location=device, weights_only=True)
    except Exception as error:
        raise ValueError(f"{place / STATE} is damaged: {error}") from None
    for argument, value in state["task"].items():
        if task.get(argument) != value:
            raise ValueError(f"{argument} must be {value!r} as in {place}, got {task.get(argument)!r}")
    return state


def _number(folder: Path) -> int:
    return int(found.name) if (found := newest(folder)) else 0


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(NUMBERED) if (path / INDEX).exists())
