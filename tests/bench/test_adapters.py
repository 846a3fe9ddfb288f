"""Rows with adapters of their own: every way computes what the reference does, and one that does not has no speed."""

import json
from dataclasses import replace

import pytest
import torch

from bench import adapter_cache, adapter_step, adapters
from bench.adapter_arms import ACCELERATED, ADAPTERS, ARMS, GATHERED, GROUPED, LOOP, ONE, PEFT, TRITON, Inputs
from bench.adapter_cases import FEW_CASES, GPU_CASES, TINY_CASES, TINY_FEW_CASES, Case, each, tree
from bench.adapter_report import CALLS, markdown
from bench.adapters import main, measure, prepare
from bench.check import WrongResultError, relative_error
from bench.record import summary
from bench.shapes import FORWARD, FORWARD_BACKWARD
from bench.variants import FLOOR, PACKAGE, SCALE

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", TINY_CASES, ids=str)
def test_every_arm_computes_what_the_reference_does(case):
    inputs = Inputs.make(case, CPU, torch.float32)
    arms, reasons, expected = prepare(inputs, [name for name in ARMS if name != GATHERED], backward=True)
    cannot = {ACCELERATED, TRITON} | ({PEFT} if case.has_sums else set())  # a CPU has no kernels
    assert reasons.keys() == cannot
    assert arms.keys() == ARMS.keys() - cannot - {GATHERED}
    assert len(expected[ADAPTERS]) == 2 + 2 * len(case.ranks)
    for name, arm in arms.items():
        results = arm.run(inputs.problem, arm.trains)
        assert len(results) == (len(expected[arm.work]) if arm.trains else 1), name
        for result, exact in zip(results, expected[arm.work].values(), strict=arm.trains):
            assert relative_error(result, exact.double()) < 1e-5, name


def test_what_is_expected_by_hand():
    """Of two rows with an adapter each, and of one with both."""
    case = Case("by hand", 3, 2, (1, 2), (((0,), 1), ((1,), 1), ((0, 1), 1)))
    inputs = Inputs.make(case, CPU, torch.float64)
    x, weight = inputs.problem.x.detach(), inputs.problem.weight
    first, second = (B @ A * SCALE for A, B in inputs.factors)
    found = inputs.expected(ADAPTERS)
    wanted = torch.stack([(weight + first) @ x[0], (weight + second) @ x[1], (weight + first + second) @ x[2]])
    torch.testing.assert_close(found["y"], wanted)
    dy, (_, B) = inputs.problem.dy, inputs.factors[0]
    torch.testing.assert_close(found["A0"], SCALE * B.T @ (dy[[0, 2]].T @ x[[0, 2]]))


@pytest.mark.parametrize("case", TINY_FEW_CASES, ids=str)
def test_few_rows(case):
    inputs = Inputs.make(case, CPU, torch.float32)
    arms, reasons, _ = prepare(inputs, list(ARMS), backward=False)
    assert reasons.keys() == {ACCELERATED, TRITON}
    assert {PACKAGE, LOOP, GATHERED, GROUPED, PEFT} < arms.keys()


def test_an_arm_that_is_wrong_stops_all(monkeypatch):
    def wrong(inputs):
        arm = ARMS[LOOP][1](inputs)
        return replace(arm, step=lambda x: arm.step(x) * 1.001)

    monkeypatch.setitem(ARMS, PACKAGE, ("wrong", wrong))
    with pytest.raises(WrongResultError, match="wrong: wrong result, no speed reported: relative error y"):
        measure(TINY_CASES[0], [FLOOR, PACKAGE], [CALLS], 1, CPU)


def test_an_arm_that_cannot_run_is_named():
    found = measure(TINY_CASES[-1], [FLOOR, PEFT], [CALLS], 1, CPU)
    assert found[PEFT] == {"seconds": {}, "reason": "NotImplementedError: a sample of PEFT's has one adapter"}


def test_the_cases():
    assert [case.M for case in GPU_CASES] == [8192] * 4 + [16384] + [8192] * 2
    assert [case.M for case in FEW_CASES] == [1, 8, 64]
    assert {len(adapters) for adapters, _ in GPU_CASES[-1].rows} == {3}
    assert tree(4, 5) == (((0, 1, 3), 5), ((0, 1, 4), 5), ((0, 2, 5), 5), ((0, 2, 6), 5))
    assert each(7, 8) == (((0,), 7), ((1,), 8))


def run_of(**us):
    """One case whose arms took so many microseconds."""
    arms = {name: {"seconds": {FORWARD_BACKWARD: summary([time * 1e-6])}} for name, time in us.items()}
    about = {"device": "A GPU", "dtype": "bfloat16", "versions": {}, "commit": "abc", "date": "2026-01-01"}
    about |= {"rounds": 1, "flush_bytes": 2**28, "command": "python -m bench.adapters", "kind": "linear"}
    return about | {
        "cases": [{"name": "8, 4, 4: two", "short": "two", "arms": arms | {PEFT: {"reason": "it is away"}}}]
    }


