"""The drop-in schedulers give what diffusers' own give, to the last bit on the CPU, in any config (0.42.1)."""

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers isn't installed")
pytest.importorskip("scipy", reason="beta sigmas need scipy")
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
from schedulers import CHURN, KINDS, PAIRS, assert_equal, assert_same, outputs, product, quiet  # noqa: E402

pytestmark = quiet
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
LIMITS = ({"clip_sample": False}, {"clip_sample": True}, {"thresholding": True, "sample_max_value": 1.5})
SPACINGS = ("leading", "linspace", "trailing")
SIGMAS = ({}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True})


def check(stock, config, **given):
    assert_equal(stock, PAIRS[stock], config, **given)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned"])
def test_ddpm(variance):
    for config in product(
        beta_schedule=[*BETAS, "sigmoid"],
        prediction_type=KINDS,
        limit=LIMITS if variance == "fixed_small" else LIMITS[:1],
        timestep_spacing=SPACINGS,
        rescale_betas_zero_snr=[False, True],
    ):
        check(DDPMScheduler, config | {"variance_type": variance}, n=2)
    check(DDPMScheduler, dict(variance_type="learned_range"))


@pytest.mark.parametrize("given", [{}, dict(eta=0.3), dict(use_clipped_model_output=True)], ids=str)
def test_ddim(given):
    for config in product(
        beta_schedule=BETAS,
        prediction_type=KINDS,
        limit=LIMITS,
        timestep_spacing=SPACINGS,
        end=[{}, {"rescale_betas_zero_snr": True}, {"set_alpha_to_one": False}],
    ):
        check(DDIMScheduler, config, n=2, given=given)


@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"])
def test_dpm_solver(algorithm):
    for config in product(
        solver_order=[1, 2, 3],
        solver_type=["midpoint", "heun"],
        prediction_type=KINDS,
        end=[{"n": 5}, {"n": 16}, {"n": 5, "lower_order_final": False}, {"n": 5, "thresholding": True}],
    ):
        if algorithm == "sde-dpmsolver" and config["solver_order"] == 3:
            continue  # diffusers has none
        n, final = config.pop("n"), "zero" if algorithm.endswith("++") else "sigma_min"
        check(DPMSolverMultistepScheduler, config | dict(algorithm_type=algorithm, final_sigmas_type=final), n=n)


FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction")


