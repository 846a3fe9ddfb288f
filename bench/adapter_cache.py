"""AdapterCache over a model: how fast adapters move, what that costs a pass beside it, and a switch the host."""

import statistics
import time
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from fused_lora import AdapterCache
from fused_lora.pretrain.llama import Llama

from . import timing
from .record import summary
from .step_arms import LORA_ALPHA
from .step_cases import Case

ALONE, PREFETCHING = "nothing moves", "an adapter moves beside it"
MOVES = 8  # of a round, one behind another


@dataclass(frozen=True)
class Cached:
    """A model, whose passes have the case's rows, and adapters of all its linears: `slots` on the device of `host`."""

    case: Case
    r: int = 16
    slots: int = 4
    host: int = 12

    def __str__(self) -> str:
        return f"{self.host} adapters of {self.case}, r = {self.r}"


CACHED, TINY = Cached(Case("7b", 8, 1024, blocks=8)), Cached(Case("tiny", 2, 16), r=4)


class Serving:
    """A model with a cache that is full, and two of its adapters in each batch; the others come one after another."""

    @torch.no_grad()
    def __init__(self, cached: Cached, device: torch.device):
        torch.manual_seed(0)
        with device:
            self.model = Llama(cached.case.model).to(torch.bfloat16).requires_grad_(False)
        self.cache = AdapterCache(self.model, cached.slots, cached.r, cached.host)
        names = [f"adapter_{i}" for i in range(cached.host)]
        for name in names:
            self.cache.put(name, self._factors(cached.r), LORA_ALPHA)
        self.names, self.others = names[:2], cycle(names[2:])
        shape = (cached.case.batch, cached.case.seq_len)
        self.tokens = torch.randint(cached.case.model.vocab_size, shape, device=device)

    def _factors(self, r: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Small ones, so that sums of all layers stay numbers."""
        banks = self.cache._banks
        return {
            layer: (torch.randn(r, bank.in_features) * 0.01, torch.randn(bank.out_features, r) * 0.01)
            for layer, bank in banks.items()
        }

    @property
    def bytes(self) -> int:
        """Of an adapter."""
        blobs = self.cache._blobs._host
        return blobs[0].numel() * blobs.element_size()

    def move(self) -> None:
        """The next adapter that is not there."""
        self.cache.prefetch([next(self.others)])

    @torch.no_grad()
    def step(self, moves: bool) -> Tensor:
        with self.cache.route(self.names):
            logits = self.model(self.tokens)
        if moves:
            self.move()
        return logits

    def switch(self) -> None:
        """To adapters that are there, and back to none."""
        with self.cache.route(self.names):
            pass


def _seconds_behind(stream: torch.cuda.Stream, last: torch.cuda.Stream, call) -> float:
    """Of what call() adds to a stream, which sleeps while it is added, until it ends on the last one."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(timing.SLEEP_CYCLES)
        start.record()
    call()
    with torch.cuda.stream(last):
        end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def _transfers(serving: Serving, rounds: int) -> dict[str, float]:
    """Seconds of an adapter: by the cache, and of a plain copy of as many pinned bytes."""
    blobs, device = serving.cache._blobs, serving.tokens.device
    pinned = torch.empty(serving.bytes, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(pinned, device=device)

    def copy() -> None:
        with torch.cuda.stream(blobs._copies):
            target.copy_(pinned, non_blocking=True)

    found = {}
    for name, last, call in (("copy", blobs._copies, copy), ("move", blobs._spreads, serving.move)):
        many = lambda call=call: [call() for _ in range(MOVES)]  # noqa: E731
        found[name] = statistics.median(_seconds_behind(blobs._copies, last, many) / MOVES for _ in range(rounds))
    return found


def _switch_seconds(serving: Serving, rounds: int) -> float:
    def once() -> float:
        start = time.perf_counter()
        serving.switch()
        return time.perf_counter() - start

    return statistics.median(once() for _ in range(rounds))


def measure(cached: Cached, rounds: int, device: torch.device) -> dict:
    """Bytes of an adapter; seconds of a move and of a plain copy (on a GPU), of a switch to adapters that are there,
    and of a pass with and without a move beside it."""
    serving = Serving(cached, device)
    serving.step(False)
    found = {"name": str(cached), "bytes": serving.bytes, "switch": _switch_seconds(serving, rounds)}
    if device.type == "cuda":
        found |= _transfers(serving, rounds)
    steps = {ALONE: lambda: serving.step(False), PREFETCHING: lambda: serving.step(True)}
    samples = timing.time_eager(steps, rounds, device.type)
    return found | {"steps": {name: summary(seconds) for name, seconds in samples.items()}}
