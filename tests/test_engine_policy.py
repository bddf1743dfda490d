"""The engine of a policy's 1-D UNet, in the layouts of Diffusion Policy and LeRobot, against the module in float64."""

import copy
import gc
import itertools
import os
import pickle
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given as draws
from hypothesis import settings
from hypothesis import strategies as st
from policy_networks import SMALL, PolicyUnet, Wrapped, given, made
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastddpm import NoiseSchedule, Sampler, solvers
from fastddpm.engine.lowering import uses
from fastddpm.engine.on_torch import has_onednn
from fastddpm.engine.plan import Plan
from fastddpm.engine.policy import ConditionedPolicy, PolicyEngine, is_policy_unet
from fastddpm.engine.policy.lowering import lower
from fastddpm.engine.policy.network import read
from fastddpm.engine.policy.on_torch import _in_parts
from fastddpm.errors import InputError

DTYPES = (torch.float32, torch.bfloat16)


def exact(net, x, t, cond):
    """What the module gives in float64."""
    wide = copy.deepcopy(net).double()
    return wide(x.double(), t, global_cond=None if cond is None else cond.double())


def rms(error):
    return float(error.double().square().mean().sqrt())


def architectures():
    """Networks of every kind that is supported; no width is half the one before it (see the refusals)."""
    networks = st.fixed_dictionaries(
        dict(
            dim=st.integers(1, 5),
            widths=st.lists(st.integers(2, 4).map(lambda n: 8 * n), min_size=1, max_size=3).map(tuple),
            embedding=st.sampled_from([4, 16]),
            observed=st.sampled_from([None, 1, 7]),
            kernel=st.sampled_from([1, 3, 5]),
            groups=st.sampled_from([1, 4, 8]),
            scale=st.booleans(),
            lerobot=st.booleans(),
        )
    )
    return networks.filter(lambda n: all(a != 2 * b for a, b in itertools.pairwise(n["widths"])))


@settings(max_examples=30)
@draws(options=architectures(), batch=st.integers(1, 3), more=st.integers(4, 6))
def test_it_is_the_module(options, batch, more):
    net, horizon = made(**options), more * 2 ** (len(options["widths"]) - 1)
    x, t, cond = given(net, batch, horizon)
    truth = exact(net, x, t, cond)
    wide = PolicyEngine(copy.deepcopy(net).double(), horizon=horizon, dtype=torch.float64)
    # groups of four numbers at least: of two that are nearly equal a norm makes 1 and -1, or -1 and 1, by the last bits
    assert (wide(x, t, global_cond=cond) - truth).abs().max() <= 1e-10 * (1 + truth.abs().max())
    x, t, cond = given(net, 32, horizon)
    truth = exact(net, x, t, cond)
    for dtype in DTYPES:
        fast = PolicyEngine(net, horizon=horizon, dtype=dtype)(x, t, global_cond=cond)
        low = copy.deepcopy(net).to(dtype)
        eager = low(x.to(dtype), t, global_cond=None if cond is None else cond.to(dtype))
        assert fast.dtype == dtype
        assert fast.shape == x.shape
        # The median trajectory: a group of a few almost equal numbers is a lottery of the last bits, for both.
        mine, theirs = ((y.double() - truth).square().mean((1, 2)).sqrt().median() for y in (fast, eager))
        assert mine <= 2 * theirs + {torch.float32: 5e-7, torch.bfloat16: 2**-8}[dtype]


