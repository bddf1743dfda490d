"""What a step reads of the model: its output, guided where there is guidance, and its variance where it learns one."""

import triton
import triton.language as tl

from .lanes import in_memory


@triton.jit
def model_output(
    m_ptr,  # float [B, n], or [B, 2 n] where LEARNED; twice as many samples where GUIDED, the unconditional ones first
    guidance_ptr,  # float32 [B]
    rescale_ptr,  # float32 [B]: what the guided output is multiplied with
    sample,
    e,  # int64 [4, BLOCK]
    inside,  # bool [4, BLOCK]
    moving,  # bool: at an identity row nothing is read, whatever there may be
    n,
    GUIDED: tl.constexpr,
    RESCALED: tl.constexpr,
    LEARNED: tl.constexpr,
    PLANE: tl.constexpr,
    CHANNELS: tl.constexpr,  # the output's own, v's among them
):
    """(m, v), float32 [4, BLOCK]: the prediction and the variance's logits; 0 where they are not there or not read.

    With guidance w the prediction is m_u + w (m_c - m_u) (Ho & Salimans 2022, eq. 6, with w = 1 + theirs); the variance
    is that of the conditional half, as Nichol & Dhariwal's successors take it.
    """
    size = n * (2 if LEARNED else 1)
    at, there = in_memory(e, inside & moving, PLANE, CHANNELS)
    conditional = m_ptr + sample * size
    if GUIDED:
        unconditional = conditional
        conditional += tl.num_programs(0).to(tl.int64) * size
    m = tl.load(conditional + at, there, other=0.0).reshape(e.shape).to(tl.float32)
    if GUIDED:
        m_u = tl.load(unconditional + at, there, other=0.0).reshape(e.shape).to(tl.float32)
        m = tl.fma(tl.load(guidance_ptr + sample, moving, other=0.0), m - m_u, m_u)
        if RESCALED:
            m *= tl.load(rescale_ptr + sample, moving, other=0.0)
    v = m
    if LEARNED:
        second = CHANNELS // 2 if PLANE > 0 else n
        v = tl.load(conditional + second + at, there, other=0.0).reshape(e.shape).to(tl.float32)
    return m, v
