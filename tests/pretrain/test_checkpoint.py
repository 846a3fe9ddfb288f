"""Checkpoints: what is saved comes back, and a killed process leaves only whole ones."""

import fcntl
import json
import multiprocessing
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event, Thread

import pytest
import torch

from fused_lora.pretrain import checkpoint


def contents(step):
    """The same for a step in any thread: torch's own generator is one for all threads, so that it would not be."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(step))
    model = {"a": draw(40, 30).bfloat16(), "b.weight": draw(7, 5).T, "c": torch.full((3,), float(step))}
    return model, {"step": step, "optimizer": {"state": {0: {"exp_avg": draw(9)}}}, "names": ["x"]}


def assert_whole(place):
    model, training = checkpoint.load(place)
    want, want_training = contents(training["step"])
    assert all(torch.equal(model[name], value) for name, value in want.items())
    exp_avg = training["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(exp_avg, want_training["optimizer"]["state"][0]["exp_avg"])


def test_what_is_saved_comes_back(tmp_path):
    place = checkpoint.save(tmp_path / "run", 12, *contents(12))
    assert place.name == "step-0000012"
    assert checkpoint.checkpoints(tmp_path / "run") == [place]
    assert_whole(place)


def test_the_newest_are_kept(tmp_path):
    for step in (5, 50, 6, 500):
        checkpoint.save(tmp_path, step, *contents(step), keep=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-0000050", "step-0000500"]


def test_saved_over_itself(tmp_path):
    checkpoint.save(tmp_path, 3, *contents(2))
    place = checkpoint.save(tmp_path, 3, *contents(3))
    assert checkpoint.load(place)[1]["step"] == 3


def test_files_that_others_may_read(tmp_path):
    old = os.umask(0o022)
    try:
        place = checkpoint.save(tmp_path, 1, *contents(1))
    finally:
        os.umask(old)
    assert {oct(path.stat().st_mode & 0o777) for path in place.iterdir()} == {"0o644"}
    assert place.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.TRAINING])
def test_one_that_is_cut_short_is_refused(name, tmp_path):
    place = checkpoint.save(tmp_path, 1, *contents(1))
    whole = (place / name).read_bytes()
    (place / name).write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=f"is cut short: {name} has {len(whole) - 5} bytes of {len(whole)}"):
        checkpoint.load(place)
    (place / name).unlink()
    with pytest.raises(ValueError, match=f"is cut short: {name} has 0 bytes"):
        checkpoint.load(place)


def test_no_checkpoint(tmp_path):
    assert checkpoint.checkpoints(tmp_path / "nothing") == []
    with pytest.raises(ValueError, match="is no checkpoint"):
        checkpoint.load(tmp_path)


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, *contents(1))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, *contents(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]
    assert_whole(tmp_path / "step-0000001")


def test_the_mask_of_new_files_is_left_alone(tmp_path, monkeypatch):
    """It is the whole process's: other threads make files meanwhile."""
    masks = []
    monkeypatch.setattr(os, "umask", masks.append)
    checkpoint.save(tmp_path, 1, *contents(1))
    assert masks == []


def save_for_long(folder, inside):
    """Stops in the middle."""

    def wait(*_):
        inside.set()
        time.sleep(600)

    checkpoint.torch.save = wait
    checkpoint.save(folder, 7, *contents(7))


def test_what_another_process_writes_is_cleared_away_once_it_is_gone(tmp_path):
    context = multiprocessing.get_context("spawn")
    inside = context.Event()
    other = context.Process(target=save_for_long, args=(tmp_path, inside))
    other.start()
    assert inside.wait(120)
    (left,) = tmp_path.glob(".writing-*")
    assert_whole(checkpoint.save(tmp_path, 8, *contents(8)))
    assert (left / checkpoint.MODEL).exists()
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    place = checkpoint.save(tmp_path, 8, *contents(8))
    assert list(tmp_path.iterdir()) == [place]


