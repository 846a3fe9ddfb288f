"""A training loop that measures itself, held-out perplexity, and sampling: what the demo does with a model."""

import math
import statistics
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fused_lora.pretrain.llama import next_token_loss
from fused_lora.relora import ReLoRA, jagged_cosine_schedule

# The first steps compile kernels and fill caches: they count for the loss and not for the speed.
UNTIMED_STEPS = 5
# Reading the loss waits for the GPU, so the bar does it rarely.
STEPS_PER_REPORT = 10


@dataclass(frozen=True)
class Schedule:
    """How long, on how much and how fast a model trains. The seed picks the batches."""

    steps: int
    batch_size: int
    seq_len: int
    learning_rate: float
    seed: int = 0

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len


@dataclass(frozen=True)
class TrainingRun:
    """The loss of every step in nats, the median step's speed, the GPU's peak memory in bytes (None on a CPU), and the
    controller of the restarts if there were any."""

    losses: Tensor
    tokens_per_second: float
    peak_memory: int | None
    relora: ReLoRA | None = None


def batches(tokens: Tensor, schedule: Schedule):
    """(inputs, targets) of every step, random windows of the text: the same for the same schedule."""
    generator = torch.Generator().manual_seed(schedule.seed)
    shape = (schedule.steps, schedule.batch_size, 1)
    starts = torch.randint(len(tokens) - schedule.seq_len, shape, generator=generator).to(tokens.device)
    offsets = torch.arange(schedule.seq_len + 1, device=tokens.device)
    for start in starts:
        window = tokens[start + offsets]
        yield window[:, :-1], window[:, 1:]


def with_restarts(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, cycles: int) -> ReLoRA:
    """ReLoRA over a model with LoRALinear layers: `cycles` of equal length, the last of which ends in a merge too."""
    length = schedule.steps // cycles
    scheduler = jagged_cosine_schedule(optimizer, schedule.steps, length // 5, length // 5, length)
    return ReLoRA(model, optimizer, scheduler, reset_every=length)


def train(
    model: nn.Module,
    tokens: Tensor,
    schedule: Schedule,
    title: str,
    autocast: torch.dtype | None = None,
    cycles: int | None = None,
) -> TrainingRun:
    """AdamW on whatever in the model requires a gradient, under a progress bar; by ReLoRA if there are cycles."""
    device = tokens.device
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], schedule.learning_rate)
    if cycles:
        scheduler = with_restarts(model, optimizer, schedule, cycles)
    else:
        scheduler = jagged_cosine_schedule(optimizer, schedule.steps, schedule.steps // 10, 0, reset_every=None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model.train()
    losses, timer = [], StepTimer(device)
    can_graph = device.type == "cuda" and autocast is None
    replayed = graphed(model, batches(tokens, schedule)) if can_graph else nullcontext()
    with replayed, tqdm(batches(tokens, schedule), title, total=schedule.steps, unit="step") as bar:
        for inputs, targets in bar:
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                loss = next_token_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            losses.append(loss.detach())
            timer.mark()
            if len(losses) % STEPS_PER_REPORT == 0:
                speed = schedule.tokens_per_step / timer.median_step()
                bar.set_postfix_str(f"loss {loss.item():.3f}, {speed:,.0f} tokens/s")
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    speed = schedule.tokens_per_step / timer.median_step()
    return TrainingRun(torch.stack(losses).cpu(), speed, peak, scheduler if cycles else None)


@contextmanager
def graphed(model: nn.Module, examples):
    """Inside, the model's training forward and its backward are CUDA graphs: a small model would wait for the host."""
    inputs, _ = next(examples)
    with warnings.catch_warnings():
        # The graphs warm up on a stream of their own, once.
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
        torch.cuda.make_graphed_callables(model, (inputs,))
        try:
            yield
        finally:
            del model.forward  # the replacement: the class's own is back


class StepTimer:
    """The median time from the end of a step to the end of the next: what else a machine does moves it little."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks = []

    def mark(self) -> None:
        """Ends a step. On a GPU the mark is queued behind the step's kernels; nothing waits."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def median_step(self) -> float:
        """Seconds; NaN before there is a timed step."""
        marks = self.marks[UNTIMED_STEPS - 1 :]
        if self.on_gpu:
            torch.cuda.synchronize()
            seconds = [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]
        else:
            seconds = [end - start for start, end in pairwise(marks)]
        return statistics.median(seconds) if seconds else math.nan


@torch.no_grad()
def held_out_logits(model: nn.Module, tokens: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """(logits in float32, targets) on consecutive windows of the text; what is left after the last window is unused."""
    model.eval()
    windows = (len(tokens) - 1) // schedule.seq_len
    inputs = tokens[: windows * schedule.seq_len].view(windows, schedule.seq_len)
    targets = tokens[1 : windows * schedule.seq_len + 1].view(windows, schedule.seq_len)
    return torch.cat([model(batch).float() for batch in inputs.split(schedule.batch_size)]), targets


def perplexity(logits: Tensor, targets: Tensor) -> float:
    return math.exp(next_token_loss(logits, targets).item())


@torch.no_grad()
def sample(model: nn.Module, prompt: Tensor, count: int, window: int, temperature: float = 0.5) -> Tensor:
    """The prompt (T,) and `count` tokens more, each drawn after a forward over the last `window` tokens."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    tokens = prompt
    for _ in range(count):
        logits = model(tokens[None, -window:])[0, -1].float().cpu()
        token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        tokens = torch.cat((tokens, token.to(tokens.device)))
    return tokens
