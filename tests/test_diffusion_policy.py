"""Diffusion Policy and LeRobot: their loops, written here as they write them, against ours; schedulers of diffusers.

Neither package is on the test's list (they bring robots' simulators); their policies are stand-ins with the attributes
and the signatures of real-stanford/diffusion_policy at 5ba07ac and of lerobot in August 2026. diffusers 0.42.1.
"""

import copy
import importlib.util
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastddpm import Sampler, solvers
from fastddpm.errors import ConfigError, InputError, NonFiniteError
from fastddpm.integrations.diffusion_policy import PolicySampler, accelerate_policy, conditional_sample
from fastddpm.schedule import NoiseSchedule

diffusers = pytest.importorskip("diffusers", reason="diffusers has the schedulers of both")

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("diffusion_policy_example", ROOT / "examples" / "diffusion_policy.py")
example = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = example  # where pickle looks for its classes
spec.loader.exec_module(example)
Policy = example.Policy

SHAPE = (3, 8, 4)
CLOSE = {"rtol": 0, "atol": 1e-5}


def unet(seed=0, **kwargs):
    torch.manual_seed(seed)
    return example.ConditionalUnet1D(4, widths=(16, 32), **kwargs).eval()


def scheduler(kind="DDPMScheduler", **config):
    usual = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2"}
    return getattr(diffusers, kind)(**{**usual, **config})


def generator(seed=7):
    return torch.Generator().manual_seed(seed)


def condition(known):
    """What is known of a trajectory: the last two entries of the first two moments, as observations are."""
    data, mask = torch.zeros(SHAPE), torch.zeros(SHAPE, dtype=torch.bool)
    if known:
        data[:, :2, 2:] = torch.rand(SHAPE[0], 2, 2, generator=generator(3)) * 2 - 1
        mask[:, :2, 2:] = True
    return data, mask


class TransformerPolicy(Policy):
    """DiffusionTransformerLowdimPolicy's loop."""

    def conditional_sample(self, condition_data, condition_mask, cond=None, generator=None, **kwargs):
        trajectory = torch.randn(condition_data.shape, dtype=condition_data.dtype, generator=generator)
        self.noise_scheduler.set_timesteps(self.num_inference_steps)
        for t in self.noise_scheduler.timesteps:
            trajectory[condition_mask] = condition_data[condition_mask]
            output = self.model(trajectory, t, cond)
            trajectory = self.noise_scheduler.step(output, t, trajectory, generator=generator, **kwargs).prev_sample
        trajectory[condition_mask] = condition_data[condition_mask]
        return trajectory


class DiffusionModel(nn.Module):
    """LeRobot's."""

    def __init__(self, model, noise_scheduler, num_inference_steps):
        super().__init__()
        self.config = SimpleNamespace(horizon=SHAPE[1], action_feature=SimpleNamespace(shape=(SHAPE[2],)))
        self.unet, self.noise_scheduler, self.num_inference_steps = model, noise_scheduler, num_inference_steps

    def conditional_sample(self, batch_size, global_cond=None, generator=None, noise=None):
        shape = (batch_size, self.config.horizon, self.config.action_feature.shape[0])
        sample = torch.randn(shape, generator=generator) if noise is None else noise
        self.noise_scheduler.set_timesteps(self.num_inference_steps)
        for t in self.noise_scheduler.timesteps:
            output = self.unet(sample, torch.full(sample.shape[:1], t, dtype=torch.long), global_cond=global_cond)
            sample = self.noise_scheduler.step(output, t, sample, generator=generator).prev_sample
        return sample


class DiffusionPolicy(nn.Module):
    """LeRobot's outer class."""

    def __init__(self, *args):
        super().__init__()
        self.diffusion = DiffusionModel(*args)


