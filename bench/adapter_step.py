"""Training steps of several adapters of one model: all tasks in one batch, and one task after another.

Both ways have the same LoRABank layers, adapters, optimizers and tokens; a batch's loss is the sum of its tasks' own.
On a GPU a step is a captured graph, optimizers included, and of one after another each task's is. In both ways
torch.compile has rotary positions and the loss, which are half of a step without it.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor, nn

from fused_lora import adapter_parameters, add_adapter, route
from fused_lora.pretrain import llama

from . import timing
from .check import WrongResultError, relative_error
from .record import summary
from .step_arms import LINEARS, LORA_ALPHA
from .step_cases import Case

# Of gradients, relative, where batches of two sizes are rounded in 16 bits, layer by layer.
TOLERANCE = 0.1
TOGETHER, IN_TURN = "all tasks in one batch", "one task after another"


@dataclass(frozen=True)
class Tasks:
    """Each has an adapter of its own, and so many sequences of a step as the case says."""

    case: Case
    count: int = 8
    r: int = 16

    def __str__(self) -> str:
        return f"{self.count} tasks of {self.case}, r = {self.r}"


STEP, TINY = Tasks(Case("350m", 8)), Tasks(Case("tiny", 2, 16), count=3, r=4)


class Training:
    """A frozen model, and of each task its adapter, its optimizer and its tokens."""

    def __init__(self, tasks: Tasks, device: torch.device):
        torch.manual_seed(0)
        with device:
            self.model = llama.Llama(tasks.case.model).to(torch.bfloat16)
        self.names = [f"task_{i}" for i in range(tasks.count)]
        for name in self.names:
            add_adapter(self.model, name, r=tasks.r, lora_alpha=LORA_ALPHA, target_modules=LINEARS, freeze=True)
        self.parameters = {name: list(adapter_parameters(self.model, name)) for name in self.names}
        generator = torch.Generator(device).manual_seed(1)
        on_gpu = device.type == "cuda"
        self.optimizers = {}
        for name, parameters in self.parameters.items():
            for parameter in parameters:  # so that no gradient is zero
                nn.init.normal_(parameter, std=0.02, generator=generator)
            self.optimizers[name] = torch.optim.AdamW(parameters, lr=1e-5, fused=on_gpu, capturable=on_gpu)
        shape = (tasks.count, tasks.case.batch, tasks.case.seq_len + 1)
        self.routes: dict[tuple[str, ...], route] = {}
        self.tokens = torch.randint(tasks.case.model.vocab_size, shape, generator=generator, device=device)

    def route_of(self, names: Sequence[str]) -> route:
        """The same in each call: none can be made while a graph is captured."""
        if tuple(names) not in self.routes:
            self.routes[tuple(names)] = route(self.model, names)
        return self.routes[tuple(names)]

    def gradients(self, names: Sequence[str]) -> tuple[Tensor, dict[str, tuple[Tensor, ...]]]:
        """The sum of these tasks' losses, computed in one batch, and of each task the gradients."""
        first = self.names.index(names[0])
        tokens = self.tokens[first : first + len(names)].flatten(0, 1)
        with self.route_of(names):
            loss = llama.next_token_loss(self.model(tokens[:, :-1]), tokens[:, 1:]) * len(names)
        every = [parameter for name in names for parameter in self.parameters[name]]
        grads = iter(torch.autograd.grad(loss, every))
        return loss.detach(), {name: tuple(next(grads) for _ in self.parameters[name]) for name in names}

    def step(self, names: Sequence[str]) -> tuple[Tensor]:
        """Of these tasks; their loss."""
        loss, grads = self.gradients(names)
        for name in names:
            for parameter, grad in zip(self.parameters[name], grads[name], strict=True):
                parameter.grad = grad
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()
        return (loss,)

    def batches(self, way: str) -> list[list[str]]:
        """The tasks that are computed together, one after another."""
        return [self.names] if way == TOGETHER else [[name] for name in self.names]


def check(training: Training) -> None:
    """Raises WrongResultError where the two ways have other gradients."""
    _, together = training.gradients(training.names)
    for name in training.names:
        _, alone = training.gradients([name])
        for got, expected in zip(together[name], alone[name], strict=True):
            error = relative_error(got, expected.double())
            if not error < TOLERANCE:
                raise WrongResultError(f"wrong result, no speed reported: {name}'s gradients are off by {error:.1e}")


class _InTurn:
    """Graphs that are replayed as one."""

    def __init__(self, graphs: list):
        self.graphs = graphs

    def replay(self) -> None:
        for graph in self.graphs:
            graph.replay()


def _captured(steps: list[Callable[[], tuple[Tensor]]]) -> tuple[_InTurn, tuple]:
    """As timing.time_graphs takes it; one has the memory of the one before."""
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    graphs = [timing.capture(step, stream, pool)[0] for step in steps]
    torch.cuda.empty_cache()
    return _InTurn(graphs), ()


def _in_turn(steps: list[Callable[[], tuple[Tensor]]]) -> None:
    for step in steps:
        step()


@contextmanager
def compiled_parts():
    """What is neither a linear nor attention, a norm or a sum, by torch.compile's kernels."""
    with ExitStack() as stack:
        for module, name in ((llama, "apply_rotary"), (llama, "next_token_loss")):
            fused = torch.compile(getattr(module, name), dynamic=False)
            stack.enter_context(patch.object(module, name, fused))
        yield


def measure(tasks: Tasks, rounds: int, device: torch.device) -> dict:
    """Of both ways a summary of the seconds for all tasks, tokens a second and, on a GPU, bytes."""
    with compiled_parts() if device.type == "cuda" else nullcontext():
        return _measure(Training(tasks, device), tasks, rounds, device)


def _measure(training: Training, tasks: Tasks, rounds: int, device: torch.device) -> dict:
    check(training)
    ways = {
        way: [lambda names=names: training.step(names) for names in training.batches(way)]
        for way in (TOGETHER, IN_TURN)
    }
    on_gpu = device.type == "cuda"
    # As calls: what captured graphs hold is theirs for good.
    peaks = {
        way: timing.peak_memory(lambda steps=steps: _in_turn(steps)) if on_gpu else None for way, steps in ways.items()
    }
    rested = {}
    if on_gpu:
        graphs = {way: _captured(steps) for way, steps in ways.items()}
        samples, rested = timing.time_graphs(graphs, rounds), timing.time_rested(graphs, min(rounds, timing.MOST_RESTS))
    else:
        samples = timing.time_eager({way: lambda s=steps: _in_turn(s) for way, steps in ways.items()}, rounds, "cpu")
    tokens, arms = tasks.count * tasks.case.tokens, {}
    for way, times in samples.items():
        seconds = summary(times)
        arms[way] = seconds | {"tokens_per_second": tokens / seconds["median"], "peak_bytes": peaks[way]}
        arms[way]["rested"] = summary(rested[way]) if way in rested else None
    return {"name": str(tasks), "arms": arms}
