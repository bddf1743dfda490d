"""diffusers' schedulers in float64: their modules are given a torch and a numpy whose float32 is float64."""

from __future__ import annotations

import importlib
import types

import diffusers
import numpy as np
import torch


class Doubled(types.ModuleType):
    """A module but for its float32, which is its float64."""

    def __init__(self, module):
        super().__init__(module.__name__)
        self.__dict__["module"] = module

    def __getattr__(self, name):
        return getattr(self.module, "float64" if name == "float32" else name)


def scheduler(monkeypatch, name, schedule=None, **config):
    """The stock scheduler `name` of `schedule`, all of it in float64; the file is found by the class."""
    cls = getattr(diffusers, name)
    module = importlib.import_module(cls.__module__)
    monkeypatch.setattr(module, "torch", Doubled(torch))
    monkeypatch.setattr(module, "np", Doubled(np), raising=False)
    if schedule is not None:
        config |= {k: v for k, v in schedule.to_diffusers().items() if k.startswith(("beta", "num", "trained"))}
    return cls(**config)


def walk(monkeypatch, stock, steps, model, x, noise, **options):
    """The state after each model evaluation of a stock scheduler; `noise` is what it draws, in turn."""
    module = importlib.import_module(type(stock).__module__)
    draws = iter(noise)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(next(draws)))
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of a Python number times an integer tensor
    try:
        return np.array(list(_states(stock, steps, model, torch.from_numpy(x), options)))
    finally:
        torch.set_default_dtype(usual)


def _states(stock, steps, model, x, options):
    stock.set_timesteps(steps)
    for t in stock.timesteps:
        m = model(stock.scale_model_input(x, t).numpy(), t.item())
        x = stock.step(torch.from_numpy(m), t, x, return_dict=False, **options)[0]
        assert x.dtype == torch.float64
        yield x.numpy()


def assert_same_walk(states, expected, tolerance=1e-9):
    """Each state to within `tolerance` of its own greatest number."""
    assert states.shape == expected.shape
    axes = tuple(range(1, states.ndim))
    error = np.abs(states - expected).max(axes) / np.abs(expected).max(axes)
    assert error.max() <= tolerance, f"off by {error.max():.3g} at row {error.argmax()} of {len(error)}"
