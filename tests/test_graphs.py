"""CUDA graphs: the logic on any machine with the capture faked, the real thing where there is a GPU."""

import functools
import math
import os
import subprocess
import sys
import textwrap
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_graph import FakeGraphs
from fastddpm_kernels import LoopStep

from fastddpm import NoiseSchedule, Sampler, graphs, solvers
from fastddpm.errors import GraphCaptureError, NonFiniteError

ROOT = Path(__file__).resolve().parent.parent
TABLE = solvers.ddpm(NoiseSchedule.linear(), 6, clip=1.0)


def test_recently_used_keeps_the_latest():
    kept = graphs.RecentlyUsed(2)
    assert [kept.get(key, lambda key=key: key * 10) for key in (1, 2, 1, 3)] == [10, 20, 10, 30]
    assert kept.get(1, lambda: "new") == 10  # 2 left, as it was used before 1
    assert kept.get(2, lambda: "new") == "new"
    assert len(kept) == 2
    kept.clear()
    assert len(kept) == 0


def test_a_value_that_can_not_be_made_is_not_kept():
    kept = graphs.RecentlyUsed(2)
    with pytest.raises(ZeroDivisionError):
        kept.get(1, lambda: 1 // 0)
    assert len(kept) == 0


def test_the_fingerprint_sees_what_makes_a_graph_stale():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    made = [graphs.fingerprint(net)]
    with torch.no_grad():
        net[0].weight.add_(1)  # the graph reads the same memory
    assert graphs.fingerprint(net) == made[0]
    old = net[0].weight.data
    net[0].weight.data = net[0].weight.data.clone()
    made.append(graphs.fingerprint(net))
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)
    made.append(graphs.fingerprint(net))
    net.eval()
    made.append(graphs.fingerprint(net))
    hook = net[1].register_forward_hook(lambda *_: None)
    made.append(graphs.fingerprint(net))
    hook.remove()
    hook = net[1].register_forward_hook(lambda *_: None)  # in its place
    made.append(graphs.fingerprint(net))
    hook.remove()
    net[1].register_forward_pre_hook(lambda *_: None)
    made.append(graphs.fingerprint(net))
    net.bfloat16()
    made.append(graphs.fingerprint(net))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        made.append(graphs.fingerprint(net))
    assert len(set(made)) == len(made)
    assert old is not None


def test_layout_counts_too():
    net = torch.nn.Conv2d(3, 3, 3)
    before = graphs.fingerprint(net)
    values = net.weight.data
    net.weight.data = values.as_strided(values.shape, (27, 1, 9, 3))
    assert net.weight.data_ptr() == values.data_ptr()
    assert graphs.fingerprint(net) != before


GLOBAL_NET = torch.nn.Linear(2, 2)


class Holder:
    def __init__(self, net):
        self.net = net

    def predict(self, x, t):
        return self.net(x)

    __call__ = predict


def test_modules_are_found_behind_what_calls_them():
    net = torch.nn.Linear(2, 2)

    def inner(x, t):
        return net(x)

    callables = [
        inner,
        lambda x, t: inner(x, t) * 2,
        functools.partial(net.forward),
        functools.partial(lambda module, x, t: module(x), net),
        Holder(net),
        Holder(net).predict,
    ]
    for model in callables:
        assert graphs.modules_of(model) == [net], model
        before = graphs.fingerprint(model)
        net.weight.data = net.weight.data.clone()
        assert graphs.fingerprint(model) != before
    assert graphs.modules_of(lambda x, t: GLOBAL_NET(x)) == [GLOBAL_NET]
    assert graphs.modules_of(len) == []


class FakeCapture:
    """Stands in for `graphs.capture`: replays by calling the step, and counts."""

    def __init__(self, monkeypatch, error=None):
        self.captures, self.replays, self.error = 0, 0, error
        monkeypatch.setattr(graphs, "capture", self)
        refused = lambda sampler: sampler._graph_refused or sampler.graph is False  # noqa: E731
        monkeypatch.setattr(Sampler, "_wants_graph", lambda sampler, device: not refused(sampler))

    def __call__(self, run, device, lengths=(1,), pool=None, loop=False):
        self.captures += 1
        for _ in range(3):
            run(1)
        if self.error:
            raise GraphCaptureError(self.error)

        def replay(n):
            self.replays += 1
            run(n)

        return {n: functools.partial(replay, n) for n in lengths}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x, t, shift=None, gain=1.0):
        out = self.weight * x * gain
        return out if shift is None else out + shift[:, None]


