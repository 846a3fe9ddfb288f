"""The measurement that the pytest benchmarks and the report share.

A shape is prepared once: every variant built and checked. A (shape, pass, mode) is timed once, variants interleaved.
"""

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from . import timing
from .check import WrongResultError, check_results, check_variant, reference_results
from .shapes import FORWARD_BACKWARD, Shape, memory_needed
from .variants import VARIANTS, Kind, Problem, Variant, make_problem, run

MEASURED, WRONG, UNAVAILABLE, FAILED = "measured", "wrong", "unavailable", "failed"


@dataclass(frozen=True)
class Outcome:
    """samples in seconds, or a status other than "measured" and its reason.

    wrong: the results are wrong. unavailable: a library is missing or memory ran out. failed: any other exception.
    """

    status: str
    samples: tuple[float, ...] = ()
    reason: str = ""


def outcome_of(error: Exception) -> Outcome:
    """The outcome that stands in for an exception."""
    if isinstance(error, WrongResultError):
        status = WRONG
    elif isinstance(error, (ImportError, torch.OutOfMemoryError)):
        status = UNAVAILABLE
    else:
        status = FAILED
    lines = str(error).strip().splitlines() or [""]
    return Outcome(status, reason=lines[0] if status == WRONG else f"{type(error).__name__}: {lines[0]}")


def dtype_on(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@dataclass
class Prepared:
    """A shape's problem, the variants that computed it right, the outcomes of the others, and what was learned.

    errors: relative Frobenius errors by variant and tensor. memory: bytes at the peak of forward and backward.
    """

    problem: Problem
    expected: dict[str, dict[str, torch.Tensor]]
    ready: dict[str, Variant] = field(default_factory=dict)
    refused: dict[str, Outcome] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, kind: Kind) -> None:
        """Builds and checks one variant; an exception becomes its outcome."""
        try:
            variant = kind.factory(self.problem)
            self.errors[name] = check_variant(variant, self.problem, self.expected[kind.work])
            if self.problem.x.is_cuda:
                self.memory[name] = timing.peak_memory(lambda: run(variant, self.problem, backward=True))
            self.ready[name] = variant
        except Exception as error:
            self.refused[name] = outcome_of(error)


def prepare(shape: Shape, device, dtype: torch.dtype, variants: dict[str, Kind]) -> Prepared:
    """The problem, its reference results, and every variant built and checked."""
    problem = make_problem(shape, device, dtype)
    works = {kind.work for kind in variants.values()}
    prepared = Prepared(problem, {work: reference_results(problem, work) for work in works})
    for name, kind in variants.items():
        prepared.add(name, kind)
    return prepared


class Measurements:
    """One process's measurements on one device: bf16 on a GPU, fp32 on a CPU, every variant in every mode that there
    is, unless told otherwise."""

    def __init__(
        self,
        device=None,
        dtype=None,
        rounds: int = timing.ROUNDS,
        variants: dict[str, Kind] | None = None,
        modes: tuple[str, ...] | None = None,
    ):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype or dtype_on(self.device)
        self.rounds = rounds
        self.variants = dict(VARIANTS if variants is None else variants)
        self.modes = modes or timing.modes(self.device.type)
        self._prepared: dict[Shape, Prepared] = {}
        self._outcomes: dict[tuple, dict[str, Outcome]] = {}

    def obstacle(self, shape: Shape) -> str | None:
        """Why a shape cannot be measured here, or None."""
        if self.device.type != "cuda" or shape in self._prepared:
            return None
        self._release()
        needed, free = memory_needed(shape, self.dtype.itemsize, len(self.variants)), torch.cuda.mem_get_info()[0]
        if needed + timing.FLUSH_BYTES <= free:
            return None
        return f"{shape} needs about {needed / 2**30:.1f} GiB of device memory, {free / 2**30:.1f} GiB are free"

    def prepared(self, shape: Shape) -> Prepared:
        """The shape's problem and checked variants; those of the last shape are released first."""
        if shape not in self._prepared:
            self._release()
            self._prepared[shape] = prepare(shape, self.device, self.dtype, self.variants)
        return self._prepared[shape]

    def outcomes(self, shape: Shape, pass_name: str, mode: str) -> dict[str, Outcome]:
        """Every variant's outcome, timed at the first call and remembered."""
        key = (shape, pass_name, mode)
        if key not in self._outcomes:
            prepared = self.prepared(shape)
            backward = pass_name == FORWARD_BACKWARD
            if mode == timing.GRAPH:
                measured = _measure_graphs(prepared, backward, self.rounds, self.variants)
            else:
                measured = _measure_calls(prepared, backward, self.rounds, mode)
            self._outcomes[key] = {name: (prepared.refused | measured)[name] for name in self.variants}
        return self._outcomes[key]

    def _release(self) -> None:
        self._prepared.clear()
        # Compiled code is kept for every shape otherwise, up to a limit after which dynamo stops compiling.
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _measured(samples: timing.Samples) -> dict[str, Outcome]:
    return {name: Outcome(MEASURED, tuple(times)) for name, times in samples.items()}


def _measure_calls(prepared: Prepared, backward: bool, rounds: int, mode: str) -> dict[str, Outcome]:
    problem = prepared.problem
    calls = {name: lambda variant=variant: run(variant, problem, backward) for name, variant in prepared.ready.items()}
    if mode == timing.HOST:
        return _measured(timing.time_host(calls, rounds))
    return _measured(timing.time_eager(calls, rounds, problem.x.device.type))


def _measure_graphs(prepared: Prepared, backward: bool, rounds: int, variants: dict[str, Kind]) -> dict[str, Outcome]:
    """Captures each variant and checks what its graph writes before any is timed."""
    problem, graphs, refused = prepared.problem, {}, {}
    for name, variant in prepared.ready.items():
        try:
            call = lambda variant=variant: run(variant, problem, backward)  # noqa: E731
            graphs[name] = checked_graph(call, prepared.expected[variants[name].work], problem.x.dtype)
        except Exception as error:
            refused[name] = outcome_of(error)
    return refused | _measured(timing.time_graphs(graphs, rounds))


def checked_graph(call: Callable[[], tuple[torch.Tensor, ...]], expected: dict[str, torch.Tensor], dtype: torch.dtype):
    """call() as a graph with the results that it writes, for timing.time_graphs. Raises WrongResultError where they are
    not what is expected."""
    graph, results = timing.capture(call)
    timing.replay_over_nan(graph, results)
    check_results(results, expected, dtype)
    return graph, results
