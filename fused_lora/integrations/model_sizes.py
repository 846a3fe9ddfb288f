"""The linears of a Hugging Face model, from its configuration alone: no weight is loaded or made."""

import torch
from transformers import AutoConfig, AutoModel

from ..modules.selection import Selection
from ..modules.targets import find_linears


def linear_sizes(model: str) -> list[tuple[int, int]]:
    """(in_features, out_features) of the linears that replace_linear replaces by default, each size once.

    model is a name on the Hub, a folder, or a configuration's file. Raises OSError for what is none of them, and
    ValueError for a model without such linears or of a kind that transformers does not know.
    """
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        built = AutoModel.from_config(config)
    _, linears = find_linears(built, Selection())
    return list(dict.fromkeys((linear.in_features, linear.out_features) for linear in linears))
