"""What each backend takes for forward and backward of one shape: CUDA graphs, a cold L2, interleaved, medians."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import backends
from ..choices import Times
from ..ops import lora_linear
from .shapes import Shape

CANDIDATES = ("cuda", "triton", "addmm")
ROUNDS, WARM_UP_ROUNDS = 15, 3
FLUSH_BYTES = 256 * 2**20  # more than any L2
TOLERANCE = 2e-2  # relative error between backends: above what 16 bits round away, far below what a wrong kernel does
SCALE = 0.75
Step = Callable[[], tuple[Tensor, ...]]


@dataclass
class Measured:
    """times as choices.remember takes them, and in words why a backend has none."""

    times: Times = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def measure(shape: Shape, dtype: torch.dtype, p: float, device: torch.device) -> Measured:
    """Every backend that can run the shape here, where its results are those of torch's own products."""
    found, graphs = Measured(), {}
    step = make_step(shape, dtype, p, device)
    for name in CANDIDATES:
        obstacle = backends.lora_linear_obstacle(name, device, dtype, shape.r, readable=True)
        if obstacle is not None:
            found.reasons[name] = obstacle
            continue
        try:
            with backends.forcing(name):
                graphs[name] = capture(step)
        except Exception as error:  # of a compiler, or for want of memory: on cards that nobody has tried
            _refuse(found, name, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    for name in wrong(graphs):
        del graphs[name]
        _refuse(found, name, "its results are not those of addmm")
    found.times |= {name: round(time, 3) for name, time in time_graphs(graphs, device).items()}
    return found


def _refuse(found: Measured, name: str, reason: str) -> None:
    found.times[name], found.reasons[name] = None, reason


def make_step(shape: Shape, dtype: torch.dtype, p: float, device: torch.device) -> Step:
    """y, dx, dA and dB of random operands."""
    M, K, N, r = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, columns: int, std: float) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device, dtype=dtype).mul_(std)

    x, A, B = (each.requires_grad_() for each in (normal(M, K, 1), normal(r, K, K**-0.5), normal(N, r, r**-0.5)))
    weight, dy = normal(N, K, K**-0.5), normal(M, N, 1)
    scale, seed = torch.full((), SCALE, device=device), torch.full((), 1, dtype=torch.int64, device=device)

    def step() -> tuple[Tensor, ...]:
        y = lora_linear(x, weight, A, B, scale=scale, p=p, seed=seed)
        return (y, *torch.autograd.grad(y, (x, A, B), dy))

    return step


def capture(step: Step) -> "tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]":
    """The step as a graph, replayed once, and the results that it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_ROUNDS):  # kernels are compiled and loaded
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = tuple(result.detach() for result in step())
    graph.replay()
    torch.cuda.synchronize()
    return graph, results


def wrong(graphs: dict[str, tuple]) -> list[str]:
    """Those whose results are not addmm's; none where there is nothing to compare with."""
    if "addmm" not in graphs:
        return []
    expected = graphs["addmm"][1]
    return [name for name, (_, results) in graphs.items() if not agree(results, expected)]


def agree(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """By relative Frobenius error; NaN agrees with nothing."""
    pairs = [(got.float(), want.float()) for got, want in zip(results, expected, strict=True)]
    return all((got - want).norm() <= TOLERANCE * want.norm() for got, want in pairs)


def time_graphs(graphs: dict[str, tuple], device: torch.device) -> dict[str, float]:
    """The median time of a replay in microseconds, for each graph."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    events: dict[str, list] = {name: [] for name in graphs}
    for _ in range(WARM_UP_ROUNDS + ROUNDS):
        for name, (graph, _) in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            graph.replay()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(1e3 * start.elapsed_time(end) for start, end in pairs[WARM_UP_ROUNDS:])
        for name, pairs in events.items()
    }
