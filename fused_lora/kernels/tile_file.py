"""The file of measured tiles: JSON, an entry a shape. Whatever becomes of it, computing goes on.

It may be damaged, somebody else's or on a full disk, and other processes write to it too. The first trouble is told in
a warning. A damaged file is replaced; where nothing can be written, this process remembers its own tiles.
"""

import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path

from .tiles import Tile

LOCK_SECONDS = 10  # others hold the lock for milliseconds, unless they were stopped


class TileFile:
    """What the file held when it was read last, and what this process has measured."""

    def __init__(self, path: str):
        self._path = Path(path)
        self._own: dict[str, list[int]] = {}
        self._entries: dict[str, object] = {}
        self._troubled, self._writable = False, True
        try:
            self._entries = self._read()
        except OSError as error:
            self._tell(f"cannot be read ({error}): tiles are measured anew")

    def get(self, key: str) -> Tile | None:
        """None for what is missing or no tile. Whether a tile may be launched is for `legal` to say."""
        entry = self._entries.get(key)
        is_tile = isinstance(entry, list) and [type(number) for number in entry] == [int] * 5
        return Tile(*entry) if is_tile else None

    def put(self, key: str, tile: Tile) -> None:
        """Adds an entry to all that are in the file by now, and writes it whole or not at all."""
        self._own[key] = self._entries[key] = list(astuple(tile))
        if not self._writable:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self._path):
                self._entries = self._read() | self._own
                beside = self._path.with_name(self._path.name + ".new")
                beside.write_text(json.dumps(self._entries, indent=1, sort_keys=True), "utf-8")
                os.replace(beside, self._path)
        except (OSError, ImportError) as error:
            self._writable = False
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
            warnings.warn(f"the file of measured tiles, {self._path}, {trouble}", RuntimeWarning, stacklevel=2)


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
