"""Addresses behind 2^31 elements, without the memory: it is reserved, not used, and one program is interpreted."""

import mmap
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from fastddpm_kernels import columns as col
from fastddpm_kernels import guidance_rescale, noise_mse_kernel, philox, q_sample_kernel, reverse_step_kernel, threshold
from helpers import DEVICE, random_table
from test_survivors import died
from torch import Tensor
from triton.runtime import interpreter

SHAPE = (4, 16, 16)
FAR = 2**21 + 5  # the sample that is looked at: 2^31 elements and more lie before it
pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="one program alone is run by the interpreter")


def reserved(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
    """Zeros of which nothing is in memory but what is written."""
    if last:
        b, c, h, w = shape
        return reserved(b, h, w, c, dtype=dtype).permute(0, 3, 1, 2)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE on Linux, which Python 3.11 has no name for
    count = int(np.prod(shape, dtype=np.int64))
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype=dtype).view(shape)


def interpret_one_program(sample: int, block: int, samples: int) -> None:
    """Of each launch; the memory is the CPU's, so that nothing is copied back. For a fork: it is not undone."""
    torch.zeros = lambda *shape, **options: reserved(*shape, dtype=options["dtype"])  # the threshold's counts
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor

    def scalar(value: int) -> Any:
        return interpreter.TensorHandle(np.array([value], dtype=np.int32), tl.int32)

    builder.create_get_program_id = lambda axis: scalar((sample, block)[axis])
    builder.create_get_num_programs = lambda axis: scalar((samples, 1)[axis])
    original = getattr(executor, "original_call", executor.__call__)

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        self.grid = (1,)
        original(self, *args, **kwargs)

    executor.original_call, executor.__call__, executor._restore_args_dev = original, call, lambda *_: None


def launch_all(sample: int, samples: int, last: bool, guided: bool) -> dict[str, Tensor]:
    """What each kernel writes of one sample among so many, which is the only one whose memory is used."""
    generator = torch.Generator().manual_seed(0)
    twice, channels = (2, 8) if guided else (1, 4)

    def filled(*shape: int, dtype: torch.dtype = torch.float32, times: int = 1, last: bool = False) -> Tensor:
        made = reserved(times * samples, *shape, dtype=dtype, last=last)
        for half in range(times):
            made[half * samples + sample] = torch.rand(shape, generator=generator).mul(5).to(dtype)
        return made

    table = random_table(6).float()
    table[:, col.CLIP], table[:, col.ADVANCE] = 9.0, 1
    interpret_one_program(sample, 0, samples)
    seeds, t, cursor, flags = (filled(dtype=d) for d in (torch.int64, torch.int64, torch.int32, torch.int32))
    flags.zero_()
    x, out, x0, h1, h2, h3, known, normals, noise, noised, again = (filled(*SHAPE) for _ in range(11))
    mask = filled(*SHAPE, dtype=torch.uint8).view(torch.bool)
    weights = {name: filled() for name in ("guidance", "rescale")} if guided else {}
    m = filled(channels, 16, 16, times=twice, last=last)
    model_input, gradient = filled(*SHAPE, times=twice, last=last), filled(*SHAPE, last=last)
    bounds, factor, parts = [filled(2), filled(2)], filled(), filled(1)

    philox.launch_normal(normals, seeds, step=1, stream=0, block=64)
    pairs = torch.rand(6, 2, generator=generator)
    q_sample_kernel.launch_q_sample(x, noise, noised, t, pairs, seeds, block=64)
    q_sample_kernel.launch_q_sample(x, noise, again, t, pairs, block=64)
    noise_mse_kernel.launch_noise_mse(gradient, seeds, x, t, pairs, out=parts, block=64)
    noise_mse_kernel.launch_noise_mse(gradient, seeds, x, t, pairs, grad=filled(), out=gradient, block=64)
    if guided:
        guidance_rescale.launch_rescale_factor(m, **weights, factor=factor, learned=True)
    for i, (block, ratio) in enumerate(((None, 0.9), (64, 0.2))):  # 0.2 of all is within what one program counts
        table[:, col.RATIO] = ratio
        threshold.launch_threshold(x, m, table, cursor, bounds[i], **weights, learned=guided, block=block)
    m[sample - samples, 0, 0, 0] = torch.inf  # for the flag
    buffers = dict(out=out, model_input=model_input, x0=x0, h1=h1, h2=h2, h3=h3, known=known, mask=mask)
    buffers |= dict(bound=bounds[0])
    options = dict(limited=True, noise=True, learned=guided, block=64)
    reverse_step_kernel.launch_reverse_step(x, m, table, cursor, seeds, flags, **buffers, **weights, **options)
    written = dict(normals=normals, noise=noise, noised=noised, again=again, gradient=gradient, parts=parts, out=out)
    written |= dict(x0=x0, h1=h1, h2=h2, h3=h3, input=model_input, bound=bounds[0], other=bounds[1], flags=flags)
    written |= {"factor": factor, "second input": model_input[-samples:]}
    return {name: buffer[sample] for name, buffer in written.items()}


def far_and_near(last: bool, guided: bool) -> None:
    far, near = (launch_all(*where, last, guided) for where in ((FAR, FAR + 3), (0, 1)))
    for name in far:
        assert torch.equal(far[name], near[name]), name
        assert far[name].count_nonzero(), name


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_a_sample_behind_2_31_elements(last, guided):
    """It is what it would be alone."""
    assert died(lambda: far_and_near(last, guided)) == 0


def large_and_small() -> None:
    made, block = [], 2**14
    for size in (3 * 2**30, 4 * 6 * block):
        interpret_one_program(0, 5, 1)
        out = reserved(1, size)
        philox.launch_normal(out, torch.tensor([7]), step=1, stream=0, block=block)
        made.append(out.view(4, size // 4)[:, 5 * block : 6 * block])
    assert torch.equal(*made)
    assert made[0].count_nonzero() == 4 * block


def test_a_sample_of_more_than_2_31_elements():
    """A normal depends on the lane and on which of its four it is, not on how many lanes there are."""
    assert died(large_and_small) == 0
