"""The code that the pages show runs, one block after the other, and does what the pages say."""

import re
from pathlib import Path
from typing import Any

import torch

from ragsr.ops import cosine_gate

DOCS = Path(__file__).parents[1] / "docs"


def names_of(page: str, count: int) -> dict[str, Any]:
    """What is there after the page's code has run."""
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)
    assert len(blocks) == count
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    return names


def test_attention_page():
    names = names_of("attention.md", 2)
    layer, cache, tiles, reference = (names[x] for x in ("layer", "cache", "tiles", "reference"))
    with torch.no_grad():
        plain, off = layer(tiles), layer(tiles, cache, strength=0.0)
        torch.testing.assert_close(layer(tiles, layer.remember(reference)), names["restored"])  # the cache holds all
        shared = cosine_gate(tiles, cache[2].expand(6, -1, -1))
        torch.testing.assert_close(cosine_gate(tiles, reference.expand(6, -1, -1)), shared, rtol=0, atol=1e-4)
    assert torch.equal(plain, off)
    assert not torch.allclose(plain, names["restored"], atol=1e-3)
    assert names["another"].shape == (1, 200, 64)
    h = tiles.clone().requires_grad_()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(h, cache).sum().backward()
    assert h.grad.isfinite().all()


def test_refir_page(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = names_of("refir.md", 6)
    picture, again, plain, quick = names["picture"], names["again"], names["plain"], names["quick"].images[0]
    assert picture.size == (64, 64)
    assert picture.tobytes() == again.tobytes()
    without = names["pipe"](names["low"], generator=0, **names["told"]).images[0]
    assert plain.tobytes() == without.tobytes() != picture.tobytes() != quick.tobytes()
    assert names["share"].shape == (64, 64)
    assert 0 <= names["share"].min() < names["share"].max() <= 0.5
    assert names["drawn"].shape == (30, 40)
    torch.testing.assert_close(names["drawn"].sum(), torch.tensor(1.0))
    assert [gate.shape for gate in names["stages"].values()] == [(1, 32, 32)]
    assert names["sheet"].width > 640
    assert names["shares"] == [0.25, 0.25]
    boxes, weights = zip(*names["used"], strict=True)
    assert (boxes[0], boxes[-1]) == ((0, 0, 34, 34), (30, 30, 64, 64))
    assert {len(each) for each in weights} == {1}
    assert 0 < max(each[0] for each in weights) <= 0.5
    names["gallery"].close()
    assert names["fallback"].generates