SETTINGS = [
    ("DDPMScheduler", {}, 100, {}),
    ("DDPMScheduler", {}, 20, {}),
    ("DDPMScheduler", {"clip_sample": False, "beta_schedule": "linear"}, 10, {}),
    ("DDPMScheduler", {"variance_type": "fixed_large", "prediction_type": "sample"}, 25, {}),
    ("DDPMScheduler", {"variance_type": "fixed_small_log", "prediction_type": "v_prediction"}, 25, {}),
    ("DDPMScheduler", {"timestep_spacing": "trailing", "clip_sample_range": 2.0}, 20, {}),
    ("DDPMScheduler", {"thresholding": True, "sample_max_value": 1.5}, 10, {}),
    ("DDIMScheduler", {}, 10, {}),
    ("DDIMScheduler", {}, 16, {}),
    ("DDIMScheduler", {"prediction_type": "sample"}, 16, {"eta": 1.0}),
    ("DDIMScheduler", {}, 8, {"eta": 0.5, "use_clipped_model_output": True}),
    ("DDIMScheduler", {"timestep_spacing": "trailing"}, 20, {}),
]


@pytest.mark.parametrize("known", [False, True], ids=["free", "known"])
@pytest.mark.parametrize("kind, config, steps, step", SETTINGS, ids=lambda v: str(v))
def test_the_loop_is_theirs(kind, config, steps, step, known):
    model, sched = unet(cond=6, local_cond=5), scheduler(kind, **config)
    given = {"global_cond": torch.randn(3, 6), "local_cond": torch.randn(3, 8, 5)}
    data, mask = condition(known)
    theirs, ours = generator(), generator()
    with torch.no_grad():
        expected = Policy(model, sched, steps).conditional_sample(data, mask, generator=theirs, **given, **step)
    got = conditional_sample(
        model,
        SHAPE,
        sched,
        num_inference_steps=steps,
        condition_data=data,
        condition_mask=mask,
        generator=ours,
        **given,
        **step,
    )
    torch.testing.assert_close(got, expected, **CLOSE)
    assert torch.equal(theirs.get_state(), ours.get_state())  # as many numbers drawn
    assert torch.equal(got[mask], data[mask])


def test_noise_is_drawn_after_the_model():
    """A model that draws too, as with dropout in training mode, is given the numbers that it gets in their loop."""

    def model(x, t):
        return 0.1 * x + 0.1 * torch.randn_like(x)

    def theirs(kind):
        torch.manual_seed(0)
        made, x = scheduler(kind), torch.randn(SHAPE)
        made.set_timesteps(10)
        for t in made.timesteps:
            x = made.step(model(x, t), t, x).prev_sample
        return x

    for kind in ("DDPMScheduler", "DDIMScheduler"):
        expected = theirs(kind)
        torch.manual_seed(0)
        got = conditional_sample(model, SHAPE, scheduler(kind), num_inference_steps=10)
        torch.testing.assert_close(got, expected, **CLOSE)


def test_the_known_part_is_clean_at_every_evaluation():
    data, mask = condition(True)
    seen = []

    def model(x, t):
        seen.append(x[mask].clone())
        return 0.1 * x

    conditional_sample(model, SHAPE, scheduler(), num_inference_steps=10, condition_data=data, condition_mask=mask)
    assert len(seen) == 10
    assert all(torch.equal(s, data[mask]) for s in seen)


@pytest.mark.parametrize("make, settings", [("ddpm", {"clip": 1.0}), ("dpm_solver", {"order": 2})])
def test_seeds_are_the_samplers(make, settings):
    schedule, model = NoiseSchedule.cosine(100), unet()
    table = solvers.make(make, schedule, 10, **settings)
    expected = Sampler(model, table).sample(SHAPE, seeds=[1, 2, 3])
    sampler = PolicySampler(model, table)
    torch.testing.assert_close(sampler.sample(SHAPE, seeds=[1, 2, 3]), expected, **CLOSE)
    alone = sampler.sample((1, *SHAPE[1:]), seeds=[2])
    torch.testing.assert_close(alone, expected[1:2], rtol=1e-4, atol=1e-5)  # a network's own rounding is its batch's


def test_known_parts_with_a_solver_that_looks_back():
    data, mask = condition(True)
    sampler = PolicySampler(unet(), solvers.dpm_solver(NoiseSchedule.cosine(100), 8, order=3))
    got = sampler.sample(SHAPE, seeds=5, condition_data=data, condition_mask=mask)
    assert torch.equal(got[mask], data[mask])
    assert not torch.equal(got, sampler.sample(SHAPE, seeds=6, condition_data=data, condition_mask=mask))


