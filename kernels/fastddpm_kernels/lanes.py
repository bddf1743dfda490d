"""How the kernels divide samples: a program owns some lanes of one sample, a lane four elements, q apart.

One Philox block makes four normals, so this division needs one block a lane, and the four accesses that each tensor
gets are each contiguous over the lanes: no shuffle.
"""

import torch
import triton
import triton.language as tl


def grid(batch: int, q: int, block: int) -> tuple[int, int]:
    """Programs: samples, which may be many, on the axis without a bound; blocks of a sample's q lanes on the second.

    (One axis of samples x blocks would cost a division: 1.2 instructions an element.)
    """
    blocks = triton.cdiv(q, block)
    if blocks > 65535:
        raise ValueError(f"a sample has {q} lanes of 4 elements; at most {65535 * block}")
    return batch, blocks


@triton.jit
def sample_and_lane(BLOCK: tl.constexpr):
    """Which sample a program works on, and which lanes of it; both int64."""
    return tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def element(lane, k: tl.constexpr, n, q):
    """A lane's k-th element, and whether the sample has it."""
    e = lane + k * q
    return e, (lane < q) & (e < n)


@triton.jit
def in_memory(e, PLANE: tl.constexpr, CHANNELS: tl.constexpr):
    """Where the logical element e of (C, H, W) lies: at e where PLANE is 0, else in channels_last (PLANE = H W).

    The division is in 32 bits (`memory_order` refuses larger samples): in 64 it costs 8 instructions an element more.
    """
    if PLANE > 0:
        e = e.to(tl.int32)
        e = (e % PLANE * CHANNELS + e // PLANE).to(tl.int64)
    return e


@triton.jit
def load4(ptr, lane, n, q, wanted=True, PLANE: tl.constexpr = 0, CHANNELS: tl.constexpr = 0):
    """A lane's four elements of one sample, as float32; 0 where the sample has none, or they are not wanted."""
    e0, in0 = element(lane, 0, n, q)
    e1, in1 = element(lane, 1, n, q)
    e2, in2 = element(lane, 2, n, q)
    e3, in3 = element(lane, 3, n, q)
    v0 = tl.load(ptr + in_memory(e0, PLANE, CHANNELS), in0 & wanted, other=0.0).to(tl.float32)
    v1 = tl.load(ptr + in_memory(e1, PLANE, CHANNELS), in1 & wanted, other=0.0).to(tl.float32)
    v2 = tl.load(ptr + in_memory(e2, PLANE, CHANNELS), in2 & wanted, other=0.0).to(tl.float32)
    v3 = tl.load(ptr + in_memory(e3, PLANE, CHANNELS), in3 & wanted, other=0.0).to(tl.float32)
    return v0, v1, v2, v3


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
