"""The exceptions that fastddpm raises on purpose; each has the exit code that the command line ends with."""

from typing import Any


class FastDDPMError(Exception):
    """Any error that fastddpm raises on purpose."""

    exit_code = 1


class ConfigError(FastDDPMError, ValueError):
    """A configuration (schedule, solver options, architecture) that is not allowed."""

    exit_code = 2


class InputError(FastDDPMError, ValueError):
    """An argument (shape, seed, dtype) that is not allowed."""

    exit_code = 2


class CheckpointError(FastDDPMError):
    """A weights folder that is missing, damaged or foreign."""

    exit_code = 3


class OutputError(FastDDPMError):
    """An output that can't be written."""

    exit_code = 5


class NonFiniteError(FastDDPMError):
    """A sample became NaN or infinite; the message names the sample and the step.

    Attributes:
        samples: all samples [B, ...], the good ones with it.
        bad: bool [B].
    """

    exit_code = 6

    def __init__(self, message: str, *, samples: Any = None, bad: Any = None) -> None:
        super().__init__(message)
        self.samples = samples
        self.bad = bad


class GraphCaptureError(FastDDPMError):
    """A model could not be captured into a CUDA graph, and the caller insisted on one."""

    exit_code = 7


class DeviceError(FastDDPMError):
    """The device that was asked for is not there."""

    exit_code = 7


class BusyError(FastDDPMError, TimeoutError):
    """There was no room for a request in the time that its caller gave it."""