def test_what_another_thread_is_writing_survives(tmp_path, monkeypatch):
    inside, go_on, write = Event(), Event(), torch.save

    def waiting(training, path):
        if training["step"] == 7:
            inside.set()
            assert go_on.wait(60)
        write(training, path)

    monkeypatch.setattr(checkpoint.torch, "save", waiting)
    other = Thread(target=checkpoint.save, args=(tmp_path, 7, *contents(7)))
    other.start()
    assert inside.wait(60)
    checkpoint.save(tmp_path, 8, *contents(8))
    go_on.set()
    other.join()
    assert_whole(tmp_path / "step-0000007")


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def missing(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    (tmp_path / ".writing-other").mkdir()
    (tmp_path / ".writing-other" / checkpoint.MANIFEST).touch()
    assert_whole(checkpoint.save(tmp_path, 8, *contents(8)))
    assert (tmp_path / ".writing-other").exists()


def save_forty(folder, first):
    for step in range(first, first + 40):
        checkpoint.save(folder, step, *contents(step))


def test_two_runs_in_one_folder(tmp_path):
    """Each keeps the newest, so that they also delete each other's."""
    with ThreadPoolExecutor() as threads:
        list(threads.map(save_forty, [tmp_path] * 2, (100, 1000)))
    whole = checkpoint.checkpoints(tmp_path)
    assert whole[-1].name == "step-0001039"
    for place in whole:
        assert_whole(place)
    assert sorted(tmp_path.iterdir()) == whole


def save_for_ever(folder, began):
    step = 1
    while True:
        checkpoint.save(folder, step, *contents(step))
        began.set()
        step = step % 4 + 1


def test_fifty_kills_while_saving(tmp_path):
    context, rng = multiprocessing.get_context("fork"), random.Random(0)
    for _ in range(50):
        began = context.Event()
        process = context.Process(target=save_for_ever, args=(tmp_path, began))
        process.start()
        assert began.wait(20)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        whole = checkpoint.checkpoints(tmp_path)
        assert whole
        for place in whole:
            assert_whole(place)


@pytest.mark.parametrize("manifest", ["", "{}", "[]", '{"step": 3', '{"bytes": 3}', "3"])
def test_a_damaged_manifest_is_named(tmp_path, manifest):
    place = checkpoint.save(tmp_path, 3, {"w": torch.ones(2)}, {})
    (place / checkpoint.MANIFEST).write_text(manifest)
    with pytest.raises(ValueError, match=r"manifest.json is damaged: remove .*step-0000003"):
        checkpoint.load(place)


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.TRAINING])
def test_a_damaged_file_of_the_right_size_is_refused(tmp_path, name):
    place = checkpoint.save(tmp_path, 3, {"w": torch.ones(2)}, {"x": torch.ones(100)})
    size = (place / name).stat().st_size
    (place / name).write_bytes(b"\xff" * size)
    with pytest.raises(ValueError, match=r"step-0000003 is damaged"):
        checkpoint.load(place)


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.TRAINING])
def test_every_changed_byte_is_seen(tmp_path, name):
    place = checkpoint.save(tmp_path, 3, *contents(3))
    whole = (place / name).read_bytes()
    message = f"step-0000003 is damaged: {name} is not what was written, by its checksum"
    for at in [*range(0, len(whole), len(whole) // 40), len(whole) - 1]:
        (place / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=message):
            checkpoint.load(place)
    (place / name).write_bytes(whole)
    assert_whole(place)


def test_a_checkpoint_from_before_there_were_checksums(tmp_path):
    place = checkpoint.save(tmp_path, 3, *contents(3))
    manifest = json.loads((place / checkpoint.MANIFEST).read_text())
    del manifest["sha256"]
    (place / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    assert_whole(place)


class Surprise:
    """What runs code where it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit",)


def test_nothing_runs_when_one_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # which is about calls that do not say
    place = checkpoint.save(tmp_path, 3, {"w": torch.ones(2)}, {"x": Surprise()})
    with pytest.raises(ValueError, match="step-0000003 is damaged"):
        checkpoint.load(place)
