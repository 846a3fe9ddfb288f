"""Scaled: lora_alpha, use_rslora and the scale that follows from them, which is kept in one place."""

import math

import torch
from torch import Tensor, nn

from .. import checks


@torch.inference_mode(False)  # a tensor of inference mode could not be saved for a later backward
def scale_beside(scaling: float, weight: Tensor) -> Tensor:
    """A scale as ops take it."""
    dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32  # beside codes of any kind too
    return torch.full((), scaling, dtype=dtype, device=weight.device)


class Scaled(nn.Module):
    """scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora, as a number and as a tensor beside weight.

    The tensor is no buffer, since nothing but these attributes and weight's place decides it: casts, empty copies and
    FSDP's buffer_dtype would lose what a checkpoint need not hold. It is float32, or float64 beside a float64 weight,
    and stays the same tensor until weight's device (or that dtype) changes, so captured CUDA graphs go on reading it.
    """

    merged: bool
    weight: Tensor

    def __init__(self, r: int, lora_alpha: float, use_rslora: bool):
        checks.check_rank(r)
        checks.check_scale("lora_alpha", lora_alpha)
        super().__init__()
        self._r, self._lora_alpha, self._use_rslora = r, lora_alpha, use_rslora
        self._scale: Tensor | None = None

    @property
    def r(self) -> int:
        """The rank, which is lora_A's and lora_B's."""
        return self._r

    @property
    def lora_alpha(self) -> float:
        """Setting it changes the scale in place: nothing recompiles, and captured CUDA graphs see it."""
        return self._lora_alpha

    @lora_alpha.setter
    def lora_alpha(self, lora_alpha: float) -> None:
        checks.check_scale("lora_alpha", lora_alpha)
        self._rescale("lora_alpha", lora_alpha)

    @property
    def use_rslora(self) -> bool:
        """Setting it changes the scale in place."""
        return self._use_rslora

    @use_rslora.setter
    def use_rslora(self, use_rslora: bool) -> None:
        self._rescale("use_rslora", use_rslora)

    def set_lora_alpha(self, lora_alpha: float) -> None:
        """The same as setting lora_alpha."""
        self.lora_alpha = lora_alpha

    @property
    def scaling(self) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""
        return self._lora_alpha / (math.sqrt(self._r) if self._use_rslora else self._r)

    @property
    def scale(self) -> Tensor:
        """scaling, in one element where weight is."""
        return self._scale_beside(self.weight)

    def _scale_beside(self, weight: Tensor) -> Tensor:
        # weight moves by many ways, not all of which a module hears of: _apply, an assignment, DataParallel's replicas.
        scale, wide = self._scale, weight.dtype is torch.float64
        if scale is None or scale.device != weight.device or (scale.dtype is torch.float64) is not wide:
            scale = self._scale = scale_beside(self.scaling, weight)
        return scale

    def _rescale(self, name: str, value: float) -> None:
        if self.merged:
            raise RuntimeError(f"{name} cannot change while the update is merged: call unmerge_() first")
        setattr(self, f"_{name}", value)
        self.scale.fill_(self.scaling)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if "scale" in self._buffers:  # a layer that was pickled when these were a buffer and plain attributes
            self._scale = self._buffers.pop("scale")
            self._non_persistent_buffers_set.discard("scale")
            for name in ("r", "lora_alpha", "use_rslora"):
                setattr(self, f"_{name}", self.__dict__.pop(name))
