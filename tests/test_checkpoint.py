"""Weights folders: what is refused, how fast, in which words; what a writer leaves behind when the disk refuses."""

import dataclasses
import errno
import hashlib
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastddpm import checkpoint
from fastddpm.checkpoint import read_json, write_atomically, write_json
from fastddpm.errors import CheckpointError, ConfigError, InputError, OutputError
from fastddpm.unet import UNet
from fastddpm.unet_config import UNetConfig

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = UNetConfig(
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    attention_head_dim=4,
    norm_num_groups=4,
)
HUGE = {
    "block_out_channels": [8192] * 8,
    "down_block_types": ["AttnDownBlock2D"] * 8,
    "up_block_types": ["AttnUpBlock2D"] * 8,
    "layers_per_block": 16,
}

BAD_FIELDS: list[tuple[str, object]] = [
    *[
        (name, value)
        for name in ("in_channels", "out_channels", "layers_per_block", "norm_num_groups")
        for value in (None, "1", 1.0, True, -1, 0.5, 10**30, [1], {"a": 1})
    ],
    *[(name, value) for name in ("in_channels", "layers_per_block", "norm_num_groups") for value in (0, 65537)],
    *[(name, value) for name in ("freq_shift", "downsample_padding") for value in (2, -1, None, True, 0.0)],
    *[
        (name, value)
        for name in ("sample_size", "attention_head_dim", "attn_norm_num_groups", "num_class_embeds")
        for value in (0, -1, 65537, 4.0, "4", False, [4])
    ],
    *[(name, value) for name in ("center_input_sample", "flip_sin_to_cos", "add_attention") for value in (0, 1, None)],
    ("dropout", 1.0),
    ("dropout", -0.1),
    ("dropout", "0"),
    ("norm_eps", -1e-5),
    ("norm_eps", 2),
    ("norm_eps", None),
    ("norm_eps", True),
    ("mid_block_scale_factor", 0),
    ("mid_block_scale_factor", -1),
    ("mid_block_scale_factor", 1e4),
    ("resnet_time_scale_shift", "spatial"),
    ("resnet_time_scale_shift", None),
    ("resnet_time_scale_shift", 3),
    ("block_out_channels", None),
    ("block_out_channels", 8),
    ("block_out_channels", "816"),
    ("block_out_channels", []),
    ("block_out_channels", [8]),
    ("block_out_channels", [8, 18]),
    ("block_out_channels", [8, 0]),
    ("block_out_channels", [8, -16]),
    ("block_out_channels", [8, 16.0]),
    ("block_out_channels", [8, "16"]),
    ("block_out_channels", [8, [16]]),
    ("block_out_channels", [True, 16]),
    ("block_out_channels", [8] * 9),
    ("block_out_channels", [8, 16384]),
    ("down_block_types", ["DownBlock2D"]),
    ("down_block_types", ["DownBlock2D", "UpBlock2D"]),
    ("down_block_types", "DownBlock2D"),
    ("down_block_types", ["DownBlock2D", None]),
    ("down_block_types", [["DownBlock2D"], "DownBlock2D"]),
    ("up_block_types", ["UpBlock2D", "SkipUpBlock2D"]),
    ("up_block_types", ["UpBlock2D"] * 3),
    ("up_block_types", {"UpBlock2D": 1}),
    ("norm_num_groups", 3),
    ("attention_head_dim", 5),
    ("attention_head_dim", 32),
    ("attn_norm_num_groups", 3),
    ("attn_norm_num_groups", 32),
    ("sample_size", [32, 64]),
    ("sample_size", [32, 32, 32]),
    ("time_embedding_type", "fourier"),
    ("time_embedding_type", ["positional"]),
    ("time_embedding_dim", 64),
    ("time_embedding_dim", [32]),
    ("mid_block_type", None),
    ("downsample_type", "resnet"),
    ("upsample_type", {}),
    ("act_fn", "gelu"),
    ("class_embed_type", "timestep"),
    ("num_train_timesteps", 1000),
    ("unknown_field", 1),
    ("", 1),
    ("x" * 10_000 + "\n", 1),
    ("in_channels", "long " * 10_000),
    ("in_channels", [[[[[[[[1]]]]]]]]),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound folder, for the tests to damage."""
    torch.manual_seed(0)
    UNet(SMALL).save_pretrained(tmp_path / "net")
    return tmp_path / "net"


def set_fields(folder: Path, **changed: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def refusal(folder: Path, kind: type[Exception] = CheckpointError) -> str:
    """The message with which a folder is refused: one line, not long, no escape codes."""
    with pytest.raises(kind) as caught:
        UNet.from_pretrained(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text.replace(str(folder), "")) < 800
    assert text.isprintable()
    return text


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


# --- configs


@pytest.mark.parametrize("name, value", BAD_FIELDS, ids=lambda v: repr(v)[:20])
def test_a_bad_field_is_refused_by_name(folder: Path, name: str, value: object) -> None:
    set_fields(folder, **{name: value})
    text = refusal(folder, ConfigError)
    assert name[:20] in text or "divisor" in text or "one for each of block_out_channels" in text


def test_a_field_that_is_not_finite_is_refused(folder: Path) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        for name in ("norm_eps", "dropout", "mid_block_scale_factor"):
            with pytest.raises(ConfigError, match=name):
                dataclasses.replace(SMALL, **{name: value})
    set_fields(folder, norm_eps=float("nan"))
    assert "NaN is not JSON" in refusal(folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("NaN", "1e999"))
    assert "norm_eps is inf" in refusal(folder, ConfigError)


def test_an_integer_without_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="in_channels"):
        UNetConfig(in_channels=10**5000)


def test_lists_are_taken_for_tuples() -> None:
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(SMALL).items()}
    assert UNetConfig(**fields) == SMALL == UNetConfig.from_fields(fields)
    assert hash(UNetConfig(**fields)) == hash(SMALL)


@pytest.mark.parametrize("size", [None, 32, [32, 32]])
def test_the_forms_of_sample_size(folder: Path, size: object) -> None:
    set_fields(folder, sample_size=size)
    assert UNet.from_pretrained(folder).config.sample_size == (32 if size else None)


def test_attention_head_dim_matters_only_where_there_is_attention() -> None:
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    plain = UNetConfig(block_out_channels=(12, 16), norm_num_groups=4, attention_head_dim=8, **kinds)
    assert plain.num_parameters == sum(p.numel() for p in UNet(plain).parameters())
    with pytest.raises(ConfigError, match="divisor of 12"):
        dataclasses.replace(plain, down_block_types=("AttnDownBlock2D", "DownBlock2D"))
    with pytest.raises(ConfigError, match="divisor of 12"):
        dataclasses.replace(plain, up_block_types=("UpBlock2D", "AttnUpBlock2D"))
    with pytest.raises(ConfigError, match="divisor of 20"):
        dataclasses.replace(plain, block_out_channels=(12, 20))
    dataclasses.replace(plain, block_out_channels=(12, 20), add_attention=False)


def test_a_network_that_is_too_large_is_refused_before_it_is_built(folder: Path) -> None:
    set_fields(folder, **HUGE)
    assert "5.74e+11 parameters; at most 2e+09" in refusal(folder, ConfigError)
    with pytest.raises(ConfigError, match="parameters"):
        UNet(**HUGE)


def write_bad_folders(root: Path, good: Path) -> None:
    """One folder each: bad fields, huge networks, huge and odd files."""
    config, weights = json.loads((good / "config.json").read_text()), (good / WEIGHTS).read_bytes()
    texts = [json.dumps({**config, name: value}) for name, value in BAD_FIELDS]
    texts += [json.dumps({**config, **HUGE}), json.dumps({**config, **HUGE, "block_out_channels": [64] * 8})]
    texts += [
        "[" * 900_000,
        '{"a":' * 100_000,
        "[1]",
        "null",
        '"text"',
        "",
        "{",
        '{"in_channels": 3, "in_channels": 4}',
    ]
    texts += ['{"in_channels": NaN}', '{"in_channels": ' + "9" * 900_000 + "}", '{"a": ' + "[" * 400 + "]" * 400 + "}"]
    texts += [json.dumps({**config, "in_channels": [0] * 300_000}), json.dumps({"x" * 900_000: 1}), " " * 5_000_000]
    for i, text in enumerate(texts):
        (root / f"c{i}").mkdir(parents=True)
        (root / f"c{i}" / "config.json").write_text(text)
        (root / f"c{i}" / WEIGHTS).write_bytes(weights)
    big_header = (
        struct.pack("<Q", 90_000_000) + b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' + b" " * 90_000_000
    )
    for i, data in enumerate([b"", b"abc", weights[:100], weights[:-1], weights + b"x", b"\xff" * 100, big_header]):
        (root / f"w{i}").mkdir(parents=True)
        (root / f"w{i}" / "config.json").write_text(json.dumps(config))
        (root / f"w{i}" / WEIGHTS).write_bytes(data)


def test_every_refusal_is_quick_and_small(folder: Path, tmp_path: Path) -> None:
    """Under 1 s and 200 MiB, measured in a process of its own; torch's own start is not counted."""
    write_bad_folders(tmp_path / "bad", folder)
    code = """
        import json, resource, sys, time
        from pathlib import Path
        from fastddpm.errors import CheckpointError, ConfigError
        from fastddpm.unet import UNet

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        UNet.from_pretrained(sys.argv[2])
        before, slowest = peak(), 0.0
        folders = sorted(Path(sys.argv[1]).iterdir())
        for folder in folders:
            start = time.process_time()
            try:
                UNet.from_pretrained(folder)
            except (CheckpointError, ConfigError):
                pass
            else:
                raise SystemExit(f"{folder} was accepted")
            slowest = max(slowest, time.process_time() - start)
        print(json.dumps({"folders": len(folders), "seconds": slowest, "MiB": peak() - before}))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "bad"), str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["folders"] > 100
    assert found["seconds"] < 1.0
    assert found["MiB"] < 200


# --- JSON


@pytest.mark.parametrize(
    "data, part",
    [
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1, "a": 1}', "a key stands twice"),
        (b'{"b": {"a": 1, "a": 2}}', "a key stands twice"),
        (b"[]", "not a JSON object"),
        (b"", "Expecting value"),
        (b'{"a": 1} x', "Extra data"),
        (b'{"a": "\xff"}', "utf-8"),
        (b"[" * 100_000, "recursion"),
        (b"{" + b" " * (1 << 20) + b"}", "larger than 1048576 bytes"),
        (b'{"a": ' + b"1" * 5000 + b"}", "4300 digits"),
    ],
    ids=range(11),
)
def test_json_is_read_strictly(tmp_path: Path, data: bytes, part: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_json(path)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_of_the_largest_size_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"{" + b" " * ((1 << 20) - 2) + b"}")
    assert read_json(tmp_path / "a.json") == {}


def test_json_that_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json", Path("/dev/zero"), tmp_path / "a\0b"):
        with pytest.raises(CheckpointError, match="can't be read as JSON"):
            read_json(path)


def test_json_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())
    write_json(tmp_path / "a.json", {"a": [1, "\u00e4"], "b": None})
    assert read_json(tmp_path / "a.json") == {"a": [1, "\u00e4"], "b": None}


# --- folders and weights


def test_a_missing_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("none", "file", "loop", "loop/x", "a\0b"):
        with pytest.raises(CheckpointError, match="no such folder"):
            UNet.from_pretrained(tmp_path / name)
        with pytest.raises(CheckpointError, match="no such folder"):
            UNet.from_pretrained(str(tmp_path / name))


def _too_long(*_: object) -> None:
    raise TimeoutError("still waiting")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"{name} is missing" in refusal(folder)
    (folder / name).symlink_to(folder / name)
    assert f"{name} is missing" in refusal(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)  # opening it would wait for ever
    previous = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(20)
    try:
        assert f"{name} is missing" in refusal(folder)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def test_a_pipeline_folder(folder: Path) -> None:
    (folder / "unet").mkdir()
    for name in ("config.json", WEIGHTS):
        (folder / name).rename(folder / "unet" / name)
    (folder / "model_index.json").write_text("not read")
    assert UNet.from_pretrained(folder).config == SMALL
    set_fields(folder / "unet", norm_eps=-1)
    refusal(folder, ConfigError)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "UNet2DConditionModel", None, 3, ["UNet2DModel"], "a\nb" * 1000])
def test_a_folder_of_another_class(folder: Path, kind: object) -> None:
    set_fields(folder, _class_name=kind)
    assert "this reads a 'UNet2DModel'" in refusal(folder)


class Payload:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("end", ["bin", "pt", "pth", "ckpt"])
def test_pickles_are_never_loaded(folder: Path, tmp_path: Path, end: str) -> None:
    mark = tmp_path / "ran"
    (folder / WEIGHTS).unlink()
    torch.save(Payload(mark), folder / f"diffusion_pytorch_model.{end}")
    text = refusal(folder)
    assert f"diffusion_pytorch_model.{end}, a pickle" in text
    assert "only safetensors" in text
    (folder / WEIGHTS).write_bytes(pickle.dumps(Payload(mark)))
    refusal(folder)
    torch.save(Payload(mark), folder / WEIGHTS)
    refusal(folder)
    (folder / "config.json").write_bytes(pickle.dumps(Payload(mark)))
    refusal(folder)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()  # the payload works


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 5000, -1])
def test_truncated_weights(folder: Path, length: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:length])
    assert WEIGHTS in refusal(folder)


def test_weights_with_more_behind_them(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    refusal(folder)


def test_a_header_without_end(folder: Path) -> None:
    for size in (4 * 2**20 + 1, 2**63, 2**64 - 1):
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", size) + b"{}")
        assert f"its header has {size} bytes; at most 4194304" in refusal(folder)


def test_the_largest_header_that_a_config_allows_is_read() -> None:
    """Names, shapes and offsets of the network with the most tensors; 200 bytes each is more than safetensors takes."""
    widths = {**HUGE, "block_out_channels": [4] * 8, "norm_num_groups": 4, "attention_head_dim": 1}
    with torch.device("meta"):
        names = UNet(**widths).state_dict().keys()
    assert sum(len(name) + 100 for name in names) < checkpoint.MAX_HEADER_BYTES


def test_tensors_that_are_not_the_networks(folder: Path) -> None:
    name = "conv_in.weight"
    sound = (folder / WEIGHTS).read_bytes()
    for change, part in (
        (lambda t: t.pop(name), f"'{name}' is missing in the file, (8, 3, 3, 3) in the network"),
        (lambda t: t.update(extra=torch.zeros(2)), "'extra' is (2,) in the file, absent in the network"),
        (lambda t: t.update({name: t[name][:4].clone()}), f"'{name}' is (4, 3, 3, 3) in the file"),
        (lambda t: t.update({name: t[name].flatten()}), f"'{name}' is (216,) in the file"),
        (lambda t: t.update({"\x1b[31m\n": torch.zeros(1)}), "\\x1b[31m\\n"),
        (lambda t: t.clear(), "is missing in the file"),
    ):
        (folder / WEIGHTS).write_bytes(sound)
        change_tensors(folder, change)
        assert part in refusal(folder)


def test_a_tensor_under_two_names_is_refused(folder: Path) -> None:
    new = next(name for name in load_file(folder / WEIGHTS) if name.endswith("to_q.weight"))
    change_tensors(folder, lambda t: t.update({new.replace(".to_q.", ".query."): t[new] + 1}))
    assert "twice" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_another_dtype(folder: Path, dtype: torch.dtype) -> None:
    change_tensors(folder, lambda t: t.update({name: p.to(dtype) for name, p in t.items()}))
    assert "allowed: one of F16, BF16, F32, F64" in refusal(folder)


def test_weights_of_mixed_dtypes(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({"conv_in.bias": t["conv_in.bias"].half()}))
    assert "the tensors are F16, F32" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["mid_block.resnets.1.conv2.weight"][3, 2, 1, 0] = value

    change_tensors(folder, damage)
    assert "mid_block.resnets.1.conv2.weight has values that are not finite" in refusal(folder)


def test_weights_that_do_not_fit_the_dtype_asked_for(folder: Path) -> None:
    change_tensors(folder, lambda t: t["conv_in.bias"].fill_(1e5))
    UNet.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"conv_in\.bias has values that are not finite \(as torch\.float16\)"):
        UNet.from_pretrained(folder, dtype=torch.float16)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_of_what_is_loaded(folder: Path, stored: torch.dtype) -> None:
    change_tensors(folder, lambda t: t.update({name: p.to(stored) for name, p in t.items()}))
    exact = load_file(folder / WEIGHTS)
    for dtype, expected in ((None, stored), (torch.float64, torch.float64), (torch.bfloat16, torch.bfloat16)):
        net = UNet.from_pretrained(folder, dtype=dtype)
        assert net.dtype == expected
        assert all(torch.equal(p, exact[name].to(expected)) for name, p in net.state_dict().items())
    assert UNet.from_pretrained(folder).dtype == torch.float32
    for dtype in (torch.int64, torch.complex64, "float32"):
        with pytest.raises(InputError, match="allowed: float16"):
            UNet.from_pretrained(folder, dtype=dtype)


def test_what_is_loaded_is_ready_to_sample_and_owns_its_memory(folder: Path) -> None:
    net = UNet.from_pretrained(folder)
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    kept = net.conv_in.weight.clone()
    path = folder / WEIGHTS
    with path.open("r+b") as file:  # in place: the same file, other bytes
        file.write(b"\0" * path.stat().st_size)
    assert torch.equal(net.conv_in.weight, kept)


def test_a_subclass_loads_as_itself(folder: Path) -> None:
    class Mine(UNet):
        pass

    assert type(Mine.from_pretrained(folder)) is Mine


# --- writing


def test_saving_again_in_other_processes_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    code = "import sys; from fastddpm.unet import UNet; UNet.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    before = folder
    for i in range(2):
        after = tmp_path / f"again{i}"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(i)}
        subprocess.run([sys.executable, "-c", code, str(before), str(after)], env=env, check=True, timeout=120)
        for name in ("config.json", WEIGHTS):
            digests = {hashlib.sha256((path / name).read_bytes()).hexdigest() for path in (folder, after)}
            assert len(digests) == 1, name
        before = after
    assert sorted(path.name for path in after.iterdir()) == ["config.json", WEIGHTS]


def test_channels_last_weights_are_saved_the_same(folder: Path, tmp_path: Path) -> None:
    UNet.from_pretrained(folder).to(memory_format=torch.channels_last).save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


class Refusal:
    """Stands for a call that the disk refuses."""

    def __init__(self, code: int) -> None:
        self.code = code

    def __call__(self, *args: object, **kwargs: object) -> None:
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod", "mkstemp"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_refused_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, exists: bool
) -> None:
    path = tmp_path / "a.bin"
    if exists:
        path.write_bytes(b"old")
    owner = {"fsync": os, "replace": Path, "chmod": Path, "mkstemp": checkpoint.tempfile}[call]
    monkeypatch.setattr(owner, "NamedTemporaryFile" if call == "mkstemp" else call, Refusal(errno.ENOSPC))
    with pytest.raises(OutputError, match=r"can't write .*a\.bin: No space left on device"):
        write_atomically(path, b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([b"old"] if exists else [])


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(file: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.bin", b"new")
    assert not list(tmp_path.iterdir())


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def logged_fsync(file: int) -> None:
        calls.append(f"fsync {os.fstat(file).st_size}")
        fsync(file)

    def logged_replace(self: Path, target: Path) -> Path:
        calls.append("replace")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "replace", logged_replace)
    write_atomically(tmp_path / "sub" / "a.bin", b"12345")
    assert calls == ["fsync 5", "replace"]
    assert (tmp_path / "sub" / "a.bin").read_bytes() == b"12345"
    made = (tmp_path / "sub" / "a.bin").stat().st_mode
    (tmp_path / "plain").touch()
    assert made == (tmp_path / "plain").stat().st_mode  # as the user's umask has it


def test_places_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(tmp_path.rglob("*"))
    for name in ("file/x", "folder", "loop/x", "x" * 300, "a\0b", "/proc/no/such"):
        with pytest.raises(OutputError, match="can't write"):
            write_atomically(tmp_path / name, b"1")
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(OutputError):
        UNet(SMALL).save_pretrained(tmp_path / "file")


def test_a_long_name_is_written(tmp_path: Path) -> None:
    write_atomically(tmp_path / ("x" * 250), b"1")
    assert [p.name for p in tmp_path.iterdir()] == ["x" * 250]
