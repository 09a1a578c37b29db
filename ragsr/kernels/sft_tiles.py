"""What the kernels of `group_norm_sft` share: how a tile is read, how statistics are kept, the activation.

A tile is [CB channels, PB positions] of one sample. Whichever of the two lies densely in memory, the compiler makes it
the fast one, so one kernel serves NCHW and channels-last.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class View(NamedTuple):
    """A tensor [batch, channels, positions] and its three strides; 0 repeats."""

    data: Any
    batch: Any
    channel: Any
    position: Any


@triton.jit
def place(view, batch, c, p):
    return view.data + batch * view.batch + c * view.channel + p * view.position


@triton.jit
def load(view, batch, c, p, inside, POLICY: tl.constexpr):
    return tl.load(place(view, batch, c, p), mask=inside, other=0.0, eviction_policy=POLICY).to(tl.float32)


@triton.jit
def load_joined(x, x2, channels1, batch, c, p, inside, POLICY: tl.constexpr):
    """z = [x, x2] along the channels, without the concatenation: of the two loads a lane does one."""
    if x2 is None:
        z = load(x, batch, c, p, inside, POLICY)
    else:
        z1 = load(x, batch, c, p, inside & (c < channels1), POLICY)
        z2 = load(x2, batch, c - channels1, p, inside & (c >= channels1), POLICY)
        z = tl.where(c < channels1, z1, z2)
    return z


@triton.jit
def store_joined(x, x2, channels1, batch, c, p, inside, value, POLICY: tl.constexpr):
    """The other way: what belongs to x goes there, the rest to x2."""
    if x2 is None:
        tl.store(place(x, batch, c, p), value, mask=inside, eviction_policy=POLICY)
    else:
        tl.store(place(x, batch, c, p), value, mask=inside & (c < channels1), eviction_policy=POLICY)
        tl.store(place(x2, batch, c - channels1, p), value, mask=inside & (c >= channels1), eviction_policy=POLICY)


@triton.jit
def load_channel(vector, c, valid):
    """One value per channel, [CB, 1]."""
    return tl.load(vector + c, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def normalised(z, mean, rstd):
    """The mean goes first: z · rstd − mean · rstd would lose every digit where |mean| ≫ σ."""
    return (z - mean) * rstd


# ------------------------------------------------------------------ statistics


@triton.jit
def welford_step(z, inside, count, mean, m2):
    """Every lane keeps the mean and the squared deviations of what it has seen; no digits are lost to a large mean."""
    delta = tl.where(inside, z - mean, 0.0)
    mean += delta / tl.maximum(count, 1.0)
    return mean, m2 + delta * (z - mean)


@triton.jit
def merge_lanes(count, mean, m2, n, AXIS: tl.constexpr):
    """Chan's formula for all lanes along an axis at once; `n` is the sum of their counts."""
    total = tl.sum(mean * count, axis=AXIS, keep_dims=True) / n
    total += tl.sum((mean - total) * count, axis=AXIS, keep_dims=True) / n  # what the first sum rounded away
    deviation = mean - total
    return total, tl.sum(m2 + deviation * deviation * count, axis=AXIS, keep_dims=True)


# ------------------------------------------------------------------ activation


@triton.jit
def activate(t, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        t = t * tl.sigmoid(t)
    elif ACTIVATION == "relu":
        t = tl.maximum(t, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return t


@triton.jit
def activate_backward(grad, t, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        gate = tl.sigmoid(t)
        grad = grad * gate * (1 + t * (1 - gate))
    elif ACTIVATION == "relu":
        grad = tl.where(t > 0, grad, 0.0)
    return grad
