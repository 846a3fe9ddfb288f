"""What a task leaves to read: a file with a line of JSON for each step, and a progress bar while it runs."""

import json
import math
import sys
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from .job import Step


class Log:
    """Of one task from step `start` on: what an earlier process wrote of later steps is dropped. path: None for no
    file."""

    def __init__(self, name: str, path: Path | None, start: int, total: int, progress: bool):
        self._name, self._path, self._progress = name, path, progress
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in read(path) if line["step"] <= start]
            path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._bar = tqdm(
            desc=name, initial=start, total=total, unit="step", leave=False, dynamic_ncols=True, disable=not progress
        )

    def add(self, step: Step) -> None:
        words = "skipped: no number" if step.skipped else f"loss {step.loss:.4f}, lr {step.lr:.1e}"
        self._bar.set_postfix_str(words, refresh=False)
        self._bar.update()
        if step.skipped:
            self._say(f"{self._name}: step {step.step} is skipped: loss {step.loss}, gradient's norm {step.grad_norm}")
        if self._path is not None:
            # JSON has no word for what is no number.
            line = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in step._asdict().items()
            }
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def close(self, words: str) -> None:
        """Ends the bar with a line."""
        self._bar.close()
        self._say(f"{self._name}: {words}")

    def _say(self, words: str) -> None:
        if self._progress:
            tqdm.write(words, file=sys.stderr)  # above the other bars


def read(path: Path) -> list[dict]:
    """The lines of a log, none where there is none."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):  # a killed process leaves half a line
            lines.append(json.loads(line))
    return lines
