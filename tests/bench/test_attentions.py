"""Attention modules of others: grouped in one way and not in the other, checked against each other, then timed."""

import json

import pytest
import torch
from torch import nn

from bench import attentions
from bench.check import WrongResultError
from fused_lora.modules.siblings import LoRASiblings

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_every_attention_has_a_time(tmp_path, capsys):
    assert attentions.main(["--rounds", "2", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "attentions.json").read_text())
    assert len(results["attentions"]) == 11
    for each in results["attentions"]:
        assert {fuse: times["count"] for fuse, times in each["seconds"].items()} == {"auto": 2, "off": 2}, each["name"]
    table = (tmp_path / "attentions.md").read_text()
    assert table in capsys.readouterr().out
    assert "| Llama, 4 heads, 1 of k and v |" in table


def test_what_differs_between_the_ways():
    sizes = attentions.CPU_SIZES
    module, call = attentions.of_transformers("llama", 1, sizes, CPU)
    together, apart = (attentions.with_adapters(module, fuse, CPU) for fuse in ("auto", "off"))
    assert isinstance(together, LoRASiblings)
    assert not isinstance(apart, LoRASiblings)
    x = torch.randn(sizes.batch, sizes.tokens, sizes.width)
    assert torch.equal(call(together, x), call(apart, x))
    assert not torch.equal(call(together, x), call(module, x))


class Wrong(nn.Module):
    """Its gradients depend on how it is computed."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.q(x) + self.k(x) * (2 if isinstance(self, LoRASiblings) else 1)


def test_a_wrong_result_has_no_time():
    with pytest.raises(WrongResultError, match="no speed reported"):
        attentions.measure((Wrong(), lambda layer, x: layer(x)), attentions.CPU_SIZES, 1, CPU)


def test_a_library_that_is_missing_is_named(monkeypatch, tmp_path):
    def missing(sizes):
        raise ModuleNotFoundError("No module named 'diffusers'")

    monkeypatch.setattr(attentions, "FAMILIES", {})
    monkeypatch.setattr(attentions, "of_diffusers", missing)
    assert attentions.main(["--rounds", "1", "--out", str(tmp_path)]) == 0
    assert "| diffusers, 4 heads | - | - | No module named 'diffusers' |" in (tmp_path / "attentions.md").read_text()
