"""The command line as its users meet it: what is said, what is written, and what happens when something is wrong."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import fastddpm
from fastddpm import checkpoint, cli, pictures, sampling, solvers
from fastddpm.errors import InputError
from fastddpm.sampling import Request, class_labels
from fastddpm.schedule import NoiseSchedule

CLASSES = 3
SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": None,
}
SCHEDULER = {"_class_name": "DDPMScheduler", "num_train_timesteps": 100, "clip_sample": True}


def save_model(folder, scheduler=SCHEDULER, **changes):
    torch.manual_seed(0)
    unet = fastddpm.UNet(**{**SMALL, **changes})
    unet.save_pretrained(folder)
    if scheduler is not None:
        (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
    return unet


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of small random networks, by name."""
    root = tmp_path_factory.mktemp("models")
    save_model(root / "classes", num_class_embeds=CLASSES + 1)
    config = json.loads((root / "classes" / "config.json").read_text())
    (root / "classes" / "config.json").write_text(json.dumps(config | {"_null_class": CLASSES}))
    save_model(root / "foreign-classes", num_class_embeds=CLASSES)
    save_model(root / "flow", scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler"})
    save_model(root / "colour", in_channels=3, out_channels=3)
    save_model(root / "bare", scheduler=None)
    save_model(root / "sizeless", sample_size=None)
    save_model(root / "latent", in_channels=4, out_channels=4)
    save_model(root / "betas", scheduler={"num_train_timesteps": 2, "trained_betas": [0.1, -0.1]})
    save_model(root / "broken-json", scheduler=None)
    (root / "broken-json" / "scheduler_config.json").write_text('{"beta_start": NaN}')
    exploding = save_model(root / "exploding")
    with torch.no_grad():
        exploding.conv_out.weight.fill_(3e38)
    exploding.save_pretrained(root / "exploding")
    (root / "empty").mkdir()
    return root


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def call(*args):
    result = CliRunner().invoke(cli.main, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def sample(models, *args, model="classes"):
    return call("sample", "--weights", models / model, "--steps", 5, "--num", 4, *args)


def tiles(path, n, columns, size=8):
    """The samples of a grid, one pixel for each of theirs."""
    step = size * 12 + pictures.GAP  # 8 x 8 is enlarged 12 times
    canvas = np.array(Image.open(path))[pictures.GAP :, pictures.GAP :]
    return [canvas[i // columns * step :, i % columns * step :][: size * 12 : 12, : size * 12 : 12] for i in range(n)]


# ---- what it makes ---------------------------------------------------------------------------------------------------


def test_it_says_where_it_wrote_how_long_it_took_and_on_what(models, here):
    done = sample(models, "--seed", 7, "--device", "cpu", "--dtype", "float32")
    assert done.exit_code == 0
    wrote, speed, path = done.stdout.splitlines()
    assert wrote == "wrote samples.png"
    assert speed.startswith("4 pictures, 5 steps of ddim, seed 7: ")
    assert speed.endswith(" images/s")
    assert path == "on cpu, reference kernels, float32 channels_last"
    assert done.stderr == ""  # no progress bar where there is no terminal
    assert os.listdir(here) == ["samples.png"]
    image = Image.open("samples.png")
    assert image.size == (2 * 98 + 2, 2 * 98 + 2)
    assert image.text == {
        "Software": f"fastddpm {fastddpm.__version__}",
        "version": fastddpm.__version__,
        "seed": "7",
        "steps": "5",
        "solver": "ddim",
        "weights": "classes",
        "num": "4",
        "batch": "4",
        "device": "cpu",
        "dtype": "float32",
    }


def test_the_pictures_are_the_samplers(models, here):
    args = ("--seed", 3, "--solver", "ddpm", "--device", "cpu", "--dtype", "float32")
    assert sample(models, *args, "--class", 1).exit_code == 0
    schedule = NoiseSchedule.from_diffusers(SCHEDULER)
    expected = fastddpm.sample(
        fastddpm.UNet.from_pretrained(models / "classes"),
        (4, 1, 8, 8),
        schedule=schedule,
        solver="ddpm",
        steps=5,
        clip=1.0,
        seed=3,
        model_kwargs={"class_labels": torch.ones(4, dtype=torch.int64)},
    )
    ours = np.array(tiles("samples.png", 4, 2)).astype(int)
    assert np.abs(ours - pictures.to_uint8(expected)[..., 0]).max() <= 1  # another memory format, other roundings


def test_json_is_one_object_with_all_that_is_said(models, here):
    done = sample(models, "--json", "--trace", "film.png", "--class", 2, "--eta", 0.5, "--device", "cpu")
    facts = json.loads(done.stdout)
    assert facts.pop("seconds") > 0
    assert facts.pop("images_per_second") > 0
    assert facts.pop("path").startswith("cpu, reference kernels, ")
    assert facts.pop("dtype") in ("float32", "bfloat16")
    assert facts == {
        "out": "samples.png",
        "trace": "film.png",
        "num": 4,
        "solver": "ddim",
        "steps": 5,
        "evaluations": 5,
        "options": {"eta": 0.5},
        "guidance": None,
        "seed": 0,
        "class": 2,
        "weights": str(models / "classes"),
        "device": "cpu",
        "batch": 4,
        "version": fastddpm.__version__,
    }
    assert {"class": "2", "eta": "0.5"}.items() <= Image.open("film.png").text.items()


def test_the_filmstrip_ends_with_the_pictures(models, here):
    done = sample(models, "--trace", "film.png", "--dtype", "float32", "--steps", 12)
    assert "wrote samples.png and film.png" in done.stdout
    film = np.array(Image.open("film.png"))
    assert film.shape[1] == sampling.MOMENTS * 98 + 2
    assert film.shape[0] == 16 + 2 * 4 * 98 + 2  # a state and an x_0 for each of the four
    last = film[16:, -98:]
    for i, picture in enumerate(tiles("samples.png", 4, 2)):
        for row in (2 * i, 2 * i + 1):  # the last state is the last x_0
            shown = last[2 + row * 98 :, :][:96:12, :96:12]
            assert np.abs(shown.astype(int) - picture).max() <= 1


def test_the_same_seed_is_the_same_file_and_another_is_not(models, here):
    for name, seed in (("a.png", 5), ("b.png", 5), ("c.png", 6)):
        assert sample(models, "--seed", seed, "--out", name).exit_code == 0
    a, b, c = (Path(name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b
    assert a != c


def test_with_one_batch_size_a_picture_does_not_depend_on_num(models, here):
    assert sample(models, "--batch", 2, "--num", 1, "--out", "one.png").exit_code == 0
    assert sample(models, "--batch", 2, "--num", 5, "--out", "five.png").exit_code == 0
    np.testing.assert_array_equal(tiles("one.png", 1, 1)[0], tiles("five.png", 5, 3)[0])


def test_large_numbers_are_computed_in_equal_batches():
    sizes = {num: Request(num=num).batch_size for num in (1, 16, 64, 65, 100, 200)}
    assert sizes == {1: 1, 16: 16, 64: 64, 65: 33, 100: 50, 200: 50}
    assert Request(num=100, batch=7).batch_size == 7


def test_without_class_each_is_shown_in_turn_and_never_the_null_class(models):
    unet = fastddpm.UNet.from_pretrained(models / "classes")
    assert class_labels(Request(num=7, weights=models / "classes"), unet).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert class_labels(Request(num=2, label=2, weights=models / "classes"), unet).tolist() == [2, 2]
    foreign = fastddpm.UNet.from_pretrained(models / "foreign-classes")  # no null class: all are real
    assert class_labels(Request(num=4, weights=models / "foreign-classes"), foreign).tolist() == [0, 1, 2, 0]
    assert class_labels(Request(), fastddpm.UNet.from_pretrained(models / "colour")) is None


def test_a_colour_model_without_classes_gives_a_colour_picture(models, here):
    assert sample(models, model="colour").exit_code == 0
    assert Image.open("samples.png").mode == "RGB"


def test_a_folder_without_a_scheduler_config_is_sampled_with_a_note(models, here):
    done = sample(models, model="bare")
    assert done.exit_code == 0
    assert done.stderr == (
        f"note: {models / 'bare'} has no scheduler_config.json; the schedule is Ho et al.'s, linear\n"
    )


def test_an_older_file_is_replaced_only_by_a_whole_new_one(models, here):
    Path("samples.png").write_text("old")
    assert sample(models, "--seed", -1).exit_code == 2
    assert Path("samples.png").read_text() == "old"
    assert sample(models).exit_code == 0
    assert Image.open("samples.png").format == "PNG"


# ---- what is wrong ---------------------------------------------------------------------------------------------------

WRONG = {
    "seed 2^64": (["--seed", 2**64], 2, r"seed is 18446744073709551616; needed: an integer in 0 \.\.\. 2\^64 - 1"),
    "seed < 0": (["--seed", -1], 2, "seed is -1"),
    "seed a word": (["--seed", "x"], 2, r"Invalid value for '--seed'.*see fastddpm sample --help"),
    "steps 0": (["--steps", 0], 2, r"steps is 0; allowed: an integer in 1 \.\.\. 100"),
    "too many steps": (["--steps", 101], 2, "steps is 101"),
    "eta < 0": (["--eta", -0.5], 2, r"eta is -0\.5"),
    "eta NaN": (["--eta", "nan"], 2, "eta is nan"),
    "eta of ddpm": (["--solver", "ddpm", "--eta", 0.5], 2, "solver ddpm has no option 'eta'"),
    "solver": (["--solver", "dimm"], 2, "no solver 'dimm'; did you mean 'ddim'"),
    "num 0": (["--num", 0], 2, "--num is 0"),
    "num too large": (["--num", 10**6], 2, "--num is 1000000"),
    "batch 0": (["--batch", 0], 2, "--batch is 0"),
    "class too large": (["--class", 3], 2, r"--class is 3; .* has the classes 0 \.\.\. 2"),
    "class < 0": (["--class", -1], 2, r"--class is -1; .* has the classes 0 \.\.\. 2"),
    "no classes": (["--class", 0, "--weights", "MODELS/colour"], 2, "--class is 0, but the model in .* no classes"),
    "unknown option": (["--step", 5], 2, r"No such option.*--step"),
    "stray word": (["extra"], 2, "unexpected extra argument"),
    "dtype": (["--dtype", "int8"], 2, "Invalid value for '--dtype'"),
    "out's folder": (["--out", "no/such/x.png"], 5, r"--out: there is no folder no/such"),
    "out's folder is a file": (["--out", f"{__file__}/x.png"], 5, "--out: there is no folder"),
    "out a folder": (["--out", "folder.png"], 5, "--out: folder.png is a folder"),
    "out with another end": (["--out", "x.jpg"], 2, r"--out is x.jpg; its name must end in .png"),
    "trace's folder": (["--trace", "no/x.png"], 5, "--trace: there is no folder no"),
    "trace with another end": (["--trace", "film.gif"], 2, "--trace is film.gif"),
    "trace is out": (["--trace", "./samples.png"], 2, "--out and --trace are both samples.png"),
    "too long a name": (["--out", "x" * 300 + ".png"], 5, "--out: can't write x.*name too long"),
    "too long a folder": (["--weights", "x" * 260], 3, "no such folder"),
    "another scheduler": (["--weights", "MODELS/flow"], 2, "_class_name is 'FlowMatchEulerDiscreteScheduler'"),
    "no weights": (["--weights", "nowhere"], 3, "nowhere: no such folder"),
    "empty folder": (["--weights", "MODELS/empty"], 3, "holds no UNet"),
    "foreign scheduler": (["--weights", "MODELS/broken-json"], 3, "NaN is not JSON"),
    "bad betas": (["--weights", "MODELS/betas", "--steps", 2], 2, r"betas\[1\] is -0\.1"),
    "no size": (["--weights", "MODELS/sizeless"], 2, "no sample_size"),
    "no picture": (["--weights", "MODELS/latent"], 2, "4 channels"),
    "not finite": (["--weights", "MODELS/exploding"], 6, "is not finite from step"),
}
if Path("/proc/self").is_dir():
    WRONG["nobody can write there"] = (["--out", "/proc/x.png"], 5, r"--out: can't write in the folder /proc")
if not torch.cuda.is_available():
    WRONG["no GPU"] = (["--device", "cuda"], 7, "torch finds no NVIDIA GPU; use the device cpu or auto")


@pytest.mark.parametrize("name", WRONG)
def test_an_error_is_one_line_and_its_exit_code_and_leaves_nothing_behind(name, models, here):
    args, code, message = WRONG[name]
    (here / "folder.png").mkdir()
    done = sample(models, *[str(arg).replace("MODELS", str(models)) for arg in args])
    assert done.exit_code == code
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr) < 400
    assert pytest.raises(AssertionError, match=message).matches(AssertionError(done.stderr)), done.stderr
    assert os.listdir(here) == ["folder.png"]
    assert not any(".png" in path.name for path in models.rglob("*"))


def test_outputs_are_checked_before_anything_is_loaded(models, here, monkeypatch):
    monkeypatch.setattr(sampling.SchedulerConfig, "from_folder", lambda _: pytest.fail("loaded"))
    assert sample(models, "--trace", "no/x.png").exit_code == 5
    assert sample(models, "--out", "no/x.png").exit_code == 5


def test_where_the_filmstrip_fails_the_grid_is_taken_back(models, here, monkeypatch):
    """And a grid that was there before stays."""
    syncs = iter([lambda: None, lambda: os.stat("/dev/full/none")])
    monkeypatch.setattr(checkpoint.os, "fsync", lambda _: next(syncs)())
    Path("samples.png").write_text("old")
    done = sample(models, "--trace", "film.png")
    assert done.exit_code == 5
    assert done.stderr.startswith("error: can't write film.png: ")
    assert os.listdir(here) == ["samples.png"]
    assert Path("samples.png").read_text() == "old"


def test_ctrl_c_ends_with_130_and_one_line(models, here, monkeypatch):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(sampling, "timed_samples", interrupted)
    done = sample(models)
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "interrupted\n")
    assert os.listdir(here) == []


@pytest.mark.parametrize("where", ["before", "after"])
def test_debug_shows_where_an_error_comes_from(models, here, where):
    args = ["sample", "--weights", models / "classes", "--seed", "-1"]
    done = call(*(["--debug", *args] if where == "before" else [*args, "--debug"]))
    assert done.exit_code == 2
    assert "Traceback" in done.stderr
    assert "check_seed" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: seed is -1; needed: an integer in 0 ... 2^64 - 1"


@pytest.mark.parametrize(
    "error, code, message",
    [
        (RuntimeError("some\nthing"), 1, "error: RuntimeError: some thing (not expected: --debug shows where"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 7, "error: there is not enough memory"),
        (MemoryError(), 7, "error: there is not enough memory"),
    ],
)
def test_errors_that_nobody_raised_on_purpose(error, code, message, models, here, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(sampling, "load", fail)
    done = sample(models)
    assert done.exit_code == code
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_a_warning_becomes_a_note_and_the_path_says_eager(models, here, monkeypatch):
    from fastddpm import runtime

    seen = {}
    real = sampling.timed_samples

    def warn(*args):
        import warnings

        warnings.warn("no CUDA graph: the model calls .item(); sampling goes on eagerly, slower", stacklevel=1)
        return real(*args)

    monkeypatch.setattr(sampling, "timed_samples", warn)
    monkeypatch.setattr(runtime, "describe", lambda *_, graph: seen.update(graph=graph) or "path")
    done = sample(models)
    assert done.exit_code == 0
    assert done.stderr == "note: no CUDA graph: the model calls .item(); sampling goes on eagerly, slower\n"
    assert seen == {"graph": False}


def test_python_callers_get_exceptions_and_progress(models, here, capsys):
    with pytest.raises(InputError, match="--num is 0"):
        sampling.run(Request(num=0))
    sampling.run(Request(weights=models / "colour", num=2, steps=3), progress=True)
    assert "sampling: 100%" in capsys.readouterr().err


def test_a_filmstrip_shows_a_variance_exploding_state_as_the_preserving_one(models, here, monkeypatch):
    shown, strip = [], pictures.filmstrip
    monkeypatch.setattr(pictures, "filmstrip", lambda frames, **given: shown.extend(frames) or strip(frames, **given))
    sample(models, "--solver", "euler", "--steps", 9, "--dtype", "float32", "--trace", "film.png")
    folder = models / "classes"
    table = sampling.SchedulerConfig.from_folder(folder).table("euler", 9)
    labels = {"class_labels": torch.tensor([0, 1, 2, 0])}
    steps = fastddpm.Sampler(fastddpm.UNet.from_pretrained(folder), table).trace(
        (4, 1, 8, 8), seeds=0, model_kwargs=labels
    )
    for frame, (alpha, sigma), step in zip(shown, table.levels[1:], steps, strict=True):
        assert np.abs(frame[0] - step.x[0].numpy() / np.hypot(alpha, sigma)).max() < 1e-3
    assert np.hypot(*table.levels[1]) > 1.1


# ---- the solver's options, and guidance ------------------------------------------------------------------------------


def test_options_of_the_solver_are_passed_on(models, here):
    facts = json.loads(
        sample(models, "--solver", "dpm_solver", "--set", "order=3", "--set", "spacing=karras", "--json").stdout
    )
    assert (facts["solver"], facts["options"]) == ("dpm_solver", {"order": 3, "spacing": "karras"})
    assert Image.open("samples.png").text["options"] == "order=3 spacing=karras"
    table = sampling.SchedulerConfig.from_folder(models / "classes").table("dpm_solver", 5, order=3, spacing="karras")
    expected = fastddpm.Sampler(fastddpm.UNet.from_pretrained(models / "classes"), table).sample(
        (4, 1, 8, 8), seeds=0, model_kwargs={"class_labels": torch.tensor([0, 1, 2, 0])}
    )
    ours = np.array(tiles("samples.png", 4, 2)).astype(int)
    assert np.abs(ours - pictures.to_uint8(expected)[..., 0]).max() <= 1


@pytest.mark.parametrize(
    "text, value",
    [
        ("3", 3),
        ("0.5", 0.5),
        ("true", True),
        ("None", None),
        ("[10,20]", [10, 20]),
        ("karras", "karras"),
        ("1,2", "1,2"),
        ("inf", math.inf),
        ("9" * 5000, "9" * 5000),
        ("[" * 100_000, "[" * 100_000),
    ],
    ids=lambda value: str(value)[:9],
)
def test_what_a_setting_means(text, value):
    assert Request(settings=(f"name={text}",)).solver_options == {"name": value}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--set", "order"), "--set is 'order'; needed: NAME=VALUE"),
        (("--set", "eta=1", "--eta", "1"), "--set gives eta a second time"),
        (("--set", "ordr=1"), "solver ddim has no option 'ordr'"),
        (("--guidance", "nan"), "--guidance is nan; allowed: a number"),
        (("--solver", "ddim_inversion"), "starts from a picture"),
        (("--set", "steps=5"), "steps is no option of a solver"),
        (("--set", "schedule=5"), "schedule is no option of a solver"),
        (("--set", "start=2"), "needs a picture to start from"),
    ],
)
def test_bad_settings_are_one_line(models, here, arguments, words):
    done = sample(models, *arguments)
    assert done.exit_code == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_guidance_moves_pictures_towards_their_class(models, here):
    sample(models, "--guidance", 1, "--out", "one.png")
    sample(models, "--out", "none.png")
    sample(models, "--guidance", 3, "--out", "three.png", "--trace", "film.png")
    one, none, three = (np.array(Image.open(f"{name}.png")).astype(int) for name in ("one", "none", "three"))
    assert (one == none).all()
    assert (one != three).any()
    unet = fastddpm.UNet.from_pretrained(models / "classes")
    expected = fastddpm.Sampler(unet, sampling.SchedulerConfig.from_folder(models / "classes").table("ddim", 5)).sample(
        (4, 1, 8, 8),
        seeds=0,
        model_kwargs={"class_labels": torch.tensor([0, 1, 2, 0])},
        guidance_scale=3.0,
        unconditional_kwargs={"class_labels": CLASSES},
    )
    ours = np.array(tiles("three.png", 4, 2)).astype(int)
    assert np.abs(ours - pictures.to_uint8(expected)[..., 0]).max() <= 3  # guidance makes more of the roundings
    assert Image.open("three.png").text["guidance"] == "3.0"


def test_guidance_needs_a_model_that_knows_no_class(models, here):
    for name in ("foreign-classes", "colour"):
        done = call("sample", "--weights", models / name, "--steps", 2, "--guidance", 2)
        assert done.exit_code == 2
        assert "was not trained without a class" in done.stderr
    assert not list(here.glob("*.png"))


# ---- help and info ---------------------------------------------------------------------------------------------------


def test_help_is_there_for_every_command_and_every_option():
    top = call("--help")
    assert top.exit_code == 0
    assert call().stdout == top.stdout
    for name in ("sample", "train", "solvers", "info"):
        assert f"\n  {name} " in top.stdout
        assert call(name, "--help").exit_code == 0
    for command in (cli.sample, cli.solvers, cli.info, cli.main):
        for option in command.params:
            assert option.help, option.name
    assert "fastddpm solvers" in call("sample", "-h").stdout
    assert call("--version").stdout == f"fastddpm {fastddpm.__version__}\n"


def test_the_solvers_are_listed_with_their_options():
    shown = call("solvers").stdout
    for name in solvers.names():
        assert f"\n{name}: " in f"\n{shown}"
    assert "    order=2 algorithm=dpmsolver++ solver_type=midpoint eta=1.0 " in shown
    listed = json.loads(call("solvers", "--json").stdout)
    assert tuple(listed) == solvers.names()
    assert listed["heun"]["s_tmax"] == "inf"  # JSON has no infinity


def test_json_has_no_infinity_and_a_setting_may_be_one(models, here):
    done = sample(models, "--solver", "heun", "--set", "s_tmax=inf", "--set", "s_churn=1", "--steps", 3, "--json")
    assert "Infinity" not in done.stdout
    assert json.loads(done.stdout)["options"] == {"s_tmax": "inf", "s_churn": 1}


def test_an_unknown_command_is_one_line():
    done = call("smaple")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: No such command 'smaple'")
    assert done.stderr.endswith("(see fastddpm --help)\n")
    assert done.stderr.count("\n") == 1


def test_help_imports_neither_torch_nor_numpy():
    code = (
        "import sys; sys.argv = ['fastddpm', '--help']\n"
        "try:\n    import fastddpm.__main__\nexcept SystemExit: pass\n"
        "print(*sorted({'torch', 'numpy', 'triton', 'PIL', 'tqdm', 'safetensors', 'diffusers'} & set(sys.modules)))"
    )
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=True
    )
    assert "Usage: fastddpm" in done.stdout
    assert done.stdout.splitlines()[-1] == ""


def test_info_says_what_is_there():
    facts = json.loads(call("info", "--json").stdout)
    assert list(facts) == ["fastddpm", "python", "torch", "triton", "device", "path", "weights"]
    assert facts["fastddpm"] == fastddpm.__version__
    assert facts["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    lines = call("info").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(facts)
    assert f"torch     {facts['torch']}" in lines


def test_info_without_triton_says_so(monkeypatch):
    monkeypatch.setattr(cli, "_version", lambda _: None)
    assert "triton    not installed" in call("info").stdout
    assert json.loads(call("info", "--json").stdout)["triton"] is None


@pytest.mark.gpu
def test_on_a_gpu_the_triton_path_under_a_graph_runs(models, here):
    done = sample(models, "--json", "--device", "cuda")
    assert "Triton kernels, CUDA graph" in json.loads(done.stdout)["path"]
