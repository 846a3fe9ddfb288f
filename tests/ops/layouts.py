"""The same values in other memory layouts, every byte around them NaN."""

import torch


def _nan(*shape, like):
    return torch.full(shape, float("nan"), dtype=like.dtype, device=like.device)


def contiguous(t):
    return t.clone(memory_format=torch.contiguous_format)


def transposed(t):
    """The last two dimensions swapped in memory."""
    return t.mT.contiguous().mT


def every_other_column(t):
    buffer = _nan(*t.shape[:-1], 2 * t.shape[-1], like=t)
    return buffer[..., ::2].copy_(t)


def every_other_row(t):
    buffer = _nan(*t.shape[:-2], 2 * t.shape[-2], t.shape[-1], like=t)
    return buffer[..., ::2, :].copy_(t)


def view_of_a_cat(t):
    """As where q, k and v come from one projection."""
    buffer = torch.cat([_nan(*t.shape, like=t), t, _nan(*t.shape, like=t)], dim=-1)
    return buffer[..., t.shape[-1] : 2 * t.shape[-1]]


def base_offset(t):
    """One element past the buffer's start: not 16-byte aligned."""
    return _nan(t.numel() + 1, like=t)[1:].view(t.shape).copy_(t)


def expanded_rows(t):
    """Stride 0, as the gradient of .sum() or of a broadcast: every row is the first."""
    return t[..., :1, :].expand(t.shape)


def expanded_all(t):
    return t.flatten()[0].expand(t.shape)


LAYOUTS = (
    contiguous,
    transposed,
    every_other_column,
    every_other_row,
    view_of_a_cat,
    base_offset,
    expanded_rows,
    expanded_all,
)

# What a bias may be besides a dense vector.
BIAS_LAYOUTS = {
    "every other": lambda bias: bias.repeat_interleave(2)[::2],
    "one for all": lambda bias: bias[:1].expand(bias.shape),
    "a column": lambda bias: torch.stack([bias, -bias], 1)[:, 0],
    "float64": torch.Tensor.double,
}
