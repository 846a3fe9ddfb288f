"""Every bad input gives one error that names the argument, and changes nothing."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from fused_lora import LoRALinear, checks, lora_linear

M, K, N, R = 4, 6, 5, 2


def arguments(**changed):
    good = {
        "x": torch.randn(M, K),
        "weight": torch.randn(N, K),
        "A": torch.randn(R, K, requires_grad=True),
        "B": torch.randn(N, R, requires_grad=True),
        "bias": torch.randn(N),
        "scale": 0.7,
        "p": 0.0,
    }
    return good | changed


def quantised(dtype):
    return torch.zeros(N, K).to(dtype)


ANY = (TypeError, ValueError)

BAD = [
    # shapes
    ("x", torch.randn(M, K + 1), ValueError, "x must have 6 as its last dimension"),
    ("x", torch.randn(()), ValueError, "x must have 6 as its last dimension"),
    ("weight", torch.randn(K), ValueError, "weight must have 2 dimensions, got shape (6,)"),
    ("weight", torch.randn(N, K, 1), ValueError, "weight must have 2 dimensions"),
    ("A", torch.randn(R, K + 1), ValueError, "A must have shape (r, 6)"),
    ("A", torch.randn(K, R), ValueError, "A must have shape (r, 6)"),
    ("B", torch.randn(R, N), ValueError, "B must have shape (5, 2)"),
    ("B", torch.randn(N, R + 1), ValueError, "B must have shape (5, 2)"),
    ("B", torch.randn(N), ValueError, "B must have 2 dimensions"),
    ("bias", torch.randn(N + 1), ValueError, "bias must have shape (5,)"),
    ("bias", torch.randn(1), ValueError, "bias must have shape (5,)"),
    ("bias", torch.randn(1, N), ValueError, "bias must have shape (5,)"),
    # numbers
    ("scale", float("nan"), ValueError, "scale must be finite, got nan"),
    ("scale", float("inf"), ValueError, "scale must be finite, got inf"),
    ("scale", torch.ones(2), ValueError, "scale must be one element on cpu"),
    ("p", -0.1, ValueError, "p must be between 0 and 1, got -0.1"),
    ("p", 1.5, ValueError, "p must be between 0 and 1, got 1.5"),
    ("p", float("nan"), ValueError, "p must be between 0 and 1, got nan"),
    # dtypes
    ("scale", torch.tensor(2), TypeError, "scale must be a float or a float32 tensor, got torch.int64"),
    ("scale", torch.tensor(2.0, dtype=torch.bfloat16), TypeError, "scale must be a float or a float32 tensor"),
    ("scale", torch.tensor(2j), TypeError, "scale must be a float or a float32 tensor"),
    ("x", torch.ones(M, K, dtype=torch.int64), TypeError, "x must have weight's dtype"),
    ("x", torch.ones(M, K, dtype=torch.bool), TypeError, "x must have weight's dtype"),
    ("x", torch.randn(M, K, dtype=torch.float64), TypeError, "x must have weight's dtype torch.float32"),
    ("x", torch.randn(M, K, dtype=torch.bfloat16), TypeError, "x must have weight's dtype torch.float32"),
    ("x", torch.randn(M, K, dtype=torch.complex64), TypeError, "x must have weight's dtype"),
    ("weight", torch.randn(N, K, dtype=torch.complex64), TypeError, "weight must be float16, bfloat16"),
    ("weight", quantised(torch.int8), TypeError, "torch.int8: a quantised base is not supported"),
    ("weight", quantised(torch.uint8), TypeError, "torch.uint8: a quantised base is not supported"),
    ("weight", quantised(torch.float8_e4m3fn), TypeError, "torch.float8_e4m3fn: a quantised base is not supported"),
    ("weight", quantised(torch.float8_e5m2), TypeError, "torch.float8_e5m2: a quantised base is not supported"),
    ("weight", quantised(torch.int64), TypeError, "weight must be float16, bfloat16"),
    ("A", torch.ones(R, K, dtype=torch.int32), TypeError, "A must be float16, bfloat16"),
    ("B", torch.ones(N, R, dtype=torch.complex64), TypeError, "B must be float16, bfloat16"),
    ("bias", torch.ones(N, dtype=torch.int32), TypeError, "bias must be floating point"),
    ("bias", torch.ones(N, dtype=torch.complex64), TypeError, "bias must be floating point"),
    # layouts and devices
    ("x", torch.eye(M, K).to_sparse(), TypeError, "x must be dense, got layout torch.sparse_coo"),
    ("weight", torch.eye(N, K).to_sparse(), TypeError, "weight must be dense"),
    ("A", torch.eye(R, K).to_sparse(), TypeError, "A must be dense"),
    ("A", torch.empty(R, K, device="meta"), ValueError, "A must be on cpu like weight, got meta"),
    ("B", torch.empty(N, R, device="meta"), ValueError, "B must be on cpu like weight, got meta"),
    ("bias", torch.empty(N, device="meta"), ValueError, "bias must be on cpu like weight, got meta"),
    ("scale", torch.empty((), device="meta"), ValueError, "scale must be one element on cpu"),
    # not tensors
    ("x", [1.0], TypeError, "x must be a torch.Tensor, got list"),
    ("x", np.ones((M, K), dtype=np.float32), TypeError, "x must be a torch.Tensor, got ndarray"),
    ("weight", None, TypeError, "weight must be a torch.Tensor, got NoneType"),
    ("A", nn.Linear(K, R), TypeError, "A must be a torch.Tensor, got Linear"),
    ("weight", torch.randn(N, K, requires_grad=True), ValueError, "weight must be frozen, got requires_grad=True"),
    ("x", torch.empty(M, K, device="meta"), ANY, "x must be on cpu like weight, got meta"),
    ("bias", [1.0] * N, ANY, "bias must be"),
    ("bias", torch.ones(N).to_sparse(), ANY, "bias must be"),
    ("bias", torch.ones(N).to(torch.float8_e4m3fn), ANY, "bias must be"),
    ("scale", "2", ANY, "scale must be"),
    ("scale", torch.tensor(2.0, requires_grad=True), ANY, "scale must"),
    ("p", "0.5", ANY, "p must be"),
    ("seed", 3, ANY, "seed must be"),
    ("seed", torch.tensor(3.0), ANY, "seed must be"),
    ("seed", torch.tensor(3, dtype=torch.int32), ANY, "seed must be"),
    ("seed", torch.tensor([1, 2]), ANY, "seed must be"),
    ("seed", torch.empty((), dtype=torch.int64, device="meta"), ANY, "seed must be"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_lora_linear(name, value, error, message):
    options = {"p": 0.5} if name == "seed" else {}
    with pytest.raises(error, match=re.escape(message)):
        lora_linear(**arguments(**options, **{name: value}))


def test_the_arguments_are_good_but_for_the_bad_one():
    assert lora_linear(**arguments()).shape == (M, N)
    assert lora_linear(**arguments(scale=torch.tensor([0.7]), p=0.5, seed=torch.tensor(3))).shape == (M, N)
    with torch.no_grad():
        assert lora_linear(**arguments(weight=torch.randn(N, K, requires_grad=True))).shape == (M, N)


@pytest.mark.parametrize(("r", "message"), [(0, "got 0"), (513, "between 1 and 512, got 513")])
def test_rank_of_the_factors(r, message):
    with pytest.raises(ValueError, match=f"r must be .*{message}"):
        lora_linear(**arguments(A=torch.randn(r, K), B=torch.randn(N, r)))


@pytest.mark.parametrize(("r", "error"), [
    (0, ValueError), (-1, ValueError), (513, ValueError), (True, TypeError), (4.0, TypeError), ("4", TypeError),
    (None, TypeError),
])  # fmt: skip
def test_rank(r, error):
    with pytest.raises(error, match=r"^r must be"):
        LoRALinear(K, N, r)
    with pytest.raises(error, match=r"^r must be"):
        checks.check_rank(r)


@pytest.mark.parametrize("r", [1, 512])
def test_the_ranks_at_the_limits(r):
    assert LoRALinear(K, N, r)(torch.randn(M, K)).shape == (M, N)


@pytest.mark.parametrize(("option", "value", "error"), [
    ("lora_alpha", float("nan"), ValueError),
    ("lora_alpha", float("inf"), ValueError),
    ("lora_dropout", -0.5, ValueError),
    ("lora_dropout", 1.01, ValueError),
    ("lora_dropout", float("nan"), ValueError),
    ("lora_alpha", None, ANY),
    ("lora_alpha", "16", ANY),
    ("lora_dropout", "0.5", ANY),
])  # fmt: skip
def test_options_of_the_module(option, value, error):
    with pytest.raises(error, match=f"^{option} must be"):
        LoRALinear(K, N, R, **{option: value})
    linear = nn.Linear(K, N)
    with pytest.raises(error, match=f"^{option} must be"):
        LoRALinear.from_linear(linear, R, **{option: value})
    assert linear.weight.requires_grad
    assert linear.bias.requires_grad


@pytest.mark.parametrize("lora_dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_dtype_of_the_factors(lora_dtype):
    with pytest.raises(ANY, match=r"^lora_dtype must be"):
        LoRALinear(K, N, R, lora_dtype=lora_dtype)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_a_linear_that_cannot_be_a_base(dtype):
    linear = nn.Linear(K, N)
    linear.weight = nn.Parameter(torch.zeros(N, K).to(dtype), requires_grad=False)
    with pytest.raises(TypeError, match=r"^linear.weight must be float16"):
        LoRALinear.from_linear(linear, R)
    assert linear.bias.requires_grad


def test_a_writable_tensor():
    checks.check_writable("weight", torch.randn(N, K).T)
    checks.check_writable("weight", torch.randn(1, K).expand(1, K))
    for bad in (torch.randn(1, K).expand(N, K), torch.randn(N, 1).expand(N, K)):
        with pytest.raises(ValueError, match="weight must be writable, got an expanded tensor"):
            checks.check_writable("weight", bad)
    with torch.inference_mode():
        inference = torch.randn(N, K)
        checks.check_writable("weight", inference)
    with pytest.raises(ValueError, match="weight must be writable, got an inference tensor"):
        checks.check_writable("weight", inference)


def test_overlapping_rows_are_not_writable():
    with pytest.raises(ValueError, match="weight must be writable"):
        checks.check_writable("weight", torch.randn(20).as_strided((N, K), (1, 1)))


@pytest.mark.parametrize("wrong", [dict(A=torch.randn(R, K + 1)), dict(x=torch.randn(M, K + 1)), dict(p=2.0)], ids=list)
def test_an_error_leaves_the_generator_alone(wrong):
    given, state = arguments(**{"p": 0.5} | wrong), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"must"):
        lora_linear(**given)
    assert torch.equal(torch.get_rng_state(), state)
