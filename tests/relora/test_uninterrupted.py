"""Ctrl-C in the middle of a step: the step is done, nothing is lost, and then it is heard."""

import signal
import threading

import pytest
import torch

from fused_lora.formats import FP8, NF4, merging
from fused_lora.relora import controller
from fused_lora.relora.uninterrupted import uninterrupted
from tests.modules.bases import assert_same
from tests.ops.problem import DEVICES
from tests.relora.test_controller import Run
from tests.relora.test_stored import OverCodes


@pytest.fixture(autouse=True)
def _hears():
    """Processes in a shell's background begin deaf."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("residual_device", ["weight", "cpu"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", ["merge_parts", "optimizer_reset", "wrap", "unwrap"])
def test_ctrl_c_within_a_step_loses_nothing(place, device, residual_device, monkeypatch):
    """Before and after what a step does in each place; the bits that follow are those of a run that was left alone."""
    alone, stopped = (Run(device, torch.bfloat16, residual_device=residual_device) for _ in range(2))
    at = {"wrap": 4}.get(place, 10)
    real = getattr(controller, place)

    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGINT)
        result = real(*args, **options)
        signal.raise_signal(signal.SIGINT)
        return result

    for run in (alone, stopped):
        run.train(at - (place != "unwrap"))
    monkeypatch.setattr(controller, place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        stopped.relora.finish() if place == "unwrap" else stopped.train(1)
    monkeypatch.undo()
    if place == "unwrap":
        alone.relora.finish()
        assert stopped.relora.finished
    else:
        alone.train(1 + 4)
        assert stopped.relora.steps == at
        stopped.train(4)
    assert all(torch.equal(value, stopped.weights()[name]) for name, value in alone.weights().items())


def test_handlers_are_put_back_and_called_once():
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    try:
        handler = signal.getsignal(signal.SIGINT)
        with uninterrupted(), uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert not heard
        assert heard == [1]
        assert signal.getsignal(signal.SIGINT) is handler
        with pytest.raises(ZeroDivisionError), uninterrupted():
            1 / 0  # noqa: B018
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_a_thread_there_is_nothing_to_wait_for():
    done = []

    def work():
        with uninterrupted():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]


@pytest.mark.parametrize("form", [FP8("rows"), NF4()], ids=str)
def test_ctrl_c_within_a_restart_over_codes(form, monkeypatch):
    alone, stopped = OverCodes(form), OverCodes(form)
    real = merging._write

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    alone.train(4)
    stopped.train(2)
    monkeypatch.setattr(merging, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stopped.train(1)
    monkeypatch.undo()
    assert (stopped.relora.steps, stopped.relora.cycle) == (3, 1)
    stopped.train(1)
    assert_same(alone.everything(), stopped.everything())
