"""Pictures of runs: the loss and the jagged schedule."""

from pathlib import Path

from matplotlib.figure import Figure

from .logs import HELD_OUT, TRAIN, read


def plot(runs: dict[str, Path], place: Path) -> None:
    """Loss in training (line) and held out (dots) above, the learning rate below, of each run by its name."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(2.5, 1))
    for name, folder in runs.items():
        train, held_out = read(folder / TRAIN), read(folder / HELD_OUT)
        steps = [row["step"] for row in train]
        (line,) = losses.plot(steps, [row["loss"] for row in train], linewidth=1, label=name)
        dots = [row["step"] for row in held_out], [row["loss"] for row in held_out]
        losses.plot(*dots, "o", color=line.get_color(), markersize=4)
        rates.plot(steps, [row["learning_rate"] for row in train], linewidth=1, color=line.get_color())
    _limit(losses, runs)
    losses.set_ylabel("loss, nats (dots: held out)")
    losses.legend()
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    rates.set_ylim(bottom=0)
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    place.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(place, dpi=120)


def _limit(axes, runs: dict[str, Path]) -> None:
    """The first steps' fall would leave the rest of the curves flat."""
    later = [row["loss"] for folder in runs.values() for row in read(folder / TRAIN)[5:]]
    if later:
        axes.set_ylim(min(later) - 0.1, sorted(later)[int(len(later) * 0.98)] + 0.1)
