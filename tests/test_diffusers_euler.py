"""The drop-in Euler, ancestral Euler and Heun schedulers against diffusers' own (written with 0.42.1).

Equal to the last bit on the CPU.
"""

import copy
import itertools
import pickle

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers isn't installed")
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import fastddpm  # noqa: E402
from fastddpm.errors import InputError  # noqa: E402
from fastddpm.integrations import diffusers as ours  # noqa: E402

PAIRS = {
    EulerDiscreteScheduler: ours.FusedEulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler: ours.FusedEulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler: ours.FusedHeunDiscreteScheduler,
}
NOISY = dict(s_churn=3.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.01)  # of the first, with 8 steps
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning")
each = pytest.mark.parametrize("stock, fused", PAIRS.items(), ids=[c.__name__ for c in PAIRS])
drawing = pytest.mark.parametrize("stock, fused", list(PAIRS.items())[:2], ids=[c.__name__ for c in list(PAIRS)[:2]])


def product(**choices):
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def outputs(
    scheduler, n=8, shape=(2, 3, 6, 5), dtype=torch.float32, m_dtype=None, seed=0, generator=None, given=None, **times
):
    """All that the steps of a trajectory return, with outputs of a model that are fixed."""
    scheduler.set_timesteps(n, **times)
    draw = torch.Generator().manual_seed(seed)
    x, made = (torch.randn(shape, generator=draw) * scheduler.init_noise_sigma).to(dtype), []
    given = dict(given or {})
    if not isinstance(scheduler, HeunDiscreteScheduler):
        given["generator"] = torch.Generator().manual_seed(seed + 1) if generator is None else generator
    for t in scheduler.timesteps:
        made.append(scheduler.scale_model_input(x, t))
        m = torch.randn(shape, generator=draw).to(m_dtype or dtype)
        before = m.clone(), x.clone()
        out = scheduler.step(m, t, x, **given)
        assert torch.equal(m, before[0])
        assert torch.equal(x, before[1])
        made += [out.prev_sample, out.pred_original_sample]
        fresh = out.pred_original_sample.data_ptr() not in (m.data_ptr(), x.data_ptr())
        assert fresh or scheduler.config.prediction_type.endswith("sample")
        x = out.prev_sample
    assert scheduler.step_index == len(scheduler.timesteps)
    return made


def assert_equal(stock, fused, config, **given):
    a, b = stock(**config), fused(**config)
    one, other = outputs(a, **given), outputs(b, **given)
    assert torch.equal(a.timesteps, b.timesteps)
    assert a.timesteps.dtype == b.timesteps.dtype
    assert torch.equal(a.sigmas, b.sigmas)
    for x, y in zip(one, other, strict=True):
        assert x.dtype == y.dtype
        assert x.stride() == y.stride()
        torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)


KINDS = ("epsilon", "v_prediction", "sample")
SIGMAS = ({}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True})


def kinds(stock):
    return KINDS[:2] if stock is EulerAncestralDiscreteScheduler else KINDS


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_euler_gives_what_stock_gives(beta_schedule):
    pytest.importorskip("scipy", reason="beta sigmas need scipy")
    for config in product(
        prediction_type=KINDS,
        timestep_spacing=["leading", "linspace", "trailing"],
        sigmas=[*SIGMAS, {"interpolation_type": "log_linear"}],
        rescale_betas_zero_snr=[False, True],
        final_sigmas_type=["zero", "sigma_min"],
        given=[{}, NOISY],
    ):
        config |= config.pop("sigmas")
        config["beta_schedule"] = beta_schedule
        given = config.pop("given")
        assert_equal(EulerDiscreteScheduler, ours.FusedEulerDiscreteScheduler, config, n=4, given=given)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_ancestral_euler_gives_what_stock_gives(beta_schedule):
    for config in product(
        prediction_type=KINDS[:2],
        timestep_spacing=["leading", "linspace", "trailing"],
        steps_offset=[0, 1],
        rescale_betas_zero_snr=[False, True],
        n=[1, 7],
    ):
        n = config.pop("n")
        config["beta_schedule"] = beta_schedule
        assert_equal(EulerAncestralDiscreteScheduler, ours.FusedEulerAncestralDiscreteScheduler, config, n=n)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "exp"])
