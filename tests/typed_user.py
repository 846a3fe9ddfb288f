"""What a user writes, for mypy to read (test_typing.py). It is never run."""

from pathlib import Path

import torch
from torch import nn

import fused_lora
from fused_lora import (
    LoRALinear,
    ReplaceReport,
    explain,
    load_adapter,
    lora_linear,
    merge_,
    merge_and_unload,
    print_trainable_parameters,
    replace_linear,
    save_adapter,
)
from fused_lora.ops import Part, lora_group, lora_mlp
from fused_lora.relora import ReLoRA

model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
report: ReplaceReport = replace_linear(model, r=4, lora_alpha=8.0, target_modules=["0"], lora_dtype=torch.float32)
names: list[str] = report.replaced
layer: LoRALinear = report.layers(model)[0]
y: torch.Tensor = layer(torch.randn(2, 8))
layer.merge_().unmerge_()
scale: float = layer.scaling
linear: nn.Linear = layer.to_linear()
text: str = str(explain(layer, tokens=128))
weight, A, B = torch.randn(8, 8), torch.randn(4, 8), torch.randn(8, 4)
z: torch.Tensor = lora_linear(torch.randn(2, 8), weight, A, B, scale=2.0)
merge_(weight, A, B, 0.5)
part = Part(weight, A, B, None, 2.0)
outputs: tuple[torch.Tensor, ...] = lora_group(torch.randn(2, 8), [part, part])
hidden: torch.Tensor = lora_mlp(torch.randn(2, 8), part, part, part)
save_adapter(model, Path("adapter"))
maybe: ReplaceReport | None = load_adapter(model, "adapter")
print_trainable_parameters(model)
optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
relora = ReLoRA(model, optimizer, reset_every=10)
relora.step()
plain: nn.Module = merge_and_unload(model)
version: str = fused_lora.__version__