def test_replays_are_the_eager_bytes_and_results_stay(monkeypatch):
    eager = Sampler(Net(), TABLE)
    expected = [eager.sample((2, 5), seeds=s) for s in range(3)]
    fake = FakeCapture(monkeypatch)
    sampler = Sampler(Net(), TABLE)
    made = [sampler.sample((2, 5), seeds=s) for s in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))  # the warm-up leaves no trace
    assert (fake.captures, fake.replays) == (1, 18)


TABLES = {
    "ddpm": solvers.ddpm(NoiseSchedule.linear(), 47),
    "history": solvers.dpm_solver(NoiseSchedule.linear(), 29, order=3),
    "ten": solvers.ddim(NoiseSchedule.linear(), 10),
    "nine": solvers.ddim(NoiseSchedule.linear(), 9),
    "one": solvers.ddim(NoiseSchedule.linear(), 1, spacing="trailing"),
}


@pytest.mark.parametrize("name", TABLES)
def test_what_a_graph_holds_is_the_loop(monkeypatch, name):
    """Recorded and replayed as it is, chunks and single steps: the eager bytes, again and again."""
    table = TABLES[name]
    shift = {"model_kwargs": {"shift": torch.tensor([1.0, 2.0])}}
    guided = {**shift, "guidance_scale": [3.0, 1.5], "unconditional_kwargs": {"shift": 0.0}}
    guided |= {"guidance_interval": (0.2, 5.0)} if table.num_rows > 1 else {}
    known = {"known": torch.ones(2, 5), "mask": torch.arange(5) < 2}
    runs = [(seed, given) for given in ({}, shift, guided, known) for seed in (0, 1)]
    eager = [Sampler(Net(), table, state_dtype=torch.float32).sample((2, 5), seeds=s, **given) for s, given in runs]
    fake = FakeGraphs(monkeypatch)
    monkeypatch.setattr("fastddpm.sampler.NoiseAhead", None)  # on a GPU the kernel makes the noise
    monkeypatch.setattr(Sampler, "_makes_noise_ahead", lambda sampler, device: False)
    sampler = Sampler(Net(), table)
    made = [sampler.sample((2, 5), seeds=s, **given) for s, given in runs]
    assert all(torch.equal(a, b) for a, b in zip(made, eager, strict=True))
    chunks, single = divmod(table.num_rows, 10)
    assert fake.replays.get(10, 0) == 8 * chunks
    assert fake.replays.get(1, 0) == 8 * single
    assert fake.captures == 4


def test_a_callback_and_given_noise_want_each_step(monkeypatch):
    fake, table, rows = FakeGraphs(monkeypatch), TABLES["ddpm"], []
    z = torch.randn(47, 2, 5, generator=torch.Generator().manual_seed(0))
    expected = Sampler(Net(), table, graph=False).sample((2, 5), seeds=0, noise=lambda row: z[row])
    made = Sampler(Net(), table).sample(
        (2, 5), seeds=0, noise=lambda row: z[row], callback=lambda row, x: rows.append(row)
    )
    assert torch.equal(made, expected)
    assert fake.replays == {1: 47}
    assert rows == list(range(47))


def test_closing_frees_the_graphs(monkeypatch):
    fake = FakeCapture(monkeypatch)
    sampler = Sampler(Net(), TABLE)
    first = sampler.sample((2, 5), seeds=0)
    sampler.close()
    assert len(sampler._captured) == 0
    assert torch.equal(sampler.sample((2, 5), seeds=0), first)
    assert fake.captures == 2


def test_new_shapes_and_arguments_get_graphs_of_their_own(monkeypatch):
    fake = FakeCapture(monkeypatch)
    sampler = Sampler(Net(), TABLE)
    for batch in (1, 2, 3, 4, 1, 5, 1, 2):  # 2 has left when 5 came
        sampler.sample((batch, 5), seeds=0)
    assert fake.captures == 6
    shift = torch.tensor([1.0, 2.0])
    first = sampler.sample((2, 5), seeds=0, model_kwargs={"shift": shift})
    second = sampler.sample((2, 5), seeds=0, model_kwargs={"shift": -shift})  # same graph, new values
    assert fake.captures == 7
    assert not torch.equal(first, second)
    assert shift.tolist() == [1.0, 2.0]
    sampler.sample((2, 5), seeds=0, model_kwargs={"gain": 2.0})
    sampler.sample((2, 5), seeds=0, model_kwargs={"gain": 3.0})
    assert fake.captures == 9