@pytest.mark.parametrize("lerobot", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_larger_network(dtype, lerobot):
    """512 channels into a convolution: oneDNN's in two parts."""
    net = made(widths=(64, 128, 256), embedding=64, observed=20, lerobot=lerobot)
    engine = PolicyEngine(net, dtype=dtype)
    for batch, horizon in ((1, 16), (4, 16), (2, 32)):
        x, t, cond = given(net, batch, horizon)
        truth = exact(net, x, t, cond)
        low = copy.deepcopy(net).to(dtype)(x.to(dtype), t, global_cond=cond.to(dtype))
        assert rms(engine(x, t, global_cond=cond) - truth) <= 2 * rms(low - truth) + 5e-7 * rms(truth)


@pytest.mark.skipif(not has_onednn(), reason="the parts are for oneDNN")
@pytest.mark.parametrize("dtype, most", [(torch.float32, 3), (torch.bfloat16, 1.1)])
def test_a_long_sum_in_parts(dtype, most):
    """Of 2048 channels: whole with 4.4 times the error of nn.Conv1d in float32; in bfloat16 with the same."""
    torch.manual_seed(0)
    conv = nn.Conv1d(2048, 64, 5, padding=2).to(dtype).requires_grad_(False)
    conv.bias.zero_()
    x = torch.randn(8, 2048, 4, dtype=dtype)
    truth = copy.deepcopy(conv).double()(x.double())
    convolve = _in_parts(conv.weight[:, :, None], conv.bias, dtype, 1, 2)
    mine = convolve(x[:, :, None].contiguous(memory_format=torch.channels_last))[:, :, 0]
    assert rms(mine - truth) <= most * rms(conv(x) - truth)


def test_an_observation_once_for_all_steps():
    net = made(**SMALL)
    engine = PolicyEngine(net, horizon=8, dtype=torch.float32)
    x, t, cond = given(net)
    model = engine.condition(cond)
    assert torch.equal(model(x, t), engine(x, t, global_cond=cond))
    rows, other = model.rows.data_ptr(), 2 * cond
    model.observe(other)
    assert torch.equal(model(x, t), engine(x, t, global_cond=other))
    assert model.rows.data_ptr() == rows  # where a captured graph reads it
    cond.zero_()
    assert torch.equal(model(x, t), engine(x, t, global_cond=other))  # a copy
    for refused in (other[:2], other[:, :3]):
        with pytest.raises(InputError, match="global_cond has shape"):
            model.observe(refused)
    with pytest.raises(InputError, match="x has 2 trajectories, and there are 3 observations"):
        model(x[:2], t[:2])
    with pytest.raises(InputError, match="needed: none"):
        PolicyEngine(made(**SMALL | {"observed": None}), horizon=8).condition(cond)
    for refused in (None, cond[0], cond[0, 0]):
        for ask in (engine.condition, model.observe):
            with pytest.raises(InputError, match=r"give the observations, a tensor \[B, n\]"):
                ask(refused)
    assert not ConditionedPolicy(engine, other.requires_grad_()).rows.requires_grad


def test_the_forms_of_a_time_step():
    net = made(**SMALL)
    engine = PolicyEngine(net, horizon=8, dtype=torch.float32, steps=50)
    x, _, cond = given(net)
    for t in (7, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 0, 49]), torch.tensor([7, 50, 99]), 3.5, -2,
              torch.tensor([7, 0, 49], dtype=torch.int32), torch.tensor([0.5, 7.0, 20.0])):  # fmt: skip
        truth = exact(net, x, t, cond)
        assert (engine(x, t, global_cond=cond) - truth).abs().max() <= 1e-5 * truth.abs().max()
    with pytest.raises(InputError, match=r"t has shape \(2,\)"):
        engine(x, torch.tensor([1, 2]), global_cond=cond)


