"""The drop-in UniPC against diffusers' own (written with 0.42.1): equal to the last bit on the CPU."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers isn't installed")
from diffusers import UniPCMultistepScheduler  # noqa: E402
from test_diffusers_schedulers import KINDS, Waits, product  # noqa: E402

from fastddpm.integrations.diffusers import FusedUniPCMultistepScheduler  # noqa: E402

PAIR = (UniPCMultistepScheduler, FusedUniPCMultistepScheduler)
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning", "ignore:invalid value:RuntimeWarning")


def samples(scheduler, shape=(2, 3, 6, 5), dtype=torch.float32, n=6, as_ints=False, rounded=None, **given):
    """The samples of a trajectory with a fixed model, `rounded` before it has the dtype; or the error that ends it."""
    scheduler.set_timesteps(n, **given)
    draw = torch.Generator().manual_seed(0)
    x, made = torch.randn(shape, generator=draw).to(rounded or dtype).to(dtype), []
    for t in scheduler.timesteps.tolist() if as_ints else scheduler.timesteps:
        m = torch.randn(shape, generator=draw).to(rounded or dtype).to(dtype)
        before = m.clone(), x.clone()
        try:
            out = scheduler.step(m, t, x).prev_sample
        except (RuntimeError, IndexError) as error:
            return [*made, type(error)]
        assert torch.equal(m, before[0])
        assert torch.equal(x, before[1])
        assert out.data_ptr() not in (m.data_ptr(), x.data_ptr())
        made.append(out)
        x = out.nan_to_num(0.0, 1.0, -1.0).clamp(-10, 10)
    return made


def assert_same(config, rtol=0.0, atol=0.0, **given):
    a, b = (s(**config) for s in PAIR)
    one, other = samples(a, **given), samples(b, **given)
    assert len(one) == len(other)
    assert torch.equal(a.timesteps, b.timesteps)
    assert (a.step_index, a.lower_order_nums, a.this_order) == (b.step_index, b.lower_order_nums, b.this_order)
    for x, y in zip(one, other, strict=True):
        if isinstance(x, type):
            assert x is y
            continue
        assert x.dtype == y.dtype
        assert x.stride() == y.stride()
        torch.testing.assert_close(y, x, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_it_gives_what_stock_gives(order, solver_type, predict_x0):
    for config in product(
        prediction_type=KINDS,
        thresholding=[False, True],
        lower_order_final=[True, False],
        disable_corrector=[[], [0, 2]],
        final_sigmas_type=["zero", "sigma_min"],
    ):
        assert_same(config | dict(solver_order=order, solver_type=solver_type, predict_x0=predict_x0), n=5)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_in_any_schedule(beta_schedule):
    for config in product(
        timestep_spacing=["linspace", "leading", "trailing"],
        rescale_betas_zero_snr=[False, True],
        sigmas=[{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}],
        solver_order=[2, 3],
        prediction_type=["epsilon", "v_prediction"],
    ):
        assert_same(config.pop("sigmas") | config | {"beta_schedule": beta_schedule, "steps_offset": 1}, n=4)


@pytest.mark.parametrize(
    "config",
    [
        dict(use_flow_sigmas=True, prediction_type="flow_prediction"),
        dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, solver_order=3),
        dict(use_flow_sigmas=True, prediction_type="flow_prediction", use_karras_sigmas=True),
        dict(use_flow_sigmas=True, prediction_type="flow_prediction", shift_terminal=0.1),
        dict(prediction_type="flow_prediction"),
        dict(use_beta_sigmas=True),
        dict(solver_type="midpoint"),
        dict(solver_order=4),
        dict(solver_order=5, lower_order_final=False, final_sigmas_type="sigma_min"),
        dict(trained_betas=[0.01] * 100, num_train_timesteps=100),
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_other_configs(config, n):
    if config.get("use_beta_sigmas"):
        pytest.importorskip("scipy", reason="beta sigmas need scipy")
    assert_same(config, n=n)


def test_given_sigmas_and_dynamic_shifting():
    flow = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
    for config, given in (
        (flow, dict(sigmas=np.array([1.0, 0.8, 0.3, 0.1]))),
        (flow | dict(use_dynamic_shifting=True), dict(sigmas=np.array([0.9, 0.5, 0.2]), mu=0.7)),
        (flow | dict(use_dynamic_shifting=True, time_shift_type="linear"), dict(mu=0.7)),
    ):
        assert_same(config, **given)
    with pytest.raises(ValueError, match="mu"):
        FusedUniPCMultistepScheduler(use_dynamic_shifting=True).set_timesteps(5)


def test_with_another_schedulers_predictor():
    made = []
    for scheduler in PAIR:
        given = scheduler(solver_p=diffusers.DDIMScheduler())
        made.append(samples(given))
    for x, y in zip(*made, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, order):
    assert_same(dict(solver_order=order), dtype=dtype)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 16, 7), (2, 3, 4, 5, 6), (1, 3, 33, 1), (4, 2)], ids=str)
def test_odd_shapes_and_int_time_steps(shape, order):
    assert_same(dict(solver_order=order), shape=shape, as_ints=True)


@pytest.mark.parametrize("order", [2, 3])
def test_layouts_stay(order):
    for make, kept in itertools.product(
        (lambda v: v.contiguous(memory_format=torch.channels_last), lambda v: v.permute(3, 2, 1, 0)), (True, False)
    ):
        torch.manual_seed(0)
        m, x = make(torch.randn(4, 4, 4, 4)), torch.randn(4, 4, 4, 4)
        x, made = make(x) if kept else x, []
        for stock_or_ours in PAIR:
            scheduler = stock_or_ours(solver_order=order)
            scheduler.set_timesteps(5)
            y = x
            for t in scheduler.timesteps:
                y = scheduler.step(m, t, y).prev_sample
            made.append(y)
        assert torch.equal(*made)
        assert made[0].stride() == made[1].stride()


def test_a_trajectory_from_the_middle():
    """Image to image: with `set_begin_index`, and without; duplicates among the time steps too."""
    for steps, begin, config in (
        (20, None, {}),
        (20, 7, {}),
        (999, None, {}),
        (60, None, {"use_karras_sigmas": True}),  # with time steps that are there twice
    ):
        made = []
        for stock_or_ours in PAIR:
            scheduler = stock_or_ours(solver_order=3, **config)
            scheduler.set_timesteps(steps)
            if begin is not None:
                scheduler.set_begin_index(begin)
            torch.manual_seed(0)
            x, z = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3)
            x = scheduler.add_noise(x, z, scheduler.timesteps[7:8])
            for t in scheduler.timesteps[-13:-1] if config else scheduler.timesteps[7:12]:
                x = scheduler.step(x * 0.5, t, x).prev_sample
            made.append((x, scheduler.step_index, scheduler.add_noise(x, z, scheduler.timesteps[7:8])))
        for one, other in zip(*made, strict=True):
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_what_somebody_changes_is_noticed():
    """The corrector's list, the kind of prediction, the samples between the steps, the end of the time steps."""
    made = []
    for stock_or_ours in PAIR:
        scheduler = stock_or_ours(solver_order=3, lower_order_final=False, final_sigmas_type="sigma_min")
        scheduler.set_timesteps(6)
        torch.manual_seed(0)
        x = torch.randn(2, 1, 3, 3)
        for i, t in enumerate(scheduler.timesteps):
            if i == 2:
                scheduler.disable_corrector = [1]
            if i == 3:
                scheduler.predict_x0 = False
            if i == 4:
                scheduler.register_to_config(prediction_type="v_prediction")
            if i == 5:
                scheduler.sigmas = scheduler.sigmas * 1.1
            x = scheduler.step(torch.randn_like(x), t, x).prev_sample + 0.1
        made.append(x)
        with pytest.raises(IndexError):
            scheduler.step(x, t, x)
    assert torch.equal(*made)
    with pytest.raises(ValueError, match="set_timesteps"):
        FusedUniPCMultistepScheduler().step(x, 700, x)


