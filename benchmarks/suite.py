"""One case at one size: every contender through the gate, then timed in turn, then its figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import counts
from benchmarks.cases import BASELINES, Case, Contender, Shape, no_compiler
from benchmarks.gate import Gate, passes
from benchmarks.guided_cases import guided_step
from benchmarks.measure import Interleaved, Timer, Times, by_the_clock
from benchmarks.noise_cases import forward_noising, noise_alone
from benchmarks.step_cases import ddim_step, ddpm_step
from benchmarks.timers import DeviceTimer, Loop, calls_for, enqueue_timer, l2_flush
from benchmarks.training_cases import training_loss
from fastddpm.errors import InputError

CASES: dict[str, Callable[..., Case]] = {
    "ddpm_step": ddpm_step,
    "ddim_step": ddim_step,
    "guided_step": guided_step,
    "q_sample": forward_noising,
    "training_loss": training_loss,
    "normal": noise_alone,
}
LAUNCH_BOUND = 1 << 20  # elements: up to here a GPU also makes many calls in a row, and the host is timed
SMALLEST = 4096  # elements: up to here a CPU's call is nearly all dispatch
BURST, ENQUEUED = 200, 20  # calls between two events; calls enqueued at once, far below the queue's 1024 launches


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        device: where.
        rounds: timings of each contender.
        sample_seconds: least time of one on the CPU; a short call is repeated.
        no_compile: why torch.compile takes no part; None: it does.
    """

    device: torch.device
    rounds: int = 11
    sample_seconds: float = 5e-3
    no_compile: str | None = None

    @classmethod
    def of(cls, device: torch.device, *, short: bool) -> Plan:
        """Full, or the short form for CI."""
        if short:
            return cls(device, rounds=7, sample_seconds=1e-3, no_compile="the short form compiles nothing")
        return cls(device, rounds=30 if device.type == "cuda" else 11, no_compile=no_compiler())


class Timing:
    """Loops over the contenders' calls, timed in turn."""

    def __init__(self, loops: dict[str, Loop], timer: Timer) -> None:
        self.loops, self.interleaved = loops, Interleaved(loops, timer)

    def __call__(self) -> None:
        self.interleaved()

    def us(self, name: str) -> Times:
        """Microseconds of one call."""
        return Times([t * 1e6 / self.loops[name].calls for t in self.interleaved.times[name].wall])


