"""Merging: the update in the weight, and out of it again."""

import warnings

import torch
from torch import Tensor, nn

from .. import checks, ops
from ..formats import Arrived, dequantise
from ..formats.merging import merge_
from . import magnitudes
from .frozen import Frozen
from .loading import MAGNITUDES, MATRICES, SCALES, TENSORS, says_merged
from .scaled import Scaled


class Merging(Frozen, Scaled):
    """What LoRALinear has of it: weight, bias, lora_A, lora_B, and lora_magnitude_vector where it is DoRA.

    arrived: what became of the update in a weight that is in a format, since merge_ until unmerge_.
    """

    arrived: Arrived | None = None
    _merged_gain: Tensor | None = None  # of DoRA, while merged: what the weight was multiplied by
    _merged_from: Tensor | None = None  # of a format, while merged: the bytes from before

    def __init__(self, r: int, lora_alpha: float, use_rslora: bool):
        super().__init__(r, lora_alpha, use_rslora)
        self.merged = False

    @property
    def use_dora(self) -> bool:
        """Whether it has magnitudes."""
        own = self._parameters
        return (own[MAGNITUDES] if MAGNITUDES in own else getattr(self, MAGNITUDES, None)) is not None

    def _gain(self, scale: Tensor) -> Tensor:
        return magnitudes.gain(self.lora_magnitude_vector, self.frozen_weight, self.lora_A, self.lora_B, scale)

    def get_extra_state(self) -> Tensor:
        """merged, for state dicts: a weight means nothing without it. Instead of True, what takes the update out again:
        of DoRA the gain, of a format the bytes from before."""
        undoes = self._merged_from if self.base is not None else self._merged_gain
        return undoes if self.merged and undoes is not None else torch.tensor(self.merged, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """As get_extra_state gave it."""
        undoes = state.to(self.weight.device, copy=True) if state.dim() else None
        self._set_merged(says_merged(state), undoes)

    def _set_merged(self, merged: bool, undoes: Tensor | None = None, arrived: Arrived | None = None) -> None:
        self.merged, self.arrived = merged, arrived
        self._merged_from, self._merged_gain = (undoes, None) if self.base is not None else (None, undoes)

    @torch.no_grad()
    def merge_(self) -> "Merging":
        """weight += scale B A in place, of DoRA times its gain; forward is then a plain linear.

        A weight in a format is quantised again, to the nearest, which may keep little of an update: `arrived` says how
        much, and a warning where that is less than half. A copy of the codes and scales stays beside it for unmerge_.

        The factors have no gradients meanwhile. Raises RuntimeError if merged already, ValueError for a factor that is
        not finite and a magnitude of 0 (they could not be taken out) and for tensors that are offloaded, TypeError for
        sharded ones, NotImplementedError for DoRA over a weight in a format, or its merge in a CUDA graph.
        """
        if self.merged:
            raise RuntimeError("the update is already merged")
        self.check_mergeable()
        if self.base is None:
            self._set_merged(True, self._merge_into(self.weight))
        else:
            self._merge_into_codes()
        return self

    def _merge_into_codes(self) -> None:
        stored = self.frozen_weight
        before = stored.bytes()
        arrived = merge_(stored, self.base, self.lora_A, self.lora_B, self.scale)
        self._set_merged(True, before, arrived)
        if arrived.share < checks.MUCH:
            warnings.warn(checks.little_arrived("the update", arrived.share), stacklevel=4)

    @torch.no_grad()
    def unmerge_(self) -> "Merging":
        """Takes it out of weight in place. Exact in float64 and float32 up to their rounding; in 16 bits each entry
        comes back to within one unit in the last place of the larger of its two values, after a hundred cycles
        too; of DoRA, whose gain divides what was rounded, the first few cycles lose more, and further ones nothing.
        A weight in a format has its bits from before. Raises as merge_ does."""
        if not self.merged:
            raise RuntimeError("the update is not merged")
        self.check_mergeable()
        if self.base is not None:
            self.frozen_weight.set_bytes_(self._merged_from)
        elif self.use_dora:
            gain = self._merged_gain.to(self.weight.device)
            magnitudes.unmerge_(self.weight, self.lora_A, self.lora_B, self.scale, gain)
        else:
            ops.merge_(self.weight, self.lora_A, self.lora_B, -self.scale)
        self._set_merged(False)
        return self

    def check_mergeable(self) -> None:
        """Raises what merge_ does of the tensors as they are."""
        self._check_at_hand()
        for name, tensor in zip(TENSORS, self.frozen_tensors(), strict=False):
            if tensor is not None:
                checks.check_own(name, tensor)
        if self.base is not None:
            self._check_codes()
        self._check_finite()
        if self.use_dora and not self.merged and not _is_captured(self.weight) and not self._lasting_gain().all():
            raise ValueError(f"{MAGNITUDES} must not be 0 to be merged, since its row could not be taken out")

    def _check_codes(self) -> None:
        if self.use_dora:
            raise NotImplementedError("weight is quantised, and DoRA is not merged into codes: to_linear() merges it")
        if _is_captured(self.weight):
            raise NotImplementedError("weight is quantised, and its merge waits for the device: not in a CUDA graph")

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A new nn.Linear with the merged weight and a copy of the bias, which train; this layer stays as it is.

        Of a weight in a format it is what that stands for and the update, rounded once to compute_dtype; while merged,
        what has arrived of the update. Raises ValueError or TypeError as merge_ does.
        """
        self._check_at_hand()
        if not self.merged:
            self._check_finite()
        N, K = self.frozen_weight.shape
        linear = nn.Linear(K, N, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self._merged_weight())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear.train(self.training)

    def _merged_weight(self) -> Tensor:
        """In memory of its own."""
        weight = dequantise(self.frozen_weight) if self.base is not None else self.weight.detach().clone()
        if not self.merged:
            self._merge_into(weight)
        return weight.to(self.compute_dtype)

    def _merge_into(self, weight: Tensor) -> Tensor | None:
        """The gain, of DoRA."""
        if not self.use_dora:
            ops.merge_(weight, self.lora_A, self.lora_B, self.scale)
            return None
        gain = self._lasting_gain()
        magnitudes.merge_(weight, self.lora_A, self.lora_B, self.scale, gain)
        return gain

    def _lasting_gain(self) -> Tensor:
        return magnitudes.lasting_gain(
            self.lora_magnitude_vector.detach(), self.frozen_weight, self.lora_A, self.lora_B, self.scale
        )

    def _check_at_hand(self) -> None:
        scales = [name for name in SCALES if self._parameters.get(name) is not None]
        for name in (*MATRICES, *scales, *self._magnitudes()):
            checks.check_at_hand(name, getattr(self, name))

    def _magnitudes(self) -> tuple[str, ...]:
        return (MAGNITUDES,) if self.use_dora else ()

    def _check_finite(self) -> None:
        """Waits for the device once, but in a CUDA graph, which cannot."""
        if _is_captured(self.weight):
            return
        names = (*MATRICES[1:], *self._magnitudes())
        finite = torch.stack([getattr(self, name).isfinite().all() for name in names]).tolist()
        for name, is_finite in zip(names, finite, strict=True):
            if not is_finite:
                raise ValueError(f"{name} must be finite to be merged, got an infinity or a NaN")


def _is_captured(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
