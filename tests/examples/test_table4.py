"""The predicted fourth table: printed beside the published one, and its steps against an H200's."""

import pytest

from bench.record import RESULTS
from examples import table4
from examples.table4 import FULL, FUSED, PUBLISHED, SETUPS
from fused_lora.cards import CARDS
from fused_lora.pretrain.presets import PRESETS

STEPS = RESULTS / "nvidia-h200" / "steps.json"


def test_published_numbers_stand_beside_predicted_ones(capsys):
    assert table4.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    published = [
        ("137 (1.00)", "157 (1.15)", "-"),
        ("84 (1.00)", "124 (1.48)", "-"),
        ("8.8 (1.00)", "17.8 (2.02)", "-"),
    ]
    for setup, cells in zip(SETUPS, published, strict=True):
        own = [line for line in lines if line.startswith(f"| {setup.count} {setup.card} |")]
        for line, way, cell in zip(own, (FULL, PUBLISHED, FUSED), cells, strict=True):
            assert line.endswith(f" | {cell} |")
            predicted, sequences = table4.rate(setup, way)
            assert f"| {way} | {sequences} | {predicted:.1f} (" in line


def test_steps_of_an_h200_are_within_a_tenth():
    """What stands between the linears was taken from one of these, the full-rank one that is 5504 wide."""
    found = list(table4.compared(STEPS))
    assert len(found) == 10
    for preset, way, measured, predicted in found:
        assert predicted == pytest.approx(measured, rel=0.1), (preset, way)


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.card)
def test_relora_is_ahead_where_links_are_slow_and_batches_small(setup):
    def ratio(sequences):
        steps = [
            table4.step(CARDS[setup.card], "1.3b", way, sequences, setup.count, setup.link, 8) for way in (FULL, FUSED)
        ]
        return steps[0] / steps[1]

    assert ratio(1) > 1.4
    if setup.link < 100:
        assert ratio(1) > ratio(16)


def test_the_weights_of_the_model():
    preset = PRESETS["1.3b"]
    assert table4.weights(preset.model) == pytest.approx(1.34e9, rel=0.01)
    assert table4.trained("1.3b", PUBLISHED) == pytest.approx(251e6, rel=0.01)


def test_a_micro_batch_fits():
    for setup in SETUPS:
        assert table4.largest(CARDS[setup.card], "1.3b", FULL) <= table4.largest(CARDS[setup.card], "1.3b", PUBLISHED)
    assert table4.largest(CARDS["RTX 3090"], "1.3b", FULL) < table4.largest(CARDS["A100"], "1.3b", FULL)
