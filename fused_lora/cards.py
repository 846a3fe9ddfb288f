"""The cards that this package can speak of without having one: what their datasheets say, and how much of it is seen.

What tiles are chosen by at run time is asked of the device (backends.py); this is for explain(gpu=...), predictions,
and tests that compile for a card.
"""

from dataclasses import dataclass

WHOLE = 0.95  # of a long product's time, that its steps take: the rest is the last wave, and the ends of tiles


@dataclass(frozen=True)
class Card:
    """From the datasheet: shared_memory of a block in bytes; tflops of 16-bit products, dense, with sums in float32;
    gigabytes a second; l2 in MB; memory in GB. peak: the share of tflops that the steps of cuBLAS's products reach.

    peak is fitted for H100 and H200 (bench/predictions.py). For other cards it is from public measurements of cuBLAS
    on long products, as the clock was after a while: 265 TFLOP/s on an A100 80 GB (SXM) and 225 on a 40 GB (PCIe), 123
    on an A6000, 76.5 on a 3090 and 165 on a 4090, whose clocks are above the datasheet's, 269 on an L40S, of whose chip
    the RTX 6000 Ada is too.
    """

    capability: int
    sm_count: int
    shared_memory: int
    tflops: float
    gigabytes: float
    l2: int
    memory: int
    peak: float


_A100_80 = Card(80, 108, 166912, 312, 2039, 40, 80, 0.85 / WHOLE)
CARDS = {
    "A100": _A100_80,
    "A100 80 GB": _A100_80,
    "A100 40 GB": Card(80, 108, 166912, 312, 1555, 40, 40, 0.72 / WHOLE),
    "A6000": Card(86, 84, 101376, 154.8, 768, 6, 48, 0.79 / WHOLE),
    "RTX 6000 Ada": Card(89, 142, 101376, 364.2, 960, 96, 48, 0.74 / WHOLE),
    "RTX 3090": Card(86, 82, 101376, 71, 936, 6, 24, 1.08 / WHOLE),
    "RTX 4090": Card(89, 128, 101376, 165.2, 1008, 72, 24, 1.0 / WHOLE),
    "L40S": Card(89, 142, 101376, 362, 864, 96, 48, 0.74 / WHOLE),
    "H200": Card(90, 132, 232448, 989.4, 4800, 50, 141, 0.8612),
    "H100": Card(90, 132, 232448, 989.4, 3350, 50, 80, 0.8612),
}
