"""The UNet engine: its plan, its time rows, and what it computes, against the module in float64."""

import copy
import dataclasses
import re
from types import SimpleNamespace

import policy_networks
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fastddpm import NoiseSchedule, Sampler, UNet, engine, solvers
from fastddpm.engine import on_torch
from fastddpm.engine.lowering import lower, uses
from fastddpm.engine.operations import Attention, Conv, Norm, Product
from fastddpm.engine.plan import Plan
from fastddpm.errors import InputError
from fastddpm.pretrained import DEFAULT
from fastddpm.unet_config import UNetConfig

CIFAR = UNetConfig(
    sample_size=32,
    block_out_channels=(128, 256, 256, 256),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=None,
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
    norm_eps=1e-6,
)

SMALL = UNetConfig(
    sample_size=8,
    block_out_channels=(8, 16),
    norm_num_groups=4,
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)


@st.composite
def configs(draw) -> UNetConfig:
    """Small networks of every kind that the config allows."""
    levels = draw(st.integers(1, 3))
    widths = tuple(8 * draw(st.integers(1, 3)) for _ in range(levels))
    attends = [draw(st.booleans()) for _ in range(levels)]
    return UNetConfig(
        sample_size=2 ** (levels - 1) * draw(st.sampled_from([1, 2, 3])),
        in_channels=draw(st.integers(1, 4)),
        out_channels=draw(st.integers(1, 4)),
        center_input_sample=draw(st.booleans()),
        block_out_channels=widths,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        layers_per_block=draw(st.integers(1, 2)),
        mid_block_scale_factor=draw(st.sampled_from([1.0, 1.4142])),
        downsample_padding=draw(st.integers(0, 1)),
        attention_head_dim=draw(st.sampled_from([None, 4, 8])),
        norm_num_groups=draw(st.sampled_from([1, 4, 8])),
        attn_norm_num_groups=draw(st.sampled_from([None, 2])),
        resnet_time_scale_shift=draw(st.sampled_from(["default", "scale_shift"])),
        add_attention=draw(st.booleans()),
        num_class_embeds=draw(st.sampled_from([None, 5])),
    )


def made(config: UNetConfig, seed: int = 0) -> UNet:
    """A network with weights of size 1, so that each of its parts counts."""
    torch.manual_seed(seed)
    net = UNet(config).eval().requires_grad_(False)
    for name, parameter in net.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if name.endswith("weight") else 0.0))
    return net


def inputs(config: UNetConfig, batch: int = 3, size: int | None = None):
    size = size or config.sample_size
    x = torch.randn(batch, config.in_channels, size, size, generator=torch.Generator().manual_seed(1))
    labels = None if config.num_class_embeds is None else torch.arange(batch) % config.num_class_embeds
    return x, torch.tensor([999, 0, 17])[:batch], labels


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(config=configs())
def test_it_is_the_module(config):
    net = made(config)
    x, t, labels = inputs(config)
    exact = copy.deepcopy(net).double()
    truth = exact(x.double(), t, labels)
    fast = engine.compile(exact, batch=3, dtype=torch.float64)(x.double(), t, labels)
    assert (fast - truth).abs().max() <= 1e-12 * (1 + truth.abs().max())
    eager = copy.deepcopy(net).bfloat16()(x.bfloat16(), t, labels).double() - truth
    low = engine.compile(net, batch=3, dtype=torch.bfloat16)(x, t, labels)
    assert low.dtype == torch.bfloat16
    assert (low.double() - truth).square().mean().sqrt() <= 2 * eager.square().mean().sqrt() + 2**-8


