"""Whole training steps of a LLaMA, by each way to train its linears: `python -m bench.steps`.

Forward, loss, backward and AdamW's step in bfloat16, on random tokens. Every arm trains embeddings, norms and head as
ReLoRA does; they differ in the linears of the blocks. All arms of a case stand in memory together and take their steps
in turn, so that only the ratios of one run are compared. Compiled arms compile the block, once for all blocks, and the
loss.

Under torchrun, each rank takes a step's micro-batches as DistributedDataParallel does it, with no_sync until the last.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from fused_lora import LoRALinear, replace_linear
from fused_lora.pretrain.llama import Llama, LlamaConfig, next_token_loss
from fused_lora.pretrain.presets import PRESETS

from .record import RESULTS, circumstances, slug
from .timing import interleave
from .variants import AddmmLoRA, _unfused_formula

LINEARS = r".*\.(self_attn|mlp)\..*"
LORA_ALPHA = 32.0
FLOOR, PACKAGE, FULL = "frozen", "fused_lora", "full_rank"
EAGER, COMPILED = "eager", "compiled"
# Of one step's results, relative, between two ways to compute them in 16 bits.
TOLERANCE = 0.03
# Table 4 counts examples of this many tokens.
EXAMPLE = 512


@dataclass(frozen=True)
class Case:
    """A model of the paper, and how many sequences of how many tokens a micro-batch has; blocks: fewer than it has."""

    preset: str
    batch: int = 16
    seq_len: int = 512
    blocks: int | None = None

    @property
    def model(self) -> LlamaConfig:
        model = SEVEN_B if self.preset == "7b" else PRESETS[self.preset].model
        return replace(model, num_hidden_layers=self.blocks) if self.blocks else model

    @property
    def r(self) -> int:
        return 128 if self.preset == "7b" else PRESETS[self.preset].r

    @property
    def warm_start(self) -> float:
        """The share of the steps that train all weights, in the paper."""
        if self.preset == "7b":
            return 1 / 3
        return PRESETS[self.preset].warm_start_steps / PRESETS[self.preset].total_steps

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len

    def __str__(self) -> str:
        return f"{self.preset}, {self.batch} x {self.seq_len}" + (f", {self.blocks} blocks" if self.blocks else "")


SEVEN_B = LlamaConfig(4096, 11008, 32, 32, 32_000, initializer_range=0.02)
CASES = (
    Case("60m", 96), Case("130m", 64), Case("350m", 48), Case("1.3b"), Case("1.3b-5504"), Case("7b", blocks=4),
)  # fmt: skip
CPU_CASES = (Case("tiny", 4, 64),)


def flops(case: Case, arm: str) -> float:
    """Of a step: two for each multiplication, the lower half of attention, and nothing that is computed twice."""
    model, M = case.model, case.tokens
    hidden, wide = model.hidden_size, model.intermediate_size
    shapes = [(hidden, hidden)] * 4 + [(hidden, wide)] * 3
    linear = sum(K * N for K, N in shapes)
    low = sum(3 * case.r * (K + N) for K, N in shapes)
    products = {FLOOR: 2 * linear, FULL: 3 * linear}.get(arm, 2 * linear + low)
    attention = 3 * case.seq_len * hidden
    return 2 * M * (model.num_hidden_layers * (products + attention) + 3 * hidden * model.vocab_size)


class Unfused(nn.Module):
    """A frozen linear with factors, by a formula (x, weight, A, B, scale) -> y."""

    def __init__(self, linear: nn.Linear, r: int, formula: Callable):
        super().__init__()
        N, K = linear.weight.shape
        self.weight, self.scale, self.formula = linear.weight.requires_grad_(False), LORA_ALPHA / r, formula
        self.lora_A = nn.Parameter(self.weight.new_empty(r, K))
        self.lora_B = nn.Parameter(self.weight.new_empty(N, r))

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.weight, self.lora_A, self.lora_B, self.scale)


def _addmm(x: Tensor, *tensors) -> Tensor:
    return AddmmLoRA.apply(x.flatten(0, -2), *tensors).view(*x.shape[:-1], -1)


def _with_formula(formula: Callable) -> Callable:
    def convert(model: Llama, r: int) -> nn.Module:
        for block in model.layers:
            for part in (block.self_attn, block.mlp):
                for name, linear in list(part.named_children()):
                    setattr(part, name, Unfused(linear, r, formula))
        return model

    return convert


def _with_peft(model: Llama, r: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=LORA_ALPHA, target_modules=LINEARS)
    trained = [parameter for name, parameter in model.named_parameters() if "layers." not in name or "norm" in name]
    # Adapters in the model's dtype: PEFT's default keeps them in float32, which is far slower.
    get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in trained:
        parameter.requires_grad_(True)
    return model


def _fused(model: Llama, r: int) -> nn.Module:
    replace_linear(model, r=r, lora_alpha=LORA_ALPHA, target_modules=LINEARS)
    return model


def _frozen(model: Llama, r: int) -> nn.Module:
    for module in model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.requires_grad_(False)
    return model


ARMS = {
    FULL: ("full-rank", lambda model, r: model),
    PACKAGE: ("**fused_lora**", _fused),
    "unfused": ("ReLoRA, unfused", _with_formula(_unfused_formula)),
    "addmm": ("ReLoRA, addmm", _with_formula(_addmm)),
    "peft": ("PEFT", _with_peft),
    FLOOR: ("linears frozen, no adapter (the floor)", _frozen),
}


def factors(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """A and B of every linear that has them, in the model's order."""
    found = []
    for module in model.modules():
        if isinstance(module, LoRALinear | Unfused):
            found.append((module.lora_A, module.lora_B))
        elif isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            found.append((module.lora_A["default"].weight, module.lora_B["default"].weight))
    return found