def test_heun_gives_what_stock_gives(beta_schedule):
    pytest.importorskip("scipy", reason="beta sigmas need scipy")
    for config in product(
        prediction_type=KINDS,
        timestep_spacing=["leading", "linspace", "trailing"],
        sigmas=SIGMAS,
        clip_sample=[False, True],
    ):
        config |= config.pop("sigmas")
        config |= dict(beta_schedule=beta_schedule, num_train_timesteps=100)  # in its constructor it sets so many
        assert_equal(HeunDiscreteScheduler, ours.FusedHeunDiscreteScheduler, config, n=4)


@pytest.mark.parametrize(
    "config, times",
    [
        (dict(timestep_type="continuous", prediction_type="v_prediction"), {}),
        (dict(timestep_type="continuous"), {}),
        (dict(sigma_min=0.1, sigma_max=20.0, use_karras_sigmas=True), {}),
        (dict(prediction_type="original_sample"), {}),
        (dict(trained_betas=[0.01 * i for i in range(1, 51)], num_train_timesteps=50), {}),
        ({}, dict(n=None, timesteps=[900, 500, 499, 3])),
        ({}, dict(n=None, sigmas=[10.0, 4.0, 1.5, 0.2, 0.0])),
        (dict(final_sigmas_type="sigma_min"), dict(n=None, sigmas=[10.0, 4.0, 0.3])),
    ],
    ids=str,
)
def test_euler_in_other_configs(config, times):
    assert_equal(EulerDiscreteScheduler, ours.FusedEulerDiscreteScheduler, config, **times)
    assert_equal(EulerDiscreteScheduler, ours.FusedEulerDiscreteScheduler, config, **times, given=NOISY)


def test_heun_with_other_time_steps():
    for times in (dict(n=1), dict(n=None, timesteps=[900, 500, 499, 3]), dict(n=10, num_train_timesteps=500)):
        assert_equal(HeunDiscreteScheduler, ours.FusedHeunDiscreteScheduler, {}, **times)


@pytest.mark.parametrize("given", [dict(s_churn=-1.0), dict(s_churn=1e9, s_noise=0.0), dict(s_churn=1e-9)], ids=str)
def test_churn_at_its_bounds(given):
    assert_equal(EulerDiscreteScheduler, ours.FusedEulerDiscreteScheduler, {}, given=given)


def test_churn_that_changes_from_step_to_step():
    made = []
    for scheduler in (EulerDiscreteScheduler(), ours.FusedEulerDiscreteScheduler()):
        scheduler.set_timesteps(6)
        torch.manual_seed(0)
        x = torch.randn(2, 3, 4, 4)
        for i, t in enumerate(scheduler.timesteps):
            m = 0.3 * scheduler.scale_model_input(x, t)
            x = scheduler.step(m, t, x, s_churn=float(i % 3), s_tmin=0.1 * i).prev_sample
        made.append(x)
    assert torch.equal(*made)


@each
def test_dtypes(stock, fused):
    """Half precision is diffusers' own; so is a mix of dtypes, but for a model's output in float32 or float64."""
    every = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for dtype, m_dtype, kind in itertools.product(every, every, kinds(stock)):
        assert_equal(stock, fused, dict(prediction_type=kind), dtype=dtype, m_dtype=m_dtype, n=4)
    if stock is EulerDiscreteScheduler:
        for dtype in every:
            assert_equal(stock, fused, {}, dtype=dtype, given=NOISY)


@each
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 16, 7), (2, 3, 4, 5, 6), (1, 3, 33, 1)], ids=str)
def test_odd_shapes(stock, fused, shape):
    assert_equal(stock, fused, {}, shape=shape)


@each
def test_layouts_stay(stock, fused):
    """Those of the sample and the output, alike or not."""
    make = [
        lambda v: v.contiguous(),
        lambda v: v.contiguous(memory_format=torch.channels_last),
        lambda v: v.permute(3, 2, 1, 0),
    ]
    for of_m, of_x in itertools.product(make, make):
        m, x = of_m(torch.randn(4, 4, 4, 4)), of_x(torch.randn(4, 4, 4, 4))
        made = []
        for scheduler in (stock(), fused()):
            scheduler.set_timesteps(5)
            torch.manual_seed(0)
            for t in scheduler.timesteps[:2]:
                out = scheduler.step(m, t, scheduler.scale_model_input(x, t))
                made.append((out.prev_sample, out.pred_original_sample))
        for one, other in zip(*made[::2], strict=True), zip(*made[1::2], strict=True):
            for a, b in (one, other):
                assert torch.equal(a, b)
                assert a.stride() == b.stride()


