"""What a step of the drop-in schedulers may be given, and where; equal to diffusers' (0.42.1) to the last bit."""

import itertools

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers isn't installed")
from diffusers import (  # noqa: E402
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from schedulers import (  # noqa: E402
    KINDS,
    PAIRS,
    SIGMAS,
    assert_equal,
    assert_same,
    drawing,
    each,
    generator,
    kinds,
    noisy,
    outputs,
    over,
    quiet,
    walk,
)

pytestmark = quiet


COUNTED = [stock for stock in PAIRS if stock not in (DDPMScheduler, DDIMScheduler)]


def check(stock, config, **given):
    assert_equal(stock, PAIRS[stock], config, **given)


@each
def test_dtypes(stock, fused):
    """Half precision is diffusers' own; so is a mix of dtypes, but for Euler's with an output that isn't half."""
    every = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for dtype, m_dtype, kind in itertools.product(every, every, kinds(stock)):
        if dtype == m_dtype or stock in SIGMAS:
            check(stock, dict(prediction_type=kind), dtype=dtype, m_dtype=m_dtype, n=4, given=noisy(stock)[1])
    for dtype in every:
        if stock is UniPCMultistepScheduler:
            check(stock, dict(solver_order=3), dtype=dtype)
        if stock is LCMScheduler:
            check(stock, dict(clip_sample=True), dtype=dtype, as_ints=True)


@each
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 16, 7), (2, 3, 4, 5, 6), (1, 3, 33, 1), (4, 2)], ids=str)
def test_odd_shapes_and_int_time_steps(stock, fused, shape):
    check(stock, {}, shape=shape, as_ints=stock not in SIGMAS, n=4)
    if stock is UniPCMultistepScheduler:
        check(stock, dict(solver_order=3), shape=shape)


@pytest.mark.parametrize("given", [dict(eta=0.5), dict(use_clipped_model_output=True)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_ddim_with_noise_or_clipped_outputs(kind, given):
    check(DDIMScheduler, dict(prediction_type=kind), given=given)
    a, b, z = DDIMScheduler(), PAIRS[DDIMScheduler](), torch.randn(2, 3, 4, 4)
    for scheduler in (a, b):
        scheduler.set_timesteps(10)
    one, other = (s.step(z, 500, z, eta=0.5, variance_noise=z, return_dict=False) for s in (a, b))
    assert_same(one, other)
    with pytest.raises(ValueError, match="Cannot pass both"):
        b.step(z, 500, z, eta=0.5, variance_noise=z, generator=torch.Generator())


LAYOUTS = (
    lambda v: v,
    lambda v: v.contiguous(memory_format=torch.channels_last),
    lambda v: v.permute(3, 2, 1, 0),
    lambda v: v[:1].expand_as(v),
    lambda v: torch.stack([v, v], dim=-1)[..., 0],
)


@each
def test_layouts_stay(stock, fused):
    """Those of the sample and the output, alike or not."""
    for (one, other), kind in itertools.product(itertools.product(LAYOUTS, LAYOUTS), kinds(stock)):
        m, x = one(torch.randn(4, 4, 4, 4)), other(torch.randn(4, 4, 4, 4))
        made = []
        for scheduler in (stock(prediction_type=kind), fused(prediction_type=kind)):
            scheduler.set_timesteps(5)
            torch.manual_seed(0)
            steps = [scheduler.step(m, t, scheduler.scale_model_input(x, t)) for t in scheduler.timesteps[:3]]
            kept = 1 if kind == "sample" else 2  # there diffusers returns the output itself, whatever its layout
            made.append([v for step in steps for v in [*step.values()][:kept]])
        assert_same(*made)


@drawing
def test_generators(stock, fused):
    """One, a list of them, and the global one: the same draws, and left in the same state."""
    (config, given), made = noisy(stock), []
    for scheduler in (stock(**config), fused(**config)):
        several, one = [generator(i) for i in range(2)], generator(7)
        runs = outputs(scheduler, noise=several, given=given) + outputs(scheduler, noise=one, given=given)
        scheduler.set_timesteps(5)
        runs.append(walk(scheduler, torch.ones(2, 3, 4, 4), **given))
        made.append([*runs, torch.rand(3)] + [torch.rand(3, generator=g) for g in (*several, one)])
    assert_same(*made)


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
        assert torch.equal(a.scale_model_input(x, at[0]), b.scale_model_input(x, at[0]))
        if hasattr(a, "get_velocity"):
            assert torch.equal(a.get_velocity(x, z, at), b.get_velocity(x, z, at))
    assert a.init_noise_sigma == b.init_noise_sigma
    for scheduler in (a, b) if stock in COUNTED else ():
        scheduler.set_begin_index(3)
    assert torch.equal(a.add_noise(x, z, at), b.add_noise(x, z, at))


def said(scheduler, m, t, x):
    """The step's result, or the error's kind."""
    try:
        return scheduler.step(m, t, x, generator=generator()).prev_sample.tolist()
    except (IndexError, RuntimeError, ValueError) as error:
        return type(error)
    except TypeError:  # it takes no generator
        return scheduler.step(m, t, x).prev_sample.tolist()


@over([s for s in PAIRS if s not in SIGMAS])
def test_before_time_steps_are_set_and_off_the_schedule(stock, fused):
    m, x, a, b = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3), stock(), fused()
    if stock is UniPCMultistepScheduler:
        for scheduler in (a, b):
            with pytest.raises(ValueError, match="set_timesteps"):
                scheduler.step(m, 700, x)
        return
    assert said(a, m, 700, x) == said(b, m, 700, x)
    for t in (333, 333.7, torch.tensor(333), torch.tensor(333.7), torch.tensor([333, 333])):
        for scheduler in (a, b):
            scheduler.set_timesteps(10)
            if stock is LCMScheduler:
                scheduler.set_begin_index(0)
        if stock is not DDPMScheduler or isinstance(t, int):
            assert said(a, m, t, x) == said(b, m, t, x)


@over(SIGMAS)
def test_sigmas_before_time_steps_are_set_and_off_the_schedule(stock, fused):
    m, x, made = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3), []
    for scheduler in (stock(), fused()):
        t = scheduler.timesteps[300]
        torch.manual_seed(0)
        scaled = scheduler.scale_model_input(x, t)
        made.append([scaled, scheduler.step(m, t, scaled, return_dict=False)[0]])
        scheduler.set_timesteps(10)
        with pytest.raises(IndexError):
            scheduler.scale_model_input(x, 333.5)
        assert scheduler.step_index is None
    assert_same(*made)


