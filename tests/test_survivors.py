"""What the mutation test (`mutate_kernels.py`) showed that no other test sees."""

import ctypes
import faulthandler
import math
import mmap
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastddpm_kernels import guidance_rescale, noise_mse_kernel, philox, q_sample_kernel, reverse_step_kernel, threshold
from fastddpm_kernels.columns import COLUMNS
from fastddpm_kernels.lanes import division, grid, memory_order
from helpers import DEVICE, random_table
from torch import Tensor

BATCH = 3


def walled(values: Tensor) -> Tensor:
    """A copy of `values` that ends where a page of memory begins that can't be read or written."""
    flat = values.permute(0, 2, 3, 1) if values.ndim == 4 and not values.is_contiguous() else values
    size = flat.numel() * flat.element_size()
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    page = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + room
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.frombuffer(memory, dtype=torch.uint8, offset=room - size, count=size).view(flat.dtype)
    copy = copy.view(flat.shape).copy_(flat)
    return copy.permute(0, 3, 1, 2) if flat is not values else copy


def died(work: Callable[[], object]) -> int:
    """What ended a fork of this process that did `work`: 0, 1 after an exception, or minus a signal."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        torch.set_num_threads(1)  # the parent's other threads are not in the fork, and would be waited for
        signal.alarm(60)
        code = 1
        try:
            work()
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def randn(*shape: int, last: bool = False) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return walled(made.contiguous(memory_format=torch.channels_last) if last else made)


def vector(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return walled(torch.tensor(values, dtype=dtype))


SHAPE = (3, 5, 7)


def step(last: bool = False, everything: bool = True) -> None:
    table = random_table(6).float()
    table[:, COLUMNS.index("ratio")] = 0.9
    x = randn(BATCH, *SHAPE)
    samples, channels = (2 * BATCH, 6) if everything else (BATCH, 3)
    m, seeds = randn(samples, channels, 5, 7, last=last), vector(1, 2, 3, dtype=torch.int64)
    cursor, flags = (vector(0, 3, 4, dtype=torch.int32) for _ in range(2))
    names = ("out", "x0", "h1", "h2", "h3", "known") if everything else ("out", "h1", "h2", "h3", "known")
    buffers: dict[str, Any] = {name: randn(BATCH, *SHAPE) for name in names}
    buffers |= {"mask": walled(torch.ones(BATCH, *SHAPE, dtype=torch.bool))}
    buffers |= {"model_input": randn(samples, *SHAPE, last=last)}
    if everything:
        buffers |= {name: vector(1, 2, 3) for name in ("guidance", "rescale")} | {"bound": randn(BATCH, 2)}
    buffers |= {"z": randn(BATCH, *SHAPE), "next_cursor": vector(0, 0, 0, dtype=torch.int32)}
    buffers |= {"t": vector(*samples * [0], dtype=torch.int64)}
    options = dict(limited=True, noise=True, learned=everything, block=64)
    reverse_step_kernel.launch_reverse_step(x, m, walled(table), cursor, seeds, flags, **buffers, **options)


def whole_samples(last: bool = False, everything: bool = True) -> None:
    """The kernels that look at a whole sample before the step."""
    table = random_table(6).float()
    table[:, COLUMNS.index("ratio")] = torch.tensor([0.9, 0.0, 0.9, 1.0, 0.5, 0.9])
    x, cursor = randn(BATCH, *SHAPE), vector(0, 3, 4, dtype=torch.int32)
    m = randn(2 * BATCH, 6 if everything else 3, 5, 7, last=last)
    weights = {"guidance": vector(1, 2, 3), "rescale": vector(0.5, 0.7, 1.0)}
    for block in (None, 16):
        options = dict(learned=everything, block=block)
        guidance_rescale.launch_rescale_factor(m, **weights, factor=vector(0, 0, 0), **options)
        bound = randn(BATCH, 2)
        threshold.launch_threshold(x, m, walled(table), cursor, bound, **weights, **options)
        threshold.launch_threshold(x, randn(BATCH, *SHAPE, last=last), walled(table), cursor, bound, block=block)


def noise(last: bool = False, everything: bool = True) -> None:
    x0, out, eps = (randn(BATCH, *SHAPE) for _ in range(3))
    t, pairs, seeds = vector(0, 9, 5, dtype=torch.int64), randn(10, 2), vector(1, 2, 3, dtype=torch.int64)
    m, gradient = (randn(BATCH, *SHAPE, last=last) for _ in range(2))
    philox.launch_normal(out, seeds, step=1, stream=0, block=64)
    for given in ((None, seeds), (eps, seeds), (eps, None)):
        q_sample_kernel.launch_q_sample(x0, given[0], out, t, pairs, given[1], block=64)
    mixed = (x0, t, pairs) if everything else ()
    noise_mse_kernel.launch_noise_mse(m, seeds, *mixed, block=64)
    noise_mse_kernel.launch_noise_mse(m, seeds, *mixed, grad=vector(1, 2, 3), out=gradient, block=64)


def advance(last: bool = False, everything: bool = True) -> None:
    table, cursor = walled(random_table(6).float()), vector(0, 3, 5, dtype=torch.int32)
    reverse_step_kernel.launch_advance(cursor, vector(0, 0, 0, dtype=torch.int64), table)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="walls around memory on the CPU; on a GPU compute-sanitizer has them")
@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("work", [step, whole_samples, noise, advance])
def test_nothing_behind_a_tensor_is_read(work, last, everything):
    """Guard cells show what is written and used; this shows what is read for nothing, which may end a process."""
    assert died(lambda: work(last, everything)) == 0


@pytest.mark.skipif(DEVICE.type != "cpu", reason="as above")
def test_the_wall_stands():
    values = vector(1, 2, 3)
    assert died(lambda: ctypes.string_at(values.data_ptr(), 12)) == 0
    assert died(lambda: ctypes.string_at(values.data_ptr(), 13)) == -signal.SIGSEGV


DIVISIONS = (  # n, options, and the division: block, full, vector, warps
    (3 * 32 * 32, {}, (256, True, 4, 1)),
    (3 * 64 * 64, {}, (1024, True, 4, 4)),
    (2 * 32 * 32, {}, (512, True, 4, 2)),
    (28 * 28, {}, (256, False, 4, 1)),
    (1, {}, (256, False, 1, 1)),
    (4 * 272, {}, (512, False, 4, 2)),
    (4 * 528, {}, (512, False, 4, 2)),
    (4 * 273 - 1, {}, (512, False, 1, 2)),
    (2 * 32 * 32, {"block": 64}, (64, True, 4, 1)),
    (2 * 32 * 32, {"block": 1024}, (1024, False, 4, 4)),
    (3 * 64 * 64, {"width": 2}, (1024, True, 8, 4)),
    (3 * 64 * 64, {"plane": 1}, (1024, True, 1, 4)),
    (3 * 64 * 64, {"plane": 2, "tensors": 2}, (1024, True, 1, 4)),
    (3 * 64 * 64, {"plane": 2, "tensors": 3}, (1024, True, 1, 8)),
    (3 * 64 * 64, {"tensors": 4}, (1024, True, 4, 4)),
    (3 * 64 * 64, {"tensors": 5}, (1024, True, 4, 8)),
)


def test_how_samples_are_divided():
    """Accesses of 16 bytes where samples begin at 16 bytes; 32 elements a thread, or 16 where much is read."""
    for n, options, expected in DIVISIONS:
        assert division(n, **options) == expected, (n, options)


def test_the_grid_ends_where_cuda_does():
    assert grid(10**6, 65535 * 64, 64) == (10**6, 65535)
    with pytest.raises(ValueError, match=r"at most 4194240"):
        grid(1, 65535 * 64 + 1, 64)


class Recorder:
    """In the kernels' place: what they are launched with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.options: list[dict[str, Any]] = []
        for module in (guidance_rescale, noise_mse_kernel, philox, q_sample_kernel, reverse_step_kernel, threshold):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, self)

    def __getitem__(self, programs: object) -> Callable[..., None]:
        return lambda *args, **options: self.options.append(options)


