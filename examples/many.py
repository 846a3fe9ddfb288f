"""Eight adapters over one base, trained in one loop and one after another; a tree of them; a cache of a thousand.

    python -m examples.many

A small LLaMA learns the standard library's docstrings whole (a warm start) and is frozen. Eight tasks then learn the
sources of eight of its packages, a byte a token: together, in one loop, and apart, each alone from the same factors on
the same data. A tree has one more adapter, of all eight packages, and a child of it for one of them. A cache has a
thousand adapters, and the device eight at a time. Two minutes on two cores, where plain torch multiplies all rows by
every adapter, and together is faster by its fewer calls alone.

Writes many_output/many.png, and the adapters with their logs.
"""

import argparse
import copy
import statistics
import sys
import sysconfig
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from fused_lora import AdapterCache, AdapterTree, route
from fused_lora.extras import needs
from fused_lora.pretrain import python_text
from fused_lora.pretrain.llama import Llama, LlamaConfig

from . import text

with needs("demo"):
    from matplotlib.figure import Figure
    from tqdm import trange

    from fused_lora.tasks import Batch, Task, TaskTrainer, next_token_losses

    from .training import Schedule, train

PACKAGES = ("asyncio", "email", "encodings", "http", "logging", "multiprocessing", "unittest", "xml")
LEFT_OUT, BASE_COLOR, TOGETHER_COLOR, APART_COLOR = "__base__", "#b9b9b2", "#f0a35e", "#1f3a5f"
SLOTS = 8


@dataclass(frozen=True)
class Size:
    """Of the model, the training and the cache."""

    llama: LlamaConfig
    warm_start: Schedule
    steps: int
    batch_size: int  # sequences of a task in a pass
    lr: float
    r: int
    held_out: int  # windows of each package
    cached: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def seq_len(self) -> int:
        return self.warm_start.seq_len


CPU = Size(LlamaConfig(128, 352, 2, 4), Schedule(300, 8, 128, 5e-3), 100, 2, 4e-3, 8, 16, 1000)
GPU = Size(
    LlamaConfig(1024, 2816, 8, 16), Schedule(300, 16, 512, 6e-4), 150, 4, 1e-3, 16, 16, 1000, torch.bfloat16, "cuda"
)


@dataclass
class Result:
    """Held-out losses in nats a byte, by package; the change of each adapter (rows) on each package (columns);
    seconds that a step of all tasks takes, together and apart, and its tokens; the losses of the tree's nodes on the
    package of its child; milliseconds of a switch."""

    before: list[float]
    together: list[float]
    apart: list[float]
    change: Tensor
    tokens: int
    seconds: tuple[float, float]
    tree: dict[str, float]
    switches: dict[str, float]


