import pytest
import torch

from fused_lora.kernels.reduce_splits import reduce_splits
from tests.kernels.problem import DEVICE

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("splits", [1, 3, 16, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_workspaces_of_unlike_size(splits, dtype):
    pairs = []
    for shape in [(splits, 5, 77), (splits + 2, 300)]:
        parts = torch.randn(shape, device=DEVICE)
        pairs.append((parts, torch.full(shape[1:], float("nan"), dtype=dtype, device=DEVICE)))
    reduce_splits(*pairs)
    for parts, out in pairs:
        expected = parts.double().sum(0)
        tolerance = 1e-5 if dtype is torch.float32 else 2**-8
        assert ((out.double() - expected).abs() <= tolerance * parts.double().abs().sum(0)).all()


def test_one_workspace():
    parts = torch.randn(4, 1000, device=DEVICE)
    out = torch.empty(1000, device=DEVICE)
    reduce_splits((parts, out))
    torch.testing.assert_close(out, parts.sum(0))
