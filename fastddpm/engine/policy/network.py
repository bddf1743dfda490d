"""Which layers of a policy's UNet are where: the names of Diffusion Policy's and of LeRobot's, read into one form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import InputError

_PARTS = {"diffusion_step_encoder", "down_modules", "mid_modules", "up_modules", "final_conv"}


@dataclass(frozen=True)
class Block:
    """Conv1d, GroupNorm and Mish: the paths of the first two."""

    conv: str
    norm: str


@dataclass(frozen=True)
class Residual:
    """Two blocks, with FiLM (arXiv 1709.07871) behind the first, and a path past both."""

    first: Block
    second: Block
    film: str  # a Linear, of the condition
    shortcut: str  # a 1x1 convolution, or "": the input itself


@dataclass(frozen=True)
class Level:
    """Two residual blocks, and the convolution that halves or doubles the length: a path, or "" for none."""

    first: Residual
    second: Residual
    resample: str


@dataclass(frozen=True)
class Network:
    """A policy's UNet, by the paths of its layers."""

    downs: tuple[Level, ...]
    middle: tuple[Residual, ...]
    ups: tuple[Level, ...]
    last: Block
    out: str


def is_policy_unet(module: object) -> bool:
    """Whether this is meant to be such a UNet: `read` says whether it is one."""
    return isinstance(module, nn.Module) and {name for name, _ in module.named_children()} >= _PARTS


def read(module: nn.Module) -> Network:
    """The layers of ConditionalUnet1D or DiffusionConditionalUnet1d.

    Raises:
        InputError: where a layer is missing, is of another kind, or is one too many: another network's forward would
            compute something else. And for a network with a local condition.
    """
    return _Reader(module).network()


class _Reader:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def network(self) -> Network:
        module: Any = self.module
        if getattr(module, "local_cond_encoder", None) is not None:
            raise InputError("the UNet has a local_cond_encoder, which the engine doesn't have: keep the module itself")
        self.children("", _PARTS, optional={"local_cond_encoder"})
        self.encoder()
        downs = tuple(self.level(f"down_modules.{i}", up=False) for i in range(len(module.down_modules)))
        middle = tuple(self.residual(f"mid_modules.{i}") for i in range(len(module.mid_modules)))
        ups = tuple(self.level(f"up_modules.{i}", up=True) for i in range(len(module.up_modules)))
        self.children("final_conv", {"0", "1"})
        self.conv("final_conv.1", {1})
        skips = len(downs) - len(ups)
        if not downs or skips not in (0, 1):
            raise InputError(
                f"the UNet has {len(downs)} down_modules and {len(ups)} up_modules; needed: as many, or one more"
            )
        return Network(downs, middle, ups, self.block("final_conv.0"), "final_conv.1")

    def encoder(self) -> None:
        self.children("diffusion_step_encoder", {"0", "1", "2", "3"})
        for index, kind in (("1", nn.Linear), ("2", nn.Mish), ("3", nn.Linear)):
            self.layer(f"diffusion_step_encoder.{index}", kind)

    def level(self, path: str, *, up: bool) -> Level:
        self.children(path, {"0", "1", "2"})
        resample = f"{path}.2"
        layer: Any = self.module.get_submodule(resample)
        if isinstance(layer, nn.Identity):
            resample = ""
        else:
            if not isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):  # Downsample1d, Upsample1d
                self.children(resample, {"conv"})
                resample = f"{resample}.conv"
            if up:
                self.transposed(resample)
            else:
                self.conv(resample, {3}, stride=2)
        return Level(self.residual(f"{path}.0"), self.residual(f"{path}.1"), resample)

    def residual(self, path: str) -> Residual:
        layer: Any = self.module.get_submodule(path)
        theirs = hasattr(layer, "blocks")
        names = {"blocks"} if theirs else {"conv1", "conv2"}
        self.children(path, {*names, "cond_encoder", "residual_conv"})
        if theirs:
            self.children(f"{path}.blocks", {"0", "1"})
        first, second = (
            self.block(f"{path}.{name}") for name in (("blocks.0", "blocks.1") if theirs else sorted(names))
        )
        film = f"{path}.cond_encoder"
        self.children(film, {"0", "1"}, optional={"2"})  # 2: Rearrange, a view
        self.layer(f"{film}.0", nn.Mish)
        self.layer(f"{film}.1", nn.Linear)
        shortcut = f"{path}.residual_conv"
        if isinstance(layer.residual_conv, nn.Identity):
            shortcut = ""
        else:
            self.conv(shortcut, {1})
        return Residual(first, second, f"{film}.1", shortcut)

    def block(self, path: str) -> Block:
        self.children(path, {"block"})
        self.children(f"{path}.block", {"0", "1", "2"})
        self.conv(f"{path}.block.0", {1, 3, 5, 7})
        self.layer(f"{path}.block.1", nn.GroupNorm)
        self.layer(f"{path}.block.2", nn.Mish)
        return Block(f"{path}.block.0", f"{path}.block.1")

    def conv(self, path: str, kernels: Iterable[int], stride: int = 1) -> None:
        layer = self.layer(path, nn.Conv1d)
        (kernel,) = layer.kernel_size
        given = (layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode, layer.bias is None)
        if kernel not in kernels or given != ((stride,), (kernel // 2,), (1,), 1, "zeros", False):
            raise InputError(
                f"{path} is {layer}; needed: kernel size {kernels}, stride {stride}, padding half of it, bias"
            )

    def transposed(self, path: str) -> None:
        layer = self.layer(path, nn.ConvTranspose1d)
        given = (layer.kernel_size, layer.stride, layer.padding, layer.output_padding, layer.dilation, layer.groups)
        if given != ((4,), (2,), (1,), (0,), (1,), 1) or layer.bias is None:
            raise InputError(f"{path} is {layer}; needed: kernel size 4, stride 2, padding 1, bias")

    def layer(self, path: str, kind: type[nn.Module]) -> Any:
        layer = self.module.get_submodule(path)
        if type(layer) is not kind:
            raise InputError(f"{path} is a {type(layer).__name__}; needed: {kind.__name__}, as in ConditionalUnet1D")
        return layer

    def children(self, path: str, needed: set[str], optional: Iterable[str] = ()) -> None:
        names = {name for name, _ in self.module.get_submodule(path).named_children()}
        if names - set(optional) != needed:
            where = path or type(self.module).__name__
            raise InputError(f"{where} has {sorted(names)}; needed: {sorted(needed)}, as ConditionalUnet1D has")
