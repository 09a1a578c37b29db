"""Writes the fixture of the present format version, once. Files of older versions are kept as they are, for ever.

PYTHONPATH=tests python tests/index/make_fixtures.py
"""

from pathlib import Path

from index.counting import Counted, random_codes

from ragsr.search import FlatIndex

FIXTURES = Path(__file__).parent / "fixtures"
VERSION = 1
WIDTHS = (1, 8, 125)


def commits(width: int) -> list[tuple]:
    """What the fixture of this width holds: (codes added, ids removed) of each commit."""
    return [
        (random_codes(40, width, seed=1), [0, 39]),
        (random_codes(0, width), [7]),
        (random_codes(9, width, seed=2), [8, 45]),
    ]


def expected(width: int) -> Counted:
    model = Counted(width)
    for codes, ids in commits(width):
        model.add(codes)
        model.remove(ids)
    return model


def write(path: Path, width: int) -> None:
    FlatIndex(width).save(path)
    index = FlatIndex.open(path)
    for codes, ids in commits(width):
        index.add(codes)
        index.remove(ids)
        index.commit()
    index.close()


if __name__ == "__main__":
    FIXTURES.mkdir(exist_ok=True)
    for width in WIDTHS:
        path = FIXTURES / f"version-{VERSION}-width-{width}.index"
        if path.exists():
            print(f"{path.name} is there and stays")
        else:
            write(path, width)
            print(f"{path.name}: {path.stat().st_size} bytes")
