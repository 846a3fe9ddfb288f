"""The CUDA extension, and only it: built where nvcc and a CUDA torch are, left out in one line where not.

Everything else about the package is in pyproject.toml. pip builds in isolation, without torch: to build the extension,
`make build`, or `pip install --no-build-isolation .`.
"""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

CSRC = Path("csrc")
ALL_CARDS = [("80", "sm_80"), ("86", "sm_86"), ("89", "sm_89"), ("90a", "sm_90a"), ("90", "compute_90")]
# Of the folders of kernels: the cards that they are for, the last one by PTX for cards to come.
TARGETS = {"csrc": ALL_CARDS, "sm80": ALL_CARDS, "sm90": [("90a", "sm_90a")]}
# ptxas's level of optimisation: at 3 it loads fragments too late for mma.sync (docs/sm80.md).
LEVELS = {"csrc": 3, "sm80": 1, "sm90": 3}


def obstacle() -> str | None:
    """Why the extension cannot be built here, or None."""
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME
    except ImportError:
        return "torch cannot be imported in this build environment"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if CUDA_HOME is None or not os.path.exists(os.path.join(CUDA_HOME, "bin", "nvcc")):
        return "nvcc was not found"
    return None


def kernel_flags(source: Path) -> list[str]:
    targets = [f"-gencode=arch=compute_{arch},code={code}" for arch, code in TARGETS[source.parent.name]]
    return ["-std=c++17", "-O3", f"-Xptxas=-O{LEVELS[source.parent.name]}", *targets]


def compile_kernels(nvcc: str, folder: Path) -> list[str]:
    """Objects of csrc's kernels, which know no torch: by nvcc alone, each for its cards, MAX_JOBS at once."""
    headers = max(path.stat().st_mtime for path in [Path("setup.py"), *CSRC.glob("**/*.*h")])

    def compile_one(source: Path) -> str:
        made = folder / source.relative_to(CSRC).with_suffix(".o")
        if not made.exists() or made.stat().st_mtime < max(headers, source.stat().st_mtime):
            made.parent.mkdir(parents=True, exist_ok=True)
            options = ["-Xcompiler", "-fPIC", "--threads", "2"]
            subprocess.run([nvcc, *kernel_flags(source), *options, "-c", str(source), "-o", str(made)], check=True)
        return str(made)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return list(pool.map(compile_one, sorted(CSRC.glob("**/*.cu"))))


def extension_arguments() -> dict:
    reason = obstacle()
    if reason is not None:
        print(f"fused_lora: leaving out the CUDA extension ({reason}); the Triton kernels need none")
        return {}
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CUDAExtension

    class Build(BuildExtension):
        def build_extensions(self):
            nvcc = os.path.join(CUDA_HOME, "bin", "nvcc")
            for extension in self.extensions:
                extension.extra_objects = compile_kernels(nvcc, Path(self.build_temp) / "kernels")
            super().build_extensions()

    extension = CUDAExtension(
        "fused_lora._C",
        sorted(str(path) for pattern in ("*.cpp", "work/*.cpp") for path in CSRC.glob(pattern)),
        depends=sorted(str(path) for path in CSRC.glob("**/*.*")),
        extra_compile_args=["-O2", "-g0"],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(**extension_arguments())
