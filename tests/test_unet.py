"""The UNet against diffusers' UNet2DModel: the same function, the same names, in both directions."""

import dataclasses
import inspect
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastddpm.errors import ConfigError, InputError
from fastddpm.unet import UNet, timestep_embedding
from fastddpm.unet_config import UNetConfig

CIFAR = UNetConfig(  # of google/ddpm-cifar10-32
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
    in_channels=2,
    out_channels=3,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=4,
    norm_num_groups=4,
)


def fields_of(config: UNetConfig) -> dict[str, object]:
    return {name: value for name, value in config.to_diffusers().items() if name[0] != "_"}


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Random values in every parameter, so that none is the identity that a norm starts as."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))


def pair(config: UNetConfig, dtype: torch.dtype = torch.float32) -> tuple[UNet, UNet2DModel]:
    """Our network and theirs, with the same random weights."""
    theirs = UNet2DModel(**fields_of(config)).eval()
    randomise(theirs)
    ours = UNet(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def inputs(config: UNetConfig, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, t and, for a class-conditional network, class labels; the shape is (batch, height, width)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape[0], config.in_channels, *shape[1:], generator=generator, dtype=torch.float64).to(dtype)
    t = torch.randint(0, 1000, (shape[0],), generator=generator)
    if config.num_class_embeds is None:
        return x, t
    return x, t, torch.randint(0, config.num_class_embeds, (shape[0],), generator=generator)


class ExactTime(nn.Module):
    """The sinusoidal embedding in float64 by NumPy: diffusers' own is float32 in a float64 network too."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, t: Tensor) -> Tensor:
        dim, config = self.config.block_out_channels[0], self.config
        made = np.zeros((len(t), dim))
        for b, step in enumerate(t.tolist()):
            for i in range(dim // 2):
                angle = step / 10000.0 ** (i / (dim // 2 - config.freq_shift))
                sin_at, cos_at = (dim // 2 + i, i) if config.flip_sin_to_cos else (i, dim // 2 + i)
                made[b, sin_at], made[b, cos_at] = math.sin(angle), math.cos(angle)
        return torch.from_numpy(made)


@st.composite
def configs(draw: st.DrawFn) -> UNetConfig:
    """Small architectures in all combinations of the fields."""
    groups = draw(st.sampled_from([1, 2, 4]))
    levels = draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([None, 1, 2, 4]))
    unit = math.lcm(4, groups)
    return UNetConfig(
        in_channels=draw(st.integers(1, 4)),
        out_channels=draw(st.integers(1, 4)),
        center_input_sample=draw(st.booleans()),
        freq_shift=draw(st.integers(0, 1)),
        flip_sin_to_cos=draw(st.booleans()),
        block_out_channels=tuple(unit * draw(st.integers(1, 4)) for _ in range(levels)),
        down_block_types=tuple(draw(st.sampled_from(["DownBlock2D", "AttnDownBlock2D"])) for _ in range(levels)),
        up_block_types=tuple(draw(st.sampled_from(["UpBlock2D", "AttnUpBlock2D"])) for _ in range(levels)),
        layers_per_block=draw(st.integers(1, 2)),
        mid_block_scale_factor=draw(st.sampled_from([1.0, 1.5, math.sqrt(2.0)])),
        downsample_padding=draw(st.integers(0, 1)),
        attention_head_dim=head_dim,
        norm_num_groups=groups,
        attn_norm_num_groups=draw(st.sampled_from([None, 1, 2, 4])),
        norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        resnet_time_scale_shift=draw(st.sampled_from(["default", "scale_shift"])),
        add_attention=draw(st.booleans()),
        num_class_embeds=draw(st.sampled_from([None, 1, 11])),
    )


@given(configs())
@torch.no_grad()
def test_any_architecture_is_the_function_that_diffusers_has(config: UNetConfig) -> None:
    ours, theirs = pair(config, torch.float64)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert config.num_parameters == sum(p.numel() for p in theirs.parameters())
    theirs.time_proj = ExactTime(config)
    given_inputs = inputs(config, (2, 8, 16), torch.float64)
    difference = (ours(*given_inputs) - theirs(*given_inputs).sample).abs().max().item()
    assert difference <= 1e-10


@given(configs())
@torch.no_grad()
def test_any_architecture_in_float32(config: UNetConfig) -> None:
    ours, theirs = pair(config)
    given_inputs = inputs(config, (2, 16, 8))
    assert (ours(*given_inputs) - theirs(*given_inputs).sample).abs().max().item() <= 1e-5


@given(configs())
def test_a_config_survives_the_way_to_diffusers_and_back(config: UNetConfig) -> None:
    assert UNetConfig.from_diffusers(dict(UNet2DModel(**fields_of(config)).config)) == config


@torch.no_grad()
def test_the_cifar10_checkpoint_of_diffusers_loads_here(tmp_path: Path) -> None:
    theirs = UNet2DModel(**fields_of(CIFAR)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = UNet.from_pretrained(tmp_path)
    assert ours.config == CIFAR
    assert sum(p.numel() for p in ours.parameters()) == CIFAR.num_parameters == 35_746_307
    x, t = inputs(CIFAR, (1, 32, 32))
    expected = theirs(x, t).sample
    assert expected.std() > 0.05  # the bound means something
    assert (ours(x, t) - expected).abs().max().item() <= 1e-5
    theirs = theirs.double()
    theirs.time_proj = ExactTime(CIFAR)
    assert (ours.double()(x.double(), t) - theirs(x.double(), t).sample).abs().max().item() <= 1e-10


@torch.no_grad()
def test_our_cifar10_checkpoint_loads_in_diffusers(tmp_path: Path) -> None:
    ours = UNet(CIFAR).eval()
    randomise(ours)
    ours.half().save_pretrained(tmp_path)
    ours.float()
    theirs, info = UNet2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    x, t = inputs(CIFAR, (1, 32, 32))
    assert (ours(x, t) - theirs.float()(x, t).sample).abs().max().item() <= 1e-5


def test_the_defaults_are_those_of_diffusers() -> None:
    theirs = inspect.signature(UNet2DModel.__init__).parameters
    ours = {f.name: f.default for f in dataclasses.fields(UNetConfig)}
    assert ours.keys() <= theirs.keys()
    assert {name: theirs[name].default for name in ours} == ours


def test_old_attention_names_are_read(tmp_path: Path) -> None:
    ours = UNet(SMALL)
    randomise(ours)
    ours.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {}
    for name, tensor in load_file(path).items():
        for new, was in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new}.", f".{was}.")
        old[name] = tensor
    assert sum("proj_attn" in name for name in old) == 2 * (2 + 3 + 1)  # weight and bias
    save_file(old, path)
    again = UNet.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("dim", [4, 5, 32, 33, 128])
@pytest.mark.parametrize("cos_first, freq_shift", [(True, 0), (False, 1)])
def test_timestep_embedding(dim: int, cos_first: bool, freq_shift: int) -> None:
    t = torch.tensor([0.0, 0.25, 1.0, 999.0, 3999.0], dtype=torch.float64)
    config = dataclasses.replace(
        SMALL, block_out_channels=(dim, dim), norm_num_groups=1, attention_head_dim=None,
        flip_sin_to_cos=cos_first, freq_shift=freq_shift,
    )  # fmt: skip
    exact = ExactTime(config)(t)
    found = timestep_embedding(t, dim, cos_first=cos_first, freq_shift=freq_shift)
    assert found.dtype == torch.float64
    assert (found - exact).abs().max() <= 1e-12
    single = timestep_embedding(t.float(), dim, cos_first=cos_first, freq_shift=freq_shift)
    assert single.dtype == torch.float32
    assert (single - exact).abs().max() <= 4 * 3999 * 2**-24  # the angle's own rounding


@torch.no_grad()
def test_the_forms_of_the_time_step() -> None:
    ours, _ = pair(SMALL)
    x, _ = inputs(SMALL, (2, 8, 8))
    expected = ours(x, torch.tensor([7, 7]))
    for t in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7.0, 7.0]), torch.tensor(7, dtype=torch.int32)):
        assert torch.equal(ours(x, t), expected)
    assert not torch.equal(ours(x, torch.tensor([7, 8])), expected)
    assert not torch.equal(ours(x, 7.5), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_that_of_diffusers(dtype: torch.dtype) -> None:
    config = dataclasses.replace(SMALL, num_class_embeds=3)
    x, t, labels = inputs(config, (4, 16, 16))
    exact = pair(config, torch.float64)[0](x.double(), t, labels)
    ours, theirs = pair(config, dtype)
    found = ours(x.to(dtype), t, labels)
    assert found.dtype == dtype
    theirs_off = (theirs(x.to(dtype), t, labels).sample.double() - exact).abs().max()
    assert (found.double() - exact).abs().max() <= 2 * theirs_off + 1e-3


@torch.no_grad()
@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, resnet_time_scale_shift="scale_shift")])
def test_channels_last_is_the_same_function(config: UNetConfig) -> None:
    ours, _ = pair(config)
    x, t = inputs(config, (2, 16, 8))
    expected = ours(x, t)
    ours = ours.to(memory_format=torch.channels_last)
    found = ours(x.to(memory_format=torch.channels_last), t)
    assert (found - expected).abs().max().item() <= 1e-5
    assert found.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_inputs_are_not_written_and_calls_do_not_remember() -> None:
    ours, _ = pair(SMALL)
    x, t = inputs(SMALL, (2, 8, 8))
    before = x.clone()
    first = ours(x, t)
    kept = first.clone()
    ours(x + 1, t)
    assert torch.equal(x, before)
    assert torch.equal(first, kept)
    assert torch.equal(ours(x, t), kept)


def test_gradients_are_those_of_diffusers() -> None:
    config = dataclasses.replace(SMALL, num_class_embeds=3)
    ours, theirs = pair(config, torch.float64)
    theirs.time_proj = ExactTime(config)
    x, t, labels = inputs(config, (2, 8, 8), torch.float64)
    ours(x, t, labels).square().sum().backward()
    theirs(x, t, labels).sample.square().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-8, atol=1e-8)


def test_dropout_acts_in_training_alone() -> None:
    ours, _ = pair(dataclasses.replace(SMALL, dropout=0.5))
    x, t = inputs(SMALL, (2, 8, 8))
    assert torch.equal(ours(x, t), ours(x, t))
    ours.train()
    assert not torch.equal(ours(x, t), ours(x, t))


@torch.no_grad()
def test_it_compiles_in_one_piece() -> None:
    ours, _ = pair(SMALL)
    x, t = inputs(SMALL, (2, 8, 8))
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, t), ours(x, t))


@pytest.mark.parametrize(
    "shape, part",
    [
        ((2, 2, 8), "[batch, channels, height, width]"),
        ((2, 2, 8, 8, 1), "[batch, channels, height, width]"),
        ((2, 3, 8, 8), "(2, H, W)"),
        ((2, 2, 7, 8), "multiples of 2"),
        ((2, 2, 8, 9), "multiples of 2"),
        ((2, 2, 0, 8), "multiples of 2"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(shape: tuple[int, ...], part: str) -> None:
    with pytest.raises(InputError) as caught:
        UNet(SMALL)(torch.zeros(shape), 0)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("t", [torch.tensor([1, 2, 3]), torch.tensor([[1, 2]]), torch.zeros(0)])
def test_time_steps_of_another_batch_are_refused(t: Tensor) -> None:
    with pytest.raises(InputError, match="t has shape"):
        UNet(SMALL)(torch.zeros(2, 2, 8, 8), t)


@pytest.mark.parametrize("labels", [None, torch.tensor(1), torch.tensor([1]), torch.tensor([0.0, 1.0])])
def test_class_labels_that_do_not_fit_are_refused(labels: Tensor | None) -> None:
    with pytest.raises(InputError, match="int64 tensor of shape"):
        UNet(dataclasses.replace(SMALL, num_class_embeds=3))(torch.zeros(2, 2, 8, 8), 0, labels)


def test_class_labels_for_a_network_without_classes_are_refused() -> None:
    with pytest.raises(InputError, match="not class-conditional"):
        UNet(SMALL)(torch.zeros(2, 2, 8, 8), 0, torch.tensor([0, 1]))


def test_a_config_and_fields_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="in_channels"):
        UNet(SMALL, in_channels=1)
    assert UNet(**dataclasses.asdict(SMALL)).config == SMALL
