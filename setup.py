"""The CUDA extension, and only it: built where nvcc and a CUDA torch are, left out in one line where not.

    libfused_lora.so        the kernels and what plans and launches them: no torch, no Python, CUDA's runtime inside
    _C_torch2_13.abi3.so    csrc/torch for one version of torch, with autograd in C++
    _C_stable.abi3.so       csrc/torch by torch's stable ABI, for all others

Everything else about the package is in pyproject.toml. pip builds in isolation, without torch: to build the extension,
`make build`, or `pip install --no-build-isolation .`. The wheel that has it for every torch is made by release/.
"""

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
CARDS = [("80", "sm_80"), ("86", "sm_86"), ("89", "sm_89"), ("90a", "sm_90a")]
# Of the folders of kernels: the cards that they are for. csrc/sm80's run on 9.0 where it plays an older card; the merge
# by PTX on cards to come, too.
TARGETS = {"csrc": [*CARDS, ("90", "compute_90")], "sm80": CARDS, "sm90": [("90a", "sm_90a")]}
# ptxas's level of optimisation: at 3 it loads fragments too late for mma.sync (docs/sm80.md), and at 1 it keeps sums in
# memory where rows have adapters of their own.
LEVELS = {"csrc": 3, "sm80": 1, "sm90": 3}
SEGMENTS_LEVEL = {"sm80": 2, "sm90": 3}

NAME = "fused_lora"  # of the ops and of the library: copies that meet in one process need different ones
STABLE = "_C_stable"
ONLY_FULL = ("eager", "few_rows")  # sources of csrc/torch by how their names begin
OLDEST_TORCH, OLDEST_PYTHON = 0x020A << 48, 0x030A0000  # 2.10 and 3.10
HOST = [os.environ.get("CXX") or "g++", "-std=c++20", "-O2", "-fPIC", "-Wall"]


@dataclass(frozen=True)
class Toolchain:
    """What compiles and links: this machine's, or the one that release/ prepares."""

    nvcc: str
    runtime: Path  # libcudart_static.a
    nvcc_flags: list[str] = field(default_factory=list)
    link_flags: list[str] = field(default_factory=list)  # behind all objects

    @property
    def include(self) -> str:
        return f"-I{Path(self.nvcc).parent.parent / 'include'}"


def here() -> Toolchain | str:
    """This machine's, or why the extension cannot be built on it."""
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME
    except ImportError:
        return "torch cannot be imported in this build environment"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "a free-threaded Python has no limited API"
    nvcc = Path(CUDA_HOME or "") / "bin" / "nvcc"
    folders = (nvcc.parent.parent / folder for folder in ("lib64", "lib", "targets/x86_64-linux/lib"))
    runtime = next((path for folder in folders if (path := folder / "libcudart_static.a").exists()), None)
    if CUDA_HOME is None or not nvcc.exists():
        return "nvcc was not found"
    if runtime is None:
        return f"CUDA's static runtime was not found beside {nvcc}"
    return Toolchain(str(nvcc), runtime)


def module_name(version: str) -> str:
    """Of csrc/torch for a version of torch, as fused_lora/extension.py has it: 2.13.0+cu130 is _C_torch2_13. What is no
    release has a name of its own."""
    release = re.fullmatch(r"(\d+\.\d+)\.\d+(\+.*)?", version)
    return "_C_torch" + re.sub(r"\W", "_", release[1] if release else version)


def level_of(source: Path) -> int:
    levels = SEGMENTS_LEVEL if source.stem.endswith("_segments") else LEVELS
    return levels[source.parent.name]


def kernel_flags(source: Path) -> list[str]:
    targets = [f"-gencode=arch=compute_{arch},code={code}" for arch, code in TARGETS[source.parent.name]]
    return ["-std=c++17", "-O3", f"-Xptxas=-O{level_of(source)}", *targets]


def in_parallel(function: Callable, items: Iterable) -> list:
    """MAX_JOBS at once."""
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


def object_of(source: Path, folder: Path, command: list[str], *needs: Path) -> str:
    """A source compiled, where that is not yet done by this command since it, a header or what it needs has changed."""
    made = folder / source.relative_to(CSRC).with_suffix(source.suffix + ".o")
    by, words = made.with_suffix(".by"), " ".join(command)
    knows_torch = source.parent.name == "torch"
    headers = [path for path in CSRC.glob("**/*.*h") if knows_torch or path.parent.name != "torch"]
    newest = max(path.stat().st_mtime for path in (source, *headers, *needs))
    if not (made.exists() and made.stat().st_mtime >= newest and by.exists() and by.read_text() == words):
        made.parent.mkdir(parents=True, exist_ok=True)
        unfinished = made.with_suffix(".part")
        subprocess.run([*command, "-c", str(source), "-o", str(unfinished)], check=True)
        unfinished.rename(made)
        by.write_text(words)
    return str(made)