def test_a_number_beyond_the_table_where_tensors_are_not_looked_at(monkeypatch):
    net = made(**SMALL)
    engine = PolicyEngine(net, horizon=8, dtype=torch.float32, steps=50)
    x, _, cond = given(net)
    monkeypatch.setattr("fastddpm.engine.policy.film.tabled", lambda t, *_: t.dtype == torch.int64)  # as on a GPU
    for t in (49, 50, -1):
        truth = exact(net, x, t, cond)
        assert (engine(x, t, global_cond=cond) - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_a_gpu_is_asked_for_time_steps_of_the_table_only(monkeypatch):
    engine = PolicyEngine(made(**SMALL), horizon=8, steps=50)
    engine.check_timesteps([50])  # a CPU looks at them
    monkeypatch.setattr(PolicyEngine, "_trusts_t", True)
    model = engine.condition(given(made(**SMALL))[2])
    model.check_timesteps([49, 0])
    model.check_timesteps([50.5, 49])
    for wrong in ([50, 0], [49, -1]):
        with pytest.raises(InputError, match="this engine has those below 50"):
            model.check_timesteps(wrong)


def test_the_table_is_the_time_part():
    net = made(**SMALL)
    engine = PolicyEngine(net, horizon=8, dtype=torch.float64)
    film = engine.film
    emb = copy.deepcopy(net.diffusion_step_encoder[1:]).double()(
        net.diffusion_step_encoder[0](torch.arange(100)).double()
    )
    for residual in (net.down_modules[0][0], net.up_modules[0][1]):
        name = next(name for name, module in net.named_modules() if module is residual)
        layer = residual.cond_encoder[1]
        mine = film.table[:, engine.plan.lowered.time_names[f"{name}.cond_encoder.1"]]
        theirs = torch.nn.functional.mish(emb) @ layer.weight[:, :16].double().T + layer.bias.double()
        assert torch.allclose(mine, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("lerobot", [False, True])
def test_the_plan_has_every_weight_and_no_memory_twice(lerobot, scale):
    net = made(**SMALL, scale=scale, lerobot=lerobot)
    engine = PolicyEngine(net, batch=3, horizon=8)
    plan = engine.plan
    rest = [net.diffusion_step_encoder, *(m.cond_encoder for m in net.modules() if hasattr(m, "cond_encoder"))]
    rest = sum(p.numel() for module in rest for p in module.parameters())
    assert plan.weights + rest == sum(p.numel() for p in net.parameters())
    placed = [(plan.offsets[v.index], v.elements * 3 * 2, first, last) for v, first, last in uses(plan.lowered)]
    for i, (at, size, first, last) in enumerate(placed):
        assert at + size <= plan.memory
        for start, length, begin, end in placed[:i]:
            assert first > end or begin > last or at + size <= start or start + length <= at
    page = str(engine)
    assert "conv1d 5, 4 groups, Mish, + residual" in page
    assert f"conv1d 5, 4 groups, Mish, {'scale, ' if scale else ''}shift" in page
    assert "conv1d 3/2" in page
    assert "conv1d 4, transposed" in page
    assert "23 operations" in page


def test_the_plan_of_diffusion_policys_image_network():
    with torch.device("meta"):
        net = PolicyUnet(observed=1028)
    plan = Plan.of_lowered(lower(read(net), net, 16), 1, 2)
    weights = sum(p.numel() for p in net.parameters())
    assert round(weights / 1e6, 1) == 79.9
    assert round((weights - plan.weights) / 1e6, 1) == 18.9  # that leave the loop
    assert len(plan.lowered.operations) == 35
    with FlopCounterMode(display=False) as counter:
        net(
            torch.zeros(1, 16, 2, device="meta"),
            torch.zeros(1, device="meta"),
            None,
            torch.zeros(1, 1028, device="meta"),
        )
    # As torch counts: a transposed convolution's taps at each position of the input, and no norm, of 10 an element.
    norms = sum(10 * op.out.elements for op in plan.lowered.operations if op.norm)
    assert plan.flops - norms == counter.get_total_flops() - 2 * (weights - plan.weights - biases(net))


def biases(net):
    """Those of the layers that leave the loop, which are no products."""
    layers = [net.diffusion_step_encoder, *(m.cond_encoder for m in net.modules() if hasattr(m, "cond_encoder"))]
    return sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim == 1)


def replaced(path, layer, **options):
    """A network with another layer at `path`."""
    net = made(**SMALL, **options)
    *parents, name = path.split(".")
    net.get_submodule(".".join(parents)).register_module(name, layer)
    return net


REFUSED = {
    "local condition": (lambda: replaced("local_cond_encoder", nn.Linear(1, 1), lerobot=True), "local_cond_encoder"),
    "two inputs past a block": (lambda: made(**SMALL | {"widths": (16, 8)}), "two inputs pass"),
    "activation": (lambda: replaced("final_conv.0.block.2", nn.SiLU()), "is a SiLU; needed: Mish"),
    "film's activation": (lambda: replaced("mid_modules.0.cond_encoder.0", nn.ReLU()), "is a ReLU; needed: Mish"),
    "time's activation": (lambda: replaced("diffusion_step_encoder.2", nn.SiLU()), "is a SiLU; needed: Mish"),
    "norm": (lambda: replaced("mid_modules.0.blocks.1.block.1", nn.BatchNorm1d(24)), "is a BatchNorm1d"),
    "one more": (lambda: replaced("mid_modules.0.after", nn.Mish()), r"mid_modules.0 has \['after'"),
    "dropout": (lambda: replaced("mid_modules.1.blocks.0.block.3", nn.Dropout()), "mid_modules.1.blocks.0.block has"),
    "another head": (lambda: replaced("value_head", nn.Linear(1, 1)), "PolicyUnet has .*value_head"),
    "stride": (lambda: replaced("down_modules.0.2.conv", nn.Conv1d(16, 16, 3, 1, 1)), "stride 2"),
    "padding": (lambda: replaced("final_conv.0.block.0", nn.Conv1d(16, 16, 5, padding=1)), "padding half of it"),
    "circular": (
        lambda: replaced("final_conv.0.block.0", nn.Conv1d(16, 16, 5, padding=2, padding_mode="circular")),
        "padding half of it",
    ),
    "no bias": (lambda: replaced("final_conv.1", nn.Conv1d(16, 2, 1, bias=False)), "bias"),
    "dilation": (lambda: replaced("final_conv.1", nn.Conv1d(16, 2, 1, dilation=2)), "needed: kernel"),
    "growing": (lambda: replaced("up_modules.0.2.conv", nn.ConvTranspose1d(16, 16, 2, 2)), "kernel size 4"),
    "wrapped": (lambda: replaced("up_modules.0.2", Wrapped("up", nn.Mish())), r"needed: \['conv'\]"),
    "another network": (lambda: nn.Linear(1, 1), "Linear has"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_such_network_is_refused(name):
    build, said = REFUSED[name]
    with pytest.raises(InputError, match=said):
        PolicyEngine(build(), horizon=8)


def test_recognised():
    assert is_policy_unet(made(**SMALL))
    assert is_policy_unet(made(**SMALL, lerobot=True))
    assert not is_policy_unet(nn.Linear(1, 1))
    assert not is_policy_unet(print)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(dtype=torch.int8), "dtype is torch.int8"),
        (dict(batch=0), "batch is 0"),
        (dict(steps=True), "steps is True"),
        (dict(horizon=7), "horizon a multiple of 2"),
        (dict(horizon="8"), "horizon is '8'"),
    ],
)
def test_options_that_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        PolicyEngine(made(**SMALL), **dict(horizon=8) | options)


