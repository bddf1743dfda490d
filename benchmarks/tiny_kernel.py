"""The smallest kernel that depends on the one before it: to time what lies between two nodes of a graph."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def add_one(x_ptr, WAIT: tl.constexpr):
    """x + 1; `WAIT`: the next kernel may be launched at once, and this one waits for that before it."""
    if WAIT:
        gdc_launch_dependents()
        gdc_wait()
    tl.store(x_ptr, tl.load(x_ptr) + 1)
