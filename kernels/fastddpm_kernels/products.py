"""One product of tiles, and whether Triton's interpreter runs it."""

import triton
import triton.language as tl


@triton.jit
def multiplied(a, b, total, WIDEN: tl.constexpr):
    """total + a @ b, summed in float32. WIDEN is `interpreted`: Triton's interpreter can't multiply bfloat16."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)