def test_inputs_that_are_refused():
    net = made(**SMALL)
    engine = PolicyEngine(net, horizon=8)
    x, t, cond = given(net)
    for wrong in (x[:, :7], x[..., :1], x[:, :0]):
        with pytest.raises(InputError, match="the network takes"):
            engine(wrong, t, global_cond=cond)
    with pytest.raises(InputError, match="batch, horizon, channels"):
        engine(x[0], t, global_cond=cond)
    with pytest.raises(InputError, match="no local_cond"):
        engine(x, t, global_cond=cond, local_cond=x)
    with pytest.raises(InputError, match="x is on meta, the engine on cpu"):
        engine(x.to("meta"), t, global_cond=cond)
    with pytest.raises(InputError, match=r"give global_cond, \[3, 6\]"):
        engine(x, t)
    with pytest.raises(InputError, match="needed: none: leave it out"):
        PolicyEngine(made(**SMALL | {"observed": None}), horizon=8)(x, t, global_cond=cond)


def test_it_keeps_its_weights_and_its_dtype():
    net = made(**SMALL)
    engine = PolicyEngine(net, horizon=8, dtype=torch.float32)
    x, t, cond = given(net)
    first = engine(x, t, global_cond=cond)
    wide = net.double()
    exactly = PolicyEngine(wide, horizon=8, dtype=torch.float64)
    same = exactly(x, t, global_cond=cond)
    for parameter in net.parameters():
        parameter.zero_()
    assert torch.equal(exactly(x, t, global_cond=cond), same)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(engine(x, t, global_cond=cond), first)
        model = engine.condition(cond)
        between = model(x, 3.5)  # computed, not in the table
    assert torch.equal(model(x, t), first)
    assert torch.equal(model(x, 3.5), between)
    assert torch.equal(engine(x.transpose(0, 1).contiguous().transpose(0, 1), t, global_cond=cond), first)
    assert torch.equal(engine(x.double(), t, global_cond=cond.double()), first)
    assert engine.float() is engine
    with pytest.raises(InputError, match=r"compile again with dtype=torch\.float64"):
        engine.double()
    with pytest.raises(InputError, match="compile again"):
        engine.condition(cond).half()


