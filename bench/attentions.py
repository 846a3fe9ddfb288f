"""Attention modules of transformers and diffusers, q, k and v together and one by one: `python -m bench.attentions`.

Forward and backward of the whole module with adapters in all of its linears, kernel time on a GPU, the two ways
interleaved; they differ in replace_linear's fuse alone. Both must give the same gradients before they are timed.
"""

import argparse
import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fused_lora import replace_linear

from . import timing
from .check import BOUNDS, WrongResultError, relative_error
from .document import as_json, described, table, write_files
from .measure import dtype_on
from .record import RESULTS, environment, slug, summary

R, LORA_ALPHA = 16, 32.0
TOGETHER, APART = "auto", "off"  # of replace_linear's fuse
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma": "Gemma"}


@dataclass(frozen=True)
class Sizes:
    batch: int
    tokens: int
    width: int
    head_dim: int

    @property
    def heads(self) -> int:
        return self.width // self.head_dim


GPU_SIZES, CPU_SIZES = Sizes(8, 2048, 2048, 128), Sizes(2, 16, 64, 16)
Attention = tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]  # and how it is called


def of_transformers(family: str, kv_heads: int, sizes: Sizes, device: torch.device) -> Attention:
    from transformers import AutoConfig

    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = AutoConfig.for_model(
        family, hidden_size=sizes.width, num_attention_heads=sizes.heads, num_key_value_heads=kv_heads,
        head_dim=sizes.head_dim, intermediate_size=2 * sizes.width, num_hidden_layers=1, vocab_size=64,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    rotary = getattr(module, f"{FAMILIES[family]}RotaryEmbedding")(config).to(device)
    like = torch.empty(1, device=device, dtype=dtype_on(device))
    embeddings = rotary(like, torch.arange(sizes.tokens, device=device)[None])
    attention = getattr(module, f"{FAMILIES[family]}Attention")(config, 0)
    return attention, lambda layer, x: layer(x, position_embeddings=embeddings, attention_mask=None)[0]


def of_diffusers(sizes: Sizes) -> Attention:
    from diffusers.models.attention_processor import Attention as Layer

    return Layer(sizes.width, heads=sizes.heads, dim_head=sizes.head_dim), lambda layer, x: layer(x)


def cases(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Callable[[], Attention]]]:
    for family in FAMILIES:
        for kv_heads in (sizes.heads, sizes.heads // 4):
            name = f"{FAMILIES[family]}, {sizes.heads} heads, {kv_heads} of k and v"
            yield name, lambda family=family, kv=kv_heads: of_transformers(family, kv, sizes, device)
    yield f"diffusers, {sizes.heads} heads", lambda: of_diffusers(sizes)


def with_adapters(attention: nn.Module, fuse: str, device: torch.device) -> nn.Module:
    """A copy, whose adapters are the same for both ways."""
    torch.manual_seed(1)
    model = nn.Sequential(copy.deepcopy(attention).to(device, dtype_on(device)))
    report = replace_linear(model, R, LORA_ALPHA, fuse=fuse, freeze=True)
    if bool(report.groups) != (fuse == TOGETHER):
        raise AssertionError(f"groups with fuse={fuse!r}: {report.groups}")
    for layer in report.layers(model):
        nn.init.normal_(layer.lora_B, std=0.02)
    return model[0]


def measure(attention: Attention, sizes: Sizes, rounds: int, device: torch.device) -> dict[str, dict]:
    """Seconds of both ways. Raises WrongResultError where their results differ by more than their dtype explains."""
    module, call = attention
    x, dy = (torch.randn(sizes.batch, sizes.tokens, sizes.width, device=device, dtype=dtype_on(device)) for _ in "xy")
    x.requires_grad_()
    steps = {}
    for fuse in (TOGETHER, APART):
        model = with_adapters(module, fuse, device)
        wanted = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
        steps[fuse] = lambda model=model, wanted=wanted: torch.autograd.grad(call(model, x), wanted, dy)
    for got, expected in zip(steps[TOGETHER](), steps[APART](), strict=True):
        error = relative_error(got, expected.double())
        if not error <= BOUNDS[x.dtype]:
            raise WrongResultError(f"wrong result, no speed reported: relative error {error:.1e}")
    if device.type == "cuda":
        samples = timing.time_graphs({fuse: timing.capture(step) for fuse, step in steps.items()}, rounds)
    else:
        samples = timing.time_eager(steps, rounds, "cpu")
    return {fuse: summary(seconds) for fuse, seconds in samples.items()}


def markdown(results: dict) -> str:
    rows = []
    for each in results["attentions"]:
        if "reason" in each:
            rows.append([each["name"], "-", "-", each["reason"]])
            continue
        together, apart = (each["seconds"][fuse]["median"] * 1e6 for fuse in (TOGETHER, APART))
        rows.append([each["name"], f"{together:,.0f}", f"{apart:,.0f}", f"{apart - together:,.0f}"])
    header = ["forward + backward, us", "q, k, v together", "one by one", "saved"]
    words = f"{results['sizes']}, r = {R}; median of {results['rounds']} rounds, cold L2."
    return "\n".join([f"{described(results)} {words}", "", *table(header, rows), ""])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.attentions", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=timing.ROUNDS)
    parser.add_argument("--out", type=Path, help="the folder to write (bench/results/<device>)")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = GPU_SIZES if device.type == "cuda" else CPU_SIZES
    results = environment(device, dtype_on(device), options.rounds) | {"attentions": []}
    results["sizes"] = f"{sizes.batch} x {sizes.tokens} tokens, width {sizes.width}"
    for name, make in cases(sizes, device):
        torch.manual_seed(0)
        try:
            found = {"seconds": measure(make(), sizes, options.rounds, device)}
        except ModuleNotFoundError as error:
            found = {"reason": str(error)}
        results["attentions"].append({"name": name} | found)
    print(markdown(results))
    folder = options.out or RESULTS / slug(device)
    write_files(folder, {"attentions.md": markdown(results), "attentions.json": as_json(results)}, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
