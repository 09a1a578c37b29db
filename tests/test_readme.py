"""What the README shows runs."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if README.is_file() else []


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(BLOCKS[number], f"README.md, block {number}", "exec"), names)
    if "restored" in names:
        assert "motorcycle_right.png" in capsys.readouterr().out
        assert (tmp_path / "big.png").is_file()


def test_there_are_blocks_and_their_files_exist():
    assert len(BLOCKS) == 2
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).is_file(), target
