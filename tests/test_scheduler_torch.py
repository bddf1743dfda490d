"""The drop-in schedulers and torch: waits for the device, compiled code, gradients, transforms, inference mode."""

import copy

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers isn't installed")
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from schedulers import PAIRS, Waits, each, kinds, noisy, over, quiet, walk

pytestmark = quiet


# --- no waiting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [None, 2])
@pytest.mark.parametrize("by_kernel", [False, True])
@each
def test_no_step_waits_for_the_device(stock, fused, by_kernel, begin, monkeypatch):
    if by_kernel:
        monkeypatch.setattr(fused, "_kernel_devices", ("cpu",))
    counted = hasattr(stock, "set_begin_index")
    for order in (1, 2, 3) if stock is UniPCMultistepScheduler else (None,):
        counts, config = [], {} if order is None else {"solver_order": order}
        for scheduler in (fused(**config), stock(**config)):
            scheduler.set_timesteps(10)
            if begin is not None and counted:
                scheduler.set_begin_index(begin)
            x, steps = torch.randn(2, 3, 4, 4), scheduler.timesteps[begin if counted else None :]
            with Waits() as waits:
                for t in steps:
                    scheduler.step(scheduler.scale_model_input(x, t), t, x)
            counts.append(len(waits.names))
        assert counts[0] == 0
        assert counts[1] > 0 or begin is not None  # so that the test would see some


@each
def test_what_diffusers_does_itself_waits_no_more(stock, fused):
    config = {"variance_type": "learned"} if stock in (DDPMScheduler, DPMSolverMultistepScheduler) else {}
    scheduler = fused(**config)
    scheduler.set_timesteps(10)
    x = torch.randn(2, 3, 4, 4).half()
    m = torch.cat([x, x], dim=1) if stock is DDPMScheduler else x
    with Waits() as waits:
        for t in scheduler.timesteps:
            scheduler.step(m, t, scheduler.scale_model_input(x, t))
    assert "nonzero" not in waits.names
    if stock in (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler):
        assert not [name for name in waits.names if name != "_to_copy"]


@each
def test_compiled_code_is_one_frame(stock, fused):
    from torch._dynamo.testing import CompileCounter

    config, given = noisy(stock)
    cases = [(config, given)] if (config, given) == ({}, {}) else [({}, {}), (config, given)]
    for config, given in cases + ([({"solver_order": 3}, {})] if stock is UniPCMultistepScheduler else []):
        scheduler = fused(**config)
        scheduler.set_timesteps(4)
        walk(scheduler, torch.randn(2, 3, 4, 4), **given)  # the plan knows the arguments from here on

        def start(scheduler=scheduler):
            scheduler.set_timesteps(4)
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(0)
            torch.manual_seed(0)

        def trajectory(x, scheduler=scheduler, given=given):
            for t in scheduler.timesteps:
                x = scheduler.step(0.3 * scheduler.scale_model_input(x, t), t, x, **given, return_dict=False)[0]
            return x

        x = torch.randn(2, 3, 4, 4)
        torch._dynamo.reset()
        counter = CompileCounter()
        start()
        made = torch.compile(trajectory, backend=counter, fullgraph=True)(x)
        start()
        assert torch.equal(made, trajectory(x))
        assert counter.frame_count == 1


def test_compiled_code_off_the_schedule():
    scheduler, stock = PAIRS[DDIMScheduler](), DDIMScheduler()
    for s in (scheduler, stock):
        s.set_timesteps(10)
    m, x = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    torch._dynamo.reset()
    step = torch.compile(lambda m, t, x: scheduler.step(m, t, x, return_dict=False)[0], backend="eager")
    for t in (500, 501, 950, 3):
        assert torch.equal(step(m, torch.tensor(t), x), stock.step(m, t, x).prev_sample)


# --- gradients, transforms, inference mode ----------------------------------------------------------------------------


@each
def test_gradients_pass(stock, fused):
    configs = [{"prediction_type": kind} for kind in kinds(stock)]
    if stock is UniPCMultistepScheduler:
        configs += [{"solver_order": 1}, {"solver_order": 3}]
    for config in configs:
        made = []
        for scheduler in (stock(**config), fused(**config)):
            scheduler.set_timesteps(5)
            torch.manual_seed(0)
            m, x = (torch.randn(2, 1, 3, 3, requires_grad=True) for _ in range(2))
            walk(scheduler, x, scheduler.timesteps[:4], lambda y, m=m: m * y).square().sum().backward()
            made.append((m.grad, x.grad))
        for one, other in zip(*made, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


@over([DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
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


@each
def test_time_steps_that_were_set_in_inference_mode(stock, fused):
    """Where diffusers' own may raise."""
    made = []
    for scheduler, mode in ((fused(), True), (stock(), False)):
        with torch.inference_mode(mode):
            scheduler.set_timesteps(5)
        x = torch.ones(1, 2, 3, 3, requires_grad=True)
        walk(scheduler, x, scheduler.timesteps[1:2], lambda x: x * x).sum().backward()
        made.append(x.grad)
    torch.testing.assert_close(made[1], made[0])