class Measurement:
    """A case at a size: gates when it is made, times a round when it is called, has the figures in `record`.

    Attributes:
        gates: of each contender.
        left_out: who doesn't take part and why (a compiler that can't compile here); all others are in the record.
    """

    def __init__(self, case: Case, shape: Shape, plan: Plan) -> None:
        torch._dynamo.reset()  # its limit on recompilations counts the shapes too
        self.case, self.shape, self.plan = case, shape, plan
        self.gates = {name: passes(c.check, shape) for name, c in case.contenders.items()}
        self.left_out = {
            name: self.gates[name].reasons[0]
            for name, c in case.contenders.items()
            if c.role == "compile" and self.gates[name].raised
        }
        for name in self.left_out:
            del self.gates[name]
        self.timed = {name: case.contenders[name] for name, gate in self.gates.items() if gate.passed}
        sets = 3 if self.elements < 1 << 24 else 2  # two of 1 GB leave nothing of each other in a cache
        self.inputs = [case.inputs(shape, 10 + i) for i in range(sets)]
        self.cuda = plan.device.type == "cuda"
        self.main = self._timing(DeviceTimer(l2_flush(plan.device)) if self.cuda else by_the_clock, None)
        self.extra: dict[str, Timing] = {}
        if self.cuda and self.elements <= LAUNCH_BOUND:
            self.extra["burst"] = self._timing(DeviceTimer(None), BURST)
            self.extra["host"] = self._timing(enqueue_timer(torch.cuda.synchronize), ENQUEUED)

    @property
    def elements(self) -> int:
        """Of one tensor."""
        return math.prod(self.shape)

    def _timing(self, timer: Timer, calls: int | None) -> Timing:
        """Loops over the inputs, warmed up; `calls` None: one on a GPU, on the CPU as many as take `sample_seconds`."""
        loops = {name: Loop(c.call, self.inputs, calls or 1) for name, c in self.timed.items()}
        for loop in loops.values():
            for _ in range(3):
                loop()
            if calls is None and not self.cuda:
                loop.calls = calls_for(loop, self.plan.sample_seconds)
        return Timing(loops, timer)

    def __call__(self) -> None:
        """One round of every timing."""
        for timing in (self.main, *self.extra.values()):
            timing()

    def record(self) -> dict[str, Any]:
        """The figures, as JSON holds them: no NaN; None where there is none."""
        us = {name: self.main.us(name) for name in self.timed}
        made = {name: self._figures(name, us) for name in self.gates}
        return {
            "case": self.case.name,
            "title": self.case.title,
            "shape": list(self.shape),
            "elements": self.elements,
            "bytes_per_element": self.case.bytes_per_element,
            "traffic": self.case.traffic,
            "contenders": made,
            "left_out": self.left_out,
        }

    def _figures(self, name: str, us: Mapping[str, Times]) -> dict[str, Any]:
        contender, gate = self.case.contenders[name], self.gates[name]
        made: dict[str, Any] = {"role": contender.role, "gate": gate_record(gate)}
        if not gate.passed:
            return made
        median, roles = us[name].median, {n: self.case.contenders[n].role for n in us}
        medians = {n: t.median for n, t in us.items()}
        traffic = self.elements * self.case.bytes_per_element
        made |= {
            "us": {"median": median, "p10": us[name].decile(1), "p90": us[name].decile(9)},
            "calls_a_timing": self.main.loops[name].calls,
            "ns_per_element": median * 1e3 / self.elements,
            "gb_per_s": traffic / median * 1e-3,
            "of_copy": next((medians[n] / median for n in us if roles[n] == "roof"), None),
            **speedups(name, medians, roles),
            **self._counts(contender),
        }
        for what, timing in self.extra.items():
            made[f"{what}_us"] = timing.us(name).median
        if not self.cuda and self.elements <= SMALLEST:
            made["host_us"] = median
        return made

    def _counts(self, contender: Contender) -> dict[str, int | None]:
        """Launches on a GPU, ops elsewhere; and what was read back to the host."""
        call = Loop(contender.call, self.inputs)
        ops, reads = counts.ops_and_reads(call, self.plan.device) if contender.countable else (None, None)
        return {"launches": counts.launches(call) if self.cuda else None, "ops": ops, "reads": reads}


def gate_record(gate: Gate) -> dict[str, Any]:
    """The gate, for JSON; no error where it isn't finite, or where only statistics or bytes were compared."""
    error = gate.error if math.isfinite(gate.error) and gate.tolerance > 0 else None
    return {"passed": gate.passed, "error": error, "tolerance": gate.tolerance, "reasons": gate.reasons}


def speedups(name: str, medians: Mapping[str, float], roles: Mapping[str, str]) -> dict[str, float | None]:
    """How many times faster than the fastest baseline, and than eager; both only over those that passed the gate.

    Neither the roof nor a variant that does less work has a speed-up.
    """
    if roles[name] in ("roof", "variant"):
        return {"x_best": None, "x_eager": None}
    best = min((medians[n] for n in medians if roles[n] in BASELINES), default=None)
    eager = next((medians[n] for n in medians if roles[n] == "eager"), None)
    return {
        "x_best": None if best is None else best / medians[name],
        "x_eager": None if eager is None else eager / medians[name],
    }


def make(name: str, plan: Plan) -> Case:
    """The case of that name on the plan's device. Raises `InputError` where a peer isn't installed."""
    try:
        return CASES[name](plan.device, with_compile=plan.no_compile is None)
    except ImportError as error:
        raise InputError(f"a peer is missing ({error}): pip install -c constraints.txt '.[test]'") from error


def measure(case: Case, shape: Shape, plan: Plan) -> dict[str, Any]:
    """Gate, time, and return the record."""
    with torch.no_grad():
        measurement = Measurement(case, shape, plan)
        for _ in range(plan.rounds):
            measurement()
        return measurement.record()
