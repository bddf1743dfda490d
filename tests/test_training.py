"""Training: a step draws by the stated laws, a stopped run goes on to the same bytes, folders are respected."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from fastddpm_kernels import normal
from safetensors.torch import load_file
from scipy import stats

from fastddpm.cli import main
from fastddpm.errors import CheckpointError, ConfigError, NonFiniteError, OutputError
from fastddpm.schedule import NoiseSchedule
from fastddpm.training import command as command_module
from fastddpm.training import run as run_module
from fastddpm.training.batches import Batches, time_step_edges
from fastddpm.training.command import architecture
from fastddpm.training.data import ImageSet
from fastddpm.training.run import OtherRunError, Run
from fastddpm.training.trainer import Budget, TrainConfig, Trainer, fresh_unet
from fastddpm.unet import UNet

CONFIG = TrainConfig(batch_size=16, precision="float32", lr=3e-3, ema=0.9, prediction="epsilon")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def bars(n: int = 48) -> ImageSet:
    """Real structure in 8 x 8 pixels: one bright bar, whose place is the class."""
    labels = torch.arange(n) % 4
    images = torch.zeros(n, 1, 8, 8, dtype=torch.uint8)
    for i, label in enumerate(labels):
        images[i, :, 2 * label : 2 * label + 2] = 255
    return ImageSet(images, labels)


def trainer(config: TrainConfig = CONFIG, data: ImageSet | None = None) -> Trainer:
    """A network of 15,000 parameters on `data`, or the bars."""
    data = bars() if data is None else data
    return Trainer(data, architecture(data, (8, 8), 1, ()), config)


def batches(data: ImageSet, size: int, *, class_dropout: float = 0.1, seed: int = 0) -> Batches:
    """Batches with the cosine density on the linear schedule."""
    edges = time_step_edges(NoiseSchedule.linear(), "cosine")
    return Batches(data, size, edges, class_dropout=class_dropout, seed=seed)


# What a step draws


@pytest.mark.parametrize("n, size", [(48, 16), (48, 20), (7, 16), (1, 3)])
def test_every_epoch_shows_every_image_once(n: int, size: int) -> None:
    made = batches(bars(n), size)
    seen = np.concatenate([made.indices(step) for step in range(3 * n)])
    epochs = seen[: len(seen) // n * n].reshape(-1, n)
    assert all(np.array_equal(np.sort(epoch), np.arange(n)) for epoch in epochs)
    if n > 4:
        assert len({tuple(epoch) for epoch in epochs[:10]}) == 10  # and each in another order


def test_batches_depend_on_seed_and_step_alone() -> None:
    forward, backward = batches(bars(), 20), batches(bars(), 20)
    steps = range(9)
    there = [forward[step] for step in steps]
    back = [backward[step] for step in reversed(steps)][::-1]
    for a, b in zip(there, back, strict=True):
        assert a.labels is not None
        assert b.labels is not None
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.t, b.t)
        assert torch.equal(a.seeds, b.seeds)
    other = batches(bars(), 20, seed=1)[0]
    assert not torch.equal(other.t, there[0].t)
    assert not torch.equal(other.seeds, there[0].seeds)
    assert not torch.equal(there[0].t, there[1].t)


def test_labels_are_dropped_as_often_as_said() -> None:
    made, n = batches(bars(), 64), 64 * 400
    labels = torch.cat([label for step in range(400) if (label := made[step].labels) is not None])
    dropped = int((labels == 4).sum())
    assert abs(dropped - 0.1 * n) < 4 * (n * 0.1 * 0.9) ** 0.5
    kept = [label for step in range(9) if (label := batches(bars(), 16, class_dropout=0)[step].labels) is not None]
    assert int(torch.cat(kept).max()) == 3
    gone = batches(bars(), 16, class_dropout=1)[0].labels
    assert gone is not None
    assert gone.tolist() == [4] * 16


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(), NoiseSchedule.cosine(200), NoiseSchedule.sigmoid()])
def test_cosine_density_is_that_of_the_cosine_schedule(schedule: NoiseSchedule) -> None:
    """The log-SNRs drawn, against those of the cosine schedule at uniform u: two-sample Kolmogorov-Smirnov."""
    rng = np.random.default_rng(0)
    edges = time_step_edges(schedule, "cosine")
    t = np.searchsorted(edges, rng.random(4000), side="right") - 1
    u = rng.random(4000)
    wanted = -2 * np.log(np.tan(np.pi * u / 2))
    low, high = schedule.log_snr.min(), schedule.log_snr.max()
    inside = np.clip(wanted, low, high)  # mass beyond the schedule's ends goes to its ends
    assert stats.ks_2samp(schedule.log_snr[t], inside).pvalue > 1e-3
    uniform = schedule.log_snr[rng.integers(0, schedule.num_steps, 4000)]
    if schedule.num_steps == 1000:  # the test can fail: Ho's uniform time steps have another law
        assert stats.ks_2samp(uniform, inside).pvalue < 1e-9


@pytest.mark.parametrize("density", ["uniform", "cosine"])
def test_time_steps_follow_their_density(density: str) -> None:
    schedule = NoiseSchedule.linear(50, 1e-3, 0.2)
    edges = time_step_edges(schedule, density)
    assert edges.shape == (51,)
    assert np.all(np.diff(edges) > 0)
    made = Batches(bars(), 1, edges, class_dropout=0.1, seed=3)  # batches of one: independent draws
    t = np.concatenate([made.times(step) for step in range(5000)])
    counts = np.bincount(t, minlength=50)
    expected = 5000 * np.diff(edges)
    common = expected >= 5
    result = stats.chisquare(
        [*counts[common], counts[~common].sum() + 1e-9], [*expected[common], expected[~common].sum() + 1e-9]
    )
    assert result.pvalue > 1e-3


def test_time_steps_are_stratified() -> None:
    edges = time_step_edges(NoiseSchedule.linear(), "uniform")
    made = Batches(bars(), 50, edges, class_dropout=0.1, seed=0)
    for step in range(20):
        t = made.times(step)
        assert np.array_equal(np.sort(t // 20), np.arange(50))
        assert not np.array_equal(t, np.sort(t))


# The step


def test_network_sees_the_noised_images_of_the_contract() -> None:
    """x_t of Ho et al. (2020), eq. 4, in float64, from images in [-1, 1] and noise stream 2 of the step's number."""
    made = trainer()
    seen: list[tuple[torch.Tensor, ...]] = []
    hook = made.net.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs))
    losses = [float(made.step()) for _ in range(3)]
    hook.remove()
    for step, (x, t, labels) in enumerate(seen):
        batch = made.batches[step]
        noise = normal(batch.seeds, (1, 8, 8), step=step, stream=2).double()
        a_bar = torch.tensor(NoiseSchedule.linear().alphas_cumprod)[batch.t][:, None, None, None]
        expected = a_bar.sqrt() * (batch.images.double() * 2 / 255 - 1) + (1 - a_bar).sqrt() * noise
        assert torch.allclose(x.double(), expected, rtol=0, atol=2e-6)
        assert torch.equal(t, batch.t)
        assert batch.labels is not None
        assert torch.equal(labels, batch.labels)
    assert losses[0] == pytest.approx(float(normal(made.batches[0].seeds, (1, 8, 8), step=0, stream=2).square().mean()))


