"""cuBLAS's kernels for compute capability 8, on whatever GPU is at hand: what an A100's or an A6000's torch would run.

They multiply by mma.sync. cublasLt keeps them on later cards too, behind a number for their algorithm; which of them is
the fastest for a product is found by trying them.
"""

import ctypes as C
from collections.abc import Iterator

import torch
from torch import Tensor

BFLOAT16, FLOAT16, FLOAT32, COMPUTE_FLOAT32 = 14, 2, 0, 68
DTYPES = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
ALGORITHM = 21  # of cutlass's kernels for tensor cores of compute capability 8
# cublasLt's numbers for tiles, and for a stage's depth and how many stages there are.
TILES = {15: (64, 64), 17: (64, 128), 18: (128, 64), 20: (128, 128), 21: (256, 64), 23: (128, 256), 24: (256, 128)}
STAGES = {
    9: (32, 3), 10: (32, 4), 11: (32, 5), 12: (32, 6), 14: (64, 2), 15: (64, 3), 16: (64, 4), 17: (64, 5), 18: (64, 6),
}  # fmt: skip
SPLITS = (1, 2, 4, 8)  # of the sum, for products whose result is small
SMALL = 1 << 20
WORKSPACE = 64 << 20
TRANSPOSE_A, TRANSPOSE_B = 3, 4  # attributes of a product
TILE, SPLIT, REDUCTION, SWIZZLE, STAGE = 1, 2, 3, 4, 6  # of an algorithm
IN_FLOAT32 = 2  # how the parts of a split sum are added


class Algorithm(C.Structure):
    _fields_ = [("data", C.c_uint64 * 8)]


class Heuristic(C.Structure):
    _fields_ = [
        ("algorithm", Algorithm), ("workspace", C.c_size_t), ("state", C.c_int), ("waves", C.c_float),
        ("reserved", C.c_int * 4),
    ]  # fmt: skip


class CublasError(RuntimeError):
    """A call of cublasLt failed."""


def checked(status: int) -> None:
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
        checked(self.library.cublasLtCreate(C.byref(self.handle)))
        self.workspace = torch.empty(WORKSPACE, dtype=torch.int8, device="cuda")

    def layout(self, matrix: Tensor) -> tuple[C.c_void_p, bool]:
        """cublasLt's view of a matrix, columns first, and whether that is the matrix transposed."""
        columns_first = matrix.stride(0) == 1 and matrix.stride(1) != 1
        rows, columns = map(C.c_uint64, matrix.shape if columns_first else matrix.T.shape)
        layout, stride = C.c_void_p(), C.c_int64(max(matrix.stride()))
        create = self.library.cublasLtMatrixLayoutCreate
        checked(create(C.byref(layout), DTYPES[matrix.dtype], rows, columns, stride))
        return layout, not columns_first