@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler"])
def test_a_policy_is_accelerated(kind):
    obs = torch.randn(2, 2, 5)
    torch.manual_seed(0)
    policy = Policy(example.ConditionalUnet1D(2, cond=10, widths=(16, 32)).eval(), scheduler(kind), 16)
    torch.manual_seed(1)
    expected = policy.predict_action(obs)
    assert accelerate_policy(policy) is policy
    torch.manual_seed(1)
    torch.testing.assert_close(policy.predict_action(obs), expected, **CLOSE)
    del policy.conditional_sample
    torch.manual_seed(1)
    assert torch.equal(policy.predict_action(obs), expected)


def test_a_transformers_policy_is_accelerated():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4 + 3, 4)

        def forward(self, sample, timestep, cond=None):
            told = cond.mean(1, keepdim=True).expand(-1, sample.shape[1], -1)
            return torch.tanh(self.layer(torch.cat([sample, told], dim=2)) + 0.01 * timestep.expand(3)[:, None, None])

    policy = TransformerPolicy(Net(), scheduler("DDIMScheduler"), 10)
    data, mask = condition(True)
    cond = torch.randn(3, 2, 3)
    with torch.no_grad():
        expected = policy.conditional_sample(data, mask, cond=cond, generator=generator(), eta=0.3)
    got = accelerate_policy(policy).conditional_sample(data, mask, cond=cond, generator=generator(), eta=0.3)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("outer", [False, True], ids=["DiffusionModel", "DiffusionPolicy"])
def test_lerobot_is_accelerated(outer):
    made = (unet(cond=6), scheduler(), 20)
    policy = DiffusionPolicy(*made) if outer else DiffusionModel(*made)
    inner = policy.diffusion if outer else policy
    features, start = torch.randn(3, 6), torch.randn(SHAPE)
    with torch.no_grad():
        expected = inner.conditional_sample(3, global_cond=features, generator=generator())
        from_start = inner.conditional_sample(3, global_cond=features, generator=generator(), noise=start)
    accelerate_policy(policy)
    got = inner.conditional_sample(3, global_cond=features, generator=generator())
    torch.testing.assert_close(got, expected, **CLOSE)
    got = inner.conditional_sample(3, global_cond=features, generator=generator(), noise=start)
    torch.testing.assert_close(got, from_start, **CLOSE)


def test_seeds_of_a_policy_go_on_and_begin_again():
    policy = accelerate_policy(DiffusionModel(unet(), scheduler(), 5), seed=4)
    first, second = policy.conditional_sample(3), policy.conditional_sample(3)
    assert not torch.equal(first, second)
    policy.conditional_sample.seed = 4
    assert torch.equal(policy.conditional_sample(3), first)
    assert torch.equal(policy.conditional_sample(3), second)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["copy", "pickle"])
def test_a_copy_samples_with_its_own_model(copied):
    policy = accelerate_policy(Policy(unet(), scheduler("DDIMScheduler"), 5))
    data, mask = condition(False)
    before = policy.conditional_sample(data, mask, generator=generator())
    other = copied(policy)
    assert torch.equal(other.conditional_sample(data, mask, generator=generator()), before)
    with torch.no_grad():
        other.model.last[1].bias += 1.0
    assert not torch.equal(other.conditional_sample(data, mask, generator=generator()), before)
    assert torch.equal(policy.conditional_sample(data, mask, generator=generator()), before)


def test_what_is_exchanged_is_noticed():
    policy = accelerate_policy(Policy(unet(), scheduler(), 5))
    data, mask = condition(False)
    for change in ({"model": unet(1)}, {"noise_scheduler": scheduler("DDIMScheduler")}, {"num_inference_steps": 7}):
        for name, value in change.items():
            setattr(policy, name, value)
        with torch.no_grad():
            expected = Policy.conditional_sample(policy, data, mask, generator=generator())
        torch.testing.assert_close(policy.conditional_sample(data, mask, generator=generator()), expected, **CLOSE)


def test_a_model_of_less_precision_returns_its_dtype():
    got = conditional_sample(unet().to(torch.bfloat16), SHAPE, scheduler(), num_inference_steps=5, seeds=0)
    assert got.dtype == torch.bfloat16
    assert got.isfinite().all()


