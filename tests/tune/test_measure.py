"""What is measured and what is refused, with capture and clock stood in for; on a GPU, in earnest."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_lora import addmm, backends, choices, lora_linear
from fused_lora.tune import measure as of
from fused_lora.tune.measure import measure
from fused_lora.tune.shapes import Shape
from tests.cards import forget

CPU, SHAPE = torch.device("cpu"), Shape(37, 29, 43, 5)


@pytest.fixture
def without_a_gpu(monkeypatch):
    """Steps run once where they would be captured; every backend takes a microsecond for each letter of its name."""
    monkeypatch.setattr(of, "capture", lambda step: (None, step()))
    monkeypatch.setattr(of, "time_graphs", lambda graphs, device: {name: float(len(name)) for name in graphs})
    obstacles = {"cuda": "not built"}
    monkeypatch.setattr(backends, "lora_linear_obstacle", lambda name, *_, **__: obstacles.get(name))
    monkeypatch.setenv("FUSED_LORA_BACKEND", "auto")
    return obstacles


def test_what_runs_is_timed_and_what_does_not_says_why(without_a_gpu, monkeypatch):
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    backends._choose.cache_clear()
    found = measure(SHAPE, torch.float32, 0.0, CPU)
    assert found.times == {"triton": None, "addmm": 5.0}
    assert found.reasons["cuda"] == "not built"
    assert found.reasons["triton"].startswith("NotImplementedError: FUSED_LORA_BACKEND=triton cannot run this call: ")
    assert os.environ["FUSED_LORA_BACKEND"] == "auto"


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_step_runs_in_the_backend_that_is_asked_for(p, without_a_gpu, monkeypatch):
    without_a_gpu["triton"] = "not here"
    seen = []
    forward, backward = addmm.lora_linear_forward, addmm.lora_linear_backward
    monkeypatch.setattr(addmm, "lora_linear_forward", lambda *given: seen.append("forward") or forward(*given))
    monkeypatch.setattr(addmm, "lora_linear_backward", lambda *given: seen.append("backward") or backward(*given))
    assert measure(SHAPE, torch.float32, p, CPU).times == {"addmm": 5.0}
    assert seen == ["forward", "backward"]


def spoilt(step, index, value):
    results = list(step())
    if os.environ["FUSED_LORA_BACKEND"] != "addmm":
        results[index] = results[index] * value
    return None, tuple(results)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("value", [1.1, 0.0, float("nan")])
def test_a_wrong_result_has_no_time(index, value, without_a_gpu, monkeypatch):
    monkeypatch.setattr(of, "CANDIDATES", ("reference", "addmm"))
    assert measure(SHAPE, torch.float32, 0.0, CPU).times == {"reference": 9.0, "addmm": 5.0}
    monkeypatch.setattr(of, "capture", lambda step: spoilt(step, index, value))
    found = measure(SHAPE, torch.float32, 0.0, CPU)
    assert found.times == {"reference": None, "addmm": 5.0}
    assert found.reasons["reference"] == "its results are not those of addmm"


def test_the_variable_is_put_back(monkeypatch):
    for before in (None, "triton"):
        monkeypatch.delenv("FUSED_LORA_BACKEND", raising=False)
        if before:
            monkeypatch.setenv("FUSED_LORA_BACKEND", before)
        with contextlib.suppress(RuntimeError), backends.forcing("addmm"):
            assert backends.forced_backend() == "addmm"
            raise RuntimeError
        assert backends.forced_backend() == before


@pytest.fixture
def gpu_folder(monkeypatch, tmp_path):
    """What is measured on this machine's GPU, in a folder of its own."""
    monkeypatch.setenv("FUSED_LORA_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FUSED_LORA_BACKEND", raising=False)
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


@pytest.mark.gpu
def test_the_command_on_this_machines_gpu(gpu_folder):
    command = [sys.executable, "-m", "fused_lora.tune", "512,256,384,16", "500,256,384,8", "--dtype", "bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    device = torch.device("cuda", 0)
    entries = json.loads(Path(backends.cache_file("backends", device)).read_text())
    keys = [choices.key_of(512, 384, 256, r, torch.bfloat16, 0.0) for r in (8, 16)]
    assert sorted(entries) == sorted(keys)
    runs = {name for name in of.CANDIDATES if not backends.lora_linear_obstacle(name, device, torch.bfloat16, 16, True)}
    for times in entries.values():
        assert set(times) == runs
        assert None not in times.values()
    fastest, _ = choices.ranked(entries[keys[1]])[0]
    chosen = choices.choose_lora_linear(device, torch.bfloat16, 16, True, 512, 384, 256, 0.0)
    assert (chosen.name, chosen.reason.startswith("measured by fused_lora.tune: ")) == (fastest, True)


@pytest.mark.gpu
@pytest.mark.parametrize("fastest", ["addmm", "triton"])
def test_what_is_remembered_runs_on_this_machines_gpu(fastest, gpu_folder, monkeypatch):
    """Eagerly and compiled-free, forward and backward, though csrc takes eager calls itself."""
    device, dtype = torch.device("cuda", 0), torch.bfloat16
    M, K, N, r = 200, 128, 96, 8
    times = dict.fromkeys(of.CANDIDATES, 2.0) | {fastest: 1.0}
    choices.remember(device, choices.key_of(M, N, K, r, dtype, 0.0), times)
    passes = []
    forward, backward = addmm.lora_linear_forward, addmm.lora_linear_backward
    monkeypatch.setattr(addmm, "lora_linear_forward", lambda *given: passes.append("forward") or forward(*given))
    monkeypatch.setattr(addmm, "lora_linear_backward", lambda *given: passes.append("backward") or backward(*given))
    x, A, B = (torch.randn(*s, device=device, dtype=dtype, requires_grad=True) for s in ((M, K), (r, K), (N, r)))
    weight = torch.randn(N, K, device=device, dtype=dtype)
    lora_linear(x, weight, A, B).sum().backward()
    assert passes == (["forward", "backward"] if fastest == "addmm" else [])
    y = lora_linear(x[:100], weight, A, B)  # another count of tokens
    assert len(passes) == (2 if fastest == "addmm" else 0)
    expected = x[:100].double() @ weight.double().T + (x[:100].double() @ A.double().T) @ B.double().T
    assert (y.double() - expected).norm() / expected.norm() < 1e-2
