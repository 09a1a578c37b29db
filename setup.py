"""The binaries and nothing else; everything about the package stands in pyproject.toml.

    ragsr._cpu     C++ kernels of the ops                 LibTorch stable ABI: one file for torch 2.10 and later
    ragsr._cuda    CUDA kernels of the ops                the same; linked with the static CUDA runtime
    ragsr._index   the search index on the host           pybind11, no torch header

RAGSR_PLAIN=1   install without any of them: the plain PyTorch forms do the work
RAGSR_CUDA=1    build _cuda even where PyTorch has no CUDA (it compiles, links and travels; it needs no GPU)
RAGSR_CUDA=0    leave _cuda out
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup

STABLE_ABI = [("TORCH_TARGET_VERSION", "0x020a000000000000")]  # torch 2.10
ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
CSRC = Path("csrc")
FLAGS = ["-O3", "-std=c++17", "-g0"]
HEADERS = [str(path) for path in sorted(CSRC.rglob("*.h"))]  # a changed header must rebuild what includes it


def flag(name: str) -> str:
    return os.environ.get(name, "")


def refuse(problem: str) -> None:
    plain = "Or install without compiled extensions, slower but complete: RAGSR_PLAIN=1 pip install ."
    sys.exit(f"\nragsr: {problem} {plain}\n")


def cuda_home() -> Path | None:
    """The real toolkit folder: nvcc on the path may be a link to, or a small wrapper script around, the one inside."""
    folders = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc")
    if nvcc:
        folders.append(Path(nvcc).resolve().parents[1])
    folders += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    return next((f for f in folders if (f / "bin/nvcc").is_file() and (f / "include/cuda_runtime.h").is_file()), None)


def wants_cuda() -> bool:
    import torch

    if flag("RAGSR_CUDA") in ("0", "1"):
        return flag("RAGSR_CUDA") == "1"
    return torch.version.cuda is not None and cuda_home() is not None


def stable_extension(name: str, folder: str, suffix: str, **options) -> Extension:
    return Extension(
        name,
        sources=[str(path) for path in sorted((CSRC / folder).glob(f"*{suffix}"))],
        depends=HEADERS,
        define_macros=STABLE_ABI,
        py_limited_api=True,
        **options,
    )


def cpu_extension() -> Extension:
    return stable_extension("ragsr._cpu", "cpu", ".cpp", libraries=["torch_cpu"], extra_compile_args=FLAGS)


def cuda_extension() -> Extension:
    from torch.utils import cpp_extension

    home = cuda_home()
    if home is None:
        refuse("RAGSR_CUDA=1 asks for the CUDA kernels, but no CUDA toolkit was found: install one or set CUDA_HOME.")
    cpp_extension.CUDA_HOME = str(
        home
    )  # PyTorch looks for it when it is imported, and only where it was built with CUDA
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    return stable_extension(
        "ragsr._cuda",
        "cuda",
        ".cu",
        include_dirs=[*cpp_extension.include_paths(), str(home / "include")],
        library_dirs=[*cpp_extension.library_paths(), *(str(f) for f in (home / "lib64", home / "lib") if f.is_dir())],
        libraries=["torch_cpu", "cudart_static", "dl", "rt", "pthread"],
        extra_compile_args={"cxx": FLAGS, "nvcc": ["-O3", "-std=c++17", "-DUSE_CUDA"]},
    )


def index_extension() -> Extension:
    import pybind11

    return Extension(
        "ragsr._index",
        sources=[str(path) for path in sorted((CSRC / "index").glob("*.cpp"))],
        depends=HEADERS,
        include_dirs=[pybind11.get_include()],
        extra_compile_args=[*FLAGS, "-fvisibility=hidden", "-pthread"],
    )


def build() -> dict:
    if flag("RAGSR_PLAIN") not in ("", "0"):
        return {}
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        refuse("no C++ compiler was found: install one (Debian and Ubuntu: apt install g++).")
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

    cpu = cpu_extension()
    cpu.include_dirs += include_paths()
    cpu.library_dirs += library_paths()
    extensions = [cpu, index_extension(), *([cuda_extension()] if wants_cuda() else [])]
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildExtension}}


setup(**build())
