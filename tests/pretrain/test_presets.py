"""The presets: the paper's parameter counts, and schedules that can be made."""

import pytest
import torch

from fused_lora.pretrain.llama import Llama
from fused_lora.pretrain.presets import PRESETS, trainable_in_relora
from fused_lora.relora import JaggedCosine, ReLoRA


@pytest.mark.parametrize(("name", "millions"), [("60m", 43), ("130m", 72), ("250m", 99), ("350m", 125), ("1.3b", 251)])
def test_the_papers_trainable_parameters(name, millions):
    assert abs(trainable_in_relora(PRESETS[name]) / 1e6 - millions) < 1


@pytest.mark.parametrize("name", PRESETS)
def test_controls_have_as_many_parameters_as_the_low_rank_phase_trains(name):
    preset = PRESETS[name]
    with torch.device("meta"):
        count = sum(p.numel() for p in Llama(preset.control).parameters())
    assert abs(count / trainable_in_relora(preset) - 1) < 0.08


@pytest.mark.parametrize("name", PRESETS)
def test_schedules(name):
    preset = PRESETS[name]
    JaggedCosine(
        preset.total_steps, preset.warmup_steps, preset.restart_warmup_steps, preset.reset_every,
        warm_start_steps=preset.warm_start_steps,
    )  # fmt: skip


def test_counted_as_torch_does():
    preset = PRESETS["tiny"]
    model = Llama(preset.model)
    optimizer = torch.optim.AdamW(model.parameters())
    ReLoRA(model, optimizer, reset_every=10, r=preset.r, target_modules=r".*(self_attn|mlp).*")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable_in_relora(preset)
    assert abs(model.embed_tokens.weight.std().item() / 0.02 - 1) < 0.05
