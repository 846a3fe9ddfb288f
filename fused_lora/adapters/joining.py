"""Adapters that become one: the sum of what they add, by their ranks side by side."""

from collections.abc import Sequence

import torch
from torch import nn

from ..modules import LoRABank, delete_adapter, rename_adapter
from ..modules.banks import banks_with
from ..segments import SIZES

TEMPORARY = "_being_joined"


@torch.no_grad()
def join(model: nn.Module, name: str, adapters: Sequence[str]) -> None:
    """The adapter `name`, which may be one of them or new, becomes the sum of several: A's rows and B's columns one
    behind another, B by the ratio of its scale to the last one's. Exact where such ratios are powers of two, else with
    one rounding of B. Its parameters are new ones. ValueError where the ranks are too many; nothing has changed then.
    """
    if list(adapters) in ([], [name]):
        return
    found = [banks_with(model, each) for each in adapters]
    layers = {layer: bank for banks in found for layer, bank in banks.items()}
    sums = {layer: _Sum(bank, [each for each in adapters if each in bank.adapters]) for layer, bank in layers.items()}
    for layer, total in sums.items():
        if total.r > SIZES[-1]:
            raise ValueError(f"ranks must add up to {SIZES[-1]} at most, got {total.r} in {layer}")
        layers[layer].check_new(TEMPORARY, total.r, total.lora_alpha)
    try:
        for layer, total in sums.items():
            layers[layer].add_adapter(TEMPORARY, total.r, total.lora_alpha)
            for factor, values in zip(layers[layer].factors(TEMPORARY), (total.A, total.B), strict=True):
                factor.copy_(values)
    except BaseException:
        if any(TEMPORARY in bank.adapters for bank in layers.values()):
            delete_adapter(model, TEMPORARY)
        raise
    if name in adapters:
        delete_adapter(model, name)
    rename_adapter(model, TEMPORARY, name)


class _Sum:
    """Of adapters of one bank: factors whose product, by the last one's scale, is the sum of theirs."""

    def __init__(self, bank: LoRABank, names: list[str]):
        adapters = [bank.adapters[name] for name in names]
        scaling = adapters[-1].scaling or 1.0
        pairs = [bank.factors(name) for name in names]
        self.r = sum(adapter.r for adapter in adapters)
        self.lora_alpha = scaling * self.r
        self.A = torch.cat([A for A, _ in pairs])
        ups = zip(pairs, adapters, strict=True)
        self.B = torch.cat([B * (adapter.scaling / scaling) for (_, B), adapter in ups], 1)
