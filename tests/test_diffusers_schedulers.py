"""The drop-in schedulers against diffusers' own (written with 0.42.1): equal to the last bit on the CPU."""

import copy
import itertools
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

diffusers = pytest.importorskip("diffusers", reason="diffusers isn't installed")
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel  # noqa: E402

from fastddpm.errors import InputError  # noqa: E402
from fastddpm.integrations import diffusers as ours  # noqa: E402

PAIRS = {
    DDPMScheduler: ours.FusedDDPMScheduler,
    DDIMScheduler: ours.FusedDDIMScheduler,
    DPMSolverMultistepScheduler: ours.FusedDPMSolverMultistepScheduler,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning", "ignore:invalid value:RuntimeWarning")
each = pytest.mark.parametrize("stock, fused", PAIRS.items(), ids=[c.__name__ for c in PAIRS])
KINDS = ("epsilon", "sample", "v_prediction")


def product(**choices):
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def outputs(scheduler, shape=(2, 3, 6, 5), dtype=torch.float32, n=5, seed=0, as_ints=False, generator=None, **given):
    """All that the steps of a trajectory return, with a fixed model."""
    scheduler.set_timesteps(n)
    draw = torch.Generator().manual_seed(seed)
    x, made = torch.randn(shape, generator=draw, dtype=torch.float32).to(dtype), []
    channels = 2 if getattr(scheduler, "variance_type", "") in ("learned", "learned_range") else 1
    if generator is None:
        generator = torch.Generator().manual_seed(seed + 1)
    for t in scheduler.timesteps.tolist() if as_ints else scheduler.timesteps:
        m = torch.randn((shape[0], channels * shape[1], *shape[2:]), generator=draw).to(dtype)
        before = m.clone(), x.clone()
        out = scheduler.step(m, t, x, generator=generator, **given)
        assert torch.equal(m, before[0])
        assert torch.equal(x, before[1])
        made.append(out.prev_sample)
        if "pred_original_sample" in out:
            made.append(out.pred_original_sample)
            fresh = out.pred_original_sample.data_ptr() not in (m.data_ptr(), x.data_ptr())
            assert fresh or channels == 2 or type(scheduler) in PAIRS  # diffusers may return the output itself
        x = out.prev_sample.nan_to_num(0.0, 1.0, -1.0).clamp(-10, 10)
    return made


def assert_equal(stock, fused, config, **given):
    a, b = stock(**config), fused(**config)
    one, other = outputs(a, **given), outputs(b, **given)
    assert torch.equal(a.timesteps, b.timesteps)
    for x, y in zip(one, other, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)


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


@each
def test_layouts_stay(stock, fused):
    for make in (lambda v: v.contiguous(memory_format=torch.channels_last), lambda v: v.permute(3, 2, 1, 0)):
        m, x = (make(torch.randn(4, 4, 4, 4)) for _ in range(2))
        made = []
        for scheduler in (stock(), fused()):
            scheduler.set_timesteps(5)
            torch.manual_seed(0)
            made.append(scheduler.step(m, scheduler.timesteps[2], x).prev_sample)
        assert torch.equal(*made)
        assert made[0].stride() == made[1].stride()


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
        return
    with pytest.raises(ValueError, match="set_timesteps"):
        fused().step(m, 700, x)
    a, b = stock(), fused()
    for scheduler in (a, b):
        scheduler.set_timesteps(10)
    assert torch.equal(a.step(m, 333, x).prev_sample, b.step(m, 333, x).prev_sample)


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


def test_a_changed_scheduler_is_noticed():
    a, b = DDPMScheduler(), ours.FusedDDPMScheduler()
    m, x = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    for scheduler in (a, b):
        scheduler.set_timesteps(10)
        scheduler.step(m, 900, x)
        scheduler.register_to_config(prediction_type="v_prediction")
        scheduler.variance_type = "fixed_large"
        scheduler.alphas_cumprod = scheduler.alphas_cumprod**0.9
    one, other = (s.step(m, 900, x, generator=torch.Generator().manual_seed(0)).prev_sample for s in (a, b))
    assert torch.equal(one, other)


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
    monkeypatch.setattr(fused, "_step_by_kernel", lambda *args: used.append(1) or through(*args))
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


@pytest.mark.parametrize("kernel", [False, True])
@each
def test_no_step_waits_for_the_device(stock, fused, kernel, monkeypatch):
    if kernel:
        monkeypatch.setattr(fused, "_kernel_devices", ("cpu",))
    x = torch.randn(2, 3, 4, 4)
    counts = []
    for scheduler in (fused(), stock()):
        scheduler.set_timesteps(10)
        with Waits() as waits:
            for t in scheduler.timesteps:
                scheduler.step(x, t, x)
        counts.append(len(waits.names))
    assert counts[0] == 0
    assert counts[1] > 0  # so that the test would see some


@each
def test_what_diffusers_does_itself_waits_neither(stock, fused):
    config = {"variance_type": "learned"} if stock is not DDIMScheduler else {"prediction_type": "epsilon"}
    scheduler = fused(**config)
    scheduler.set_timesteps(10)
    x = torch.randn(2, 3, 4, 4).half()
    m = torch.cat([x, x], dim=1) if stock is DDPMScheduler else x
    with Waits() as waits:
        for t in scheduler.timesteps:
            scheduler.step(m, t, x)
    assert not [name for name in waits.names if name != "_to_copy"]


@each
def test_compiled_code_is_one_frame(stock, fused):
    from torch._dynamo.testing import CompileCounter

    for config in ({"algorithm_type": "sde-dpmsolver++"}, {}) if stock is DPMSolverMultistepScheduler else ({},):
        scheduler = fused(**config)

        def start(scheduler=scheduler):
            scheduler.set_timesteps(4)
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(0)
            torch.manual_seed(0)

        def trajectory(x, scheduler=scheduler):
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


# --- counter-based noise ----------------------------------------------------------------------------------------------


@each
def test_counter_noise_belongs_to_the_sample(stock, fused, monkeypatch):
    config = {"algorithm_type": "sde-dpmsolver++"} if stock is DPMSolverMultistepScheduler else {}
    given = {"eta": 1.0} if stock is DDIMScheduler else {}
    scheduler = fused(**config)
    x, m = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)

    def run(seeds, rows):
        scheduler.use_counter_noise(seeds)
        scheduler.set_timesteps(5)
        y = x[rows]
        for t in scheduler.timesteps:
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
    with pytest.raises(InputError, match="seed is -1"):
        scheduler.use_counter_noise(-1)
    assert "seeds" not in str(scheduler.config)


