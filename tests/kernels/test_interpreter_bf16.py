import numpy as np
import pytest
import torch

from tests.conftest import INTERPRETING
from tests.kernels import interpreter_bf16


@pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1")
@pytest.mark.interpreter
def test_the_stock_interpreter_still_truncates():
    """When this fails, upstream has repaired bf16 and interpreter_bf16.py can go."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    value = np.array([1.0 + 2.0**-8 + 2.0**-9], dtype=np.float32)
    stock = interpreter_bf16._stock_cast(interpreter_builder, TensorHandle(value, tl.float32), tl.bfloat16)
    assert interpreter_bf16.widen(stock.data)[0] != torch.tensor(value).bfloat16().float().item()


@pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1")
@pytest.mark.interpreter
def test_narrow_rounds_as_torch_does():
    values = torch.cat(
        [torch.randn(10_000) * 10.0 ** torch.randint(-30, 30, (10_000,)), torch.tensor([0.0, torch.inf])]
    )
    expected = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(interpreter_bf16.narrow(values.numpy()), expected)
