"""Every kernel with every tile of the tables, compiled for each architecture without a GPU."""

from functools import cache
from pathlib import Path

import pytest
import torch

from fused_lora import padding
from fused_lora.formats import FP8, INT8, NF4, Stored
from fused_lora.kernels import tiles
from fused_lora.kernels.dequantise import dequantise
from fused_lora.kernels.dropout import Dropout
from fused_lora.kernels.gain_backward import gain_backward
from fused_lora.kernels.launch import record_launches
from fused_lora.kernels.lora_linear import lora_linear_backward, lora_linear_forward
from fused_lora.kernels.lora_segments import lora_segments_backward, lora_segments_forward
from fused_lora.kernels.merge import merge_
from fused_lora.kernels.merge_and_reinit import Layer, merge_and_reinit_
from fused_lora.kernels.row_norms import row_norms
from fused_lora.kernels.tiles import KNOWN_GPUS, Gpu
from fused_lora.segments import Drops, Tables
from tests.conftest import INTERPRETING
from tests.kernels.compiling import compile_launch, compiling_for

pytestmark = pytest.mark.skipif(INTERPRETING, reason="the interpreter replaces the compiler")

GPUS = {"sm_80": KNOWN_GPUS["A100"], "sm_86": KNOWN_GPUS["RTX 3090"], "sm_89": KNOWN_GPUS["RTX 4090"]}
GPUS["sm_90"] = KNOWN_GPUS["H100"]
RANKS = [16, 32, 64, 128, 512]
WITHOUT_PRODUCTS = {"reduce_splits_kernel", "reinit_kernel", "fill_up_kernel", "gain_backward_kernel", "norms_kernel"}
WITHOUT_PRODUCTS.add("dequantise_kernel")
OF_STORED = {"dequantise_kernel", "expand_kernel", "segments_expand_kernel"}


