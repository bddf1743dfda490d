"""The whole loop in one launch: against a driver that is not there, in Python and in C, and where there is one, really.

With cuda-bindings 12.8 to 13.5, where it is installed, its structures are what the driver in C reads.
"""

import ctypes
import gc
import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
import weakref
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_driver import FakeDriver, FakeDriver12, run_ptx
from fake_graph import FakeGraph, FakeGraphs, Recording
from test_graphs import PRELUDE, TABLES, Net, NoCuda, on_the_cpu

import fastddpm
from fastddpm import Sampler, graphs, while_graph
from fastddpm.errors import DeviceError, InputError
from fastddpm.while_graph import COUNT_DOWN, WhileRefused, looped

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
SELF_TEST = len(while_graph.TRIALS)  # launches


class Body:
    """A `torch.cuda.CUDAGraph` that what runs under `torch.cuda.graph` is recorded into."""

    def __init__(self, keep_graph):
        assert keep_graph

    def raw_cuda_graph(self):
        return self.recording.replay


@contextmanager
def recorded(body, stream, capture_error_mode):
    assert capture_error_mode == "thread_local"
    with Recording() as body.recording:
        yield


@pytest.fixture
def driver(monkeypatch):
    """Gives the fake driver to use: ``driver(fails="cuGraphLaunch")``."""
    stream = SimpleNamespace(cuda_stream=7, wait_stream=lambda other: None)
    fakes = {"device": lambda _: nullcontext(), "current_device": lambda: 0, "Stream": lambda _: stream}
    fakes |= {
        "current_stream": lambda _: stream,
        "CUDAGraph": Body,
        "graph": recorded,
        "stream": lambda _: nullcontext(),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(while_graph, "_PROVED", {})

    def use(**how):
        made = FakeDriver(**how)
        monkeypatch.setattr(while_graph, "_bindings", lambda: made)
        return made

    return use


def counting():
    """A captured graph that counts how often it runs."""
    runs = []
    return runs, FakeGraph(lambda: runs.append(1))


def test_a_launch_runs_the_body_as_often_as_asked(driver):
    fake, (runs, body) = driver(), counting()
    loop = looped(body, CPU)
    for times in (1, 2, 7, 100, 1):
        runs.clear()
        loop(times)
        assert len(runs) == times
    assert fake.calls.count("cuGraphLaunch") == SELF_TEST + 5
    assert fake.calls.count("cuGraphInstantiate") == 2


@pytest.mark.parametrize("left, again", [(3, 1), (2, 1), (1, 0), (0, 0), (-5, 0)])
def test_the_countdown_ends_even_where_it_began_at_nothing(left, again):
    memory, said = ctypes.c_int32(left), {}
    run_ptx(COUNT_DOWN.decode(), (ctypes.addressof(memory), 11), said.__setitem__)
    assert (memory.value, said) == (left - 1, {11: again})


@pytest.mark.parametrize("graph", ["auto", True])
def test_it_is_off_unless_asked_for(monkeypatch, driver, graph):
    cuda, fake = driver(), FakeGraphs(monkeypatch)
    Sampler(Net(), TABLES["ten"], graph=graph).sample((2, 5), seeds=0)
    assert (cuda.calls, fake.replays) == ([], {10: 1})


def test_two_loops_have_countdowns_of_their_own(driver):
    driver()
    (some, first), (others, second) = counting(), counting()
    loops = looped(first, CPU), looped(second, CPU)
    loops[0](3)
    loops[1](5)
    loops[0](2)
    assert (len(some), len(others)) == (5, 5)


@pytest.fixture
def eager(monkeypatch):
    monkeypatch.setattr("fastddpm.sampler.NoiseAhead", None)  # on a GPU the kernel makes the noise
    monkeypatch.setattr(Sampler, "_makes_noise_ahead", lambda sampler, device: False)
    return lambda table, seed, **given: Sampler(Net(), table, graph=False).sample((2, 5), seeds=seed, **given)


@pytest.mark.parametrize("name", TABLES)
def test_the_loop_is_the_eager_bytes(monkeypatch, driver, eager, name):
    table, cuda = TABLES[name], driver()
    shift = {"model_kwargs": {"shift": torch.tensor([1.0, 2.0])}}
    known = {"known": torch.ones(2, 5), "mask": torch.arange(5) < 2}
    runs = [(seed, given) for given in ({}, shift, known) for seed in (0, 1)]
    expected = [eager(table, seed, **given) for seed, given in runs]
    fake = FakeGraphs(monkeypatch)
    sampler = Sampler(Net(), table, graph="while")
    made = [sampler.sample((2, 5), seeds=seed, **given) for seed, given in runs]
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    chunks, single = divmod(table.num_rows, 10)
    assert fake.replays.get(10, 0) == 6 * chunks
    assert fake.replays.get(1, 0) == 6 * single
    assert cuda.calls.count("cuGraphLaunch") == (6 + SELF_TEST if chunks else 0)  # a sample is one
    assert cuda.calls.count("cuModuleLoadData") == (1 if chunks else 0)
    assert fake.captures == 3


def test_a_callback_and_given_noise_want_each_step(monkeypatch, driver, eager):
    cuda, table, rows = driver(), TABLES["ddpm"], []
    z = torch.randn(47, 2, 5, generator=torch.Generator().manual_seed(0))
    expected = eager(table, 0), eager(table, 0, noise=lambda row: z[row])
    fake = FakeGraphs(monkeypatch)
    sampler = Sampler(Net(), table, graph="while")
    assert torch.equal(sampler.sample((2, 5), seeds=0, callback=lambda row, x: rows.append(row)), expected[0])
    assert torch.equal(sampler.sample((2, 5), seeds=0, noise=lambda row: z[row]), expected[1])
    assert rows == list(range(47))
    assert fake.replays == {1: 2 * 47}
    assert cuda.calls.count("cuGraphLaunch") == SELF_TEST
    assert torch.equal(sampler.sample((2, 5), seeds=0), expected[0])  # and again without
    assert fake.replays == {1: 2 * 47 + 7, 10: 4}


REFUSED = {
    "cuCtxGetCurrent": ({"fails": "cuCtxGetCurrent"}, "CUDA_ERROR_INVALID_VALUE"),
    "cuModuleLoadData": ({"fails": "cuModuleLoadData"}, "CUDA_ERROR_INVALID_VALUE"),
    "cuModuleGetFunction": ({"fails": "cuModuleGetFunction"}, "CUDA_ERROR_INVALID_VALUE"),
    "cuGraphCreate": ({"fails": "cuGraphCreate"}, "CUDA_ERROR_INVALID_VALUE"),
    "handle": ({"fails": "cuGraphConditionalHandleCreate"}, "the driver says CUDA_ERROR_INVALID_VALUE"),
    "cuGraphAddNode": ({"fails": "cuGraphAddNode"}, "CUDA_ERROR_INVALID_VALUE"),
    "child": ({"fails": "cuGraphAddChildGraphNode"}, "CUDA_ERROR_INVALID_VALUE"),
    "kernel": ({"fails": "cuGraphAddKernelNode"}, "CUDA_ERROR_INVALID_VALUE"),
    "cuGraphInstantiate": ({"fails": "cuGraphInstantiate"}, "CUDA_ERROR_INVALID_VALUE"),
    "cuGraphLaunch": ({"fails": "cuGraphLaunch"}, "DeviceError: .* CUDA_ERROR_INVALID_VALUE.*"),
    "counts wrong": ({"runs": 2}, "its body ran 6 times, not 3, in a test"),
    "never runs": ({"runs": 0}, "its body ran 0 times, not 3, in a test"),
    "host": ({"kinds": ("KERNEL", "MEMCPY", "HOST")}, "a step holds a node of the kind HOST"),
    "event": ({"kinds": ("EMPTY", "MEMSET", "WAIT_EVENT")}, "a step holds a node of the kind WAIT_EVENT"),
    "conditional": ({"kinds": ("KERNEL", "CONDITIONAL")}, "a step holds a node of the kind CONDITIONAL"),
    "in a child": ({"kinds": ("KERNEL", "GRAPH")}, "a step holds a node of the kind WAIT_EVENT"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_fails_leaves_the_chunks_and_says_why(monkeypatch, driver, eager, name):
    how, reason = REFUSED[name]
    table = TABLES["ddpm"]
    expected, cuda, fake = eager(table, 0), driver(**how), FakeGraphs(monkeypatch)
    sampler = Sampler(Net(), table, graph="while")
    with pytest.warns(UserWarning, match=f"no WHILE node: .*{reason}; sampling goes on with 10 steps a launch"):
        assert torch.equal(sampler.sample((2, 5), seeds=0), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the same graphs: not said again
        assert torch.equal(sampler.sample((2, 5), seeds=0), expected)
    assert fake.replays == {10: 8, 1: 14}
    gc.collect()
    assert cuda.alive == 0
    calls = len(cuda.calls)
    with pytest.warns(UserWarning, match=reason):  # the answer is the process's
        Sampler(Net(), table, graph="while").sample((2, 5), seeds=0)
    assert len(cuda.calls) == calls


def test_a_graph_that_is_refused_after_the_self_test_is_refused_alone(monkeypatch, driver, eager):
    table = TABLES["ddpm"]
    expected, cuda, fake = eager(table, 0), driver(), FakeGraphs(monkeypatch)
    looped(counting()[1], CPU)
    cuda.kinds = ("HOST",)
    with pytest.warns(UserWarning, match="a node of the kind HOST"):
        assert torch.equal(Sampler(Net(), table, graph="while").sample((2, 5), seeds=0), expected)
    cuda.kinds = ("KERNEL",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(Sampler(Net(), table, graph="while").sample((2, 5), seeds=0), expected)
    assert fake.replays == {10: 8, 1: 14}
    assert cuda.calls.count("cuModuleLoadData") == 1


def test_a_graph_that_is_refused_is_instantiated_at_once(driver):
    """Not at its first replay, as torch would."""
    driver(kinds=("HOST",))
    made, body = [], counting()[1]
    body.instantiate = lambda: made.append(1)
    with pytest.warns(UserWarning, match="with 10 steps a launch"):
        assert graphs.replay_of(body, 10, CPU, loop=True) == body.replay
    assert made == [1]
    assert graphs.replay_of(body, 10, CPU, loop=False) == body.replay
    assert made == [1]


def test_without_memory_for_the_chunks_it_is_eager(monkeypatch, driver, eager):
    """As where torch instantiates a graph in its capture."""
    driver(kinds=("HOST",))
    expected = eager(TABLES["ddpm"], 0)
    FakeGraphs(monkeypatch)

    def instantiate(graph):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FakeGraph, "instantiate", instantiate)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(Sampler(Net(), TABLES["ddpm"], graph="while").sample((2, 5), seeds=0), expected)
    assert [str(w.message).split(";")[0] for w in caught][1:] == ["no CUDA graph: CUDA out of memory"]


def test_a_self_test_that_can_not_be_captured_leaves_the_current_stream(monkeypatch, driver):
    """torch doesn't set it back when the end of a capture raises."""
    now = ["the user's"]
    driver()

    @contextmanager
    def breaks(body, stream, capture_error_mode):
        now.append(stream)
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    @contextmanager
    def set_back(side):
        before = list(now)
        now.append(side)
        try:
            yield
        finally:
            now[:] = before

    monkeypatch.setattr(torch.cuda, "stream", set_back)
    monkeypatch.setattr(torch.cuda, "graph", breaks)
    with pytest.raises(WhileRefused, match="previous error during capture"):
        looped(counting()[1], CPU)
    assert now == ["the user's"]


def test_the_calls_of_cuda_bindings_12(driver, monkeypatch):
    driver()
    cuda, (runs, body) = FakeDriver12(), counting()
    monkeypatch.setattr(while_graph, "_bindings", lambda: cuda)
    looped(body, CPU)(4)
    assert len(runs) == 4
    assert cuda.calls.count("cuGraphAddNode_v2") == 2


def test_another_device_has_a_self_test_of_its_own(monkeypatch, driver):
    cuda = driver()
    for number in (0, 1, 0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda number=number: number)
        looped(counting()[1], CPU)
    assert cuda.calls.count("cuModuleLoadData") == 2


def test_without_the_package(monkeypatch, driver):
    driver()
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(WhileRefused, match=r"cuda-bindings is not there .*; pip install 'fastddpm\[while\]'"):
        looped(counting()[1], CPU)


def test_a_launch_that_fails_is_an_error(driver):
    cuda = driver()
    loop = looped(counting()[1], CPU)
    cuda.fails = "cuGraphLaunch"
    with pytest.raises(DeviceError, match="was not launched: CUDA_ERROR_INVALID_VALUE; sample with graph='auto'"):
        loop(1)


def test_closing_frees_it(monkeypatch, driver):
    cuda, _ = driver(), FakeGraphs(monkeypatch)
    sampler = Sampler(Net(), TABLES["ten"], graph="while")
    sampler.sample((2, 5), seeds=0)
    sampler.sample((3, 5), seeds=0)
    gc.collect()
    assert cuda.alive == 4  # of each shape, a graph and its executable; the self-test's are gone
    sampler.close()
    gc.collect()
    assert cuda.alive == 0


def test_the_body_lives_as_long_as_the_loop(driver):
    """The memory that the steps work in is the body's: it goes last."""
    cuda, body = driver(), counting()[1]
    freed = weakref.finalize(body, lambda: cuda.calls.append("the body is freed"))
    loop = looped(body, CPU)
    del body
    gc.collect()
    assert freed.alive
    del loop
    gc.collect()
    assert cuda.calls[-3:] == ["cuGraphExecDestroy", "cuGraphDestroy", "the body is freed"]


def test_it_is_launched_on_its_own_device(monkeypatch, driver):
    """The current stream of another device is not the one that is current there."""
    cuda, now, launched = driver(), [], []
    loop = looped(counting()[1], CPU)

    @contextmanager
    def device(of):
        now.append(of)
        yield
        now.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    cuda.cuGraphLaunch = lambda *_: launched.extend(now) or (0,)
    loop(3)
    assert launched == [CPU]


def test_a_device_without_a_number_stays_the_one_it_was(monkeypatch, driver):
    """Of a mere "cuda" the number is that of the current device, which may be another at the launch."""
    driver()
    loop, asked = looped(counting()[1], torch.device("cpu", 0)), []
    monkeypatch.setattr(torch.cuda, "device", lambda of: asked.append(of) or nullcontext())
    loop(3)
    assert asked == [loop._left.device]


def test_another_thread_waits_until_the_device_is_done(monkeypatch):
    """In a stream of its own it would write the buffers while this thread's steps still run."""
    sampler, held = Sampler(Net(), TABLES["ten"]), []
    finite_samples = fastddpm.sampler.finite_samples
    monkeypatch.setattr(
        "fastddpm.sampler.finite_samples", lambda *given: held.append(sampler._lock.locked()) or finite_samples(*given)
    )
    sampler.sample((2, 5), seeds=0)
    assert held == [True]
    assert not sampler._lock.locked()


def test_it_is_asked_for_by_name_and_is_nothing_on_a_cpu(monkeypatch):
    monkeypatch.setattr(graphs, "capture", None)
    made = [Sampler(Net(), TABLES["ten"], graph=g).sample((2, 5), seeds=0) for g in ("while", "auto")]
    assert torch.equal(*made)
    for wrong in ("While", "loop", 1.5, None):
        with pytest.raises(InputError, match=r"graph is .*; allowed: 'auto', 'while', True, False"):
            Sampler(Net(), TABLES["ten"], graph=wrong)


# --- what the driver is given -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [75, 80, 90, 100])
def test_the_kernel_assembles_and_leaves_one_function_to_the_driver(tmp_path, target):
    """What the driver's own assembler does when the PTX is loaded. On a GPU it is that one, of the driver's version."""
    nvidia = pytest.importorskip("triton.backends.nvidia", reason="its assembler")
    tools = Path(nvidia.__path__[0]) / "bin"
    source, made = tmp_path / "count_down.ptx", tmp_path / "count_down.cubin"
    source.write_bytes(COUNT_DOWN)
    subprocess.run([tools / "ptxas", "-c", f"-arch=sm_{target}", "-v", source, "-o", made], check=True, timeout=60)
    listed = subprocess.run([tools / "cuobjdump", "-symbols", made], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines() if line.startswith("STT_FUNC")]
    assert sorted(row[-1] for row in rows) == ["count_down", "cudaGraphSetConditional"]
    assert [row[-1] for row in rows if "U" in row] == ["cudaGraphSetConditional"]


THROUGH_THE_BINDINGS = """
import atexit, ctypes, gc, os, sys
atexit.register(lambda: alive.value == at_exit or os._exit(1))  # before any finalizer's, so after it: nothing was freed
from types import SimpleNamespace
from contextlib import contextmanager, nullcontext
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from cuda.bindings import driver
from fastddpm import while_graph

class Adds(TorchDispatchMode):
    "Records what is added to, and leaves it undone, as a capture does."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.name().startswith("aten::add_"):
            return func(*args, **(kwargs or {}))
        made.append(args[0].data_ptr())
        return args[0]

class Body:
    def __init__(self, keep_graph=False):
        self.graph = None
    def raw_cuda_graph(self):
        return int(self.graph)

def called(result):
    assert not result[0], result
    return result[1]

@contextmanager
def captured(body, stream, capture_error_mode):
    made.clear()
    with Adds():
        yield
    body.graph = called(driver.cuGraphCreate(0))
    for at in made:
        node = driver.CUDA_KERNEL_NODE_PARAMS()
        node.func = called(driver.cuModuleGetFunction(called(driver.cuModuleLoadData(while_graph.COUNT_DOWN)), b"add"))
        node.gridDimX = node.gridDimY = node.gridDimZ = node.blockDimX = node.blockDimY = node.blockDimZ = 1
        node.kernelParams = ((at,), (ctypes.c_void_p,))
        called(driver.cuGraphAddKernelNode(body.graph, None, 0, node))

made, stream = [], SimpleNamespace(cuda_stream=7, wait_stream=lambda _: None)
fakes = dict(device=lambda _: nullcontext(), current_device=lambda: 0, current_stream=lambda _: stream,
             Stream=lambda _: stream, stream=lambda _: nullcontext(), CUDAGraph=Body, graph=captured)
for name, fake in fakes.items():
    setattr(torch.cuda, name, fake)
there = ctypes.CDLL("libcuda.so.1")
alive, launches = (ctypes.c_int64.in_dll(there, name) for name in ("fake_alive", "fake_launches"))
total, body = torch.zeros(1, dtype=torch.int64), Body()
with captured(body, stream, ""):
    total.add_(1)
    total.add_(1)
loop = while_graph.looped(body, torch.device("cpu"))
assert launches.value == 2, launches
for times, expected in ((500, 1000), (1, 1002), (3, 1008)):
    loop(times)
    assert total.item() == expected, total
assert launches.value == 5, launches
before = alive.value
del loop
gc.collect()
assert before - alive.value == 2, (before, alive)
kept, at_exit = while_graph.looped(body, torch.device("cpu")), alive.value
"""


def child(code, **environment):
    paths = [str(HERE.parent), str(HERE.parent / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]


def test_the_bindings_give_the_driver_what_it_should_get(tmp_path):
    """Through the real package, to a driver of our own: argument structures, handles, the order of the nodes."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        pytest.skip("cuda-bindings is not installed: pip install 'fastddpm[while]'")
    compiler = shutil.which("gcc") or shutil.which("cc") or pytest.skip("there is no C compiler")
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, HERE / "fake_driver.c"], check=True, timeout=60)
    child(THROUGH_THE_BINDINGS, LD_LIBRARY_PATH=str(tmp_path))


# --- on a GPU, each in a process of its own ---------------------------------------------------------------------------

ON_GPU = {
    "the_self_test": """
        from fastddpm import while_graph
        with torch.cuda.device(0):
            while_graph._proved(while_graph._bindings(), torch.device("cuda"))
    """,
    "one_launch_for_1000_steps": """
        from fastddpm import while_graph
        table, launches = solvers.ddpm(NoiseSchedule.linear(), 1000, clip=1.0), []
        expected = Sampler(net, table, graph=False).sample((2, 1, 16, 16), seeds=0)
        sampler = Sampler(net, table, graph="while")
        sampler.sample((2, 1, 16, 16), seeds=1)
        run = while_graph.WhileGraph.__call__
        while_graph.WhileGraph.__call__ = lambda loop, times: launches.append(times) or run(loop, times)
        torch.cuda.CUDAGraph.replay = None  # no other
        assert torch.equal(sampler.sample((2, 1, 16, 16), seeds=0), expected)
        assert launches == [100], launches
    """,
    "any_number_of_steps": """
        for steps in (1, 2, 9, 10, 11, 25, 50):
            for batch in (1, 3):
                looped(net, solvers.ddpm(NoiseSchedule.linear(), steps, clip=1.0), batch)
        looped(net, solvers.dpm_solver(NoiseSchedule.linear(), 25, order=3))
    """,
    "replays_and_new_weights": """
        sampler = Sampler(net, table, graph="while")
        a, b, c = (sampler.sample((2, 1, 16, 16), seeds=s) for s in (0, 1, 0))
        assert torch.equal(a, c) and not torch.equal(a, b)
        net.conv_out.weight.data = net.conv_out.weight.data * 0.5  # captured anew
        after = sampler.sample((2, 1, 16, 16), seeds=0)
        assert torch.equal(after, Sampler(net, table, graph=False).sample((2, 1, 16, 16), seeds=0))
        assert not torch.equal(a, after)
        sampler.close()
        assert torch.equal(sampler.sample((2, 1, 16, 16), seeds=0), after)
    """,
    "guided_and_with_a_callback": """
        rows = []
        shift = {"model_kwargs": {"shift": torch.tensor([1.0, 2.0]).cuda()}}
        def model(x, t, shift):
            return net(x, t) + shift[:, None, None, None]
        for given in (shift, {**shift, "guidance_scale": [3.0, 1.5], "unconditional_kwargs": {"shift": 0.0},
                              "guidance_interval": (0.1, 5.0)}):
            made = [Sampler(model, table, graph=g).sample((2, 1, 16, 16), seeds=0, **given) for g in ("while", False)]
            assert torch.equal(*made)
        Sampler(net, table, graph="while").sample((2, 1, 16, 16), seeds=0, callback=lambda row, x: rows.append(row))
        assert rows == list(range(table.num_rows))
    """,
    "many_shapes": """
        sampler = Sampler(net, table, graph="while")
        for batch in (1, 2, 3, 4, 5, 1, 6, 2):
            made = sampler.sample((batch, 1, 16, 16), seeds=0)
            assert torch.equal(made, Sampler(net, table, graph=False).sample((batch, 1, 16, 16), seeds=0))
        assert len(sampler._captured) == 4
    """,
    "threads_in_streams_of_their_own": """
        import threading
        sampler, made = Sampler(net, table, graph="while"), {}
        def work(seed):
            with torch.cuda.stream(torch.cuda.Stream()):
                made[seed] = sampler.sample((2, 1, 16, 16), seeds=seed)
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        for seed in range(6):
            assert torch.equal(made[seed], Sampler(net, table, graph=False).sample((2, 1, 16, 16), seeds=seed))
    """,
    "in_another_stream": """
        expected = Sampler(net, table, graph=False).sample((2, 1, 16, 16), seeds=0)
        sampler = Sampler(net, table, graph="while")
        sampler.sample((2, 1, 16, 16), seeds=1)
        with torch.cuda.stream(torch.cuda.Stream()):
            assert torch.equal(sampler.sample((2, 1, 16, 16), seeds=0), expected)
    """,
}
WITHOUT_A_FALLBACK = """
warnings.filterwarnings("error", message="no WHILE node")
warnings.filterwarnings("error", message="no CUDA graph")
def looped(model, table, batch=2):
    made = [Sampler(model, table, graph=g).sample((batch, 1, 16, 16), seeds=0) for g in ("while", False)]
    assert torch.equal(*made), (made[0] - made[1]).abs().max()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu(name):
    pytest.importorskip("cuda.bindings", reason="pip install 'fastddpm[while]'")
    child(PRELUDE + WITHOUT_A_FALLBACK + textwrap.dedent(ON_GPU[name]))


@pytest.mark.gpu
def test_without_the_package_on_a_gpu():
    code = """
        import sys
        sys.modules["cuda"] = sys.modules["cuda.bindings"] = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = [Sampler(net, table, graph=g).sample((2, 1, 16, 16), seeds=0) for g in ("while", False)]
        assert torch.equal(*made)
        assert sum("no WHILE node: cuda-bindings is not there" in str(w.message) for w in caught) == 1, caught
    """
    child(PRELUDE + textwrap.dedent(code))


NOT_ON_A_CPU = ("the_self_test", "one_launch_for_1000_steps", "many_shapes")  # a WHILE node, and graphs


@pytest.mark.parametrize("name", [name for name in ON_GPU if name not in NOT_ON_A_CPU])
def test_the_code_for_a_gpu_is_right_as_far_as_a_cpu_can_say(name):
    with warnings.catch_warnings():
        code = on_the_cpu(PRELUDE + WITHOUT_A_FALLBACK + textwrap.dedent(ON_GPU[name]))
        exec(compile(code, name, "exec"), {"NoCuda": NoCuda})
