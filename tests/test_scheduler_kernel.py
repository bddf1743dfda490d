"""The drop-in schedulers' rows for the kernel, as its CPU implementation applies them, and the noise of seeds."""

import itertools
import sys

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers isn't installed")
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from schedulers import KINDS, PAIRS, SIGMAS, drawing, each, generator, kinds, noisy, outputs, over, product, quiet, walk

import fastddpm
from fastddpm.errors import InputError

pytestmark = quiet


TOLERANCES = ((torch.float32, 1e-6), (torch.float16, 4e-3), (torch.bfloat16, 3e-2))


@pytest.fixture
def kernel(monkeypatch):
    """A function that lets a class take the kernel, and gives the list of its launches."""

    def use(fused):
        used, through = [], fused._step_by_kernel
        monkeypatch.setattr(fused, "_kernel_devices", ("cpu",))
        monkeypatch.setattr(fused, "_step_by_kernel", lambda *args, **kw: used.append(1) or through(*args, **kw))
        return used

    return use


def configs_of(stock):
    """Configs whose rows differ."""
    if stock is DPMSolverMultistepScheduler:
        every = [
            ("dpmsolver", 2),
            ("dpmsolver++", 3),
            *(("sde-dpmsolver++", o) for o in (1, 2, 3)),
            ("sde-dpmsolver", 2),
        ]
        ends = {True: "zero", False: "sigma_min"}
        return [dict(algorithm_type=a, solver_order=o, final_sigmas_type=ends["++" in a]) for a, o in every]
    if stock in SIGMAS:
        return (
            [{}, dict(clip_sample=True)] if stock is HeunDiscreteScheduler else [{}, dict(rescale_betas_zero_snr=True)]
        )
    return [dict(clip_sample=clip) for clip in (False, True)]


@over([s for s in PAIRS if s not in (LCMScheduler, UniPCMultistepScheduler)])
def test_the_rows_say_the_same(stock, fused, kernel):
    used, given = kernel(fused), [{}, noisy(stock)[1]]
    for config, more, kind in itertools.product(configs_of(stock), given if given[1] else given[:1], kinds(stock)):
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 4e-3), (torch.bfloat16, 3e-2))[
            : 3 if stock in SIGMAS else 2
        ]:
            used.clear()
            one, other = (outputs(s(**config, prediction_type=kind), dtype=dtype, given=more) for s in (stock, fused))
            assert used
            for a, b in zip(one, other, strict=True):
                assert a.dtype == b.dtype
                scale = float(a.abs().max()) + (10.0 if kind == "v_prediction" else 160.0)  # divided by what is small
                if stock in SIGMAS:  # of x, which the first differences have
                    scale = 2e4 if "rescale_betas_zero_snr" in config else 700.0
                assert float((a.double() - b.double()).abs().max()) <= tolerance * scale


def within_rounding(stock, config, dtype, tolerance, **given):
    """Ours is as near to the trajectory in float64 as diffusers' in the dtype."""
    one, other = (outputs(s(**config), dtype=dtype, **given) for s in (stock, PAIRS[stock]))
    with pytest.MonkeyPatch.context() as patch:
        if stock is LCMScheduler:  # the same noise in float64
            module = sys.modules[stock.__module__]
            drawn = module.randn_tensor
            same = lambda *args, dtype, to=dtype, **kw: drawn(*args, dtype=to, **kw).to(dtype)  # noqa: E731
            patch.setattr(module, "randn_tensor", same)
        exact = outputs(stock(**config), dtype=torch.float64, rounded=dtype, **given)
    for a, b, there in zip(one, other, exact, strict=True):
        assert a.dtype == b.dtype
        errors = [float((v.double() - there).abs().max()) for v in (a, b)]
        assert errors[1] <= 2 * errors[0] + tolerance * (float(there.abs().max()) + 30), (config, dtype)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_lcms_rows_in_one_launch_a_step(kind, clip, kernel):
    used = kernel(PAIRS[LCMScheduler])
    config = dict(prediction_type=kind, clip_sample=clip, timestep_scaling=0.01)  # so that c_skip is felt
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 1e-3)):
        within_rounding(LCMScheduler, config, dtype, tolerance, n=4)
    assert len(used) == 8


@pytest.mark.parametrize("kind", [*KINDS, "flow_prediction"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipcs_rows_in_two_launches_a_step(order, kind, kernel):
    used = kernel(PAIRS[UniPCMultistepScheduler])
    for config in product(
        predict_x0=[True] if kind == "flow_prediction" else [True, False],
        solver_type=["bh1", "bh2"],
        disable_corrector=[[], [1, 2]],
    ):
        config |= dict(solver_order=order, prediction_type=kind, final_sigmas_type="sigma_min")
        config |= dict(use_flow_sigmas=kind == "flow_prediction")
        used.clear()
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 1e-3)):
            within_rounding(UniPCMultistepScheduler, config, dtype, tolerance)
        assert len(used) == 2 * (6 + (3 if config["disable_corrector"] else 5))
    pair = UniPCMultistepScheduler, PAIRS[UniPCMultistepScheduler]
    made = [outputs(s(solver_order=order), dtype=torch.float16, n=30)[-1] for s in pair]  # and over many steps
    torch.testing.assert_close(made[1], made[0], rtol=0.05, atol=0.05)


