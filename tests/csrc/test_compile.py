"""Every .cu compiles by plain nvcc, with no torch and no GPU: nothing spilled or serialised, tensor cores used."""

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import setuptools
import torch

from tests.csrc.machine_code import assert_good, instructions, loops

CSRC = Path(__file__).parents[2] / "csrc"
HOPPER = "-gencode=arch=compute_90a,code=sm_90a"
SOURCES = sorted(CSRC.glob("*.cu"))
HOPPER_SOURCES = sorted((CSRC / "sm90").glob("*.cu"))
AMPERE_SOURCES = sorted((CSRC / "sm80").glob("*.cu"))
KERNELS = [path for path in HOPPER_SOURCES if path.stem.startswith("lora_linear")]

# A source takes up to a minute, and several times that on a machine that does other work.
COMPILES = pytest.mark.timeout(1200)

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def compile_to(target, source, out, *options) -> str:
    """What nvcc and ptxas say of a source, compiled to a cubin."""
    strict = ["-Xptxas=-v", "-Werror", "all-warnings"]
    command = ["nvcc", "-std=c++17", "-O3", target, "-cubin", *strict, *options, str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture
def build(monkeypatch):
    """What setup.py knows."""
    monkeypatch.chdir(CSRC.parent)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    return runpy.run_path("setup.py")


def assert_no_spills(said: str, most: int = 0) -> int:
    """How many kernels there were."""
    frames = [int(size) for size in re.findall(r"(\d+) bytes stack frame, \d+ bytes spill stores", said)]
    assert max(frames) <= most
    return len(frames)


def disassembler() -> str | None:
    """cuobjdump: the toolkit's, or the one in Triton's package."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton")
        found = shutil.which("cuobjdump", path=str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    return found


@needs_nvcc
@COMPILES
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_spills(source, arch, tmp_path):
    assert assert_no_spills(compile_to(f"-arch={arch}", source, tmp_path / "out.cubin")) > 0


# For each pass: two dtypes times seven tiles, or times three where it is gated; with segments times five, or two; of
# weights in a format times three, or two.
@needs_nvcc
@COMPILES
@pytest.mark.long
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_hopper_kernels(source, tmp_path):
    said = compile_to(HOPPER, source, tmp_path / "out.cubin")
    segmented, stored, gated, drops = (word in source.stem for word in ("segments", "stored", "gated", "dropout"))
    count = (4 if segmented or stored else 6) if gated else 10 if segmented else 6 if stored else 14
    # What an item is known by, once an item; and two words of each step by which dxa has 128 ranks, where they drop.
    # Where weights are dequantised, some words of a batch.
    assert assert_no_spills(said, (128 if drops else 64) if segmented else 32 if stored else 0) == count
    # C7510, C7512 and their like: the compiler waits after every product. C7519: it had to add a fence of its own.
    assert not re.findall(r"\(C75\d\d\)", said)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", said)]
    assert set(registers) == {65536 // 384 // 8 * 8}
    command = disassembler()
    if command is None:
        pytest.skip("needs cuobjdump")
    sass = subprocess.run([command, "-sass", str(tmp_path / "out.cubin")], capture_output=True, text=True, check=True)
    kernels = sass.stdout.split("Function : ")[1:]
    assert len(kernels) == count
    for kernel in kernels:
        assert_good(kernel, spills=segmented or stored)


PLAIN = ("lora_linear_forward", "lora_linear_backward")


def compiled_for(path):
    """(architecture, kernels): both kinds of cards; and for Hopper, which plays them, the plain ones."""
    if path.stem.endswith("segments"):  # of one rank; Hopper keeps words of a step in memory (docs/sm80.md)
        return ("86", 2), ("80", 2)
    return (("86", 6), ("80", 6), ("90", 12)) if path.stem in PLAIN else (("86", 6), ("80", 6))


def in_long(path, arch):
    """All but the plain kernels for one card."""
    return [] if path.stem in PLAIN and arch == "86" else [pytest.mark.long]


# Two dtypes, three ranks, and of 6 and 4 stages what an architecture has; the others are empty.
@needs_nvcc
@COMPILES
@pytest.mark.parametrize(
    ("source", "arch", "kernels"),
    [
        pytest.param(path, arch, kernels, marks=in_long(path, arch), id=f"{path.name}-{arch}")
        for path in AMPERE_SOURCES
        for arch, kernels in compiled_for(path)
    ],
)
def test_ampere_kernels(source, arch, kernels, build, tmp_path):
    level = build["level_of"](source)
    said = compile_to(f"-arch=sm_{arch}", source, tmp_path / "out.cubin", f"-Xptxas=-O{level}")
    # A few words are kept in memory, once an item: with dropout and segments some more.
    drops, segmented = "dropout" in source.stem, "segments" in source.stem
    assert_no_spills(said, 40 if drops or segmented else 24)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", said)]
    assert sum(number > 200 for number in registers) == kernels
    assert max(registers) <= 65536 // 256 - 1
    command = disassembler()
    if command is None:
        pytest.skip("needs cuobjdump")
    sass = subprocess.run([command, "-sass", str(tmp_path / "out.cubin")], capture_output=True, text=True, check=True)
    listings = [listing for listing in sass.stdout.split("Function : ")[1:] if "HMMA" in listing]
    assert len(listings) == kernels
    for listing in listings:
        assert {"HMMA", "LDSM", "LDGSTS"} <= set(instructions(listing))
        steps = loops(listing, "HMMA")
        assert len(steps) >= 2
        # Steps that mask what they multiply are the long ones: with 128 ranks they read a few words of it from memory.
        most = [3 if drops and len(step) > 140 else 0 for step in steps]
        assert all("STL" not in step and step.count("LDL") <= n for step, n in zip(steps, most, strict=True))


@needs_nvcc
@COMPILES
@pytest.mark.parametrize("source", HOPPER_SOURCES, ids=lambda path: path.name)
def test_hopper_sources_compile_empty_for_other_cards(source, tmp_path):
    compile_to("-arch=sm_80", source, tmp_path / "out.cubin")


@needs_nvcc
@COMPILES
@pytest.mark.long
@pytest.mark.parametrize("module", ["own", "stable"])
def test_modules_compile_for_the_torch_that_is_here(module, build, monkeypatch, tmp_path):
    """And by its stable ABI, without a warning. They are linked where there is a library (make build, make wheel)."""
    built = build["build_module"].__globals__
    monkeypatch.setitem(built, "HOST", [*build["HOST"], "-Werror"])
    linked = []
    monkeypatch.setitem(built, "link", lambda made, objects, flags: linked.append(made.name))
    name = build["STABLE"] if module == "stable" else build["module_name"](torch.__version__)
    nvcc = subprocess.run(["nvcc", "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", nvcc, re.MULTILINE)[1]
    tools = build["Toolchain"](f"{top}/bin/nvcc", Path("none"))
    build["build_module"](tools, Path(torch.__file__).parent, name, tmp_path, tmp_path)
    assert linked == [f"{name}.abi3.so"]
    left_out = build["ONLY_FULL"] if module == "stable" else ()
    sources = {path.name for path in (CSRC / "torch").glob("*.cpp") if not path.name.startswith(left_out)}
    assert {path.stem for path in tmp_path.glob("**/*.o")} == sources
    assert {"ops.cpp", "lora_parts.cpp"} <= sources


@pytest.mark.parametrize("source", [*CSRC.glob("**/*.*")], ids=lambda path: str(path.relative_to(CSRC)))
def test_one_room_knows_torch(source):
    knows = re.search(r"#include <(torch|ATen|c10)/", source.read_text())
    assert source.parent.name == "torch" or not knows


# Of what torch has loaded, a module may need only what a torch without CUDA has too.
@pytest.mark.parametrize("source", [*(CSRC / "torch").glob("*.*")], ids=lambda path: path.name)
def test_torchs_cuda_headers_are_not_used(source):
    assert not re.search(r"#include <(c10|ATen|torch/csrc)/cuda/", source.read_text())


@pytest.mark.parametrize("source", [*CSRC.glob("**/*.*")], ids=lambda path: path.name)
def test_assembly_is_in_one_room(source):
    assert source.parent.name == "ptx" or "asm" not in re.findall(r"\w+", source.read_text())
