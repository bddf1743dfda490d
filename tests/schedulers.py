"""What the tests of the drop-in schedulers share: each stock scheduler and ours, and their trajectories."""

import inspect
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("diffusers", reason="diffusers isn't installed")
import diffusers
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from fastddpm.integrations import diffusers as ours

PAIRS = {getattr(diffusers, name.removeprefix("Fused")): getattr(ours, name) for name in ours.__all__[:-1]}
SIGMAS = (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler)
DRAWING = [stock for stock in PAIRS if stock not in (HeunDiscreteScheduler, UniPCMultistepScheduler)]
KINDS = ("epsilon", "sample", "v_prediction")
CHURN = dict(s_churn=3.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.01)  # of Euler, with 8 steps
quiet = pytest.mark.filterwarnings("ignore")  # of NumPy and of what is deprecated in diffusers


def over(stocks):
    return pytest.mark.parametrize("stock, fused", [(s, PAIRS[s]) for s in stocks], ids=[s.__name__ for s in stocks])


each, drawing = over(list(PAIRS)), over(DRAWING)


def kinds(stock):
    return KINDS[::2] if stock is EulerAncestralDiscreteScheduler else KINDS


def noisy(stock):
    """(config, arguments of a step) with which it draws noise, if it can."""
    config = {"algorithm_type": "sde-dpmsolver++"} if stock is DPMSolverMultistepScheduler else {}
    return config, {DDIMScheduler: {"eta": 0.7}, EulerDiscreteScheduler: CHURN}.get(stock, {})


def product(**choices):
    """Every combination; a choice that is a dict is a part of the config."""
    for values in itertools.product(*choices.values()):
        made = {}
        for name, value in zip(choices, values, strict=True):
            made |= value if isinstance(value, dict) else {name: value}
        yield made


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def outputs(
    scheduler,
    n=6,
    shape=(2, 3, 6, 5),
    dtype=torch.float32,
    m_dtype=None,
    rounded=None,
    as_ints=False,
    noise=None,
    given=None,
    **times,
):
    """All that the steps of a trajectory return, with outputs of a model that are fixed, or the error that ends it.

    What it starts from and is given is `rounded` before it has the dtype.
    """
    scheduler.set_timesteps(n, **times)
    draw, given, made = generator(), dict(given or {}), []
    if "generator" in inspect.signature(scheduler.step).parameters:
        given["generator"] = generator(1) if noise is None else noise
    kind, channels = scheduler.config.prediction_type, 1
    if getattr(scheduler, "variance_type", "") in ("learned", "learned_range"):
        channels = 2
    start = torch.randn(shape, generator=draw, dtype=torch.float32) * scheduler.init_noise_sigma
    x, bound = start.to(rounded or dtype).to(dtype), 10 * float(scheduler.init_noise_sigma)
    for t in scheduler.timesteps.tolist() if as_ints else scheduler.timesteps:
        made.append(scheduler.scale_model_input(x, t))
        m = torch.randn((shape[0], channels * shape[1], *shape[2:]), generator=draw)
        m = m.to(rounded or m_dtype or dtype).to(m_dtype or dtype)
        before = m.clone(), x.clone()
        try:
            results = [*scheduler.step(m, t, x, **given).values()]
        except (RuntimeError, IndexError) as error:
            return [*made, type(error)]
        assert torch.equal(m, before[0])
        assert torch.equal(x, before[1])
        own = type(scheduler) not in PAIRS and m_dtype in (None, dtype) and dtype in (torch.float32, torch.float64)
        for result in results if own or not kind.endswith("sample") else results[:1]:  # diffusers may return m itself
            assert channels == 2 or result.data_ptr() not in (m.data_ptr(), x.data_ptr())
        made += results
        x = results[0].nan_to_num(0.0, 1.0, -1.0).clamp(-bound, bound)
    return made


def assert_equal(stock, fused, config, **given):
    """The same samples to the last bit, and schedulers in the same state."""
    a, b = stock(**config), fused(**config)
    one, other = outputs(a, **given), outputs(b, **given)
    for name in ("timesteps", "sigmas", "step_index", "lower_order_nums", "this_order"):
        now, then = (torch.as_tensor(-1 if v is None else v) for v in (getattr(s, name, None) for s in (a, b)))
        assert now.dtype == then.dtype
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    assert_same(one, other)


def assert_same(one, other):
    for x, y in zip(one, other, strict=True):
        if isinstance(x, type):
            assert x is y
            continue
        assert x.dtype == y.dtype
        assert x.stride() == y.stride()
        torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)


def walk(scheduler, x, timesteps=None, model=lambda x: 0.3 * x, **given):
    """The sample behind the last of the time steps, with a model of the scaled sample; torch's noise from seed 0."""
    torch.manual_seed(0)
    for t in scheduler.timesteps if timesteps is None else timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t)), t, x, **given, return_dict=False)[0]
    return x


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