def test_it_is_copied_but_not_saved():
    net = made(**SMALL)
    x, t, cond = given(net)
    engine = PolicyEngine(net, horizon=8, dtype=torch.float32)
    model = engine.condition(cond)
    truth, told, other = model(x, t), copy.deepcopy(model), copy.deepcopy(engine)
    model.observe(2 * cond)
    engine.film.table.zero_()
    assert torch.equal(told(x, t), truth)
    assert torch.equal(other(x, t, global_cond=cond), truth)
    for made_of in (engine, model):
        with pytest.raises(InputError, match="save the UNet, and compile again"):
            pickle.dumps(made_of)
        with pytest.raises(InputError, match="load them into the UNet, and compile again"):
            made_of.load_state_dict(made_of.state_dict())


@pytest.mark.parametrize("kernels", [False, True])
def test_its_memory_is_free_once_nobody_has_it(kernels):
    net = made(**SMALL)
    x, t, cond = given(net)
    engine = PolicyEngine(net, horizon=8, dtype=torch.float32, kernels=kernels)
    engine(x, t, global_cond=cond)
    gone = weakref.ref(engine)
    gc.disable()  # it may take long to come
    try:
        del engine
        assert gone() is None
    finally:
        gc.enable()


def test_it_runs_without_triton():
    """On a CPU; in a process where it can't be imported."""
    code = """
import sys
sys.modules["triton"] = None
from policy_networks import SMALL, given, made
from fastddpm import engine
net = made(**SMALL)
x, t, cond = given(net)
print(engine.compile(net, horizon=8)(x, t, global_cond=cond).shape)
"""
    tests = Path(__file__).parent
    paths = os.pathsep.join(map(str, (tests, tests.parent, tests.parent / "kernels")))
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout == "torch.Size([3, 8, 2])\n", run.stderr[-2000:]


