"""How many compiled kernels the solvers need: one source, specialised by what a table has, not by its solver."""

import pytest
import torch
from fastddpm_kernels import reverse_step_kernel, step_loop, step_registration

from fastddpm import EDMSchedule, NoiseSchedule, Sampler, solvers

LINEAR = NoiseSchedule.linear()
HISTORY, NOISE, DIRECT, SCALED, LIMITED = "HISTORY", "NOISE", "DIRECT", "SCALED", "LIMITED"
FLAGS = (LIMITED, "DYNAMIC", NOISE, "LEARNED", DIRECT, HISTORY, "INPAINT", "GUIDED", "RESCALED", "WRITE_INPUT", SCALED)


@pytest.fixture
def launched(monkeypatch):
    """The constants that the kernel is launched with, in the order of the launches."""
    constants = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *arguments, **options: constants.append(frozenset(options.items()))

    def launch(*given, **following):  # as on a GPU, where the kernel makes the noise
        buffers, (guidance, rescale, known, mask, _, *flags) = given[:11], given[11:]
        step_registration._reverse_step_inplace_cuda(
            *buffers, guidance, rescale, known, mask, None, *flags, **following
        )

    monkeypatch.setattr(reverse_step_kernel, "reverse_step_kernel", Recorder())
    monkeypatch.setattr(step_loop, "inplace_step", lambda x: launch)
    return constants


def sampled(table, launched):
    """The specialisations with which a run of this table launches."""
    launched.clear()
    Sampler(lambda x, t: 0.1 * x, table).sample((2, 64), seeds=0, x_T=torch.zeros(2, 64))
    assert len(launched) == table.num_rows
    return set(launched)


def test_all_solvers_need_eight_kernels_between_them(launched):
    """Seventeen solvers, each with one for all of its steps: with noise or 0 to 3 histories, with a term in the model's
    output itself (ddim), with a scaled input ("ve")."""
    needed = {}
    for name in solvers.names():
        options = {"repaint": {"jump_length": 2}, "annealed_langevin": {"each": 2}}.get(name, {})
        schedule = EDMSchedule() if name == "consistency" else LINEAR
        made = sampled(solvers.make(name, schedule, 8, **options), launched)
        assert len(made) == 1, name
        needed[name] = made.pop()
    kinds = {tuple(dict(made)[flag] for flag in FLAGS) for made in needed.values()}
    assert len(set(needed.values())) == len(kinds) == 8


def test_neither_steps_nor_options_nor_order_of_the_same_history_need_another(launched):
    dpm = {
        specialisation
        for steps in (5, 20)
        for spacing in ("linspace", "karras")
        for kind in ("midpoint", "heun")
        for prediction in ("epsilon", "v_prediction")
        for specialisation in sampled(
            solvers.dpm_solver(LINEAR, steps, spacing=spacing, solver_type=kind, prediction_type=prediction), launched
        )
    }
    assert len(dpm) == 1
    assert dpm == sampled(solvers.dpm_solver_singlestep(LINEAR, 9), launched)
    assert dpm == sampled(solvers.deis(LINEAR, 9), launched)
    assert dpm == sampled(solvers.retimed(solvers.dpm_solver(LINEAR, 9), LINEAR, NoiseSchedule.cosine()), launched)
