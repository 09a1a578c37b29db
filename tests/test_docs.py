"""The code that docs/attention.md shows runs, one block after the other, and does what the page says."""

import re
from pathlib import Path

import torch

from ragsr.ops import cosine_gate

PAGE = Path(__file__).parents[1] / "docs" / "attention.md"


def test_attention_page():
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 2
    names: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)
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
