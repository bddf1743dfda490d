"""Which norms the engine makes in the operations before them. What they compute: test_engine, test_engine_kernels."""

from collections import defaultdict

import pytest
from hypothesis import given, settings
from test_engine import CIFAR, configs

from fastddpm import UNet
from fastddpm.engine.fusion import fused
from fastddpm.engine.lowering import Lowered, lower
from fastddpm.engine.operations import Conv, Norm, Product, Value
from fastddpm.unet_config import UNetConfig

PLAIN = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False)


def alone(lowered: Lowered) -> set[str]:
    """Norms that are operations of their own."""
    return {operation.name for operation in lowered.operations if isinstance(operation, Norm)}


def all_norms(lowered: Lowered) -> list[Norm]:
    made = []
    for operation in lowered.operations:
        made += [operation] if isinstance(operation, Norm) else []
        made += operation.norms if isinstance(operation, Product) else []
    return made


@settings(deadline=None, max_examples=30)
@given(configs())
def test_each_channel_of_each_norm_is_made_once_and_nothing_unread_is_written(config):
    plain = lower(config, config.sample_size, config.sample_size)
    lowered = fused(plain, 2)
    channels = defaultdict(list)
    for norm in all_norms(lowered):
        group = norm.channels_in // norm.groups
        assert norm.groups * group == norm.channels_in == norm.out.channels
        assert norm.first % group == 0
        channels[norm.name] += range(norm.first, norm.first + norm.channels_in)
    modules = dict(UNet(config).named_modules())
    assert {name for name, _ in modules.items() if name in channels} == {norm.name for norm in all_norms(plain)}
    for name, made in channels.items():
        assert sorted(made) == list(range(modules[name].num_channels))
    there = {lowered.given}
    for operation in lowered.operations:
        assert set(operation.reads) <= there
        assert not set(operation.writes) & there
        there |= set(operation.writes)
    read = {value for operation in lowered.operations for value in operation.reads}
    assert there == read | {lowered.out}
    assert len({value.index for value in there}) == len(there)


def test_the_cifar_network_keeps_two():
    """Their groups of 12 channels lie in two sources at once: 256 + 128 channels in 32 groups."""
    lowered = fused(lower(CIFAR, 32, 32), 2)
    assert alone(lowered) == {"up_blocks.2.resnets.2.norm1", "up_blocks.3.resnets.0.norm1"}
    raw = {operation.name for operation in lowered.operations if isinstance(operation, Product) and not operation.raw}
    assert {f"down_blocks.2.resnets.{j}.conv1" for j in (0, 1)} < raw  # norm2 alone reads them
    assert "down_blocks.2.resnets.0.conv2" not in raw  # a residual, and a skip connection


def test_a_skip_connection_is_normalised_for_both_that_read_it():
    lowered = fused(lower(CIFAR, 32, 32), 2)
    (down,) = (operation for operation in lowered.operations if operation.name == "down_blocks.2.resnets.0.conv2")
    assert [(norm.name, norm.groups, norm.first) for norm in down.norms] == [
        ("down_blocks.2.resnets.1.norm1", 32, 0),
        ("up_blocks.1.resnets.1.norm1", 16, 256),
    ]
    (up,) = (operation for operation in lowered.operations if operation.name == "up_blocks.1.resnets.1.conv1")
    assert isinstance(up, Conv)
    assert up.sources[1] == down.norms[1].out


@pytest.mark.parametrize(
    "fields",
    [
        dict(sample_size=12, block_out_channels=(16, 32), norm_num_groups=8),  # 144 positions: no power of two
        dict(sample_size=64, block_out_channels=(16, 32), norm_num_groups=8),  # 4096 positions: too many programs
        dict(sample_size=16, block_out_channels=(24, 24), norm_num_groups=8),  # groups of three channels
    ],
)
def test_what_does_not_fit_stays(fields):
    config = UNetConfig(**fields, **PLAIN, layers_per_block=1)
    plain = lower(config, config.sample_size, config.sample_size)
    first = {norm.name for norm in all_norms(plain) if norm.name.startswith("down_blocks.0")}
    assert first
    assert first <= alone(fused(plain, 2))


def test_a_third_norm_of_a_value_stays():
    """An operation makes two at most."""
    image, value = Value(0, 8, 8, 3), Value(1, 8, 8, 16)
    norms = [Norm(f"norm{i}", (value,), Value(2 + i, 8, 8, 16), groups=4) for i in range(3)]
    last = Conv("last", tuple(norm.out for norm in norms), Value(5, 8, 8, 3))
    assert alone(fused(Lowered(image, [Conv("first", (image,), value), *norms, last]), 2)) == {"norm2"}
