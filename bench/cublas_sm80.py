"""cuBLAS's kernels for compute capability 8, run on whatever GPU is at hand: what an A100's or an A6000's torch would run.

They multiply by mma.sync. cublasLt keeps them on later cards too, behind numbers for its algorithms; which of them is the
fastest for a product is found by trying them.
"""

import ctypes as C
from dataclasses import dataclass

import torch
from torch import Tensor

BFLOAT16, FLOAT16, FLOAT32, COMPUTE_FLOAT32 = 14, 2, 0, 68
DTYPES = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
ALGORITHM = 21  # of cutlass's kernels for tensor cores of compute capability 8
# cublasLt's numbers for tiles, and for the depth of a stage and how many there are.
TILES = {15: (64, 64), 17: (64, 128), 18: (128, 64), 20: (128, 128), 21: (256, 64), 23: (128, 256), 24: (256, 128)}
STAGES = {9: (32, 3), 10: (32, 4), 11: (32, 5), 12: (32, 6), 14: (64, 2), 15: (64, 3), 16: (64, 4), 17: (64, 5), 18: (64, 6)}
SPLITS = (1, 2, 4, 8)  # of the sum, for products whose result is small
WORKSPACE = 64 << 20
TRANSPOSE_A, TRANSPOSE_B = 3, 4  # attributes of a product
TILE, SPLIT, REDUCTION, SWIZZLE, STAGE = 1, 2, 3, 4, 6  # of an algorithm
IN_FLOAT32 = 2  # how the parts of a split sum are added


class Algorithm(C.Structure):
    _fields_ = [("data", C.c_uint64 * 8)]


class Heuristic(C.Structure):
    _fields_ = [
        ("algorithm", Algorithm), ("workspace", C.c_size_t), ("state", C.c_int), ("waves", C.c_float), ("reserved", C.c_int * 4),
    ]  # fmt: skip


class CublasError(RuntimeError):
    """A call of cublasLt failed."""


def _checked(status: int) -> None:
    if status:
        raise CublasError(f"cublasLt says {status}")


class CublasLt:
    """The library that torch has loaded, and a handle of it."""

    def __init__(self):
        torch.mm(*(torch.zeros(8, 8, device="cuda", dtype=torch.bfloat16) for _ in range(2)))
        with open("/proc/self/maps") as maps:
            path = next(line.split()[-1] for line in maps if "libcublasLt.so" in line)
        self.library = C.CDLL(path)
        self.handle = C.c_void_p()
        _checked(self.library.cublasLtCreate(C.byref(self.handle)))
        self.workspace = torch.empty(WORKSPACE, dtype=torch.int8, device="cuda")


def _layout(lt: CublasLt, matrix: Tensor) -> tuple[C.c_void_p, bool]:
    """cublasLt's view of a matrix (columns first), and whether that is the matrix transposed."""
    columns_first = matrix.stride(0) == 1 and matrix.stride(1) != 1
    rows, columns = matrix.shape if columns_first else matrix.T.shape
    layout = C.c_void_p()
    stride = max(matrix.stride())
    _checked(lt.library.cublasLtMatrixLayoutCreate(C.byref(layout), DTYPES[matrix.dtype], C.c_uint64(rows), C.c_uint64(columns), C.c_int64(stride)))
    return layout, not columns_first


class Product:
    """out = alpha lhs @ rhs + beta out, by the kernel that `tune` found."""

    def __init__(self, lt: CublasLt, lhs: Tensor, rhs: Tensor, out: Tensor, beta: float = 0.0, alpha: float = 1.0):
        self.lt, self.out, self.beta, self.alpha = lt, out, C.c_float(beta), C.c_float(alpha)
        # Columns first, a product of rows is that of the transposed operands in turn.
        self.operands = (rhs, lhs)
        self.description = C.c_void_p()
        _checked(lt.library.cublasLtMatmulDescCreate(C.byref(self.description), COMPUTE_FLOAT32, FLOAT32))
        self.layouts = []
        for attribute, matrix in ((TRANSPOSE_A, rhs), (TRANSPOSE_B, lhs)):
            layout, is_transposed = _layout(lt, matrix)
            transpose = C.c_int32(0 if is_transposed else 1)
            _checked(lt.library.cublasLtMatmulDescSetAttribute(self.description, attribute, C.byref(transpose), C.c_size_t(4)))
            self.layouts.append(layout)
        self.layouts.append(_layout(lt, out)[0])
        self.dtype = DTYPES[lhs.dtype]
        self.algorithm: Algorithm | None = None
        self.name = ""

    def run(self, algorithm: Algorithm | None = None) -> int:
        rhs, lhs = self.operands
        a, b, d = self.layouts
        pointer = C.c_void_p(self.out.data_ptr())
        stream = C.c_void_p(torch.cuda.current_stream().cuda_stream)
        return self.lt.library.cublasLtMatmul(
            self.lt.handle, self.description, C.byref(self.alpha), C.c_void_p(rhs.data_ptr()), a, C.c_void_p(lhs.data_ptr()), b,
            C.byref(self.beta), pointer, d, pointer, d, C.byref(algorithm or self.algorithm),
            C.c_void_p(self.lt.workspace.data_ptr()), C.c_size_t(WORKSPACE), stream,
        )  # fmt: skip

    def __call__(self) -> Tensor:
        _checked(self.run())
        return self.out

    def candidates(self, shared_bytes: int):
        library = self.lt.library
        base = Algorithm()
        a, b, d = self.layouts
        dtypes = (COMPUTE_FLOAT32, FLOAT32, *[self.dtype] * 4)
        _checked(library.cublasLtMatmulAlgoInit(self.lt.handle, *dtypes, ALGORITHM, C.byref(base)))
        small = self.out.numel() <= 1 << 20
        for tile, (rows, cols) in TILES.items():
            for stage, (depth, count) in STAGES.items():
                if (rows + cols) * depth * count * 2 > shared_bytes:
                    continue
                for swizzle in (0, 1):
                    for split in SPLITS if small else (1,):
                        algorithm = Algorithm.from_buffer_copy(base)
                        numbers = {TILE: tile, STAGE: stage, SWIZZLE: swizzle, SPLIT: split, REDUCTION: IN_FLOAT32 if split > 1 else 0}
                        for attribute, number in numbers.items():
                            value = C.c_uint32(number)
                            library.cublasLtMatmulAlgoConfigSetAttribute(C.byref(algorithm), attribute, C.byref(value), C.c_size_t(4))
                        found = Heuristic()
                        status = library.cublasLtMatmulAlgoCheck(
                            self.lt.handle, self.description, a, b, d, d, C.byref(algorithm), C.byref(found)
                        )
                        if status == 0 and found.workspace <= WORKSPACE:
                            yield f"{rows}x{cols}_{depth}x{count}" + (f"_split{split}" if split > 1 else ""), algorithm

    def tune(self, shared_bytes: int, flush: Tensor, rounds: int = 3) -> "Product":
        """Takes the fastest, from a cold L2, of those whose stages fit."""
        times = []
        for name, algorithm in self.candidates(shared_bytes):
            if self.run(algorithm):
                continue
            events = []
            for _ in range(rounds):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush.zero_()
                start.record()
                self.run(algorithm)
                end.record()
                events.append((start, end))
            torch.cuda.synchronize()
            times.append((sorted(start.elapsed_time(end) for start, end in events)[rounds // 2], name, algorithm))
        if not times:
            raise CublasError(f"no kernel of compute capability 8 for {tuple(self.out.shape)}")
        _, self.name, self.algorithm = min(times, key=lambda found: found[0])
        return self
