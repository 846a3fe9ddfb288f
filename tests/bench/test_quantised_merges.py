"""The tables of merges into weights of 8 and 4 bits, small."""

import torch

from bench.quantised_merges import CASES, FORMATS, NEAREST, RESIDUAL, document, drift, name_of, update
from fused_lora.formats import NF4


def test_an_update_has_its_size():
    A, B = update(96, 0.03, seed=1)
    assert torch.allclose((B @ A).norm(), torch.tensor(0.03 * 96))


def test_a_residual_keeps_what_codes_do_not():
    form = NF4()
    first = form.quantise(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    in_all, in_codes = drift(form, first, RESIDUAL)
    assert in_all < 0.01 < 0.5 < in_codes
    assert drift(form, first, NEAREST)[0] > 1


def test_every_format_is_in_every_table():
    lines = document(64).splitlines()
    for form in FORMATS:
        assert sum(line.startswith(f"| {name_of(form)} |") for line in lines) == 4
    assert lines[2].count("|") == len(CASES) + 2