def launch(kernel: str, x: Tensor, m: Tensor, block: int | None) -> object:
    table, pairs, seeds = torch.zeros(4, len(COLUMNS)), torch.zeros(4, 2), torch.zeros(4).long()
    cursor, weights = seeds.int(), torch.zeros(2)
    if kernel == "normal":
        return philox.launch_normal(x, seeds, step=0, stream=0, block=block)
    if kernel == "reverse_step":
        flags = dict(limited=True, noise=True)
        return reverse_step_kernel.launch_reverse_step(x, m, table, cursor, seeds, cursor, out=x, block=block, **flags)
    if kernel.startswith("reverse_step with"):
        named = dict(h1=x, h2=x, h3=x, known=x, z=x, guidance=weights, learned=True)
        read = {name: value for name, value in named.items() if name in kernel}
        if "known" in read:
            read["mask"] = x > 0
        m = torch.cat([m, m], dim=1) if "learned" in read else m
        m = torch.cat([m, m]) if "guidance" in read else m
        return reverse_step_kernel.launch_reverse_step(
            x, m, table, cursor, seeds, cursor, out=x, block=block, **dict(limited=True, noise=True, **read)
        )
    if kernel == "q_sample":
        return q_sample_kernel.launch_q_sample(m, m, m, seeds, pairs, seeds, block=block)
    if kernel == "noise_mse":
        return noise_mse_kernel.launch_noise_mse(m, seeds, block=block)
    if kernel == "noise_mse backward":
        return noise_mse_kernel.launch_noise_mse(m, seeds, grad=weights, out=m, block=block)
    if kernel == "noise_mse backward mixed":
        return noise_mse_kernel.launch_noise_mse(m, seeds, x, seeds, pairs, grad=weights, out=m, block=block)
    if kernel == "threshold":
        return threshold.launch_threshold(x, m, table, cursor, pairs, block=block)
    return guidance_rescale.launch_rescale_factor(m, weights[:1], weights[:1], weights[:1], block=block)