@dataclass
class Arm:
    """A model with its optimizer, and what a step of it costs in memory."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    batches: list[tuple[Tensor, Tensor]]

    @classmethod
    def make(cls, case: Case, name: str, device: torch.device, compiled: bool, accumulate: int = 1) -> "Arm":
        """The same weights, factors and tokens for every arm of a case."""
        torch.manual_seed(0)
        with device:
            model = Llama(case.model).to(torch.bfloat16)
        model = ARMS[name][1](model, case.r)
        generator = torch.Generator(device).manual_seed(1)
        with torch.no_grad():
            for A, B in factors(model):
                A.normal_(std=A.shape[1] ** -0.5, generator=generator)
                B.normal_(std=0.02, generator=generator)
        if compiled:
            for block in model.layers:
                block.compile(fullgraph=name != "peft")
        if torch.distributed.is_initialized():
            model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")
        shape = (case.batch, case.seq_len + 1)
        tokens = [
            torch.randint(case.model.vocab_size, shape, generator=generator, device=device) for _ in range(accumulate)
        ]
        loss = torch.compile(next_token_loss, fullgraph=True) if compiled else next_token_loss
        return cls(model, loss, optimizer, [(each[:, :-1], each[:, 1:]) for each in tokens])

    def gradients(self) -> Tensor:
        """Of all micro-batches; the last one's loss."""
        for i, (tokens, targets) in enumerate(self.batches):
            last = i + 1 == len(self.batches)
            waits = isinstance(self.model, DistributedDataParallel) and not last
            with self.model.no_sync() if waits else nullcontext():
                loss = self.loss(self.model(tokens), targets)
                loss.backward()
        return loss

    def step(self) -> Tensor:
        loss = self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def results(self) -> dict[str, float]:
        """The loss, and the gradients' norms of the embedding and of all A and B, of a step that is not taken."""
        loss = self.gradients()
        model = getattr(self.model, "module", self.model)
        found = {"loss": loss.item(), "embedding's gradient": model.embed_tokens.weight.grad.float().norm().item()}
        for i, name in enumerate("AB"):
            grads = [pair[i].grad for pair in factors(model)]
            if grads:
                found[f"{name}'s gradients"] = torch.stack([grad.float().norm() for grad in grads]).norm().item()
        self.optimizer.zero_grad()
        return found

    def bytes_held(self) -> int:
        states = (value for state in self.optimizer.state.values() for value in state.values())
        tensors = [*self.model.parameters(), *self.model.buffers(), *(v for v in states if isinstance(v, Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check(arms: dict[str, Arm]) -> None:
    """Raises AssertionError where two arms that should compute the same do not."""
    expected = arms["unfused"].results() if "unfused" in arms else None
    for name, arm in arms.items():
        if expected is None or name in (FLOOR, FULL, "unfused"):
            continue
        for what, value in arm.results().items():
            error = abs(value / expected[what] - 1)
            assert error < TOLERANCE, f"{name}: {what} is {value}, unfused has {expected[what]}"


def time_steps(arms: dict[str, Arm], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds, the arms' steps in turn."""
    if device.type != "cuda":

        def time_once(arm):
            start = time.perf_counter()
            arm.step()
            return time.perf_counter() - start

        return interleave(arms, rounds, time_once)

    def time_once(arm):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        arm.step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return interleave(arms, rounds, time_once)


def peak_bytes(arm: Arm) -> int:
    """What the arm holds, and what a step takes beside it: as if it were alone."""
    gc.collect()  # what other arms' steps left in cycles would be freed during this one
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    arm.step()
    torch.cuda.synchronize()
    return arm.bytes_held() + torch.cuda.max_memory_allocated() - before


def available(names: list[str]) -> list[str]:
    """Without those whose library is not here."""
    try:
        import peft  # noqa: F401
    except ImportError:
        return [name for name in names if name != "peft"]
    return names


def measure(case: Case, mode: str, names: list[str], rounds: int, device: torch.device, accumulate: int = 1) -> dict:
    """Results of a case in one mode, by arm: samples, tokens/s, bytes."""
    torch._dynamo.reset()
    arms = {name: Arm.make(case, name, device, mode == COMPILED, accumulate) for name in available(names)}
    check(arms)
    samples = time_steps(arms, rounds, device)
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    found = {}
    for name, times in samples.items():
        rate = ranks * accumulate * case.tokens / statistics.median(times)
        found[name] = {
            "samples": times,
            "tokens_per_second": rate,
            "examples_per_second": rate / EXAMPLE,
            "tflops": flops(case, name) * rate / case.tokens * 1e-12,
            "peak_bytes": peak_bytes(arms[name]) if device.type == "cuda" else None,
        }
    return found


def best_batch(case: Case, mode: str, name: str, device: torch.device) -> tuple[int, float]:
    """(sequences, tokens/s) of the micro-batch with which an arm is fastest, doubled while it fits."""
    best = (0, 0.0)
    while True:
        try:
            result = measure(case, mode, [name], 3, device)[name]
        except torch.OutOfMemoryError:
            return best
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if result["tokens_per_second"] < 1.01 * best[1]:
            return best
        best = (case.batch, result["tokens_per_second"])
        case = replace(case, batch=2 * case.batch)


def table(case: Case, results: dict[str, dict]) -> str:
    """Markdown, a row for each arm; ratios are to full-rank training in the same mode."""
    lines = [
        f"### {case}",
        "",
        "| | mode | tokens/s | examples/s | over full-rank | ceiling | with its warm start | TFLOP/s | peak GiB |",
        "|---" * 9 + "|",
    ]
    for mode, arms in results.items():
        full = arms.get(FULL)
        for name in ARMS:
            if name not in arms:
                continue
            arm = arms[name]
            speedup = arm["tokens_per_second"] / full["tokens_per_second"] if full else float("nan")
            ceiling = flops(case, FULL) / flops(case, name)
            whole = 1 / (case.warm_start + (1 - case.warm_start) / speedup)
            peak = arm["peak_bytes"]
            best = f" ({arm['best'][1]:,.0f} at {arm['best'][0]})" if "best" in arm else ""
            cells = (
                ARMS[name][0], mode, f"{arm['tokens_per_second']:,.0f}{best}", f"{arm['examples_per_second']:,.1f}",
                f"{speedup:.2f}", f"{ceiling:.2f}", f"{whole:.2f}", f"{arm['tflops']:.0f}",
                "-" if peak is None else f"{peak / 2**30:.1f}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _case(text: str) -> Case:
    for case in CASES + CPU_CASES:
        if case.preset == text:
            return case
    raise argparse.ArgumentTypeError(
        f"must be one of {', '.join(case.preset for case in CASES + CPU_CASES)}, got {text}"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.steps", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=_case, nargs="+", help="models (all that are for this device)")
    parser.add_argument("--arms", choices=list(ARMS), nargs="+", default=list(ARMS))
    parser.add_argument("--modes", choices=(EAGER, COMPILED), nargs="+", default=[EAGER, COMPILED])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch", type=int, help="sequences of a micro-batch, instead of each case's own")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--best", action="store_true", help="each arm at its best micro-batch too")
    parser.add_argument("--out", type=Path, help="the folder to write (bench/results/<device>)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    cases = options.cases or (CASES if device.type == "cuda" else CPU_CASES)
    text, record = "", circumstances(device, torch.bfloat16) | {"rounds": options.rounds, "cases": {}}
    folder = options.out or RESULTS / slug(device)
    with tqdm(total=len(cases) * len(options.modes), desc="steps", disable=not first) as bar:
        for case in cases:
            case = replace(case, batch=options.batch) if options.batch else case
            results = {}
            for mode in options.modes:
                bar.set_postfix_str(f"{case}, {mode}")
                results[mode] = measure(case, mode, options.arms, options.rounds, device, options.accumulate)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                if options.best:
                    for name, arm in results[mode].items():
                        arm["best"] = best_batch(case, mode, name, device)
                bar.update()
            text += table(case, results) + "\n"
            record["cases"][str(case)] = results
            if first:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "steps.md").write_text(text)
                (folder / "steps.json").write_text(json.dumps(record, indent=1) + "\n")
    if first:
        print(text)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