def test_counter_noise_is_the_samplers():
    """The same trajectory as `fastddpm.Sampler`'s from the same seeds."""
    import fastddpm

    scheduler = ours.FusedDDPMScheduler()
    scheduler.use_counter_noise([3, 4])
    scheduler.set_timesteps(10)
    x_T = torch.randn(2, 1, 4, 4)
    x = x_T
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * x, t, x).prev_sample
    table = fastddpm.solvers.ddpm(fastddpm.NoiseSchedule.linear(), 10, clip=1.0)
    there = fastddpm.Sampler(lambda y, t: 0.1 * y, table).sample((2, 1, 4, 4), seeds=[3, 4], x_T=x_T)
    torch.testing.assert_close(x, there, rtol=1e-4, atol=1e-4)


def test_a_refusal_where_diffusers_draws():
    scheduler = ours.FusedDDPMScheduler(variance_type="learned")
    scheduler.use_counter_noise(0)
    scheduler.set_timesteps(5)
    with pytest.raises(InputError, match="diffusers itself"):
        scheduler.step(torch.randn(1, 6, 4, 4), 800, torch.randn(1, 3, 4, 4))


# --- as an object of diffusers ----------------------------------------------------------------------------------------


@each
def test_config_saving_and_copies(stock, fused, tmp_path):
    for other in (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, diffusers.EulerDiscreteScheduler):
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
    for twin in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        made = [
            s.step(x, int(s.timesteps[0]), x, generator=torch.Generator().manual_seed(0)) for s in (twin, scheduler)
        ]
        scheduler.set_timesteps(5)
        assert torch.equal(made[0].prev_sample, made[1].prev_sample)


def test_a_pipeline_saves_and_loads_it(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    pipe = DDPMPipeline(unet, DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def picture(pipe):
        pipe.set_progress_bar_config(disable=True)
        draw = torch.Generator().manual_seed(0)
        return pipe(num_inference_steps=4, generator=draw, output_type="np").images

    expected = picture(pipe)
    pipe.scheduler = ours.FusedDDPMScheduler.from_config(pipe.scheduler.config)
    assert (picture(pipe) == expected).all()
    pipe.save_pretrained(tmp_path)
    again = DDPMPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is ours.FusedDDPMScheduler
    assert abs(picture(again) - expected).max() < 1e-4
