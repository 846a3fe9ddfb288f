"""The fourth table of ReLoRA (Lialin et al. 2023, arXiv:2307.05695), predicted: LLaMA 1.3B, sequences a second.

    python -m examples.table4
    python -m examples.table4 --micro-batch 8          that many sequences, instead of as many as fit

Nothing is measured here. A step is a batch's micro-batches and one update of Adam; a micro-batch takes

    forward + max(backward, all-reduce)          of linears, attention, head and what stands between them

* Linears: fused_lora.predict's launches. Full-rank has a third product for each weight. The published ReLoRA multiplies
  with PEFT's formula: torch's products, dropout and sums of their own over (M, K) and (M, N).
* Rows of 5461 start at odd addresses, where cuBLAS copies element by element: an H100 needs 8.6 and 7.9 ms for the
  three products of 16,384 tokens, 2048 <-> 5461, 3.4 times as long as cuBLAS's kernels for compute capability 8 do for
  aligned rows, and is taken to run such kernels. So other cards are taken to be 3.4 times slower. fused_lora pads rows.
* Attention: its products at 0.4 of cuBLAS's rate. The head is a product, and its logits 20 bytes an entry.
* What stands between: BETWEEN bytes a token and block, so that an H200's full-rank step takes what it takes; at 0.8 of
  the datasheet's bandwidth. `--check STEPS.JSON` compares nine other steps of that H200.
* Micro-batch: the largest power of two for which weights, gradients, Adam's states, DDP's buckets and activations fit
  into 0.9 of the memory; activations are what an H200's steps had at their peak.
* All-reduce: after every micro-batch, as the published code does it (no no_sync), of the trained weights in bfloat16,
  beside backward. A ring, at the rate that a GPU's link gives it: 200 GB/s by NVLink, 10 by PCIe through the host.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fused_lora.cards import CARDS, Card
from fused_lora.predict import CSRC_FROM, predict
from fused_lora.predict.products import product, total
from fused_lora.predict.rates import rates_of
from fused_lora.pretrain.llama import LlamaConfig
from fused_lora.pretrain.presets import PRESETS, trainable_in_relora

FULL, PUBLISHED, FUSED, ADDMM, FROZEN = "full-rank", "ReLoRA, published code", "ReLoRA, fused_lora", "addmm", "frozen"
SEQUENCE, ITEMSIZE = 512, 2
STREAM = 0.8
ODD, ODD_ON_HOPPER = 3.4, 5.6
ATTENTION = 0.4
BETWEEN = 1.1e6  # bytes
LOGIT_BYTES = 20
ADAM_BYTES = 14  # read and written of a weight, its gradient and two moments
# Peak of a step less weights, gradients and states, a token (bench/results/nvidia-h200/steps.json).
ACTIVATIONS = {FULL: 1.9e6, PUBLISHED: 2.3e6, FUSED: 2.2e6}


@dataclass(frozen=True)
class Setup:
    """GPUs of one machine; link: GB/s of an all-reduce; published: sequences a second, full-rank and ReLoRA."""

    card: str
    count: int
    link: float
    published: tuple[float, float]


SETUPS = (
    Setup("A100 80 GB", 8, 200, (137, 157)),
    Setup("RTX 6000 Ada", 6, 10, (84, 124)),
    Setup("RTX 3090", 2, 10, (8.8, 17.8)),
)


@dataclass(frozen=True)
class Pass:
    """Seconds."""

    forward: float
    backward: float

    def __add__(self, other: "Pass") -> "Pass":
        return Pass(self.forward + other.forward, self.backward + other.backward)

    def times(self, count: float) -> "Pass":
        return Pass(count * self.forward, count * self.backward)


def seconds(card: Card, bytes_moved: float) -> float:
    return bytes_moved / (STREAM * card.gigabytes * 1e9)


def linear(card: Card, M: int, K: int, N: int, r: int, way: str) -> Pass:
    """Of one linear."""
    odd = odd_rows(card) if (K % 2 or N % 2) and way != FUSED else 1.0
    if way == FUSED:
        found = predict(M, K, N, r, card, "csrc" if card.capability >= CSRC_FROM else "triton")
    else:
        found = predict(M, K, N, r, card, "frozen" if way in (FULL, FROZEN) else "addmm")
    us = Pass(total(found.forward), total(found.backward)).times(odd)
    if way == FULL:
        dW = product("dW", N, K, M, card, rates_of(card.capability).cublas, total(found.forward), ITEMSIZE)
        us += Pass(0.0, odd * dW.us)
    own = us.times(1e-6)
    return own + formula(card, M, K, N) if way == PUBLISHED else own


def odd_rows(card: Card) -> float:
    return ODD_ON_HOPPER if card.capability >= 90 else ODD


def formula(card: Card, M: int, K: int, N: int) -> Pass:
    """What PEFT's formula moves beside addmm_: forward, x is dropped out (5 bytes an entry) and the branch scaled and
    added (8, of which addmm_ does 4); backward likewise."""
    each = seconds(card, M * (5 * K + 4 * N))
    return Pass(each, each)


def micro_batch(card: Card, model: LlamaConfig, sequences: int, r: int, way: str) -> Pass:
    M, hidden, wide = sequences * SEQUENCE, model.hidden_size, model.intermediate_size
    shapes = [(hidden, hidden)] * 4 + [(hidden, wide)] * 2 + [(wide, hidden)]
    block = between(card, M, hidden)
    for K, N in shapes:
        block += linear(card, M, K, N, r, way)
    return block.times(model.num_hidden_layers) + head(card, M, hidden, model.vocab_size)


def between(card: Card, M: int, hidden: int) -> Pass:
    """Attention's own products, and norms, rotations, activations and sums; backward twice of what forward is."""
    attention = 2 * M * SEQUENCE * hidden / (ATTENTION * card.peak * card.tflops * 1e12)
    moved = seconds(card, BETWEEN * M)
    return Pass(attention + moved / 3, 2.5 * attention + 2 * moved / 3)