def test_the_table_of_a_cache():
    steps = {"alone": summary([0.01]), "beside": summary([0.0102])}
    cache = {"name": "two", "bytes": 2**20, "switch": 1e-4, "copy": 2**20 / 50e9, "move": 2**20 / 48e9, "steps": steps}
    text = markdown(run_of() | {"kind": "cache", "cache": cache})
    assert "| an adapter | 1.0 MiB |" in text
    assert "48.0 GB/s, 0.960 of it" in text
    assert "10.20 ms, 1.020 of it" in text
    assert "100 us of the host" in text


def test_the_table_compares_with_the_frozen_linear():
    text = markdown(run_of(**{FLOOR: 2000, PACKAGE: 2100, LOOP: 3000}))
    assert "| 8, 4, 4: two | 2,000 us | 1.050 | 1.500 |" in text
    assert "Inference" not in text
    assert "* PEFT's adapter_names, 8, 4, 4: two: it is away" in text
    assert "| 8, 4, 4: two | 2,100 us |" in markdown(run_of(**{PACKAGE: 2100}))


@pytest.fixture
def training():
    return adapter_step.Training(adapter_step.TINY, CPU)


def test_tasks_together_have_the_gradients_that_they_have_alone(training):
    adapter_step.check(training)
    losses = [training.gradients([name])[0] for name in training.names]
    torch.testing.assert_close(training.gradients(training.names)[0], sum(losses), rtol=1e-3, atol=0)


def test_tasks_with_other_gradients_together_have_no_speed(training, monkeypatch):
    real = training.gradients

    def wrong(names):
        loss, grads = real(names)
        return loss, {name: tuple(each * len(names) for each in of_task) for name, of_task in grads.items()}

    monkeypatch.setattr(training, "gradients", wrong)
    with pytest.raises(WrongResultError, match="task_0's gradients are off by 2"):
        adapter_step.check(training)


@pytest.mark.parametrize("way", [adapter_step.TOGETHER, adapter_step.IN_TURN])
def test_a_step_trains_every_task(training, way):
    before = {name: [each.detach().clone() for each in training.parameters[name]] for name in training.names}
    for optimizer in training.optimizers.values():
        optimizer.param_groups[0]["lr"] = 0.1  # which shows in 16 bits
    for names in training.batches(way):
        training.step(names)
    for name, parameters in training.parameters.items():
        assert len(parameters) == 2 * 7 * 2
        assert not any(map(torch.equal, parameters, before[name]))
        assert all(each.grad is None for each in parameters)
    trained = [name for name, parameter in training.model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 3 * 28


@pytest.mark.parametrize(("options", "stem"), [
    ([], "adapters"), (["--few"], "adapters-few"), (["--step"], "adapters-step"), (["--cache"], "adapters-cache"),
])  # fmt: skip
def test_the_command(options, stem, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    first = [] if options in (["--step"], ["--cache"]) else ["--cases", "0", "--arms", FLOOR, ONE, PACKAGE]
    assert main(["--tiny", "--rounds", "1", "--out", str(tmp_path), *options, *first]) == 0
    text = (tmp_path / f"{stem}.md").read_text()
    assert text in capsys.readouterr().out
    stored = json.loads((tmp_path / f"{stem}.json").read_text())
    if options == ["--step"]:
        assert all(arm["tokens_per_second"] > 0 for arm in stored["step"]["arms"].values())
        return
    if options == ["--cache"]:
        assert stored["cache"]["switch"] > 0
        assert all(arm["median"] > 0 for arm in stored["cache"]["steps"].values())
        return
    (case,) = stored["cases"]
    assert list(case["arms"]) == [FLOOR, ONE, PACKAGE]
    assert all(arm["seconds"][CALLS]["count"] == 1 for arm in case["arms"].values())
    (tmp_path / f"{stem}.md").unlink()
    assert main(["--redraw", str(tmp_path / f"{stem}.json")]) == 0
    assert (tmp_path / f"{stem}.md").read_text() == text
    assert (tmp_path / f"{stem}.png").exists()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_on_a_gpu():
    device = torch.device("cuda")
    case = Case("small", 256, 128, (16, 8, 40), each(300, 100, 112))
    found = measure(case, [name for name in ARMS if name != GATHERED], adapters.passes_of(device, False), 1, device)
    passes = {name: arm["seconds"].keys() for name, arm in found.items()}
    assert passes[PEFT] == {CALLS}
    for name in (FLOOR, ONE, PACKAGE, LOOP):
        assert passes[name] == {FORWARD_BACKWARD, FORWARD, CALLS}, found
    arms = adapter_step.measure(adapter_step.TINY, 1, device)["arms"]
    assert arms[adapter_step.TOGETHER]["peak_bytes"] > 0
    assert adapter_cache.measure(adapter_cache.TINY, 1, device)["move"] > 0
