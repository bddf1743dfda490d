"""The registrations: what `torch.library.opcheck` asks, and that a compiled step is one graph."""

from pathlib import Path

import fastddpm_kernels as kernels
import pytest
import torch
from fastddpm_kernels import registration
from helpers import random_table

SEEDS = torch.tensor([5, 6, -1])
CURSOR = torch.tensor([0, 3, 2], dtype=torch.int32)
TABLE = random_table(5).float().cpu()
SHAPE = (3, 3, 5, 7)


def randn(dtype=torch.float32, *, grad=False):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_(grad)


def calls():
    t, pairs, flags = torch.tensor([1, 2, 0]), torch.rand(5, 2), torch.zeros(3, dtype=torch.int32)
    bf16 = torch.bfloat16
    yield "normal", (SEEDS, [3, 4], 0, 1)
    yield "add_noise", (randn(grad=True), randn(grad=True), t, pairs)
    yield "q_sample", (randn(grad=True), t, pairs, SEEDS, 1, 2)
    yield "q_sample", (randn(bf16), t, pairs, SEEDS, 1, 2)
    yield "noised", (randn(grad=True), t, pairs, SEEDS, 1, 2)
    last = randn(bf16).to(memory_format=torch.channels_last)
    yield "noise_mse", (randn(grad=True), SEEDS, None, None, None, 1, 2)
    yield "noise_mse", (last.requires_grad_(), SEEDS, randn(), t, pairs, 1, 2)
    yield "noise_mse_backward", (pairs[:3, 0], last.detach(), SEEDS, randn(), t, pairs, 1, 2)
    none, plain = (None,) * 5, (True, False, True, False, True)
    weights, two = (torch.rand(3), torch.rand(3)), torch.cat([torch.cat([randn(bf16)] * 2, dim=1)] * 2)
    everything = (*weights, randn(), randn() > 0, randn(), True, True, True, True, True)
    yield "reverse_step", (randn(), randn(bf16), TABLE, CURSOR, SEEDS, randn(), randn(), randn(), *none, *plain)
    yield "reverse_step", (randn(), randn(), TABLE, CURSOR, SEEDS, None, None, None, *none, *[False] * 5)
    yield "reverse_step", (randn(), two, TABLE, CURSOR, SEEDS, None, None, None, *everything)
    buffers = (randn(), randn(), randn(), randn(bf16), randn())
    yield "reverse_step_", (randn(), randn(bf16), TABLE, CURSOR, SEEDS, *buffers, flags, *none, *plain, True)
    yield "reverse_step_", (randn(), randn(), TABLE, CURSOR, SEEDS, *none, flags, *none, *plain, False)
    buffers = (randn(), randn(), randn(), torch.cat([randn(bf16)] * 2), randn())
    yield "reverse_step_", (randn(), two, TABLE, CURSOR, SEEDS, *buffers, flags, *everything, True)
    yield "advance_", (CURSOR.clone(), t, TABLE)


@pytest.mark.parametrize("name, arguments", list(calls()), ids=lambda v: v if isinstance(v, str) else "")
def test_opcheck(name, arguments):
    assert kernels.normal is not None  # the ops are registered when a name is first used
    torch.library.opcheck(getattr(torch.ops.fastddpm, name).default, arguments)


def test_a_step_compiles_into_one_graph():
    def step(x, m, cursor):
        x, x0, bad = kernels.reverse_step(x, m, TABLE, cursor, SEEDS)
        return x + 1, x0, bad

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for cursor in (CURSOR, CURSOR * 0):
        for made, expected in zip(compiled(randn(), randn(), cursor), step(randn(), randn(), cursor), strict=True):
            assert torch.equal(made, expected)


def test_no_submodule_has_the_name_of_an_op():
    """Importing one would put the module in the place of the function."""
    files = {path.stem for path in Path(kernels.__file__).parent.glob("*.py")}
    assert len(files) > 5
    assert not files & set(kernels.__all__)


def test_a_name_that_does_not_exist():
    with pytest.raises(AttributeError, match="nonsense"):
        kernels.nonsense  # noqa: B018
    assert set(kernels.__all__) <= set(dir(kernels))


@pytest.mark.parametrize(("missing", "raised"), [("triton", RuntimeError), ("another", ModuleNotFoundError)])
def test_without_triton_the_gpus_kernels_say_so(missing, raised):
    def launch(x):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    with pytest.raises(raised, match="pip install triton" if missing == "triton" else "another"):
        registration.on_its_device(launch)(torch.zeros(2))