@pytest.mark.parametrize("size", [4, 8, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_resolution_and_batch(size, dtype):
    config = UNetConfig(
        sample_size=8,
        block_out_channels=(16, 24),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    net = made(config)
    fast = engine.compile(net, batch=2, dtype=dtype)
    for batch in (1, 3):
        x, t, _ = inputs(config, batch, size)
        truth = copy.deepcopy(net).double()(x.double(), t)
        eager = copy.deepcopy(net).to(dtype)(x.to(dtype), t).double() - truth
        assert (fast(x, t).double() - truth).abs().max() <= 3 * eager.abs().max() + 1e-6


def test_a_sample_does_not_depend_on_its_slot_and_runs_are_equal():
    net = made(CIFAR)
    fast = engine.compile(net, batch=4)
    x, t = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2)), torch.tensor([5, 999, 5, 300])
    first = fast(x, t)
    assert torch.equal(fast(x, t), first)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(fast(x[order], t[order]), first[order])


def test_the_plan_of_the_cifar_network():
    plan = Plan.of(CIFAR, 64, 32, 32, 2)
    net = UNet(CIFAR)
    time = sum(p.numel() for name, p in net.named_parameters() if "time_emb" in name)
    assert plan.weights + time == CIFAR.num_parameters
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, 32, 32), torch.zeros(1))
    saved = sum(  # an upsampling convolution sees 4 and not 9 positions
        2 * 5 * op.channels_in * op.out.elements for op in plan.lowered.operations if isinstance(op, Conv) and op.up
    )
    norms = [norm for op in plan.lowered.operations if isinstance(op, Product) for norm in op.norms]
    uncounted = [op for op in plan.lowered.operations if isinstance(op, Norm | Attention)]
    rest = sum(op.flops for op in norms + uncounted)  # torch counts neither
    per_forward = counter.get_total_flops() - 2 * time  # the time path
    assert plan.flops - rest + saved == pytest.approx(per_forward, rel=2e-3)
    assert len(plan.lowered.operations) == 72  # eager PyTorch: 392 kernels
    assert plan.bytes_moved <= 28.5e6  # modelled; eager PyTorch: 93 MB


def test_two_values_that_are_needed_at_once_share_no_memory():
    for config in (
        CIFAR,
        UNetConfig(
            sample_size=16,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        ),
    ):
        plan = Plan.of(config, 5, config.sample_size, config.sample_size, 2)
        lives = list(uses(plan.lowered))
        assert len(lives) == sum(len(operation.writes) for operation in plan.lowered.operations)
        for i, (a, first, last) in enumerate(lives):
            size = 5 * 2 * a.elements
            assert plan.offsets[a.index] % 256 == 0
            assert plan.offsets[a.index] + size <= plan.memory
            for b, other_first, other_last in lives[:i]:
                if first <= other_last and other_first <= last:  # an operation may not write what it reads
                    start, end = plan.offsets[a.index], plan.offsets[a.index] + size
                    other = plan.offsets[b.index]
                    assert end <= other or other + 5 * 2 * b.elements <= start
        assert plan.memory <= sum(5 * 2 * value.elements for value, _, _ in lives) / 3


def test_each_value_is_made_before_it_is_read():
    lowered = lower(CIFAR, 32, 32)
    there = {lowered.given.index}
    for operation in lowered.operations:
        assert {value.index for value in operation.reads} <= there
        there |= {value.index for value in operation.writes}