def build_library(tools: Toolchain, folder: Path, out: Path, name: str = NAME) -> None:
    """libfused_lora.so: CUDA sources by nvcc, each for its cards, and the host's beside them."""

    def compile_one(source: Path) -> str:
        if source.suffix == ".cpp":
            return object_of(source, folder / "library", [*HOST, tools.include])
        flags = [*kernel_flags(source), "-Xcompiler", "-fPIC", "--frandom-seed", str(source), *tools.nvcc_flags]
        return object_of(source, folder / "library", [tools.nvcc, *flags])

    sources = [path for path in CSRC.glob("**/*.c*") if path.suffix in (".cu", ".cpp") and path.parent.name != "torch"]
    objects = in_parallel(compile_one, sorted(sources))
    exported = folder / "exported.map"
    exported.write_text('{ global: extern "C++" { fused_lora::*; }; local: *; };\n')
    made = out / f"lib{name}.so"
    own = [f"-Wl,-soname,{made.name}", f"-Wl,--version-script={exported}", "-Wl,-z,defs", "-Wl,--gc-sections", "-s"]
    link(made, objects, [*own, str(tools.runtime), "-ldl", "-lpthread", "-lrt", *tools.link_flags])


def build_module(tools: Toolchain, torch: Path, module: str, folder: Path, out: Path, name: str = NAME) -> None:
    """csrc/torch with the headers of a torch, whose folder is given: for it alone, or by its stable ABI."""
    is_stable = module == STABLE
    headers = torch / "include"
    macros = {"FUSED_LORA_MODULE": module, "FUSED_LORA_NAMESPACE": name, "Py_LIMITED_API": hex(OLDEST_PYTHON)}
    if is_stable:
        macros |= {"FUSED_LORA_STABLE_ABI": "", "TORCH_TARGET_VERSION": hex(OLDEST_TORCH)}
    flags = [*HOST, "-fvisibility=hidden", *(f"-D{macro}={value}" for macro, value in macros.items())]
    flags += [f"-isystem{headers}", f"-isystem{headers / 'torch/csrc/api/include'}", tools.include]
    flags.append(f"-I{sysconfig.get_paths()['include']}")
    left_out = ONLY_FULL if is_stable else ()
    sources = sorted(path for path in (CSRC / "torch").glob("*.cpp") if not path.name.startswith(left_out))
    version = torch / "version.py"
    objects = in_parallel(lambda source: object_of(source, folder / name / module, flags, version), sources)
    libraries = ["torch_cpu"] if is_stable else ["torch_python", "torch_cpu", "c10"]
    own = [f"-L{out}", f"-l{name}", f"-L{torch / 'lib'}", *(f"-l{library}" for library in libraries), "-ldl"]
    link(out / f"{module}.abi3.so", objects, ["-Wl,--as-needed", *own, "-Wl,-rpath,$ORIGIN", "-s", *tools.link_flags])


def link(made: Path, objects: list[str], flags: list[str]) -> None:
    subprocess.run([HOST[0], "-shared", "-o", str(made), *objects, *flags], check=True)


def build_here(tools: Toolchain, folder: Path, out: Path) -> None:
    """For the torch of this environment, and by its stable ABI."""
    import torch

    build_library(tools, folder, out)
    for name in (module_name(torch.__version__), STABLE):
        build_module(tools, Path(torch.__file__).parent, name, folder, out)


def arguments(build: Callable[[Path, Path], None]) -> dict:
    """setup()'s of a package with the extension, which build(folder for objects, the package's folder) makes."""

    class Build(build_ext):
        def run(self):
            out = Path("fused_lora" if self.inplace or self.editable_mode else Path(self.build_lib) / "fused_lora")
            folder = Path(self.build_temp)
            for path in (folder, out):
                path.mkdir(parents=True, exist_ok=True)
            for made in [*out.glob("_C*.so"), *out.glob("lib*.so")]:  # for another torch, which this library is not for
                made.unlink()
            build(folder, out)

        def get_outputs(self):
            return [str(path) for path in (Path(self.build_lib) / "fused_lora").glob("*.so")]

        def get_output_mapping(self):
            return {}

    return {
        "ext_modules": [Extension("fused_lora._C", [], py_limited_api=True)],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    found = here()
    if isinstance(found, str) and "build_ext" in sys.argv:  # asked for by name
        raise SystemExit(f"fused_lora: the CUDA extension cannot be built: {found}")
    if isinstance(found, str):
        print(f"fused_lora: leaving out the CUDA extension ({found}); the Triton kernels need none")
        setup()
    else:
        setup(**arguments(lambda folder, out: build_here(found, folder, out)))
