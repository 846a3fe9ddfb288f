"""LoRALinear: the frozen linear and its low-rank update, as one module."""

import copy
import math

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from .. import checks, ops, padding
from ..formats import Format
from . import hooks, siblings
from .attributes import parameter
from .frozen import asked_base, check_linear, found_in
from .loading import loading_errors
from .merging import Merging
from .protocol import is_whole


class LoRALinear(Merging):
    """y = x W^T + scale dropout(x) A^T B^T + bias with W and bias frozen: nn.Linear plus a trainable update of rank r.

        weight (N, K), bias (N,)    as nn.Linear's, under its names, requires_grad False
        lora_A (r, K), lora_B (N, r)    trainable, in weight's dtype unless lora_dtype says otherwise (float32 over a
                                        16-bit base is PEFT's default)

    scale is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora. lora_A starts kaiming-uniform (a = sqrt 5) and
    lora_B zero, so a new layer computes what the linear did. lora_dropout acts on the update's input in training.
    While merged, forward is the plain linear on the merged weight, and state_dict holds that weight and says so: its
    `_extra_state` is merged, as a bool tensor (of DoRA the gain that the weight was merged with; in a format the bytes
    of the weight before). Where it is absent, from an nn.Linear or an earlier version, a loaded weight counts as not
    merged.

    use_dora: y = gain (x W^T + scale dropout(x) A^T B^T) + bias, gain = lora_magnitude_vector / |W + scale B A| of each
    row, whose gradient passes to lora_magnitude_vector (N,) alone; it starts as the norms. PEFT, with dropout in
    training, applies W to the dropped x as well; here the frozen part is never dropped.

    On a GPU, a 16-bit weight with in_features that are no multiple of 8 lies in padded rows: a view of the same shape,
    which safetensors wants .contiguous(). pad_rows=False leaves it dense, as FSDP needs it; the default pads it where
    torch.distributed is not initialized. Memory that another tensor shares stays as it is: after
    load_state_dict(assign=True), until the dict is gone and the layer is moved.

    Raises ValueError or TypeError naming the argument.
    LoRA: Hu et al. 2021, arXiv:2106.09685. rsLoRA: Kalajdzievski 2023, arXiv:2312.03732. DoRA: Liu et al. 2024,
    arXiv:2402.09353.
    """

    pads_rows = True  # of layers that were pickled before there was the choice

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float = 1.0,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        device=None,
        dtype=None,
        lora_dtype=None,
        pad_rows: bool | None = None,
        use_dora: bool = False,
    ):
        checks.check_probability("lora_dropout", lora_dropout)
        if lora_dtype is not None:
            checks.check_dtype("lora_dtype", lora_dtype)
        super().__init__(r, lora_alpha, use_rslora)
        self.in_features = in_features
        self.out_features = out_features
        self.lora_dropout = lora_dropout
        self.pads_rows = padding.by_default() if pad_rows is None else pad_rows
        like = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.weight = like.weight.requires_grad_(False)
        self.bias = like.bias if like.bias is None else like.bias.requires_grad_(False)
        factor = dict(device=self.weight.device, dtype=lora_dtype or self.weight.dtype)
        self.lora_A = nn.Parameter(torch.empty(r, in_features, **factor))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, **factor))
        self.lora_magnitude_vector = nn.Parameter(torch.empty(out_features, **factor)) if use_dora else None
        self.reset_lora_parameters()
        self._settle()

    def _settle(self) -> None:
        """After weight may have moved: its rows are padded, and the scale is beside it before a CUDA graph is made."""
        if self.pads_rows:
            padding.pad_rows_(self.weight)
        self._scale_beside(self.weight)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._settle()
        return self

    def __deepcopy__(self, memo):
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__dict__, memo))
        new._settle()
        return new

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        key, before = prefix + _EXTRA_STATE_KEY_SUFFIX, (self.merged, self.get_extra_state(), self.arrived)
        errors = loading_errors(self, state_dict, prefix)
        if errors:
            error_msgs += errors
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + "weight" not in state_dict:
            merged, undoes, arrived = before  # what the dict says is of another weight
            self._set_merged(merged, undoes if undoes.dim() else None, arrived)
        elif key not in state_dict:
            self._set_merged(False)
        if key in missing_keys:
            missing_keys.remove(key)
        self._settle()

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """A kaiming-uniform with a = sqrt 5, that is U(-1/sqrt(K), 1/sqrt(K)); B zero. Raises RuntimeError if merged:
        the update in weight could not be taken out any more."""
        if self.merged:
            raise RuntimeError("lora_A and lora_B cannot begin anew while they are merged: call unmerge_() first")
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        self._reset_magnitudes()

    def _reset_magnitudes(self) -> None:
        if self.use_dora:
            self.lora_magnitude_vector.copy_(ops.row_norms(self.frozen_weight, self.lora_A, self.lora_B, self.scale))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int,
        lora_alpha: float = 1.0,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_dtype=None,
        train_bias: bool = False,
        pad_rows: bool | None = None,
        use_dora: bool = False,
        base: str | Format | None = None,
    ) -> "LoRALinear":
        """A LoRALinear on the linear's own parameters, which it freezes, the bias unless train_bias.

        Nothing is copied, but where a weight moves to padded rows. With a base the weight is quantised: "fp8", "int8",
        "nf4", "nf4-nested", or a format of fused_lora.formats. The linear then has lost its own, and is of no use. What
        bitsandbytes or Hugging Face has quantised is taken as it is (quantised.py): the tensors are shared.
        """
        check_linear(linear)
        base = asked_base(base)
        layer = cls.beside(linear, r, lora_alpha, lora_dropout, use_rslora, lora_dtype, pad_rows, use_dora, base)
        layer.quantise(linear, base)
        layer.take_base(train_bias)
        return layer

    @classmethod
    def beside(
        cls, linear: nn.Linear, r, lora_alpha, lora_dropout, use_rslora, lora_dtype, pad_rows, use_dora, base=None
    ) -> "LoRALinear":
        """from_linear without take_base: what can fail, before anything of the linear is changed."""
        found = found_in(linear, base)
        dtype = linear.weight.dtype if found is None else found.dtype
        with torch.device("meta"):
            layer = cls(
                linear.in_features, linear.out_features, r, lora_alpha, lora_dropout, linear.bias is not None,
                use_rslora, dtype=dtype, lora_dtype=lora_dtype, pad_rows=pad_rows, use_dora=use_dora,
            )  # fmt: skip
        # Only the factors are allocated: a to_empty() would hold a second weight for a moment.
        device = linear.weight.device
        layer._start_on(linear, found)
        for name, factor in list(layer.named_parameters()):
            if factor.is_meta and name.startswith("lora_"):
                setattr(layer, name, nn.Parameter(torch.empty_like(factor, device=device)))
        layer.reset_lora_parameters()
        return layer.train(linear.training)

    @torch.no_grad()
    def quantise(self, linear: nn.Linear, base: Format | None) -> None:
        """Frozen's; DoRA's magnitudes then are the norms of what W has become."""
        super().quantise(linear, base)
        if base is not None:
            self._reset_magnitudes()

    def take_base(self, train_bias: bool = False) -> None:
        """weight, and bias unless train_bias, stop requiring gradients; a bias to be trained starts requiring one.

        weight moves to padded rows where that was chosen.
        """
        self._freeze()
        if self.bias is not None:
            self.bias.requires_grad_(train_bias)
        self._settle()

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return self._traced(input)
        if self.merged:
            return self._plainly(input)
        if siblings.thread.call is not None:
            y = siblings.output(self, input)
            if y is not None:
                return y
        weight, A, B, bias, scale, *_ = self._part()
        gain = self._gain(scale) if self.use_dora else None
        return ops.lora_linear(input, weight, A, B, bias, scale, self.dropping, None, gain)

    def _traced(self, input: fx.Proxy) -> fx.Proxy:
        """A call of the whole layer, as fx.symbolic_trace makes of nn.Linear."""
        path = input.tracer.path_of_module(self)
        if not path:
            raise TypeError("a LoRALinear is a leaf of fx.symbolic_trace: trace a module that contains it")
        return input.tracer.create_proxy("call_module", path, (input,), {})

    # What protocol.py asks of any layer.

    def lora_part(self) -> ops.Part:
        """What the layer adds to a pass that it shares with others."""
        part = self._part()
        if not self.use_dora:
            return part
        magnitudes = self.lora_magnitude_vector
        gain = self._gain(part.scale) if is_whole(part) else torch.full_like(magnitudes, math.nan, requires_grad=False)
        return part._replace(gain=gain)

    def lora_sources(self) -> tuple:
        """All that its part is made of."""
        return (*self.frozen_tensors(), *self._part()[1:], parameter(self, "lora_magnitude_vector"))

    def _part(self) -> ops.Part:
        weight, A, B = parameter(self, "weight"), parameter(self, "lora_A"), parameter(self, "lora_B")
        scale = self._scale_beside(weight)
        return ops.Part(weight if self.base is None else self._stored(weight), A, B, parameter(self, "bias"), scale)

    @property
    def dropping(self) -> float:
        """The probability by which it drops now."""
        return self.lora_dropout if self.training else 0.0

    def why_not(self) -> str | None:
        """Why it is a plain linear now, or None."""
        return "it is merged" if self.merged else None

    def offered(self, x: Tensor) -> ops.Part | str:
        """Its part, to be computed in its place; or why nobody may compute it but by calling it."""
        reason = self.why_not() or hooks.why_alone(self, LoRALinear.forward)
        if reason is not None:
            return reason
        part = self._part()
        if not is_whole(part):
            return "it is in shards now, which fully_shard makes whole while the module runs that it was called on"
        if part.weight.requires_grad and torch.is_grad_enabled():
            return "its weight requires gradients"
        return part._replace(gain=self._gain(part.scale)) if self.use_dora else part

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
            + (", use_rslora=True" if self.use_rslora else "")
            + (", use_dora=True" if self.use_dora else "")
            + (f", base={self.base.name}" if self.base is not None else "")
            + (", merged" if self.merged else "")
        )
