"""Sequences of several tasks side by side, and the loss of each."""

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100  # the label of a token that nobody learns
BLOCK = 16  # tokens: products and attention compute as many in one go, by the same bits wherever they are


class Tokens(NamedTuple):
    """A sequence: input_ids (T,) and labels (T,), int64."""

    input_ids: Tensor
    labels: Tensor

    @property
    def labelled(self) -> int:
        """How many tokens are predicted from those before them."""
        return int((self.labels[1:] != IGNORED).sum())


class Batch(NamedTuple):
    """input_ids, labels and attention_mask (sequences, T), T the longest's up to a multiple of 16; mask and labels say
    what is padding. The mask is None where nothing is: models have faster attention then."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None


def tokens_of(item, place: str) -> Tokens:
    """What a task's data has at a place."""
    is_dict = hasattr(item, "keys")
    if is_dict and "input_ids" not in item.keys():  # noqa: SIM118 (a BatchEncoding's `in` is of something else)
        raise ValueError(f"{place}: input_ids must be there, got {', '.join(map(str, item.keys()))}")
    input_ids = _ints(item["input_ids"] if is_dict else item, f"{place}: input_ids")
    has_labels = is_dict and "labels" in item.keys()  # noqa: SIM118
    labels = _ints(item["labels"], f"{place}: labels") if has_labels else input_ids
    if labels.shape != input_ids.shape:
        raise ValueError(f"{place}: labels must be as many as input_ids, got {len(labels)} and {len(input_ids)}")
    if is_dict and "attention_mask" in item.keys() and item["attention_mask"] is not None:  # noqa: SIM118
        own = _without_padding(_ints(item["attention_mask"], f"{place}: attention_mask"), len(input_ids), place)
        return Tokens(input_ids[own], labels[own])
    return Tokens(input_ids, labels)


def _without_padding(mask: Tensor, count: int, place: str) -> slice:
    """The tokens between the padding at both ends."""
    (own,) = mask.nonzero(as_tuple=True)
    if len(mask) != count or len(own) < 2 or len(own) != own[-1] - own[0] + 1:
        raise ValueError(
            f"{place}: attention_mask must be as many as input_ids, 1 for at least two tokens that follow one another, "
            f"got {mask.tolist()}"
        )
    return slice(int(own[0]), int(own[-1]) + 1)


def _ints(values, name: str) -> Tensor:
    tensor = torch.as_tensor(values)
    if tensor.dim() != 1 or len(tensor) < 2 or tensor.is_floating_point():
        raise ValueError(f"{name} must be at least two ints in a row, got {tuple(tensor.shape)} {tensor.dtype}")
    return tensor.to("cpu", torch.int64)


def collate(sequences: Sequence[Tokens], device: torch.device) -> Batch:
    """On a device, padded at their ends."""
    lengths = torch.tensor([len(each.input_ids) for each in sequences])
    T = -(-int(lengths.max()) // BLOCK) * BLOCK
    mask = torch.arange(T) < lengths[:, None] if int(lengths.min()) < T else None
    input_ids = _padded([each.input_ids for each in sequences], T, 0)
    labels = _padded([each.labels for each in sequences], T, IGNORED)
    return Batch(*(None if each is None else _to(device, each) for each in (input_ids, labels, mask)))


def _padded(rows: list[Tensor], T: int, value: int) -> Tensor:
    padded = pad_sequence(rows, batch_first=True, padding_value=value)
    return F.pad(padded, (0, T - padded.shape[1]), value=value)


def _to(device: torch.device, tensor: Tensor) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def next_token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """(sequences,): the sum over a sequence's labelled tokens of -log p(token | those before it), float32 or wider.

    model(input_ids=, attention_mask=).logits of models that take a mask, as those of Hugging Face; else model(tokens),
    which are logits (sequences, T, vocabulary) themselves.
    """
    if "attention_mask" in inspect.signature(model.forward).parameters:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    else:
        logits = model(batch.input_ids)
    logits, targets = logits[:, :-1], batch.labels[:, 1:]
    wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide, targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets).sum(1)
