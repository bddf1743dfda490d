"""The README's Python runs, and what it points to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_the_ten_lines_run():
    code = re.search(r"```python\n(.*?)```", TEXT, re.S).group(1)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    images = names["images"]
    assert images.shape == (4, 1, 32, 32)
    assert images.abs().max() <= 1.01
    assert images.flatten(1).std(dim=1).min() > 0.2  # pictures, not a flat grey
    assert (images - names["x"]).abs().max() == 0  # the trace ends in the same samples


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\]\(((?!http)[^)]+)\)", TEXT))))
def test_links(name):
    assert (ROOT / name).is_file()


def test_nothing_is_left_to_fill_in():
    assert "@@" not in TEXT
    assert "TODO" not in TEXT