def test_a_sampler_over_it():
    net = made(**SMALL)
    table = solvers.ddim(NoiseSchedule.linear(100), 10)
    _, _, cond = given(net)
    engine = PolicyEngine(net, horizon=8, dtype=torch.float32)
    theirs = Sampler(net, table).sample((3, 8, 2), seeds=5, model_kwargs={"global_cond": cond})
    plain = Sampler(engine, table).sample((3, 8, 2), seeds=5, model_kwargs={"global_cond": cond})
    model = engine.condition(cond)
    once = Sampler(model, table)
    assert (plain - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert torch.equal(once.sample((3, 8, 2), seeds=5), plain)
    with pytest.raises(InputError, match="horizon a multiple of 2"):
        once.sample((3, 7, 2), seeds=5)


def test_the_policy_front_over_it():
    diffusers = pytest.importorskip("diffusers", reason="diffusers has the policies' schedulers")
    from fastddpm.integrations.diffusion_policy import conditional_sample

    scheduler = diffusers.DDIMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    net = made(**SMALL)
    _, _, cond = given(net)
    engine = PolicyEngine(net, horizon=8, dtype=torch.float32)
    theirs, ours, once = (
        conditional_sample(
            model, (3, 8, 2), scheduler, num_inference_steps=8, generator=torch.Generator().manual_seed(0), **more
        )
        for model, more in (
            (net, dict(global_cond=cond)),
            (engine, dict(global_cond=cond)),
            (engine.condition(cond), {}),
        )
    )
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert torch.equal(once, ours)


def test_the_policy_front_does_the_observations_part_once_a_call(monkeypatch):
    """Bit for bit what the engine gives that is told of them at each step; of several batch sizes, in any mode."""
    pytest.importorskip("diffusers", reason="diffusers has the policies' schedulers")
    from fastddpm.integrations.diffusion_policy import PolicySampler

    table = solvers.ddim(NoiseSchedule.linear(100), 5)
    engine = PolicyEngine(made(**SMALL), horizon=8, dtype=torch.float32)
    counted, plain = [], engine.film.observation

    def observation(batch, cond):
        counted.append(batch)
        return plain(batch, cond)

    monkeypatch.setattr(engine.film, "observation", observation)
    policy = PolicySampler(engine, table)
    for seed, batch in enumerate((3, 3, 1, 3)):
        _, _, cond = given(made(**SMALL), batch, seed=seed)
        told = Sampler(engine, table).sample((batch, 8, 2), seeds=seed, model_kwargs={"global_cond": cond})
        assert len(counted) == 5
        counted.clear()
        with torch.inference_mode(seed == 0):
            once = policy.sample((batch, 8, 2), seeds=seed, global_cond=cond)
        assert counted == [batch]
        counted.clear()
        assert torch.equal(once, told)
    with pytest.raises(InputError, match="3 trajectories, and there are 1 observations"):
        policy.sample((3, 8, 2), seeds=0, global_cond=cond[:1])
    with pytest.raises(InputError, match="no local_cond"):
        policy.sample((3, 8, 2), seeds=0, global_cond=cond, local_cond=torch.zeros(3, 8, 1))


def test_the_policy_front_in_threads():
    """Each has its own observations, in memory that both use."""
    pytest.importorskip("diffusers", reason="diffusers has the policies' schedulers")
    from fastddpm.integrations.diffusion_policy import PolicySampler

    net = made(**SMALL)
    policy = PolicySampler(PolicyEngine(net, horizon=8), solvers.ddim(NoiseSchedule.linear(100), 5))
    conds = [given(net, seed=seed)[2] for seed in range(2)]

    def draw(cond):
        return policy.sample((3, 8, 2), seeds=0, global_cond=cond)

    alone = [draw(cond) for cond in conds]
    with ThreadPoolExecutor(2) as pool:
        for i, drawn in enumerate(pool.map(draw, conds * 10)):
            assert torch.equal(drawn, alone[i % 2])


def test_the_policy_front_keeps_the_policys_precision():
    """Noise, what is known, and trajectories are as theirs, in the policy's dtype; the engine is bfloat16."""
    pytest.importorskip("diffusers", reason="diffusers has the policies' schedulers")
    from fastddpm.integrations.diffusion_policy import PolicySampler

    net, table = made(**SMALL), solvers.ddpm(NoiseSchedule.linear(100), 5)
    _, _, cond = given(net)
    data, mask = torch.randn(3, 8, 2), torch.zeros(3, 8, 2, dtype=torch.bool)
    for known in (None, mask, mask.index_fill(1, torch.arange(2), True)):
        theirs, ours = (
            PolicySampler(model, table).sample(
                (3, 8, 2), global_cond=cond, generator=torch.Generator().manual_seed(3),
                condition_data=None if known is None else data, condition_mask=known,
            )
            for model in (net, PolicyEngine(net, horizon=8))
        )  # fmt: skip
        assert ours.dtype == torch.float32
        assert known is None or torch.equal(ours[known], data[known])
        assert rms(ours - theirs) <= 0.05 * rms(theirs)
        assert not torch.equal(ours, ours.bfloat16().float())


def test_the_policy_front_leaves_another_models_condition_alone():
    pytest.importorskip("diffusers", reason="diffusers has the policies' schedulers")
    from fastddpm.integrations.diffusion_policy import PolicySampler

    net, table = made(**SMALL), solvers.ddim(NoiseSchedule.linear(100), 3)
    _, _, cond = given(net)
    plain = PolicySampler(net, table).sample((3, 8, 2), seeds=0, global_cond=cond)
    net.condition = nn.Linear(6, 6)
    assert torch.equal(PolicySampler(net, table).sample((3, 8, 2), seeds=0, global_cond=cond), plain)


@pytest.mark.parametrize(
    ("dtype", "lerobot", "scale"),
    [(torch.float32, False, True), (torch.bfloat16, True, False), (torch.float16, False, True)],
)
def test_by_the_kernel(dtype, lerobot, scale):
    net = made(**SMALL | {"widths": (40, 48)}, lerobot=lerobot, scale=scale)  # many sums in segments, in float32
    engine = PolicyEngine(net, horizon=8, dtype=dtype, kernels=True)
    for horizon, batch in ((8, 3), (6, 1)):
        x, t, cond = given(net, batch, horizon)
        truth = exact(net, x, t, cond)
        eager = copy.deepcopy(net).to(dtype)(x.to(dtype), t, global_cond=cond.to(dtype))
        fast = engine(x, t, global_cond=cond)
        assert fast.dtype == dtype
        assert fast.is_contiguous()
        assert fast.untyped_storage().nbytes() == fast.nbytes  # it keeps no other memory
        # Triton's interpreter truncates to bfloat16: a whole ulp at each store, where eager rounds.
        truncated = 2 if dtype == torch.bfloat16 else 1
        assert rms(fast - truth) <= 2 * truncated * rms(eager - truth) + 5e-7
        assert torch.equal(engine.condition(cond)(x, t), fast)


def test_by_the_kernel_a_trajectory_depends_neither_on_its_slot_nor_on_the_batch():
    net = made(**SMALL)
    engine = PolicyEngine(net, horizon=8, kernels=True)
    x, t, cond = given(net)
    whole = engine(x, t, global_cond=cond)
    order = [2, 0]
    assert torch.equal(engine(x[order], t[order], global_cond=cond[order]), whole[order])
    assert torch.equal(engine(x.mT.contiguous().mT, t, global_cond=cond), whole)  # whatever its strides


@pytest.mark.parametrize("kernels", [False, True])
def test_the_norms_own_eps(kernels):
    net = made(**SMALL)
    for layer in net.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.eps = 0.1
    x, t, cond = given(net, 1)
    truth = exact(net, x, t, cond)
    fast = PolicyEngine(net, horizon=8, dtype=torch.float32, kernels=kernels)(x, t, global_cond=cond)
    assert (fast - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_what_the_kernel_does_not_take():
    net = made(**SMALL)
    x, t, cond = given(net, 1, 66)
    with pytest.raises(InputError, match="horizon 66: compile with kernels=False"):
        PolicyEngine(net, horizon=8, kernels=True)(x, t, global_cond=cond)
    for options in (dict(horizon=66), dict(horizon=8, dtype=torch.float64)):
        with pytest.raises(InputError, match=r"the kernel takes no torch\.float64, horizon over 64"):
            PolicyEngine(net, kernels=True, **options)
        assert not PolicyEngine(net, **options)._own
    PolicyEngine(net, horizon=66)(x, t, global_cond=cond)


@pytest.mark.gpu
def test_a_graph_of_it_sees_the_next_observation():
    net = made(**SMALL).cuda()
    table = solvers.ddim(NoiseSchedule.linear(100), 5)
    cond = given(net)[2].cuda()
    model = PolicyEngine(net, horizon=8, dtype=torch.float32).condition(cond)
    sampler = Sampler(model, table, graph=True)
    for _ in range(3):
        eager = Sampler(model, table, graph=False).sample((3, 8, 2), seeds=1)
        assert torch.equal(sampler.sample((3, 8, 2), seeds=1), eager)
        model.observe(cond.normal_())
