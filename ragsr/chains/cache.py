"""What source chains left, kept for tiles, images and runs to come.

A source chain never looks at a target, so its record of a step serves every target that shares the reference, the
prompt, the seed, the plan and the model: these make up the key. Records are kept in the first place with room:

    device ──▶ host memory ──▶ disk          each with its own budget in bytes

A run asks for its steps in order, and the next run in the same order again. Dropping what was used least recently would
drop each record just before it is asked for; so a chain never pushes out its own records, and among other chains the
one that was used least recently goes first, whole. What found no room is computed again when it is needed, from what
the network saw at that step; that is a single latent, and always kept, as is the latent that a reference is encoded to.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ragsr.chains.state import Record
from ragsr.errors import InputError
from ragsr.files import replacing

GB = 1 << 30
REMEMBERED = 128  # chains and encoded references whose latents are kept


class ReferenceCache:
    """Records of source chains by key and step, in at most `device_bytes`, `host_bytes` and `disk_bytes`.

    The default keeps 4 GB in host memory. Disk is used where a `folder` is given; what an earlier process left there is
    found again. Not safe for several threads.
    """

    def __init__(
        self,
        device_bytes: int = 0,
        host_bytes: int = 4 * GB,
        folder: str | Path | None = None,
        disk_bytes: int = 16 * GB,
    ) -> None:
        if min(device_bytes, host_bytes, disk_bytes) < 0:
            raise InputError("a budget of the reference cache is negative; 0 bytes switches a place off")
        self.places: list[Memory | Disk] = [Memory(device_bytes, None), Memory(host_bytes, "cpu")]
        if folder is not None:
            self.places.append(Disk(disk_bytes, Path(folder)))
        self.hits = self.misses = 0
        self._latents: OrderedDict[str, dict[int, Tensor]] = OrderedDict()

    def get(self, key: str, step: int, device: torch.device) -> Record | None:
        for place in self.places:
            record = place.get(key, step)
            if record is not None:
                self.hits += 1
                return record.to(device)
        self.misses += 1
        return None

    def put(self, key: str, step: int, *records: Record) -> None:
        """Keep the records of this step and those after it, all in the first place with room; nowhere if none has.

        They were made in one pass and may share their memory, so one of them alone would not take less.
        """
        for place in self.places:
            if place.make_room(key, sum(record.nbytes for record in records)):
                for i, record in enumerate(records, step):
                    place.put(key, i, record)
                return

    def latent(self, key: str, step: int = 0) -> Tensor | None:
        """What the network saw in this step of a chain, or an encoded reference."""
        return self._latents.get(key, {}).get(step)

    def keep_latent(self, key: str, latent: Tensor, step: int = 0) -> None:
        self._latents.setdefault(key, {})[step] = latent.to("cpu", non_blocking=True)
        self._latents.move_to_end(key)
        if len(self._latents) > REMEMBERED:
            self._latents.popitem(last=False)

    def clear(self) -> None:
        for place in self.places:
            place.clear()
        self._latents.clear()

    def __repr__(self) -> str:
        sizes = ", ".join(f"{type(p).__name__} {p.used / GB:.2f} of {p.budget / GB:.2f} GB" for p in self.places)
        return f"ReferenceCache({sizes}; {self.hits} hits, {self.misses} misses)"


class Chains(ABC):
    """Sizes of what lies in one place, by chain, the least recently used first."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.sizes: OrderedDict[str, dict[int, int]] = OrderedDict()

    @property
    def used(self) -> int:
        return sum(sum(steps.values()) for steps in self.sizes.values())

    def add(self, key: str, step: int, nbytes: int) -> None:
        self.sizes.setdefault(key, {})[step] = nbytes
        self.sizes.move_to_end(key)

    def holds(self, key: str, step: int) -> bool:
        if step not in self.sizes.get(key, {}):
            return False
        self.sizes.move_to_end(key)
        return True

    def make_room(self, key: str, nbytes: int) -> bool:
        """Drop other chains until so many bytes fit; False if they never will."""
        own = sum(self.sizes.get(key, {}).values())
        if own + nbytes > self.budget:
            return False
        while self.used + nbytes > self.budget:
            self.drop(next(other for other in self.sizes if other != key))
        return True

    def drop(self, key: str) -> None:
        for step in list(self.sizes.pop(key)):
            self.remove(key, step)

    def clear(self) -> None:
        for key in list(self.sizes):
            self.drop(key)

    @abstractmethod
    def remove(self, key: str, step: int) -> None:
        """Give back what one step takes."""


class Memory(Chains):
    def __init__(self, budget: int, device: str | None) -> None:
        super().__init__(budget)
        self.device = device  # None leaves a record where it was made
        self.records: dict[tuple[str, int], Record] = {}

    def get(self, key: str, step: int) -> Record | None:
        return self.records[key, step] if self.holds(key, step) else None

    def put(self, key: str, step: int, record: Record) -> None:
        self.records[key, step] = record if self.device is None else record.to(self.device)
        self.add(key, step, record.nbytes)

    def remove(self, key: str, step: int) -> None:
        del self.records[key, step]


class Disk(Chains):
    def __init__(self, budget: int, folder: Path) -> None:
        super().__init__(budget)
        self.folder = folder
        for path in sorted(folder.glob("*-*.safetensors"), key=lambda p: p.stat().st_mtime):
            key, _, step = path.stem.rpartition("-")
            if step.isdecimal():
                self.add(key, int(step), path.stat().st_size)

    def get(self, key: str, step: int) -> Record | None:
        if not self.holds(key, step):
            return None
        try:
            return Record.from_flat(load_file(self._path(key, step)))
        except (OSError, SafetensorError):  # removed or damaged since: it is computed again
            del self.sizes[key][step]
            return None

    def put(self, key: str, step: int, record: Record) -> None:
        with replacing(self._path(key, step)) as path:
            save_file({name: x.contiguous() for name, x in record.flat().items()}, path)
        self.add(key, step, record.nbytes)

    def remove(self, key: str, step: int) -> None:
        self._path(key, step).unlink(missing_ok=True)

    def _path(self, key: str, step: int) -> Path:
        return self.folder / f"{key}-{step:04}.safetensors"
