"""The drop-in schedulers notice what somebody changes or replaces; equal to diffusers' (0.42.1) to the last bit."""

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers isn't installed")
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from schedulers import PAIRS, SIGMAS, assert_same, each, generator, noisy, outputs, over, quiet, walk

pytestmark = quiet


# --- changes ----------------------------------------------------------------------------------------------------------


def test_a_changed_scheduler_is_noticed():
    a, b = DDPMScheduler(), PAIRS[DDPMScheduler]()
    m, x = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    for scheduler in (a, b):
        scheduler.set_timesteps(10)
        scheduler.step(m, 900, x)
        scheduler.register_to_config(prediction_type="v_prediction")
        scheduler.variance_type = "fixed_large"
        scheduler.alphas_cumprod = scheduler.alphas_cumprod**0.9
    assert_same(*([s.step(m, 900, x, generator=generator()).prev_sample] for s in (a, b)))


@each
@pytest.mark.parametrize("name", ["timesteps", "levels"])
def test_a_change_in_place_is_noticed(stock, fused, name):
    """Of a plan that a step was made with, and by the step that finds where it is by its time step."""
    levels, m, made = "sigmas" if hasattr(stock(), "sigmas") else "alphas_cumprod", torch.randn(2, 1, 3, 3), []
    config, given = noisy(stock)
    for scheduler in (stock(**config), fused(**config)):
        for _ in range(2):
            scheduler.set_timesteps(10)
            x = walk(scheduler, m, scheduler.timesteps[:3], **given)
            if name == "timesteps":
                scheduler.timesteps.sub_(7)
            else:
                getattr(scheduler, levels).mul_(0.9)
            scheduler._step_index = None
            made.append(walk(scheduler, x, scheduler.timesteps[4:6].clone(), **given))
    assert_same(made[:2], made[2:])


@over([LCMScheduler, UniPCMultistepScheduler, *SIGMAS])
def test_what_somebody_changes_between_the_steps(stock, fused):
    """The kind of prediction, the levels, the time steps, the index, the corrector's list; and the end."""
    changes = {
        1: lambda s: s.register_to_config(prediction_type="v_prediction"),
        2: lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod**0.9),
        3: lambda s: hasattr(s, "sigmas") and setattr(s, "sigmas", s.sigmas * 1.1),
        4: lambda s: s.timesteps.is_floating_point() and setattr(s, "timesteps", s.timesteps - 0.5),
        5: lambda s: s.timesteps.is_floating_point() and s.timesteps.add_(0.25),
        6: lambda s: setattr(s, "disable_corrector", [5]),
        7: lambda s: setattr(s, "predict_x0", False),
        8: lambda s: setattr(s, "_step_index", 6),
    }
    made, config = [], {}
    if stock is UniPCMultistepScheduler:
        config = dict(solver_order=3, lower_order_final=False, final_sigmas_type="sigma_min")
    for scheduler in (stock(**config), fused(**config)):
        scheduler.set_timesteps(10)
        torch.manual_seed(0)
        x = torch.randn(2, 1, 3, 3)
        for i in range(10):
            changes.get(i, lambda s: None)(scheduler)
            t = scheduler.timesteps[scheduler.step_index or 0]
            x = scheduler.step(torch.randn_like(x), t, scheduler.scale_model_input(x, t)).prev_sample + 0.1
        made.append(x)
        scheduler._step_index = len(scheduler.timesteps)
        if stock is not LCMScheduler:
            with pytest.raises(IndexError):
                scheduler.step(x, t, x)
    assert torch.equal(*made)


@each
def test_the_same_time_steps_again(stock, fused):
    """Nothing is made anew; but it is where anything was changed."""
    config, given = noisy(stock)
    a, b = stock(**config), fused(**config)
    for scheduler in (a, b):
        outputs(scheduler, n=5, given=given)
    before, timesteps = b._plan, b.timesteps
    outputs(b, n=5, given=given)
    assert before is not None
    assert b._plan is before
    assert b.timesteps is timesteps
    for change in (
        lambda s: s.timesteps.add_(1),
        lambda s: hasattr(s, "sigmas") and s.sigmas.mul_(1.1),
        lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod**0.9),
        lambda s: s.register_to_config(prediction_type="v_prediction"),
        lambda s: s.set_timesteps(6),
        lambda s: s.set_timesteps(5, "cpu"),
    ):
        for scheduler in (a, b):
            change(scheduler)
        assert_same(outputs(a, n=5, given=given), outputs(b, n=5, given=given))
        assert torch.equal(a.timesteps, b.timesteps)


# --- replaced methods -------------------------------------------------------------------------------------------------


def halved(*args):
    """Half of what the method gives, which is the last argument."""
    *_, made = args
    return tuple(v / 2 for v in made) if isinstance(made, tuple) else made / 2


HOOKS = {
    DDPMScheduler: "_get_variance",
    DDIMScheduler: "_get_variance",
    DPMSolverMultistepScheduler: "convert_model_output",
    UniPCMultistepScheduler: "convert_model_output",
    LCMScheduler: "get_scalings_for_boundary_condition_discrete",
}


@over(HOOKS)
@pytest.mark.parametrize("when", ["subclass", "object", "object later", "class later"])
def test_a_replaced_part_of_the_step_is_called(stock, fused, when):
    """Of a subclass, or of the object: before the time steps are set, and after a step."""
    name, (config, given), made = HOOKS[stock], noisy(stock), []
    for base in (stock, fused, None):

        class Own(base or fused):
            pass

        inherited = getattr(Own, name)

        def mine(self, *args, inherited=inherited, **kwargs):
            return halved(inherited(self, *args, **kwargs))

        if when == "subclass" and base:
            setattr(Own, name, mine)
        scheduler = Own(**config)
        if when == "object" and base:
            setattr(scheduler, name, mine.__get__(scheduler))
        scheduler.set_timesteps(10)
        x = walk(scheduler, torch.ones(2, 1, 3, 3), scheduler.timesteps[:2], **given)
        if when == "object later" and base:
            setattr(scheduler, name, mine.__get__(scheduler))
        if when == "class later" and base:
            setattr(Own, name, mine)
        made.append(walk(scheduler, x, scheduler.timesteps[2:4], **given))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@over([stock for stock in PAIRS if stock not in (DDPMScheduler, DDIMScheduler)])
@pytest.mark.parametrize("name", ["index_for_timestep", "_init_step_index"])
def test_another_way_to_find_the_first_step(stock, fused, name):
    """Also where `set_begin_index` was called."""

    class Mine:
        def index_for_timestep(self, timestep, schedule_timesteps=None):
            return 2

        def _init_step_index(self, timestep):
            self._step_index = 3

    kept = type("Kept", (), {name: vars(Mine)[name]})
    for begin in (None, 1):
        made = []
        for base in (stock, fused):
            scheduler = type("Own", (kept, base), {})()
            scheduler.set_timesteps(10)
            if begin is not None:
                scheduler.set_begin_index(begin)
            made.append(
                walk(scheduler, torch.ones(1, 1, 3, 3), scheduler.timesteps[3 : 4 if stock is LCMScheduler else 6])
            )
        assert torch.equal(*made)


def test_heuns_state_of_another_class():
    made = []
    for base in (HeunDiscreteScheduler, PAIRS[HeunDiscreteScheduler]):
        scheduler = type("Own", (base,), {"state_in_first_order": property(lambda self: True)})()
        scheduler.set_timesteps(5)
        made.append(walk(scheduler, torch.ones(1, 1, 3, 3)))
    assert torch.equal(*made)
