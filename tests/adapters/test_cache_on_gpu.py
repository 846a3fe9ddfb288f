"""AdapterCache's streams: what is copied when, beside what, and that nobody reads a slot too early or too late."""

import json

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fused_lora import AdapterCache, add_adapter

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*Profiler clears events")]
SIZE, DEPTH, R = 1024, 6, 16


def make(slots=2, host=8):
    """A cache of host adapters, and what each of its layers computes in float64."""
    model = nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(DEPTH))).to("cuda", torch.bfloat16)
    cache = AdapterCache(model, slots, R, host, target_modules="all-linear")
    generator = torch.Generator().manual_seed(0)
    rnd = lambda *sizes: (torch.randn(*sizes, generator=generator) * SIZE**-0.5).bfloat16()  # noqa: E731
    known = {}
    for i in range(host):
        known[f"n{i}"] = {str(layer): (rnd(R, SIZE), 8 * rnd(SIZE, R)) for layer in range(DEPTH)}
        cache.put(f"n{i}", known[f"n{i}"], lora_alpha=2.0 * R)
    return cache, known


def expected(cache, factors, x):
    for layer in range(DEPTH):
        weight = cache.model[layer].weight.double()
        if factors is not None:
            A, B = (factor.to("cuda", torch.float64) for factor in factors[str(layer)])
            weight = weight + 2 * B @ A
        x = x @ weight.T
    return x


def is_near(y, want):
    return ((y.double() - want).norm() / want.norm()).item() < 2e-2


@torch.no_grad()
def test_slots_change_behind_long_kernels():
    """Adapters come and go while the device is far behind the host."""
    cache, known = make()
    x = torch.randn(300, SIZE, device="cuda", dtype=torch.bfloat16)
    order, results = (0, 3, 1, 5, 5, 2, 7, 0, 6, 4, 3, 2), []
    torch.cuda._sleep(10**8)
    for i in order:
        with cache.route([f"n{i}", "__base__"]):
            results.append(cache.model(x))
    for i, y in zip(order, results, strict=True):
        assert is_near(y[:150], expected(cache, known[f"n{i}"], x[:150].double())), i
        assert is_near(y[150:], expected(cache, None, x[150:].double())), i


@torch.no_grad()
def test_a_blob_on_its_way_is_not_overwritten():
    cache, known = make(slots=1, host=1)
    x = torch.randn(64, SIZE, device="cuda", dtype=torch.bfloat16)
    with torch.cuda.stream(cache._blobs._copies):
        torch.cuda._sleep(10**8)
    with cache.route("n0"):
        y = cache.model(x)
    cache.remove("n0")
    other = {layer: (-A, B) for layer, (A, B) in known["n0"].items()}
    cache.put("n1", other, lora_alpha=2.0 * R)
    assert is_near(y, expected(cache, known["n0"], x.double()))
    with cache.route("n1"):
        assert is_near(cache.model(x), expected(cache, other, x.double()))


@torch.no_grad()
def test_a_slab_that_moves_while_adapters_come():
    """What was on its way is in the new one."""
    cache, known = make(slots=2, host=2)
    x = torch.randn(64, SIZE, device="cuda", dtype=torch.bfloat16)
    for stream in (cache._blobs._copies, cache._blobs._spreads):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**8)
    cache.prefetch(["n0", "n1"])
    for i in range(8):
        add_adapter(cache.model, f"more_{i}", r=64, lora_alpha=64, target_modules="all-linear")
    for name in ("n0", "n1"):
        with cache.route(name):
            assert is_near(cache.model(x), expected(cache, known[name], x.double())), name


def traced(function, path):
    """The trace's events by kind, while a function ran, whose end is awaited outside of it."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        with torch.profiler.record_function("all"):
            function()
        torch.cuda.synchronize()
    trace.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if "dur" in event]
    whole = next(event for event in events if event["name"] == "all" and event["cat"] == "user_annotation")
    kinds = {"cuda_runtime": [], "cuda_driver": [], "gpu_memcpy": [], "kernel": []}
    for event in events:
        on_host = event.get("cat") in ("cuda_runtime", "cuda_driver")
        if event.get("cat") in kinds and not (on_host and event["ts"] > whole["ts"] + whole["dur"]):
            kinds[event["cat"]].append(event)
    return kinds


def waits_in(kinds):
    return {event["name"] for event in kinds["cuda_runtime"] + kinds["cuda_driver"] if "Synchronize" in event["name"]}


def is_beside(one, other):
    return one["ts"] < other["ts"] + other["dur"] and other["ts"] < one["ts"] + one["dur"]


def copies_in(kinds):
    """Of factors, which are large."""
    return [event for event in kinds["gpu_memcpy"] if "HtoD" in event["name"] and event["args"]["bytes"] > 10**5]


@torch.no_grad()
def test_prefetching_is_beside_what_computes_and_waits_for_nothing(tmp_path):
    """Read from a trace: one copy an adapter, on another stream, while kernels run; the host waits for no device."""
    cache, _ = make(slots=4)
    x = torch.randn(2**17, SIZE, device="cuda", dtype=torch.bfloat16)
    with cache.route("n0"):
        cache.model(x)

    def run():
        torch.cuda._sleep(10**8)  # the device is behind the host, however busy that is
        with cache.route("n0"):
            y = cache.model(x)
            cache.prefetch(["n1", "n2"])
            for _ in range(4):
                y = cache.model(y)

    kinds = traced(run, tmp_path / "trace.json")
    assert not waits_in(kinds)
    copies = copies_in(kinds)
    assert [copy["args"]["bytes"] for copy in copies] == [2 * R * 2 * SIZE * DEPTH] * 2
    longest = max(kinds["kernel"], key=lambda kernel: kernel["dur"])  # the model's
    kernels = [kernel for kernel in kinds["kernel"] if kernel["args"]["stream"] == longest["args"]["stream"]]
    assert longest["args"]["stream"] not in {copy["args"]["stream"] for copy in copies}
    for copy in copies:
        assert any(is_beside(copy, kernel) for kernel in kernels), "a copy ran while nothing computed"


@torch.no_grad()
def test_a_switch_to_what_is_resident_copies_no_factor(tmp_path):
    cache, known = make(slots=4)
    x = torch.randn(256, SIZE, device="cuda", dtype=torch.bfloat16)
    for name in ("n0", "n1"):
        with cache.route(name):
            cache.model(x)
    results = []

    def run():
        for name in ("n0", "n1", "n0"):
            with cache.route(name):
                results.append(cache.model(x))

    kinds = traced(run, tmp_path / "trace.json")
    assert kinds["kernel"]
    assert not waits_in(kinds)
    assert not copies_in(kinds)
    for name, y in zip(("n0", "n1", "n0"), results, strict=True):
        assert is_near(y, expected(cache, known[name], x.double()))


def test_backward_behind_an_eviction_raises():
    cache, _ = make(slots=1)
    x = torch.randn(64, SIZE, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with cache.route("n0"):
        y = cache.model(x)
    cache.prefetch(["n1"])
    with pytest.raises(RuntimeError):
        y.sum().backward()
