"""Time and memory of ReFIR beside the plain model, per mode: python benchmarks/refir_cost.py --json FILE

The model is `small_hosts.py`: a Stable Diffusion 2 an eighth as wide, in the proportions of 1024². Time is that of one
thread (CPU time, so that other programs do not count), the least of some interleaved runs; on a GPU, `--model` times a
real one. Memory is the peak of what tensors take besides the weights, from PyTorch's allocator events; on
the CPU what the cache keeps is part of it, and told apart.

Arithmetic alone gives, with the paper's preset, for Stable Diffusion 2 at 1024² and a reference of the same size:
denoise 2.10, noised 1.50, a cache hit 1.10.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from small_hosts import SIZE, picture, prompts, small_host

from ragsr.chains import PRESETS, ReferenceCache, chosen_layers
from ragsr.image import tensor_to_image
from ragsr.pipelines import ReFIRPipeline
from ragsr.pipelines.refir_memory import record_bytes

TARGETS = {"denoise": 2.2, "noised": 1.55, "fast": 1.3, "cache hit": 1.15}
MODES = ("plain", *TARGETS, "batched")
STEPS, GUIDANCE = 20, 5.5
FEW = 5  # steps for memory, which does not grow with them but for the cache


class Runs:
    """One photo and one reference of the same size, restored in every mode."""

    def __init__(self, pipe: Any, size: tuple[int, int], told: dict[str, Any], preset: str, steps: int) -> None:
        self.host, self.told, self.preset, self.steps = pipe, told, preset, steps
        self.photo = picture(1, *size)
        self.reference = tensor_to_image(picture(2, *size))
        self.filled = ReferenceCache()
        self.run("denoise", self.filled)

    def run(self, mode: str, cache: ReferenceCache | None = None, output: str = "latent") -> torch.Tensor:
        """The restored latent, encoded once and not decoded, or the picture. Without a cache the chains go anew."""
        self.cache = cache or (self.filled if mode == "cache hit" else ReferenceCache())
        made = ReFIRPipeline(self.host, self.cache)
        made.set_progress_bar_config(disable=True)
        return made(
            self.photo,
            () if mode == "plain" else self.reference,
            scale=1,
            mode="denoise" if mode in ("plain", "cache hit") else mode,
            plan=self.preset,
            num_inference_steps=self.steps,
            strength=1.0,
            guidance_scale=GUIDANCE,
            output_type=output,
            **self.told,
        ).images


def seconds(run: Any, device: torch.device) -> float:
    """CPU time of this thread; on a GPU, time until it is done."""
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.thread_time
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    run()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start


def peak_bytes(run: Any, device: torch.device) -> int:
    """The most that tensors took at a time, above what there was before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(runs: Runs, modes: tuple[str, ...], rounds: int) -> list[dict[str, Any]]:
    device = runs.host.device
    least = dict.fromkeys(modes, float("inf"))
    for _ in range(rounds):  # interleaved: what slows the machine down meets every mode
        for mode in modes:
            least[mode] = min(least[mode], seconds(lambda mode=mode: runs.run(mode), device))
    peaks, kept, runs.steps = {}, {}, FEW
    runs.run("denoise", runs.filled)
    for mode in modes:
        runs.cache = None  # else it would be freed within
        peaks[mode] = peak_bytes(lambda mode=mode: runs.run(mode), device)
        kept[mode] = 0 if mode == "cache hit" else sum(place.used for place in runs.cache.places)  # made in this run
    return [
        {
            "preset": runs.preset,
            "mode": mode,
            "seconds": round(least[mode], 4),
            "times plain": round(least[mode] / least["plain"], 3),
            "target": TARGETS.get(mode) if runs.preset == "paper" else None,
            "peak_mib": round(peaks[mode] / 2**20, 2),
            "cache_mib": round(kept[mode] / 2**20, 2),
            "peak without cache times plain": round((peaks[mode] - kept[mode]) / peaks["plain"], 3),
        }
        for mode in modes
    ]


def line(row: dict[str, Any]) -> str:
    goal = f" (at most {row['target']})" if row["target"] else ""
    time_told = f"{row['seconds']:8.3f} s  {row['times plain']:.2f}x{goal}"
    memory = f"peak {row['peak_mib']:.1f} MiB, cache {row['cache_mib']:.1f}"
    return f"{row['preset']:15} {row['mode']:10} {time_told:32} {memory}, {row['peak without cache times plain']:.2f}x"


def load_model(name: str | None, dtype: torch.dtype, attention_scale: float = 4) -> tuple[Any, dict[str, Any]]:
    """A real model on the GPU, or the small one; and what its calls need."""
    if name is None:
        host, told = small_host(attention_scale), {name: x.to(dtype) for name, x in prompts().items()}
    else:
        from ragsr.hosts import load_host

        host, told = load_host(name, torch_dtype=dtype), {}
    for part in host.parts().values():
        part.to("cuda" if name else "cpu", dtype)
    return host, told


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results with device, versions and commit")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["paper"], help="(paper)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=SIZE, help="pixels (256 512)")
    parser.add_argument("--steps", type=int, default=STEPS, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs per mode, of which the fastest counts (3)")
    parser.add_argument("--model", help="a real model instead, on a GPU in float16: a folder or hub name")
    args = parser.parse_args()
    torch.set_num_threads(1)
    host, told = load_model(args.model, torch.float16 if args.model else torch.float32)
    rows = []
    for preset in args.presets:
        runs = Runs(host, tuple(args.size), told, preset, args.steps)
        step = record_bytes(host, PRESETS[preset], tuple(args.size), 2)
        layers = len(PRESETS[preset].weigh(chosen_layers(host, PRESETS[preset])))
        print(f"{preset}: {layers} layers; a step keeps {step / 2**20:.1f} MiB")
        for row in measure(runs, MODES, args.rounds):
            print(line(row), flush=True)
            rows.append(row)
    if args.json:
        from ragsr.env import provenance

        about = {
            "size": list(args.size),
            "steps": args.steps,
            "steps for memory": FEW,
            "model": args.model or "Stable Diffusion 2 / 8",
        }
        document = about | {"provenance": provenance(), "rows": rows}
        args.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