def test_a_replaced_method_is_called():
    class Mine:
        def convert_model_output(self, model_output, *args, **given):
            return super().convert_model_output(model_output, *args, **given) * 0.5

    one, other = (samples(type("Own", (Mine, s), {})()) for s in PAIR)
    assert torch.equal(one[-1], other[-1])
    assert not torch.equal(one[-1], samples(PAIR[0]())[-1])


def test_gradients_pass():
    for order in (1, 2, 3):
        made = []
        for stock_or_ours in PAIR:
            scheduler = stock_or_ours(solver_order=order)
            scheduler.set_timesteps(5)
            torch.manual_seed(0)
            m, x = (torch.randn(2, 1, 3, 3, requires_grad=True) for _ in range(2))
            y = x
            for i, t in enumerate(scheduler.timesteps):
                y = scheduler.step(m * (i + y), t, y).prev_sample
            y.square().sum().backward()
            made.append((m.grad, x.grad))
        for one, other in zip(*made, strict=True):
            torch.testing.assert_close(other, one)


@pytest.mark.parametrize("kind", [*KINDS, "flow_prediction"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_kernels_rows_say_the_same(order, kind, monkeypatch):
    """As on CUDA: `reverse_step`, whose CPU implementation is the reference of the kernel."""
    monkeypatch.setattr(FusedUniPCMultistepScheduler, "_kernel_devices", ("cpu",))
    used, through = [], FusedUniPCMultistepScheduler._step_by_kernel
    monkeypatch.setattr(
        FusedUniPCMultistepScheduler,
        "_step_by_kernel",
        lambda *args, **given: used.append(1) or through(*args, **given),
    )
    for config in product(
        predict_x0=[True] if kind == "flow_prediction" else [True, False],
        solver_type=["bh1", "bh2"],
        disable_corrector=[[], [1, 2]],
    ):
        config |= dict(solver_order=order, prediction_type=kind, final_sigmas_type="sigma_min")
        config |= dict(use_flow_sigmas=kind == "flow_prediction")
        used.clear()
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 1e-3)):
            one, other = (samples(s(**config), dtype=dtype) for s in PAIR)
            exact = samples(UniPCMultistepScheduler(**config), dtype=torch.float64, rounded=dtype)
            for a, b, there in zip(one, other, exact, strict=True):
                assert a.dtype == b.dtype
                errors = [float((v.double() - there).abs().max()) for v in (a, b)]
                scale = float(there.abs().max())
                assert errors[1] <= 2 * errors[0] + tolerance * (scale + 30), (config, dtype)
        corrected = 3 if config["disable_corrector"] else 5
        assert len(used) == 2 * (6 + corrected)
    made = [samples(s(solver_order=order), dtype=torch.float16, n=30) for s in PAIR]  # and over many steps
    torch.testing.assert_close(made[1][-1], made[0][-1], rtol=0.05, atol=0.05)


