"""Settings that all tests share: threads, Triton's interpreter where there is no GPU, hypothesis, the `gpu` marker."""

import os

# Before torch's import: two threads at most, one in each of `pytest -n`'s processes; none that spins while it waits.
threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1)
os.environ.setdefault("OMP_NUM_THREADS", str(threads))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# Before triton's import, which `import torch` leaves undone. Child processes inherit both.
NO_GPU = "" if torch.cuda.is_available() else f"needs an NVIDIA GPU; torch {torch.__version__} finds none"
if NO_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import HealthCheck, settings

settings.register_profile("fast", derandomize=True, deadline=None, database=None, max_examples=20, print_blob=False)
settings.register_profile(
    "thorough", deadline=None, database=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is no GPU, and say so."""
    if NO_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=NO_GPU))