@over(SIGMAS)
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


def test_errors_of_lcms_set_timesteps_are_diffusers():
    for given in (dict(), dict(num_inference_steps=4, timesteps=[999]), dict(num_inference_steps=60)):
        with pytest.raises(ValueError, match="num_inference_steps"):
            PAIRS[LCMScheduler]().set_timesteps(**given)


def test_custom_time_steps():
    a, b = DDPMScheduler(), PAIRS[DDPMScheduler]()
    m, x = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    for scheduler in (a, b):
        scheduler.set_timesteps(timesteps=[900, 500, 499, 3])
    for t in a.timesteps:
        assert a.previous_timestep(t) == b.previous_timestep(int(t))
        assert_same(*([s.step(m, t, x, generator=generator()).prev_sample] for s in (a, b)))


@over(COUNTED)
def test_a_trajectory_from_the_middle(stock, fused):
    """Image to image: with `set_begin_index`, and without; duplicates among the time steps too."""
    many = 50 if stock is LCMScheduler else 999
    karras = {"use_karras_sigmas": True}
    configs = [{}, karras] if stock in (UniPCMultistepScheduler, DPMSolverMultistepScheduler) else [{}]
    for steps, begin, how, config in itertools.product((20, many), (None, 6, 7), ("item", "copy", "number"), configs):
        made = []
        for scheduler in (stock(**config), fused(**config)):
            scheduler.set_timesteps(60 if config else steps)
            if begin is not None:
                scheduler.set_begin_index(begin)
            of = {"item": lambda t: t, "copy": torch.clone, "number": float if stock in SIGMAS else int}[how]
            some = scheduler.timesteps[-13:-1] if config else scheduler.timesteps[7:12]
            x = scheduler.add_noise(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3), scheduler.timesteps[7:8])
            made.append(
                (
                    walk(scheduler, x, [of(t) for t in some]) if how != "number" or begin or stock not in SIGMAS else x,
                    scheduler.step_index,
                    scheduler.begin_index,
                )
            )
        assert torch.equal(made[0][0], made[1][0])
        assert made[0][1:] == made[1][1:]


@over(COUNTED)
def test_indices_are_stocks(stock, fused):
    """Of items, of copies, of numbers; where a time step is there twice; in another tensor."""
    configs = [{}, dict(use_karras_sigmas=True)]
    if stock in (EulerAncestralDiscreteScheduler, LCMScheduler):
        configs = [{}]
    for config, n in itertools.product(configs, (10, 50 if stock is LCMScheduler else 1000)):
        a, b = stock(**config), fused(**config)
        for scheduler in (a, b):
            scheduler.set_timesteps(n)
        for i in (0, 1, 2, 7, n - 1):
            expected = a.index_for_timestep(a.timesteps[i])
            t = b.timesteps[i]
            for given in (t, t.clone(), t.item(), t[None], b.timesteps[i : i + 1], t.double()):
                assert b.index_for_timestep(given) == expected
            assert b.index_for_timestep(t, b.timesteps) == expected
            assert b.index_for_timestep(t, b.timesteps.clone()) == expected


def test_euler_warns_of_inputs_that_were_not_scaled(caplog):
    scheduler = PAIRS[EulerDiscreteScheduler]()
    scheduler.set_timesteps(5)
    diffusers.utils.logging.enable_propagation()
    scheduler.step(torch.ones(1, 1), scheduler.timesteps[0], torch.ones(1, 1))
    diffusers.utils.logging.disable_propagation()
    assert "scale_model_input" in caplog.text
