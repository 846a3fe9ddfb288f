"""The tuning example: its two runs have the same losses, which fall."""

import pytest

pytest.importorskip("trl")

from examples import sft

pytestmark = pytest.mark.filterwarnings("default")  # TRL's own


def test_the_same_losses_with_one_line_more(capsys):
    size = sft.Size(hidden_size=64, layers=1, batch_size=2, seq_len=32, steps=36, r=4)
    losses, accelerated = sft.main(size)
    assert losses[-1] < losses[0] - 0.2
    assert max(abs(a - b) for a, b in zip(losses, accelerated, strict=True)) < 1e-3
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[-8] == ["step", "PEFT", "accelerated"]
    assert [row[0] for row in table[-7:]] == ["6", "12", "18", "24", "30", "36", "tokens/s"]


def test_the_line_is_there(monkeypatch):
    """And does what it says, once in the two runs."""
    reports, real = [], sft.accelerate
    monkeypatch.setattr(sft, "accelerate", lambda model: reports.append(real(model)))
    sft.main(sft.Size(hidden_size=64, layers=1, batch_size=1, seq_len=16, steps=6, r=4))
    assert [len(report.served) for report in reports] == [7]
