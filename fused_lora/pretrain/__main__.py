"""Pretrains a LLaMA on a text file: whole, by LoRA, or by ReLoRA (Lialin et al. 2023, arXiv:2307.05695).

    python -m fused_lora.pretrain                      a tiny model on Python's own documentation, in a minute
    python -m fused_lora.pretrain --text book.txt --preset small
    python -m fused_lora.pretrain --data tokens --preset 130m --method full --output pretrain_output/full
    torchrun --nproc-per-node 8 -m fused_lora.pretrain --text corpus.txt.xz --preset 1.3b --compile
    python -m fused_lora.pretrain.export pretrain_output/relora folder       what transformers' from_pretrained loads

Documents are what stands between blank lines; one in a hundred is held out. Prints the held-out perplexity at the end.
"""

import argparse
import lzma
import sys
from dataclasses import fields, replace
from pathlib import Path

import torch

from ..extras import needs
from ..relora.options import BASES, PRECISIONS
from .options import METHODS, Options
from .presets import PRESETS, Preset
from .python_text import write_documentation
from .ranks import Ranks, joined
from .repeatable import repeatable

with needs("pretrain"):
    from .data import Data, prepare
    from .run import CURVES, DivergedError, Intervals, StoppedError, run
    from .trainer import Trainer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DIVERGED, STOPPED = 3, 130  # exit statuses
# What is a sentence to the user; the rest are our mistakes, and show where.
REFUSALS = (ValueError, TypeError, OSError, EOFError, lzma.LZMAError, DivergedError, StoppedError)
NUMBERS = [field for field in fields(Preset) if field.type in (int, float)]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fused_lora.pretrain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = parser.add_argument_group("text")
    text.add_argument("--text", type=Path, help="a text file, plain, .xz or .gz; Python's documentation without one")
    text.add_argument("--data", type=Path, help="folder of the text's tokens, made there if it holds none of this text")
    text.add_argument(
        "--tokenizer",
        type=Path,
        help="a tokenizer.json whose token 0 ends documents; without, one is trained on the text",
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--preset", choices=PRESETS, default="tiny", help="model and schedule: the paper's, or smaller ones"
    )
    run.add_argument(
        "--method", choices=METHODS, default="relora", help="what trains: all, a model of as many, factors"
    )
    run.add_argument("--output", type=Path, help="folder of the run (pretrain_output/<method>)")
    run.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in it, if there is one")
    run.add_argument("--seed", type=int, default=0, help="of weights, batches, factors and dropout")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--dtype", choices=DTYPES, help="of weights and optimizer (bfloat16 on a GPU, float32 on a CPU)")
    run.add_argument("--compile", action="store_true", help="by torch.compile")
    run.add_argument("--micro-batch-size", type=int, help="sequences at once, where a batch does not fit into memory")
    run.add_argument("--log-every", type=int, metavar="STEPS", help="10, or a hundredth of a shorter run")
    for name in ("evaluate", "save"):
        run.add_argument(f"--{name}-every", type=int, metavar="STEPS", help="500, or a fifth of a shorter run")
    parts = parser.add_argument_group("what ReLoRA consists of")
    parts.add_argument("--base", choices=BASES, default="trained", help="what the frozen weights begin as")
    parts.add_argument("--precision", choices=PRECISIONS, default="auto", help="how 16-bit weights take an update")
    parts.add_argument(
        "--no-reset", dest="reset", action="store_false", help="keep the optimizer's moments at restarts"
    )
    parts.add_argument(
        "--no-jagged", dest="jagged", action="store_false", help="one cosine, without climbs at restarts"
    )
    parts.add_argument(
        "--reset-step",
        action=argparse.BooleanOptionalAction,
        help="whether restarts set Adam's step back (where the rate does not climb after them)",
    )
    parts.add_argument(
        "--published", action="store_true", help="as the paper's code: resets keep Adam's step, climbs begin at 0"
    )
    numbers = parser.add_argument_group("numbers in the place of the preset's")
    for field in NUMBERS:
        numbers.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, metavar=field.type.__name__)
    args = parser.parse_args(arguments)
    if args.tokenizer and not args.text:
        parser.error("--tokenizer is for a --text")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU")
    return args


def options_of(args: argparse.Namespace) -> Options:
    given = {field.name: getattr(args, field.name) for field in NUMBERS}
    return Options(
        preset=replace(PRESETS[args.preset], **{name: value for name, value in given.items() if value is not None}),
        method=args.method,
        base=args.base,
        precision=args.precision,
        reset=args.reset,
        jagged=args.jagged,
        published=args.published,
        reset_step=args.reset_step,
        dtype=DTYPES[args.dtype or ("bfloat16" if args.device == "cuda" else "float32")],
        seed=args.seed,
    )


def tokens_of(args: argparse.Namespace, vocab_size: int, ranks: Ranks) -> Data:
    """The text's tokens, made by the first rank while the others wait; without a text or a folder, Python's own."""
    text, folder = args.text, args.data
    if text is None and folder is None:
        text = write_documentation(Path("pretrain_output") / "python.txt")
    if folder is None:
        folder = Path("pretrain_output") / f"tokens-{text.name}-{vocab_size}"
    if ranks.first and text is not None:
        prepare(text, folder, vocab_size, args.tokenizer)
    ranks.wait()
    return Data.load(folder, vocab_size)


def _or_usual(given: int | None, usual: int) -> int:
    return max(1, usual) if given is None else given


def train(args: argparse.Namespace, ranks: Ranks) -> None:
    options = options_of(args)
    total = options.preset.total_steps
    intervals = Intervals(
        log=_or_usual(args.log_every, min(10, total // 100)),
        evaluate=_or_usual(args.evaluate_every, min(500, total // 5)),
        save=_or_usual(args.save_every, min(500, total // 5)),
    )
    data = tokens_of(args, options.llama.vocab_size, ranks)
    trainer = Trainer(options, data, ranks, args.micro_batch_size, args.compile)
    output = args.output or Path("pretrain_output") / args.method
    perplexity = run(trainer, data, output, intervals, args.resume)
    if ranks.first:
        print(f"held-out perplexity {perplexity:.2f}; curves in {output / CURVES}")


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    first = True
    try:
        with joined(args.device) as ranks, repeatable():
            first = ranks.first
            train(args, ranks)
    except REFUSALS as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        return {DivergedError: DIVERGED, StoppedError: STOPPED}.get(type(error), 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