FP32, BF16 = torch.float32, torch.bfloat16


LAUNCHES = (  # kernel, block asked for, the model's dtype, channels_last, and what is launched: block, vector, warps
    ("normal", None, FP32, False, 1024, 4, 4),
    ("reverse_step", None, FP32, False, 1024, 4, 4),
    ("reverse_step", None, BF16, False, 1024, 4, 4),
    ("reverse_step", None, BF16, True, 1024, 1, 4),
    ("reverse_step with h1, h2", None, BF16, False, 1024, 4, 4),
    ("reverse_step with h1, guidance", None, BF16, False, 1024, 4, 4),
    ("reverse_step with h1, learned", None, BF16, False, 1024, 4, 4),
    ("reverse_step with h1, known", None, BF16, False, 1024, 4, 4),
    ("reverse_step with guidance, learned", None, BF16, False, 1024, 4, 4),
    ("reverse_step with h1, z", None, BF16, False, 1024, 4, 4),
    ("reverse_step with h1, h2, z", None, BF16, False, 1024, 4, 8),
    ("reverse_step with h1, h2, known", None, BF16, False, 1024, 4, 8),
    ("reverse_step with h1, h2, h3", None, BF16, False, 1024, 4, 8),
    ("reverse_step with h1, h2, guidance", None, BF16, False, 1024, 4, 8),
    ("reverse_step with h1, h2, learned", None, BF16, False, 1024, 4, 8),
    ("reverse_step with h1", None, BF16, True, 1024, 1, 8),
    ("q_sample", None, FP32, False, 1024, 4, 4),
    ("q_sample", None, BF16, False, 1024, 8, 4),
    ("noise_mse", None, FP32, False, 256, 4, 1),
    ("noise_mse", None, BF16, False, 256, 8, 1),
    ("noise_mse", 1024, BF16, True, 1024, 1, 4),
    ("noise_mse backward", None, BF16, False, 1024, 8, 4),
    ("noise_mse backward mixed", None, BF16, False, 1024, 4, 4),
    ("threshold", None, BF16, False, 4096, 4, 16),
    ("threshold", 1024, BF16, True, 1024, 1, 4),
    ("rescale", None, FP32, False, 4096, 4, 16),
    ("rescale", 1024, BF16, True, 1024, 8, 8),
)


