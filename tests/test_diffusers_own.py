"""diffusers' own scheduler tests, run against our classes, from a checkout that DIFFUSERS_SOURCE names.

They are not in its package, so that a checkout of a version near the installed one is needed, and for two of them the
package torchsde: ``git clone --depth 1 https://github.com/huggingface/diffusers`` and
``DIFFUSERS_SOURCE=diffusers pytest tests/test_diffusers_own.py``.
"""

import importlib
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="diffusers isn't installed")
SOURCE = os.environ.get("DIFFUSERS_SOURCE", "")
if not (Path(SOURCE) / "tests" / "schedulers").is_dir() or not SOURCE:
    pytest.skip(
        "diffusers' tests are not in its package; DIFFUSERS_SOURCE names a checkout that has tests/schedulers",
        allow_module_level=True,
    )

from fastddpm.integrations import diffusers as ours  # noqa: E402 (diffusers may not be there)

sys.path.insert(0, str(Path(SOURCE).resolve()))
try:
    ddpm, ddim, dpm, lcm, unipc, euler, ancestral, heun = (
        importlib.import_module(f"tests.schedulers.test_scheduler_{name}")
        for name in ("ddpm", "ddim", "dpm_multi", "lcm", "unipc", "euler", "euler_ancestral", "heun")
    )
finally:
    sys.path.pop(0)
# Its common tests know by these names who takes no whole numbers as time steps.
common = sys.modules["tests.schedulers.test_schedulers"]
common.EulerDiscreteScheduler = ours.FusedEulerDiscreteScheduler
common.EulerAncestralDiscreteScheduler = ours.FusedEulerAncestralDiscreteScheduler


class TestDDPM(ddpm.DDPMSchedulerTest):
    scheduler_classes = (ours.FusedDDPMScheduler,)


class TestDDIM(ddim.DDIMSchedulerTest):
    scheduler_classes = (ours.FusedDDIMScheduler,)


class TestDPMSolverMultistep(dpm.DPMSolverMultistepSchedulerTest):
    scheduler_classes = (ours.FusedDPMSolverMultistepScheduler,)


class TestLCM(lcm.LCMSchedulerTest):
    scheduler_classes = (ours.FusedLCMScheduler,)


class TestUniPCMultistep(unipc.UniPCMultistepSchedulerTest):
    scheduler_classes = (ours.FusedUniPCMultistepScheduler,)


class TestUniPCMultistep1D(unipc.UniPCMultistepScheduler1DTest):
    scheduler_classes = (ours.FusedUniPCMultistepScheduler,)


class TestEuler(euler.EulerDiscreteSchedulerTest):
    scheduler_classes = (ours.FusedEulerDiscreteScheduler,)


class TestEulerAncestral(ancestral.EulerAncestralDiscreteSchedulerTest):
    scheduler_classes = (ours.FusedEulerAncestralDiscreteScheduler,)


class TestHeun(heun.HeunDiscreteSchedulerTest):
    scheduler_classes = (ours.FusedHeunDiscreteScheduler,)
