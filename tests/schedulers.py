"""What the tests of the drop-in schedulers share: each stock scheduler and ours, and their trajectories."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("diffusers", reason="diffusers isn't installed")
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from fastddpm.integrations import diffusers as ours

PAIRS = {
    DDPMScheduler: ours.FusedDDPMScheduler,
    DDIMScheduler: ours.FusedDDIMScheduler,
    DPMSolverMultistepScheduler: ours.FusedDPMSolverMultistepScheduler,
}
KINDS = ("epsilon", "sample", "v_prediction")
each = pytest.mark.parametrize("stock, fused", PAIRS.items(), ids=[c.__name__ for c in PAIRS])


def product(**choices):
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def outputs(scheduler, shape=(2, 3, 6, 5), dtype=torch.float32, n=5, seed=0, as_ints=False, generator=None, **given):
    """All that the steps of a trajectory return, with a fixed model."""
    scheduler.set_timesteps(n)
    draw = torch.Generator().manual_seed(seed)
    x, made = torch.randn(shape, generator=draw, dtype=torch.float32).to(dtype), []
    channels = 2 if getattr(scheduler, "variance_type", "") in ("learned", "learned_range") else 1
    if generator is None:
        generator = torch.Generator().manual_seed(seed + 1)
    for t in scheduler.timesteps.tolist() if as_ints else scheduler.timesteps:
        m = torch.randn((shape[0], channels * shape[1], *shape[2:]), generator=draw).to(dtype)
        before = m.clone(), x.clone()
        out = scheduler.step(m, t, x, generator=generator, **given)
        assert torch.equal(m, before[0])
        assert torch.equal(x, before[1])
        made.append(out.prev_sample)
        if "pred_original_sample" in out:
            made.append(out.pred_original_sample)
            fresh = out.pred_original_sample.data_ptr() not in (m.data_ptr(), x.data_ptr())
            assert fresh or channels == 2 or type(scheduler) in PAIRS  # diffusers may return the output itself
        x = out.prev_sample.nan_to_num(0.0, 1.0, -1.0).clamp(-10, 10)
    return made


def assert_equal(stock, fused, config, **given):
    a, b = stock(**config), fused(**config)
    one, other = outputs(a, **given), outputs(b, **given)
    assert torch.equal(a.timesteps, b.timesteps)
    for x, y in zip(one, other, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)


class Waits(TorchDispatchMode):
    """Counts what makes a GPU's host wait: reading a value, nonzero, a copy to the CPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal") or (
            name in ("_to_copy", "copy_") and any(isinstance(a, torch.Tensor) and a.ndim == 0 for a in args)
        ):
            self.names.append(name)
        return function(*args, **(kwargs or {}))
