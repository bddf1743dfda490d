"""The convolution's launcher and the GPU's table, on a CPU that passes for a GPU: the tile that is launched."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from fastddpm_kernels import conv, conv_choice
from fastddpm_kernels.conv_choice import ALLOWED, ConvShape, Gpu, division, step, takes
from fastddpm_kernels.conv_norm import NormOut, conv_scratch
from fastddpm_kernels.conv_tiles import Tile
from test_conv import Case

SHAPES = {
    "plain": ConvShape("float16", 8, 16, 16, 0, 32),
    "1x1, residual": ConvShape("float16", 8, 16, 16, 0, 32, kernel=1, residual=True),
    "stride 2": ConvShape("float16", 8, 16, 16, 0, 32, stride=2, padding=0),
    "up, two sources, row": ConvShape("float16", 8, 16, 16, 8, 32, up=True, row=True),
    "segments, shortcut": ConvShape("float16", 4, 4, 16, 0, 32, s0=16, s1=8),
}


def case_of(shape: ConvShape) -> Case:
    """A convolution of this shape, of two images."""
    side = 2 if shape.stride == 2 else 1
    height, width = (n * side // (1 + shape.up) for n in (shape.height, shape.width))
    return Case(
        (2, height, width), [c for c in (shape.c0, shape.c1) if c], shape.cout, dtype=torch.float16,
        kernel=shape.kernel, stride=shape.stride, padding=shape.padding, up=shape.up, row=shape.row,
        residual=shape.residual, shortcut=[c for c in (shape.s0, shape.s1) if c],
    )  # fmt: skip


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int, bool]]:
    """(m, n, stages, split) of each launch."""
    kernel, seen = conv.conv_kernel, []

    class Recorder:
        def __getitem__(self, grid):
            def launch(*given, **named):
                seen.append((named["BLOCK_M"], named["BLOCK_N"], named["num_stages"], named["SPLIT"]))
                kernel[grid](*given, **named)

            return launch

    monkeypatch.setattr(conv, "conv_kernel", Recorder())
    return seen


def forget() -> None:
    """What is cached of tables."""
    for cached in (conv_choice.division, conv_choice._found, conv_choice._table):
        cached.cache_clear()


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes one for a GPU that is faked."""
    forget()
    monkeypatch.setattr(conv_choice, "FOLDER", tmp_path)
    monkeypatch.setattr(conv, "gpu_of", lambda device: Gpu("Fake GPU", 232448, True))

    def write(shapes):
        entries = {
            shape.key: {"own": True, "batches": {"1": {"tile": tile, "split": split}}}
            for shape, (tile, split) in shapes.items()
        }
        made = {"format": conv_choice.FORMAT, "gpu": "Fake GPU", "shapes": entries}
        (tmp_path / "fake-gpu.json").write_text(json.dumps(made))
        forget()

    yield write
    forget()


@pytest.mark.parametrize("name", SHAPES)
def test_the_tables_tile_is_launched_to_the_same_bits(name, launched, table):
    shape = SHAPES[name]
    case = case_of(shape)
    ruled = case.launch()
    table({shape: ([64, 16, 4, 5, None], False)})
    assert torch.equal(case.launch(), ruled)
    assert launched[0] != launched[1]
    assert launched[1] == (64, 16, 5, False)
    case.launch(tile=conv_choice.rule(Gpu("", 232448, True), shape, 2, conv_choice.segments(shape)))
    assert launched[2] == launched[0]  # what is given goes first


def test_a_shape_that_the_table_lacks_has_the_rules_tile(launched, table):
    case = case_of(SHAPES["plain"])
    case.launch()
    table({SHAPES["1x1, residual"]: ([64, 16, 4, 5, None], None)})
    case.launch()
    assert launched[0] == launched[1]


def test_the_tables_split_is_none_where_the_rules_is_kept(launched, table):
    shape = SHAPES["segments, shortcut"]._replace(c0=128)
    case = case_of(shape)
    table({shape: ([64, 16, 4, 5, None], None)})
    case.launch()
    table({shape: (None, False)})
    case.launch()
    assert [split for *_, split in launched] == [True, False]
    case.launch(split=True)
    assert launched[2][3]


def test_the_table_is_read_once(table, monkeypatch):
    shape = SHAPES["plain"]
    table({shape: ([64, 16, 4, 5, None], None)})
    first = division(Gpu("Fake GPU", 232448, True), shape, 2)
    monkeypatch.setattr(conv_choice, "read", None)
    monkeypatch.setattr(conv_choice, "choice", None)
    assert division(Gpu("Fake GPU", 232448, True), shape, 2) is first
    assert first.tile.n == 16


def test_without_a_gpu_no_table_is_looked_for(monkeypatch):
    monkeypatch.setattr(conv_choice, "choice", None)
    forget()
    made = division(conv_choice.gpu_of(torch.device("cpu")), SHAPES["plain"], 2)
    assert made.tile == conv_choice.rule(Gpu("", 232448, True), SHAPES["plain"], 2, 1)


@pytest.mark.parametrize("batch", [1, 3, 70])
@pytest.mark.parametrize("cout", [8, 16, 64, 200, 256])
@pytest.mark.parametrize("side, up", [(1, False), (4, False), (8, False), (16, False), (4, True), (16, True)])
def test_the_memory_of_every_tile_that_is_taken(side, up, cout, batch, monkeypatch):
    """`conv_scratch` is as much as the launcher allocates for it, by the rule or a table, with norms or without."""
    taken, names = {}, conv.conv_kernel.arg_names

    class Recorder:
        def __getitem__(self, grid):
            return lambda *given, **named: taken.update(zip(names, given, strict=False))

    monkeypatch.setattr(conv, "conv_kernel", Recorder())
    before = side // 2 if up else side
    x, out = (torch.empty(batch, n, n, c, dtype=torch.float16) for n, c in ((before, 512), (side, cout)))
    weight = torch.empty((4, 2048, cout) if up else (4608, cout), dtype=torch.float16)
    affine = torch.empty(cout)
    for groups in ((), (4,), (2, 8)):
        shape = ConvShape("float16", side, side, 512, 0, cout, up=up, norms=groups)
        sizes = itertools.product(ALLOWED["m"], ALLOWED["n"])
        tiles = [None, *(tile for m, n in sizes if takes(shape, tile := Tile(m, n, step(shape), 4, 3)))]
        scratch = conv_scratch(batch, side * side, cout, groups, up=up)
        for tile in tiles:
            norms = [NormOut(out, affine, affine, group, 0.0) for group in groups]
            conv.launch_conv(x, weight, affine, out, norms=norms, tile=tile)
            needed = {name: taken[f"{name}_ptr"] for name in ("scratch", "counter")}
            for name, most in (("scratch", scratch.floats), ("counter", scratch.counters)):
                assert needed[name] is out or needed[name].numel() <= most, (name, groups, tile)
