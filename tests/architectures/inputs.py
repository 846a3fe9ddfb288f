"""Inputs of a small model, by what its forward takes."""

import inspect

import torch
from torch import Tensor, nn

BATCH, LENGTH, SAMPLES, FRAMES, LEAST_WORD = 2, 7, 4000, 64, 3
BINS = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "n_mels", "input_dim")


def inputs_of(model: nn.Module, words: int) -> dict:
    """Random ones; those that are floating point want gradients."""
    generator = torch.Generator().manual_seed(0)
    takes = inspect.signature(model.forward).parameters
    names = [model.main_input_name]
    if "decoder_input_ids" in takes:
        names.append("decoder_input_ids")
    elif "input_ids" in takes and model.main_input_name == "input_features":
        names.append("input_ids")
    dtype = next(model.parameters()).dtype
    inputs = {name: _input(name, model.config, words, dtype, generator) for name in dict.fromkeys(names)}
    return inputs | ({"use_cache": False} if "use_cache" in takes else {})


def _input(name: str, config, words: int, dtype: torch.dtype, generator) -> Tensor:
    if name.endswith("ids"):
        return torch.randint(LEAST_WORD, words, (BATCH, LENGTH), generator=generator)
    return torch.randn(_shape(name, config), generator=generator, dtype=dtype).requires_grad_()


def _shape(name: str, config) -> tuple[int, ...]:
    if name == "pixel_values":
        size = _field(config, "image_size", "input_size", "img_size") or 32
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return BATCH, _field(config, "num_channels", "in_channels", "in_chans") or 3, height, width
    if name in ("input_values", "inputs"):
        return BATCH, SAMPLES
    bins = _field(config, *BINS) or 80
    if config.model_type == "whisper":
        return BATCH, bins, 2 * config.max_source_positions
    return BATCH, FRAMES, bins


def _field(config, *names: str):
    """The first that a configuration or one inside it has."""
    inner = [value for key in config.sub_configs if (value := getattr(config, key, None)) is not None]
    found = (getattr(each, name, None) for each in (config, *inner) for name in names)
    return next((value for value in found if value is not None), None)
