"""A linear over bases in 8 and 4 bits: checked against the values that codes stand for, then timed."""

import json

import pytest
import torch

from bench import quantised
from bench.check import WrongResultError


def test_every_base_has_a_time(tmp_path, capsys):
    assert quantised.main(["--rounds", "2", "--out", str(tmp_path)]) == 0
    (case,) = json.loads((tmp_path / "quantised.json").read_text())["cases"]
    assert case["shape"] == [64, 96, 128, 4]
    assert {base: times["count"] for base, times in case["seconds"].items()} == dict.fromkeys(
        ("frozen linear", "16 bits", "fp8", "int8", "nf4", "nf4, nested"), 2
    )
    table = (tmp_path / "quantised.md").read_text()
    assert table in capsys.readouterr().out
    assert "| 64, 96, 128, 4 |" in table


def test_a_wrong_result_has_no_time(monkeypatch):
    monkeypatch.setattr(
        quantised, "lora_linear", lambda x, weight, A, B, scale: x @ torch.zeros(96, 128) + A.sum() * B.sum()
    )
    with pytest.raises(WrongResultError, match="16 bits: wrong result, no speed reported"):
        quantised.measure(quantised.CPU_SHAPES[0], 1, torch.device("cpu"))
