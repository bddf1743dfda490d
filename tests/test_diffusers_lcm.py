"""The drop-in LCM scheduler against diffusers' own (written with 0.42.1): equal to the last bit on the CPU."""

import copy
import pickle

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers isn't installed")
from diffusers import LCMScheduler  # noqa: E402
from diffusers.schedulers import scheduling_lcm  # noqa: E402
from test_diffusers_schedulers import KINDS, Waits, product  # noqa: E402

from fastddpm.errors import InputError  # noqa: E402
from fastddpm.integrations.diffusers import FusedLCMScheduler  # noqa: E402

PAIR = (LCMScheduler, FusedLCMScheduler)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def outputs(scheduler, shape=(2, 3, 6, 5), dtype=torch.float32, n=4, as_ints=False, noise=None, rounded=None, **given):
    """(prev_sample, denoised) of each step of a trajectory with a fixed model, `rounded` before it has the dtype."""
    scheduler.set_timesteps(n, **given)
    draw, noise = generator(), generator(1) if noise is None else noise
    x, made = torch.randn(shape, generator=draw).to(rounded or dtype).to(dtype), []
    for t in scheduler.timesteps.tolist() if as_ints else scheduler.timesteps:
        m = torch.randn(shape, generator=draw).to(rounded or dtype).to(dtype)
        before = m.clone(), x.clone()
        out = scheduler.step(m, t, x, generator=noise)
        assert torch.equal(m, before[0])
        assert torch.equal(x, before[1])
        made += [out.prev_sample, out.denoised]
        x = out.prev_sample.nan_to_num(0.0, 1.0, -1.0).clamp(-10, 10)
    return made


def assert_same(config, **given):
    a, b = (s(**config) for s in PAIR)
    one, other = outputs(a, **given), outputs(b, **given)
    assert torch.equal(a.timesteps, b.timesteps)
    assert a.step_index == b.step_index
    for x, y in zip(one, other, strict=True):
        assert x.dtype == y.dtype
        assert x.stride() == y.stride()
        torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_it_gives_what_stock_gives(beta_schedule):
    for config in product(
        prediction_type=KINDS,
        limit=["none", "clip", "threshold"],
        set_alpha_to_one=[False, True],
        rescale_betas_zero_snr=[False, True],
        timestep_scaling=[10.0, 3],
        n=[1, 4, 7],
        as_ints=[False, True],  # diffusers scales an int in double precision, and a tensor in float32
    ):
        limit, n, as_ints = (config.pop(name) for name in ("limit", "n", "as_ints"))
        config |= dict(clip_sample=limit == "clip", thresholding=limit == "threshold", sample_max_value=1.5)
        assert_same(config | {"beta_schedule": beta_schedule}, n=n, as_ints=as_ints)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "given",
    [
        dict(original_inference_steps=20),
        dict(strength=0.5),
        dict(n=None, timesteps=[999, 700, 500, 3]),
        dict(n=None, timesteps=[999, 700, 500, 3], strength=0.5),  # whose last step adds noise there
        dict(n=None, timesteps=[999, 700, 500, 3], strength=0.0),
    ],
    ids=str,
)
def test_arguments_of_set_timesteps(given):
    assert_same({}, **given)


def test_errors_of_set_timesteps_are_diffusers():
    for given in (dict(), dict(num_inference_steps=4, timesteps=[999]), dict(num_inference_steps=60)):
        with pytest.raises(ValueError, match="num_inference_steps"):
            FusedLCMScheduler().set_timesteps(**given)
    with pytest.raises(ValueError, match="set_timesteps"):
        FusedLCMScheduler().step(torch.zeros(1), 999, torch.zeros(1))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, clip):
    for as_ints in (False, True):
        assert_same(dict(clip_sample=clip), dtype=dtype, as_ints=as_ints)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 16, 7), (2, 3, 4, 5, 6), (1, 3, 33, 1), (4, 2)], ids=str)
def test_odd_shapes(shape):
    assert_same({}, shape=shape)


def test_layouts_stay():
    for make in (lambda v: v.contiguous(memory_format=torch.channels_last), lambda v: v.permute(3, 2, 1, 0)):
        torch.manual_seed(0)
        m, x, made = make(torch.randn(4, 4, 4, 4)), torch.randn(4, 4, 4, 4), []
        for scheduler in (s() for s in PAIR):
            for a, b in ((m, make(x)), (m, x), (x, m)):
                scheduler.set_timesteps(5)
                made.append(scheduler.step(a, scheduler.timesteps[0], b, generator=generator()).prev_sample)
        for one, other in zip(made[:3], made[3:], strict=True):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()


