"""DreamBooth's case: a diffusion model of diffusers with adapters in its attention, self and cross."""

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from fused_lora.integrations.peft import accelerate, restore

from .models import assert_same, randomised

UNet2DConditionModel = pytest.importorskip("diffusers").UNet2DConditionModel

pytestmark = pytest.mark.filterwarnings("default")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture
def unet():
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4,
    )  # fmt: skip
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=3, lora_alpha=4.5, target_modules=TARGETS, init_lora_weights="gaussian"))
    return randomised(model)


def results(model):
    model.zero_grad()
    generator = torch.Generator().manual_seed(2)
    noisy, prompt = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 12, generator=generator)
    y = model(noisy, torch.tensor([3, 7]), prompt).sample
    (y * torch.randn(y.shape, generator=generator)).sum().backward()
    return {"y": y.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_attention(unet, groups):
    """q, k and v of one x together, and k and v of the prompt."""
    wanted, keys = results(unet), list(get_peft_model_state_dict(unet))
    report = accelerate(unet)
    layers = [name for name, _ in unet.named_modules() if name.endswith(tuple(TARGETS))]
    assert sorted(report.served) == sorted(layers)
    assert not report.kept
    assert_same(results(unet), wanted, 1e-4)
    assert set(groups) == {2, 3}
    assert list(get_peft_model_state_dict(unet)) == keys
    assert_same(results(restore(unet)), wanted, 0)


def test_adapters_that_are_switched_off_and_weighed(unet):
    accelerate(unet)
    wanted = {}
    for name, model in (("accelerated", unet), ("restored", None)):
        model = restore(unet) if model is None else model
        found = [results(model)["y"]]
        model.disable_adapters()
        with torch.no_grad():
            found.append(model(torch.ones(1, 4, 8, 8), 3, torch.ones(1, 5, 12)).sample)
        model.enable_adapters()
        model.set_adapters(["default"], weights=[0.5])
        found.append(results(model)["y"])
        model.set_adapters(["default"], weights=[1.0])
        wanted[name] = found
    for got, want in zip(wanted["accelerated"], wanted["restored"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted["restored"][0], wanted["restored"][2])
