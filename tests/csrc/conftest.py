"""The list of work of csrc's kernels, made on the CPU."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.csrc.items import read_items
from tests.csrc.passes import RingSizes, Sizes


@pytest.fixture(scope="session")
def compile_list(tmp_path_factory):
    """Makes a program of a source of this folder and the planner."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")

    def run(source: Path) -> Path:
        program = tmp_path_factory.mktemp(source.stem) / source.stem
        planner = sorted((Path(__file__).parents[2] / "csrc" / "work").glob("*.cpp"))
        subprocess.run(["nvcc", "-std=c++17", "-O1", "-o", str(program), str(source), *map(str, planner)], check=True)
        return program

    return run


@pytest.fixture(scope="session")
def list_sm80(compile_list):
    """Runs list_sm80.cu on a pass of linears of one size: its items on a card, as kernels get them, or before any was
    cut."""
    program = compile_list(Path(__file__).parent / "list_sm80.cu")

    def run(sizes, backward, card, halves=True, drops=False, parts=1):
        card = (card.capability, card.sm_count, card.shared_memory)
        line = " ".join(map(str, [*sizes, int(backward), *card, int(halves), int(drops), parts]))
        done = subprocess.run([str(program)], input=line, capture_output=True, text=True, check=True)
        return read_items(done.stdout)

    return run


@pytest.fixture(scope="session")
def list_work(compile_list):
    """Runs list_work.cu on passes: (sizes, items) of each."""
    program = compile_list(Path(__file__).parent / "list_work.cu")

    def run(passes):
        lines = "\n".join(map(str, passes))
        done = subprocess.run([str(program)], input=lines, capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            sizes, ring, items = line.split(";")
            yield Sizes(*map(int, sizes.split()), RingSizes(*map(int, ring.split()))), read_items(items)

    return run