@drawing
def test_generators(stock, fused):
    """One, a list of them, and the global one: the same draws, and left in the same state."""
    given = NOISY if stock is EulerDiscreteScheduler else {}
    made = []
    for scheduler in (stock(), fused()):
        several = [torch.Generator().manual_seed(i) for i in range(2)]
        one = torch.Generator().manual_seed(7)
        runs = outputs(scheduler, generator=several, given=given) + outputs(scheduler, generator=one, given=given)
        torch.manual_seed(3)
        scheduler.set_timesteps(5)
        x = torch.ones(2, 3, 4, 4)
        for t in scheduler.timesteps:
            x = scheduler.step(0.1 * scheduler.scale_model_input(x, t), t, x, **given, return_dict=False)[0]
        made.append([*runs, x, torch.rand(3)] + [torch.rand(3, generator=g) for g in (*several, one)])
    for a, b in zip(*made, strict=True):
        assert torch.equal(a, b)


@each
def test_forward_process(stock, fused):
    a, b = stock(), fused()
    x, z = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    for steps in (None, 10):
        for scheduler in (a, b) if steps else ():
            scheduler.set_timesteps(steps)
        at = a.timesteps[[0, 4, 7]]
        assert torch.equal(a.add_noise(x, z, at), b.add_noise(x, z, at))
        assert torch.equal(a.add_noise(x, z, a.timesteps[2:5]), b.add_noise(x, z, b.timesteps[2:5]))
        if hasattr(a, "get_velocity"):
            assert torch.equal(a.get_velocity(x, z, at), b.get_velocity(x, z, at))
    for scheduler in (a, b):
        scheduler.set_begin_index(3)
    assert torch.equal(a.add_noise(x, z, at), b.add_noise(x, z, at))
    assert torch.equal(a.init_noise_sigma, b.init_noise_sigma)


@each
def test_before_time_steps_are_set_and_off_the_schedule(stock, fused):
    m, x = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    made = []
    for scheduler in (stock(), fused()):
        t = scheduler.timesteps[300]
        torch.manual_seed(0)
        scaled = scheduler.scale_model_input(x, t)
        made.append([scaled, scheduler.step(m, t, scaled, return_dict=False)[0]])
        scheduler.set_timesteps(10)
        with pytest.raises(IndexError):
            scheduler.scale_model_input(x, 333.5)
        assert scheduler.step_index is None
    for one, other in zip(*made, strict=True):
        assert torch.equal(one, other)


@each
def test_what_diffusers_refuses(stock, fused):
    for scheduler in (stock(), fused()):
        scheduler.set_timesteps(10)
        x = torch.randn(2, 1, 3, 3)
        if stock is not HeunDiscreteScheduler:
            for t in (999, torch.tensor(999), torch.tensor(999, dtype=torch.int32)):
                with pytest.raises(ValueError, match="integer indices"):
                    scheduler.step(x, t, x)
        else:
            assert scheduler.step(x, 999, x).prev_sample.shape == x.shape
        scheduler = type(scheduler)(prediction_type="flow")
        scheduler.set_timesteps(10)
        with pytest.raises(ValueError, match="prediction_type"):
            scheduler.step(x, scheduler.timesteps[0], x)
    for made in (stock, fused) if stock is EulerAncestralDiscreteScheduler else ():
        scheduler = made(prediction_type="sample")
        scheduler.set_timesteps(10)
        with pytest.raises(NotImplementedError):
            scheduler.step(x, scheduler.timesteps[0], scheduler.scale_model_input(x, scheduler.timesteps[0]))


@each
def test_a_trajectory_from_the_middle(stock, fused):
    """Image to image: with `set_begin_index`, and without; duplicates among the time steps too."""
    for steps, begin, as_items in itertools.product((20, 999), (None, 6, 7), (True, False)):
        made = []
        for scheduler in (stock(), fused()):
            scheduler.set_timesteps(steps)
            if begin is not None:
                scheduler.set_begin_index(begin)
            torch.manual_seed(0)
            x = torch.randn(1, 2, 3, 3)
            for t in scheduler.timesteps[7:12]:
                t = t if as_items else float(t) if begin else t.clone()
                x = scheduler.step(0.5 * scheduler.scale_model_input(x, t), t, x).prev_sample
            made.append((x, scheduler.step_index, scheduler.begin_index))
        assert torch.equal(made[0][0], made[1][0])
        assert made[0][1:] == made[1][1:]