class Product:
    """out = alpha lhs @ rhs + beta out, by the kernel that tune() finds: of these tensors, or of others like them."""

    def __init__(self, lt: CublasLt, lhs: Tensor, rhs: Tensor, out: Tensor, beta: float = 0.0, alpha: float = 1.0):
        self.lt, self.tensors, self.beta, self.alpha = lt, (lhs, rhs, out), C.c_float(beta), C.c_float(alpha)
        self.description = C.c_void_p()
        create = lt.library.cublasLtMatmulDescCreate
        checked(create(C.byref(self.description), COMPUTE_FLOAT32, FLOAT32))
        # Columns first, a product of rows is that of the transposed operands, the other way round.
        self.layouts = [self._operand(TRANSPOSE_A, rhs), self._operand(TRANSPOSE_B, lhs), lt.layout(out)[0]]
        self.dtype = DTYPES[lhs.dtype]
        self.algorithm: Algorithm | None = None
        self.name = ""

    def _operand(self, attribute: int, matrix: Tensor) -> C.c_void_p:
        layout, is_transposed = self.lt.layout(matrix)
        transpose = C.c_int32(0 if is_transposed else 1)
        set_attribute = self.lt.library.cublasLtMatmulDescSetAttribute
        checked(set_attribute(self.description, attribute, C.byref(transpose), C.c_size_t(4)))
        return layout

    def run(self, algorithm: Algorithm, lhs: Tensor, rhs: Tensor, out: Tensor) -> int:
        a, b, d = self.layouts
        pointer = C.c_void_p(out.data_ptr())
        stream = C.c_void_p(torch.cuda.current_stream().cuda_stream)
        return self.lt.library.cublasLtMatmul(
            self.lt.handle, self.description, C.byref(self.alpha), C.c_void_p(rhs.data_ptr()), a,
            C.c_void_p(lhs.data_ptr()), b, C.byref(self.beta), pointer, d, pointer, d, C.byref(algorithm),
            C.c_void_p(self.lt.workspace.data_ptr()), C.c_size_t(WORKSPACE), stream,
        )  # fmt: skip

    def __call__(self, *others: Tensor) -> Tensor:
        """others: lhs, rhs and out of the same sizes and strides as those that it was made for."""
        lhs, rhs, out = others or self.tensors
        checked(self.run(self.algorithm, lhs, rhs, out))
        return out

    def candidates(self, shared_bytes: int) -> Iterator[tuple[str, Algorithm]]:
        """Those that take the operands, and whose stages fit so much shared memory."""
        base = Algorithm()
        dtypes = (COMPUTE_FLOAT32, FLOAT32, *[self.dtype] * 4)
        checked(self.lt.library.cublasLtMatmulAlgoInit(self.lt.handle, *dtypes, ALGORITHM, C.byref(base)))
        for tile, (rows, cols) in TILES.items():
            for stage, (depth, count) in STAGES.items():
                if (rows + cols) * depth * count * 2 > shared_bytes:
                    continue
                for split in SPLITS if self.tensors[2].numel() <= SMALL else SPLITS[:1]:
                    for swizzle in (0, 1):
                        name = f"{rows}x{cols}_{depth}x{count}" + (f"_split{split}" if split > 1 else "")
                        reduction = IN_FLOAT32 if split > 1 else 0
                        settings = {TILE: tile, STAGE: stage, SWIZZLE: swizzle, SPLIT: split, REDUCTION: reduction}
                        algorithm = self._configured(base, settings)
                        if self._is_possible(algorithm):
                            yield name, algorithm

    def _configured(self, base: Algorithm, settings: dict[int, int]) -> Algorithm:
        algorithm = Algorithm.from_buffer_copy(base)
        for attribute, number in settings.items():
            value = C.c_uint32(number)
            set_attribute = self.lt.library.cublasLtMatmulAlgoConfigSetAttribute
            set_attribute(C.byref(algorithm), attribute, C.byref(value), C.c_size_t(4))
        return algorithm

    def _is_possible(self, algorithm: Algorithm) -> bool:
        (a, b, d), found = self.layouts, Heuristic()
        status = self.lt.library.cublasLtMatmulAlgoCheck(
            self.lt.handle, self.description, a, b, d, d, C.byref(algorithm), C.byref(found)
        )
        return status == 0 and found.workspace <= WORKSPACE

    def tune(self, shared_bytes: int, flush: Tensor, rounds: int = 3) -> "Product":
        """Takes the fastest, from a cold L2, of those whose stages fit."""
        times = []
        for name, algorithm in self.candidates(shared_bytes):
            if self.run(algorithm, *self.tensors) == 0:
                times.append((self._median(algorithm, flush, rounds), name, algorithm))
        if not times:
            raise CublasError(f"no kernel of compute capability 8 for a result of {tuple(self.tensors[2].shape)}")
        _, self.name, self.algorithm = min(times, key=lambda found: found[0])
        return self

    def _median(self, algorithm: Algorithm, flush: Tensor, rounds: int) -> float:
        pairs = []
        for _ in range(rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            self.run(algorithm, *self.tensors)
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return sorted(start.elapsed_time(end) for start, end in pairs)[rounds // 2]
