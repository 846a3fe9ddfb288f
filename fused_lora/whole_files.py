"""Files that are there whole or not at all, whenever the process is killed; and several in one folder, all together.

A rename replaces one file at once; there is none for several. So the new files are first made whole in a folder of
their own, and one rename of that folder decides: from then on they are what is read, wherever they still lie. After it
they move to their places, and what a killed process left to move, the next one moves. Files may be in folders of the
folder, one deep, each of which may be written and read by itself too.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BEGUN, DECIDED = ".being-written", ".written"


def write(path: Path, write: Callable[[Path], object]) -> None:
    """A new file by `write`, which gets its path, on the disk when this returns, and as readable as other new files."""
    path.touch()
    allowed = path.stat().st_mode
    write(path)
    path.chmod(allowed)  # safetensors makes files that only their owner reads
    flush(path)


def flush(path: Path) -> None:
    """To the disk; of a folder, the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_together(folder: Path, files: dict[str, Callable[[Path], object]]) -> None:
    """Puts files, by their paths in it, into a folder, which is made where it is missing; others in it stay. If writing
    fails, nothing is changed. Who reads without files_of sees the files move, one after another, in the last moment."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder.parent / DECIDED / folder.name).is_dir():  # which would be read in place of what is written now
        with _locked(folder.parent):
            _settle(folder.parent)
    with _locked(folder):
        _settle(folder)
        for inner in {(folder / name).parent for name in files} - {folder}:
            _settle(inner)
        begun = folder / BEGUN
        shutil.rmtree(begun, ignore_errors=True)  # a killed process's: others would hold the lock
        try:
            begun.mkdir()
            for name, writer in files.items():
                (begun / name).parent.mkdir(exist_ok=True)
                write(begun / name, writer)
            for path in {(begun / name).parent for name in files} | {begun}:
                flush(path)
        except BaseException:
            shutil.rmtree(begun, ignore_errors=True)
            raise
        begun.rename(folder / DECIDED)
        flush(folder)
        _settle(folder)


@contextmanager
def files_of(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Where the file of a name lies, for as long as the block lasts. The folder is only read."""
    with _locked(folder if folder.is_dir() else folder.parent, shared=True):
        decided = folder.parent / DECIDED / folder.name, folder / DECIDED
        yield lambda name: next((path for each in decided if (path := each / name).exists()), folder / name)


def exists(folder: Path) -> bool:
    """Whether there is a folder, or one that a killed process left to move."""
    return folder.is_dir() or (folder.parent / DECIDED / folder.name).is_dir()


def _settle(folder: Path) -> None:
    """Moves what has been decided to its place."""
    decided = folder / DECIDED
    if not decided.exists():
        return
    for path in sorted(path for path in decided.rglob("*") if path.is_file()):
        place = folder / path.relative_to(decided)
        place.parent.mkdir(exist_ok=True)
        path.replace(place)
        flush(place.parent)
    for inner in [path for path in decided.iterdir() if path.is_dir()]:
        inner.rmdir()
    decided.rmdir()


@contextmanager
def _locked(folder: Path, shared: bool = False) -> Iterator[None]:
    """Alone in a folder, or with others that read too; the lock ends with the process."""
    import fcntl  # not everywhere where the package can be imported

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks, where two that write at once disturb each other
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
