"""needs(): a program says which extra of the package it lacks, instead of the name of a module alone."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

OURS = ("fused_lora", "examples", "bench")


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around a program's imports: ends it with a sentence where one of them is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in OURS:
            raise
        sys.exit(f"{error}: it comes with pip install 'fused_lora[{extra}]' ('.[{extra}]' in a clone)")
