"""What a run leaves to read: CSV files, TensorBoard's, and the progress bar while it lasts."""

import csv
import math
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

TRAIN, HELD_OUT = "train.csv", "held_out.csv"
COLUMNS = {
    TRAIN: ("step", "tokens", "loss", "tokens_per_second", "learning_rate", "restarts"),
    HELD_OUT: ("step", "tokens", "loss", "perplexity"),
}


class Logs:
    """In `folder`, from step `start` on: what an earlier process wrote of later steps is dropped.

    Losses are in nats. Only the rank that writes has files and a bar.
    """

    def __init__(self, folder: Path, start: int, total: int, title: str, writes: bool = True):
        self.folder, self.writes, self.words = folder, writes, ""
        seen = [row["perplexity"] for row in read(folder / HELD_OUT) if row["step"] <= start]
        self.perplexity = seen[-1] if seen else math.nan
        self.bar = tqdm(total=total, initial=start, desc=title, unit="step", dynamic_ncols=True, disable=not writes)
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name in COLUMNS:
            self._write(name, [row for row in read(folder / name) if row["step"] <= start], "w")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def __enter__(self) -> "Logs":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()
        if self.writes:
            self.board.close()

    def train(self, step: int, tokens: int, loss: float, speed: float, rate: float, restarts: int) -> None:
        """After `step` steps: the mean loss and the speed since the last line, the last step's learning rate."""
        self._add(TRAIN, (step, tokens, loss, speed, rate, restarts))
        self.words = f"loss {loss:.3f}, {speed:,.0f} tokens/s, lr {rate:.2e}, {restarts} restarts"
        self._say(step)

    def held_out(self, step: int, tokens: int, loss: float) -> None:
        self.perplexity = math.exp(loss) if loss < 700 else math.inf
        self._add(HELD_OUT, (step, tokens, loss, self.perplexity))
        self._say(step)

    def _say(self, step: int) -> None:
        seen = "" if math.isnan(self.perplexity) else f", held-out perplexity {self.perplexity:.2f}"
        self.bar.set_postfix_str(self.words + seen, refresh=False)
        self.bar.update(step - self.bar.n)
        self.bar.refresh()

    def _add(self, name: str, values: tuple) -> None:
        if not self.writes:
            return
        row = dict(zip(COLUMNS[name], values, strict=True))
        self._write(name, [row], "a")
        for key in COLUMNS[name][2:]:
            self.board.add_scalar(f"{name.removesuffix('.csv')}/{key}", row[key], row["step"])

    def _write(self, name: str, rows: list[dict], mode: str) -> None:
        with open(self.folder / name, mode, newline="") as file:
            writer = csv.DictWriter(file, COLUMNS[name])
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)


def read(path: Path) -> list[dict[str, float]]:
    """The rows of a log, none where there is no log."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]  # a killed process leaves half a line
    return [{name: int(value) if value.isdigit() else float(value) for name, value in row.items()} for row in rows]