def test_another_model_or_table_gets_a_graph_of_its_own(monkeypatch):
    net, other = Net(), solvers.ddim(NoiseSchedule.linear(), 6)
    models = [functools.partial(net, gain=gain) for gain in (1.0, 2.0)]
    runs = [(models[0], TABLE), (models[1], TABLE), (models[1], other)]
    eager = [Sampler(model, table).sample((2, 5), seeds=0) for model, table in runs]
    fake = FakeCapture(monkeypatch)
    sampler = Sampler(*runs[0])
    for count, ((sampler.model, sampler.table), expected) in enumerate(zip(runs, eager, strict=True), start=1):
        assert torch.equal(sampler.sample((2, 5), seeds=0), expected)
        assert fake.captures == count


def test_guidance_and_inpainting_have_graphs_of_their_own_and_their_numbers_have_not(monkeypatch):
    """A graph is for what a step does; scales, intervals, what is known and where, are written into its buffers."""
    shift, unconditional, table = torch.tensor([1.0, 2.0]), {"shift": 0.0}, solvers.ddpm(NoiseSchedule.linear(), 6)
    runs = [
        dict(),
        dict(guidance_scale=2.0, unconditional_kwargs=unconditional),
        dict(guidance_scale=[5.0, 1.0], unconditional_kwargs={"shift": -0.5}),
        dict(guidance_scale=3.0, guidance_rescale=0.5, unconditional_kwargs=unconditional),
        dict(guidance_scale=3.0, guidance_interval=(0.1, 1.0), unconditional_kwargs=unconditional),
        dict(guidance_scale=3.0, guidance_interval=(1.0, 9.0), unconditional_kwargs=unconditional),
        dict(guidance_scale=1.0, unconditional_kwargs=unconditional),
        dict(known=torch.zeros(2, 5), mask=torch.arange(5) < 2),
        dict(known=torch.ones(2, 5), mask=torch.arange(5) < 3),
    ]
    eager = [Sampler(Net(), table).sample((2, 5), seeds=0, model_kwargs={"shift": shift}, **given) for given in runs]
    fake = FakeCapture(monkeypatch)
    sampler = Sampler(Net(), table)
    sampler._captured = graphs.RecentlyUsed(9)
    captures = []
    for given, expected in zip(runs, eager, strict=True):
        made = sampler.sample((2, 5), seeds=0, model_kwargs={"shift": shift}, **given)
        assert torch.equal(made, expected)
        captures.append(fake.captures)
    assert captures == [1, 2, 2, 3, 4, 4, 4, 5, 5]
    assert len({tuple(made.flatten().tolist()) for made in eager}) == 8  # the first and the seventh are one


def test_a_step_with_an_interval_reads_nothing_on_the_host(monkeypatch):
    """What the cursor stands at decides: the very same function, called again and again, guides only some rows."""
    weights = []
    FakeCapture(monkeypatch)

    class Told(LoopStep):
        def __init__(self, *given, guidance, **options):
            super().__init__(*given, guidance=guidance, **options)
            self.guidance = guidance

        def __call__(self, output):
            weights.append(self.guidance.tolist())
            super().__call__(output)

    monkeypatch.setattr("fastddpm.sampler.LoopStep", Told)
    Sampler(Net(), TABLE).sample(
        (2, 5),
        seeds=0,
        model_kwargs={"shift": torch.ones(2)},
        guidance_scale=[3.0, 4.0],
        unconditional_kwargs={"shift": 0.0},
        guidance_interval=(0.2, 2.0),
    )
    noise = [math.inf, *(TABLE["k_z"][:-1] / TABLE["k_x"][:-1])]
    noise[0] = TABLE.start[1] / TABLE.start[0]
    assert weights[3:] == [[3.0, 4.0] if 0.2 < level <= 2.0 else [1.0, 1.0] for level in noise]
    assert [1.0, 1.0] in weights[3:]