def head(card: Card, M: int, hidden: int, vocabulary: int) -> Pass:
    logits = seconds(card, LOGIT_BYTES * M * vocabulary)
    return linear(card, M, hidden, vocabulary, 1, FULL) + Pass(logits / 2, logits / 2)


def weights(model: LlamaConfig) -> int:
    hidden, wide = model.hidden_size, model.intermediate_size
    return model.num_hidden_layers * (4 * hidden + 3 * wide) * hidden + 2 * model.vocab_size * hidden


def trained(preset: str, way: str) -> int:
    """Weights that are."""
    model = PRESETS[preset].model
    if way == FULL:
        return weights(model)
    return 2 * model.vocab_size * model.hidden_size if way == FROZEN else trainable_in_relora(PRESETS[preset])


def largest(card: Card, preset: str, way: str) -> int:
    """Sequences of a micro-batch."""
    own = weights(PRESETS[preset].model)
    held = ITEMSIZE * (own + 4 * trained(preset, way))  # gradients, two moments, buckets
    room = 0.9e9 * card.memory - held
    sequences = 1
    while 2 * sequences * SEQUENCE * ACTIVATIONS[way] <= room:
        sequences *= 2
    return sequences


def step(card: Card, preset: str, way: str, sequences: int, count: int, link: float, accumulate: int) -> float:
    """Seconds of `accumulate` micro-batches on each of `count` GPUs, and the update."""
    each = micro_batch(card, PRESETS[preset].model, sequences, PRESETS[preset].r, way)
    reduced = 2 * (count - 1) / count * ITEMSIZE * trained(preset, way) / (link * 1e9)
    update = seconds(card, ADAM_BYTES * trained(preset, way))
    return accumulate * (each.forward + max(each.backward, reduced)) + update


def rate(setup: Setup, way: str, sequences: int | None = None, preset: str = "1.3b") -> tuple[float, int]:
    """(sequences a second of all GPUs, those of a micro-batch: as many as fit if not told)."""
    card = CARDS[setup.card]
    sequences = sequences or largest(card, preset, way)
    accumulate = max(1, round(PRESETS[preset].batch_size / (setup.count * sequences)))
    took = step(card, preset, way, sequences, setup.count, setup.link, accumulate)
    return setup.count * accumulate * sequences / took, sequences


def check(path: Path) -> list[str]:
    """Lines: tokens a second of an H200's eager steps of the 1.3B models, measured and predicted."""
    return [
        f"{preset:10} {way:24} {measured:8,.0f} {predicted:8,.0f} {predicted / measured - 1:+.1%}"
        for preset, way, measured, predicted in compared(path)
    ]


def compared(path: Path) -> Iterator[tuple[str, str, float, float]]:
    """(preset, way, measured, predicted tokens a second)."""
    arms = {FULL: "full_rank", FROZEN: "frozen", ADDMM: "addmm", PUBLISHED: "unfused", FUSED: "fused_lora"}
    for entry in json.loads(path.read_text())["cases"]:
        preset, sequences = entry["case"]["preset"], entry["case"]["batch"]
        for way, arm in arms.items() if preset in ("1.3b", "1.3b-5504") else ():
            took = step(CARDS["H200"], preset, way, sequences, 1, 1.0, 1)
            yield preset, way, entry["modes"]["eager"][arm]["tokens_per_second"], sequences * SEQUENCE / took


def table(micro_batch: int | None = None) -> list[str]:
    """Lines of Markdown."""
    rows = ["| | way | micro-batch | predicted | published |", "| --- | --- | --- | --- | --- |"]
    for setup in SETUPS:
        full, _ = rate(setup, FULL, micro_batch)
        for way in (FULL, PUBLISHED, FUSED):
            own, sequences = rate(setup, way, micro_batch)
            published = {FULL: setup.published[0], PUBLISHED: setup.published[1]}.get(way)
            more = f"{published:g} ({published / setup.published[0]:.2f})" if published else "-"
            rows.append(f"| {setup.count} {setup.card} | {way} | {sequences} | {own:.1f} ({own / full:.2f}) | {more} |")
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path, metavar="STEPS.JSON", help="an H200's, to compare its steps too")
    parser.add_argument("--micro-batch", type=int, help="sequences (as many as fit)")
    options = parser.parse_args(arguments)
    print("\n".join(table(options.micro_batch)))
    if options.check:
        print("\n".join(["", "tokens a second of an H200: measured, predicted", *check(options.check)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
