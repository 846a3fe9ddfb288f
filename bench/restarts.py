"""ReLoRA's restart of every linear of a model, by this package and by what else there is: W += s B A, A anew, B = 0.

Two floors: copying the weights once, on the GPU; and the low halves to the GPU and back, both ways at once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_lora.ops import merge_and_reinit_
from fused_lora.pretrain.presets import PRESETS

SCALE = 0.25
COPY, TRANSFER = "copy of W", "low halves to the GPU and back"
CHUNK = 16 * 2**20


@dataclass
class Model:
    """The linears of a LLaMA with factors of rank r."""

    weights: list[Tensor]
    As: list[Tensor]
    Bs: list[Tensor]
    scales: list[Tensor]

    @classmethod
    def make(cls, preset: str, device: torch.device, dtype: torch.dtype) -> "Model":
        config, r = PRESETS[preset].model, PRESETS[preset].r
        hidden, wide = config.hidden_size, config.intermediate_size
        shapes = [*[(hidden, hidden)] * 4, (wide, hidden), (wide, hidden), (hidden, wide)] * config.num_hidden_layers
        options = dict(device=device, dtype=dtype)
        return cls(
            [torch.randn(N, K, **options) * 0.02 for N, K in shapes],
            [torch.rand(r, K, **options) * K**-0.5 for _, K in shapes],
            [torch.zeros(N, r, **options) for N, _ in shapes],
            [torch.tensor(SCALE, device=device)] * len(shapes),
        )

    def train(self) -> None:
        """What a restart left at zero is something again."""
        for B in self.Bs:
            B.normal_(std=1e-3)

    @property
    def size(self) -> int:
        return sum(weight.numel() for weight in self.weights)

    def lows(self, in_host: bool) -> list[Tensor]:
        """Low halves of zeros, on the weights' device or pinned in the host's memory."""
        place = dict(pin_memory=True) if in_host else dict(device=self.weights[0].device)
        return [torch.zeros(weight.shape, dtype=torch.int16, **place) for weight in self.weights]


def variants(model: Model) -> dict[str, tuple[Callable[[], object], int]]:
    """(call, the bytes of weights and low halves that it has to move) by name."""
    copies = [torch.empty_like(weight) for weight in model.weights]
    moved = 2 * model.size * model.weights[0].element_size()
    halves = 4 * model.size
    found = {
        COPY: (lambda: [new.copy_(weight) for new, weight in zip(copies, model.weights, strict=True)], moved),
        "the reference's loop": (lambda: _loop(model, _by_product), moved),
        "addmm_": (lambda: _loop(model, _by_addmm), moved),
        "nearest": (lambda: _ours(model), moved),
        "stochastic": (lambda: _ours(model, rounding="stochastic"), moved),
    }
    if model.weights[0].dtype.itemsize == 2:
        here = model.lows(in_host=False)
        found["residual"] = (lambda: _ours(model, lows=here), moved + halves)
    if model.weights[0].is_cuda:
        there = model.lows(in_host=True)
        slots = [torch.empty(CHUNK // 2, dtype=torch.int16, device="cuda") for _ in range(4)]
        found[TRANSFER] = (lambda: _transfer(there, slots), halves)
        found["residual in the host's memory"] = (lambda: _ours(model, lows=there), halves)
    return found


def _ours(model: Model, **options) -> None:
    seeds = list(range(len(model.weights)))
    merge_and_reinit_(model.weights, model.As, model.Bs, model.scales, seeds, **options)


def _loop(model: Model, merge: Callable[[Tensor, Tensor, Tensor], object]) -> None:
    for weight, A, B in zip(model.weights, model.As, model.Bs, strict=True):
        merge(weight, A, B)
        torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        torch.nn.init.zeros_(B)


def _by_product(weight: Tensor, A: Tensor, B: Tensor) -> None:
    weight += (B @ A) * SCALE


def _by_addmm(weight: Tensor, A: Tensor, B: Tensor) -> None:
    weight.addmm_(B, A, alpha=SCALE)


def _transfer(lows: list[Tensor], slots: list[Tensor]) -> None:
    """Two streams, each way every byte once."""
    here, arriving, leaving = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()
    arriving.wait_stream(here)
    leaving.wait_stream(here)
    for i, chunk in enumerate(chunk for low in lows for chunk in low.flatten().split(CHUNK // 2)):
        with torch.cuda.stream(arriving):
            slots[i % 2][: len(chunk)].copy_(chunk, non_blocking=True)
        with torch.cuda.stream(leaving):
            chunk.copy_(slots[2 + i % 2][: len(chunk)], non_blocking=True)
    here.wait_stream(arriving)
    here.wait_stream(leaving)
