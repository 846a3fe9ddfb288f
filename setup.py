"""The CUDA extension, and only it: built where nvcc and a CUDA torch are, left out in one line where not.

Everything else about the package is in pyproject.toml. pip builds in isolation, without torch: to build the extension,
`make build`, or `pip install --no-build-isolation .`.
"""

import os
from pathlib import Path

from setuptools import setup


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


def extension_arguments() -> dict:
    reason = obstacle()
    if reason is not None:
        print(f"fused_lora: leaving out the CUDA extension ({reason}); the Triton kernels need none")
        return {}
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    # csrc/sm90 is empty but for sm_90a, whose instructions no other target has; the PTX is for cards to come.
    targets = [("80", "sm_80"), ("86", "sm_86"), ("89", "sm_89"), ("90a", "sm_90a"), ("90", "compute_90")]
    sources = [path for pattern in ("*.cpp", "*.cu", "work/*.cpp", "sm90/*.cu") for path in Path("csrc").glob(pattern)]
    extension = CUDAExtension(
        "fused_lora._C",
        sorted(map(str, sources)),
        depends=sorted(str(path) for path in Path("csrc").glob("**/*.*h")),
        extra_compile_args={
            "cxx": ["-O2", "-g0"],
            "nvcc": ["-O3", *(f"-gencode=arch=compute_{arch},code={code}" for arch, code in targets)],
        },
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension_arguments())
