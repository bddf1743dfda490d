"""The contenders of `unet_contenders` at one batch: made, compared with float64, timed in turn, and what they need."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import counts
from benchmarks.measure import Interleaved
from benchmarks.race import ROUNDS
from benchmarks.unet_contenders import FLAGS, Contender, Setting, Whole, all_of
from fastddpm.unet import UNet
from fastddpm.unet_config import UNetConfig

YARDSTICK = "E bfloat16"
DOCUMENTED, WHOLE = "C1", "C2"
OURS = ("ours", "ours, PyTorch's kernels")
EARLY = 2  # rounds of the figures that later ones replace, unless what is made meanwhile takes too long
Makers = Mapping[str, Callable[[], Contender]]


def setting_of(config: UNetConfig, batch: int, device: torch.device, steps: int | None = None) -> Setting:
    """Random weights and input; a run's steps by the batch: about a second of them, and ten at least."""
    torch.manual_seed(0)
    net = UNet(config).eval().requires_grad_(False).to(device)
    size = config.sample_size or 32
    x = torch.randn(batch, config.in_channels, size, size, device=device)
    return Setting(net, x, 500, steps or (50 if batch <= 64 else 20 if batch <= 256 else 10))


def flops_of(config: UNetConfig) -> int:
    """Of an image's forward in the network as it is written: convolutions and products, by PyTorch's counter."""
    with torch.device("meta"):
        net, size = UNet(config), config.sample_size or 32
        x, t = torch.randn(1, config.in_channels, size, size), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        net(x, t)
    return counter.get_total_flops()


def rms(error: Tensor) -> float:
    return float(error.double().square().mean().sqrt())


def failure(error: Exception) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"


class UNetRace:
    """One batch.

    Attributes:
        ready: the contenders that are made and right, by name.
        made: of each: error, seconds to prepare, memory; or why it failed.
        flags: C2's, each with its ms a step or why it failed.
    """

    def __init__(self, setting: Setting, makers: Makers | None = None) -> None:
        self.setting = setting
        self.makers = all_of(setting) if makers is None else makers
        self.exact = setting.exact()
        self.ready: dict[str, Contender] = {}
        self.made: dict[str, dict[str, Any]] = {}
        self.flags: dict[str, float | str] = {}

    def make(self, names: Iterable[str] | None = None) -> None:
        """These of the makers; None: all. C2 is apart."""
        for name in self.makers if names is None else names:
            self._add(name, self.makers[name])

    def make_whole(
        self,
        seconds: float,
        first: str | None = None,
        maker: Callable[[str], Contender] | None = None,
        most: int = len(FLAGS),
    ) -> None:
        """C2: the fastest of its flags; one is tried whatever it takes, others as long as there is time.

        Args:
            seconds: no flags are tried after these.
            first: what was best at another batch.
            maker: makes one of flags.
            most: how many are tried.
        """
        names = [*([first] if first else []), *(name for name in FLAGS if name != first)]
        begin, best = time.monotonic(), float("inf")
        for at, name in enumerate(names):
            if at and (at >= most or time.monotonic() - begin > seconds):
                self.flags[name] = "not tried"
                continue
            kept = self.ready.pop(WHOLE, None), self.made.pop(WHOLE, None)
            self._add(
                WHOLE, (lambda name=name: maker(name)) if maker else (lambda name=name: Whole(self.setting, name))
            )
            self.made[WHOLE]["flags"] = name
            if WHOLE in self.ready:
                taken = min(self._timed(self.ready[WHOLE]) for _ in range(3)) / self.setting.steps
                self.flags[name] = taken * 1e3
            else:
                taken, self.flags[name] = float("inf"), str(self.made[WHOLE].get("failed"))
            if taken >= best and kept[0] is not None and kept[1] is not None:
                self.ready[WHOLE], self.made[WHOLE] = kept[0], kept[1]
            best = min(best, taken)
            self._tidy()

    def _add(self, name: str, maker: Callable[[], Contender]) -> None:
        """Make, prepare, compare with float64, measure memory; what raises is left out, with the reason."""
        self._tidy()
        before, begin = self._reserved(), time.monotonic()
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                contender = maker()
                contender.prepare()
            seconds = time.monotonic() - begin
            error = rms(contender.predict()[: len(self.exact)].double() - self.exact) / rms(self.exact)
            yardstick = self.made.get(YARDSTICK, {}).get("error", 2.5e-2)
            self.made[name] = {"error": error, "prepare_s": seconds}
            slower = [str(w.message) for w in said if str(w.message).startswith("no CUDA graph")]
            if slower:  # such as a step that could not be captured: ours, but not as it is meant
                self.made[name]["warned"] = slower[0]
            if not error <= 2 * yardstick:
                raise ArithmeticError(f"off by {error:.2e} of the output; {YARDSTICK} by {yardstick:.2e}")
            self._tidy()
            if not bool(contender.run().isfinite().all()):
                raise ArithmeticError("a run's result is not finite")
            self.made[name]["peak_mb"] = None if before is None else (torch.cuda.max_memory_reserved() - before) / 1e6
            self.ready[name] = contender
        except Exception as error:  # peers, compilers and kernels raise all kinds
            self.made[name] = {"failed": failure(error)}

    def _reserved(self) -> int | None:
        return torch.cuda.memory_reserved() if self.setting.cuda else None

    def _tidy(self) -> None:
        if self.setting.cuda:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _timed(self, contender: Contender) -> float:
        begin = time.perf_counter()
        self.waited(contender)()
        return time.perf_counter() - begin

    def _kernels(self, name: str) -> float | None:
        """Of a step; None where the profiler can't say."""
        try:
            return counts.launches(self.ready[name].run) / self.setting.steps or None
        except Exception:  # such as a machine whose counters are not allowed to be read
            return None

    def count(self, made: Mapping[str, dict[str, Any]]) -> None:
        """Put the kernels of a step to the figures."""
        for name in self.ready:
            made[name]["kernels_step"] = self._kernels(name)

    def waited(self, contender: Contender) -> Callable[[], None]:
        """A run, and the wait for it."""

        def run() -> None:
            contender.run()
            if self.setting.cuda:
                torch.cuda.synchronize()

        return run

    def record(
        self, flops: int, matmul: float | None, rounds: int | None = None, count: bool | None = None
    ) -> dict[str, Any]:
        """Time all that are ready, in turn; returns the figures of all.

        Args:
            flops: of an image's forward.
            matmul: FLOP/s of a bfloat16 product of this GPU.
            rounds: of the timing; None: `ROUNDS`.
            count: whether to count the kernels of a step; None: on a GPU.
        """
        count, rounds = self.setting.cuda if count is None else count, rounds or ROUNDS
        turns = Interleaved({name: self.waited(contender) for name, contender in self.ready.items()})
        for _ in range(rounds):
            turns()
        made = {name: dict(figures) for name, figures in self.made.items()}
        for name, times in turns.times.items():
            steps, batch = self.setting.steps, self.setting.batch
            step = times.median / steps
            rate = flops * batch / step
            made[name] |= {
                "ms_step": {
                    q: 1e3 * v / steps for q, v in zip(("median", "p10", "p90"), _quantiles(times), strict=True)
                },
                "images_per_s_1000_steps": batch / (1000 * step),
                "images_per_s_50_steps": batch / (50 * step),
                "tflops": rate * 1e-12,
                "of_matmul": None if matmul is None else rate / matmul,
                "kernels_step": None,
            }
        if count:
            self.count(made)
        return {
            "batch": self.setting.batch,
            "steps_a_run": self.setting.steps,
            "rounds": rounds,
            "contenders": made,
            "c2_flags": self.flags,
        }