def test_inference_mode_changes_nothing():
    sampler, (data, mask) = PolicySampler(unet(), scheduler(), 5), condition(True)
    expected = sampler.sample(SHAPE, seeds=0, condition_data=data, condition_mask=mask)
    with torch.inference_mode():
        assert torch.equal(sampler.sample(SHAPE, seeds=0, condition_data=data, condition_mask=mask), expected)


@pytest.mark.parametrize("at", [0, 3, 9])
def test_what_is_not_finite_is_an_error_that_names_the_step(at):
    calls = []

    def model(x, t):
        calls.append(t)
        output = 0.1 * x
        if len(calls) == at + 1:
            output[1, 0, 0] = torch.inf  # which the clip would hide
        return output

    with pytest.raises(NonFiniteError, match=f"sample 1 is not finite from step {at} ") as caught:
        conditional_sample(model, SHAPE, scheduler(), num_inference_steps=10)
    assert caught.value.bad.tolist() == [False, True, False]


REFUSED = [
    (scheduler("EulerDiscreteScheduler"), {}, "allowed: DDPMScheduler, DDIMScheduler"),
    (scheduler(variance_type="learned_range"), {}, "no learned variance"),
    (scheduler(), {"eta": 1.0}, "DDIMScheduler's"),
    (scheduler(steps_offset=1), {}, "steps_offset"),
    (scheduler("DDIMScheduler", set_alpha_to_one=False), {}, "set_alpha_to_one"),
    (scheduler("DDIMScheduler", timestep_spacing="linspace"), {"num_inference_steps": 10}, "use 'leading'"),
    (scheduler("DDIMScheduler", timestep_spacing="trailing"), {"num_inference_steps": 16}, "use 'leading'"),
    (
        scheduler(timestep_spacing="trailing", variance_type="fixed_large"),
        {"num_inference_steps": 10},
        "use 'leading'",
    ),
    (scheduler(), {"num_inference_steps": 101}, "allowed: an integer in 1 ... 100"),
    (solvers.ddim(NoiseSchedule.cosine(100), 8), {"num_inference_steps": 9}, "the table has 8 rows"),
    (solvers.ddim(NoiseSchedule.cosine(100), 8), {"eta": 0.5}, "the table's own"),
    (solvers.ddpm(NoiseSchedule.linear(100), 8, variance="learned"), {}, "a learned variance"),
    (solvers.euler(NoiseSchedule.linear(100), 8), {}, "scales the model's input"),
]


@pytest.mark.parametrize("sched, options, says", REFUSED, ids=[r[2] + str(i) for i, r in enumerate(REFUSED)])
def test_what_is_not_supported_is_refused(sched, options, says):
    with pytest.raises(ConfigError, match=says):
        PolicySampler(unet(), sched, **options)


def test_arguments_that_do_not_fit_are_refused():
    sampler, (data, mask) = PolicySampler(unet(), scheduler(), 5), condition(True)
    with pytest.raises(InputError, match="seeds and generator are both given"):
        sampler.sample(SHAPE, seeds=0, generator=generator())
    with pytest.raises(InputError, match="go together"):
        sampler.sample(SHAPE, condition_data=data)
    with pytest.raises(InputError, match="they must fit"):
        sampler.sample((3, 8, 5), condition_data=data, condition_mask=mask)
    with pytest.raises(InputError, match="without conditional_sample, noise_scheduler, num_inference_steps"):
        accelerate_policy(nn.Linear(2, 2))

    class Guided(Policy):
        def conditional_sample(self, condition_data, condition_mask, guide=None, **kwargs):
            return super().conditional_sample(condition_data, condition_mask, **kwargs)

    with pytest.raises(InputError, match="the conditional_sample of Guided takes guide, as"):
        accelerate_policy(Guided(unet(), scheduler(), 5))
    policy = accelerate_policy(Policy(unet(), scheduler("DDIMScheduler"), 5))
    with pytest.raises(ConfigError, match="variance_noise: not supported"):
        policy.conditional_sample(data, mask, variance_noise=None)
