"""One run of irag_cost.py: the pipeline with a clock around its stages and around the ops under them."""

import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from irag_cost import HAMMING, MAPS, OPS
from torch import nn

from ragsr.cli.demo import OTHERS, PHOTO, TRUE_REFERENCE, photo_folder
from ragsr.gallery import Gallery
from ragsr.gallery.index import Loaded
from ragsr.image import load_image
from ragsr.models import TTSR, load_model
from ragsr.models.sft import SPADE
from ragsr.models.ttsr import TTSRNet
from ragsr.pipelines.diffusion import DiffusionStage
from ragsr.pipelines.refsr import RefSRPipeline
from ragsr.pipelines.restore import find_device, load_diffusion, reference_stage
from ragsr.search import Index

REFERENCE_SIZE = (1152, 768)


def measure(
    model: Path | None, full_size: bool, side: int, steps: int, dtype: str, device: str | None, codes: int
) -> dict[str, Any]:
    """Restore a photo of side / 4 once; on CUDA a second time, when all kernels are compiled."""
    place = find_device(device)
    imported = peak_mib(place.type == "cuda")
    pipeline = pipeline_of(model, full_size, steps, getattr(torch, dtype), place)
    low = load_image(photo_folder() / PHOTO).resize((side // 4, side // 4), 3)
    with tempfile.TemporaryDirectory() as folder, gallery_at(Path(folder)) as gallery:
        gallery.search(low, 1)  # loads the encoder and the codes, which belongs to no photo
        loaded = peak_mib(place.type == "cuda")
        for _ in range(2 if place.type == "cuda" else 1):
            meter = Meter(place)
            whole = meter.around("whole", pipeline.__call__, memory=True)
            with meter.installed(pipeline, random_codes(gallery.encoder.bits, codes)):
                restored = whole(low, gallery=gallery, threshold=0.0)
        parts = meter.parts()
    assert [one.path.name for one in restored.references] == [TRUE_REFERENCE], "not the photo that is known to help"
    assert np.asarray(restored.image).std() > 1, "the result shows nothing"
    total = parts.pop("whole")
    return {
        "device": place.type,
        "steps": steps,
        "threads": torch.get_num_threads(),
        **{name: total[name] for name in ("seconds", "cpu_seconds", "time")},
        "peak_mib": meter.peak,
        "imported_mib": imported,
        "loaded_mib": loaded,
        "parts": parts,
    }


# ------------------------------------------------------------------ the clocks


class Meter:
    """Times of named parts, which may lie in each other, and the peak of memory in those that ask for it.

    seconds       of the clock on the wall; on CUDA, for what is timed without memory, those of the host alone
    cpu_seconds   of all threads
    time          what shares are made of: CPU seconds, on CUDA those between two events
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.found: dict[str, dict[str, Any]] = {}
        self.events: list[tuple[str, Any, Any]] = []
        self.peak = 0  # MiB, of all since the first stage

    def around(self, name: str, call: Callable[..., Any], memory: bool = False) -> Callable[..., Any]:
        """`call`, timed. With `memory` it is a stage: the device is waited for, and its peak is its own."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if memory:
                self.wait()
                self.peak = max(self.peak, peak_mib(self.on_cuda)) if self.found else 0
                reset_peak(self.on_cuda)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.on_cuda else []
            wall, cpu = time.perf_counter(), time.process_time()
            if events:
                events[0].record()
            answer = call(*args, **kwargs)
            if events:
                events[1].record()
                self.events.append((name, *events))
            if memory:
                self.wait()
            self.note(name, time.perf_counter() - wall, time.process_time() - cpu, memory)
            return answer

        timed.default = timed  # type: ignore[attr-defined] # in place of an op: the overload that is called
        return timed

    def note(self, name: str, seconds: float, cpu_seconds: float, memory: bool) -> None:
        part = self.found.setdefault(name, {"calls": 0, "seconds": 0.0, "cpu_seconds": 0.0})
        part["calls"] += 1
        part["seconds"] += seconds
        part["cpu_seconds"] += cpu_seconds
        if memory:
            highest = peak_mib(self.on_cuda)
            part["peak_mib"] = max(part.get("peak_mib", 0), highest)
            self.peak = max(self.peak, highest)

    def wait(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def parts(self) -> dict[str, dict[str, Any]]:
        for part in self.found.values():
            part["time"] = 0.0 if self.on_cuda else part["cpu_seconds"]
        for name, start, end in self.events:
            self.found[name]["time"] += start.elapsed_time(end) / 1000
        return self.found

    def installed(self, pipeline: RefSRPipeline, crowd: Index) -> "Installed":
        return Installed(self, pipeline, crowd)


class Installed:
    """Within, the stages of the pipeline, the ops and the search of the gallery are timed."""

    def __init__(self, meter: Meter, pipeline: RefSRPipeline, crowd: Index) -> None:
        stage, ops = pipeline.diffusion, torch.ops.ragsr
        self.places: list[tuple[Any, str, str, bool]] = [
            *((pipeline, name, name, True) for name in ("retrieve", "prepare", "restore")),
            *((stage, name, part, True) for name, part in (("encode",) * 2, ("denoise", "steps"), ("decode",) * 2)),
            (SPADE, "modulation", MAPS, False),
            *((ops, op, name, False) for op, name in OPS.items()),
        ]
        self.meter, self.crowd = meter, crowd

    def __enter__(self) -> None:
        self.before = [(owner, name, owner.__dict__.get(name)) for owner, name, *_ in self.places]
        for owner, name, part, memory in self.places:
            setattr(owner, name, self.meter.around(part, getattr(owner, name), memory))
        self.before.append((Loaded, "search", Loaded.search))
        small, large = Loaded.search, self.crowd.search

        def search(loaded: Loaded, codes: np.ndarray, k: int) -> Any:
            large(codes, k)  # the work of a large gallery; the answer is the small one's
            return small(loaded, codes, k)

        Loaded.search = self.meter.around(HAMMING, search)  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        for owner, name, before in self.before:
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


def reset_peak(on_cuda: bool = False) -> None:
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # then a stage's peak is that of all before it too
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(on_cuda: bool = False) -> int:
    """The most memory since `reset_peak`: of tensors on CUDA, of the process on the CPU."""
    if on_cuda:
        return int(torch.cuda.max_memory_allocated() >> 20)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return int(status.split("VmHWM:")[1].split()[0]) >> 10


# ------------------------------------------------------------------ what is run


def gallery_at(folder: Path) -> Gallery:
    """The demo's photos, the true reference of the photo at a usual size among them."""
    (folder / "photos").mkdir()
    for name in (TRUE_REFERENCE, *OTHERS):
        load_image(photo_folder() / name).resize(REFERENCE_SIZE, 3).save(folder / "photos" / name)
    gallery = Gallery.create(folder / "gallery")
    gallery.add([folder / "photos"], progress=False)
    return gallery


def random_codes(bits: int, count: int) -> Index:
    index = Index(bits)
    index.add(np.random.default_rng(0).integers(0, 256, (count, bits // 8), np.uint8))
    return index


def pipeline_of(
    model: Path | None, full_size: bool, steps: int, dtype: torch.dtype, device: torch.device
) -> RefSRPipeline:
    if full_size:
        stage, reference = full_stage(dtype), TTSR(randomised(TTSRNet, torch.float32))
    elif model is not None:
        stage, reference = load_diffusion(model, device), load_model(reference_stage(model))
    else:
        from ragsr.training.sizes import make_stage

        stage, reference = make_stage("small"), load_model()
        nn.init.normal_(stage.unet.conv_out.weight, std=0.02)  # it is made of zeros
    if dtype != torch.float32:
        stage.to(dtype)
    stage.set_progress_bar_config(disable=True)
    return RefSRPipeline(reference, device, diffusion=stage.to(device), steps=steps)


def full_stage(dtype: torch.dtype) -> DiffusionStage:
    """iRAG at its published size: Stable Diffusion 2.1 with SFT layers, CFW autoencoder and text encoder."""
    from diffusers import DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    from ragsr.models.sft_unet import SFTUNet
    from ragsr.models.structure import StructureEncoder
    from ragsr.models.wrapping import WrappingAutoencoder
    from ragsr.pipelines.irag_checkpoint import SCHEDULE

    text = CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16)
    return DiffusionStage(
        vae=randomised(lambda: WrappingAutoencoder(scaling_factor=0.18215), dtype),
        unet=randomised(SFTUNet, dtype),
        structure=randomised(StructureEncoder, dtype),
        scheduler=DDIMScheduler(**SCHEDULE),
        text_encoder=randomised(lambda: CLIPTextModel(text), dtype),
        tokenizer=Tokenizer(),
    )


class Tokenizer:
    """Any 77 tokens: what they are does not matter to the cost."""

    def __call__(self, prompts: list[str], **_: Any) -> Any:
        return type("Tokens", (), {"input_ids": torch.full((len(prompts), 77), 320)})


def randomised(make: Callable[[], Any], dtype: torch.dtype) -> Any:
    """A network that keeps the size of what goes through it, made without ever being there in float32 as well."""
    torch.manual_seed(0)
    with torch.device("meta"):
        net = make()
    counting = {name: tensor for name, tensor in net.named_buffers() if not tensor.is_floating_point()}
    net = net.to(dtype).to_empty(device="cpu").eval()
    for name, buffer in net.named_buffers():
        if name in counting:
            buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))  # the positions of the tokens
    for parameter in net.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.zeros_(parameter)
    for module in net.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
    return net.requires_grad_(False)
