"""What setup.py builds, and what it says where it cannot."""

import os
import runpy
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import setuptools
import torch

from fused_lora import extension

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_setup(monkeypatch, capsys):
    """setup.py as pip runs it: (what it says, the arguments of its setup())."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])

    def run():
        given = []
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.append(arguments))
        runpy.run_path("setup.py", run_name="__main__")
        (arguments,) = given
        return capsys.readouterr().out, arguments

    return run


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    """Pretends a CUDA torch, whose toolkit is in the folder."""
    from torch.utils import cpp_extension

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    return tmp_path


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def assert_left_out(said, arguments, reason):
    assert said == f"fused_lora: leaving out the CUDA extension ({reason}); the Triton kernels need none\n"
    assert arguments == {}


def test_a_cpu_torch(run_setup, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert_left_out(*run_setup(), f"torch {torch.__version__} is not a CUDA build")


def test_one_that_was_asked_for_by_name(run_setup, monkeypatch):
    """As make build does."""
    monkeypatch.setattr(sys, "argv", ["setup.py", "build_ext", "--inplace"])
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SystemExit, match=r"the CUDA extension cannot be built: torch .* is not a CUDA build"):
        run_setup()


def test_no_torch(run_setup, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert_left_out(*run_setup(), "torch cannot be imported in this build environment")


def test_no_nvcc(run_setup, cuda):
    assert_left_out(*run_setup(), "nvcc was not found")


def test_no_static_runtime(run_setup, cuda):
    touch(cuda / "bin" / "nvcc")
    assert_left_out(*run_setup(), f"CUDA's static runtime was not found beside {cuda / 'bin' / 'nvcc'}")


def test_an_extension_is_offered_where_all_is_there(run_setup, cuda):
    touch(cuda / "bin" / "nvcc")
    touch(cuda / "targets" / "x86_64-linux" / "lib" / "libcudart_static.a")
    said, arguments = run_setup()
    assert said == ""
    assert arguments["options"]["bdist_wheel"]["py_limited_api"] == "cp310"
    assert [extension.name for extension in arguments["ext_modules"]] == ["fused_lora._C"]


@pytest.fixture
def build(monkeypatch):
    monkeypatch.chdir(ROOT)
    return types.SimpleNamespace(**runpy.run_path("setup.py"))


@pytest.mark.parametrize("version", ["2.13.0+cu130", "2.10.0", "3.0.0a0+git12", "2.14.0.dev20260101+cu130", "2.13.1"])
def test_modules_are_named_as_the_package_looks_for_them(version, build):
    assert build.module_name(version) == extension.module_name(version)


def test_every_source_is_compiled_once_and_for_its_cards(build, monkeypatch, tmp_path):
    compiled, linked = [], []

    def compile_one(source, folder, command, *needs):
        compiled.append((source, command))
        return str(source)

    globals_of = build.build_library.__globals__
    monkeypatch.setitem(globals_of, "object_of", compile_one)
    monkeypatch.setitem(globals_of, "link", lambda made, objects, flags: linked.append((made.name, objects)))
    tools = build.Toolchain("/cuda/bin/nvcc", Path("/cuda/lib64/libcudart_static.a"))
    build.build_library(tools, tmp_path, tmp_path)
    build.build_module(tools, Path("/torch"), "_C_torch2_13", tmp_path, tmp_path)
    build.build_module(tools, Path("/torch"), build.STABLE, tmp_path, tmp_path)
    csrc = Path("csrc")
    sources = {path for pattern in ("**/*.cu", "**/*.cpp") for path in csrc.glob(pattern)}
    assert {source for source, _ in compiled} == sources
    names = [name for name, _ in linked]
    assert names == ["libfused_lora.so", "_C_torch2_13.abi3.so", "_C_stable.abi3.so"]
    assert not any("torch" in path for path in linked[0][1])
    assert all("eager" not in path for path in linked[2][1])
    for source, command in compiled:
        if source.suffix == ".cu":
            assert any("sm_90a" in flag for flag in command)
            assert any("sm_80" in flag for flag in command) == (source.parent.name != "sm90")


@pytest.fixture
def compilers(monkeypatch):
    """What ran in place of a compiler, whose objects are not as old as what was checked out just now."""
    runs = []

    def run(command, check):
        runs.append(command)
        made = Path(command[command.index("-o") + 1])
        made.touch()
        os.utime(made, (time.time() + 10,) * 2)

    monkeypatch.setattr(subprocess, "run", run)
    return runs


FLAGS = Path("csrc/host/flags.cpp")


def test_another_command_compiles_again(build, compilers, tmp_path):
    for command in (["g++"], ["g++"], ["g++", "-O3"], ["clang++", "-O3"], ["clang++", "-O3"]):
        build.object_of(FLAGS, tmp_path, command)
    assert [command[: command.index("-c")] for command in compilers] == [["g++"], ["g++", "-O3"], ["clang++", "-O3"]]


def test_what_was_compiled_is_compiled_again_when_it_is_older(build, compilers, tmp_path):
    made = Path(build.object_of(FLAGS, tmp_path, ["g++"]))
    newer = tmp_path / "version.py"
    newer.touch()
    build.object_of(FLAGS, tmp_path, ["g++"], newer)
    assert len(compilers) == 1
    os.utime(newer, (made.stat().st_mtime + 1,) * 2)
    build.object_of(FLAGS, tmp_path, ["g++"], newer)
    assert len(compilers) == 2