def test_generators():
    """One, a list of them, and the global one: the same draws, and left in the same state."""
    made = []
    for scheduler in (s() for s in PAIR):
        several, one = [generator(i) for i in range(2)], generator(7)
        runs = outputs(scheduler, noise=several) + outputs(scheduler, noise=one)
        scheduler.set_timesteps(2)
        torch.manual_seed(3)
        x = torch.ones(2, 3, 4)
        runs += [scheduler.step(x, t, x).prev_sample for t in scheduler.timesteps]
        made.append(runs + [torch.rand(3, generator=g) for g in (*several, one)] + [torch.rand(2)])
    for a, b in zip(*made, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("begin", [None, 3])
def test_a_trajectory_from_the_middle(begin):
    made = []
    for scheduler in (s() for s in PAIR):
        scheduler.set_timesteps(8)
        if begin is not None:
            scheduler.set_begin_index(begin)
        torch.manual_seed(0)
        x, z = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3)
        x = scheduler.add_noise(x, z, scheduler.timesteps[3:4])
        for t in scheduler.timesteps[3:]:
            x = scheduler.step(x * 0.5, t, x).prev_sample
        made.append((x, scheduler.step_index, scheduler.get_velocity(x, z, scheduler.timesteps[3:4])))
    for one, other in zip(*made, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_time_steps_off_the_schedule_and_changes_are_noticed():
    """A time step that isn't the next one, as an int, a tensor, a tensor [1]; another alpha_bar; another config."""
    made = []
    for scheduler in (s() for s in PAIR):
        scheduler.set_timesteps(6)
        scheduler.set_begin_index(0)
        torch.manual_seed(0)
        x = torch.randn(2, 1, 3, 3)
        steps = [333, torch.tensor(400), scheduler.timesteps[:1], scheduler.timesteps[3], scheduler.timesteps[0]]
        for i, t in enumerate(steps):
            if i == 3:
                scheduler.alphas_cumprod = scheduler.alphas_cumprod**0.9
                scheduler.register_to_config(prediction_type="v_prediction")
            x = scheduler.step(torch.randn_like(x), t, x).prev_sample
        made.append(x)
        with pytest.raises(IndexError):
            scheduler.index_for_timestep(7)
    assert torch.equal(*made)


def test_a_replaced_method_is_called():
    class Mine:
        def get_scalings_for_boundary_condition_discrete(self, timestep):
            return 0.25, 0.5

    one, other = (outputs(type("Own", (Mine, s), {})()) for s in PAIR)
    assert torch.equal(one[-1], other[-1])


def test_gradients_pass():
    made = []
    for scheduler in (s() for s in PAIR):
        scheduler.set_timesteps(3)
        torch.manual_seed(0)
        m, x = (torch.randn(2, 1, 3, 3, requires_grad=True) for _ in range(2))
        y = x
        for t in scheduler.timesteps:
            y = scheduler.step(m * y, t, y, generator=generator()).prev_sample
        y.square().sum().backward()
        made.append((m.grad, x.grad))
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_rows_say_the_same(kind, clip, monkeypatch):
    """As on CUDA: `reverse_step`, whose CPU implementation is the reference of the kernel; one launch a step."""
    monkeypatch.setattr(FusedLCMScheduler, "_kernel_devices", ("cpu",))
    used, through = [], FusedLCMScheduler._step_by_kernel
    monkeypatch.setattr(
        FusedLCMScheduler, "_step_by_kernel", lambda *args, **given: used.append(1) or through(*args, **given)
    )
    config = dict(prediction_type=kind, clip_sample=clip, timestep_scaling=0.01)  # so that c_skip is felt
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 1e-3)):
        one, other = (outputs(s(**config), dtype=dtype) for s in PAIR)
        with monkeypatch.context() as patch:  # the same noise in float64
            drawn = scheduling_lcm.randn_tensor
            patch.setattr(
                scheduling_lcm,
                "randn_tensor",
                lambda *args, dtype, to=dtype, drawn=drawn, **given: drawn(*args, dtype=to, **given).to(dtype),
            )
            exact = outputs(LCMScheduler(**config), dtype=torch.float64, rounded=dtype)
        for a, b, there in zip(one, other, exact, strict=True):
            assert a.dtype == b.dtype
            errors = [float((v.double() - there).abs().max()) for v in (a, b)]
            assert errors[1] <= 2 * errors[0] + tolerance * (float(there.abs().max()) + 10), dtype
    assert len(used) == 8


