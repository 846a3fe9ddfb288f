"""The measurement: interleaved, refusing what is wrong, and surviving what fails."""

import pytest
import torch

from bench import timing
from bench.clock import remembered
from bench.measure import FAILED, MEASURED, UNAVAILABLE, WRONG, Measurements
from bench.record import case, is_sound, quartiles, shape_record
from bench.shapes import FORWARD, FORWARD_BACKWARD, Shape, flops
from bench.timing import EAGER, WARM_UP_ROUNDS, interleave
from bench.variants import FLOOR, PACKAGE, VARIANTS, Kind, Variant, frozen

ODD = Shape(M=37, K=29, N=43, r=5)


def wrong(problem):
    parameters = {"A": problem.A, "B": problem.B}
    return Variant(lambda x: x @ (problem.weight + problem.B @ problem.A).T, parameters)


def missing(problem):
    raise ModuleNotFoundError("No module named 'a_library'")


def too_large(problem):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB\nmore")


def broken(problem):
    raise RuntimeError("it broke\nlong story")


@pytest.fixture
def measurements():
    variants = {name: VARIANTS[name] for name in (FLOOR, PACKAGE)}
    for factory in (wrong, missing, too_large, broken):
        variants[factory.__name__] = Kind(factory, factory.__name__)
    return Measurements("cpu", rounds=3, variants=variants)


def test_each_kind_of_failure_has_a_status_and_a_reason(measurements):
    outcomes = measurements.outcomes(ODD, FORWARD, EAGER)
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        FLOOR: MEASURED,
        PACKAGE: MEASURED,
        "wrong": WRONG,
        "missing": UNAVAILABLE,
        "too_large": UNAVAILABLE,
        "broken": FAILED,
    }
    assert outcomes["wrong"].samples == ()
    assert outcomes["broken"].reason == "RuntimeError: it broke"
    assert len(outcomes[PACKAGE].samples) == 3


def test_a_case_is_measured_once(measurements):
    assert measurements.outcomes(ODD, FORWARD, EAGER) is measurements.outcomes(ODD, FORWARD, EAGER)


def test_only_one_shape_is_held(measurements):
    first = measurements.prepared(ODD)
    assert measurements.prepared(ODD) is first
    measurements.prepared(Shape(8, 8, 8, 2))
    assert measurements.prepared(ODD) is not first


def test_a_case_reports_ratio_and_rate(measurements):
    floor = case(measurements, ODD, FORWARD_BACKWARD, EAGER, FLOOR)
    ours = case(measurements, ODD, FORWARD_BACKWARD, EAGER, PACKAGE)
    assert floor["ratio"] == 1
    assert ours["ratio"] == pytest.approx(ours["median_us"] / floor["median_us"])
    assert ours["tflops"] == pytest.approx(flops(ODD, FORWARD_BACKWARD) / ours["median_us"] * 1e-6)
    assert ours["q1_us"] <= ours["median_us"] <= ours["q3_us"]
    assert "median_us" not in case(measurements, ODD, FORWARD_BACKWARD, EAGER, "wrong")


def test_a_wrong_result_makes_the_run_unsound_and_a_missing_library_does_not():
    def sound(**factories):
        kinds = {FLOOR: VARIANTS[FLOOR], **{name: Kind(factory, name) for name, factory in factories.items()}}
        return is_sound([shape_record(Measurements("cpu", rounds=1, variants=kinds), ODD)], PACKAGE)

    good = VARIANTS[PACKAGE].factory
    assert sound(**{PACKAGE: good, "missing": missing})
    assert not sound(**{PACKAGE: good, "wrong": wrong})
    assert not sound(**{PACKAGE: broken})


def test_interleave_rotates_and_drops_the_warm_up():
    order = []
    samples = interleave({"a": "a", "b": "b"}, 2, lambda call: order.append(call) or len(order))
    assert "".join(order) == "abba" * 2 + "ab" * ((WARM_UP_ROUNDS + 2) % 2)
    assert samples == {"a": [8, 9], "b": [7, 10]}


def test_without_a_gpu_there_is_one_mode():
    assert timing.modes("cpu") == (EAGER,)


def test_quartiles():
    assert quartiles((1.0, 2.0, 3.0, 4.0, 5.0)) == (2.0, 3.0, 4.0)
    assert quartiles((7.0,)) == (7.0, 7.0, 7.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_is_checked_and_timed():
    measurements = Measurements("cuda", rounds=3, variants={name: VARIANTS[name] for name in (FLOOR, PACKAGE, "addmm")})
    for pass_name in (FORWARD, FORWARD_BACKWARD):
        for mode in timing.modes("cuda"):
            outcomes = measurements.outcomes(Shape(256, 512, 512, 16), pass_name, mode)
            assert {outcome.status for outcome in outcomes.values()} == {MEASURED}, outcomes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_counts_results():
    assert timing.peak_memory(lambda: torch.empty(2**20, device="cuda")) == 4 * 2**20
    assert frozen is VARIANTS[FLOOR].factory


def test_a_case_that_fails_is_measured_once_too():
    calls = []

    @remembered
    def measure(case):
        calls.append(case)
        if case == "bad":
            raise ValueError("it broke")
        return case

    for _ in range(3):
        with pytest.raises(RuntimeError, match=r'(?s)raise ValueError\("it broke"\).*ValueError: it broke'):
            measure("bad")
    assert (measure("good"), measure("good")) == ("good", "good")
    assert calls == ["bad", "good"]
