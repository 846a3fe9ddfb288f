import pytest
import torch
import triton
import triton.language as tl

from fused_lora import reference
from fused_lora.kernels.dropout import Dropout, keep_mask
from tests.kernels.problem import DEVICE

pytestmark = pytest.mark.interpreter


@triton.jit
def write_mask(out, seed_ptr, threshold, cols, BLOCK: tl.constexpr):
    row, col = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    keep = keep_mask(tl.load(seed_ptr), row, col, threshold, BLOCK, BLOCK)
    offs = (row + tl.arange(0, BLOCK))[:, None] * cols + (col + tl.arange(0, BLOCK))[None, :]
    tl.store(out + offs, keep.to(tl.int8))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 31 / 32, 0.97, 0.999, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**40 + 12345, 2**62 - 1])
def test_mask_is_the_reference_bit_for_bit(seed, p):
    seed = torch.tensor(seed, dtype=torch.int64, device=DEVICE)
    out = torch.empty(64, 96, dtype=torch.int8, device=DEVICE)
    write_mask[2, 3](out, seed, Dropout(p, seed).threshold, 96, BLOCK=32)
    assert torch.equal(out.bool(), reference.keep_mask(64, 96, p, seed))
