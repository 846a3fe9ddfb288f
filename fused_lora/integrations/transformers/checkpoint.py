"""What a Trainer's checkpoint lacks of a ReLoRA run, in a file of its own inside the checkpoint's folder: the folder's
end is the file's."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.trainer import OPTIMIZER_NAME

from ... import whole_files
from ...relora import ReLoRA
from ...relora.wrapping import lora_layers, parts_of

NAME = "relora.pt"
MARK = 16  # entries of each parameter, by which a file knows its weights


def save(folder: Path, model: nn.Module, relora: ReLoRA) -> None:
    """Writes folder/relora.pt: it is there whole, or not at all."""
    content = {"relora": relora.state_dict(), "marks": _marks(model), "weights": {}}
    if is_peft(model):  # whose own file has the adapters alone, and restarts change what is below them
        content["weights"] = _weights(model)
    part = folder / f".{NAME}.{os.getpid()}"
    whole_files.write(part, lambda path: torch.save(content, path))
    part.replace(folder / NAME)


def load(folders: Iterable[Path], model: nn.Module) -> dict:
    """The controller's state of the checkpoint that the model was loaded from, which is one of the folders; of a
    PeftModel the weights below its adapters are loaded too.

    Raises ValueError if it is none of them, or cannot be resumed.
    """
    folders = [folder for folder in folders if (folder / NAME).is_file()]
    for folder in folders:
        content = torch.load(folder / NAME, map_location="cpu", weights_only=True)
        if _fits(content["marks"], _marks(model)):
            if not (folder / OPTIMIZER_NAME).is_file():
                raise ValueError(f"{folder} has no {OPTIMIZER_NAME} (save_only_model): it cannot be resumed")
            own = _weights(model) if content["weights"] else {}
            for name, weight in content["weights"].items():
                own[name].copy_(weight)
            return content["relora"]
    found = f"that of {', '.join(map(str, folders))} is of other weights" if folders else "there is none"
    raise ValueError(
        f"resume_from_checkpoint must be a checkpoint with its {NAME}, which ReLoRACallback writes: {found}. For one "
        "that lies elsewhere than in output_dir, say TrainingArguments(resume_from_checkpoint=...) too"
    )


def is_peft(model: nn.Module) -> bool:
    return getattr(model, "peft_config", None) is not None


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: part.weight.detach() for name, part in parts_of(lora_layers(model)).items()}


def _marks(model: nn.Module) -> dict[str, Tensor]:
    """The first entries of every parameter that trains."""
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: parameter.flatten()[:MARK].cpu() for name, parameter in trained.items()}


def _fits(saved: dict[str, Tensor], own: dict[str, Tensor]) -> bool:
    """Of what both have: which layers a run wraps is for its options to say."""
    return all(torch.equal(mark, own[name]) for name, mark in saved.items() if name in own)
