"""The checks of the GPU suite, on the CPU: they pass on what is right, and find what they look for."""

import contextlib

import pytest
import torch
from gpu import checks

from ragsr.ops import hamming
from ragsr.ops._library import PLAIN_FORMS
from ragsr.testing import INPUTS

OPS = sorted(INPUTS)


def test_large_inputs_are_valid():
    for op in set(OPS) & set(checks.LARGE):
        out = checks.op_of(op)(*checks.many(op, "meta"))
        assert all(x.device.type == "meta" for x in checks.tensors(out))


@pytest.mark.parametrize("op", OPS)
def test_precise(op, monkeypatch):
    dtype = torch.float64 if checks.floating(op) else torch.float32
    checks.assert_precise(op, "cpu", dtype)
    right = PLAIN_FORMS[op]

    def wrong(*args):
        out = right(*args)
        return (out[0] + 1, *out[1:]) if isinstance(out, tuple) else out + 1

    monkeypatch.setitem(PLAIN_FORMS, op, wrong)
    with pytest.raises(AssertionError):
        checks.assert_precise(op, "cpu", dtype)


@pytest.mark.parametrize("op", OPS)
def test_gradients(op):
    if not checks.assert_gradients(op, "cpu"):
        return
    with pytest.raises(AssertionError):
        checks.assert_gradients(op, "cpu", lambda *args: 1.01 * checks.tensors(checks.op_of(op)(*args))[0])


def test_same_bits():
    nan = torch.tensor([float("nan"), 1.0])
    checks.assert_same_bits_again(lambda x: (x, x + 1), (nan,))
    calls = iter(range(100))
    with pytest.raises(AssertionError, match="other bits"):
        checks.assert_same_bits_again(lambda x: x + (next(calls) == 13), (nan,))
    assert not checks.same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    assert not checks.same_bits(torch.zeros(2, 3), torch.zeros(3, 2))


@pytest.mark.parametrize("op", OPS)
def test_reordered_arguments_are_valid_and_change_the_answer(op):
    """Else a replayed graph that ignores its inputs would pass."""
    args = checks.largest(op, "cpu")
    held = checks.copied(args)
    other = checks.op_of(op)(*checks.reordered(args))
    assert not checks.same_bits(other, checks.op_of(op)(*args))
    checks.overwrite(held, checks.reordered(args))
    torch.testing.assert_close(checks.op_of(op)(*held), other)  # not the same bits: the strides differ


@pytest.mark.parametrize("kind", checks.KINDS)
@pytest.mark.parametrize("width", [1, 3, 9])
def test_nearest(kind, width, monkeypatch):
    codes = checks.hard_codes(kind, 900, width, "cpu")
    checks.assert_nearest(codes, (1, 30), (1, 4, 900))
    right = hamming.hamming_topk_plain
    monkeypatch.setattr(hamming, "hamming_topk_plain", lambda q, c, k: (right(q, c, k)[0], right(q, c, k)[1].flip(1)))
    with pytest.raises(AssertionError, match="indices of"):
        checks.assert_nearest(codes, (1, 30), (1, 4, 900))


def test_only_plain_forms_may_wait(monkeypatch):
    monkeypatch.setattr(checks, "owner", lambda op, key: "plain PyTorch (no kernel for it yet)")
    assert "no kernel for it yet" in checks.why_exempt("adain")
    for kernel in ("Triton", "CUDA C++"):
        monkeypatch.setattr(checks, "owner", lambda op, key, kernel=kernel: kernel)
        assert checks.why_exempt("adain") is None


@pytest.mark.parametrize("op", ["hamming_topk", "sft"])
def test_compiles(op):
    checks.assert_compiles(op, "cpu")


# ------------------------------------------------------------------ with a pretended device


class Pretended:
    """`torch.cuda` on the CPU: work on a stream is done at once; a graph does what it saw once more, in its memory."""

    def __init__(self, monkeypatch):
        self.seen, self.capturing, self.idle, self.modes = [], False, False, []
        self.replays = True
        pretended = self

        class Stream:
            def wait_stream(self, other):
                pass

        class Event:
            def record(self):
                pass

            def query(self):
                return pretended.idle

        class Graph:
            def replay(self):
                for function, args, out in pretended.seen if pretended.replays else ():
                    checks.overwrite(out, function(*args))

        @contextlib.contextmanager
        def graph(_):
            self.capturing = True
            yield
            self.capturing = False

        for name, value in {"Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": graph}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.modes.append)
        self.function = checks.op_of("hamming_topk")
        monkeypatch.setattr(checks, "op_of", lambda name: self.call)

    def call(self, *args):
        out = self.function(*args)
        if self.capturing:
            self.seen.append((self.function, args, out))
        return out


@pytest.fixture
def pretended(monkeypatch):
    return Pretended(monkeypatch)


def test_a_graph_must_follow_its_inputs(pretended):
    args = checks.largest("hamming_topk", "cpu")
    checks.assert_replays("hamming_topk", args)
    pretended.seen, pretended.replays = [], False
    with pytest.raises(AssertionError, match="a replayed graph gave other bits"):
        checks.assert_replays("hamming_topk", args)


def test_an_op_must_see_what_its_stream_wrote_last(pretended):
    args = checks.largest("hamming_topk", "cpu")
    checks.assert_keeps_to_its_stream("hamming_topk", args)
    right, calls = pretended.function, iter(range(99))
    pretended.function = lambda *a: right(*(checks.reordered(a) if next(calls) else a))  # later: the values before
    with pytest.raises(AssertionError, match="did not keep to the stream"):
        checks.assert_keeps_to_its_stream("hamming_topk", args)


def test_an_op_must_return_before_the_device_is_done(pretended):
    args = checks.largest("hamming_topk", "cpu")
    checks.assert_does_not_wait("hamming_topk", args)
    pretended.idle = True
    with pytest.raises(AssertionError, match="only when the device had nothing left to do"):
        checks.assert_does_not_wait("hamming_topk", args)
    calls = iter(range(99))
    pretended.function = lambda *a: 1 / (1 - next(calls))  # the second call, in which waiting is an error
    with pytest.raises(ZeroDivisionError):
        checks.assert_does_not_wait("hamming_topk", args)
    assert pretended.modes == ["error", "default"] * 3
