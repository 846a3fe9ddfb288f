"""What a task is: its arguments, the order of its data and its rates."""

import pytest

from fused_lora.tasks import Task

GIVEN = dict(name="t", data=[[1, 2]] * 10, config={"r": 2, "target_modules": "all-linear"}, steps=8, lr=1e-3)


def test_every_sequence_once_an_epoch():
    """Across the borders of steps, in orders that differ."""
    task = Task(**GIVEN, batch_size=2, accumulate=2, seed=1)
    numbers = [number for step in range(5) for number in task.numbers(step)]
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))
    assert numbers[:10] != numbers[10:]
    assert numbers[:10] != list(range(10))
    assert numbers != [number for step in range(5) for number in Task(**GIVEN, batch_size=4, seed=2).numbers(step)]
    assert numbers == [number for step in range(5) for number in Task(**GIVEN, batch_size=4, seed=1).numbers(step)]


def test_more_sequences_a_step_than_there_are():
    numbers = Task(**GIVEN, batch_size=25).numbers(0)
    assert sorted(numbers.count(number) for number in range(10)) == [2] * 5 + [3] * 5


@pytest.mark.parametrize(("schedule", "expected"), [
    ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1]),
    ("linear", [0.5, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
    ("cosine", [0.5, 1, 1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]),
])  # fmt: skip
def test_rates(schedule, expected):
    task = Task(**GIVEN, warmup=2, schedule=schedule)
    assert [task.lr_after(step) / task.lr for step in range(8)] == pytest.approx(expected)


@pytest.mark.parametrize(("changes", "error", "words"), [
    ({"name": "a.b"}, ValueError, "name must not be empty, have dots"),
    ({"name": "a/b"}, ValueError, "name must have no slashes"),
    ({"name": 3}, TypeError, "name must be a str"),
    ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ({"accumulate": 1.5}, TypeError, "accumulate must be an int, got float"),
    ({"lr": float("nan")}, ValueError, "lr must be finite"),
    ({"lr": -1.0}, ValueError, "lr must be at least 0, got -1.0"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay must be at least 0"),
    ({"max_grad_norm": -0.1}, ValueError, "max_grad_norm must be at least 0"),
    ({"schedule": "step"}, ValueError, "schedule must be one of constant, linear, cosine, got 'step'"),
    ({"warmup": 9}, ValueError, "warmup must be at most steps=8, got 9"),
    ({"max_grad_norm": 0}, ValueError, "max_grad_norm must be above 0, got 0.0: None is for"),
    ({"config": "nowhere"}, ValueError, "nowhere is no folder with an adapter"),
    ({"data": []}, ValueError, "data must have at least one sequence"),
])  # fmt: skip
def test_errors(changes, error, words):
    with pytest.raises(error, match=words):
        Task(**(GIVEN | changes))
