"""Restoration models that references can be injected into: one file each.

What a host offers is written in `ragsr/chains/host.py`. `load_host` reads a model from disk or hub, `host_of` takes a
diffusers pipeline.
"""

from ragsr.hosts.loading import host_of, load_host
from ragsr.hosts.sdxl import SDXLHost
from ragsr.hosts.seesr import SeeSRHost, SeeSRPrompt, Tags
from ragsr.hosts.stable_diffusion import StableDiffusionHost, UpscalerHost

__all__ = [
    "SDXLHost",
    "SeeSRHost",
    "SeeSRPrompt",
    "StableDiffusionHost",
    "Tags",
    "UpscalerHost",
    "host_of",
    "load_host",
]
