"""The demo's texts as bytes."""

import torch
from torch import Tensor


def encode(text: bytes) -> Tensor:
    """One int64 token in [0, 256) a byte, whatever the text's encoding."""
    return torch.tensor(list(text), dtype=torch.int64)


def decode(tokens: Tensor) -> str:
    return bytes(tokens.tolist()).decode(errors="replace")


def split(tokens: Tensor, held_out: float = 0.1) -> tuple[Tensor, Tensor]:
    """(train, held-out): the last part of the text is held out."""
    boundary = len(tokens) - round(len(tokens) * held_out)
    return tokens[:boundary], tokens[boundary:]