def measured(
    race: UNetRace,
    flops: int,
    matmul: float | None,
    keep: Callable[[dict[str, Any]], None],
    *,
    seconds: float,
    first: str | None = None,
    most: int = len(FLAGS),
    maker: Callable[[str], Contender] | None = None,
) -> dict[str, Any]:
    """Make and time a batch; `keep` is given the figures as they grow, since what is made next may take too long.

    First the peers that need no compiler, then ours, C2, C1; then, of all in turn, the figures that stay; at last what
    a profiler counts.

    Args:
        seconds: half of them are for what is made; the flags of C2 have what is left of that.
        first, most, maker: as in `make_whole`.
    """
    end = time.monotonic() + seconds / 2
    race.make(name for name in race.makers if name not in (*OURS, DOCUMENTED))
    keep(race.record(flops, matmul, EARLY, count=False))
    race.make(name for name in race.makers if name in OURS)
    keep(race.record(flops, matmul, EARLY, count=False))
    race.make_whole(end - time.monotonic(), first, maker, most)
    keep(race.record(flops, matmul, EARLY, count=False))
    race.make(name for name in race.makers if name == DOCUMENTED)
    made = race.record(flops, matmul, count=False)
    keep(made)
    if race.setting.cuda:
        race.count(made["contenders"])
        keep(made)
    return made


def _quantiles(times: Any) -> tuple[float, float, float]:
    return times.median, times.decile(1), times.decile(9)


def rows(record: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """A batch as a text table; images/s are computed from the time a step."""
    made = {}
    timed = {name: c["ms_step"]["median"] for name, c in record["contenders"].items() if "ms_step" in c}
    peers = [ms for name, ms in timed.items() if not name.startswith("ours")]
    for name, c in record["contenders"].items():
        cells = dict.fromkeys(
            ("ms a step", "p10 ... p90", "img/s, T=1000", "img/s, 50", "of matmul", "MB", "kernels", "x best peer"), "-"
        )
        cells["error"] = f"FAILED: {c['failed']}" if "failed" in c else f"{c['error']:.1e}"
        cells["error"] += f" ({c['warned']})" if "warned" in c else ""
        if name in timed:
            ms = c["ms_step"]
            cells |= {
                "ms a step": f"{ms['median']:.3f}",
                "p10 ... p90": f"{ms['p10']:.3f} ... {ms['p90']:.3f}",
                "img/s, T=1000": f"{c['images_per_s_1000_steps']:.2f}",
                "img/s, 50": f"{c['images_per_s_50_steps']:.1f}",
                "x best peer": f"{min(peers) / ms['median']:.2f}" if peers else "-",
            }
            cells |= {
                title: form.format(c[key] * factor)
                for title, key, form, factor in (
                    ("of matmul", "of_matmul", "{:.0f} %", 100),
                    ("MB", "peak_mb", "{:.0f}", 1),
                    ("kernels", "kernels_step", "{:.1f}", 1),
                )
                if c[key] is not None
            }
        made[f"{name} ({c['flags']})" if c.get("flags") else name] = cells
    return made
