"""A few steps of the comparison of losses: accelerated runs stay as near to PEFT's as another order of summation."""

import pytest
import torch

from bench.losses import CPU, VOCABULARY, compare, model_of, reordered, table

pytestmark = pytest.mark.filterwarnings("default")


def test_another_order_is_the_same_function():
    model = model_of(CPU, torch.device("cpu"), True).double()
    tokens = torch.randint(VOCABULARY, (2, 9))
    before = model(input_ids=tokens).logits
    torch.testing.assert_close(reordered(model)(input_ids=tokens).logits, before)


@pytest.mark.parametrize("in_float32", [True, False])
def test_losses(in_float32):
    losses = compare(CPU, torch.device("cpu"), in_float32, steps=12)
    spread = (losses["another order"] - losses["PEFT"]).abs().max()
    assert (losses["accelerated"] - losses["PEFT"]).abs().max() <= max(3 * spread, 2e-2)
    assert losses["accelerated"][-1] < losses["accelerated"][0]
    assert not torch.equal(losses["accelerated"], losses["PEFT"]), "it must be another way"
    assert len(table(losses)) == 3
