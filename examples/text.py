"""English text that every Python carries, as bytes: the standard library's docstrings and the language reference."""

import ast
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor


def _docstrings(node: ast.AST) -> Iterator[str]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)


def docstrings() -> str:
    """The distinct docstrings of the standard library's top-level modules (about 0.9 MB), in the order of their files.

    The sources are parsed, not imported: importing `antigravity` opens a browser.
    """
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            found.update(dict.fromkeys(_docstrings(ast.parse(file.read()))))
    return "\n\n".join(found)


def language_reference() -> str:
    """The Python language reference as pydoc prints it (about 0.4 MB). Its topics overlap: each paragraph comes once,
    so that what is held out was not seen in training."""
    paragraphs = (paragraph for name in sorted(topics) for paragraph in re.split(r"\n(?:\s*\n)+", topics[name].strip()))
    return "\n\n".join(dict.fromkeys(paragraphs))


def encode(text: bytes) -> Tensor:
    """One int64 token in [0, 256) a byte, whatever the text's encoding."""
    return torch.tensor(list(text), dtype=torch.int64)


def decode(tokens: Tensor) -> str:
    return bytes(tokens.tolist()).decode(errors="replace")


def split(tokens: Tensor, held_out: float = 0.1) -> tuple[Tensor, Tensor]:
    """(train, held-out): the last part of the text is held out."""
    boundary = len(tokens) - round(len(tokens) * held_out)
    return tokens[:boundary], tokens[boundary:]
