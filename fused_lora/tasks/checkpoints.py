"""Checkpoints of all tasks of a loop at one moment, each in a folder of its own: all of them are there, or none.

A checkpoint is a folder with a number: index.json, and for each task that ran a folder by its name. It is written
beside its place, flushed to the disk and renamed. One process at a time writes.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from ..whole_files import flush, write

INDEX, BEGUN = "index.json", ".being-written"
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


def _number(folder: Path) -> int:
    return int(found.name) if (found := newest(folder)) else 0


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(NUMBERED) if (path / INDEX).exists())
