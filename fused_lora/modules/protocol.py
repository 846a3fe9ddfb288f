"""What groups, MLPs, explain and ReLoRA ask of a layer, whatever its class."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..formats import Stored
from ..ops import Part, Routed
from ..ops.lora_parts import MOST_PARTS, obstacle
from ..ops.lora_segments_mlp import obstacle as mlp_obstacle
from ..ops.lora_segments_mlp import obstacle_of_banks
from ..ops.parts import autocast_dtype


class LoRALayer(Protocol):
    """A module that is a frozen linear and its update, and can be computed or merged from outside.

    Its forward begins by asking siblings.output, which may have its result.
    """

    merged: bool

    @property
    def frozen_weight(self) -> Tensor | Stored:
        """(N, K), whatever the layer is computed by now. A layer whose weight is Stored has its format as `base`."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """That of the activations it is made for: the weight's, where that is in no format."""

    def lora_part(self) -> Part:
        """Its own tensors where it has one of each: what they are changed to, the layer is. Where why_not is None. They
        may be in shards or elsewhere (is_whole); a gain that no rank knows then is NaN."""

    def lora_sources(self) -> tuple:
        """All that its part is made of, each the same object as long as the part is the same."""

    @property
    def dropping(self) -> float:
        """The probability by which it drops now."""

    def why_not(self) -> str | None:
        """Why it is not computed as a linear and its update now, or None."""

    def offered(self, x: Tensor) -> Part | Routed | str:
        """What it makes of x, to be computed in its place; or why nobody may compute it but by calling it."""


PLAIN = (nn.Parameter, Tensor)  # subclasses, as nested, sharded and fake ones, know linears of their own


def is_whole(part: Part) -> bool:
    """Whether its tensors are plain ones, and not in shards of any kind."""
    return are_plain(part.weight) and type(part.A) in PLAIN and type(part.B) in PLAIN


def are_plain(weight: Tensor | Stored) -> bool:
    """The same of what a frozen weight is made of."""
    if not isinstance(weight, Stored):
        return type(weight) in PLAIN
    return all(tensor is None or type(tensor) in PLAIN for tensor in weight.tensors)


def is_lora(module: nn.Module | None) -> bool:
    """By its class: a child of any name is no method."""
    return hasattr(type(module), "lora_part")


def is_bank(module: nn.Module | None) -> bool:
    """Whether rows have adapters of their own in it. By its class."""
    return hasattr(type(module), "check_new")


def together(layers: Sequence[LoRALayer | None], x: Tensor, gated: bool = False) -> list[Part] | list[Routed] | str:
    """The parts of layers that read x (gated: of an MLP), or why each must be computed by itself."""
    if type(x) not in PLAIN:
        return f"x is a {type(x).__name__}"
    dtype = autocast_dtype(x) or x.dtype
    if gated and all(map(is_bank, layers)):
        reason = obstacle_of_banks(x.device, dtype, any(layer.dropping > 0 for layer in layers))
        if reason is not None:
            return reason
    parts = []
    for layer in layers:
        part = layer.offered(x) if is_lora(layer) or is_bank(layer) else f"it is a {type(layer).__name__}"
        if isinstance(part, str):
            return f"one of its layers runs by its own forward: {part}"
        parts.append(part)
    routed = [part for part in parts if isinstance(part, Routed)]
    if routed:
        return _routed_obstacle(x.device, dtype, routed, parts, gated) or routed
    p = layers[0].dropping
    if any(layer.dropping != p for layer in layers[1:]):
        return "its layers drop by different rules"
    return obstacle(x.device, dtype, parts, gated) or parts


def _routed_obstacle(
    device: torch.device, dtype: torch.dtype, routed: list[Routed], parts: list, gated: bool
) -> str | None:
    if len(routed) < len(parts):
        return "rows have adapters of their own in some of its layers, and not in others"
    if len(parts) > MOST_PARTS:
        return f"they are more than {MOST_PARTS}"
    if len({part.window for part in routed}) > 1:
        return "their routes have windows of several sizes"
    return mlp_obstacle(device, dtype, routed) if gated else None
