"""Checkpoints that are there whole or not at all, whenever the process is killed.

A checkpoint is a folder step-<number>: the model's tensors (safetensors), the state of everything else (torch.save),
and a manifest with their sizes and checksums. It is written beside its place, flushed to the disk and renamed; where
one is removed, its manifest goes first. Who writes one holds a lock on its manifest, which ends with the process: by
that others know what they may clear away.
"""

import fcntl
import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..whole_files import flush, write

MODEL, TRAINING, MANIFEST = "model.safetensors", "training.pt", "manifest.json"
NAME = re.compile(r"step-(\d+)")


def save(folder: Path, step: int, model: dict[str, Tensor], training: dict, keep: int = 2) -> Path:
    """Writes folder/step-<step> and then deletes all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    place = folder / f"step-{step:07d}"
    with _writing(folder) as (new, manifest):
        tensors = {name: tensor.detach().contiguous() for name, tensor in model.items()}
        write(new / MODEL, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        write(new / TRAINING, lambda path: torch.save(training, path))
        files = [new / MODEL, new / TRAINING]
        sizes = {path.name: path.stat().st_size for path in files}
        checksums = {path.name: _checksum(path) for path in files}
        json.dump({"step": step, "bytes": sizes, "sha256": checksums}, manifest)
        manifest.flush()
        flush(new / MANIFEST)
        flush(new)
        _remove(place)
        new.rename(place)
        flush(folder)
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
        # The first checkpoints had no checksums.
        sizes, checksums = dict(manifest["bytes"]), dict(manifest.get("sha256", {}))
    except FileNotFoundError:
        raise ValueError(f"{place} is no checkpoint: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{place / MANIFEST} is damaged: remove {place} to go on from an earlier one") from None
    for name, size in sizes.items():
        found = (place / name).stat().st_size if (place / name).exists() else 0
        if found != size:
            raise ValueError(f"{place} is cut short: {name} has {found} bytes of {size}")
    for name, checksum in checksums.items():
        if _checksum(place / name) != checksum:
            raise ValueError(
                f"{place} is damaged: {name} is not what was written, by its checksum; remove {place} to go on from an "
                "earlier one"
            )
    try:
        training = torch.load(place / TRAINING, map_location=device, weights_only=True)
        return load_file(place / MODEL, str(device)), training
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"{place} is damaged: remove it to go on from an earlier one ({error})") from None


@contextmanager
def _writing(folder: Path) -> Iterator[tuple[Path, TextIO]]:
    """A folder to write to and its manifest, open and locked. It is removed if writing fails."""
    name = secrets.token_hex(8)
    begun, new = folder / f".begun-{name}", folder / f".writing-{name}"
    begun.mkdir()
    with (begun / MANIFEST).open("w") as manifest:
        with suppress(OSError):  # a file system without locks, where nothing is cleared away
            fcntl.flock(manifest, fcntl.LOCK_EX)
        begun.rename(new)  # so that there is no moment in which others see it without its lock
        try:
            yield new, manifest
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise


def _clear(folder: Path) -> None:
    """Removes what killed processes were writing; not what others are."""
    for left in folder.glob(".writing-*"):
        if not _is_locked(left / MANIFEST):
            shutil.rmtree(left, ignore_errors=True)  # another process may do the same


def _is_locked(path: Path) -> bool:
    """Whether a file is locked, or could be for all that can be seen."""
    try:
        with path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _remove(place: Path) -> None:
    (place / MANIFEST).unlink(missing_ok=True)
    with suppress(FileNotFoundError):  # another process may do the same
        shutil.rmtree(place)


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
