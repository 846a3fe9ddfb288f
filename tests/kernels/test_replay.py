"""A replayed pass gives the bits of the one that it was recorded from, for other tensors of the same layout."""

import pytest
import torch
from triton import knobs

from fused_lora import backends
from fused_lora.kernels import launch, replay
from fused_lora.kernels.lora_linear import backward_pass, forward_pass
from fused_lora.kernels.replay import Replay, _OtherWork, _Places, replayed
from fused_lora.kernels.tiles import KNOWN_GPUS
from tests.kernels.problem import DEVICE, Problem, gpus

PATHS = [pytest.param(gpu, id=name) for name, gpu in gpus().items()]
SHAPE = (264, 136, 200, 16)


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    for name in ("_passes", "_calls"):
        monkeypatch.setattr(replay, name, type(getattr(replay, name))(64))


def inputs_of(problem, dxa=None):
    scale, seed = torch.tensor(problem.scale, device=DEVICE), problem._seed()
    forward = [problem.x, problem.weight, problem.A, problem.B, problem.bias, scale, seed, None]
    _, xa = forward_pass(*forward, problem.p, KNOWN_GPUS["H100"], "ieee", problem.x.shape[:1])
    return forward, [problem.dy, problem.x, problem.weight, problem.A, problem.B, xa, scale, seed, dxa]


def both(gpu, problem, long):
    """y, xa, dx, dA, dB, dxa."""
    forward, backward = inputs_of(problem)
    of_forward = problem.p, gpu, "ieee", problem.x.shape[:1]
    if long:
        y, xa = forward_pass(*forward, *of_forward)
        return y, xa, *backward_pass(*backward[:5], xa, *backward[6:], *of_forward, (True,) * 3, True)
    y, xa = replayed(forward_pass, forward, lambda: of_forward)
    backward[5] = xa
    return y, xa, *replayed(backward_pass, backward, lambda: (*of_forward, (True,) * 3, True))


def replays():
    return [each._replay for each in replay._passes.young.values()]


@pytest.mark.gpu
@pytest.mark.parametrize("gpu", PATHS)
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_bits_are_those_of_the_long_way(gpu, p):
    for _ in range(5):
        problem = Problem.random(*SHAPE, torch.bfloat16, p=p)
        for got, want in zip(both(gpu, problem, False), both(gpu, problem, True), strict=True):
            assert torch.equal(got, want)
    assert len(replays()) == 2
    assert all(isinstance(each, Replay) for each in replays())


@pytest.mark.gpu
def test_launches_end_in_a_function_of_tritons():
    """Else they go the way of launch.start, which takes longer."""
    gpu = backends.gpu(torch.device("cuda", 0))
    for _ in range(3):
        both(gpu, Problem.random(*SHAPE, torch.bfloat16), False)
    calls = [call for each in replay._calls.young.values() for call, _ in each]
    assert calls
    assert launch.start not in calls


@pytest.mark.gpu
def test_what_is_computed_by_torch_meanwhile_is_not_replayed():
    """float16's room and casts of float32 factors."""
    gpu = backends.gpu(torch.device("cuda", 0))
    for dtype, lora_dtype in ((torch.float16, None), (torch.bfloat16, torch.float32)):
        for _ in range(4):
            problem = Problem.random(*SHAPE, dtype, lora_dtype)
            for got, want in zip(both(gpu, problem, False), both(gpu, problem, True), strict=True):
                assert torch.equal(got, want)
    assert replays() == [None] * 4
    assert all(each._never for each in replay._passes.young.values())


@pytest.mark.gpu
def test_a_profilers_hooks_see_replayed_launches(monkeypatch):
    gpu, seen = backends.gpu(torch.device("cuda", 0)), []
    problem = Problem.random(*SHAPE, torch.bfloat16)
    for _ in range(3):
        both(gpu, problem, False)
    hook = knobs.HookChain()
    hook.add(lambda metadata: seen.append(metadata))
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", hook)
    both(gpu, problem, False)
    assert len(seen) >= 4


@pytest.mark.gpu
def test_one_tensor_in_two_places_is_not_taken_for_one_operand():
    """dy is x at first, and another later."""
    gpu = backends.gpu(torch.device("cuda", 0))
    problem = Problem.random(264, 136, 136, 16, torch.bfloat16)
    own, problem.dy = problem.dy, problem.x
    for _ in range(4):
        both(gpu, problem, False)
    problem.dy = own
    for _ in range(4):
        for got, want in zip(both(gpu, problem, False), both(gpu, problem, True), strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
def test_no_tensor_is_kept():
    gpu = backends.gpu(torch.device("cuda", 0))
    both(gpu, Problem.random(*SHAPE, torch.bfloat16), False)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(4):
        both(gpu, Problem.random(*SHAPE, torch.bfloat16), False)
    assert torch.cuda.memory_allocated() == before


def test_operands_have_numbers():
    x, low = torch.randn(4, 6), torch.empty(4, 2)
    places = _Places([x, None])
    out = torch.empty(4, 3)
    assert [places.of(tensor) for tensor in (x, low, out, low)] == [0, 2, 3, 2]
    assert places.role(5) == 5
    assert places.role(out) == (3, None)
    assert places.of(out.view(2, 2, 3)) == 3
    assert [tensor.shape for tensor in places.buffers.values()] == [(4, 2), (2, 2, 3)]


@pytest.mark.parametrize(
    "part", [lambda x, low: x[1:], lambda x, low: x.view(24), lambda x, low: low[1:], lambda x, low: low.T]
)
def test_parts_of_operands_have_none(part):
    x, low = torch.randn(4, 6), torch.empty(4, 2)
    places = _Places([x])
    places.of(low)
    with pytest.raises(LookupError):
        places.of(part(x, low))


@pytest.mark.parametrize(
    ("work", "found"),
    [
        (lambda x: x.new_empty(3), False),
        (lambda x: x.to(x.dtype), False),
        (lambda x: x * 2, True),
        (lambda x: x.half(), True),
    ],
)
def test_work_of_torch_is_seen(work, found):
    x = torch.randn(4)
    with _OtherWork() as other:
        work(x)
    assert other.found is found
