"""What the drop-in DDPM, DDIM and LCM schedulers share, whose levels are those of alpha_bar."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ._diffusers_fused import Fused
from ._diffusers_plan import EXACT, Plan


class FusedVP(Fused):
    """The forward process, and x0. A row's first two columns are a = sqrt(alpha_bar) and b = sqrt(1 - alpha_bar)."""

    alphas_cumprod: Any  # these are of diffusers' class
    _threshold_sample: Any

    def _seen(self) -> tuple[Any, ...]:
        return *super()._seen(), self.alphas_cumprod, self.num_inference_steps

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """q(x_t | x_0), as diffusers has it."""
        return self._moving("add_noise", original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) sample, as diffusers has it."""
        return self._moving("get_velocity", sample, noise, timesteps)

    def _moving(self, name: str, *args: Tensor) -> Tensor:
        """Call diffusers' method, which moves `alphas_cumprod` to the samples' device: the plan stays."""
        before = self._seen()
        made: Tensor = getattr(super(), name)(*args)
        if self._plan is not None and self._plan.made_from(*before):
            self._plan.saw(*self._seen())
        return made

    def _x0(self, row: Sequence[Any], m: Tensor, x: Tensor) -> Tensor:
        """The predicted clean sample, limited, by diffusers' operations in their order; a fresh tensor."""
        config, (a, b, *_) = self.config, row
        if config.prediction_type == "epsilon":
            x0 = (x - m * b).div_(a)  # laid out as x, as there
        else:
            x0 = x * a - m * b if config.prediction_type == "v_prediction" else m.clone()
        if config.thresholding:
            return self._threshold_sample(x0)
        return x0.clamp_(-config.clip_sample_range, config.clip_sample_range) if config.clip_sample else x0

    def _plan_with_table(self, host: Tensor, columns: Sequence[Tensor], exists: Sequence[bool]) -> Plan:
        """`_plan_of` these columns; thresholding is not for the kernel."""
        table = partial(self._table, columns) if any(exists) and not self.config.thresholding else None
        return self._plan_of(host, columns, exists, table)

    def _table(self, columns: Sequence[Tensor]) -> Any:
        """The columns as rows of the kernel's table."""
        raise NotImplementedError

    def _limits(self) -> dict[str, float]:
        return {"clip": float(self.config.clip_sample_range)} if self.config.clip_sample else {}

    def _eager(self, m: Tensor, x: Tensor) -> bool:
        """Whether the operations in place equal diffusers'."""
        return m.dtype == x.dtype and m.dtype in EXACT and m.device == x.device
