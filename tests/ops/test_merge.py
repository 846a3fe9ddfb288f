"""merge_: the value, the bits it must keep, and that torch learns of the change."""

import pytest
import torch

from fused_lora import lora_linear, merge_
from tests.accuracy import assert_accurate
from tests.ops.layouts import base_offset, every_other_column, every_other_row, transposed, view_of_a_cat
from tests.ops.problem import DEVICES, PLACES, SCALE, make_inputs, randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def factors(N, K, r, device, dtype, lora_dtype=None):
    lora_dtype = lora_dtype or dtype
    return (
        randn(N, K, device=device, dtype=dtype),
        randn(r, K, device=device, dtype=lora_dtype, std=r**-0.5),
        randn(N, r, device=device, dtype=lora_dtype),
    )


def check_merge(weight, A, B, scale=SCALE):
    """Merges and checks the value; weight keeps its storage, A and B their bits."""
    exact = weight.double() + scale * B.double() @ A.double()
    by_torch = weight + scale * B.to(weight.dtype) @ A.to(weight.dtype)
    before = weight.data_ptr(), A.clone(), B.clone()
    assert merge_(weight, A, B, scale) is weight
    assert_accurate("weight", weight, exact, by_torch)
    assert weight.data_ptr() == before[0]
    assert torch.equal(A, before[1])
    assert torch.equal(B, before[2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(75, 101, 5), (128, 64, 16), (1, 33, 1), (70, 1, 3), (33, 45, 512)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lora_dtype", DTYPES, ids=str)
def test_value(shape, dtype, lora_dtype, device):
    check_merge(*factors(*shape, device, dtype, lora_dtype))


def test_float64():
    check_merge(*factors(75, 101, 5, "cpu", torch.float64))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("A_dtype", "B_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_factors_of_two_dtypes(A_dtype, B_dtype, device):
    weight, A, B = factors(75, 101, 5, device, torch.float32)
    A, B = A.to(A_dtype), B.to(B_dtype)
    check_merge(weight, A, B)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("layout", [transposed, every_other_column, every_other_row, view_of_a_cat, base_offset])
def test_layouts(layout, device, dtype):
    weight, A, B = factors(75, 101, 5, device, dtype)
    strided = layout(weight)
    outside = strided.untyped_storage().nbytes() // strided.element_size() - strided.numel()
    check_merge(strided, layout(A), layout(B))
    whole = torch.empty(0, device=device, dtype=dtype).set_(strided.untyped_storage())
    assert whole.isnan().sum() == outside


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_entries_without_an_update_keep_their_bits(device, dtype):
    weight, A, B = factors(75, 101, 5, device, dtype)
    weight[2::5, ::7] = -0.0
    # A value that no rounding to a narrower format and back would survive, and one that plain addition would alter.
    weight[2::5, 3] = torch.finfo(dtype).tiny / 2
    weight[2::5, 4] = float("nan")
    B[2::5] = 0
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[weight.element_size()]
    before = weight.clone()
    merge_(weight, A, B, SCALE)
    assert torch.equal(weight[2::5].view(bits), before[2::5].view(bits))
    assert not torch.equal(weight[1::5], before[1::5])
    after = weight.clone()
    merge_(weight, A, torch.zeros_like(B), SCALE)
    merge_(weight, A, B, 0.0)
    assert torch.equal(weight.view(bits), after.view(bits))


@pytest.mark.parametrize("device", DEVICES)
def test_scale_as_a_tensor(device):
    weight, A, B = factors(75, 101, 5, device, torch.float32)
    scale = torch.tensor(SCALE, device=device)
    assert torch.equal(merge_(weight.clone(), A, B, scale), merge_(weight, A, B, SCALE))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_empty(shape):
    weight = torch.empty(shape)
    assert merge_(weight, torch.ones(2, shape[1]), torch.ones(shape[0], 2), SCALE) is weight


@pytest.mark.parametrize("device", DEVICES)
def test_trainable_parameters_merge_without_a_graph(device):
    weight, A, B = (t.requires_grad_() for t in factors(7, 5, 2, device, torch.float32))
    assert merge_(weight, A, B, SCALE).grad_fn is None
    assert weight.is_leaf


def assert_backward_after_merge_raises(device, before_merge=lambda: None):
    inputs = make_inputs(6, 5, 4, 2, device)
    weight = inputs["weight"]
    y = lora_linear(**inputs, scale=SCALE)
    before_merge()
    version = weight._version
    merge_(weight, inputs["A"], inputs["B"], SCALE)
    assert weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_after_a_merge_raises():
    assert_backward_after_merge_raises("cpu")


@pytest.mark.gpu
def test_backward_after_a_merge_by_kernel_raises():
    assert_backward_after_merge_raises("cuda")


def test_backward_after_a_merge_that_torch_does_not_see_raises(monkeypatch):
    """As a kernel merges: through weight's pointer. NumPy does so on a CPU."""
    pytest.importorskip("triton")
    from fused_lora import backends
    from fused_lora.kernels import merge as kernel

    def through_the_pointer(weight, A, B, scale, gpu):
        weight.detach().numpy()[...] += (scale * B @ A).numpy()

    def use_it():
        monkeypatch.setattr(kernel, "merge_", through_the_pointer)
        monkeypatch.setattr(backends, "choose_merge", lambda device, dtype: backends.Choice("triton", "for the test"))
        monkeypatch.setattr(backends, "gpu", lambda device: None)

    assert_backward_after_merge_raises("cpu", use_it)


def refused():
    """Arguments that merge_ refuses, by what is wrong, and what the error says."""
    weight, A, B = factors(7, 5, 2, "cpu", torch.float32)
    with torch.inference_mode():
        inference = weight.clone()
    return {
        "A of another K": ((weight, A[:, :4], B, SCALE), ValueError, "A must have shape"),
        "B of another N": ((weight, A, B[:6], SCALE), ValueError, "B must have shape"),
        "B of another r": ((weight, A, B[:, :1], SCALE), ValueError, "B must have shape"),
        "expanded": ((weight[:1].expand(7, 5), A, B, SCALE), ValueError, "weight must be writable"),
        "inference": ((inference, A, B, SCALE), ValueError, "weight must be writable"),
        "integer": ((weight.int(), A, B, SCALE), TypeError, "weight must be float16"),
        "no scale": ((weight, A, B, float("nan")), ValueError, "scale must be finite"),
        # Each would broadcast.
        "a scale a column": ((weight, A, B, torch.ones(5)), ValueError, "scale must be one element"),
        "a scale a row": ((weight, A, B, torch.ones(7, 1)), ValueError, "scale must be one element"),
        "a scale elsewhere": ((weight, A, B, torch.ones((), device="meta")), ValueError, "scale must be one element"),
        "a float64 scale": ((weight, A, B, torch.ones((), dtype=torch.float64)), TypeError, "float32 tensor"),
        "infinite scale": ((weight, A, B, float("inf")), ValueError, "scale must be finite"),
        "another device": ((weight, A.to("meta"), B, SCALE), ValueError, "A must be on cpu"),
        "complex": ((weight, A, B.to(torch.complex64), SCALE), TypeError, "B must be float16"),
        "no rank": ((weight, A[:0], B[:, :0], SCALE), ValueError, "r must be between"),
        "one dimension": ((weight, A[0], B, SCALE), ValueError, "A must have 2 dimensions"),
    }


def assert_refused(arguments, error, message):
    weight = arguments[0]
    before, version = weight.clone(), None if weight.is_inference() else weight._version
    with pytest.raises(error, match=message):
        merge_(*arguments)
    assert torch.equal(weight, before)
    assert weight.is_inference() or weight._version == version


@pytest.mark.parametrize("what", list(refused()))
def test_what_is_refused_changes_nothing(what):
    assert_refused(*refused()[what])


@pytest.mark.parametrize("device", DEVICES)
def test_inference_tensors_merge_in_inference_mode(device):
    """They have no version counter to move."""
    with torch.inference_mode():
        check_merge(*factors(75, 101, 5, device, torch.float32))
