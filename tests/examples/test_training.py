"""The demo's training loop: its batches, its schedule, its speed, and the perplexity it reports."""

import math

import pytest
import torch

from examples import training
from examples.training import Schedule, StepTimer, batches, held_out_logits, perplexity, sample

SCHEDULE = Schedule(steps=20, batch_size=3, seq_len=5, learning_rate=1e-3)


class CountingModel(torch.nn.Module):
    """Is sure that each token is followed by the next number."""

    def forward(self, tokens):
        return 100.0 * torch.nn.functional.one_hot((tokens + 1) % 64, 64)


def test_targets_are_the_next_tokens():
    for inputs, targets in batches(torch.arange(64), SCHEDULE):
        assert inputs.shape == targets.shape == (3, 5)
        assert torch.equal(targets, inputs + 1)


def test_batches_depend_on_the_seed_alone():
    first, second = ([inputs for inputs, _ in batches(torch.arange(64), SCHEDULE)] for _ in range(2))
    other = [inputs for inputs, _ in batches(torch.arange(64), Schedule(20, 3, 5, 1e-3, seed=1))]
    assert len(first) == 20
    assert torch.equal(torch.stack(first), torch.stack(second))
    assert not torch.equal(torch.stack(first), torch.stack(other))


def test_median_step_leaves_out_the_first_steps_and_outliers(monkeypatch):
    clock = iter([0, 50, 51, 90, 91, 93, 193, 195])
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(clock))
    timer = StepTimer(torch.device("cpu"))
    for _ in range(5):
        timer.mark()
    assert math.isnan(timer.median_step())
    for _ in range(3):
        timer.mark()
    assert timer.median_step() == 2


def test_perplexity_of_certainty_and_of_ignorance():
    logits, targets = held_out_logits(CountingModel(), torch.arange(64), SCHEDULE)
    assert targets.flatten().tolist() == list(range(1, 61))
    assert perplexity(logits, targets) == pytest.approx(1)
    assert perplexity(torch.zeros_like(logits), targets) == pytest.approx(64)


def test_sample_goes_on_from_the_prompt():
    assert sample(CountingModel(), torch.tensor([7, 8, 9]), count=4, window=2).tolist() == [7, 8, 9, 10, 11, 12, 13]
