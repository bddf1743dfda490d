"""diffusers' UniPC with a fused step. `fastddpm.integrations.diffusers` is where it is imported from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from . import _diffusers_rows as rows
from ._diffusers_fused import Counted
from ._diffusers_plan import EXACT, PREDICTIONS, Plan


class FusedUniPCMultistepScheduler(Counted, UniPCMultistepScheduler):
    """diffusers' `UniPCMultistepScheduler` with a fused step (arXiv 2302.04867, algorithms 1-2); the same config.

    Orders 1 to 3; diffusers itself does the others, and `solver_p`. No noise is drawn.
    """

    last_sample: Any  # these are of diffusers' class
    this_order: Any
    timestep_list: Any
    model_outputs: Any
    _threshold_sample: Any

    _hooks = ("convert_model_output", "multistep_uni_p_bh_update", "multistep_uni_c_bh_update")

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Set the time steps, as diffusers does, and compute their coefficients."""
        super().set_timesteps(num_inference_steps, device if self.solver_p else None, sigmas, mu)
        self._started(device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """The previous sample, as diffusers' step, with the same arguments, results and errors."""
        if self.num_inference_steps is None:
            return super().step(model_output, timestep, sample, return_dict)  # raises
        m, x, at = model_output, sample, self._at(timestep)
        order = self._order()
        correct = at > 0 and at - 1 not in self.disable_corrector and self.last_sample is not None
        plan, before = self._plans_of(order, correct)
        past = self.model_outputs[::-1][: max(order - 1, self.this_order if correct else 0)]
        given = [m, x, *past, *([self.last_sample] if correct else [])]
        if plan is None or any(v is None or v.shape != x.shape for v in given):
            return self._by_diffusers(m, timestep, x, return_dict)
        if self._kernel_takes(plan, at, m, x) and (before is None or before.finite(at + 2 * len(before.rows))):
            prev, converted, x = self._by_kernel(plan, before, order, m, x)
        elif all(v.dtype == x.dtype for v in given) and x.dtype in EXACT:
            converted = self._converted(plan.row(at), m, x)
            if before is not None:
                x = _corrected(before.row(at - 1), self.last_sample, converted, past[: self.this_order])
            prev = _predicted(plan.row(at), x, [converted, *past[: order - 1]])
        else:
            return self._by_diffusers(m, timestep, x, return_dict)
        self.model_outputs = [*self.model_outputs[1:], converted]
        self.timestep_list = [*self.timestep_list[1:], timestep]
        self.last_sample, self.this_order, self._step_index = x, order, at + 1
        if self.lower_order_nums < self.config.solver_order:
            self.lower_order_nums += 1
        return SchedulerOutput(prev_sample=prev) if return_dict else (prev,)

    def _plans_of(self, order: int, correct: bool) -> tuple[Plan | None, Plan | None]:
        """The plans of this step's predictor and, where there is to be one, corrector; no first: diffusers is asked."""
        at, plans = self._step_index, self._planned().orders
        highest = max(order, self.this_order if correct else 0)
        if self.solver_p or order < 1 or highest > len(plans) or not 0 <= at < len(plans[0].rows):
            return None, None
        plan, before = plans[order - 1], plans[self.this_order - 1] if correct else None
        missing = plan.rows[at] is None or (before is not None and before.rows[at - 1] is None)
        return (None, None) if missing else (plan, before)

    def _by_diffusers(self, m: Tensor, timestep: Any, x: Tensor, return_dict: bool) -> Any:
        """diffusers' own step. What the kernel keeps in float32 gets the dtype that it has there."""
        if x.device.type in self._kernel_devices:
            kept = self.last_sample, *self.model_outputs
            self.last_sample, *self.model_outputs = (v if v is None else v.to(x.dtype) for v in kept)
        return super().step(m, timestep, x, return_dict)

    def _order(self) -> int:
        """The order of a step: it rises at the start and falls at the end."""
        config, left = self.config, len(self.timesteps) - self._step_index
        order: int = min(config.solver_order, left) if config.lower_order_final else config.solver_order
        return min(order, self.lower_order_nums + 1)

    def _converted(self, row: Sequence[Any], m: Tensor, x: Tensor) -> Tensor:
        """What the solver works with: x0, or the noise; a fresh tensor."""
        kind, alpha, sigma = self.config.prediction_type, row[0], row[1]
        if not self.predict_x0:
            if kind == "v_prediction":
                return m * alpha + x * sigma
            return (x - m * alpha).div_(sigma) if kind == "sample" else m.clone()
        if kind == "epsilon":
            x0 = (x - m * sigma).div_(alpha)  # laid out as x, as there
        elif kind == "flow_prediction":
            x0 = x - m * sigma
        else:
            x0 = x * alpha - m * sigma if kind == "v_prediction" else m.clone()
        return self._threshold_sample(x0) if self.config.thresholding else x0

    def _by_kernel(self, plan: Plan, before: Plan | None, order: int, m: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """(x', converted, corrected x), the last two in float32: one launch of the kernel to predict, one to correct.

        A row has room for three more tensors and for noise, of which there is none: there goes the last sample.
        """
        outputs, dtype, row = self.model_outputs[::-1], x.dtype, self._step_index
        if before is not None:
            n = len(before.rows)
            x, m = self._step_by_kernel(before, row + 2 * n, m, x, outputs[: self.this_order], self.last_sample)
            row += n  # where the model's output is taken as it is
        prev, converted = self._step_by_kernel(plan, row, m, x, outputs[: order - 1])
        return prev.to(dtype), converted, x

    def _seen(self) -> tuple[Any, ...]:
        return *super()._seen(), self.predict_x0

    def _fits(self) -> bool:
        """Whether there are rows for this config; diffusers does the others."""
        config = self.config
        kinds = (*PREDICTIONS, "flow_prediction") if self.predict_x0 else PREDICTIONS
        return config.prediction_type in kinds and config.solver_order in (1, 2, 3) and not self._replaced()

    def _made(self, host: Tensor, *given: Any) -> Plan:
        config, plans = self.config, []
        if not self._fits() or len(self.sigmas) != len(host) + 1:
            return self._plan_of(host)
        sigmas = self.sigmas.cpu()
        alpha, sigma = self._sigma_to_alpha_sigma_t(sigmas)
        own = [alpha[:-1], (sigmas if config.prediction_type == "flow_prediction" else sigma)[:-1]]
        for order in range(1, config.solver_order + 1):
            steps, exists = rows.unipc_columns(alpha, sigma, order, self.predict_x0, config.solver_type)
            columns = [*own, *steps]
            table = None if config.thresholding else partial(self._table, order, columns)
            plans.append(self._plan_of(host, columns, exists.tolist(), table))
        plans[0].orders = tuple(plans)
        return plans[0]

    def _table(self, order: int, columns: Sequence[Tensor]) -> Any:
        """The kernel's table: n rows that predict, n that do so from converted outputs, n that correct."""
        a, b, x, d0, d1, *rest = (c.double().numpy() for c in columns)
        r, p, q = rest[: order - 1], rest[order - 1 : 2 * order - 2], rest[2 * order - 2 :]
        none, one, kind = np.zeros_like(a), np.ones_like(a), self.config.prediction_type
        of = rows.predicted if self.predict_x0 else rows.predicted_noise
        with np.errstate(all="ignore"):
            x0_x, x0_m = (one, -b) if kind == "flow_prediction" else of(kind, a, b)
            ahead = [-d1 * weight / node for weight, node in zip(p, r, strict=True)]  # of m_1, m_2
            back = [-d1 * weight / node for weight, node in zip(q[:-1], r, strict=True)]
            last = -d1 * q[-1]
            predict = {"x_x": x, "x_x0": -d0 - sum(ahead)} | {f"x_h{i}": v for i, v in enumerate(ahead, 1)}
            correct = {"x_x0": last, "x_h1": -d0 - sum(back) - last} | {f"x_h{i}": v for i, v in enumerate(back, 2)}
        correct["x_z"] = x
        given = {"x0_x": [x0_x, none, x0_x], "x0_m": [x0_m, one, x0_m]}
        for name in (*predict, *(set(correct) - set(predict))):  # the interval behind a step is what it corrects
            ours = predict.get(name, none)
            given[name] = [ours, ours, np.roll(correct.get(name, none), 1)]
        return rows.table(3 * len(a), **{name: np.concatenate(v) for name, v in given.items()})


def _predicted(row: Sequence[Any], x: Tensor, past: Sequence[Tensor]) -> Tensor:
    """x' from x and the predictions, this step's first, by diffusers' operations in their order."""
    made, d1, (r, p, _) = _started(row, x, past)
    return made.sub_(_sum(past, r, p).mul_(d1)) if r else made


def _corrected(row: Sequence[Any], last: Tensor, new: Tensor, past: Sequence[Tensor]) -> Tensor:
    """x corrected, from the sample, the predictions (`past`) and the row of the step before, and the new prediction."""
    made, d1, (r, _, q) = _started(row, last, past)
    change = (new - past[0]).mul_(q[-1])
    return made.sub_((_sum(past, r, q[:-1]).add_(change) if r else change).mul_(d1))


def _started(row: Sequence[Any], x: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, Any, list[Sequence[Any]]]:
    """The first-order part of a step, d1, and (r, p, q)."""
    _, _, c, d0, d1, *rest = row
    k = len(past) - 1
    return (x * c).sub_(past[0] * d0), d1, [rest[:k], rest[k : 2 * k], rest[2 * k :]]


def _sum(past: Sequence[Tensor], r: Sequence[Any], weights: Sequence[Any]) -> Tensor:
    """sum(weights_i D_i) over D_i = (m_i - m_0) / r_i; two on the CPU by the matrix product of diffusers' einsum."""
    differences = [(m - past[0]).div_(node) for m, node in zip(past[1:], r, strict=True)]
    if len(differences) == 1:
        return differences[0].mul_(weights[0])
    if past[0].device.type != "cpu":
        return differences[0].mul_(weights[0]).add_(differences[1].mul_(weights[1]))
    both = torch.stack(differences).reshape(1, 2, -1)
    both_weights = both.new_tensor(weights) if torch.compiler.is_compiling() else torch.stack(list(weights))
    return torch.bmm(both_weights.to(both.dtype).view(1, 1, 2), both).view(past[0].shape)
