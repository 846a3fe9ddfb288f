"""Layers for `kernelize`: the forward of a layer that a model marked with their name, by this package's kernels.

They have no state of their own, as the hub wants it. What they read of the layer whose forward they become:

    LoRALinear      weight (N, K), bias (N,) or None, lora_A (r, K) and lora_B (N, r), all tensors; scaling, a number;
                    lora_dropout, a number or an nn.Dropout
    LoRAGatedMLP    gate_proj, up_proj and down_proj, each of them such a layer
"""

from torch import Tensor, nn

from .ops import Part, lora_linear, lora_mlp

__all__ = ["LoRAGatedMLP", "LoRALinear"]


def _dropout(layer: nn.Module) -> float:
    dropout = layer.lora_dropout
    p = dropout.p if isinstance(dropout, nn.Dropout) else dropout
    return p if layer.training else 0.0


def _part(layer: nn.Module) -> Part:
    return Part(layer.weight, layer.lora_A, layer.lora_B, layer.bias, layer.scaling)


class LoRALinear(nn.Module):
    """y = x W^T + scaling dropout(x) A^T B^T + bias. LoRA: Hu et al. 2021, arXiv:2106.09685."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(x, *_part(self)[:5], p=_dropout(self))


class LoRAGatedMLP(nn.Module):
    """y = down(silu(gate(x)) up(x)), all three of them LoRA linears with the dropout of the first."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (_part(layer) for layer in (self.gate_proj, self.up_proj, self.down_proj))
        return lora_mlp(x, gate, up, down, p=_dropout(self.gate_proj))
