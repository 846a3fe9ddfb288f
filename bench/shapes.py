"""The shapes that are timed, and the floors under any implementation of them: FLOPs and bytes.

M tokens, K in_features, N out_features, r rank. Four kinds of work:
    frozen      y = x W^T and dx: the same linear without an adapter, the floor that times are divided by
    full_rank   y, dx and dW: training the whole weight
    lora        y = x W^T + scale (x A^T) B^T, dx, dA and dB
    dropout     the same with a mask on x on its way to A: no other products, and no bytes
    dora        the same with a gain for each column of y, of which the norms are to be made: no other products
"""

from dataclasses import dataclass

FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"
PASSES = (FORWARD, FORWARD_BACKWARD)
ADAPTED = ("lora", "dropout", "dora")  # work with factors


@dataclass(frozen=True)
class Shape:
    """M tokens through a K -> N linear with an update of rank r."""

    M: int
    K: int
    N: int
    r: int

    def __str__(self) -> str:
        return f"{self.M}x{self.K}x{self.N}-r{self.r}"

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Reads "M,K,N,r"."""
        sizes = [int(size) for size in text.split(",")]
        if len(sizes) != 4 or min(sizes) < 1:
            raise ValueError(f"a shape is four positive integers M,K,N,r, got {text!r}")
        return cls(*sizes)


GPU_SHAPES = (
    Shape(8192, 4096, 4096, 16),
    Shape(8192, 4096, 4096, 128),
    Shape(16384, 2048, 2048, 128),
    Shape(8192, 4096, 14336, 64),
    Shape(32768, 1024, 1024, 128),
    Shape(8192, 8192, 8192, 16),
    Shape(2048, 4096, 4096, 16),
    Shape(4096, 8192, 8192, 64),
    Shape(16384, 5120, 5120, 32),
    Shape(512, 4096, 4096, 16),
    Shape(65536, 2048, 2048, 128),
    Shape(8192, 4096, 1024, 16),
)
# That nothing was tuned for.
OTHER_SHAPES = (
    Shape(6144, 3072, 3072, 8),
    Shape(6144, 3072, 8192, 32),
    Shape(10240, 5120, 5120, 64),
    Shape(3000, 4096, 11008, 48),
    Shape(12288, 1536, 8960, 24),
    Shape(8192, 6144, 2048, 256),
    Shape(4096, 2560, 9728, 12),
)
CPU_SHAPES = (Shape(128, 256, 256, 16), Shape(64, 512, 512, 16), Shape(512, 128, 128, 32))


def shapes_for(device_type: str, quick: bool = False) -> tuple[Shape, ...]:
    """The shapes of a device: all, or with `quick` two: the first, and the one with the largest rank for its size."""
    shapes = GPU_SHAPES if device_type == "cuda" else CPU_SHAPES
    return (shapes[0], shapes[2]) if quick else shapes


def flops(shape: Shape, pass_name: str, work: str = "lora") -> int:
    """Operations of one pass, a multiply-add counted as two; the same whatever the implementation does.

    A product of the base is 2 M K N: one forward, dX, and dW for full_rank. Both products of the update together are
    2 M r (K + N): forward xa and xa B^T; backward dxa and dxa A, then dA and dB.
    """
    base, update = 2 * shape.M * shape.K * shape.N, 2 * shape.M * shape.r * (shape.K + shape.N)
    backward = pass_name == FORWARD_BACKWARD
    base_products = 1 + backward * (2 if work == "full_rank" else 1)
    update_products = (1 + 2 * backward) if work in ADAPTED else 0
    return base_products * base + update_products * update


def least_bytes(shape: Shape, pass_name: str, itemsize: int, work: str = "lora") -> int:
    """Bytes that one pass must move through memory: every input read once and every output written once per pass.

    Forward reads x, W, A, B and writes y. Backward reads dy, W and writes dx; lora reads x, A, B once more and writes
    dA, dB; full_rank reads x once more and writes dW. xa (M r) can be computed anew and is not counted.
    """
    linear = shape.M * shape.K + shape.N * shape.K + shape.M * shape.N
    factors = shape.r * (shape.K + shape.N) if work in ADAPTED else 0
    elements = linear + factors
    if pass_name == FORWARD_BACKWARD:
        elements += linear + 2 * factors + (0 if work == "frozen" else shape.M * shape.K)
        elements += shape.N * shape.K if work == "full_rank" else 0
    return elements * itemsize


def flop_floor(shape: Shape, pass_name: str) -> float:
    """Time over the frozen floor's if every product ran at the base product's rate.

    Forward 1 + r/K + r/N, forward and backward together 1 + 3 r (K + N) / (2 K N).
    """
    return flops(shape, pass_name, "lora") / flops(shape, pass_name, "frozen")


def byte_floor(shape: Shape, pass_name: str) -> float:
    """least_bytes over the frozen floor's: the ratio that would be seen if memory alone set the time."""
    return least_bytes(shape, pass_name, 1, "lora") / least_bytes(shape, pass_name, 1, "frozen")


def memory_needed(shape: Shape, itemsize: int, variants: int) -> int:
    """Bytes of device memory that a measurement may hold at once, rounded up: the problem, one set of results for each
    variant (a captured graph keeps its own), and the reference in float32 with its temporaries."""
    tensors = shape.M * shape.K + shape.N * shape.K + shape.M * shape.N
    return tensors * (itemsize * (variants + 4) + 8 * max(itemsize, 4))
