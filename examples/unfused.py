"""The unfused twin: LoRA as it is usually written in plain torch, three matmuls, a product and a sum."""

import copy

from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora import LoRALinear


class UnfusedLoRALinear(nn.Module):
    """y = F.linear(x, W) + scale * F.linear(F.linear(x, A), B), on the parameters of a LoRALinear without a bias."""

    def __init__(self, layer: LoRALinear):
        super().__init__()
        self.weight, self.lora_A, self.lora_B = layer.weight, layer.lora_A, layer.lora_B
        self.scaling = layer.scaling

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return F.linear(x, self.weight) + self.scaling * F.linear(F.linear(x, A), B)


def unfused_twin(model: nn.Module) -> nn.Module:
    """A copy of the model, equal in every parameter, whose LoRALinear layers are UnfusedLoRALinear."""
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LoRALinear):
                setattr(parent, name, UnfusedLoRALinear(child))
    return twin