def test_v_is_learnt_and_said(tmp_path: Path) -> None:
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 as the target, in float64, from a network that says zero."""
    made = trainer(TrainConfig(**{**CONFIG.__dict__, "prediction": "v_prediction"}))
    batch = made.batches[0]
    noise = normal(batch.seeds, (1, 8, 8), step=0, stream=2).double()
    a_bar = torch.tensor(NoiseSchedule.linear().alphas_cumprod)[batch.t][:, None, None, None]
    v = a_bar.sqrt() * noise - (1 - a_bar).sqrt() * (batch.images.double() * 2 / 255 - 1)
    assert float(made.step()) == pytest.approx(float(v.square().mean()), rel=1e-6)
    Run(tmp_path / "run", made, bars()).save()
    config = json.loads((tmp_path / "run" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction"


def test_loss_falls_and_finds_the_structure() -> None:
    made = trainer()
    losses = [float(made.step(min(1.0, (i + 1) / 10))) for i in range(120)]
    assert abs(losses[0] - 1) < 0.1  # the output begins at zero: the loss is the noise's variance
    assert np.mean(losses[-20:]) < 0.4


def test_bf16_follows_float32() -> None:
    exact, half = trainer(), trainer(TrainConfig(**{**CONFIG.__dict__, "precision": "bf16"}))
    assert half.net.dtype == torch.bfloat16
    assert half.master.dtype == torch.float32
    a, b = ([float(made.step()) for _ in range(30)] for made in (exact, half))
    assert np.abs(np.subtract(a, b)).max() < 0.05
    for name, p in half.net.named_parameters():
        assert torch.equal(p, half.parameters[name].bfloat16())


def test_step_is_adamw_on_the_clipped_gradient() -> None:
    """One step against autograd and AdamW's formula (Loshchilov and Hutter 2019, arXiv 1711.05101) in float64."""
    made = trainer()
    made.step(1.0)  # so that no gradient is zero for the zeros in the initial weights
    before = {name: p.detach().double() for name, p in made.parameters.items()}
    moments = {name: t.double() for name, t in made.state().items() if name.startswith("exp_avg")}
    made.loss(made.batches[made.steps]).backward()
    gradient = {name: p.grad.double() for name, p in made.parameters.items() if p.grad is not None}
    made.optimizer.zero_grad()
    norm = torch.sqrt(sum((g.square().sum() for g in gradient.values()), torch.zeros(())))
    made.step(0.5)
    for name, p in made.parameters.items():
        g = gradient[name] * min(1.0, 1.0 / (float(norm) + 1e-6))
        m = 0.9 * moments[f"exp_avg.{name}"] + 0.1 * g
        v = 0.99 * moments[f"exp_avg_sq.{name}"] + 0.01 * g.square()
        update = m / (1 - 0.9**2) / ((v / (1 - 0.99**2)).sqrt() + 1e-8) + 0.01 * before[name]
        assert torch.allclose(p.double(), before[name] - 0.5 * CONFIG.lr * update, rtol=0, atol=2e-6)


