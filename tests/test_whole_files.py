"""Files of a folder that change together: whenever the process is killed, those that were there or the new ones."""

import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from fused_lora import whole_files

NAMES = ("a", "b", "c")


def save(folder, word):
    whole_files.write_together(folder, {name: lambda path: path.write_text(word) for name in NAMES})


def words(folder):
    """What a reader finds."""
    with whole_files.files_of(folder) as place:
        return [place(name).read_text() for name in NAMES]


class Killed(BaseException):
    """As a process that is killed, nothing cleans up after it."""


def kill_at(monkeypatch, call):
    """The file system's changes, of which one is never done."""
    left = [call]

    def counted(real):
        def change(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*args, **kwargs)

        return change

    for owner, name in ((os, "rename"), (os, "replace"), (os, "rmdir"), (os, "mkdir"), (os, "unlink"), (os, "fsync")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    for name in ("rename", "replace", "rmdir", "mkdir", "touch", "write_text", "chmod"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    return left


def found_by_kills(tmp_path, monkeypatch, save, read, check):
    """What a reader finds where "new" was saved over "old" and killed at its first change, at its second, and so on to
    the end; check() a folder after the save that follows."""
    found, call, done = [], 0, False
    while not done:
        folder = tmp_path / str(call)
        save(folder, "old")
        with monkeypatch.context() as patch:
            left = kill_at(patch, call)
            with suppress(Killed):
                save(folder, "new")
            done = left[0] >= 0
        found.append(read(folder))
        save(folder, "next")
        check(folder)
        call += 1
    return found


@pytest.mark.parametrize("names", [("a", "b", "c"), ("a", "x/a", "x/b", "y/a")], ids=["flat", "folders"])
def test_killed_at_any_change(tmp_path, monkeypatch, names):
    """From one point on it is the new one, before it the old one, and the next save goes through."""
    monkeypatch.setattr(sys.modules[__name__], "NAMES", names)

    def check(folder):
        assert words(folder) == ["next"] * len(NAMES)
        assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == list(NAMES)
        assert not list(folder.rglob(".*"))

    found = found_by_kills(tmp_path, monkeypatch, save, words, check)
    old, new = (["old"] * len(NAMES), ["new"] * len(NAMES))
    point = found.index(new)
    assert found == [old] * point + [new] * (len(found) - point)
    assert 5 < point < len(found) - 4


def test_a_folder_that_is_written_by_itself_after_its_parent_was_killed(tmp_path, monkeypatch):
    """Is the newer one, wherever the parent's files were left."""
    names = ("x/a", "x/b", "y/a")
    monkeypatch.setattr(sys.modules[__name__], "NAMES", names)

    def save_inner(folder, word):
        """The save that follows a kill is left to check."""
        if word != "next":
            save(folder, word)

    def check_after_kill(folder):
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[__name__], "NAMES", ("a", "b"))
            save(folder / "x", "newest")
            assert words(folder / "x") == ["newest"] * 2
        assert words(folder)[:2] == ["newest"] * 2

    found_by_kills(tmp_path, monkeypatch, save_inner, words, check_after_kill)


def test_fifty_kills(tmp_path):
    """Real ones, at any moment of a process that does nothing else than save."""
    save(tmp_path, "0")
    root = Path(whole_files.__file__).parent.parent
    subprocess.run([sys.executable, "-c", FORKING, tmp_path], check=True, timeout=250, cwd=root)
    assert len(set(words(tmp_path))) == 1


FORKING = """
import os, random, signal, sys, time
from pathlib import Path
from fused_lora import whole_files

folder, dice = Path(sys.argv[1]), random.Random(0)
seen = set()
for kill in range(50):
    child = os.fork()
    if child == 0:
        number = 0
        while True:
            number += 1
            word = f"{kill}-{number} " * 20_000
            files = {name: lambda path: path.write_text(word) for name in "abc"}
            whole_files.write_together(folder, files)
    time.sleep(dice.uniform(0.005, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with whole_files.files_of(folder) as place:
        found = {place(name).read_text() for name in "abc"}
    assert len(found) == 1, [each[:20] for each in found]
    seen |= found
assert len(seen) > 10, len(seen)
"""


def test_a_full_disk_keeps_what_was_there(tmp_path):
    save(tmp_path, "old")

    def full(path):
        path.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        whole_files.write_together(tmp_path, {"a": lambda path: path.write_text("new"), "b": full, "c": full})
    assert words(tmp_path) == ["old"] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == list(NAMES)


def test_other_files_stay(tmp_path):
    (tmp_path / "notes").write_text("mine")
    save(tmp_path, "old")
    save(tmp_path, "new")
    assert (tmp_path / "notes").read_text() == "mine"


def test_two_that_write_at_once(tmp_path):
    """As the ranks of a data parallel run do."""
    threads = [threading.Thread(target=lambda i=i: [save(tmp_path, str(i)) for _ in range(10)]) for i in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "c").exists():
            assert len(set(words(tmp_path))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == list(NAMES)


def test_files_that_others_may_read(tmp_path):
    old = os.umask(0o022)
    try:
        whole_files.write_together(tmp_path, {"a": lambda path: (path.write_text("x"), path.chmod(0o600))})
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644