def test_the_page():
    net = made(
        UNetConfig(
            sample_size=8,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )
    page = repr(engine.compile(net, batch=2))
    lines = page.splitlines()
    assert len(lines) == int(re.search(r"(\d+) operations", lines[-1])[1]) + 2
    assert all(len(line) <= 150 for line in lines)
    assert "up_blocks.1.resnets.1.conv2" in page
    assert "conv 3x3 + 1x1 shortcut" in page
    assert "conv 3x3 of the doubled image" in page
    assert "8 + 8" in page


def test_the_time_rows_are_the_modules_own_bit_for_bit():
    net = made(CIFAR)
    fast = engine.compile(net, steps=50)
    rows, names = fast.time_path.table, fast.plan.lowered.time_names
    silu_emb = net.embedding(torch.arange(50), 50)
    assert len(names) == 22
    for name, columns in names.items():
        assert torch.equal(rows[:, columns], net.get_submodule(name)(silu_emb)), name
    t = torch.tensor([3, 49, 3])
    assert torch.equal(fast.time_path(3, t, None), rows[t])


@pytest.mark.parametrize(
    "t", [50, 7.25, torch.tensor(7), torch.tensor([50, 1000]), torch.tensor([50, 3]), torch.tensor([0.5, 30.0])]
)
def test_time_steps_beyond_the_table(t):
    net = made(
        UNetConfig(
            sample_size=4,
            block_out_channels=(8,),
            norm_num_groups=4,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        )
    )
    x = inputs(net.config, 2)[0]
    fast = engine.compile(net, steps=50, dtype=torch.float32)
    assert (fast(x, t) - net(x, t)).abs().max() <= 1e-5


def test_a_sampler_takes_it():
    config = UNetConfig(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        num_class_embeds=3,
    )
    net, table = made(config), solvers.ddim(NoiseSchedule.linear(), 5)
    labels = {"class_labels": torch.tensor([0, 2])}
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        fast = Sampler(engine.compile(net, dtype=dtype), table).sample((2, 1, 8, 8), seeds=0, model_kwargs=labels)
        slow = Sampler(net, table).sample((2, 1, 8, 8), seeds=0, model_kwargs=labels)
        assert (fast - slow).abs().max() <= close * slow.abs().max()


def test_without_onednn(monkeypatch):
    net = made(CIFAR)
    x, t, _ = inputs(CIFAR, 1)
    fast = engine.compile(net, dtype=torch.float32)(x, t)
    monkeypatch.setattr(on_torch, "has_onednn", lambda: False)
    assert (engine.compile(net, dtype=torch.float32)(x, t) - fast).abs().max() <= 1e-5


def test_the_weights_are_copies():
    net = made(CIFAR)
    fast = engine.compile(net, dtype=torch.float32)
    x, t, _ = inputs(CIFAR, 1)
    before = fast(x, t)
    for parameter in net.parameters():
        parameter.mul_(2.0)
    assert torch.equal(fast(x, t), before)


@pytest.mark.parametrize("classes, t", [(None, 7), (None, torch.tensor([0.5, 7.0])), (3, torch.tensor([5, 6]))])
def test_so_are_those_of_the_time_path_beyond_its_table(classes, t):
    net = made(dataclasses.replace(SMALL, num_class_embeds=classes))
    fast = engine.compile(net, dtype=torch.float32)
    x, _, labels = inputs(net.config, 2)
    before = fast(x, t, labels)
    for parameter in net.parameters():
        parameter.mul_(2.0)
    assert torch.equal(fast(x, t, labels), before)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.float64])
def test_time_steps_of_every_dtype(dtype):
    fast = engine.compile(made(SMALL), dtype=torch.float32)
    x, t = inputs(SMALL, 2)[0], torch.tensor([3, 200])
    assert (fast(x, t.to(dtype)) - fast(x, t)).abs().max() <= 1e-5


@pytest.mark.parametrize("compiled_inside", [True, False])
def test_autocast_changes_nothing(compiled_inside):
    net = made(SMALL)
    x, t, _ = inputs(SMALL, 2)
    truth = engine.compile(net, dtype=torch.float32)(x, t)
    with torch.autocast("cpu", torch.bfloat16, enabled=compiled_inside):
        fast = engine.compile(net, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        made_inside = fast(x, t)
    assert made_inside.dtype == torch.float32
    assert torch.equal(made_inside, truth)


def test_it_stays_where_it_was_compiled():
    fast = engine.compile(made(SMALL), dtype=torch.float32)
    assert fast.to("cpu").float() is fast
    for move in (fast.bfloat16, fast.double, lambda: fast.to("meta")):
        with pytest.raises(InputError, match=r"compiled for cpu and torch\.float32, and can't be moved"):
            move()


def test_no_images():
    fast, x = engine.compile(made(SMALL)), torch.zeros(0, 3, 8, 8)
    assert fast(x, torch.zeros(0, dtype=torch.int64)).shape == x.shape


def test_it_keeps_no_other_weights_of_the_unet():
    net = made(CIFAR)
    held = sum(p.numel() for p in engine.compile(net).time_path.unet.parameters())
    assert held < 0.05 * CIFAR.num_parameters


@pytest.mark.parametrize(
    "change, words",
    [
        ({"unet": torch.nn.Linear(2, 2)}, "the model is a Linear; needed: a fastddpm.UNet"),
        ({"dtype": torch.int64}, "dtype is torch.int64; allowed: torch.bfloat16"),
        ({"batch": 0}, "batch is 0; allowed: an integer of at least 1"),
        ({"batch": True}, "batch is True"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"size": 32}, r"size is 32; allowed: \(height, width\)"),
        ({"unet": UNet(dataclasses.replace(SMALL, sample_size=None))}, "config has no sample_size: give size="),
        ({"dtype": torch.float64, "kernels": True}, "the kernels take no torch.float64"),
        ({"size": (5, 8)}, r"shape \(3, 5, 8\) does not fit this UNet"),
    ],
)
def test_bad_arguments(change, words):
    arguments = {"unet": UNet(CIFAR), "batch": 1} | change
    with pytest.raises(InputError, match=words):
        engine.compile(arguments.pop("unet"), **arguments)