def sources(package: str, size: Size) -> tuple[list[Tensor], Tensor]:
    """(windows to learn, windows held out) of the first 256 KiB of a package's files, held out at equal distances."""
    folder = Path(sysconfig.get_path("stdlib")) / package
    content = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))[: 1 << 18]
    windows = text.encode(content)[: len(content) // size.seq_len * size.seq_len].view(-1, size.seq_len)
    is_held_out = torch.arange(len(windows)) % (len(windows) // size.held_out) == 0
    return list(windows[~is_held_out]), windows[is_held_out]


def warm_start(size: Size) -> nn.Module:
    """The base: every weight learns docstrings, in float32 under autocast where it is of 16 bits later."""
    tokens = text.encode(python_text.docstrings().encode()).to(size.device)
    torch.manual_seed(0)
    model = Llama(size.llama).to(size.device)
    train(model, tokens, size.warm_start, "the base", None if size.dtype is torch.float32 else size.dtype)
    return model.to(size.dtype).requires_grad_(False)


def task(name: str, data: list[Tensor], size: Size) -> Task:
    config = {"r": size.r, "lora_alpha": 2 * size.r, "target_modules": "all-linear"}
    return Task(name, data, config, size.steps, size.lr, size.batch_size, warmup=size.steps // 10, schedule="cosine")


@torch.no_grad()
def held_out_losses(model: nn.Module, held_out: list[Tensor], names: str | tuple[str, ...]) -> list[float]:
    """Nats a byte of each package by the same adapters."""
    device = next(model.parameters()).device
    with route(model, [names]):
        summed = [next_token_losses(model, Batch(each.to(device), each.to(device), None)).sum() for each in held_out]
    counts = [each[:, 1:].numel() for each in held_out]
    return [loss / count for loss, count in zip(torch.stack(summed).tolist(), counts, strict=True)]


def learn(model: nn.Module, tasks: list[Task], folder: Path | None = None) -> float:
    """Seconds of the median pass: what else a machine does moves it little."""
    trainer = TaskTrainer(model, folder, lora_dtype=torch.float32, save_every=10**9)
    for each in tasks:
        trainer.add(each)
    seconds = []
    while trainer.running:
        start = time.perf_counter()
        trainer.step()  # reads its losses, which waits for the device
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def grow_tree(model: nn.Module, data: dict[str, list[Tensor]], held_out: Tensor, size: Size) -> tuple[dict, float]:
    """The losses of W, of an adapter of all packages and of its child on the child's package; and seconds a switch."""
    package = next(iter(data))
    learn(model, [task("sources", list(chain(*data.values())), size)])
    tree = AdapterTree(model)
    tree.add("sources")
    options = {"r": size.r // 2, "lora_alpha": size.r, "target_modules": "all-linear", "lora_dtype": torch.float32}
    tree.add(package, parent="sources", **options)
    optimizer = torch.optim.AdamW(tree.train(package), size.lr / 2, weight_decay=0.0)  # "sources" is frozen
    own = task(package, data[package], size)
    for step in trange(size.steps, desc=f"{package}, a child of sources", unit="step"):
        tokens = torch.stack([own.data[number] for number in own.numbers(step)]).to(size.device)
        with tree.route(package):
            loss = next_token_losses(model, Batch(tokens, tokens, None)).sum() / tokens[:, 1:].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    paths = {"W": LEFT_OUT, "sources": tree.deltas("sources"), f"sources/{package}": tree.deltas(package)}
    losses = {words: held_out_losses(model, [held_out], path)[0] for words, path in paths.items()}
    return losses, median_seconds(lambda name: tree.switch(name), ["sources", package] * 50)


def fill_cache(model: nn.Module, folder: Path, size: Size) -> dict[str, float]:
    """Milliseconds until a route by an adapter is entered, by where the adapter was."""
    banks = {"target_modules": "all-linear", "lora_dtype": torch.float32}
    cache = AdapterCache(model, SLOTS, size.r, host=size.cached, **banks)
    names = [f"{PACKAGES[i % len(PACKAGES)]}-{i // len(PACKAGES)}" for i in range(size.cached)]
    for name in names:
        cache.add(name, folder / "adapters" / name.partition("-")[0])

    def enter(name: str) -> None:
        with cache.route(name):
            if size.device == "cuda":
                torch.cuda.synchronize()

    where = {"on disk": names, "in the host's memory": names, "in a slot": names[-SLOTS:] * 20}
    return {words: 1e3 * median_seconds(enter, each) for words, each in where.items()}


def median_seconds(call, names: list[str]) -> float:
    seconds = []
    for name in names:
        start = time.perf_counter()
        call(name)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def run(size: Size, output: Path) -> Result:
    base = warm_start(size)
    texts = {package: sources(package, size) for package in PACKAGES}
    data, held_out = {name: each for name, (each, _) in texts.items()}, [each for _, each in texts.values()]
    tasks = [task(package, data[package], size) for package in PACKAGES]

    model = copy.deepcopy(base)
    seconds = learn(model, tasks, output)
    before = held_out_losses(model, held_out, LEFT_OUT)
    after = torch.tensor([held_out_losses(model, held_out, package) for package in PACKAGES])

    apart, seconds_apart = [], 0.0
    for i, each in enumerate(tasks):
        single = copy.deepcopy(base)
        seconds_apart += learn(single, [each])
        apart += held_out_losses(single, held_out[i : i + 1], each.name)

    tree, switch = grow_tree(copy.deepcopy(base), data, held_out[0], size)
    switches = fill_cache(copy.deepcopy(base), output, size)
    return Result(
        before=before,
        together=after.diagonal().tolist(),
        apart=apart,
        change=after - torch.tensor(before),
        tokens=len(tasks) * size.batch_size * size.seq_len,
        seconds=(seconds, seconds_apart),
        tree=tree,
        switches={"to another node of a tree": 1e3 * switch}
        | {f"to one of {size.cached:,} that is {words}": each for words, each in switches.items()},
    )


def print_tables(result: Result) -> None:
    print(f"\n{'held-out loss, nats a byte':<28}{'before':>10}{'together':>10}{'apart':>10}")
    for i, package in enumerate(PACKAGES):
        print(f"{package:<28}{result.before[i]:>10.4f}{result.together[i]:>10.4f}{result.apart[i]:>10.4f}")
    print(f"{'seconds, a step of all':<28}{'':>10}" + "".join(f"{seconds:>10.3f}" for seconds in result.seconds))
    print(f"{'tokens/s':<28}{'':>10}" + "".join(f"{result.tokens / seconds:>10,.0f}" for seconds in result.seconds))
    print(f"\n{'a tree, loss on ' + PACKAGES[0]:<28}" + "".join(f"{words:>18}" for words in result.tree))
    print(f"{'':<28}" + "".join(f"{loss:>18.4f}" for loss in result.tree.values()))
    print("\nmilliseconds of a switch")
    for words, milliseconds in result.switches.items():
        print(f"{words:<50}{milliseconds:>8.3f}")


def picture(result: Result, path: Path) -> None:
    """The losses side by side; what each adapter changes on each package."""
    figure = Figure(figsize=(9.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    columns = (
        ("before", result.before, BASE_COLOR),
        ("together", result.together, TOGETHER_COLOR),
        ("apart", result.apart, APART_COLOR),
    )
    for i, (label, losses, color) in enumerate(columns):
        places = [row + (i - 1) * 0.27 for row in range(len(PACKAGES))]
        left.barh(places, losses, 0.25, color=color, label=label)
    left.set_yticks(range(len(PACKAGES)), PACKAGES)
    left.invert_yaxis()
    left.set_xlabel("held-out loss, nats a byte")
    left.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    left.spines[["top", "right"]].set_visible(False)

    limit = result.change.abs().max().item()
    right.imshow(result.change.tolist(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    for i, row in enumerate(result.change.tolist()):
        for j, change in enumerate(row):
            color = "white" if abs(change) > 0.6 * limit else "black"
            right.text(j, i, f"{change:+.2f}", ha="center", va="center", fontsize=7.5, color=color)
    right.set_xticks(range(len(PACKAGES)), PACKAGES, rotation=35, ha="right")
    right.set_yticks(range(len(PACKAGES)), PACKAGES)
    right.set_xlabel("on the text of")
    right.set_ylabel("adapter of")
    right.set_title("what an adapter adds to the loss", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"\nwrote {path}")


def main(arguments: list[str] | None = None, size: Size | None = None) -> Result:
    parser = argparse.ArgumentParser(prog="python -m examples.many", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("many_output"), help="for the picture and the adapters")
    output = parser.parse_args(arguments).output
    sys.stdout.reconfigure(line_buffering=True)  # bars go to stderr
    result = run(size or (GPU if torch.cuda.is_available() else CPU), output)
    print_tables(result)
    picture(result, output / "many.png")
    return result


if __name__ == "__main__":
    main()
