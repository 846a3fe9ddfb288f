"""English text that every Python carries: the standard library's docstrings and the language reference."""

import ast
import os
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics


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


def write_documentation(path: Path) -> Path:
    """Both, as a text file, which is left alone if it is there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_text(f"{docstrings()}\n\n{language_reference()}\n", encoding="utf-8")
        part.replace(path)
    return path
