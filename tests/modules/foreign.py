"""Linears that are quantised as other libraries do it: twins with their attributes, for machines without them, and what
their weights stand for by those libraries' own rules."""

from types import SimpleNamespace

import torch
from torch import nn

from fused_lora.formats import INT8, NF4
from fused_lora.formats.nf4 import VALUES


class Params4bit(nn.Parameter):
    pass


class Linear4bit(nn.Linear):
    pass


class Int8Params(nn.Parameter):
    pass


class Linear8bitLt(nn.Linear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.state = SimpleNamespace(CB=None, SCB=None, has_fp16_weights=False, threshold=6.0)
        self.register_load_state_dict_pre_hook(lambda *_: None)


class FP8Linear(nn.Linear):
    pass


class FbgemmFp8Linear(nn.Linear):
    pass


def source(K, N, dtype, bias=True):
    """Whose blocks, rows and columns are of different sizes."""
    made = nn.Linear(K, N, bias=bias).to(dtype)
    with torch.no_grad():
        made.weight.mul_(torch.linspace(0.5, 4, N)[:, None]).mul_(torch.linspace(1, 3, K))
    return made


def four_bits(K=65, N=33, dtype=torch.float32, nested=False, storage=torch.uint8, **state):
    """bitsandbytes' Linear4bit after it was moved."""
    plain = source(K, N, dtype)
    codes, absmax, outer, *_ = NF4(nested).quantise(plain.weight)
    inner = None if outer is None else SimpleNamespace(absmax=outer[257:], code=outer[1:257], blocksize=256)
    made = Linear4bit(K, N)
    made.weight = Params4bit(codes.view(-1).view(storage)[:, None], requires_grad=False)
    made.weight.quant_state = SimpleNamespace(**{
        "absmax": absmax, "shape": torch.Size((N, K)), "code": torch.tensor(VALUES), "dtype": dtype, "blocksize": 64,
        "quant_type": "nf4", "offset": None if outer is None else outer[0], "state2": inner, "nested": nested,
    } | state)  # fmt: skip
    made.bias = plain.bias
    return made


def int8(K=65, N=33, dtype=torch.float32, used=False):
    """bitsandbytes' Linear8bitLt after it was moved; used: after its first forward."""
    plain = source(K, N, dtype)
    codes, scale, *_ = INT8().quantise(plain.weight)
    made = Linear8bitLt(K, N)
    made.weight, made.bias = Int8Params(codes, requires_grad=False), plain.bias
    made.weight.SCB = scale
    if used:
        made.state.CB, made.state.SCB, made.weight.SCB = codes, scale, None
    return made


def fp8_of_blocks(K=300, N=200, dtype=torch.float32, size=(128, 128), scale_dtype=torch.float32):
    """Hugging Face's FP8Linear."""
    made = FP8Linear(K, N).to(dtype)
    made.block_size = size
    made.weight = nn.Parameter((torch.randn(N, K) * 50).to(torch.float8_e4m3fn), requires_grad=False)
    blocks = () if size is None else (-(-N // size[0]), -(-K // size[1]))
    made.weight_scale_inv = nn.Parameter((torch.rand(blocks) + 0.1).to(scale_dtype), requires_grad=False)
    made.register_parameter("activation_scale", None)
    return made


def fp8_of_rows(K=65, N=33, dtype=torch.float32):
    """Hugging Face's FbgemmFp8Linear."""
    made = FbgemmFp8Linear(K, N).to(dtype)
    made.weight = nn.Parameter((torch.randn(N, K) * 50).to(torch.float8_e4m3fn))
    made.weight_scale = nn.Parameter(torch.rand(N, 1) + 0.1)
    made.register_buffer("input_scale_ub", torch.zeros(1), persistent=False)
    return made


def meant(linear):
    """W in float64, entry by entry, as the library that made it has it."""
    N, K = linear.out_features, linear.in_features
    weight = linear.weight.data
    if isinstance(linear, Linear8bitLt):
        scale = linear.state.SCB if linear.weight.SCB is None else linear.weight.SCB
        return weight.double() * scale.double()[:, None] / 127
    if isinstance(linear, FbgemmFp8Linear):
        return weight.double() * linear.weight_scale.double()
    if isinstance(linear, FP8Linear):
        scale, size = linear.weight_scale_inv.double(), linear.block_size
        if size is None:
            return weight.double() * scale
        rows, columns = torch.arange(N) // size[0], torch.arange(K) // size[1]
        return weight.double() * scale[rows][:, columns]
    state, i = linear.weight.quant_state, torch.arange(N * K)
    byte = weight.view(torch.uint8).flatten()[i // 2].int()
    codes = torch.where(i % 2 == 0, byte >> 4, byte & 15)
    absmax = state.absmax
    if state.nested:
        j = torch.arange(len(absmax))
        absmax = state.state2.code[absmax.int()] * state.state2.absmax[j // 256] + state.offset
    return (state.code.double()[codes] * absmax.double()[i // 64]).view(N, K)


TWINS = {
    "nf4": four_bits,
    "nested": lambda *args: four_bits(*args, nested=True),
    "nested, of many blocks": lambda *args: four_bits(193, 130, *args[2:], nested=True),
    "nf4 in bfloat16": lambda *args: four_bits(64, 34, *args[2:], storage=torch.bfloat16),
    "int8": int8,
    "int8 after a forward": lambda *args: int8(*args, used=True),
    "fp8 by blocks": fp8_of_blocks,
    "fp8 by blocks, scales in 16 bits": lambda *args: fp8_of_blocks(scale_dtype=torch.bfloat16),
    "fp8 by blocks, powers": lambda *args: fp8_of_blocks(scale_dtype=torch.float8_e8m0fnu),
    "fp8 by tensor": lambda *args: fp8_of_blocks(size=None),
    "fp8 by rows": fp8_of_rows,
}
