"""Checkpoints: what is saved comes back, and a killed process leaves only whole ones."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from fused_lora.pretrain import checkpoint


def contents(step):
    torch.manual_seed(step)
    model = {"a": torch.randn(40, 30).bfloat16(), "b.weight": torch.randn(7, 5).T, "c": torch.full((3,), float(step))}
    return model, {"step": step, "optimizer": {"state": {0: {"exp_avg": torch.randn(9)}}}, "names": ["x"]}


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


@pytest.mark.parametrize("manifest", ["", "{}", "[]", '{"step": 3'])
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