def test_moving_average() -> None:
    made = trainer()
    expected = {name: p.detach().double() for name, p in made.parameters.items()}
    for step in range(30):
        made.step()
        decay = min(0.9, (1 + step) / (10 + step))
        for name, p in made.parameters.items():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    for name, p in made.averaged().named_parameters():
        assert p.dtype == torch.float16
        assert torch.allclose(p.double(), expected[name], rtol=1e-3, atol=1e-6)


def test_fresh_network_is_seeded_and_says_zero() -> None:
    config = architecture(bars(), (8, 16), 1, (4,))
    state = torch.random.get_rng_state()
    a, b, other = fresh_unet(config, 5), fresh_unet(config, 5), fresh_unet(config, 6)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.conv_in.weight, other.conv_in.weight)
    assert not a(torch.randn(2, 1, 8, 8), torch.tensor([0, 9]), torch.tensor([0, 4])).any()


def test_architecture() -> None:
    config = architecture(bars(), (8, 12, 16), 2, (4,))
    assert config.down_block_types == ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D")
    assert config.up_block_types == ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    assert config.num_class_embeds == 5
    assert config.norm_num_groups == 4
    with pytest.raises(ConfigError, match="attention is asked for at 5 x 5"):
        architecture(bars(), (8, 16), 1, (5,))


