"""A run's model as a folder that transformers loads: AutoModelForCausalLM.from_pretrained, generation and all.

    python -m fused_lora.pretrain.export pretrain_output/relora exported

Of the run's newest checkpoint, with its update merged: model.safetensors under Hugging Face's names, config.json,
generation_config.json, and the tokenizer. The folder is there whole or not at all.
"""

import argparse
import ast
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from ..whole_files import flush, write
from .llama import LlamaConfig
from .merged import merged_weights, newest
from .run import CHECKPOINTS, TOKENIZER

DTYPES = ("bfloat16", "float16", "float32")
END = 0  # the token between documents: each begins after one and ends in one


def export(run: Path, output: Path, dtype: str | None = None, tokenizer: Path | None = None) -> Path:
    """Writes the model of a run's newest checkpoint to the new folder `output`, which it returns.

    * dtype: of the weights; the run's by default. A run in 16 bits with residuals knows its weights in float32.
    * tokenizer: a tokenizer.json, where the run's folder has none.

    Raises ValueError for a folder that is no run or an output that is there already.
    """
    if output.exists():
        raise ValueError(f"{output} exists already: choose another folder, or remove it")
    weights, state = merged_weights(newest(run / CHECKPOINTS))
    options = state["options"]
    dtype = dtype or options["dtype"].removeprefix("torch.")
    model = ast.literal_eval(options["control" if options["method"] == "control" else "model"])
    config = LlamaConfig(**model)
    tensors = {_name(name): tensor.to(getattr(torch, dtype)) for name, tensor in weights.items()}
    encoder = tokenizer or run / TOKENIZER
    if tokenizer is not None and not tokenizer.exists():
        raise ValueError(f"tokenizer: there is no {tokenizer}")
    files: dict[str, Callable[[Path], object]] = {
        "model.safetensors": lambda path: save_file(tensors, path, metadata={"format": "pt"}),
        "config.json": _json(_config(config, int(options["seq_len"]), dtype)),
        "generation_config.json": _json({"bos_token_id": END, "eos_token_id": END, "pad_token_id": END}),
    }
    if encoder.exists():
        files["tokenizer.json"] = lambda path: shutil.copyfile(encoder, path)
        files["tokenizer_config.json"] = _json(_tokenizer_config(encoder, int(options["seq_len"])))
    return _write_folder(output, files)


def _name(name: str) -> str:
    """Hugging Face's name of a weight."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def _config(config: LlamaConfig, seq_len: int, dtype: str) -> dict:
    """config.json of a LlamaForCausalLM."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": seq_len,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "initializer_range": config.initializer_range or config.hidden_size**-0.5,
        "tie_word_embeddings": False,
        "bos_token_id": END,
        "eos_token_id": END,
        "torch_dtype": dtype,
    }


def _tokenizer_config(file: Path, seq_len: int) -> dict:
    end = Tokenizer.from_file(str(file)).id_to_token(END)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
    }


def _json(content: dict) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(content, indent=2) + "\n")


def _write_folder(output: Path, files: dict[str, Callable[[Path], object]]) -> Path:
    """The files beside their place, then the folder in it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=output.parent) as beside:
        new = Path(beside, output.name)
        new.mkdir()
        for name, writer in files.items():
            write(new / name, writer)
        flush(new)
        new.rename(output)
    flush(output.parent)
    return output


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fused_lora.pretrain.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (the run's)")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json, where the run's folder has none")
    args = parser.parse_args(arguments)
    try:
        export(args.run, args.output, args.dtype, args.tokenizer)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"AutoModelForCausalLM.from_pretrained({str(args.output)!r})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