def test_where_a_level_has_no_numbers_diffusers_is_asked(monkeypatch):
    """bh1 that ends at sigma 0 gives NaN there, in the dtype that diffusers gives it in."""
    monkeypatch.setattr(FusedUniPCMultistepScheduler, "_kernel_devices", ("cpu",))
    for dtype in (torch.float32, torch.float16):
        one, other = (samples(s(solver_type="bh1"), dtype=dtype)[-1] for s in PAIR)
        assert one.isnan().all()
        assert other.isnan().all()
        assert one.dtype == other.dtype


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_no_step_waits_for_the_device(order, kernel, monkeypatch):
    if kernel:
        monkeypatch.setattr(FusedUniPCMultistepScheduler, "_kernel_devices", ("cpu",))
    x, counts = torch.randn(2, 3, 4, 4), []
    for stock_or_ours in PAIR[::-1]:
        scheduler = stock_or_ours(solver_order=order)
        scheduler.set_timesteps(10)
        with Waits() as waits:
            for t in scheduler.timesteps:
                scheduler.step(x, t, x)
        counts.append(len(waits.names))
    assert counts[0] == 0
    assert counts[1] > 0  # so that the test would see some


@pytest.mark.parametrize("order", [2, 3])
def test_compiled_code_is_one_frame(order):
    from torch._dynamo.testing import CompileCounter

    scheduler = FusedUniPCMultistepScheduler(solver_order=order)

    def start():
        scheduler.set_timesteps(5)
        scheduler.set_begin_index(0)

    def trajectory(x):
        for t in scheduler.timesteps:
            x = scheduler.step(0.3 * x, t, x, return_dict=False)[0]
        return x

    x = torch.randn(2, 3, 4, 4)
    torch._dynamo.reset()
    counter = CompileCounter()
    start()
    made = torch.compile(trajectory, backend=counter, fullgraph=True)(x)
    start()
    assert torch.equal(made, trajectory(x))
    assert counter.frame_count == 1


def test_config_saving_and_copies(tmp_path):
    for other in (diffusers.DDPMScheduler, diffusers.DPMSolverMultistepScheduler, diffusers.EulerDiscreteScheduler):
        made, expected = (c.from_config(other(beta_end=0.01).config) for c in PAIR)
        ignored = ("_class_name", "_use_default_values")
        same = [{k: v for k, v in s.config.items() if k not in ignored} for s in (made, expected)]
        assert same[0] == same[1]
    scheduler = FusedUniPCMultistepScheduler(num_train_timesteps=500, solver_order=3)
    scheduler.save_pretrained(tmp_path)
    for stock_or_ours in PAIR:
        assert stock_or_ours.from_pretrained(tmp_path).config.num_train_timesteps == 500
    assert isinstance(scheduler, UniPCMultistepScheduler)
    assert set(UniPCMultistepScheduler().compatibles) == set(scheduler.compatibles)
    assert FusedUniPCMultistepScheduler.__module__ == "fastddpm.integrations.diffusers"
    scheduler.set_timesteps(5)
    x = torch.randn(1, 2, 3, 3)
    scheduler.step(x, scheduler.timesteps[0], x)
    twins = [copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler)), scheduler]
    made = [s.step(x, int(s.timesteps[1]), x).prev_sample for s in twins]
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[1], made[2])