@pytest.mark.parametrize(
    "field, value",
    [("batch_size", 0), ("lr", 0.0), ("lr", float("nan")), ("ema", 1.0), ("class_dropout", 1.1), ("seed", -1)]
    + [
        ("seed", 1 << 64),
        ("schedule", "quadratic"),
        ("density", "sigmoid"),
        ("precision", "fp8"),
        ("prediction", "sample"),
        ("clip_norm", 0.0),
    ],
)
def test_bad_config(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        TrainConfig(**{field: value})
    assert "\n" not in str(caught.value)


# The run


def train_steps(folder: Path, steps: int, *, stop_at: int | None = None, config: TrainConfig = CONFIG) -> Run:
    """Train in `folder` to `steps`, or up to `stop_at`, as a process of its own would."""
    data = bars()
    made = Run(folder, trainer(config, data), data)
    finished = made.train(Budget(steps), stop=lambda: made.trainer.steps == stop_at)
    assert finished == (stop_at is None)
    return made


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_resumed_run_gives_the_same_bytes(tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "LOG_EVERY", 4)
    config = TrainConfig(**{**CONFIG.__dict__, "precision": precision})
    train_steps(tmp_path / "whole", 12, config=config)
    for at in (0, 1, 5, 8, 11):  # stopped and taken up five times
        train_steps(tmp_path / "parts", 12, stop_at=at, config=config)
    last = train_steps(tmp_path / "parts", 12, config=config)
    assert last.resumed_at == 11
    for name in (WEIGHTS, "config.json", "scheduler_config.json", "training.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    columns = [
        [line.split(",")[:3] for line in (tmp_path / name / "loss.csv").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert columns[0] == columns[1]
    assert [row[0] for row in columns[0]] == ["step", "4", "8", "12"]


def test_weights_folder_is_diffusers_layout(tmp_path: Path) -> None:
    made = train_steps(tmp_path / "run", 3)
    stored = load_file(tmp_path / "run" / WEIGHTS)
    assert {p.dtype for p in stored.values()} == {torch.float16}
    for name, p in UNet.from_pretrained(tmp_path / "run").named_parameters():
        assert torch.equal(stored[name], made.trainer.ema[name].half())
        assert torch.equal(p.half(), stored[name])
    config = json.loads((tmp_path / "run" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "DDPMScheduler"
    assert config["prediction_type"] == "epsilon"
    assert np.array_equal(NoiseSchedule.from_diffusers(config).betas, NoiseSchedule.linear().betas)
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler.from_config(config)
    assert scheduler.config.clip_sample_range == 1.0


def test_other_directories_are_refused(tmp_path: Path) -> None:
    train_steps(tmp_path / "run", 2)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    data = bars()
    with pytest.raises(OtherRunError, match=r"lr is 0\.003 there, 0\.1 here"):
        Run(tmp_path / "run", trainer(TrainConfig(**{**CONFIG.__dict__, "lr": 0.1})), data)
    with pytest.raises(OtherRunError, match="data"):
        Run(tmp_path / "run", trainer(data=bars(40)), bars(40))
    with pytest.raises(OtherRunError, match="already"):
        Run(tmp_path / "run", trainer(), data, resume=False)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(OtherRunError, match=r"thesis\.tex"):
        Run(tmp_path / "full", trainer(), data)
    with pytest.raises(OtherRunError, match="is a file"):
        Run(tmp_path / "full" / "thesis.tex", trainer(), data)
    assert OtherRunError.exit_code == 4


@pytest.mark.parametrize("damage", [b"", b"\x00" * 8, None])
def test_damaged_state_is_refused(tmp_path: Path, damage: bytes | None) -> None:
    train_steps(tmp_path / "run", 2)
    state = tmp_path / "run" / "training_state.safetensors"
    state.write_bytes(state.read_bytes()[:-5] if damage is None else damage)
    with pytest.raises(CheckpointError, match="training_state"):
        Run(tmp_path / "run", trainer(), bars())


def test_a_failed_save_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk at any of the writes: OutputError, and the run goes on from what was saved before."""
    train_steps(tmp_path / "whole", 6)
    for broken in range(6):  # state, two of the weights, the null class, schedule, losses
        folder = tmp_path / f"run{broken}"
        train_steps(folder, 6, stop_at=2)
        calls = iter(range(99))
        real = os.fsync

        def fail(fd: int, calls: Any = calls, broken: int = broken, real: Any = real) -> None:
            if next(calls) == broken:
                raise OSError(28, "No space left on device")
            real(fd)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(OutputError, match="No space left"):
                train_steps(folder, 6, stop_at=4)
        assert not list(folder.glob(".*"))
        train_steps(folder, 6)
        assert (folder / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_nan_is_named_and_not_saved(tmp_path: Path) -> None:
    made = train_steps(tmp_path / "run", 6, stop_at=2)
    before = (tmp_path / "run" / WEIGHTS).read_bytes()
    with torch.no_grad():
        made.trainer.master.conv_in.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="step 3"):
        made.train(Budget(6))
    made = Run(tmp_path / "run", trainer(), bars())
    made.trainer.ema["conv_in.bias"][0] = 1e6  # beyond float16
    with pytest.raises(NonFiniteError, match=r"conv_in\.bias"):
        made.save()
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == before


def test_partial_files_are_cleared(tmp_path: Path) -> None:
    """A temporary file of every file that a run writes; but nobody else's."""
    made = train_steps(tmp_path / "run", 2)
    made.log.rows.append((100, 1.0, 1e-3, 1.0))
    run_module.write_loss_curve(made)  # where matplotlib is installed
    for name in [p.name for p in (tmp_path / "run").iterdir()]:
        (tmp_path / "run" / f".{name}.k3x_9abc").write_bytes(b"cut")
    (tmp_path / "run" / ".notes.txt").write_text("mine")
    Run(tmp_path / "run", trainer(), bars())
    assert [p.name for p in (tmp_path / "run").glob(".*")] == [".notes.txt"]


def test_null_class_is_recorded(tmp_path: Path) -> None:
    """The class that dropped labels become stands in config.json, which both readers still take; else there is none."""
    made = train_steps(tmp_path / "run", 1)
    dropped = batches(bars(), 1, class_dropout=1)[0].labels
    assert dropped is not None
    assert json.loads((tmp_path / "run" / "config.json").read_text())["_null_class"] == int(dropped) == 4
    assert UNet.from_pretrained(tmp_path / "run").config == made.trainer.master.config
    plain = ImageSet(bars().images)
    Run(tmp_path / "plain", trainer(data=plain), plain).save()
    assert "_null_class" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    diffusers = pytest.importorskip("diffusers")
    assert diffusers.UNet2DModel.from_pretrained(tmp_path / "run").config.num_class_embeds == 5


def test_budget() -> None:
    assert Budget(10).progress(5, 1e9) == 0.5
    assert Budget(minutes=2).progress(10**9, 60) == 0.5
    assert Budget(10, 2).progress(2, 90) == 0.75
    assert Budget(1000).rate(0, 0.0) == 1 / 101
    assert Budget(1000).rate(500, 0.5) == pytest.approx(0.5)
    assert Budget(1000).rate(999, 1.0) == 0.0
    for bad in ({}, {"steps": 0}, {"minutes": 0.0}, {"minutes": float("nan")}):
        with pytest.raises(ConfigError):
            Budget(**bad)


# The command


def call(tmp_path: Path, *words: str) -> Result:
    """`fastddpm train` on the bars."""
    data = bars()
    np.savez(tmp_path / "bars.npz", images=data.images[:, 0].numpy(), labels=np.asarray(data.labels))
    given = ["--data", str(tmp_path / "bars.npz"), "--out", str(tmp_path / "run"), "--widths", "8,8"]
    return CliRunner().invoke(main, ["train", *given, "--batch-size", "8", *words])


def test_command_trains_and_goes_on(tmp_path: Path) -> None:
    first = call(tmp_path, "--steps", "3", "--json")
    assert first.exit_code == 0, first.output
    result = json.loads(first.stdout)
    assert result["steps"] == 3
    assert not result["interrupted"]
    assert "\n" not in first.stdout.strip()
    second = call(tmp_path, "--steps", "4")
    assert "going on at step 3" in second.stderr
    assert "trained 4 steps" in second.stdout
    third = call(tmp_path, "--steps", "4")
    assert "complete" in third.stdout


@pytest.mark.parametrize(
    "words, code, message",
    [
        (("--steps", "2", "--lr", "-1"), 2, "lr is -1.0"),
        (("--steps", "0"), 2, "steps is 0"),
        (("--steps", "2", "--size", "9"), 2, "size 9"),
        (("--steps", "2", "--widths", "8,a"), 2, "whole numbers"),
        (("--steps", "2", "--widths", "3"), 2, "block_out_channels"),
        (("--steps", "2", "--widths", ""), 2, "block_out_channels"),
        (("--steps", "2", "--widths", ",".join(["8"] * 64)), 2, "64 widths are given; allowed: 1 ... 8"),
        (("--steps", "2", "--size", str(1 << 20)), 2, "48 images of 1 x 1048576 x 1048576 have"),
        (("--steps", "2", "--out", "/dev/null/run"), 5, "/dev/null"),
        (("--steps", "2", "--out", "a" * 300), 5, "File name too long"),
        (("--steps", "2", "--data", "/absent"), 2, "does not exist"),
    ],
)
def test_command_errors(tmp_path: Path, words: tuple[str, ...], code: int, message: str) -> None:
    result = call(tmp_path, *words)
    assert result.exit_code == code, result.output
    assert message in result.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_command_learns_v_unless_told(tmp_path: Path) -> None:
    """The recipe of the shipped weights; and epsilon where it is asked for."""
    assert TrainConfig().prediction == "v_prediction"
    for words, learnt in (((), "v_prediction"), (("--prediction", "epsilon"), "epsilon")):
        assert call(tmp_path, "--steps", "1", "--out", str(tmp_path / learnt), *words).exit_code == 0
        assert json.loads((tmp_path / learnt / "scheduler_config.json").read_text())["prediction_type"] == learnt


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_for_terminals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    stderr = SimpleNamespace(isatty=lambda: terminal)
    monkeypatch.setattr(command_module, "sys", SimpleNamespace(stderr=stderr))
    result = call(tmp_path, "--steps", "1")
    assert result.exit_code == 0, result.output
    assert ("100%" in result.stderr) == terminal


def test_missing_loss_curve_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"loss": 0.5, "steps": 100, "minutes": 1.0, "folder": "run", "loss_curve": None, "new_steps": 1}
    command_module.say_result({**result, "interrupted": False})
    assert "(pip install matplotlib)" in capsys.readouterr().err


def test_command_refuses_another_run(tmp_path: Path) -> None:
    assert call(tmp_path, "--steps", "1").exit_code == 0
    result = call(tmp_path, "--steps", "1", "--seed", "7")
    assert result.exit_code == 4
    assert result.stderr.splitlines() == [
        f"error: {tmp_path / 'run'} holds another run: seed is 0 there, 7 here; "
        "give another directory, or that run's options"
    ]


def test_interrupt_saves_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Trainer.step

    def interrupted(self: Trainer, rate: float = 1.0) -> torch.Tensor:
        if self.steps == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, rate)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        result = call(tmp_path, "--steps", "6", "--precision", "float32", "--json")
    assert result.exit_code == 130
    assert json.loads(result.stdout)["steps"] == 3
    assert signal.getsignal(signal.SIGINT) is before
    assert call(tmp_path, "--steps", "6", "--precision", "float32").exit_code == 0
    resumed = (tmp_path / "run" / WEIGHTS).read_bytes()
    (tmp_path / "whole").mkdir()
    call(tmp_path, "--steps", "6", "--precision", "float32", "--out", str(tmp_path / "whole"))
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == resumed


def test_second_interrupt_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def impatient(self: Trainer, rate: float = 1.0) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second SIGINT was ignored")

    monkeypatch.setattr(Trainer, "step", impatient)
    result = call(tmp_path, "--steps", "6")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert not (tmp_path / "run" / WEIGHTS).exists()


def test_loss_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "LOG_EVERY", 2)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)  # as if it were not installed
    made = train_steps(tmp_path / "run", 4)
    assert run_module.write_loss_curve(made) is None
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    path = run_module.write_loss_curve(made)
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")
