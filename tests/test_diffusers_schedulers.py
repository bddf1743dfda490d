"""The drop-in schedulers against diffusers' own (written with 0.42.1): equal to the last bit on the CPU."""

import copy
import itertools

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers isn't installed")
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from schedulers import KINDS, Waits, assert_equal, each, outputs, product  # noqa: F401 (Waits is for other tests)

from fastddpm.integrations import diffusers as ours

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning", "ignore:invalid value:RuntimeWarning")


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_ddpm_gives_what_stock_gives(beta_schedule):
    for config in product(
        variance_type=["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"],
        prediction_type=KINDS,
        limit=["none", "clip", "threshold"],
        timestep_spacing=["leading", "linspace", "trailing"],
        rescale_betas_zero_snr=[False, True],
    ):
        limit = config.pop("limit")
        config |= dict(clip_sample=limit == "clip", thresholding=limit == "threshold", sample_max_value=1.5)
        assert_equal(DDPMScheduler, ours.FusedDDPMScheduler, config | {"beta_schedule": beta_schedule}, n=2)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_ddim_gives_what_stock_gives(beta_schedule):
    for config in product(
        prediction_type=KINDS,
        limit=["none", "clip", "threshold"],
        timestep_spacing=["leading", "linspace", "trailing"],
        rescale_betas_zero_snr=[False, True],
        set_alpha_to_one=[False, True],
        steps=[dict(), dict(eta=0.3, use_clipped_model_output=True)],
    ):
        limit = config.pop("limit")
        given = config.pop("steps")
        config |= dict(clip_sample=limit == "clip", thresholding=limit == "threshold", sample_max_value=1.5)
        assert_equal(DDIMScheduler, ours.FusedDDIMScheduler, config | {"beta_schedule": beta_schedule}, n=2, **given)


@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"])
def test_dpm_solver_gives_what_stock_gives(algorithm):
    for config in product(
        solver_order=[1, 2, 3],
        solver_type=["midpoint", "heun"],
        prediction_type=KINDS,
        thresholding=[False, True],
        lower_order_final=[False, True],
        n=[5, 16],
    ):
        if algorithm == "sde-dpmsolver" and config["solver_order"] == 3:
            continue  # diffusers has none
        final = "zero" if algorithm.endswith("++") else "sigma_min"
        config |= dict(algorithm_type=algorithm, final_sigmas_type=final)
        n = config.pop("n")
        assert_equal(DPMSolverMultistepScheduler, ours.FusedDPMSolverMultistepScheduler, config, n=n)


@pytest.mark.parametrize(
    "config",
    [
        dict(use_karras_sigmas=True),
        dict(use_exponential_sigmas=True),
        dict(use_beta_sigmas=True),
        dict(use_lu_lambdas=True),
        dict(use_flow_sigmas=True, prediction_type="flow_prediction"),
        dict(euler_at_final=True),
        dict(final_sigmas_type="sigma_min"),
        dict(beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1),
        dict(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        dict(timestep_spacing="leading", steps_offset=1),
        dict(variance_type="learned"),
        dict(solver_type="bh1", algorithm_type="deis", final_sigmas_type="sigma_min"),
    ],
    ids=str,
)
def test_dpm_solver_in_other_configs(config):
    if config.get("use_beta_sigmas"):
        pytest.importorskip("scipy", reason="beta sigmas need scipy")
    assert_equal(DPMSolverMultistepScheduler, ours.FusedDPMSolverMultistepScheduler, config, n=8)


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(stock, fused, dtype):
    assert_equal(stock, fused, {}, dtype=dtype)


@each
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 16, 7), (2, 3, 4, 5, 6), (1, 3, 33, 1)], ids=str)
def test_odd_shapes_and_int_time_steps(stock, fused, shape):
    assert_equal(stock, fused, {}, shape=shape, as_ints=True)