@each
def test_indices_are_stocks(stock, fused):
    """Of items, of copies, of numbers; where a time step is there twice; in another tensor."""
    configs = [{}] if stock is EulerAncestralDiscreteScheduler else [{}, dict(use_karras_sigmas=True)]
    for config, n in itertools.product(configs, (10, 1000)):
        a, b = stock(**config), fused(**config)
        for scheduler in (a, b):
            scheduler.set_timesteps(n)
        for i in (0, 1, 2, 7, n - 1):
            expected = a.index_for_timestep(a.timesteps[i])
            t = b.timesteps[i]
            for given in (t, t.clone(), float(t), t[None], b.timesteps[i : i + 1], t.double()):
                assert b.index_for_timestep(given) == expected
            assert b.index_for_timestep(t, b.timesteps) == expected
            assert b.index_for_timestep(t, b.timesteps.clone()) == expected


@each
def test_a_changed_scheduler_is_noticed(stock, fused):
    made = []
    for scheduler in (stock(), fused()):
        scheduler.set_timesteps(10)
        torch.manual_seed(0)
        m, x = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
        for change in (
            lambda s: s.register_to_config(prediction_type="v_prediction"),
            lambda s: setattr(s, "sigmas", s.sigmas * 1.1),
            lambda s: setattr(s, "timesteps", s.timesteps - 0.5),
            lambda s: s.sigmas.mul_(0.9),
            lambda s: s.timesteps.add_(0.25),
            lambda s: setattr(s, "_step_index", 7),
        ):
            t = scheduler.timesteps[scheduler.step_index or 0]
            x = scheduler.step(m, t, scheduler.scale_model_input(x, t)).prev_sample
            change(scheduler)
        made.append(scheduler.step(m, scheduler.timesteps[7], x).prev_sample)
    assert torch.equal(*made)