def _empty(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


def record(M, K, N, r, dtype, gpu: Gpu, precision="ieee", p=0.0, needs=(True, True, True), weight=None):
    """The launches of forward and backward."""
    x, dy = _empty(M, K, dtype=dtype), _empty(M, N, dtype=dtype)
    weight = _empty(N, K, dtype=dtype) if weight is None else weight
    A, B, bias = _empty(r, K, dtype=dtype), _empty(N, r, dtype=dtype), _empty(N, dtype=dtype)
    scale = _empty(1, dtype=torch.float32)
    dropout = Dropout(p, _empty(1, dtype=torch.int64) if p else None)
    with record_launches() as launches:
        _, xa = lora_linear_forward(x, weight, A, B, bias, scale, dropout, gpu, precision)
        lora_linear_backward(dy, x, weight, A, B, xa, scale, dropout, gpu, precision, needs)
    return launches


def record_merges(gpu: Gpu):
    with record_launches() as launches:
        for dtype, lora_dtype in [
            (torch.bfloat16, torch.bfloat16),
            (torch.bfloat16, torch.float32),
            (torch.float32,) * 2,
        ]:
            for r in (16, 128):
                weight, A, B = (_empty(*s, dtype=lora_dtype) for s in ((4096, 4096), (r, 4096), (4096, r)))
                merge_(weight.to(dtype), A, B, _empty(1, dtype=torch.float32), gpu)
    return launches


def record_restarts(gpu: Gpu):
    """Rows of 5461 are none that a 16-byte access starts at."""
    bf16, fp16 = torch.bfloat16, torch.float16
    with record_launches() as launches:
        for dtype, lora_dtype, K, r, mode in [
            (bf16, bf16, 2048, 128, "nearest"), (bf16, bf16, 2048, 128, "low"), (bf16, bf16, 5461, 128, "low"),
            (bf16, bf16, 4096, 16, "stochastic"), (bf16, torch.float32, 2048, 128, "low"),
            (fp16, fp16, 2048, 64, "low"), (bf16, bf16, 5461, 128, "stochastic"), (bf16, bf16, 5461, 128, "nearest"),
            (bf16, bf16, 2048, 256, "low"), (bf16, torch.float32, 2048, 128, "nearest"),
        ]:  # fmt: skip
            weight, A, B = (_empty(*s, dtype=lora_dtype) for s in ((2048, K), (r, K), (2048, r)))
            low = _empty(2048, K, dtype=torch.int16) if mode == "low" else None
            layer = Layer(weight.to(dtype), A, B, _empty(1, dtype=torch.float32), 5, low)
            merge_and_reinit_([layer, layer], mode == "stochastic", gpu)
    return launches


def record_dora(gpu: Gpu):
    """What a gain adds: the norms, the forward pass, the pass before the backward one."""
    gain, scale = _empty(4096, dtype=torch.float32), _empty(1, dtype=torch.float32)
    with record_launches() as launches:
        for dtype, r in ((torch.bfloat16, 16), (torch.bfloat16, 128), (torch.bfloat16, 512), (torch.float32, 64)):
            x, weight, A, B, bias = (
                _empty(*shape, dtype=dtype) for shape in ((8192, 4096), (4096, 4096), (r, 4096), (4096, r), (4096,))
            )
            row_norms(weight, A, B, scale, gpu)
            lora_linear_forward(x, weight, A, B, bias, scale, Dropout(), gpu, "ieee", gain)
            gain_backward(x, x, bias, gain, gpu, True)
    return launches


def record_segments(M, K, N, window, dtype, gpu: Gpu, precision="ieee", levels=1, drops=False, weight=None):
    """Of rows with adapters of their own, in eight windows of a slab of 1,024 ranks."""
    x, dy = _empty(M, K, dtype=dtype), _empty(M, N, dtype=dtype)
    weight = _empty(N, K, dtype=dtype) if weight is None else weight
    A, B, bias = _empty(1024, K, dtype=dtype), _empty(1024, N, dtype=dtype).t(), _empty(N, dtype=dtype)
    scales, blocks = _empty(64, dtype=torch.float32), -(-M // 256)
    shapes = ((levels, blocks, 4), (8, 4), (levels, 256 * blocks, 2))
    dropped = Drops(_empty(1, dtype=torch.int64), _empty(64, dtype=torch.int32)) if drops else None
    of = (Tables(*(_empty(*shape, dtype=torch.int32) for shape in shapes)), window, dropped, gpu, precision)
    with record_launches() as launches:
        _, xa = lora_segments_forward(x, weight, A, B, bias, scales, *of)
        lora_segments_backward(dy, x, weight, A, B, xa, scales, *of, (True, True, True))
    return launches


def _stored(form, N, K):
    """On `meta`."""
    stored = form.quantise(torch.ones(N, K))
    return Stored(*(each if each is None else each.to("meta") for each in stored.tensors), N, K)


def record_stored(gpu: Gpu):
    """Weights in every format, of rows at which accesses of all widths begin; and products that fill some columns of a
    result: by the copy engine or not, of a whole number of eights and not, with dropout and without."""
    launches = []
    for form in (FP8("rows"), FP8("blocks"), FP8("tensor"), INT8(), NF4(), NF4(nested=True)):
        for K in (4096, 1000, 1001):
            weight = _stored(form, 300, K)
            for dtype in (torch.bfloat16, torch.float32):
                with record_launches() as found:
                    dequantise(weight, padding.empty(200, K, _empty(1, dtype=dtype)), 100)
                launches += found
    for M, K, N, dtype in [
        (8192, 4096, 4096, torch.bfloat16), (8000, 4104, 4104, torch.bfloat16), (512, 4097, 4099, torch.float16),
        (8192, 4096, 2048, torch.float32),
    ]:  # fmt: skip
        weight = _stored(FP8("tensor"), N, K)
        launches += record(M, K, N, 16, dtype, gpu, weight=weight)
        launches += record(M, K, N, 128, dtype, gpu, p=0.1, weight=weight)
        launches += record_segments(M, K, N, 64, dtype, gpu, drops=True, weight=weight)
        if dtype is not torch.float32:
            launches += record_segments(M, K, N, 64, dtype, gpu, levels=2, weight=weight)
    return [launch for launch in launches if launch[0].name in OF_STORED]  # others know nothing of formats


def _rows_for_each_expand_tile(gpu: Gpu, tma: bool, precision: str, itemsize: int):
    """One M for each tile that the table can choose at N = K = 512."""
    chosen = {
        tiles.expand_tile(M, 512, gpu, itemsize, tma, precision): M for M in (8192, 4096, 3072, 2048, 1024, 512, 96)
    }
    return chosen.values()


@cache
def default_launches(name: str):
    """Every default launch of an architecture, each distinct one once."""
    gpu = GPUS[name]
    launches = record_merges(gpu) + record_restarts(gpu) + record_dora(gpu) + record_stored(gpu)
    for M in _rows_for_each_expand_tile(gpu, gpu.has_tma, "ieee", 2):
        for r in (16, 128):
            launches += record(M, 512, 512, r, torch.bfloat16, gpu)
        launches += record(M, 512, 512, 16, torch.bfloat16, gpu, p=0.1)
    for r in RANKS:
        launches += record(8192, 4096, 4096, r, torch.bfloat16, gpu)
        launches += record(8192, 4096, 4096, r, torch.bfloat16, gpu, p=0.1)
        launches += record(8192, 4096, 4096, r, torch.bfloat16, gpu, needs=(False, True, True))
    # Widths of no whole number of steps, and offsets beyond 2^31.
    launches += record(8000, 1000, 1048, 24, torch.bfloat16, gpu)
    launches += record(2**17, 2**15, 2**15, 16, torch.bfloat16, gpu)
    for M in _rows_for_each_expand_tile(gpu, gpu.has_tma, "ieee", 2):
        launches += record_segments(M, 512, 512, 64, torch.bfloat16, gpu, drops=M in (8192, 96))
    launches += record_segments(8192, 4096, 4096, 256, torch.bfloat16, gpu, levels=2)
    launches += record_segments(8192, 512, 512, 64, torch.bfloat16, gpu, levels=2, drops=True)
    launches += record_segments(8000, 1000, 1048, 128, torch.float16, gpu)
    launches += record_segments(2**17, 2**15, 2**15, 64, torch.bfloat16, gpu)
    for precision in ("ieee", "tf32"):
        launches += record_segments(8192, 512, 512, 64, torch.float32, gpu, precision)
    for precision in ("ieee", "tf32"):
        for M in _rows_for_each_expand_tile(gpu, False, precision, 4):
            launches += record(M, 512, 512, 64, torch.float32, gpu, precision)
    distinct = {}
    for plan, args in launches:
        distinct.setdefault((plan.name, tuple(sorted(plan.meta.items())), _kinds(args)), (plan, args))
    return tuple(distinct.values())


def _kinds(args):
    """What of the arguments a compilation depends on."""
    return tuple(str(getattr(a, "dtype", None) or getattr(a, "block_shape", None) or type(a)) for a in args)


def _id(plan):
    blocks = "x".join(str(value) for key, value in plan.meta.items() if key.startswith("BLOCK"))
    flags = "-".join(key for key, value in plan.meta.items() if value is True)
    return f"{plan.name}-{blocks}-{plan.meta.get('PRECISION', '')}-{flags}"


CASES = [(name, plan, args) for name in GPUS for plan, args in default_launches(name)]


@pytest.mark.parametrize(("name", "plan", "args"), CASES, ids=[f"{name}-{_id(plan)}" for name, plan, _ in CASES])
def test_default_tiles(name, plan, args):
    """Within shared memory, nothing spilled, tensor cores in use (IEEE float32 has none)."""
    gpu = GPUS[name]
    with compiling_for(gpu.capability):
        needs = compile_launch(plan, args)
    assert needs.shared_memory <= gpu.shared_memory
    assert needs.stack == 0
    if plan.name not in WITHOUT_PRODUCTS and not _is_ieee_float32(plan, args):
        assert needs.tensor_core_instructions > 0
    if plan.meta.get("TMA") or plan.name == "expand_grads_kernel":
        assert needs.bulk_copies > 0


def _is_ieee_float32(plan, args):
    float32_matrices = any(getattr(a, "dtype", None) is torch.float32 and a.dim() == 2 for a in args[:3])
    return float32_matrices and plan.meta["PRECISION"] == "ieee"


def test_a_new_scale_compiles_nothing():
    """The scale is read from memory: no launch argument but a pointer depends on it."""
    launches = record(512, 512, 512, 16, torch.bfloat16, GPUS["sm_90"])
    floats = [a for _, args in launches for a in args if isinstance(a, float)]
    assert set(floats) == {1.0}  # keep_scale, of dropout alone


def test_every_kernel_file_is_compiled_here():
    files = Path(tiles.__file__).parent.glob("*.py")
    kernels = {f"{file.stem}_kernel" for file in files if f"def {file.stem}_kernel" in file.read_text()}
    assert kernels | {"reinit_kernel", "fill_up_kernel", "norms_kernel"} == {plan.name for _, plan, _ in CASES}
