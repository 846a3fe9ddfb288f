import os
import subprocess
import sys

import pytest
import torch

from fused_lora import backends, choices, doctor
from tests.cards import CUDA


def test_prints_versions_backend_and_slow_points(capsys):
    doctor.main([])
    printed = capsys.readouterr().out
    for expected in ("torch", torch.__version__, "triton", "C compiler", "extension", "What would be slow here"):
        assert expected in printed


def test_without_a_gpu_it_says_what_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (point,) = doctor.slow_points()
    assert "plain torch" in point


def test_a_missing_compiler_is_named(monkeypatch, capsys):
    monkeypatch.setattr(backends, "host_compiler", lambda: None)
    doctor.main([])
    assert "C compiler  none" in capsys.readouterr().out


@pytest.mark.parametrize(("capability", "built", "guess"), [
    (86, False, True), (120, False, True), (90, False, True), (90, True, False),
])  # fmt: skip
def test_a_choice_that_nobody_measured_is_said_to_be_a_guess(capability, built, guess, card, monkeypatch):
    card(capability)
    if built:
        monkeypatch.setattr(backends, "extension_obstacle", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    said = "cuda:0: that triton is the fastest is a guess for this card; python -m fused_lora.tune measures it"
    assert (said in doctor.slow_points()) == guess
    choices.remember(CUDA, "one", {"triton": 1.0})
    assert (f"{said} (shapes so far: 1)" in doctor.slow_points()) == guess
    monkeypatch.setenv("FUSED_LORA_BACKEND", "triton")
    assert not any("guess" in point for point in doctor.slow_points())


def run_with(**variables):
    """As a person runs it, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fused_lora.doctor"]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=False)
    assert done.returncode == ("Every layer will raise" in done.stdout), done.stderr
    return done.stdout


def test_a_variable_that_is_wrong_is_said():
    printed = run_with(FUSED_LORA_BACKEND="cublas", FUSED_LORA_AUTOTUNE="yes")
    assert (
        "forced      refused: FUSED_LORA_BACKEND must be one of auto, cuda, triton, addmm, reference, got 'cublas'"
        in printed
    )
    failing = printed.partition("Every layer will raise here:\n")[2].splitlines()
    assert [line.split()[1] for line in failing] == ["FUSED_LORA_BACKEND", "FUSED_LORA_AUTOTUNE"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
@pytest.mark.parametrize("forced", ["cuda", "triton"])
def test_a_backend_that_will_raise_is_said(forced):
    printed = run_with(FUSED_LORA_BACKEND=forced)
    assert f"forced      FUSED_LORA_BACKEND={forced}\n" in printed
    assert f"Every layer will raise here:\n  - FUSED_LORA_BACKEND={forced} cannot run this call" in printed


def test_a_backend_that_runs_is_not_said_to_raise():
    assert "Every layer" not in run_with(FUSED_LORA_BACKEND="reference")


def test_an_extension_that_no_longer_loads_is_said(monkeypatch, capsys):
    monkeypatch.setattr(backends, "extension_obstacle", lambda: "the CUDA extension does not load, build it again")
    doctor.main([])
    assert "extension   the CUDA extension does not load, build it again" in capsys.readouterr().out


def test_its_help(capsys):
    with pytest.raises(SystemExit):
        doctor.main(["--help"])
    assert "what this machine has" in capsys.readouterr().out
