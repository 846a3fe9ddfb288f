"""Timers. Seconds, variants interleaved: every round times each variant once, from a cold L2.

Three modes on a GPU, never mixed:
    graph   kernel time: CUDA events around the replay of a graph of the whole step
    eager   the whole call: CUDA events around the step on an idle GPU, so that time spent on the host counts
    host    the host alone: what it takes to issue a step, in bursts of steps that nothing waits for
A CPU has one, eager, by time.perf_counter, with whatever the caches hold; on a busy one, threads that wait for each
other are most of what is measured (OMP_NUM_THREADS=1 steadies it).
"""

import gc
import time
from collections.abc import Callable
from contextlib import contextmanager

import torch

GRAPH, EAGER, HOST = "graph", "eager", "host"
ROUNDS = 24
# Rounds that are timed and thrown away: clocks, allocator and lazily loaded kernels settle.
WARM_UP_ROUNDS = 3
# Few enough that the queue to the GPU, which holds about a thousand launches, is never full.
BURST = 8
SLEEP_CYCLES = 60_000_000  # 30 ms or more
REST, MOST_RESTS = 1.0, 6  # seconds; rounds
# More than any L2; zeroing it evicts what the last step left there.
FLUSH_BYTES = 256 * 2**20

Calls = dict[str, Callable[[], object]]
Samples = dict[str, list[float]]


def modes(device_type: str) -> tuple[str, ...]:
    """The modes that a device has."""
    return (GRAPH, EAGER, HOST) if device_type == "cuda" else (EAGER,)


@contextmanager
def no_garbage_collection():
    """Collects first, and then not before the end."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleave(calls: Calls, rounds: int, time_once: Callable) -> dict[str, list]:
    """What time_once(call) returns, `rounds` times for each call, after WARM_UP_ROUNDS more that are dropped.

    Each round begins one variant later than the last, so that none always follows the same neighbour's start.
    """
    samples = {name: [] for name in calls}
    names = list(calls)
    with no_garbage_collection():
        for number in range(WARM_UP_ROUNDS + rounds):
            first = number % max(len(names), 1)
            for name in names[first:] + names[:first]:
                samples[name].append(time_once(calls[name]))
    return {name: times[WARM_UP_ROUNDS:] for name, times in samples.items()}


def capture(call: Callable[[], tuple[torch.Tensor, ...]], stream: torch.cuda.Stream | None = None, pool=None):
    """(graph, the tensors that the captured call returned): call() warmed up on a side stream, then captured; both on
    `stream` where one is given, as backward passes want that of their forward. pool: memory that graphs share.

    The tensors belong to the CUDA graph: each replay writes them anew. They are detached, so that no autograd node of
    one capture lives to be met, on another stream, by the next.
    """
    side = stream or torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_ROUNDS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        results = tuple(result.detach() for result in call())
    return graph, results


def replay_over_nan(graph, results: tuple[torch.Tensor, ...]) -> None:
    """Replays once with NaN in every result: an element that the graph does not write stays NaN."""
    for result in results:
        result.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()


def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


def seconds_of(call: Callable[[], object]) -> float:
    """Of what call() adds to the current stream, whose end is awaited."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def time_graphs(graphs: dict[str, tuple], rounds: int) -> Samples:
    """Mode graph, of what capture returned. Nothing waits between steps: the flush covers the time that launching the
    graph takes."""
    flush = _flush_buffer()

    def time_once(captured):
        graph, _ = captured
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
        return start, end

    events = interleave(graphs, rounds, time_once)
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) * 1e-3 for start, end in pairs] for name, pairs in events.items()}


def time_rested(graphs: dict[str, tuple], rounds: int) -> Samples:
    """Of one replay each by a card that did nothing for REST seconds, and so has clocks that its power limit denies it
    where it is busy for long."""

    def time_once(captured):
        torch.cuda.synchronize()
        time.sleep(REST)
        return seconds_of(captured[0].replay)

    return interleave(graphs, rounds, time_once)


def time_device(calls: Calls, rounds: int, prepare: Callable[[], object]) -> Samples:
    """For calls that cannot be captured: the GPU's own time, since it sleeps while the host issues them. prepare() goes
    before each."""

    def time_once(call):
        prepare()
        torch.cuda.synchronize()
        torch.cuda._sleep(SLEEP_CYCLES)
        return seconds_of(call)

    return interleave(calls, rounds, time_once)


def _time_eager_cuda(calls: Calls, rounds: int, prepare: Callable[[], object]) -> Samples:
    flush = _flush_buffer()

    def time_once(call):
        prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda.synchronize()
        start.record()
        # Kept until after the end: freeing the results is not part of the step.
        results = call()
        end.record()
        end.synchronize()
        del results
        return start.elapsed_time(end) * 1e-3

    return interleave(calls, rounds, time_once)


def _time_eager_cpu(calls: Calls, rounds: int, prepare: Callable[[], object]) -> Samples:
    def time_once(call):
        prepare()
        start = time.perf_counter()
        results = call()
        elapsed = time.perf_counter() - start
        del results
        return elapsed

    return interleave(calls, rounds, time_once)


def time_eager(calls: Calls, rounds: int, device_type: str, prepare: Callable[[], object] = lambda: None) -> Samples:
    """Mode eager: from an idle device to the end of the step's last kernel. prepare() goes before each."""
    return (_time_eager_cuda if device_type == "cuda" else _time_eager_cpu)(calls, rounds, prepare)


def time_host(calls: Calls, rounds: int) -> Samples:
    """Mode host."""

    def time_once(call):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(BURST):
            call()
        return (time.perf_counter() - start) / BURST

    return interleave(calls, rounds, time_once)


def kept_memory(call: Callable[[], object]) -> int:
    """Bytes that call() leaves allocated while its results live. GPU only."""
    call()
    with no_garbage_collection():
        before = torch.cuda.memory_allocated()
        results = call()
        kept = torch.cuda.memory_allocated() - before
    del results
    return kept


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes that call() allocates at its peak beyond what was allocated before it, its results included. GPU only."""
    # Workspaces that stay allocated come with the first call.
    call()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del results
    return peak
