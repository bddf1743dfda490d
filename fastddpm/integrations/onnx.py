"""ONNX Runtime: a session as a model for `Sampler`.

    model = onnx.model("unet.onnx")  # or an onnxruntime.InferenceSession, with the providers that you want
    Sampler(model, table).sample((16, 3, 32, 32), seeds=0)

onnxruntime is imported only where a path is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

_DTYPES: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def model(
    session: Any, *, x: str | None = None, t: str | None = None, output: str | None = None
) -> Callable[..., Tensor]:
    """A callable model(x, t, **kwargs) that runs an ONNX Runtime session.

    What it is given is copied to the CPU and made what the session says that it takes: the dtype, and a time step
    that is a scalar or [1] (all samples must then be at the same one, as they are in `Sampler.sample`).

    Args:
        session: an ``onnxruntime.InferenceSession``, or the path of an .onnx file, which is run on the CPU.
        x, t: names of the inputs for the state and the time step; None: the first and the second.
        output: name of the output; None: the first.

    Returns:
        model(x, t, **kwargs) -> Tensor, on x's device and in its dtype; kwargs are the session's other inputs by name,
        tensors, arrays or numbers. Raises `InputError` where they are not just these.

    Raises:
        InputError: for names that the session has not, or inputs of a type that isn't float32, float16, float64, int64,
            int32 or bool.
    """
    if isinstance(session, str | PathLike):
        import onnxruntime

        session = onnxruntime.InferenceSession(str(session), providers=["CPUExecutionProvider"])
    inputs = {each.name: each for each in session.get_inputs()}
    outputs = [each.name for each in session.get_outputs()]
    if len(inputs) < 2:
        raise InputError(f"the session's inputs are {', '.join(inputs) or 'none'}; needed: a state and a time step")
    first, second, *_ = inputs
    x, t = first if x is None else x, second if t is None else t
    for name, among in ((x, inputs), (t, inputs), (output or outputs[0], outputs)):
        if name not in among:
            raise InputError(f"the session has no {name!r}; it has {', '.join(among)}")
    for name, each in inputs.items():
        if each.type not in _DTYPES:
            raise InputError(f"the session's input {name} is {each.type}; allowed: {', '.join(_DTYPES)}")
    if x == t:
        raise InputError(f"x and t are both {x!r}; name the inputs of the state and of the time step")
    if len(inputs[t].shape) > 1:
        raise InputError(
            f"the session's input {t} has shape {inputs[t].shape}; needed: [], [1] or [batch], the time steps"
        )
    others = set(inputs) - {x, t}

    def run(state: Tensor, time: Tensor, **kwargs: Any) -> Tensor:
        if set(kwargs) != others:
            wanted, given = ", ".join(sorted(others)) or "none", ", ".join(sorted(kwargs)) or "none"
            raise InputError(f"model_kwargs are {given}; the session's other inputs are {wanted}")
        time = _as_taken(time, inputs[t].shape)
        feeds = {name: _array(v, inputs[name].type) for name, v in {x: state, t: time, **kwargs}.items()}
        (made,) = session.run([output or outputs[0]], feeds)
        return torch.from_numpy(made).to(state)

    return run


def _as_taken(time: Tensor, shape: list[Any]) -> Tensor:
    """[B], or where the session takes one time step alone, that one."""
    if len(shape) == 1 and shape[0] != 1:
        return time
    if not bool((time == time[0]).all()):
        raise InputError(f"the session takes one time step, of shape {shape}; the samples are at different ones")
    return time[0] if len(shape) == 0 else time[:1]


def _array(value: Any, kind: str) -> np.ndarray[Any, Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.ascontiguousarray(value, dtype=_DTYPES[kind]).reshape(np.shape(value))
