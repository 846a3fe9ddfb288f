"""Every variant computes what the reference says before its time is believed."""

import shutil

import pytest
import torch

from bench.check import BOUNDS, WrongResultError, check_results, check_variant, reference_results
from bench.shapes import Shape
from bench.variants import VARIANTS, Variant, make_problem, run, unfused

ODD = Shape(M=37, K=29, N=43, r=5)
EAGER = [name for name in VARIANTS if name not in ("fused_lora_triton", "compiled", "peft", "peft_fp32", "peft_dora")]


def check(name: str, dtype: torch.dtype, shape: Shape = ODD) -> dict[str, float]:
    kind, problem = VARIANTS[name], make_problem(shape, "cpu", dtype, seed=3)
    assert problem.lora_alpha != shape.r
    return check_variant(kind.factory(problem), problem, reference_results(problem, kind.work))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EAGER)
def test_variant_is_the_reference(name, dtype):
    trained = {"full_rank": {"weight"}, "frozen": set(), "dora": {"A", "B", "magnitudes"}}
    assert set(check(name, dtype)) == {"y", "x"} | trained.get(VARIANTS[name].work, {"A", "B"})


# torch.compile imports parts of torch that torch itself deprecates.
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_variant_is_the_reference():
    check("compiled", torch.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "factors"), [("peft", torch.bfloat16), ("peft_fp32", torch.float32), ("peft_dora", torch.bfloat16)]
)
def test_peft_is_the_reference(name, factors):
    pytest.importorskip("peft", exc_type=ImportError)
    check(name, torch.bfloat16)
    parameters = VARIANTS[name].factory(make_problem(ODD, "cpu", torch.bfloat16)).parameters
    assert {parameter.dtype for parameter in parameters.values()} == {factors}


def test_results_are_those_of_y_alone_without_backward():
    problem = make_problem(ODD, "cpu", torch.float64)
    (y,) = run(unfused(problem), problem, backward=False)
    assert list(check_results((y,), reference_results(problem, "lora"), torch.float64)) == ["y"]


def test_the_mask_is_the_references_and_not_another_ones(monkeypatch):
    problem = make_problem(ODD, "cpu", torch.float64)
    kind = VARIANTS["fused_lora_dropout"]
    monkeypatch.setattr("bench.variants.SEED", 1)
    with pytest.raises(WrongResultError, match="A's gradient"):
        check_variant(kind.factory(problem), problem, reference_results(problem, kind.work))


def forgets_scale(problem):
    variant = unfused(problem)
    return Variant(lambda x: x @ problem.weight.T + x @ problem.A.T @ problem.B.T, variant.parameters)


def forgets_update(problem):
    variant = unfused(problem)
    return Variant(lambda x: x @ problem.weight.T + 0 * variant.step(x), variant.parameters)


def detaches_factor(problem):
    A, B = problem.A, problem.B
    return Variant(
        lambda x: unfused(problem).step(x) - x @ (A - A.detach()).T @ B.detach().T * problem.scale, {"A": A, "B": B}
    )


def writes_nan(problem):
    step = unfused(problem).step
    return Variant(lambda x: step(x) + torch.tensor([0.0] * (problem.shape.N - 1) + [float("nan")]), {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("factory", "named"),
    [
        (forgets_scale, "y "),
        (forgets_update, "A's gradient"),
        (detaches_factor, "A's gradient 1"),
        (writes_nan, "y nan"),
    ],
)
def test_wrong_variant_is_refused(factory, named, dtype):
    problem = make_problem(ODD, "cpu", dtype)
    with pytest.raises(WrongResultError, match="no speed reported") as caught:
        check_variant(factory(problem), problem, reference_results(problem, "lora"))
    assert named in str(caught.value)


def test_bounds_separate_rounding_from_mistakes():
    assert all(bound < 0.02 for bound in BOUNDS.values())