def test_a_dict_that_changes_between_calls(monkeypatch):
    fake = FakeCapture(monkeypatch)

    def model(x, t, cond):
        return cond["y"][:, None] * x

    sampler, cond = Sampler(model, TABLE), {"y": torch.tensor([0.1, 0.2])}
    first = sampler.sample((2, 5), seeds=0, model_kwargs={"cond": cond})
    cond["y"] = torch.tensor([0.3, 0.4])
    second = sampler.sample((2, 5), seeds=0, model_kwargs={"cond": cond})
    assert fake.captures == 1  # the graph's own buffers hold the values
    assert torch.equal(second, Sampler(model, TABLE, graph=False).sample((2, 5), seeds=0, model_kwargs={"cond": cond}))
    assert not torch.equal(first, second)
    cond["gain"] = object()
    with pytest.warns(UserWarning, match="no CUDA graph: model_kwargs hold a object"):
        sampler.sample((2, 5), seeds=0, model_kwargs={"cond": cond})
    del cond["gain"]  # that was of one call: the next one has its graph, the same
    assert torch.equal(sampler.sample((2, 5), seeds=0, model_kwargs={"cond": cond}), second)
    assert fake.captures == 1


def test_inference_mode_leaves_the_buffers_usable(monkeypatch):
    FakeCapture(monkeypatch)
    sampler = Sampler(Net(), TABLE)
    with torch.inference_mode():
        inside = sampler.sample((2, 5), seeds=0)
    assert torch.equal(sampler.sample((2, 5), seeds=0), inside)


def test_a_graphs_buffers_carry_nothing_over(monkeypatch):
    """Parts of a batch go through the same buffers, and a run after a broken one starts clean."""
    eager = Sampler(Net(), TABLE, batch_size=2).sample((5, 4), seeds=3)
    fake = FakeCapture(monkeypatch)
    sampler = Sampler(Net(), TABLE, batch_size=2)
    assert torch.equal(sampler.sample((5, 4), seeds=3), eager)
    with pytest.raises(NonFiniteError, match="sample 0 is not finite from step 0"):
        sampler.sample((5, 4), seeds=3, x_T=torch.full((5, 4), float("nan")))
    assert torch.equal(sampler.sample((5, 4), seeds=3), eager)
    assert fake.captures == 1


def test_changed_weights_are_used(monkeypatch):
    fake = FakeCapture(monkeypatch)
    net = Net()
    sampler = Sampler(net, TABLE)
    sampler.sample((2, 5), seeds=0)
    net.weight.data = torch.tensor(0.1)
    assert torch.equal(sampler.sample((2, 5), seeds=0), Sampler(net, TABLE, graph=False).sample((2, 5), seeds=0))
    assert fake.captures == 2


