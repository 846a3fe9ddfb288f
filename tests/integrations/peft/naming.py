"""Models with several adapters, twice, and batches whose samples name them."""

import torch

from fused_lora.integrations.peft import accelerate

from .models import assert_same, config_of, net, randomised, results, twin_of

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
BATCHES = {
    "in order": ["default", "default", "second", "third"],
    "base in between": ["default", "__base__", "second", "__base__"],
    "interleaved": ["second", "default", "second", "default", "third", "second"],
    "one": ["third"],
    "a tuple": ("second", "default"),
}


def x_of(samples, dtype=torch.float64):
    return torch.randn(samples, 5, 9, generator=torch.Generator().manual_seed(3)).to(dtype)


def with_others(model, **options):
    """Adapters of other ranks, one of which is not everywhere."""
    model.add_adapter("second", config_of(**{"r": 8, "use_rslora": True, "lora_alpha": 3, **options}))
    model.add_adapter("third", config_of(**{"r": 70, "target_modules": ["up"], **options}))
    dtype = model.base_model.model.up.lora_A["default"].weight.dtype
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return randomised(model, seed=4).eval()


def both(**options):
    """The same model twice, the second one accelerated."""
    plain = with_others(net(**options))
    model = twin_of(plain)
    accelerate(model)
    return plain, model


def check(plain, model, names, tolerance=1e-12, dtype=torch.float64):
    x = x_of(len(names), dtype)
    assert_same(results(model, x, adapter_names=names), results(plain, x, adapter_names=names), tolerance)
