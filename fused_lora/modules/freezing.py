"""What trains in a model: the updates alone."""

from torch import nn

from .lora_linear import LoRALinear
from .protocol import is_bank


def freeze_all_but_updates(model: nn.Module) -> None:
    """LoRALinear and LoRABank layers, those of an earlier call too, have frozen what is not to train of their own."""
    banks = [module for module in model.modules() if is_bank(module)]
    factors = {id(factor) for bank in banks for each in (bank.lora_A, bank.lora_B) for factor in each.parameters()}
    for module in model.modules():
        if isinstance(module, LoRALinear):
            continue
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in factors:
                parameter.requires_grad_(False)
