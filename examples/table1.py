"""The paper's first table (Lialin et al. 2023, arXiv:2307.05695) on a text of your own: which ingredient does what.

    python -m examples.table1 --text corpus.txt.xz                 eight rows, two seeds, preset "small"
    python -m examples.table1 --text corpus.txt --preset tiny      in minutes on a CPU, too small to order the rows

Each is a `python -m fused_lora.pretrain` of its own, one at a time on each GPU; those that were killed are resumed.
Writes table1_output/table.md, curves.png and a folder for each run.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import torch
from tqdm import tqdm

from fused_lora.pretrain.logs import HELD_OUT, read
from fused_lora.pretrain.plot import plot
from fused_lora.pretrain.presets import PRESETS

FROM_ZERO = "--method relora --base zero --warm-start-steps 0"
# Name, flags, perplexity in the paper (None: not there). --published: resets keep Adam's step.
ROWS = [
    ("regular training", "--published --method full", "23.65"),
    ("all four", "--published --method relora", "25.04"),
    ("warm start only", "--published --method lora", "25.46"),
    ("restarts, reset, jagged", f"--published {FROM_ZERO}", "29.77"),
    ("restarts, jagged", f"--published {FROM_ZERO} --no-reset", "34.29"),
    ("restarts, reset", f"--published {FROM_ZERO} --no-jagged", "diverged"),
    ("restarts", f"--published {FROM_ZERO} --no-jagged --no-reset", "34.25"),
    ("none of the four", "--published --method lora --base absent --warm-start-steps 0", "34.17"),
    ("all four, and Adam's step is reset", "--method relora", None),
    ("restarts, reset, and Adam's step is reset", f"{FROM_ZERO} --no-jagged", None),
]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("table1_output"))
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("flags", nargs="*", help="after --: more flags for every run, such as --compile")
    args = parser.parse_args(arguments)
    common = ["--preset", args.preset, *args.flags]
    for name in ("text", "data"):
        if getattr(args, name):
            common += [f"--{name}", str(getattr(args, name))]
    runs = [(row, seed) for seed in args.seeds for row in ROWS]
    gpus = Queue()
    for gpu in range(max(1, torch.cuda.device_count())):
        gpus.put(gpu)
    with ThreadPoolExecutor(gpus.qsize()) as pool:
        jobs = [pool.submit(_run, row, seed, common, args.output, gpus) for row, seed in runs]
        for job in tqdm(jobs, "runs"):
            job.result()
    table = write_table(args.output, args.seeds)
    plot({name: folder_of(args.output, name, args.seeds[0]) for name, _, _ in ROWS}, args.output / "curves.png")
    print(table)
    return 0


def folder_of(output: Path, name: str, seed: int) -> Path:
    return output / f"{name.replace(', ', '-').replace(' ', '_').replace(chr(39), '')}-{seed}"


def _run(row: tuple, seed: int, common: list[str], output: Path, gpus: Queue) -> None:
    """One run as a process, on the next free GPU; its words go to run.log."""
    name, flags, _ = row
    folder = folder_of(output, name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    own = [*shlex.split(flags), "--seed", str(seed), "--output", str(folder), "--resume"]
    gpu = gpus.get()
    try:
        with open(folder / "run.log", "a") as log:
            command = [sys.executable, "-m", "fused_lora.pretrain", *common, *own]
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
            subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
    finally:
        gpus.put(gpu)


def perplexity_of(folder: Path) -> float | None:
    """At the end of a run; None before it, and where the run diverged."""
    rows = read(folder / HELD_OUT)
    return rows[-1]["perplexity"] if rows and "held-out perplexity" in (folder / "run.log").read_text() else None


def write_table(output: Path, seeds: list[int]) -> str:
    """Markdown, a column for each seed."""
    lines = [
        "| ingredients | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | paper, 130M |",
        "|---" * (len(seeds) + 3) + "|",
    ]
    for name, _, paper in ROWS:
        found = [perplexity_of(folder_of(output, name, seed)) for seed in seeds]
        cells = [f"{value:.2f}" if value else "-" for value in found]
        mean = f"{statistics.fmean(found):.2f}" if all(found) else "-"
        lines.append(f"| {name} | {' | '.join(cells)} | {mean} | {paper or '-'} |")
    table = "\n".join(lines) + "\n"
    (output / "table.md").write_text(table)
    return table


if __name__ == "__main__":
    sys.exit(main())