@pytest.mark.parametrize("given", [dict(eta=0.5), dict(use_clipped_model_output=True)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_ddim_with_noise_or_clipped_outputs(kind, given):
    assert_equal(DDIMScheduler, ours.FusedDDIMScheduler, dict(prediction_type=kind), **given)
    a, b, z = DDIMScheduler(), ours.FusedDDIMScheduler(), torch.randn(2, 3, 4, 4)
    for scheduler in (a, b):
        scheduler.set_timesteps(10)
    one, other = (s.step(z, 500, z, eta=0.5, variance_noise=z, return_dict=False) for s in (a, b))
    assert torch.equal(one[0], other[0])
    with pytest.raises(ValueError, match="Cannot pass both"):
        b.step(z, 500, z, eta=0.5, variance_noise=z, generator=torch.Generator())


LAYOUTS = (
    lambda v: v,
    lambda v: v.contiguous(memory_format=torch.channels_last),
    lambda v: v.transpose(2, 3),
    lambda v: v[:1].expand_as(v),
    lambda v: torch.stack([v, v], dim=-1)[..., 0],
)


@each
def test_layouts_stay(stock, fused):
    for one, other in itertools.product(LAYOUTS, LAYOUTS):
        for kind in KINDS:
            m, x = one(torch.randn(2, 3, 4, 4)), other(torch.randn(2, 3, 4, 4))
            made = []
            for scheduler in (stock(prediction_type=kind), fused(prediction_type=kind)):
                scheduler.set_timesteps(5)
                torch.manual_seed(0)
                made.append([*scheduler.step(m, scheduler.timesteps[2], x).values()])
            for a, b in zip(*made, strict=True):
                assert torch.equal(a, b)
                assert a.stride() == b.stride()


@each
def test_generators(stock, fused):
    """One, a list of them, and the global one: the same draws, and left in the same state."""
    config = {"algorithm_type": "sde-dpmsolver++"} if stock is DPMSolverMultistepScheduler else {}
    given = {"eta": 1.0} if stock is DDIMScheduler else {}
    made = []
    for scheduler in (stock(**config), fused(**config)):
        several = [torch.Generator().manual_seed(i) for i in range(2)]
        one = torch.Generator().manual_seed(7)
        runs = outputs(scheduler, generator=several, **given) + outputs(scheduler, generator=one, **given)
        made.append(runs + [torch.rand(3, generator=g) for g in (*several, one)])
    for a, b in zip(*made, strict=True):
        assert torch.equal(a, b)


@each
def test_forward_process(stock, fused):
    a, b = stock(), fused()
    x, z, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 500, 999])
    for steps in (None, 10):
        for scheduler in (a, b) if steps else ():
            scheduler.set_timesteps(steps)
        at = t if steps is None else a.timesteps[:3]
        assert torch.equal(a.add_noise(x, z, at), b.add_noise(x, z, at))
        assert torch.equal(a.scale_model_input(x, 3), b.scale_model_input(x, 3))
    if hasattr(a, "get_velocity"):
        assert torch.equal(a.get_velocity(x, z, t), b.get_velocity(x, z, t))


@each
def test_before_time_steps_are_set_and_off_the_schedule(stock, fused):
    m, x = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    if stock is DDPMScheduler:
        torch.manual_seed(0)
        expected = stock().step(m, 700, x).prev_sample
        torch.manual_seed(0)
        assert torch.equal(fused().step(m, 700, x).prev_sample, expected)
        assert said(stock(), m, 300.7, x) == said(fused(), m, 300.7, x)
        return
    with pytest.raises(ValueError, match="set_timesteps"):
        fused().step(m, 700, x)
    for t in (333, 333.7, torch.tensor(333.7), torch.tensor([333, 333])):
        assert said(stock(), m, t, x) == said(fused(), m, t, x)


def said(scheduler, m, t, x):
    """The step's result, or the error's kind."""
    scheduler.set_timesteps(10)
    try:
        return scheduler.step(m, t, x).prev_sample.tolist()
    except (IndexError, RuntimeError) as error:
        return type(error)


def test_custom_time_steps():
    a, b = DDPMScheduler(), ours.FusedDDPMScheduler()
    m, x = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    for scheduler in (a, b):
        scheduler.set_timesteps(timesteps=[900, 500, 499, 3])
    for t in a.timesteps:
        assert a.previous_timestep(t) == b.previous_timestep(int(t))
        one, other = (s.step(m, t, x, generator=torch.Generator().manual_seed(0)) for s in (a, b))
        assert torch.equal(one.prev_sample, other.prev_sample)


