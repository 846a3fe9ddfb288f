"""The demo's tokens: bytes, and split the same way every time."""

import torch

from examples import text


def test_tokens_are_bytes():
    tokens = text.encode("naïve\n".encode())
    assert tokens.tolist() == [110, 97, 195, 175, 118, 101, 10]
    assert text.decode(tokens) == "naïve\n"


def test_split_holds_out_the_end():
    tokens = torch.arange(101)
    train, held_out = text.split(tokens)
    assert len(held_out) == 10
    assert torch.equal(torch.cat((train, held_out)), tokens)