@each
def test_the_same_time_steps_again(stock, fused):
    """Nothing is made anew; but it is where anything was changed."""
    a, b = stock(), fused()
    for scheduler in (a, b):
        scheduler.set_timesteps(5)
    before = b._plan
    assert before is not None
    outputs(b, n=5)
    assert b._plan is before
    for change in (
        lambda s: s.timesteps.add_(0.25),
        lambda s: s.sigmas.mul_(1.1),
        lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod**0.9),
        lambda s: s.register_to_config(prediction_type="v_prediction"),
        lambda s: s.set_timesteps(6),
        lambda s: s.set_timesteps(5, "cpu"),
    ):
        for scheduler in (a, b):
            change(scheduler)
        for one, other in zip(outputs(a, n=5), outputs(b, n=5), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(a.timesteps, b.timesteps)
        assert torch.equal(a.sigmas, b.sigmas)


@each
def test_gradients_pass(stock, fused):
    made = []
    for scheduler, kind in itertools.product((stock, fused), kinds(stock)):
        scheduler = scheduler(prediction_type=kind)
        scheduler.set_timesteps(5)
        torch.manual_seed(0)
        m, x = (torch.randn(2, 1, 3, 3, requires_grad=True) for _ in range(2))
        y = x
        for t in scheduler.timesteps[:2]:
            y = scheduler.step(m * scheduler.scale_model_input(y, t), t, y).prev_sample
        y.square().sum().backward()
        made.append((m.grad, x.grad))
    n = len(made) // 2
    for one, other in zip(made[:n], made[n:], strict=True):
        torch.testing.assert_close(other, one)


@each
def test_time_steps_that_were_set_in_inference_mode(stock, fused):
    """Where diffusers' own may raise."""
    made = []
    for scheduler, mode in ((fused(), True), (stock(), False)):
        with torch.inference_mode(mode):
            scheduler.set_timesteps(5)
        torch.manual_seed(0)
        x, t = torch.ones(1, 2, 3, 3, requires_grad=True), scheduler.timesteps[1]
        scheduler.step(x * x, t, scheduler.scale_model_input(x, t)).pred_original_sample.sum().backward()
        made.append(x.grad)
    torch.testing.assert_close(made[1], made[0])


def test_heun_changes_hands_between_its_two_calls(monkeypatch):
    """Either call by the kernel, by torch, or by diffusers, in any order; and a sample that was changed in between."""
    fused, dtypes = ours.FusedHeunDiscreteScheduler, {"torch": torch.float32, "diffusers": torch.float64}
    for order in itertools.product(("kernel", "torch", "diffusers"), repeat=2):
        made = []
        for scheduler in (HeunDiscreteScheduler(), fused()):
            scheduler.set_timesteps(5)
            torch.manual_seed(0)
            x = torch.randn(2, 3, 4, 4)
            for t, who in zip(scheduler.timesteps, [*order, *order], strict=False):
                monkeypatch.setattr(fused, "_kernel_devices", ("cpu",) if who == "kernel" else ())
                m = 0.7 * scheduler.scale_model_input(x, t)
                x = 0.9 * scheduler.step(m.to(dtypes.get(who)), t, x).prev_sample
            made.append((x, scheduler.state_in_first_order))
        torch.testing.assert_close(made[1][0], made[0][0], rtol=1e-5, atol=1e-5)
        assert made[0][1] == made[1][1]


# --- the kernel's rows, on the CPU ------------------------------------------------------------------------------------


@each
def test_the_kernels_rows_say_the_same(stock, fused, monkeypatch):
    """As on CUDA: `reverse_step`, whose CPU implementation is the reference of the kernel."""
    monkeypatch.setattr(fused, "_kernel_devices", ("cpu",))
    used = []
    through = fused._step_by_kernel
    monkeypatch.setattr(fused, "_step_by_kernel", lambda *args, **given: used.append(1) or through(*args, **given))
    many = [{}, dict(clip_sample=True)] if stock is HeunDiscreteScheduler else [{}, dict(rescale_betas_zero_snr=True)]
    given = [{}, NOISY] if stock is EulerDiscreteScheduler else [{}]
    for config, more, kind in itertools.product(many, given, kinds(stock)):
        config = config | {"prediction_type": kind}
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
            used.clear()
            one, other = (outputs(s(**config), dtype=dtype, n=6, given=more) for s in (stock, fused))
            assert len(used) == len(one) // 3
            for a, b in zip(one, other, strict=True):
                assert a.dtype == b.dtype
                highest = 2e4 if "rescale_betas_zero_snr" in config else 700.0  # of x, which the first differences have
                assert float((a.double() - b.double()).abs().max()) <= tolerance * highest


@each
def test_the_kernel_keeps_layouts(stock, fused, monkeypatch):
    monkeypatch.setattr(fused, "_kernel_devices", ("cpu",))
    for make in (lambda v: v.contiguous(memory_format=torch.channels_last), lambda v: v.permute(3, 2, 1, 0)):
        m, x = (make(torch.randn(4, 5, 6, 7)) for _ in range(2))
        made = []
        for scheduler in (stock(), fused()):
            scheduler.set_timesteps(5)
            torch.manual_seed(0)
            for t in scheduler.timesteps[:2]:
                out = scheduler.step(m, t, scheduler.scale_model_input(x, t)).prev_sample
            made.append(out)
        torch.testing.assert_close(*made, rtol=1e-4, atol=1e-4)
        assert made[0].stride() == made[1].stride()


# --- no waiting -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("begin", [None, 2])
@pytest.mark.parametrize("kernel", [False, True])
@each
def test_no_step_waits_for_the_device(stock, fused, kernel, begin, monkeypatch):
    if kernel:
        monkeypatch.setattr(fused, "_kernel_devices", ("cpu",))
    x = torch.randn(2, 3, 4, 4)
    counts = []
    for scheduler in (fused(), stock()):
        scheduler.set_timesteps(10)
        if begin is not None:
            scheduler.set_begin_index(begin)
        with Waits() as waits:
            for t in scheduler.timesteps[begin:]:
                scheduler.step(scheduler.scale_model_input(x, t), t, x)
        counts.append(len(waits.names))
    assert counts[0] == 0
    assert counts[1] > 0 or begin is not None  # so that the test would see some


@each
def test_what_diffusers_does_itself_does_not_search(stock, fused):
    scheduler = fused()
    scheduler.set_timesteps(10)
    x = torch.randn(2, 3, 4, 4).half()
    with Waits() as waits:
        for t in scheduler.timesteps:
            scheduler.step(scheduler.scale_model_input(x, t), t, x)
    assert "nonzero" not in waits.names


@each
def test_compiled_code_is_one_frame(stock, fused):
    from torch._dynamo.testing import CompileCounter

    for given in ({}, NOISY) if stock is EulerDiscreteScheduler else ({},):
        scheduler = fused()

        def start(scheduler=scheduler):
            scheduler.set_timesteps(4)
            scheduler.set_begin_index(0)
            torch.manual_seed(0)

        def trajectory(x, scheduler=scheduler, given=given):
            for t in scheduler.timesteps:
                x = scheduler.step(0.3 * scheduler.scale_model_input(x, t), t, x, **given, return_dict=False)[0]
            return x

        x = torch.randn(2, 3, 4, 4)
        start()
        expected = trajectory(x)  # Euler's plan knows the churn from here on
        torch._dynamo.reset()
        counter = CompileCounter()
        start()
        assert torch.equal(torch.compile(trajectory, backend=counter, fullgraph=True)(x), expected)
        assert counter.frame_count == 1


# --- counter-based noise ----------------------------------------------------------------------------------------------


@drawing
def test_counter_noise_belongs_to_the_sample(stock, fused, monkeypatch):
    given = NOISY if stock is EulerDiscreteScheduler else {}
    scheduler = fused()
    x, m = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)

    def run(seeds, rows):
        scheduler.use_counter_noise(seeds)
        scheduler.set_timesteps(5)
        y = x[rows]
        for t in scheduler.timesteps:
            scheduler.scale_model_input(y, t)
            y = scheduler.step(m[rows], t, y, **given).prev_sample
        return y

    together = run([5, 6, 7], slice(None))
    assert torch.equal(run([6], slice(1, 2)), together[1:2])
    assert not torch.equal(run([8], slice(1, 2)), together[1:2])
    monkeypatch.setattr(fused, "_kernel_devices", ("cpu",))
    torch.testing.assert_close(run([5, 6, 7], slice(None)), together, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="2 seeds were given for 3"):
        run([1, 2], slice(None))
    scheduler.use_counter_noise(0)
    with pytest.raises(InputError, match="generator"):
        scheduler.step(m, scheduler.timesteps[0], x, generator=torch.Generator(), **given)
    monkeypatch.setattr(fused, "_kernel_devices", ())
    with pytest.raises(InputError, match="diffusers itself"):
        scheduler.step(m.half(), scheduler.timesteps[1], x.half(), **given)


