"""What the drop-in schedulers of Karras' sigmas share: Euler, ancestral Euler, Heun."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._diffusers_fused import Counted
from ._diffusers_plan import EXACT


class FusedSigmas(Counted):
    """Scaling the model's input, and x0."""

    sigmas: Any  # these are of diffusers' class
    is_scale_input_called: bool

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """The model's input, sample / sqrt(sigma^2 + 1), as diffusers has it; a fresh tensor."""
        row = self._planned().row(self._at(timestep))
        if row is None:
            scaled: Tensor = getattr(super(), "scale_model_input")(sample, timestep)  # noqa: B009 (of diffusers' class)
            return scaled
        self.is_scale_input_called = True
        return sample / row[0]

    def _x0(self, row: Sequence[Any], m: Tensor, x: Tensor) -> Tensor:
        """The predicted clean sample, by diffusers' operations; a fresh tensor."""
        kind = self.config.prediction_type
        if kind == "epsilon":
            return x - m * row[1]  # laid out as x, as there
        return (m * row[-2]).add_(x / row[-1]) if kind == "v_prediction" else m.clone()

    def _eager(self, m: Tensor, x: Tensor) -> bool:
        """Whether the operations in place equal diffusers', with x cast to float32."""
        return m.dtype in EXACT and m.device == x.device
