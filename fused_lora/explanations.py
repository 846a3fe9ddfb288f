"""What explain() finds, and how it is printed."""

from dataclasses import dataclass

import torch

from .predict import Launch, Prediction, words

# Launch parameters that name the tile, in the order in which they are shown.
_TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_C", "BLOCK_R", "BLOCK_T", "num_warps", "num_stages")
_PATH = ("TMA", "FACTOR_TMA", "LOW_TMA", "DROPOUT")


@dataclass(frozen=True)
class Explanation:
    """shape (M, K, N, r), r = 0 where no update is computed; backend and reason; for kernels the launches of forward
    and backward, each (kernel, programs, parameters); for a card by name what they take, if that can be predicted; base
    is the format of the frozen weight, where it is in one."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: str
    backend: str
    reason: str
    forward: tuple[tuple[str, int, dict], ...] = ()
    backward: tuple[tuple[str, int, dict], ...] = ()
    notes: tuple[str, ...] = ()
    gpu: str | None = None
    predicted: Prediction | None = None
    base: str | None = None

    def __str__(self) -> str:
        M, K, N, r = self.shape
        lines = [
            f"M={M} tokens, K={K} -> N={N}{f', r={r}' if r else ''}, {self.dtype} on {self.device}"
            + (f", the frozen weight in {self.base}" if self.base else ""),
            f"backend: {self.backend} ({self.reason})",
        ]
        for title in ("forward", "backward"):
            launches = getattr(self, title)
            times = getattr(self.predicted, title) if self.predicted else [None] * len(launches)
            lines += [f"{title}:"] if launches else []
            lines += [_in_words(*launch, predicted) for launch, predicted in zip(launches, times, strict=True)]
        return "\n".join(lines + self._predicted_lines() + [f"note: {note}" for note in self.notes])

    def _predicted_lines(self) -> list[str]:
        if self.predicted is None:
            return [words.NOT_PREDICTED] if self.gpu else []
        return words.lines(self.shape, self.gpu, self.predicted)


def _in_words(name: str, programs: int, meta: dict, predicted: Launch | None) -> str:
    tile = [f"{key}={meta[key]}" for key in _TILE if key in meta] + [key for key in _PATH if meta.get(key)]
    time = [f"({predicted.us:.0f} us)"] if predicted else []
    return " ".join([f"  {name} programs={programs}", *tile, *time])


@dataclass(frozen=True)
class MLPExplanation:
    """gate, up and down by name, and what is fused of them."""

    layers: dict[str, Explanation]
    fused: str

    def __str__(self) -> str:
        return "\n".join([*(f"{name}: {layer}" for name, layer in self.layers.items()), f"as one: {self.fused}"])


@dataclass(frozen=True)
class ModelExplanation:
    """What a model's layers get, by name: each LoRALinear, or the LoRAMLP that it belongs to. Printed, layers that get
    the same are one."""

    layers: dict[str, Explanation | MLPExplanation]

    def __str__(self) -> str:
        alike: dict[str, list[str]] = {}
        for name, explanation in self.layers.items():
            alike.setdefault(str(explanation), []).append(name)
        return "\n\n".join(f"{_names_in_short(names)}\n{text}" for text, names in alike.items())


def _names_in_short(names: list[str]) -> str:
    """model.layers.*.mlp.up_proj (24 layers) for names that differ in numbers only."""
    if len(names) == 1:
        return names[0]
    families: dict[tuple, list[list[str]]] = {}
    for name in names:
        parts = name.split(".")
        families.setdefault(tuple("*" if part.isdigit() else part for part in parts), []).append(parts)
    columns = [zip(*family, strict=True) for family in families.values()]
    patterns = [".".join(part[0] if len(set(part)) == 1 else "*" for part in parts) for parts in columns]
    return f"{', '.join(patterns)} ({len(names)} layers)"


def in_short(launches) -> tuple[tuple[str, int, dict], ...]:
    """Name, grid and tile of recorded launches, as an Explanation has them."""
    return tuple((plan.name, plan.grid[0], plan.meta) for plan, _ in launches)
