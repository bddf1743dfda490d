"""Block by block: what each residual block and attention of a network makes, against the module's in float64."""

import copy

import pytest
import torch
from test_engine import CIFAR
from test_engine_kernels import CONFIGS, inputs, made, rms
from torch import Tensor, nn

from fastddpm import UNet, engine
from fastddpm.unet import ResBlock, SelfAttention


def module_blocks(net: UNet, *given: Tensor) -> dict[str, Tensor]:
    """Each block's output, [B, C, H, W], by its name."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            outputs[name] = output

        return hook

    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in net.named_modules()
        if isinstance(module, ResBlock | SelfAttention)
    ]
    net(*given)
    for hook in hooks:
        hook.remove()
    return outputs


def engine_blocks(fast: engine.Engine, *given: Tensor) -> dict[str, Tensor]:
    """The same of an engine, of those blocks whose output is written as it is, and not normalised alone."""
    outputs: dict[str, Tensor] = {}

    def kept(operation, run):
        def wrapped(*args):
            made = run(*args)
            if fast._own:
                made = [y.permute(0, 3, 1, 2) for y in args[0]]
            name = operation.name.removesuffix(".conv2").removesuffix(".to_out")
            if name != operation.name and operation.raw:
                outputs[name] = made[0].clone()
            return made

        return wrapped

    fast._runs = [kept(operation, run) for operation, run in zip(fast.plan.lowered.operations, fast._runs, strict=True)]
    fast(*given)
    return outputs


def compared(net: UNet, given: tuple, dtype: torch.dtype, *, kernels: bool) -> int:
    """How many blocks were compared: each is at most twice as wrong as eager PyTorch's."""
    x, t, labels = given
    exact = module_blocks(copy.deepcopy(net).double(), x.double(), t, labels)
    last = torch.channels_last
    eager = module_blocks(copy.deepcopy(net).to(dtype, memory_format=last), x.to(dtype, memory_format=last), t, labels)
    ours = engine_blocks(engine.compile(net, batch=len(x), dtype=dtype, kernels=kernels), x, t, labels)
    for name, output in ours.items():
        mine, theirs = rms(output - exact[name]), rms(eager[name] - exact[name])
        assert mine <= 2 * theirs, f"{name}: {mine:.2e}, eager {theirs:.2e}"
    return len(ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cifar_network(dtype):
    """22 blocks and 6 attentions, but for the last one, whose output is written normalised alone."""
    assert compared(made(CIFAR), inputs(CIFAR), dtype, kernels=False) == 27


@pytest.mark.parametrize("name", ["attention", "scale and shift, rescaled"])
def test_on_the_kernels(name):
    assert compared(made(CONFIGS[name]), inputs(CONFIGS[name]), torch.bfloat16, kernels=True) >= 6