def test_a_trajectory_from_the_middle():
    """Image to image: with `set_begin_index`, and without; duplicates among the time steps too."""
    for steps, begin in ((20, None), (20, 7), (999, None)):
        made = []
        for scheduler in (DPMSolverMultistepScheduler(), ours.FusedDPMSolverMultistepScheduler()):
            scheduler.set_timesteps(steps)
            if begin is not None:
                scheduler.set_begin_index(begin)
            torch.manual_seed(0)
            x = torch.randn(1, 2, 3, 3)
            for t in scheduler.timesteps[7:12]:
                x = scheduler.step(x * 0.5, t, x).prev_sample
            made.append((x, scheduler.step_index))
        assert torch.equal(made[0][0], made[1][0])
        assert made[0][1] == made[1][1]


@each
def test_gradients_pass(stock, fused):
    made = []
    for scheduler in (stock(), fused()):
        scheduler.set_timesteps(5)
        torch.manual_seed(0)
        m, x = (torch.randn(2, 1, 3, 3, requires_grad=True) for _ in range(2))
        scheduler.step(m, scheduler.timesteps[1], x).prev_sample.square().sum().backward()
        made.append((m.grad, x.grad))
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(other, one)


@each
def test_transforms_of_functions(stock, fused):
    """torch.func: a batch of one of the two inputs, and derivatives."""
    many, one, made = torch.randn(5, 2, 1, 3, 3), torch.randn(2, 1, 3, 3), []
    for scheduler in (stock(), fused()):
        scheduler.set_timesteps(5)

        def step(m, x, scheduler=scheduler):
            return copy.copy(scheduler).step(m, 0, x).prev_sample

        made.append([torch.func.vmap(step, (0, None))(many, one), torch.func.vmap(step, (None, 0))(one, many)])
        made[-1] += torch.func.grad(lambda m, x, step=step: step(m, x).square().sum(), (0, 1))(one, many[0])
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(b, a)


# --- the kernel's rows, on the CPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@each
def test_the_kernels_rows_say_the_same(stock, fused, kind, clip, monkeypatch):
    """As on CUDA: `reverse_step`, whose CPU implementation is the reference of the kernel."""
    sde = [("dpmsolver", 2), ("dpmsolver++", 3), ("sde-dpmsolver++", 2), ("sde-dpmsolver++", 3), ("sde-dpmsolver", 2)]
    configs = [dict(clip_sample=clip)]
    if stock is DPMSolverMultistepScheduler:
        ends = {True: "zero", False: "sigma_min"}
        configs = [dict(algorithm_type=a, solver_order=o, final_sigmas_type=ends["++" in a]) for a, o in sde]
    given = [dict(eta=0.0), dict(eta=0.7)] if stock is DDIMScheduler else [{}]
    monkeypatch.setattr(fused, "_kernel_devices", ("cpu",))
    used = []
    through = fused._step_by_kernel
    monkeypatch.setattr(fused, "_step_by_kernel", lambda *args, **given: used.append(1) or through(*args, **given))
    for config, more in itertools.product(configs, given):
        config["prediction_type"] = kind
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 4e-3)):
            one, other = (outputs(s(**config), dtype=dtype, n=6, **more) for s in (stock, fused))
            for a, b in zip(one, other, strict=True):
                assert a.dtype == b.dtype
                scale = float(a.abs().max()) + (10.0 if kind == "v_prediction" else 160.0)  # divided by what is small
                assert float((a.double() - b.double()).abs().max()) <= tolerance * scale
    assert used


@each
def test_the_kernel_keeps_layouts(stock, fused, monkeypatch):
    monkeypatch.setattr(fused, "_kernel_devices", ("cpu",))
    for make in (lambda v: v.contiguous(memory_format=torch.channels_last), lambda v: v.permute(3, 2, 1, 0)):
        m, x = (make(torch.randn(4, 5, 6, 7)) for _ in range(2))
        made = []
        for scheduler in (stock(), fused()):
            scheduler.set_timesteps(5)
            torch.manual_seed(0)
            made.append(scheduler.step(m, scheduler.timesteps[2], x).prev_sample)
        torch.testing.assert_close(*made, rtol=1e-5, atol=1e-5)
        assert made[0].stride() == made[1].stride()