@pytest.mark.parametrize("kernel", [False, True])
def test_no_step_waits_for_the_device(kernel, monkeypatch):
    if kernel:
        monkeypatch.setattr(FusedLCMScheduler, "_kernel_devices", ("cpu",))
    x, counts = torch.randn(2, 3, 4, 4), []
    for scheduler in (s() for s in PAIR[::-1]):
        scheduler.set_timesteps(10)
        with Waits() as waits:
            for t in scheduler.timesteps:
                scheduler.step(x, t, x)
        counts.append(len(waits.names))
    assert counts[0] == 0
    assert counts[1] > 0  # so that the test would see some


def test_compiled_code_is_one_frame():
    from torch._dynamo.testing import CompileCounter

    scheduler = FusedLCMScheduler()

    def start():
        scheduler.set_timesteps(4)
        scheduler.set_begin_index(0)
        torch.manual_seed(0)

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


def test_counter_noise_belongs_to_the_sample(monkeypatch):
    scheduler = FusedLCMScheduler()
    x, m = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)

    def run(seeds, rows):
        scheduler.use_counter_noise(seeds)
        scheduler.set_timesteps(4)
        y = x[rows]
        for t in scheduler.timesteps:
            y = scheduler.step(m[rows], t, y).prev_sample
        return y

    together = run([5, 6, 7], slice(None))
    assert torch.equal(run([6], slice(1, 2)), together[1:2])
    assert not torch.equal(run([8], slice(1, 2)), together[1:2])
    monkeypatch.setattr(FusedLCMScheduler, "_kernel_devices", ("cpu",))
    torch.testing.assert_close(run([5, 6, 7], slice(None)), together, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="2 seeds were given for 3"):
        run([1, 2], slice(None))
    scheduler.use_counter_noise(0)
    with pytest.raises(InputError, match="generator"):
        scheduler.step(m, scheduler.timesteps[0], x, generator=generator())
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(0)
    with pytest.raises(InputError, match="diffusers itself"):
        scheduler.step(m, 333, x)


def test_counter_noise_is_the_samplers():
    """The same trajectory as `fastddpm.Sampler`'s from the same seeds."""
    import fastddpm

    scheduler = FusedLCMScheduler()
    scheduler.use_counter_noise([3, 4])
    scheduler.set_timesteps(4)
    x = x_T = torch.randn(2, 1, 4, 4)
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * x, t, x).prev_sample
    schedule = fastddpm.NoiseSchedule.from_diffusers(scheduler.config)
    there = fastddpm.Sampler(lambda y, t: 0.1 * y, fastddpm.solvers.lcm(schedule, 4))
    there = there.sample((2, 1, 4, 4), seeds=[3, 4], x_T=x_T)
    torch.testing.assert_close(x, there, rtol=1e-4, atol=1e-4)


def test_config_saving_and_copies(tmp_path):
    for other in (diffusers.DDPMScheduler, diffusers.DPMSolverMultistepScheduler, diffusers.EulerDiscreteScheduler):
        made, expected = (c.from_config(other(beta_end=0.01).config) for c in PAIR)
        ignored = ("_class_name", "_use_default_values")
        same = [{k: v for k, v in s.config.items() if k not in ignored} for s in (made, expected)]
        assert same[0] == same[1]
    scheduler = FusedLCMScheduler(num_train_timesteps=500)
    scheduler.save_pretrained(tmp_path)
    for stock_or_ours in PAIR:
        assert stock_or_ours.from_pretrained(tmp_path).config.num_train_timesteps == 500
    assert isinstance(scheduler, LCMScheduler)
    assert set(LCMScheduler().compatibles) == set(scheduler.compatibles)
    assert FusedLCMScheduler.__module__ == "fastddpm.integrations.diffusers"
    scheduler.set_timesteps(5)
    x = torch.randn(1, 2, 3, 3)
    scheduler.step(x, scheduler.timesteps[0], x)
    twins = [copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler)), scheduler]
    made = [s.step(x, int(s.timesteps[1]), x, generator=generator()).prev_sample for s in twins]
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[1], made[2])
