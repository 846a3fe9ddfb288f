"""A file of what was measured on a card: JSON, an entry a shape. Whatever becomes of it, computing goes on.

It may be damaged, somebody else's or on a full disk, and other processes write to it too. The first trouble is told in
a warning. A damaged file is replaced; where nothing can be written, this process remembers its own measurements.
"""

import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

LOCK_SECONDS = 10  # others hold the lock for milliseconds, unless they were stopped


def bucket(what: str, M: int, N: int, K: int, r: int, dtype: torch.dtype, *flags: bool) -> str:
    """The key of a shape: M up to the next power of two, the layer's own sizes exactly."""
    marks = "".join("ft"[flag] for flag in flags)
    return f"{what}/M{1 << max(M - 1, 0).bit_length()}/N{N}/K{K}/r{r}/{str(dtype).removeprefix('torch.')}/{marks}"


class MeasuredFile:
    """What the file held when it was read last, and what this process has measured; writable until that has failed."""

    def __init__(self, path: str):
        self._path = Path(path)
        self._own: dict[str, object] = {}
        self._entries: dict[str, object] = {}
        self._troubled, self.writable = False, True
        try:
            self._entries = self._read()
        except OSError as error:
            if os.path.exists(path):  # else nobody has measured, and nobody need be told
                self._tell(f"cannot be read ({error}): what it held is measured anew")

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> object:
        """Whatever JSON holds under `key`, None for nothing: whether it makes sense is for the caller to say."""
        return self._entries.get(key)

    def put(self, key: str, entry: object) -> None:
        """Adds an entry to all that are in the file by now, and writes it whole or not at all."""
        self._own[key] = self._entries[key] = entry
        if not self.writable:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self._path):
                self._entries = self._read() | self._own
                beside = self._path.with_name(self._path.name + ".new")
                beside.write_text(json.dumps(self._entries, indent=1, sort_keys=True), "utf-8")
                os.replace(beside, self._path)
        except (OSError, ImportError) as error:
            self.writable = False
            self._tell(f"cannot be written ({error}): this process remembers its own")

    def _read(self) -> dict[str, object]:
        """Raises OSError for a file that is there and cannot be read."""
        try:
            entries = json.loads(self._path.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError):
            entries = None
        if isinstance(entries, dict):
            return entries
        self._tell("is damaged: it will be replaced")
        return {}

    def _tell(self, trouble: str) -> None:
        if not self._troubled:
            self._troubled = True
            warnings.warn(f"the file of measurements, {self._path}, {trouble}", RuntimeWarning, stacklevel=2)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """With no other process inside. Raises TimeoutError where one stays there, ImportError where there are no such
    locks."""
    import fcntl

    with open(f"{path}.lock", "a") as lock:
        until = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TimeoutError(f"another process holds {lock.name}") from None
                time.sleep(0.01)
        yield
