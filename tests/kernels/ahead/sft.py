"""What the launchers launch for layers of StableSR (SD 2, 512 px) and SUPIR (SDXL, 1024 px).

Features have no memory, and in place of the driver stands a stub that says "sm_90".
"""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ragsr.kernels import sft
from ragsr.kernels.sft_launch import TUNING, Chip

GROUPS = 32
SOURCES: dict[str, Any] = {}


class Driver:
    """As much of a driver as choosing the variant of a kernel needs."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def forward(x, x2, gamma, beta, out, activation, raw_mix):
    vector, statistics = x.new_empty(gamma.shape[1]), x.new_empty(x.shape[0], GROUPS, dtype=torch.float32)
    rest = gamma, beta, 1e-5, activation, out, x2, raw_mix
    sft.group_norm_sft_forward((out, statistics, statistics), x, GROUPS, vector, vector, *rest)


def backward(x, x2, gamma, beta, out, activation, raw_mix):
    vector, statistics = x.new_empty(gamma.shape[1]), x.new_empty(x.shape[0], GROUPS, dtype=torch.float32)
    results = x, vector, vector, out, out, x[:, :0] if x2 is None else x2
    rest = gamma, beta, statistics, statistics, activation, x2, raw_mix, True, True, True
    sft.group_norm_sft_backward(results, out, x, GROUPS, vector, vector, *rest)


def record(layer, launch, batch, channels, size, last=False, dtype=torch.float16, activation=None, raw_mix=None):
    """Keep what `launch` launches for a layer whose features have channels[0] + channels[1] channels."""

    def features(c):
        layout = torch.channels_last if last else torch.contiguous_format
        return torch.empty(batch, c, size, size, device="meta", dtype=dtype, memory_format=layout)

    def keep(kernel, *args, grid, warmup, **options):
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        SOURCES[f"{kernel.__name__}, {layer}"] = compiled.src, {"num_warps": options.get("num_warps", 4)}

    total = sum(channels)
    gamma, beta = features(2 * total).chunk(2, dim=1)
    x2 = features(channels[1]) if len(channels) > 1 else None
    JITFunction.run = keep
    launch(features(channels[0]), x2, gamma, beta, features(total), activation, raw_mix)
    JITFunction.run = run


run = JITFunction.run
driver.set_active(Driver())
sft.chip = lambda device: Chip(132, TUNING[90])
record("StableSR 1280 8x8", forward, 2, [1280], 8)
record("StableSR 320 64x64", forward, 2, [320], 64)
record("StableSR 640 32x32 channels-last", forward, 2, [640], 32, last=True)
record("StableSR 320 128x128 channels-last", forward, 1, [320], 128, last=True)
record("SUPIR 640 + 320 128x128", forward, 2, [640, 320], 128, dtype=torch.bfloat16, raw_mix=0.5)
record("StableSR 320 64x64", backward, 2, [320], 64, activation="silu")
record("SUPIR 640 + 320 128x128", backward, 2, [640, 320], 128, dtype=torch.bfloat16, raw_mix=0.5)