def test_launches_are_as_stated(monkeypatch):
    """Lanes, vectors and warps of a program; multiplications and additions fuse, but not in the threshold's kernels."""
    x, recorder = torch.zeros(2, 4, 64, 64), Recorder(monkeypatch)
    for kernel, asked, dtype, last, block, vector, warps in LAUNCHES:
        recorder.options.clear()
        m = x.to(dtype).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        launch(kernel, x, m, asked)
        assert all(options["enable_fp_fusion"] is (kernel != "threshold") for options in recorder.options), kernel
        divided = [options for options in recorder.options if "BLOCK" in options]
        launched = {(o["BLOCK"], o["VECTOR"], o["num_warps"], o["FULL"]) for o in divided}
        assert launched == {(block, vector, warps, True)}, kernel


def test_large_samples_are_not_one_program(monkeypatch):
    recorder, x = Recorder(monkeypatch), torch.zeros(2, 4, 128, 256)
    for kernel in ("threshold", "rescale"):
        launch(kernel, x, x, None)
    divided = [(o["BLOCK"], o["num_warps"]) for o in recorder.options if "BLOCK" in o]
    assert divided == [*4 * [(1024, 4)], (1024, 8)]


def test_small_samples_that_a_program_holds_whole(monkeypatch):
    """Blocks and warps are powers of two."""
    recorder, x = Recorder(monkeypatch), torch.zeros(2, 3, 32, 32)
    for kernel in ("threshold", "rescale"):
        launch(kernel, x, x, None)
        launch(kernel, x[:, 0, 0].contiguous(), x[:, 0, 0].contiguous(), None)
    assert [(o["BLOCK"], o["num_warps"]) for o in recorder.options] == 2 * [(1024, 8), (16, 1)]


def test_one_sample_of_one_element_and_no_sample():
    """A batch of 1; steps and streams that are not given."""
    one, seed, t, pairs = torch.ones(1, 1, device=DEVICE), *torch.zeros(2, 1, device=DEVICE).long(), torch.ones(1, 2)
    pairs, z, out = pairs.to(DEVICE), torch.empty_like(one), torch.empty_like(one)
    philox.launch_normal(z, seed, step=0, stream=2)
    q_sample_kernel.launch_q_sample(one, None, out, t, pairs, seed)
    assert torch.equal(out, 1 + z)
    assert noise_mse_kernel.launch_noise_mse(z, seed).item() <= 1e-11
    factor = torch.full_like(seed, math.nan, dtype=torch.float32)
    guidance_rescale.launch_rescale_factor(torch.cat([one, out]), factor.fill_(2), factor.clone(), factor)
    assert factor.item() == 1.0  # of one element the deviation is 0
    for empty in (out[:0], out[:, :0]):
        philox.launch_normal(empty, seed, step=0, stream=0)
        q_sample_kernel.launch_q_sample(empty, None, empty, t, pairs, seed)


def test_channels_last_samples_have_32_bit_addresses():
    def picture(width: int) -> Tensor:
        return torch.empty(1, 2, 2**15, width, device="meta").to(memory_format=torch.channels_last)

    assert memory_order(picture(2**15 - 1)) == (2**15 * (2**15 - 1), 2)
    with pytest.raises(ValueError, match="too large; make it contiguous"):
        memory_order(picture(2**15))