def test_where_a_level_has_no_numbers_diffusers_is_asked(kernel):
    """bh1 that ends at sigma 0 gives NaN there, in the dtype that diffusers gives it in."""
    kernel(PAIRS[UniPCMultistepScheduler])
    for dtype in (torch.float32, torch.float16):
        pair = UniPCMultistepScheduler, PAIRS[UniPCMultistepScheduler]
        one, other = (outputs(s(solver_type="bh1"), dtype=dtype)[-1] for s in pair)
        assert one.isnan().all()
        assert other.isnan().all()
        assert one.dtype == other.dtype


def test_heun_changes_hands_between_its_two_calls(monkeypatch):
    """Either call by the kernel, by torch, or by diffusers, in any order; and a sample that was changed in between."""
    fused, dtypes = PAIRS[HeunDiscreteScheduler], {"torch": torch.float32, "diffusers": torch.float64}
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


@each
def test_the_kernel_keeps_layouts(stock, fused, kernel):
    kernel(fused)
    config, given = noisy(stock)
    for make in (lambda v: v.contiguous(memory_format=torch.channels_last), lambda v: v.permute(3, 2, 1, 0)):
        m, x = (make(torch.randn(4, 5, 6, 7)) for _ in range(2))
        made = []
        for scheduler in (stock(**config), fused(**config)):
            scheduler.set_timesteps(5)
            made.append(walk(scheduler, x, scheduler.timesteps[:2], lambda x, m=m: m, **given))
        torch.testing.assert_close(*made, rtol=1e-4, atol=1e-4)
        assert made[0].stride() == made[1].stride()


# --- counter-based noise ----------------------------------------------------------------------------------------------


@drawing
def test_counter_noise_belongs_to_the_sample(stock, fused, kernel):
    config, given = noisy(stock)
    scheduler = fused(**config)
    x, m = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)

    def run(seeds, rows):
        scheduler.use_counter_noise(seeds)
        scheduler.set_timesteps(5)
        return walk(scheduler, x[rows], model=lambda x: m[rows], **given)

    together = run([5, 6, 7], slice(None))
    assert torch.equal(run([6], slice(1, 2)), together[1:2])
    assert not torch.equal(run([8], slice(1, 2)), together[1:2])
    kernel(fused)
    torch.testing.assert_close(run([5, 6, 7], slice(None)), together, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="2 seeds were given for 3"):
        run([1, 2], slice(None))
    scheduler.use_counter_noise(0)
    with pytest.raises(InputError, match="generator"):
        scheduler.step(m, scheduler.timesteps[0], x, generator=generator(), **given)
    with pytest.raises(InputError, match="seed is -1"):
        scheduler.use_counter_noise(-1)
    assert "seeds" not in str(scheduler.config)


@drawing
def test_a_refusal_where_diffusers_draws(stock, fused):
    config, given = noisy(stock)
    scheduler = fused(**config)
    scheduler.use_counter_noise(0)
    scheduler.set_timesteps(5)
    m, x = torch.randn(1, 3, 4, 4).half(), torch.randn(1, 3, 4, 4).half()
    with pytest.raises(InputError, match="diffusers itself"):
        scheduler.step(m, scheduler.timesteps[0], x, **given)


@over([DDPMScheduler, LCMScheduler, *SIGMAS[1:2]])
def test_counter_noise_is_the_samplers(stock, fused):
    """The same trajectory as `fastddpm.Sampler`'s from the same seeds."""
    scheduler = fused()
    schedule, solvers = fastddpm.NoiseSchedule.from_diffusers(scheduler.config), fastddpm.solvers
    tables = [
        lambda: solvers.ddpm(schedule, 10, clip=1.0),
        lambda: solvers.lcm(schedule, 10),
        lambda: solvers.euler_ancestral(schedule, 10, spacing="linspace", quantize=False),
    ]
    scheduler.use_counter_noise([3, 4])
    scheduler.set_timesteps(10)
    x_T = torch.randn(2, 1, 4, 4) * scheduler.init_noise_sigma
    x = walk(scheduler, x_T, model=lambda x: 0.1 * x)
    table = tables[[DDPMScheduler, LCMScheduler, SIGMAS[1]].index(stock)]()
    there = fastddpm.Sampler(lambda y, t: 0.1 * y, table).sample((2, 1, 4, 4), seeds=[3, 4], x_T=x_T)
    torch.testing.assert_close(x, there, rtol=1e-3, atol=1e-3 if stock in SIGMAS else 1e-4)
