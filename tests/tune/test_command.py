"""python -m fused_lora.tune: its options, its table, and what it leaves behind."""

import json
from pathlib import Path

import pytest
import torch

from fused_lora import backends, choices
from fused_lora.tune import __main__ as command
from fused_lora.tune.measure import Measured
from fused_lora.tune.shapes import Shape
from tests.cards import CUDA


@pytest.fixture
def measured(card, monkeypatch):
    """A card, on which addmm takes 8 us and Triton as many as there are ranks; the shapes that were measured."""
    card(86)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    seen = []

    def measure(shape, dtype, p, device):
        seen.append((shape, dtype, p, device))
        return Measured({"triton": float(shape.r), "addmm": 8.0}, {"cuda": "not built"})

    monkeypatch.setattr(command, "measure", measure)
    return seen


def test_it_measures_each_shape_once_prints_a_table_and_remembers(measured, capsys):
    assert command.main(["8192,64,32,16", "8192,64,32,4", "8192,64,32,16"]) == 0
    assert [each[0].r for each in measured] == [16, 4]
    assert measured[0] == (Shape(8192, 64, 32, 16), torch.bfloat16, 0.0, CUDA)
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert lines[0].startswith("Card 86, compute capability 8.6")
    assert [line.split() for line in lines[1:4]] == [
        ["M,K,N,r", "cuda", "triton", "addmm", "fastest"],
        ["8192,64,32,16", "-", "16", "us", "8", "us", "addmm"],
        ["8192,64,32,4", "-", "4", "us", "8", "us", "triton"],
    ]
    assert lines[4] == "cuda: not built"
    path = backends.cache_file("backends", CUDA)
    assert lines[5] == f"remembered in {path}; delete it to forget"
    assert len(json.loads(Path(path).read_text())) == 2
    assert "2/2" in told.err
    chosen = choices.choose_lora_linear(CUDA, torch.bfloat16, 16, True, 8192, 32, 64, 0.0)
    assert chosen.reason == "measured by fused_lora.tune: addmm 1.00, triton 2.00"


def test_dtype_and_dropout_are_of_the_key(measured, capsys):
    assert command.main(["64,64,32,16", "--dtype", "float16", "--dropout", "0.05"]) == 0
    assert measured[0][1:3] == (torch.float16, 0.05)
    assert "float16, dropout 0.05" in capsys.readouterr().out

    def name(dtype, p):
        return choices.choose_lora_linear(CUDA, dtype, 16, True, 64, 32, 64, p).name

    assert name(torch.float16, 0.1) == "addmm"
    assert [name(torch.float16, 0.0), name(torch.bfloat16, 0.1)] == ["triton", "triton"]


def test_a_shape_that_no_backend_runs_is_not_remembered(measured, monkeypatch, capsys):
    monkeypatch.setattr(command, "measure", lambda *_: Measured({"addmm": None}, {"addmm": "OutOfMemoryError: full"}))
    assert command.main(["64,64,32,16"]) == 1
    out = capsys.readouterr().out
    assert "none ran" in out
    assert "addmm: OutOfMemoryError: full" in out
    assert len(choices.measured(CUDA)) == 0


def test_where_nothing_can_be_written_it_does_not_say_it_was(measured, tmp_path, capsys):
    (tmp_path / "cache").write_text("no folder")
    with pytest.warns(RuntimeWarning, match="cannot be"):
        assert command.main(["64,64,32,16"]) == 0
    assert "remembered in" not in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "words"), [
    (["1,2,3"], "shape must be M,K,N,r"),
    (["1,2,3,4", "--tokens", "0"], "--tokens must be at least 1, got 0"),
    (["1,2,3,4", "--rank", "600"], "r must be between 1 and 512, got 600"),
    (["1,2,3,4", "--dropout", "2"], "--dropout must be between 0 and 1, got 2.0"),
    ([], "shape"),
])  # fmt: skip
def test_what_is_wrong_is_named(arguments, words, measured, capsys):
    with pytest.raises(SystemExit) as refused:
        command.main(arguments)
    assert refused.value.code == 2
    assert words in capsys.readouterr().err
    assert measured == []


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main(["1,2,3,4"])
    assert "there is no CUDA device to measure on" in capsys.readouterr().err


def test_without_a_gpu_nobody_asks_the_network(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("fused_lora.integrations.model_sizes.linear_sizes", lambda name: pytest.fail("asked"))
    with pytest.raises(SystemExit):
        command.options_of(["Qwen/Qwen3-0.6B"])
    assert "there is no CUDA device" in capsys.readouterr().err
