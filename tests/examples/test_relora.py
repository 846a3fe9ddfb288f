"""The one-page example: it learns, and says what happens when."""

from examples import relora


def test_it_learns_over_restarts(capsys):
    losses = relora.main(steps=48, warm_start=16, reset_every=16)
    assert losses[-1] < losses[0] - 1
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["step 16", "step 32", "step 48"]
    assert "layers.0.self_attn.q_proj" in printed[0]
    assert "restart 2, 99% forgotten" in printed[2]
