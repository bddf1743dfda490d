"""A CUDA graph without CUDA: what a capture runs is recorded, with its tensors, and a replay runs just that again.

So it shows what a graph would: a Python number, a branch or the choice of a buffer is what it was at the capture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fastddpm_kernels import step_loop
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastddpm import Sampler, graphs


class Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.record(func, args, kwargs or {})

    def record(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, made))
        return made

    def replay(self) -> None:
        """Run it again; what was made before is where it was."""
        for func, args, kwargs, made in self.calls:
            for before, now in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(before, Tensor) and before is not now:
                    before.copy_(now)


class FakeGraph:
    """Of `torch.cuda.CUDAGraph`, what `graphs.replay_of` and `WhileGraph` ask; a `WhileGraph`'s body counts too."""

    def __init__(self, replay: Callable[[], None]) -> None:
        self.replay = replay

    def instantiate(self) -> None:
        pass

    def raw_cuda_graph(self) -> Callable[[], None]:
        return self.replay


class FakeGraphs:
    """Stands in for `graphs.capture`, for a test's samplers on the CPU, and counts replays by their length."""

    def __init__(self, monkeypatch: Any) -> None:
        self.replays: dict[int, int] = {}
        self.captures = 0
        self.recording: Recording | None = None
        monkeypatch.setattr(graphs, "capture", self.capture)
        monkeypatch.setattr(Sampler, "_wants_graph", lambda sampler, device: sampler.graph is not False)
        plain = step_loop.inplace_step

        def inplace_step(x: Tensor) -> Callable[..., None]:
            """A launch is one thing, as on a GPU; the CPU's implementation reads the cursor."""
            launch = plain(x)

            def step(*args: Any, **kwargs: Any) -> None:
                recording = self.recording
                if recording is None:
                    return launch(*args, **kwargs)
                self.recording = None
                with torch._C._DisableTorchDispatch():
                    recording.record(launch, args, kwargs)
                self.recording = recording
                return None

            return step

        monkeypatch.setattr(step_loop, "inplace_step", inplace_step)

    def capture(
        self,
        run: Callable[[int], None],
        device: torch.device,
        lengths: Sequence[int] = (1,),
        pool: Any = None,
        *,
        loop: bool = False,
    ) -> dict[int, Callable[[], None]]:
        self.captures += 1
        for _ in range(graphs.WARM_UPS):
            run(1)
        made = {n: FakeGraph(self._captured(run, n)) for n in lengths}
        return {n: graphs.replay_of(graph, n, device, loop=loop and n > 1) for n, graph in made.items()}

    def _captured(self, run: Callable[[int], None], n: int) -> Callable[[], None]:
        with Recording() as recording:
            self.recording = recording
            try:
                run(n)
            finally:
                self.recording = None

        def replay() -> None:
            self.replays[n] = self.replays.get(n, 0) + 1
            recording.replay()

        return replay