def test_bad_calls():
    fast = engine.compile(made(CIFAR))
    with pytest.raises(InputError, match="x has shape"):
        fast(torch.zeros(3, 32, 32), 0)
    with pytest.raises(InputError, match="does not fit this UNet"):
        fast(torch.zeros(1, 3, 30, 32), 0)
    with pytest.raises(InputError, match="not class-conditional"):
        fast(torch.zeros(1, 3, 32, 32), torch.zeros(1).long(), torch.zeros(1).long())


def test_the_shipped_weights():
    net = UNet.from_pretrained(DEFAULT)
    x, t, labels = inputs(net.config, 2)
    fast = engine.compile(net, dtype=torch.float32)(x, t, labels)
    assert (fast - net(x, t, labels)).abs().max() <= 1e-4


def test_a_sampler_asks_whether_the_time_steps_are_there(monkeypatch):
    config = UNetConfig(
        sample_size=4,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    fast = engine.compile(made(config), steps=50, dtype=torch.float32)
    table = solvers.ddim(NoiseSchedule.linear(60), 4, spacing="trailing")
    whole = Sampler(fast, table).sample((1, 3, 4, 4), seeds=0)  # on a CPU a call looks, and computes them
    assert whole.isfinite().all()
    monkeypatch.setattr(type(fast), "_trusts_t", True)
    with pytest.raises(InputError, match=r"time steps are 14 ... 59; this engine has those below 50: .*steps=60"):
        Sampler(fast, table).sample((1, 3, 4, 4), seeds=0)
    Sampler(fast, solvers.ddim(NoiseSchedule.linear(50), 4)).sample((1, 3, 4, 4), seeds=0)
    fast.check_timesteps([59.5, 3.0])  # not whole: computed


def test_compile_takes_a_policys_network_too():
    assert type(engine.compile(policy_networks.made(), horizon=8)) is engine.PolicyEngine
    assert type(engine.compile(made(CIFAR))) is engine.Engine
    with pytest.raises(InputError, match=r"is a Linear; needed: a fastddpm.UNet .* ConditionalUnet1D"):
        engine.compile(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(("multiprocessors", "own"), [(31, False), (32, True)])
def test_a_small_gpu_takes_pytorchs_kernels(multiprocessors, own, monkeypatch):
    """31 programs can't wait for a 32nd."""
    fast = object.__new__(engine.Engine)
    torch.nn.Module.__init__(fast)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=multiprocessors)
    )
    fast.__dict__["dtype_"] = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    assert fast._uses_kernels(None) is own
    if not own:
        with pytest.raises(InputError, match="need 32 multiprocessors, cuda:0 has 31"):
            fast._uses_kernels(True)


@pytest.mark.skipif(not on_torch.has_onednn(), reason="needs oneDNN's convolutions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_laid_out_once_for_images_of_a_size(dtype, monkeypatch):
    laid_out, plain = [], on_torch._Packed._laid_out
    monkeypatch.setattr(on_torch._Packed, "_laid_out", lambda it, size: laid_out.append(size) or plain(it, size))
    weight, bias = torch.randn(96, 48, 3, 3), torch.randn(96)
    convolve = on_torch.convolution(weight, bias, dtype, (2, 2), (1, 1))
    for batch, size in ((2, 8), (1, 8), (2, 5), (3, 5), (1, 8)):
        x = torch.randn(batch, 48, size, 9).to(dtype, memory_format=torch.channels_last)
        exact = F.conv2d(x.double(), weight.to(dtype).double(), bias.to(dtype).double(), (2, 2), (1, 1))
        error = (convolve(x) - exact).square().mean()
        assert error <= (4 * torch.finfo(dtype).eps) ** 2 * exact.square().mean()
    assert [(size[0], size[2]) for size in laid_out] == [(2, 8), (2, 5), (1, 8)]


@pytest.mark.parametrize("compiled", [lambda: made(CIFAR), policy_networks.made])
def test_kernels_without_a_gpu_are_refused_before_any_work(compiled, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(InputError, match="needs a GPU, and the weights are on cpu"):
        engine.compile(compiled(), kernels=True)
