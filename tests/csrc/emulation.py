"""csrc/sm80's launches on the CPU: its kernels as C++, over emulated/'s threads, and csrc/lora_linear.h for ctypes."""

import ctypes as C
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

CSRC, EMULATED = Path(__file__).parents[2] / "csrc", Path(__file__).parent / "emulated"
FORMATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Operand(C.Structure):
    _fields_ = [
        ("data", C.c_void_p), ("format", C.c_int), ("rows", C.c_int64), ("cols", C.c_int64), ("stride", C.c_int64),
    ]  # fmt: skip


class Dropout(C.Structure):
    _fields_ = [("seed", C.c_void_p), ("threshold", C.c_uint32), ("keep_scale", C.c_float)]


class Activation(C.Structure):
    _fields_ = [("linear", C.c_float), ("cubic", C.c_float)]


class Segments(C.Structure):
    _fields_ = [(name, C.c_void_p) for name in ("blocks", "windows", "rows")] + [
        (name, C.c_int) for name in ("windows_count", "levels", "blocks_count", "ranks")
    ]
    _fields_.append(("thresholds", C.c_void_p))


class Stored(C.Structure):
    """csrc/sm80 knows none."""

    _fields_ = [
        ("format", C.c_int8), ("codes", C.c_void_p), ("scale", C.c_void_p), ("outer", C.c_void_p),
        ("cols", C.c_int64), ("row_shift", C.c_int), ("col_shift", C.c_int), ("scale_stride", C.c_int64),
        ("aligned", C.c_bool),
    ]  # fmt: skip


class ForwardPart(C.Structure):
    _fields_ = [(name, Operand) for name in ("weight", "A", "B", "bias", "xa", "y")] + [
        ("gain", C.c_void_p),
        ("scale", C.c_void_p),
        ("dropout", Dropout),
        ("segments", Segments),
        ("stored", Stored),
    ]


class ForwardParams(C.Structure):
    _fields_ = [
        ("x", Operand), ("parts", C.c_int), ("part", ForwardPart * 4), ("window", C.c_int), ("gated", C.c_bool),
        ("factors", C.c_bool), ("activation", Activation), ("hidden", Operand),
    ]  # fmt: skip


class BackwardPart(C.Structure):
    _fields_ = [(name, Operand) for name in ("dy", "x", "weight", "A", "B", "xa", "dxa", "dA", "dB", "dbias")] + [
        ("gain", C.c_void_p),
        ("scale", C.c_void_p),
        ("dropout", Dropout),
        ("y", Operand),
        ("bias", Operand),
        ("dgain", C.c_void_p),
        ("segments", Segments),
        ("stored", Stored),
    ]


class BackwardParams(C.Structure):
    _fields_ = [
        ("dx", Operand), ("parts", C.c_int), ("summed", C.c_int), ("part", BackwardPart * 4), ("window", C.c_int),
        ("gated", C.c_bool), ("factors", C.c_bool), ("activation", Activation),
    ] + [(name, Operand) for name in ("gate", "up", "dgate", "dup", "hidden")]  # fmt: skip


def operand(tensor: Tensor) -> Operand:
    return Operand(tensor.data_ptr(), FORMATS[tensor.dtype], *tensor.shape, tensor.stride(0))


def result(tensor: Tensor | None) -> Operand:
    """Contiguous; without elements, or none at all, it is not wanted."""
    if tensor is None or tensor.numel() == 0:
        return Operand()
    return Operand(tensor.data_ptr(), FORMATS[tensor.dtype], *tensor.shape, tensor.shape[1])


def build(folder: Path, headers: list[str]) -> None:
    """The library in a folder, of a copy of csrc whose instructions are emulated/'s."""
    shutil.rmtree(folder, ignore_errors=True)  # of a build that failed
    shutil.copytree(CSRC, folder / "csrc")
    shutil.rmtree(folder / "csrc" / "ptx")
    shutil.copytree(EMULATED, folder / "csrc", dirs_exist_ok=True)
    kernel = folder / "csrc" / "sm80" / "lora_linear.cuh"
    declared, own = "extern __shared__ __align__(128) uint8_t memory[];", "uint8_t* memory = simt::shared_memory();"
    assert declared in kernel.read_text()
    kernel.write_text(kernel.read_text().replace(declared, own))
    flags = ["-std=c++20", "-Og", "-fPIC", "-I.", *(f"-isystem{path}" for path in headers)]
    flags += ["-include", "cuda_runtime_api.h", "-include", "simt.h"]
    sources = [
        "launches.cpp",
        *sorted(str(path.relative_to(CSRC)) for pattern in ("work/*.cpp", "sm80/*.cu") for path in CSRC.glob(pattern)),
    ]
    running = [
        subprocess.Popen(["g++", *flags, "-x", "c++", "-c", source, "-o", f"{i}.o"], cwd=folder / "csrc")
        for i, source in enumerate(sources)
    ]
    assert [process.wait() for process in running] == [0] * len(sources)
    objects = [f"{i}.o" for i in range(len(sources))]
    # Its own names first: a CUDA torch has brought the runtime's into the process.
    command = ["g++", "-shared", "-Wl,-Bsymbolic", "-o", "launches.so", *objects]
    subprocess.run(command, cwd=folder / "csrc", check=True)


def load(folder: Path):
    """What build() made."""
    library = C.CDLL(str(folder / "csrc" / "launches.so"))
    assert library.size_of_forward() == C.sizeof(ForwardParams)
    assert library.size_of_backward() == C.sizeof(BackwardParams)
    return library
