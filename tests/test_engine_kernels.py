"""The engine on fastddpm's kernels, interpreted where there is no GPU: networks against the module in float64."""

import copy

import pytest
import torch
from fastddpm_kernels import conv, conv_choice, conv_kernel
from fastddpm_kernels.attention_reference import attention
from helpers import DEVICE
from test_engine import CIFAR

from fastddpm import UNet, engine
from fastddpm.engine import on_triton
from fastddpm.engine.on_torch import Inputs
from fastddpm.engine.operations import Attention, Value
from fastddpm.engine.plan import Plan
from fastddpm.errors import InputError
from fastddpm.unet_config import UNetConfig

SMALL = dict(sample_size=8, block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=16, layers_per_block=1)
ATTENDS = dict(
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
PLAIN = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
CONFIGS = {
    "attention": UNetConfig(**SMALL, **ATTENDS),
    "scale and shift, rescaled": UNetConfig(
        **SMALL, **ATTENDS, resnet_time_scale_shift="scale_shift", mid_block_scale_factor=1.4142
    ),
    "groups of 12, other padding, classes": UNetConfig(
        **SMALL | {"block_out_channels": (32, 64), "norm_num_groups": 8},
        **PLAIN,
        add_attention=False,
        downsample_padding=0,
        num_class_embeds=3,
        in_channels=1,
        out_channels=2,
    ),
    "statistics from program to program": UNetConfig(**SMALL | PLAIN | {"sample_size": 16, "add_attention": False}),
}


def made(config: UNetConfig) -> UNet:
    torch.manual_seed(0)
    net = UNet(config).eval().requires_grad_(False).to(DEVICE)
    for name, parameter in net.named_parameters():
        if "norm" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def inputs(config: UNetConfig, batch: int = 2):
    size = config.sample_size
    x = torch.randn(batch, config.in_channels, size, size, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    labels = None if config.num_class_embeds is None else (torch.arange(batch) % 3).to(DEVICE)
    return x, torch.tensor([999, 3, 500], device=DEVICE)[:batch], labels


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize(
    ("name", "dtype"), [("attention", torch.float32), *((name, torch.bfloat16) for name in CONFIGS)]
)
def test_it_is_the_module(name, dtype):
    config = CONFIGS[name]
    net, (x, t, labels) = made(config), inputs(config)
    truth = copy.deepcopy(net).double()(x.double(), t, labels)
    eager = copy.deepcopy(net).to(dtype)(x.to(dtype), t, labels)
    fast = engine.compile(net, batch=2, dtype=dtype, kernels=True)(x, t, labels)
    assert fast.shape == truth.shape
    assert rms(fast - truth) <= 2 * rms(eager - truth)


def test_memory_that_is_shared_keeps_nothing_and_a_sample_is_its_own(monkeypatch):
    """Poisoned memory, another order of the samples, another call between: the same bits."""
    config = CONFIGS["attention"]
    fast = engine.compile(made(config), batch=2, kernels=True)
    x, t, _ = inputs(config)
    first = fast(x, t)
    allocated = fast._allocated

    def poisoned(x):
        values = allocated(x)
        for value in values.values():
            value.fill_(torch.nan)
        return values

    def memories(*args):
        made = plain(*args)
        made[0].workspace.fill_(torch.nan)
        return made

    plain = on_triton.memories
    monkeypatch.setattr(on_triton, "memories", memories)
    monkeypatch.setattr(fast, "_allocated", poisoned)
    again = fast(x.flip(0), t.flip(0))
    assert torch.equal(again.flip(0), first)
    assert not again.isnan().any()


def one_level(**fields) -> UNetConfig:
    plain = dict(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    return UNetConfig(**SMALL | plain | {"block_out_channels": (16,), "add_attention": False} | fields)


def test_a_call_leaves_the_memory_of_others_alone(monkeypatch):
    """A graph that was captured, and another stream's or thread's call, go on with theirs."""
    fast = engine.compile(made(one_level()), kernels=True)
    allocated, kept = fast._allocated, []

    def keeping(x):
        kept.append(allocated(x))
        return dict(kept[-1])

    monkeypatch.setattr(fast, "_allocated", keeping)
    x, t, _ = inputs(fast.config, 1)
    first = fast(x, t).clone()
    before = {index: value.clone() for index, value in kept[0].items()}
    assert not torch.equal(fast(x + 1, t), first)
    assert all(torch.equal(kept[0][index].isnan(), value.isnan()) for index, value in before.items())
    assert all(torch.equal(kept[0][index].nan_to_num(), value.nan_to_num()) for index, value in before.items())


def test_an_image_with_gaps():
    """A slice of a channels_last tensor is channels_last by its strides, and yet not contiguous."""
    fast = engine.compile(made(one_level(in_channels=3)), dtype=torch.float32, kernels=True)
    x = torch.randn(2, 5, 8, 16, device=DEVICE).to(memory_format=torch.channels_last)[:1, :3, :8, :8]
    t = torch.tensor([3], device=DEVICE)
    assert torch.equal(fast(x, t), fast(x.clone(memory_format=torch.contiguous_format), t))


def test_a_head_too_wide_for_the_kernel():
    """512 in float32: torch attends."""
    operation = Attention("", (Value(1, 2, 2, 3 * 512),), Value(2, 2, 2, 512), heads=1)
    packed, out = torch.randn(3, 2, 2, 3 * 512, device=DEVICE), torch.empty(3, 2, 2, 512, device=DEVICE)
    on_triton.MAKERS[type(operation)](operation, made(one_level()), torch.float32)(
        [out], Inputs([packed], packed, None, []), on_triton.Memory(out, out)
    )
    truth = attention(packed.double().flatten(1, 2), 1).reshape(out.shape)
    assert (out - truth).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["attention", "scale and shift, rescaled"])
def test_convolutions_that_a_table_gives_to_cudnn(name, monkeypatch):
    """PyTorch's, with the norms behind them: the same network; and each is looked up by its own shape."""
    config, asked = CONFIGS[name], []

    def choice(gpu, shape, batch):
        asked.append(shape)
        return conv_choice.Choice(own=False, numbers=None, split=None)

    net, (x, t, labels) = made(config), inputs(config)
    truth = copy.deepcopy(net).double()(x.double(), t, labels)
    eager = copy.deepcopy(net).bfloat16()(x.bfloat16(), t, labels)
    monkeypatch.setattr(conv_choice, "choice", choice)

    def launch_conv(x, weight, *args, **options):
        assert weight.shape[0] == x.shape[3], "a convolution was ours"  # a projection: 1x1
        return launch(x, weight, *args, **options)

    launch = conv.launch_conv
    monkeypatch.setattr(conv, "launch_conv", launch_conv)
    fast = engine.compile(net, batch=2, kernels=True)
    assert rms(fast(x, t, labels) - truth) <= 2 * rms(eager - truth)
    assert asked == [on_triton.shape_of(op, torch.bfloat16) for op in fast.plan.lowered.operations if op.kind == "conv"]


@pytest.mark.parametrize("batch", [1, 8, 256])
def test_an_operation_is_one_launch(batch, monkeypatch):
    """Counted, at every batch: 72 of the CIFAR-10 network, where eager PyTorch has 392."""
    launches = []
    monkeypatch.setattr(conv, "interpreted", lambda: False)  # there it launches twice what exchanges statistics
    monkeypatch.setattr(type(conv_kernel.conv_kernel), "run", lambda kernel, *args, **options: launches.append(kernel))
    fast = engine.compile(made(CIFAR), batch=batch, kernels=True)
    fast(torch.zeros(batch, 3, 32, 32, device=DEVICE), torch.zeros(batch, dtype=torch.int64, device=DEVICE))
    assert len(launches) == len(fast.plan.lowered.operations) == 72


@pytest.mark.parametrize("kernels", [True, False])
def test_images_of_another_size_than_the_plans(kernels):
    """Which norms are made where, and the memory that programs exchange, are the size's."""
    net = made(CONFIGS["statistics from program to program"])
    fast = engine.compile(net, batch=2, dtype=torch.float32, kernels=kernels)
    x, t = torch.randn(2, 3, 8, 8, device=DEVICE), torch.tensor([3, 999], device=DEVICE)
    if kernels:
        with pytest.raises(
            InputError, match=r"images are 8 x 8; .* for 16 x 16: engine.compile\(unet, size=\(8, 8\)\)"
        ):
            fast(x, t)
        fast = engine.compile(net, batch=2, size=(8, 8), dtype=torch.float32, kernels=True)
    assert (fast(x, t) - net(x, t)).abs().max() <= 1e-5


def test_a_calls_scratch_is_its_batchs(monkeypatch):
    """Sized once for a batch, and so for each batch by itself."""
    monkeypatch.setattr(type(conv_kernel.conv_kernel), "run", lambda kernel, *args, **options: None)
    fast, given, plain = engine.compile(made(CIFAR), kernels=True), [], on_triton.memories
    monkeypatch.setattr(on_triton, "memories", lambda sizes, device: given.append(sizes) or plain(sizes, device))
    for batch in (1, 3, 1):
        fast(torch.zeros(batch, 3, 32, 32, device=DEVICE), torch.zeros(batch, dtype=torch.int64, device=DEVICE))
        assert given[-1] == on_triton.scratch_of(Plan.of(CIFAR, batch, 32, 32, 2))
    assert given[0] == given[2] != given[1]
