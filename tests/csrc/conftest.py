"""The list of work of csrc's kernels, made on the CPU."""

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.csrc.passes import Item, Sizes


@pytest.fixture(scope="session")
def compile_list(tmp_path_factory):
    """Makes a program of a source of this folder and the planner."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")

    def run(source: Path) -> Path:
        program = tmp_path_factory.mktemp(source.stem) / source.stem
        planner = Path(__file__).parents[2] / "csrc" / "work" / "plan.cpp"
        subprocess.run(["nvcc", "-std=c++17", "-O1", "-o", str(program), str(source), str(planner)], check=True)
        return program

    return run


@pytest.fixture(scope="session")
def list_work(compile_list):
    """Runs list_work.cu on passes: (sizes, items) of each."""
    program = compile_list(Path(__file__).parent / "list_work.cu")

    def run(passes):
        lines = "\n".join(map(str, passes))
        done = subprocess.run([str(program)], input=lines, capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            sizes, items = line.split(";")
            numbers = map(int, items.split())
            yield Sizes(*map(int, sizes.split())), list(itertools.starmap(Item, zip(*[numbers] * 8, strict=True)))

    return run
