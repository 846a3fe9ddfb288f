"""LoRALinear: the frozen linear and its low-rank update, as one module."""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import checks, ops, padding


class LoRALinear(nn.Module):
    """y = x W^T + scale dropout(x) A^T B^T + bias with W and bias frozen: nn.Linear plus a trainable update of rank r.

        weight (N, K), bias (N,)    as nn.Linear's, under its names, requires_grad False
        lora_A (r, K), lora_B (N, r)    trainable, in weight's dtype unless lora_dtype says otherwise (float32 over a
                                        16-bit base is PEFT's default)

    scale is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora. lora_A starts kaiming-uniform (a = sqrt 5) and
    lora_B zero, so a new layer computes what the linear did. lora_dropout acts on the update's input in training.
    While merged, forward is the plain linear on the merged weight, and state_dict holds that weight.

    On a GPU, a 16-bit weight with in_features that are no multiple of 8 lies in padded rows: a view of the same shape,
    which safetensors wants .contiguous(). pad_rows=False leaves it dense, as FSDP needs it; the default pads it where
    torch.distributed is not initialized.

    Raises ValueError or TypeError naming the argument.
    LoRA: Hu et al. 2021, arXiv:2106.09685. rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
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
    ):
        checks.check_rank(r)
        checks.check_scale("lora_alpha", lora_alpha)
        checks.check_probability("lora_dropout", lora_dropout)
        if lora_dtype is not None:
            checks.check_dtype("lora_dtype", lora_dtype)
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.use_rslora = use_rslora
        self.merged = False
        self.pads_rows = padding.by_default() if pad_rows is None else pad_rows
        self.group = None  # LoRAGroup sets it
        like = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.weight = like.weight.requires_grad_(False)
        self.bias = like.bias if like.bias is None else like.bias.requires_grad_(False)
        factor = dict(device=self.weight.device, dtype=lora_dtype or self.weight.dtype)
        self.lora_A = nn.Parameter(torch.empty(r, in_features, **factor))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, **factor))
        self.register_buffer("scale", self._new_scale(self.weight.device), persistent=False)
        self.reset_lora_parameters()
        self._pad_rows()

    @property
    def scaling(self) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def _new_scale(self, device) -> Tensor:
        return torch.full((), self.scaling, dtype=torch.float32, device=device)

    def _apply(self, fn, recurse=True):
        # .to(dtype) would round the scale and .to_empty() would lose it: it is made anew wherever the weight now lives.
        super()._apply(fn, recurse)
        self.scale = self._new_scale(self.weight.device)
        self._pad_rows()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._pad_rows()  # what was assigned may be dense

    def __deepcopy__(self, memo):
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__dict__, memo))
        new._pad_rows()  # a parameter's copy is dense
        return new

    def _pad_rows(self) -> None:
        if self.pads_rows:
            padding.pad_rows_(self.weight)

    def set_lora_alpha(self, lora_alpha: float) -> None:
        """Changes the scale in place: nothing recompiles, and captured CUDA graphs see it."""
        checks.check_scale("lora_alpha", lora_alpha)
        if self.merged:
            raise RuntimeError("lora_alpha cannot change while the update is merged: call unmerge_() first")
        self.lora_alpha = lora_alpha
        self.scale.fill_(self.scaling)

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """A kaiming-uniform with a = sqrt 5, that is U(-1/sqrt(K), 1/sqrt(K)); B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

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
    ) -> "LoRALinear":
        """A LoRALinear on the linear's own parameters, which it freezes, the bias unless train_bias.

        Nothing is copied, but where a weight moves to padded rows.
        """
        checks.check_base(linear)
        layer = cls.beside(linear, r, lora_alpha, lora_dropout, use_rslora, lora_dtype, pad_rows)
        layer.take_base(train_bias)
        return layer

    @classmethod
    def beside(cls, linear: nn.Linear, r, lora_alpha, lora_dropout, use_rslora, lora_dtype, pad_rows) -> "LoRALinear":
        """from_linear without take_base: what can fail, before anything of the linear is changed."""
        checks.check_matrix("linear.weight", linear.weight)
        with torch.device("meta"):
            layer = cls(
                linear.in_features, linear.out_features, r, lora_alpha, lora_dropout, linear.bias is not None,
                use_rslora, dtype=linear.weight.dtype, lora_dtype=lora_dtype, pad_rows=pad_rows,
            )  # fmt: skip
        # Only the factors are allocated: a to_empty() would hold a second weight for a moment.
        device = linear.weight.device
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.lora_A = nn.Parameter(torch.empty_like(layer.lora_A, device=device))
        layer.lora_B = nn.Parameter(torch.empty_like(layer.lora_B, device=device))
        layer.scale = layer._new_scale(device)
        layer.reset_lora_parameters()
        return layer.train(linear.training)

    def take_base(self, train_bias: bool = False) -> None:
        """weight, and bias unless train_bias, stop requiring gradients; a bias to be trained starts requiring one.

        weight moves to padded rows where that was chosen.
        """
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(train_bias)
        self._pad_rows()

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        if self.group is not None:
            return self.group.output(self, x)
        p = self.lora_dropout if self.training else 0.0
        return ops.lora_linear(x, self.weight, self.lora_A, self.lora_B, self.bias, self.scale, p)

    def merge_(self) -> "LoRALinear":
        """weight += scale B A in place; forward is then a plain linear. Raises RuntimeError if merged already."""
        if self.merged:
            raise RuntimeError("the update is already merged")
        ops.merge_(self.weight, self.lora_A, self.lora_B, self.scale)
        self.merged = True
        return self

    def unmerge_(self) -> "LoRALinear":
        """weight -= scale B A in place. Exact in float64 and float32 up to their rounding; in 16 bits each entry comes
        back to within one unit in the last place of the larger of its two values."""
        if not self.merged:
            raise RuntimeError("the update is not merged")
        ops.merge_(self.weight, self.lora_A, self.lora_B, -self.scale)
        self.merged = False
        return self

    def to_linear(self) -> nn.Linear:
        """A new nn.Linear with the merged weight and a copy of the bias; this layer stays as it is."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.weight.dtype
        )
        linear.weight = nn.Parameter(self.weight.detach().clone())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        if not self.merged:
            ops.merge_(linear.weight, self.lora_A, self.lora_B, self.scale)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
            + (", use_rslora=True" if self.use_rslora else "")
            + (", merged" if self.merged else "")
        )
