"""How the kernels divide samples: a program owns some lanes of one sample, a lane four elements, q apart.

One Philox block makes four normals, so this division needs one block a lane. A program's elements are one tensor
[4, BLOCK]: row k holds its lanes' k-th elements, adjacent in memory, and a thread holds four adjacent lanes of every
row. So each access is 128 bits of float32, and no value ever changes its thread: no shared memory, no barrier.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .constants import chunk

# 32 elements a thread share the loads of a table row, the addresses and the key schedule: with 16 the DDPM step has 7
# instructions an element more [compiled for sm_90]. A step that reads more than 4 tensors has 16, to spare registers;
# in channels_last, where each element has an address of its own, one that reads more than 2: with 32 some spill.
LANES_A_THREAD = 8


class Division(NamedTuple):
    """How samples of one size are divided: the kernels' constants of these names."""

    block: int  # lanes of a program
    full: bool  # samples fill all programs, so that no access needs a mask
    vector: int  # adjacent lanes of a thread
    warps: int  # of a program


def division(n: int, block: int | None = None, *, plane: int = 0, width: int = 4, tensors: int = 1) -> Division:
    """The division of samples of n elements: the largest block that divides their lanes, or `block`.

    `plane` is not 0 where a tensor is channels_last, `width` the bytes of an element of the widest tensor, `tensors`
    how many are read. Not measured on a GPU yet.
    """
    q = chunk(n)
    # Samples begin at 16-byte boundaries, or they don't; and in channels_last adjacent lanes are not adjacent.
    vector = 16 // width if n % 16 == 0 and plane == 0 else 1
    if block is None:
        block = next((b for b in (1024, 512, 256) if q % b == 0), 512 if q > 256 else 256)
    lanes = LANES_A_THREAD if tensors <= (2 if plane else 4) else LANES_A_THREAD // 2
    return Division(block, n == 4 * q and q % block == 0, vector, max(1, block // (32 * lanes)))


def grid(batch: int, q: int, block: int) -> tuple[int, int]:
    """Programs: samples, which may be many, on the axis without a bound; blocks of a sample's q lanes on the second.

    (One axis of samples x blocks would cost a division: 1.2 instructions an element.)
    """
    blocks = triton.cdiv(q, block)
    if blocks > 65535:
        raise ValueError(f"a sample has {q} lanes of 4 elements; at most {65535 * block}")
    return batch, blocks


@triton.jit
def program(n, q, FULL: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """What this program works on: its sample; its lanes [1, BLOCK]; their elements and whether the sample has them.

    All int64; elements [4, BLOCK]. VECTOR adjacent lanes go to one thread, even where a narrower dtype would allow
    more: else a kernel with two dtypes gets two divisions, and shared memory between them.
    """
    sample = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)[None, :]
    k = tl.arange(0, 4)[:, None].to(tl.int64)
    e = k * q + start + lane
    if VECTOR > 1:
        e = tl.max_contiguous(e, [1, VECTOR])
    else:
        e = tl.max_contiguous(e, [1, 4])  # for the order of the dimensions
        e = tl.multiple_of(e, [1, 1])  # and still no wide access
    if FULL:
        inside = tl.full((4, BLOCK), True, tl.int1)
    else:
        room = tl.minimum(tl.minimum(q, n - k * q) - start, BLOCK)  # of each row
        inside = lane < room.to(tl.int32)
    return sample, start + lane, e, inside


@triton.jit
def in_memory(e, inside, PLANE: tl.constexpr, CHANNELS: tl.constexpr):
    """Where the logical elements e of (C, H, W) lie, and `inside`: as given, or in channels_last (PLANE = H W not 0).

    The division is in 32 bits (`memory_order` refuses larger samples): in 64 it costs 8 instructions an element more.
    In channels_last the two are flattened, for a load or a store that no longer has an order of its own: Triton 3.6
    would else give the four rows to four threads, and the noise four times the work.
    """
    if PLANE > 0:
        e = e.to(tl.int32)
        e = (e % PLANE * CHANNELS + e // PLANE).to(tl.int64).reshape(e.numel)
        inside = inside.reshape(e.numel)
    return e, inside


def memory_order(x: torch.Tensor) -> tuple[int, int]:
    """(PLANE, CHANNELS) of a [B, C, H, W] tensor in channels_last; (0, 0) of a contiguous tensor of any shape.

    Raises `ValueError` for any other layout, and for channels_last samples of 2^31 elements or more.
    """
    if x.is_contiguous():
        return 0, 0
    if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"strides are {x.stride()} of shape {tuple(x.shape)}; needed: contiguous or channels_last")
    _, channels, height, width = x.shape
    if channels * height * width >= 2**31:
        raise ValueError(f"a channels_last sample of shape {tuple(x.shape[1:])} is too large; make it contiguous")
    return height * width, channels
