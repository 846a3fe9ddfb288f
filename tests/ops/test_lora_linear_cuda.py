"""Streams, graphs and devices: what only a GPU can show."""

import threading

import pytest
import torch

from fused_lora import lora_linear, merge_
from tests.ops.problem import SCALE, make_dy, make_inputs, run, seed_on

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float32]
SHAPE = (300, 264, 136, 16)


def assert_same(got, want):
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.fixture
def problem(request):
    inputs = make_inputs(*SHAPE, "cuda", request.param)
    return inputs, make_dy(inputs)


with_dtypes = pytest.mark.parametrize("problem", DTYPES, ids=str, indirect=True)


@with_dtypes
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_run_to_run(problem, p):
    inputs, dy = problem
    first = run(lora_linear, inputs, dy, scale=SCALE, p=p, seed=seed_on("cuda"))
    for _ in range(5):
        assert_same(run(lora_linear, inputs, dy, scale=SCALE, p=p, seed=seed_on("cuda")), first)


def capture(function):
    """(graph, results of function): warmed up on a side stream first, as torch asks."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@with_dtypes
def test_graph_replay_is_eager(problem):
    inputs, dy = problem
    scale = torch.tensor(SCALE, device="cuda")
    graph, results = capture(lambda: run(lora_linear, inputs, dy, scale=scale))
    for new_scale in (SCALE, 2.5):
        with torch.no_grad():
            inputs["x"].copy_(torch.randn_like(inputs["x"]))
        dy.copy_(torch.randn_like(dy))
        scale.fill_(new_scale)
        for result in results.values():
            result.fill_(float("nan"))
        graph.replay()
        assert_same(results, run(lora_linear, inputs, dy, scale=scale))


@with_dtypes
def test_two_replays_drop_different_entries(problem):
    inputs, dy = problem
    scale = torch.tensor(SCALE, device="cuda")
    graph, results = capture(lambda: run(lora_linear, inputs, dy, scale=scale, p=0.5))
    graph.replay()
    first = {name: value.clone() for name, value in results.items()}
    graph.replay()
    for name in ("y", "dx", "dA", "dB"):
        assert not torch.equal(first[name], results[name]), name
        assert torch.isfinite(results[name]).all()


@with_dtypes
def test_captured_merge(problem):
    inputs, _ = problem
    scale = torch.tensor(SCALE, device="cuda")
    weight, A, B = (inputs[name].detach() for name in ("weight", "A", "B"))
    start = weight.clone()
    graph, _ = capture(lambda: merge_(weight, A, B, scale))
    weight.copy_(start)
    graph.replay()
    assert torch.equal(weight, merge_(start, A, B, scale))


@with_dtypes
def test_a_slow_producer_on_a_side_stream(problem):
    inputs, dy = problem
    want = run(lora_linear, inputs, dy, scale=SCALE)
    source = inputs["x"].detach().clone()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(50):
        with torch.cuda.stream(side):
            inputs["x"].data.fill_(float("nan"))
            torch.cuda._sleep(1_000_000)
            inputs["x"].data.copy_(source)
            got = run(lora_linear, inputs, dy, scale=SCALE)
        side.synchronize()
        assert_same(got, want)


@with_dtypes
def test_two_threads_on_two_streams(problem):
    inputs, dy = problem
    want = run(lora_linear, inputs, dy, scale=SCALE)
    torch.cuda.synchronize()
    failures = []

    def work():
        stream = torch.cuda.Stream()
        own = {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in inputs.items()}
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            for _ in range(200):
                got = run(lora_linear, own, dy, scale=SCALE)
                stream.synchronize()
                if not all(torch.equal(got[name], value) for name, value in want.items()):
                    failures.append(got)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two CUDA devices")
@with_dtypes
def test_a_device_that_is_not_current(problem):
    inputs, dy = problem
    want = run(lora_linear, inputs, dy, scale=SCALE)
    moved = {name: t.detach().to("cuda:1").requires_grad_(t.requires_grad) for name, t in inputs.items()}
    assert torch.cuda.current_device() == 0
    got = run(lora_linear, moved, dy.to("cuda:1"), scale=SCALE)
    assert torch.cuda.current_device() == 0
    assert {value.device.index for value in got.values()} == {1}
    for name, value in want.items():
        torch.testing.assert_close(got[name].cpu(), value.cpu())
    weight = moved["weight"].clone()
    merge_(weight, moved["A"], moved["B"], SCALE)
    torch.testing.assert_close(weight.cpu(), merge_(inputs["weight"].clone(), inputs["A"], inputs["B"], SCALE).cpu())


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two CUDA devices")
@pytest.mark.parametrize("name", ["x", "A", "B", "bias"])
def test_two_devices_in_one_call(name):
    inputs = make_inputs(*SHAPE, "cuda")
    inputs[name] = inputs[name].to("cuda:1")
    with pytest.raises(ValueError, match=f"{name} must be on cuda:0"):
        lora_linear(**inputs)
