"""The paper's first table (Lialin et al. 2023, arXiv:2307.05695) on a text of your own: which ingredient does what.

    python -m examples.table1 --text corpus.txt.xz                 ten runs for each of two seeds, preset "small"
    python -m examples.table1 --text corpus.txt --preset tiny      in minutes on a CPU, too small to order the rows
    python -m examples.table1 --text corpus.txt.xz --rows "all four" "warm start only" --lr 1e-3 2e-3 --seeds 0
                                                                   some rows, at two rates of the low-rank phase

Each is a `python -m fused_lora.pretrain` of its own, one at a time on each GPU; those that were killed are resumed.
Writes table1_output/table.md, curves.png and a folder for each run.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import Queue

import torch

from fused_lora.extras import needs
from fused_lora.pretrain.presets import PRESETS

with needs("pretrain"):
    from tqdm import tqdm

    from fused_lora.pretrain.__main__ import DIVERGED
    from fused_lora.pretrain.data import prepare
    from fused_lora.pretrain.logs import HELD_OUT, read
    from fused_lora.pretrain.plot import plot

FROM_ZERO = "--method relora --base zero --warm-start-steps 0"
# Name, flags, perplexity in the paper (None: not there). --published: as the paper's code, whose resets keep
# Adam's step and whose climbs begin at a rate of 0.
ROWS = [
    ("regular training", "--published --method full", "23.65"),
    ("all four", "--published --method relora", "25.04"),
    ("warm start only", "--published --method lora", "25.46"),
    ("restarts, reset, jagged", f"--published {FROM_ZERO}", "29.77"),
    ("restarts, jagged", f"--published {FROM_ZERO} --no-reset", "34.29"),
    ("restarts, reset", f"--published {FROM_ZERO} --no-jagged", "diverged"),
    ("restarts", f"--published {FROM_ZERO} --no-jagged --no-reset", "34.25"),
    ("none of the four", "--published --method lora --base absent --warm-start-steps 0", "34.17"),
    ("all four, and Adam's step is reset", "--method relora --reset-step", None),
    ("restarts, reset, and Adam's step is reset", f"{FROM_ZERO} --no-jagged", None),
]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("table1_output"))
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    names = [name for name, _, _ in ROWS]
    parser.add_argument(
        "--rows", nargs="+", choices=names, default=names, metavar="ROW", help=f"of: {'; '.join(names)}"
    )
    parser.add_argument(
        "--lr", type=float, nargs="+", help="rates of the low-rank phase, each for every row (preset's)"
    )
    parser.add_argument("flags", nargs="*", help="after --: more flags for every run, such as --compile")
    args = parser.parse_args(arguments)
    rows = rows_of(args.rows, args.lr)
    runs = [(row, seed) for seed in args.seeds for row in rows]
    if args.text:  # once for all
        args.data = args.data or args.output / "tokens"
        prepare(args.text, args.data, PRESETS[args.preset].model.vocab_size)
    gpus = Queue()
    for gpu in visible_gpus() or [""]:
        gpus.put(gpu)
    statuses = {}
    with ThreadPoolExecutor(gpus.qsize()) as pool:
        jobs = {
            pool.submit(_run, row, seed, common_flags(args), args.output, gpus): (row[0], seed) for row, seed in runs
        }
        try:
            for job in tqdm(as_completed(jobs), "runs", total=len(jobs)):
                statuses[jobs[job]] = job.result()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    table = write_table(args.output, rows, args.seeds, statuses)
    plot({name: folder_of(args.output, name, args.seeds[0]) for name, _, _ in rows}, args.output / "curves.png")
    print(table)
    failed = [key for key, status in statuses.items() if status not in (0, DIVERGED)]
    for name, seed in failed:
        print(f"{name}, seed {seed}: {last_words(folder_of(args.output, name, seed))}", file=sys.stderr)
    return 1 if failed else 0


def rows_of(names: list[str], rates: list[float] | None) -> list[tuple]:
    """Those of ROWS, in their order; with rates, each once for every rate, which the paper's figures are not of."""
    rows = [row for row in ROWS if row[0] in names]
    if rates is None:
        return rows
    return [
        (f"{name}, {rate:g}", f"{flags} --relora-learning-rate {rate}", None)
        for rate in rates
        for name, flags, _ in rows
    ]


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def common_flags(args: argparse.Namespace) -> list[str]:
    """Of every run."""
    return ["--preset", args.preset, *args.flags, *(["--data", str(args.data)] if args.data else [])]


def folder_of(output: Path, name: str, seed: int) -> Path:
    return output / f"{name.replace(', ', '-').replace(' ', '_').replace(chr(39), '')}-{seed}"


def _run(row: tuple, seed: int, common: list[str], output: Path, gpus: Queue) -> int:
    """The exit status of one run, a process of its own on the next free GPU; its words go to run.log."""
    name, flags, _ = row
    folder = folder_of(output, name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    own = [*shlex.split(flags), "--seed", str(seed), "--output", str(folder), "--resume"]
    gpu = gpus.get()
    try:
        with open(folder / "run.log", "a") as log:
            command = [sys.executable, "-m", "fused_lora.pretrain", *common, *own]
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
            return subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
    finally:
        gpus.put(gpu)


def last_words(folder: Path) -> str:
    return (folder / "run.log").read_text().strip().splitlines()[-1]


def cell(folder: Path, status: int | None) -> str:
    """The perplexity at the end of a run."""
    if status == 0:
        return f"{read(folder / HELD_OUT)[-1]['perplexity']:.2f}"
    return "diverged" if status == DIVERGED else "-"


def write_table(output: Path, rows: list[tuple], seeds: list[int], statuses: dict[tuple[str, int], int]) -> str:
    """Markdown, a column for each seed."""
    lines = [
        "| ingredients | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | paper, 130M |",
        "|---" * (len(seeds) + 3) + "|",
    ]
    for name, _, paper in rows:
        cells = [cell(folder_of(output, name, seed), statuses.get((name, seed))) for seed in seeds]
        numbers = [float(value) for value in cells if value[0].isdigit()]
        mean = f"{statistics.fmean(numbers):.2f}" if len(numbers) == len(cells) else "-"
        lines.append(f"| {name} | {' | '.join(cells)} | {mean} | {paper or '-'} |")
    table = "\n".join(lines) + "\n"
    (output / "table.md").write_text(table)
    return table


if __name__ == "__main__":
    sys.exit(main())
