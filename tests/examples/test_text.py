"""The demo's text: English, without repeats, and split the same way every time."""

import torch

from examples import text


def test_docstrings_are_english():
    docstrings = text.docstrings()
    assert len(docstrings) > 300_000
    assert docstrings.count(" the ") > len(docstrings) / 500


def test_language_reference_has_each_paragraph_once():
    reference = text.language_reference()
    paragraphs = reference.split("\n\n")
    assert len(reference) > 200_000
    assert reference.count(" the ") > len(reference) / 500
    assert len(set(paragraphs)) == len(paragraphs)
    assert text.language_reference() == reference


def test_tokens_are_bytes():
    tokens = text.encode("naïve\n".encode())
    assert tokens.tolist() == [110, 97, 195, 175, 118, 101, 10]
    assert text.decode(tokens) == "naïve\n"


def test_split_holds_out_the_end():
    tokens = torch.arange(101)
    train, held_out = text.split(tokens)
    assert len(held_out) == 10
    assert torch.equal(torch.cat((train, held_out)), tokens)
