"""The jagged cosine: the published values, no wasted step, and what it refuses."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fused_lora.relora import JaggedCosine, jagged_cosine_schedule
from fused_lora.relora.schedule import make_jagged

PAPER = {"total_steps": 20_000, "warmup_steps": 500, "restart_warmup_steps": 100, "reset_every": 5000}


@pytest.mark.parametrize(("step", "factor"), [
    (4999, 0.88688), (5000, 0.0), (5001, 0.00882), (5050, 0.44099), (5100, 0.88198), (10_000, 0.0), (19_999, 0.1),
])  # fmt: skip
def test_the_published_values(step, factor):
    assert abs(JaggedCosine(**PAPER, published=True)(step) - factor) < 5.1e-6


def test_no_step_is_wasted_and_climbs_end_where_the_published_ones_do():
    ours, published = JaggedCosine(**PAPER), JaggedCosine(**PAPER, published=True)
    climbing = {*range(500), *(restart + i for restart in ours.restarts() for i in range(100))}
    for step in range(0, 20_001):
        assert ours(step) > 0
        if step in climbing:
            assert published(step) < ours(step)
        else:
            assert ours(step) == published(step)
    assert ours(0) == 1 / 501
    assert math.isclose(ours(5000), ours(5100) / 101)


def test_without_restarts_only_the_warm_start_ends_in_a_climb():
    plain, cosine = JaggedCosine(1000, 20, 10, None), JaggedCosine(1000, 20, 0, 1000)
    assert not plain.restarts()
    assert all(plain(step) == cosine(step) for step in range(1001))
    assert list(JaggedCosine(1000, 20, 10, None, warm_start_steps=400).restarts()) == [400]


def test_restarts_count_from_the_end_of_the_warm_start():
    factor = JaggedCosine(1000, 20, 10, 200, warm_start_steps=400)
    assert list(factor.restarts()) == [400, 600, 800]
    assert list(JaggedCosine(**PAPER).restarts()) == [5000, 10_000, 15_000]
    for restart in factor.restarts():
        assert factor(restart) < 0.1 * factor(restart - 1)
        assert factor(restart + 10) < factor(restart - 1)
    assert factor(200) > 0.8, "no restart during the warm start"
    assert factor(1000) == factor(5000) == 0.1


@given(
    cycles=st.integers(1, 6), reset_every=st.integers(2, 50), warm_start=st.integers(0, 60), data=st.data(),
    min_ratio=st.floats(0, 1), published=st.booleans(),
)  # fmt: skip
def test_it_stays_between_zero_and_one(cycles, reset_every, warm_start, data, min_ratio, published):
    warmup = data.draw(st.integers(0, warm_start or reset_every))
    climb = data.draw(st.integers(0, reset_every - 1))
    total = warm_start + cycles * reset_every
    if warmup >= total:
        return
    factor = JaggedCosine(total, warmup, climb, reset_every, min_ratio, warm_start, published)
    values = [factor(step) for step in range(total + 2)]
    assert all(0 <= value <= 1 + 1e-12 for value in values)
    outside = [value for step, value in enumerate(values) if not _climbs(factor, step)]
    assert all(late <= early + 1e-12 for early, late in itertools.pairwise(outside)), "the cosine falls"


def _climbs(factor, step):
    starts = [(0, factor.warmup_steps), *((restart, factor.restart_warmup_steps) for restart in factor.restarts())]
    return any(start <= step < start + steps for start, steps in starts)


def test_the_scheduler_follows_it_and_resumes():
    parameter = torch.nn.Parameter(torch.zeros(3))
    sizes = {"total_steps": 60, "warmup_steps": 5, "restart_warmup_steps": 4, "reset_every": 20}

    def make():
        optimizer = torch.optim.AdamW([parameter], lr=0.5)
        return optimizer, jagged_cosine_schedule(optimizer, **sizes)

    factor = JaggedCosine(**sizes)
    optimizer, scheduler = make()
    for step in range(60):
        assert optimizer.param_groups[0]["lr"] == 0.5 * factor(step)
        if step == 33:
            saved = optimizer.state_dict(), scheduler.state_dict()
        optimizer.step()
        scheduler.step()
    optimizer, scheduler = make()
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    for step in range(33, 60):
        assert optimizer.param_groups[0]["lr"] == 0.5 * factor(step)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("changes", "error", "words"), [
    ({"reset_every": 3000}, ValueError, "reset_every must divide the 20000 steps"),
    ({"warm_start_steps": 4000}, ValueError, "reset_every must divide the 16000 steps"),
    ({"reset_every": 0}, ValueError, "reset_every must be at least 1"),
    ({"total_steps": 2e4}, TypeError, "total_steps must be an int"),
    ({"warmup_steps": -1}, ValueError, "warmup_steps must be at least 0"),
    ({"warmup_steps": 5001}, ValueError, "warmup_steps must end by the first restart, step 5000"),
    ({"restart_warmup_steps": 5000}, ValueError, "restart_warmup_steps must be below reset_every=5000"),
    ({"min_ratio": 1.5}, ValueError, "min_ratio must be between 0 and 1"),
    ({"warm_start_steps": 20_000}, ValueError, "warm_start_steps must be below total_steps"),
])  # fmt: skip
def test_what_it_refuses(changes, error, words):
    with pytest.raises(error, match=words):
        JaggedCosine(**PAPER | changes)


def test_a_schedule_that_becomes_jagged():
    """From its first step, or in the middle, where the next step's rate is what it was."""
    factor = JaggedCosine(60, 4, 5, 20)
    for begun in (0, 30):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.25)
        for _ in range(begun):
            optimizer.step()
            scheduler.step()
        make_jagged(scheduler, factor)
        for step in range(begun, 60):
            rate = 0.5 * (0.25 if begun and step == begun else factor(step))
            assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]] == [rate]
            optimizer.step()
            scheduler.step()
    with pytest.raises(TypeError, match="scheduler must be a LambdaLR to become a jagged one, got StepLR"):
        make_jagged(torch.optim.lr_scheduler.StepLR(optimizer, 3), factor)
