"""Imports point one way, and `ragsr.ops` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ragsr

PACKAGE = Path(ragsr.__file__).parent

# who may import whom; errors and files serve everybody
BELOW = {
    "errors": set(),
    "files": set(),
    "kernels": set(),
    "ops": {"kernels"},
    "testing": {"ops"},
    "image": {"ops"},
    "colour": {"ops"},
    "metrics": {"codes", "models"},  # for networks whose features are compared
    "sheet": {"image"},
    "tiling": set(),
    "codes": {"models", "ops", "image"},
    "search": {"ops", "_index"},
    "gallery": {"search", "codes", "image", "ops"},
    "models": {"ops"},
    "chains": {"ops"},
    "hosts": {"chains", "models", "ops", "image"},
    "pipelines": {"hosts", "chains", "models", "gallery", "image", "colour", "sheet", "tiling", "metrics", "codes"},
    "evaluation": {"pipelines", "gallery", "codes", "search", "metrics", "image", "sheet", "models", "env"},
    "training": {"models", "image", "metrics", "sheet", "env", "codes", "ops", "pipelines"},
    "env": {"ops", "kernels", "_index"},
    "cli": {"pipelines", "evaluation", "gallery", "training", "env", "image", "sheet", "codes", "metrics", "models"},
}
FOREIGN = {
    "diffusers": {"pipelines", "hosts", "models", "training", "chains"},
    "triton": {"kernels"},
    "pyiqa": {"metrics"},
    "ragsr._index": {"search"},
}


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.stem[:2] != "__"]


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Every module named by an import statement of the file, wherever in the file it stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names if node.module == "ragsr"}
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    here = layer(path)
    assert here in BELOW, f"{here} is new: say in BELOW what it may import"
    for name in imported(path):
        if name.startswith("ragsr."):
            target = name.split(".")[1]
            assert target in BELOW[here] | {here, "errors", "files"}, f"{here} must not import {name}"
        for foreign, homes in FOREIGN.items():
            if name == foreign or name.startswith(f"{foreign}."):
                assert here in homes, f"{foreign} may be imported in {homes} only"
        if name.startswith("torch.library"):
            assert here in ("ops", "testing")


def test_every_layer_exists():
    assert set(BELOW) == {layer(path) for path in modules()}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [("ragsr.ops", {"diffusers", "triton", "PIL", "skimage"}), ("ragsr.cli", {"torch", "numpy", "PIL"})],
)
def test_light_imports(module, unwanted):
    script = f"import sys, {module}; print(*sorted({unwanted!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
