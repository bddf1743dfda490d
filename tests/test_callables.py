"""Any callable is a model: each form of one network gives the network's own samples. onnxruntime 1.31.1."""

import functools
import io
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fastddpm import Sampler, solvers
from fastddpm.errors import InputError
from fastddpm.integrations import onnx
from fastddpm.schedule import NoiseSchedule

SHAPE = (4, 2, 8, 8)
TABLE = solvers.ddpm(NoiseSchedule.linear(), 5, clip=1.0)
LABELS = torch.tensor([0, 1, 2, 1])


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.classes = nn.Embedding(3, 8)
        self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x, t, label):
        told = self.classes(label) + (t / 1000)[:, None]
        return self.last(nn.functional.silu(self.first(x) + told[:, :, None, None]))

    def method(self, x, t, label):
        return self(x, t, label)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Network().eval()


@pytest.fixture(scope="module")
def expected(network):
    return Sampler(network, TABLE).sample(SHAPE, seeds=0, model_kwargs={"label": LABELS})


def example(n=2):
    return torch.zeros(n, *SHAPE[1:]), torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)


def exported(network):
    """Exported as it is called: the condition by its name."""
    (x, t, label), batch = example(), torch.export.Dim("batch", min=2)
    rows = {name: {0: batch} for name in ("x", "t", "label")}
    return torch.export.export(network, (x, t), {"label": label}, dynamic_shapes=rows).module()


class WithSample:
    """An object with __call__ that returns an object with .sample, as diffusers' models do."""

    def __init__(self, network):
        self.network = network

    def __call__(self, x, t, label):
        return SimpleNamespace(sample=self.network(x, t, label))


FORMS = {
    "method": lambda n: n.method,
    "partial": lambda n: functools.partial(n.method),
    "lambda": lambda n: lambda x, t, label: n(x, t, label),
    "object": WithSample,
    "export": exported,
    "compile": lambda n: torch.compile(n, backend="eager"),
    "compiled function": lambda n: torch.compile(lambda x, t, label: n(x, t, label), backend="aot_eager"),
    "trace": lambda n: torch.jit.trace(n, example()),
    "DataParallel": nn.DataParallel,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_modules_samples(form, network, expected):
    model = FORMS[form](network)
    got = Sampler(model, TABLE).sample(SHAPE, seeds=0, model_kwargs={"label": LABELS})
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_a_partial_that_holds_the_condition(network, expected):
    got = Sampler(functools.partial(network, label=LABELS), TABLE).sample(SHAPE, seeds=0)
    assert torch.equal(got, expected)


def test_a_function_of_numpy(expected, network):
    def model(x, t, label):
        return torch.from_numpy(network(x, t, label).numpy() + np.float32(0))

    assert torch.equal(Sampler(model, TABLE).sample(SHAPE, seeds=0, model_kwargs={"label": LABELS}), expected)


@pytest.fixture(scope="module")
def session(network):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime isn't installed: pip install 'fastddpm[onnx]'")
    return runtime.InferenceSession(to_onnx(network), providers=["CPUExecutionProvider"])


def to_onnx(network):
    file, names = io.BytesIO(), ["x", "t", "label"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has a newer exporter, which needs onnxscript
        axes = {name: {0: "batch"} for name in names}
        torch.onnx.export(network, example(), file, dynamo=False, input_names=names, dynamic_axes=axes)
    return file.getvalue()


def test_an_onnx_session_gives_the_modules_samples(session, expected):
    got = Sampler(onnx.model(session), TABLE).sample(SHAPE, seeds=0, model_kwargs={"label": LABELS})
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_an_onnx_file_with_guidance(session, network, tmp_path):
    (tmp_path / "model.onnx").write_bytes(to_onnx(network))
    given = {
        "seeds": 0,
        "model_kwargs": {"label": LABELS},
        "guidance_scale": 2.0,
        "unconditional_kwargs": {"label": 0},
    }
    expected = Sampler(network, TABLE).sample(SHAPE, **given)
    for path in (tmp_path / "model.onnx", str(tmp_path / "model.onnx")):
        got = Sampler(onnx.model(path), TABLE).sample(SHAPE, **given)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


class Session:
    """A session of which only what it says of itself matters: it returns twice the state."""

    def __init__(self, *inputs):
        self.inputs = [SimpleNamespace(name=n, type=f"tensor({kind})", shape=shape) for n, kind, shape in inputs]

    def get_inputs(self):
        return self.inputs

    def get_outputs(self):
        return [SimpleNamespace(name="first"), SimpleNamespace(name="second")]

    def run(self, outputs, feeds):
        self.asked, self.feeds = outputs, feeds
        return [2 * feeds["x"]]


@pytest.mark.parametrize("shape, given", [([], 7), ([1], [7]), (["batch"], [7, 7]), ([None], [7, 7])])
def test_the_time_step_is_what_the_session_takes(shape, given):
    session = Session(("t", "float", shape), ("x", "float16", ["batch", 3]), ("scale", "double", [1]))
    model = onnx.model(session, x="x", t="t", output="second")
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    got = model(x, torch.tensor([7, 7]), scale=3)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, 2 * x)
    assert session.asked == ["second"]
    assert {name: v.dtype for name, v in session.feeds.items()} == {"t": np.float32, "x": np.float16, "scale": float}
    assert session.feeds["t"].tolist() == given


STATE, TIME = ("x", "float", ["b", 3]), ("t", "int64", [])


def test_what_does_not_fit_a_session_is_refused():
    with pytest.raises(InputError, match="inputs are x; needed: a state and a time step"):
        onnx.model(Session(STATE))
    with pytest.raises(InputError, match="no 'sample'; it has x, t"):
        onnx.model(Session(STATE, TIME), x="sample")
    with pytest.raises(InputError, match="no 'third'; it has first, second"):
        onnx.model(Session(STATE, TIME), output="third")
    with pytest.raises(InputError, match=r"input t is tensor\(string\); allowed"):
        onnx.model(Session(STATE, ("t", "string", [])))
    with pytest.raises(InputError, match="x and t are both 't'"):
        onnx.model(Session(STATE, TIME), x="t")
    with pytest.raises(InputError, match=r"input t has shape \['b', 1\]; needed: \[\], \[1\] or \[batch\]"):
        onnx.model(Session(STATE, ("t", "float", ["b", 1])))
    model = onnx.model(Session(STATE, TIME, ("label", "int64", ["b"])))
    with pytest.raises(InputError, match="model_kwargs are none; the session's other inputs are label"):
        model(torch.ones(2, 3), torch.tensor([1, 1]))
    with pytest.raises(InputError, match="one time step"):
        model(torch.ones(2, 3), torch.tensor([1, 2]), label=torch.ones(2))