def test_a_model_that_can_not_be_captured(monkeypatch):
    expected = Sampler(Net(), TABLE).sample((2, 5), seeds=0)
    fake = FakeCapture(monkeypatch, error="operation not permitted when stream is capturing")
    sampler = Sampler(Net(), TABLE)
    with pytest.warns(UserWarning, match=r"no CUDA graph: operation not permitted .* sampling goes on eagerly"):
        made = sampler.sample((2, 5), seeds=0)
    assert torch.equal(made, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning, and no second try
        assert torch.equal(sampler.sample((2, 5), seeds=0), expected)
    assert fake.captures == 1
    with pytest.raises(GraphCaptureError, match="not permitted"):
        Sampler(Net(), TABLE, graph=True).sample((2, 5), seeds=0)


def test_the_models_own_error_is_not_a_capture_error(monkeypatch):
    FakeCapture(monkeypatch)

    def model(x, t):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Sampler(model, TABLE).sample((2, 5), seeds=0)


def test_what_is_asked_of_cuda_for_a_capture(monkeypatch):
    """Warm-ups and captures are on one side stream, which waits on the way in and is waited for on the way out."""
    log, now = [], ["main"]
    streams = {name: SimpleNamespace(wait_stream=lambda s, n=name: log.append((n, "waits for", s.name)), name=name)
               for name in ("main", "side")}  # fmt: skip

    @contextmanager
    def stream(to):
        now.append(to.name)
        yield
        now.pop()

    @contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        log.append(("capture", stream.name, pool, capture_error_mode))
        yield

    fakes = dict(
        current_stream=lambda *_: streams[now[-1]],
        Stream=lambda *_: streams["side"],
        stream=stream,
        graph=graph,
        CUDAGraph=lambda keep_graph: SimpleNamespace(replay="replay", keep=keep_graph),
        get_rng_state=lambda *_: torch.zeros(1),
        get_sync_debug_mode=lambda: "as it was",
        set_sync_debug_mode=lambda mode: log.append(mode),
    )
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    enabled = torch.is_autocast_cache_enabled()

    def run(n):
        assert not torch.is_autocast_cache_enabled()
        assert graphs._ONE_AT_A_TIME.locked()
        log.append((n, now[-1]))

    monkeypatch.setattr(graphs, "looped", lambda graph, device: ("looped", graph.keep))
    assert graphs.capture(run, torch.device("cuda"), (10, 1), "pool") == {10: "replay", 1: "replay"}
    warm_up, captured = (1, "side"), ("capture", "side", "pool", "thread_local")
    assert log == [
        ("side", "waits for", "main"),
        *(warm_up, warm_up, "error", warm_up, "as it was"),
        ("main", "waits for", "side"),
        *(captured, (10, "main"), captured, (1, "main")),  # `torch.cuda.graph` itself changes the stream
    ]
    assert torch.is_autocast_cache_enabled() == enabled
    looped = graphs.capture(run, torch.device("cuda"), (10, 1), "pool", loop=True)
    assert looped == {10: ("looped", True), 1: "replay"}


# --- on a GPU, each in a process of its own: a failed capture must not reach the other tests --------------------------

PRELUDE = """
import torch, warnings
from fastddpm import NoiseSchedule, Sampler, UNet, solvers
torch.manual_seed(0)
net = UNet(in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
           down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2).cuda().eval().requires_grad_(False)
table = solvers.ddpm(NoiseSchedule.linear(), 25, clip=1.0)
def pair(model, table=table, batch=4, seeds=0):
    made = [Sampler(model, table, graph=g).sample((batch, 1, 16, 16), seeds=seeds) for g in ("auto", False)]
    assert torch.equal(*made), (made[0] - made[1]).abs().max()
    return made[0]
def whole():
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.randn(3, device="cuda")
    torch.cuda.empty_cache()
    Sampler(net, table, graph=True).sample((2, 1, 16, 16), seeds=0)
"""

ON_GPU = {
    "replay_is_eager": """
        for steps in (1, 2, 5, 25, 1000):
            for batch in (1, 3, 16):
                pair(net, solvers.ddpm(NoiseSchedule.linear(), steps, clip=1.0), batch)
    """,
    "each_replay_draws_its_own_noise": """
        sampler = Sampler(net, table, graph=True)
        a, b, c = (sampler.sample((2, 1, 16, 16), seeds=s) for s in (0, 1, 0))
        assert not torch.equal(a, b) and torch.equal(a, c)
    """,
    "item_falls_back": """
        def model(x, t):
            return net(x, t) * (1 if x.sum().item() == x.sum().item() else 0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pair(model)
        assert sum("the model waits for the GPU" in str(w.message) for w in caught) == 1, caught
        whole()
    """,
    "dropout_is_not_captured": """
        def model(x, t):
            return net(x, t) + 0 * torch.rand_like(x)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pair(model)
        assert any("draws random numbers" in str(w.message) for w in caught), caught
        whole()
    """,
    "a_capture_that_breaks": """
        def model(x, t):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("not while capturing")
            return net(x, t)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pair(model)
        assert any("not while capturing" in str(w.message) for w in caught), caught
        whole()
    """,
    "autocast_and_inference_mode": """
        net.requires_grad_(True)
        sampler = Sampler(net, table, graph=True)
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                sampler.sample((2, 1, 16, 16), seeds=0)
            torch.empty(1 << 26, device="cuda").fill_(float("nan"))
        with torch.inference_mode():
            inside = sampler.sample((2, 1, 16, 16), seeds=0)
        assert torch.equal(sampler.sample((2, 1, 16, 16), seeds=0), inside)
    """,
    "arguments": """
        labelled = UNet(in_channels=1, out_channels=1, block_out_channels=(16,), layers_per_block=1, norm_num_groups=4,
                        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), num_class_embeds=3)
        labelled = labelled.cuda().eval().requires_grad_(False)
        x_T = torch.randn(5, 1, 8, 8)
        made = [
            Sampler(labelled, table, graph=g, batch_size=2).sample(
                x_T.shape, seeds=list(range(5)), x_T=x_T.cuda(), model_kwargs={"class_labels": torch.arange(5) % 3})
            for g in (True, False)
        ]
        assert torch.equal(*made)
        assert [s.step for s in Sampler(net, table).trace((2, 1, 16, 16), seeds=0)] == list(range(25))
        guided = dict(guidance_scale=[1.0, 2.0, 3.0, 4.0, 5.0], guidance_rescale=0.7, guidance_interval=(0.1, 5.0),
                      unconditional_kwargs={"class_labels": 2})
        known = dict(known=torch.zeros(5, 1, 8, 8), mask=torch.arange(8) < 4)
        for given in (guided, known, {**guided, **known}):
            made = [
                Sampler(labelled, table, graph=g, batch_size=2).sample(
                    x_T.shape, seeds=list(range(5)), model_kwargs={"class_labels": torch.arange(5) % 3}, **given)
                for g in (True, False)
            ]
            assert torch.equal(*made)
    """,
    "classifier_guidance_is_captured": """
        from fastddpm.guidance import classifier_guided
        head = torch.nn.Conv2d(1, 1, 3).cuda()
        guided = classifier_guided(net, lambda x, t: head(x).square().flatten(1).sum(1), NoiseSchedule.linear())
        made = [Sampler(guided, table, graph=g).sample((2, 1, 16, 16), seeds=0) for g in (True, False)]
        assert torch.equal(*made) and head.weight.grad is None
    """,
    "not_finite": """
        from fastddpm.errors import NonFiniteError
        def model(x, t):
            broken = (t < 500) & (torch.arange(4, device="cuda") == 2)
            return torch.where(broken[:, None, None, None], float("nan"), net(x, t))
        try:
            Sampler(model, table, graph=True).sample((4, 1, 16, 16), seeds=0)
        except NonFiniteError as error:
            assert "sample 2" in str(error) and error.bad.tolist() == [False, False, True, False]
        else:
            raise SystemExit("no error")
    """,
    "new_weights_are_used": """
        sampler = Sampler(net, table, graph=True)
        before = sampler.sample((2, 1, 16, 16), seeds=0)
        net.conv_out.weight.mul_(0.5)
        middle = sampler.sample((2, 1, 16, 16), seeds=0)
        net.conv_out.weight.data = net.conv_out.weight.data * 0.5
        after = sampler.sample((2, 1, 16, 16), seeds=0)
        assert not torch.equal(before, middle) and not torch.equal(middle, after)
        assert torch.equal(after, Sampler(net, table, graph=False).sample((2, 1, 16, 16), seeds=0))
        net.load_state_dict({k: 2 * v for k, v in net.state_dict().items()}, assign=True)
        assert torch.equal(
            sampler.sample((2, 1, 16, 16), seeds=0), Sampler(net, table, graph=False).sample((2, 1, 16, 16), seeds=0)
        )
    """,
    "results_stay": """
        sampler = Sampler(net, table, graph=True)
        first = sampler.sample((2, 1, 16, 16), seeds=0)
        kept = first.clone()
        sampler.sample((2, 1, 16, 16), seeds=1)
        assert torch.equal(first, kept)
        first.zero_()  # nor is it a buffer
        assert torch.equal(sampler.sample((2, 1, 16, 16), seeds=0), kept)
    """,
    "what_was_given_may_be_freed": """
        def model(x, t, shift):
            return net(x, t) + shift[:, None, None, None]
        sampler = Sampler(model, table, graph=True)
        for value in (0.1, 0.2):
            shift, x_T = torch.full((2,), value, device="cuda"), torch.ones(2, 1, 16, 16, device="cuda")
            given = dict(x_T=x_T, model_kwargs={"shift": shift})
            expected = Sampler(model, table, graph=False).sample(x_T.shape, seeds=0, **given)
            assert torch.equal(sampler.sample(x_T.shape, seeds=0, **given), expected)
            assert shift.tolist() == [shift[0].item()] * 2 and (x_T == 1).all()
            del shift, x_T, given
            waste = [torch.full((n,), float("nan"), device="cuda") for n in (2, 512, 1 << 20)]
    """,
    "hooks_train_mode_and_autocast_are_noticed": """
        sampler = Sampler(net, table, graph=True)
        def agree():
            made = [s.sample((2, 1, 16, 16), seeds=0) for s in (sampler, Sampler(net, table, graph=False))]
            assert torch.equal(*made)
            return made[0]
        plain = agree()
        hook = net.register_forward_hook(lambda module, given, made: 0.5 * getattr(made, "sample", made))
        assert not torch.equal(agree(), plain)
        hook.remove()
        net.train()
        agree()
        net.eval()
        assert torch.equal(agree(), plain)
        with torch.autocast("cuda", torch.bfloat16):
            agree()
        assert torch.equal(agree(), plain)
    """,
    "another_stream": """
        expected = Sampler(net, table, graph=False).sample((2, 1, 16, 16), seeds=0, x_T=torch.ones(2, 1, 16, 16).cuda())
        sampler, side = Sampler(net, table, graph=True), torch.cuda.Stream()
        for _ in range(3):  # captured there, replayed there
            with torch.cuda.stream(side):
                torch.cuda._sleep(10**7)
                x_T = torch.zeros(2, 1, 16, 16, device="cuda").add_(1)
                made = sampler.sample(x_T.shape, seeds=0, x_T=x_T)
                del x_T
                sum_ = made.sum()
            torch.cuda.current_stream().wait_stream(side)
            assert torch.equal(made, expected) and torch.equal(sum_, expected.sum())
        torch.cuda._sleep(10**7)
        assert torch.equal(sampler.sample((2, 1, 16, 16), seeds=0, x_T=torch.ones(2, 1, 16, 16).cuda()), expected)
    """,
    "other_threads_go_on": """
        import threading
        stop, errors = threading.Event(), []
        def work():
            try:
                while not stop.is_set():  # none of this is allowed in the thread that captures
                    assert torch.ones(1 << 20, device="cuda").sum().item() == 1 << 20
                    torch.cuda.empty_cache()
            except Exception as error:
                errors.append(error)
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads: thread.start()
        for _ in range(5):
            Sampler(net, table, graph=True).sample((2, 1, 16, 16), seeds=0)
        stop.set()
        for thread in threads: thread.join()
        assert not errors, errors
    """,
    "one_sampler_in_many_threads": """
        import threading
        sampler, made = Sampler(net, table, graph=True), {}
        def work(seed):
            made[seed] = sampler.sample((2 + seed % 2, 1, 16, 16), seeds=seed)
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        for seed, sample in made.items():
            assert torch.equal(sample, Sampler(net, table, graph=False).sample(sample.shape, seeds=seed))
        assert len(made) == 6
    """,
    "a_graph_that_is_freed_during_a_capture": """
        import gc
        others = [Sampler(net, table, graph=True) for _ in range(2)]
        for other in others: other.sample((2, 1, 16, 16), seeds=0)
        others[0].itself = others[0]  # for the garbage collector
        def model(x, t):
            if torch.cuda.is_current_stream_capturing() and others:
                others.clear()
                gc.collect()
            return net(x, t)
        made = Sampler(model, table, graph=True).sample((2, 1, 16, 16), seeds=0)
        assert not others and torch.equal(made, Sampler(net, table, graph=False).sample((2, 1, 16, 16), seeds=0))
        whole()
    """,
    "many_shapes_keep_four_graphs": """
        sampler, made = Sampler(net, table, graph=True), {}
        for batch in (1, 2, 3, 4, 5, 6, 1, 6, 2):
            sample = sampler.sample((batch, 1, 16, 16), seeds=0)
            assert torch.equal(sample, made.setdefault(batch, sample))
        assert len(sampler._captured) == 4
        sampler.close()
        assert torch.equal(sampler.sample((1, 1, 16, 16), seeds=0), made[1])
    """,
    "the_settings_are_as_they_were": """
        def settings():
            return (torch.backends.cudnn.benchmark, torch.is_autocast_cache_enabled(), torch.is_grad_enabled(),
                    torch.cuda.get_sync_debug_mode(), torch.cuda.current_stream())
        def broken(x, t):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("not while capturing")
            return net(x, t)
        for benchmark in (False, True):
            torch.backends.cudnn.benchmark = benchmark
            before = settings()
            torch.cuda.manual_seed(0)
            drawn = torch.randn(4, device="cuda")
            waits = lambda x, t: net(x, t) + 0 * x.sum().item()
            draws = lambda x, t: net(x, t) + 0 * torch.rand_like(x)
            for model in (net, waits, draws, broken):
                torch.cuda.manual_seed(0)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    Sampler(model, table, graph="auto" if model is not net else True).sample((2, 1, 16, 16), seeds=0)
                assert settings() == before
                if model is net:  # its own noise is no generator's
                    assert torch.equal(torch.randn(4, device="cuda"), drawn)
    """,
    "channels_last_bfloat16": "pair(net.bfloat16().to(memory_format=torch.channels_last))",
    "cpu_and_gpu_agree": """
        torch.backends.cudnn.allow_tf32 = False  # 10 bits of significand: 2e-3 away
        made = pair(net)
        there = Sampler(net.cpu(), table).sample((4, 1, 16, 16), seeds=0)
        assert (made.cpu() - there).abs().max() <= 1e-3
    """,
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu(name):
    code = PRELUDE + textwrap.dedent(ON_GPU[name])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]


class NoCuda:
    """What is asked of `torch.cuda` in `ON_GPU`, on a machine without one: one stream, on which all is done at once."""

    _stream = SimpleNamespace(wait_stream=lambda _: None)
    current_stream = default_stream = staticmethod(lambda: NoCuda._stream)
    Stream = staticmethod(lambda: NoCuda._stream)
    stream = staticmethod(lambda _: nullcontext())
    is_current_stream_capturing = staticmethod(lambda: True)
    _sleep = empty_cache = synchronize = staticmethod(lambda *_: None)


def on_the_cpu(code):
    """`code` for a GPU, with what is CUDA's taken out and fewer steps; `NoCuda` is to be known to it."""
    for there, here in (
        (".cuda()", ""),
        ('"cuda"', '"cpu"'),
        ("torch.cuda.", "NoCuda."),
        ("1000)", "10)"),
        ("25", "8"),
    ):
        code = code.replace(there, here)
    return code


NOT_ON_A_CPU = {  # what they show is not there
    "item_falls_back": "a warning",
    "dropout_is_not_captured": "a warning, and torch's noise",
    "a_capture_that_breaks": "a warning",
    "autocast_and_inference_mode": "autocast",
    "many_shapes_keep_four_graphs": "graphs",
    "the_settings_are_as_they_were": "settings",
    "cpu_and_gpu_agree": "a GPU",
    "channels_last_bfloat16": "fast bfloat16",
}


@pytest.mark.parametrize("name", [name for name in ON_GPU if name not in NOT_ON_A_CPU])
def test_the_code_for_a_gpu_is_right_as_far_as_a_cpu_can_say(name):
    code = on_the_cpu(PRELUDE + textwrap.dedent(ON_GPU[name]))
    exec(compile(code, name, "exec"), {"NoCuda": NoCuda})


@pytest.mark.parametrize(("place", "waited"), [("cuda:0", [torch.device("cuda:0")]), ("cpu", [])])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_fails_half_way_is_waited_for(place, waited, error, monkeypatch):
    """Its steps may still be running, and the next call, in another stream, has the same buffers."""
    asked = []

    def synchronize():
        asked.append(torch.device(place))
        raise RuntimeError("the device's own complaint")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=synchronize))
    with pytest.raises(error, match="first"), graphs.settled(torch.device(place)):
        raise error("first")
    assert asked == waited
    with graphs.settled(torch.device(place)):
        pass
    assert asked == waited


def test_a_callback_that_raises_is_waited_for(monkeypatch):
    asked, plain = [], graphs.settled
    monkeypatch.setattr(graphs, "settled", lambda device: asked.append(device) or plain(device))
    with pytest.raises(ZeroDivisionError):
        Sampler(lambda x, t: x, TABLE).sample((1, 2), seeds=0, callback=lambda row, x: 1 // 0)
    assert asked == [torch.device("cpu")]