@pytest.mark.parametrize(
    "config",
    [
        *SIGMAS[1:],
        dict(use_lu_lambdas=True),
        FLOW,
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
    check(DPMSolverMultistepScheduler, config, n=8)


@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order, solver_type):
    for config in product(
        predict_x0=[True, False],
        prediction_type=KINDS,
        thresholding=[False, True],
        end=[{}, {"lower_order_final": False}, {"disable_corrector": [0, 2]}, {"final_sigmas_type": "sigma_min"}],
    ):
        check(UniPCMultistepScheduler, config | dict(solver_order=order, solver_type=solver_type), n=5)


@pytest.mark.parametrize("beta_schedule", BETAS)
def test_unipc_in_any_schedule(beta_schedule):
    for config in product(
        timestep_spacing=SPACINGS,
        rescale_betas_zero_snr=[False, True],
        sigmas=SIGMAS[:3],
        kind=[{"solver_order": 3}, {"prediction_type": "v_prediction"}],
    ):
        check(UniPCMultistepScheduler, config | dict(beta_schedule=beta_schedule, steps_offset=1), n=4)


@pytest.mark.parametrize(
    "config",
    [
        FLOW,
        FLOW | dict(flow_shift=3.0, solver_order=3),
        FLOW | dict(use_karras_sigmas=True),
        FLOW | dict(shift_terminal=0.1),
        dict(prediction_type="flow_prediction"),
        dict(use_beta_sigmas=True),
        dict(solver_type="midpoint"),
        dict(solver_order=4),
        dict(solver_order=5, lower_order_final=False, final_sigmas_type="sigma_min"),
        dict(trained_betas=[0.01] * 100, num_train_timesteps=100),
    ],
    ids=str,
)
def test_unipc_in_other_configs(config):
    for n in (1, 2, 7, 16):
        check(UniPCMultistepScheduler, config, n=n)


def test_unipc_with_given_sigmas_and_dynamic_shifting():
    dynamic = FLOW | dict(use_dynamic_shifting=True)
    check(UniPCMultistepScheduler, FLOW, sigmas=np.array([1.0, 0.8, 0.3, 0.1]))
    check(UniPCMultistepScheduler, dynamic, sigmas=np.array([0.9, 0.5, 0.2]), mu=0.7)
    check(UniPCMultistepScheduler, dynamic | dict(time_shift_type="linear"), mu=0.7)
    with pytest.raises(ValueError, match="mu"):
        PAIRS[UniPCMultistepScheduler](use_dynamic_shifting=True).set_timesteps(5)


def test_unipc_with_another_schedulers_predictor():
    pair = UniPCMultistepScheduler, PAIRS[UniPCMultistepScheduler]
    assert_same(*(outputs(s(solver_p=diffusers.DDIMScheduler())) for s in pair))


@pytest.mark.parametrize("as_ints", [False, True])  # diffusers scales an int in double precision, a tensor in float32
def test_lcm(as_ints):
    for config in product(
        beta_schedule=BETAS,
        prediction_type=KINDS,
        limit=LIMITS,
        end=[{}, {"set_alpha_to_one": False}, {"rescale_betas_zero_snr": True}],
        timestep_scaling=[10.0, 3],
        n=[1, 4],
    ):
        check(LCMScheduler, config, n=config.pop("n"), as_ints=as_ints)


@pytest.mark.parametrize(
    "times",
    [
        dict(original_inference_steps=20),
        dict(strength=0.5),
        dict(n=None, timesteps=[999, 700, 500, 3]),
        dict(n=None, timesteps=[999, 700, 500, 3], strength=0.5),  # whose last step adds noise there
        dict(n=None, timesteps=[999, 700, 500, 3], strength=0.0),
    ],
    ids=str,
)
def test_lcm_with_other_time_steps(times):
    check(LCMScheduler, {}, **times)


@pytest.mark.parametrize("given", [{}, CHURN], ids=["", "churn"])
def test_euler(given):
    for config in product(
        beta_schedule=BETAS,
        prediction_type=KINDS,
        timestep_spacing=SPACINGS,
        sigmas=[*SIGMAS, {"interpolation_type": "log_linear"}],
        end=[{}, {"rescale_betas_zero_snr": True}, {"final_sigmas_type": "sigma_min"}],
    ):
        check(EulerDiscreteScheduler, config, n=3, given=given)


@pytest.mark.parametrize("given", [{}, CHURN], ids=["", "churn"])
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
def test_euler_in_other_configs(config, times, given):
    check(EulerDiscreteScheduler, config, **times, given=given)


@pytest.mark.parametrize("given", [dict(s_churn=-1.0), dict(s_churn=1e9, s_noise=0.0), dict(s_churn=1e-9)], ids=str)
def test_churn_at_its_bounds(given):
    check(EulerDiscreteScheduler, {}, given=given)


def test_churn_that_changes_from_step_to_step():
    made = []
    for scheduler in (EulerDiscreteScheduler(), PAIRS[EulerDiscreteScheduler]()):
        scheduler.set_timesteps(6)
        torch.manual_seed(0)
        x = torch.randn(2, 3, 4, 4)
        for i, t in enumerate(scheduler.timesteps):
            m = 0.3 * scheduler.scale_model_input(x, t)
            x = scheduler.step(m, t, x, s_churn=float(i % 3), s_tmin=0.1 * i).prev_sample
        made.append(x)
    assert torch.equal(*made)


def test_ancestral_euler():
    for config in product(
        beta_schedule=BETAS,
        prediction_type=KINDS[::2],
        timestep_spacing=SPACINGS,
        steps_offset=[0, 1],
        rescale_betas_zero_snr=[False, True],
        n=[1, 7],
    ):
        check(EulerAncestralDiscreteScheduler, config, n=config.pop("n"))


def test_heun():
    for config in product(
        beta_schedule=["squaredcos_cap_v2", "exp"],
        prediction_type=KINDS,
        timestep_spacing=SPACINGS,
        sigmas=SIGMAS,
        clip_sample=[False, True],
    ):
        check(HeunDiscreteScheduler, config | {"num_train_timesteps": 100}, n=4)  # its constructor sets so many
    for times in (dict(n=1), dict(n=None, timesteps=[900, 500, 499, 3]), dict(n=10, num_train_timesteps=500)):
        check(HeunDiscreteScheduler, {}, **times)
