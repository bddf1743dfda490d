"""The cases of benchmarks/run.py under pytest-benchmark; on the CPU in their short form.

Run: ``pytest benchmarks/test_kernels.py -s``. A contender that float64 contradicts fails the test.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import suite
from benchmarks.cases import Shape, shapes
from benchmarks.measure import machine, table
from benchmarks.run import rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHORT = DEVICE.type == "cpu"
PLAN = suite.Plan.of(DEVICE, short=SHORT)


@pytest.mark.parametrize("shape", shapes(DEVICE, SHORT), ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", suite.CASES)
@torch.no_grad()
def test_kernel(name: str, shape: Shape, benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measurement = suite.Measurement(suite.make(name, PLAN), shape, PLAN)
        wrong = {who: gate.reasons for who, gate in measurement.gates.items() if not gate.passed}
        assert not wrong
        benchmark.pedantic(measurement, rounds=PLAN.rounds, iterations=1, warmup_rounds=0)
        record = measurement.record()
    finally:
        torch.set_num_threads(threads)
    benchmark.extra_info.update(record, machine=machine())
    with capsys.disabled():
        print(table(f"{record['title']}, {shape}", rows(record)))
