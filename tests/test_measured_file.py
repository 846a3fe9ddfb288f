"""A file of measurements: whatever is wrong with it, no error, and one warning."""

import fcntl
import json
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fused_lora import measured_file
from fused_lora.measured_file import MeasuredFile, bucket

ENTRY = [64, 64, 32, 4, 2]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "tiles.json"


def put_two(path):
    file = MeasuredFile(str(path))
    file.put("a", ENTRY)
    file.put("b", ENTRY)
    return file


def test_what_is_put_is_there_for_others(path):
    MeasuredFile(str(path)).put("a", ENTRY)
    other = MeasuredFile(str(path))
    assert (other.get("a"), other.get("b"), len(other)) == (ENTRY, None, 1)
    mask = stat.S_IMODE(path.parent.stat().st_mode) & 0o666
    assert stat.S_IMODE(path.stat().st_mode) == mask  # not the owner's alone


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[1]", b'"x"', b"null", b"[" * 100_000])
def test_a_damaged_file_is_replaced_with_one_warning(text, path):
    path.parent.mkdir()
    path.write_bytes(text)
    with pytest.warns(RuntimeWarning, match=r"tiles\.json, is damaged: it will be replaced") as told:
        put_two(path)
    assert len(told) == 1
    assert json.loads(path.read_text()) == {"a": [64, 64, 32, 4, 2], "b": [64, 64, 32, 4, 2]}


def forbidden(*_, **__):
    raise PermissionError(13, "Permission denied")


def in_a_file(path, monkeypatch):
    path.parent.write_text("no folder")


def as_a_folder(path, monkeypatch):
    path.mkdir(parents=True)


def unreadable(path, monkeypatch):
    path.parent.mkdir()
    path.write_text('{"theirs": [64, 64, 32, 4, 2]}')
    monkeypatch.setattr(type(path), "read_text", forbidden)


def unwritable(path, monkeypatch):
    monkeypatch.setattr(measured_file.os, "replace", forbidden)


@pytest.mark.parametrize("obstruct", [in_a_file, as_a_folder, unreadable, unwritable])
def test_what_cannot_be_used_is_told_once_and_entries_stay_in_memory(obstruct, path, monkeypatch):
    obstruct(path, monkeypatch)
    before = path.read_bytes() if path.is_file() else None
    with pytest.warns(RuntimeWarning, match=r"tiles\.json, cannot be (read|written)") as told:
        file = put_two(path)
    assert len(told) == 1
    assert (file.get("a"), file.get("b")) == (ENTRY, ENTRY)
    assert (path.read_bytes() if path.is_file() else None) == before


def test_a_folder_that_is_none_is_not_told_where_nothing_is_measured(path, monkeypatch):
    in_a_file(path, monkeypatch)
    assert len(MeasuredFile(str(path))) == 0


def test_a_lock_that_is_held_for_ever_is_not_waited_for(path, monkeypatch):
    monkeypatch.setattr(measured_file, "LOCK_SECONDS", 0.05)
    path.parent.mkdir()
    file = MeasuredFile(str(path))
    with open(f"{path}.lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.warns(RuntimeWarning, match="cannot be written .another process holds .*lock"):
            file.put("a", ENTRY)
    assert file.get("a") == ENTRY
    assert not path.exists()


def put_many(path, writer):
    file = MeasuredFile(path)
    for i in range(40):
        file.put(f"{writer} {i}", [64, 64, 32, 4, i + 1])


def test_writers_lose_nothing(path):
    """Each with a file of its own, as in processes of their own: the lock is the open file's."""
    with ThreadPoolExecutor() as threads:
        list(threads.map(put_many, [str(path)] * 3, range(3)))
    entries = json.loads(path.read_text())
    assert entries == {f"{writer} {i}": [64, 64, 32, 4, i + 1] for writer in range(3) for i in range(40)}


def test_a_reader_never_sees_half_a_file(path):
    MeasuredFile(str(path)).put("a", ENTRY)
    ended = threading.Event()

    def write():
        put_many(str(path), "writer")
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not ended.is_set():
        assert "a" in json.loads(path.read_text())
    writer.join()
    assert sorted(os.listdir(path.parent)) == ["tiles.json", "tiles.json.lock"]


def test_buckets_round_the_tokens_only():
    sizes = (512, 256, 16, torch.bfloat16)
    assert bucket("expand", 1000, *sizes, True) == bucket("expand", 1024, *sizes, True)
    assert bucket("expand", 1000, *sizes, True) != bucket("expand", 1025, *sizes, True)
    assert bucket("expand", 1000, *sizes, True) != bucket("expand", 1000, *sizes, False)
