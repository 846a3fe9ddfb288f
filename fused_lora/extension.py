"""The CUDA extension, where it is built: the module of it that serves the torch that runs.

`_C_torch2_13` and its like are each for one version of torch, with autograd in C++. `_C_stable` serves every torch from
2.10 on by its stable ABI, which has no autograd: eager calls go by way of autograd in Python there.
"""

import importlib
import importlib.util
import re
import warnings
from types import ModuleType
from typing import NamedTuple

import torch

OLDEST = (2, 10)
STABLE = "_C_stable"


class Extension(NamedTuple):
    """What was found, in words; without a module, why there is none."""

    module: ModuleType | None
    words: str

    @property
    def has_autograd(self) -> bool:
        return hasattr(self.module, "lora_linear")


def module_name(version: str) -> str:
    """Of the module for a version of torch: 2.13.0+cu130 has _C_torch2_13. What is no release, such as a nightly build,
    may be laid out otherwise than the release of its number, and has a name of its own."""
    release = re.fullmatch(r"(\d+\.\d+)\.\d+(\+.*)?", version)
    return "_C_torch" + re.sub(r"\W", "_", release[1] if release else version)


def load(stable: bool = False) -> Extension:
    """The module for this torch, the one of the stable ABI where there is none or where it is asked for."""
    if torch.version.cuda is None:
        return Extension(None, f"torch {torch.__version__} is no CUDA build, to which the CUDA extension is of no use")
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST:
        return Extension(None, f"the CUDA extension is for torch 2.10 and later, this is {torch.__version__}")
    names = module_name(torch.__version__), STABLE
    built = [name for name in names if importlib.util.find_spec(f"{__package__}.{name}")]
    if not built:
        return Extension(None, "the CUDA extension is not built (make build)")
    failures = []
    for name in [STABLE] if stable else built:
        try:
            module = importlib.import_module(f".{name}", __package__)  # registers its ops
        except (ImportError, OSError) as error:
            failures.append(f"{name}: {error}")
        else:
            return Extension(module, _words(name, failures))
    obstacle = f"the CUDA extension does not load, install or build it again: {'; '.join(failures)}"
    warnings.warn(f"{obstacle}; layers run without it", stacklevel=2)
    return Extension(None, obstacle)


def _words(name: str, failures: list[str]) -> str:
    if name != STABLE:
        return "with autograd in C++"
    why = f" ({'; '.join(failures)})" if failures else ""
    own = f"a build for torch {torch.__version__}"
    return f"by torch's stable ABI{why}: eager calls take the host longer than with {own}"
