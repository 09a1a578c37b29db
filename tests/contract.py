"""What every float op must keep to, whatever it computes: the dispatcher's rules, compilation, precision, gradients."""

import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ragsr.testing import assert_matches_plain, devices, inputs

HALF = (torch.float16, torch.bfloat16)


def assert_precise(op: str) -> None:
    """Every input of `testing.inputs`, on every device, in every dtype."""
    for device in devices():
        for dtype in (torch.float32, *HALF):
            for args in inputs(op, device, dtype):
                assert_matches_plain(op, *args)


def assert_opcheck(op: str, *, differentiable: bool = True) -> None:
    """Schema, fake and autograd on every input of `testing.inputs`; dynamic shapes, which take long, on every third."""
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    for i, args in enumerate(inputs(op)):
        args = requiring_grad(args) if differentiable else args
        tests = quick if i % 3 else (*quick, "test_aot_dispatch_dynamic")
        torch.library.opcheck(getattr(torch.ops.ragsr, op).default, args, test_utils=tests)


def assert_compiles(function: Callable[..., Any], *args: Any) -> None:
    """One graph, forward and backward, with the results of eager mode."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), function(*args))
    leaves = requiring_grad(args)
    if function(*leaves).requires_grad:
        torch.testing.assert_close(gradients(compiled, leaves), gradients(function, leaves))


def assert_gradients(op: str) -> None:
    """The gradients of every non-empty input: against differences in float64, then the half types against float64."""
    function = getattr(torch.ops.ragsr, op)
    for args in inputs(op, dtype=torch.float64):
        if all(x.numel() for x in tensors(args[:1])):
            dense = (a.contiguous() if isinstance(a, Tensor) else a for a in args)  # gradcheck wants it so
            assert torch.autograd.gradcheck(function, requiring_grad(dense), fast_mode=True)
    for dtype in HALF:
        for args in inputs(op, dtype=dtype):
            found = gradients(function, requiring_grad(args))
            wanted = gradients(function, requiring_grad(widened(args)))
            for got, want in zip(found, wanted, strict=True):
                assert got.dtype == dtype
                limit = 0.05 * want.abs().max().item() + 1e-6 if want.numel() else 0
                torch.testing.assert_close(got.double(), want, rtol=0, atol=limit)


def run_driver(name: str, folder: Path) -> str:
    """Build tests/csrc/<name>_driver.cpp, which needs no torch, and run it: what it prints."""
    tests = Path(__file__).parent
    source, program = tests / f"csrc/{name}_driver.cpp", folder / "driver"
    subprocess.run(["c++", "-std=c++17", "-O1", "-I", tests.parent / "csrc", source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def gradients(function: Callable[..., Any], args: Iterable[Any]) -> tuple[Tensor, ...]:
    """Of a weighted sum of the output, so that no direction cancels; zeros for tensors that have no influence."""
    leaves = [x for x in tensors(args) if x.requires_grad]
    out = function(*args)
    out = out[0] if isinstance(out, tuple) else out  # statistics beside the result carry no gradient
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((out * weights).sum(), leaves, materialize_grads=True)


def requiring_grad(args: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(a.detach().requires_grad_() if _floating(a) else a for a in args)


def widened(args: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(a.double() if _floating(a) else a for a in args)


def tensors(args: Iterable[Any]) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor)]


def _floating(a: Any) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point()


class LargestTensor(TorchDispatchMode):
    """Remembers in `numel` the largest tensor that any operation inside the context has made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = (x.untyped_storage().nbytes() // x.element_size() for x in tensors(tree_leaves(out)))
        self.numel = max(self.numel, *sizes, 0)
        return out