def test_counter_noise_is_the_samplers():
    """The same trajectory as `fastddpm.Sampler`'s from the same seeds."""
    scheduler = ours.FusedEulerAncestralDiscreteScheduler()
    scheduler.use_counter_noise([3, 4])
    scheduler.set_timesteps(10)
    x_T = torch.randn(2, 1, 4, 4) * scheduler.init_noise_sigma
    x = x_T
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * scheduler.scale_model_input(x, t), t, x).prev_sample
    schedule = fastddpm.NoiseSchedule.linear()
    table = fastddpm.solvers.euler_ancestral(schedule, 10, spacing="linspace", quantize=False)
    there = fastddpm.Sampler(lambda y, t: 0.1 * y, table).sample((2, 1, 4, 4), seeds=[3, 4], x_T=x_T)
    torch.testing.assert_close(x, there, rtol=1e-3, atol=1e-3)


# --- as an object of diffusers ----------------------------------------------------------------------------------------


@each
def test_config_saving_and_copies(stock, fused, tmp_path):
    for other in (diffusers.DDIMScheduler, diffusers.PNDMScheduler, *PAIRS):
        made, expected = (c.from_config(other(beta_end=0.01).config) for c in (fused, stock))
        ignored = ("_class_name", "_use_default_values")
        same = [{k: v for k, v in s.config.items() if k not in ignored} for s in (made, expected)]
        assert same[0] == same[1]
    scheduler = fused(num_train_timesteps=500)
    scheduler.save_pretrained(tmp_path)
    assert fused.from_pretrained(tmp_path).config.num_train_timesteps == 500
    assert stock.from_pretrained(tmp_path).config.num_train_timesteps == 500
    assert isinstance(scheduler, stock)
    assert set(stock().compatibles) == set(scheduler.compatibles)
    assert fused.__module__ == "fastddpm.integrations.diffusers"
    scheduler.set_timesteps(5)
    x = torch.randn(1, 2, 3, 3)
    twins = copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler)), scheduler
    made = []
    for twin in twins:
        torch.manual_seed(0)
        y = x
        for t in twin.timesteps:
            y = twin.step(0.1 * twin.scale_model_input(y, t), t, y).prev_sample
        made.append(y)
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[1], made[2])
