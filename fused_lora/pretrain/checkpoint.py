"""Checkpoints that are there whole or not at all, whenever the process is killed.

A checkpoint is a folder step-<number>: the model's tensors (safetensors), the state of everything else (torch.save),
and a manifest with their sizes. It is written beside its place, flushed to the disk and renamed; where one is removed,
its manifest goes first.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

MODEL, TRAINING, MANIFEST = "model.safetensors", "training.pt", "manifest.json"
NAME = re.compile(r"step-(\d+)")


def save(folder: Path, step: int, model: dict[str, Tensor], training: dict, keep: int = 2) -> Path:
    """Writes folder/step-<step> and then deletes all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".writing-*"):  # by a process that was killed
        shutil.rmtree(left)
    place = folder / f"step-{step:07d}"
    new = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        tensors = {name: tensor.detach().contiguous() for name, tensor in model.items()}
        _write(new / MODEL, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        _write(new / TRAINING, lambda path: torch.save(training, path))
        sizes = {name: (new / name).stat().st_size for name in (MODEL, TRAINING)}
        _write(new / MANIFEST, lambda path: path.write_text(json.dumps({"step": step, "bytes": sizes})))
        new.chmod(0o777 & ~_umask())
        _flush(new)
        _remove(place)
        new.rename(place)
        _flush(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    for old in checkpoints(folder)[:-keep]:
        _remove(old)
    return place


def checkpoints(folder: Path) -> list[Path]:
    """The whole ones, oldest first. What a killed process was writing is not among them."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and (path / MANIFEST).exists()]
    return sorted(found, key=lambda path: int(NAME.fullmatch(path.name)[1]))


def load(place: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict]:
    """(the model's tensors, the rest) of a checkpoint; ValueError for one that is not whole."""
    try:
        manifest = json.loads((place / MANIFEST).read_text())
        sizes = manifest["bytes"]
    except FileNotFoundError:
        raise ValueError(f"{place} is no checkpoint: it has no {MANIFEST}") from None
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{place / MANIFEST} is damaged: remove {place} to go on from an earlier one") from None
    for name, size in sizes.items():
        found = (place / name).stat().st_size if (place / name).exists() else 0
        if found != size:
            raise ValueError(f"{place} is cut short: {name} has {found} bytes of {size}")
    try:
        return load_file(place / MODEL, str(device)), torch.load(place / TRAINING, map_location=device)
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"{place} is damaged: remove it to go on from an earlier one ({error})") from None


def _remove(place: Path) -> None:
    if place.exists():
        (place / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(place)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    write(path)
    path.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner reads
    _flush(path)


def _flush(path: Path) -> None:
    """To the disk; of a folder, the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
