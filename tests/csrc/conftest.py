"""The list of work of csrc's kernels, made on the CPU."""

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.csrc.passes import Item, Sizes


@pytest.fixture(scope="session")
def list_work(tmp_path_factory):
    """Runs list_work.cu on passes: (sizes, items) of each."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    program = tmp_path_factory.mktemp("list_work") / "list_work"
    here = Path(__file__).parent
    sources = [here / "list_work.cu", here.parents[1] / "csrc" / "work" / "plan.cpp"]
    subprocess.run(["nvcc", "-std=c++17", "-O1", "-o", str(program), *map(str, sources)], check=True)

    def run(passes):
        lines = "\n".join(map(str, passes))
        done = subprocess.run([str(program)], input=lines, capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            sizes, items = line.split(";")
            numbers = map(int, items.split())
            yield Sizes(*map(int, sizes.split())), list(itertools.starmap(Item, zip(*[numbers] * 8, strict=True)))

    return run
