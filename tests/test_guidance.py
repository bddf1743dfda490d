"""Guidance: classifier-free through the sampler against plain formulas, a classifier's gradient, a picture beside x."""

import math

import numpy as np
import pytest
import torch
from fastddpm_kernels import columns as col
from fastddpm_kernels import reference

from fastddpm import NoiseSchedule, Sampler, graphs, solvers
from fastddpm.analytic import GaussianMixture
from fastddpm.edm import EDMSchedule
from fastddpm.errors import ConfigError, InputError, NonFiniteError
from fastddpm.guidance import classifier_guided, classifier_guided_mean, concatenated
from fastddpm.seeds import sample_seeds
from fastddpm.solvers.repaint import repaint

SCHEDULE = NoiseSchedule.linear()
TABLE = solvers.ddpm(SCHEDULE, 8, clip=1.0)
EXACT = dict(state_dtype=torch.float64)


def model(x, t, label, gain=1.0):
    """Any function of the sample, the time and the label: 0 is "no class"."""
    bend = torch.cos(0.01 * t.to(x.dtype) + label.to(x.dtype)).reshape(-1, *[1] * (x.ndim - 1))
    return gain * (0.4 * x + 0.3 * torch.sin(3 * x + bend) + 0.2 * bend)


def by_hand(table, shape, seeds, labels, weight, phi=None, interval=None):
    """The loop in float64 with the halves called one after the other; `weight` and `phi` are [B]."""
    bits = sample_seeds(seeds, shape[0])
    x = reference.normal(bits, shape[1:], step=0, stream=0, dtype=torch.float64) * table.init_noise_sigma
    alpha, sigma = table.start
    h1 = h2 = torch.zeros_like(x)
    for i, row in enumerate(table.rows):
        c = dict(zip(col.COLUMNS, row.tolist(), strict=True))
        t = torch.full(shape[:1], int(c["t"]))
        m_u, m_c = model(x, t, torch.zeros(shape[0])), model(x, t, labels)
        inside = interval is None or (alpha > 0 and interval[0] < sigma / alpha <= interval[1])
        w = weight if inside else torch.ones_like(weight)
        m = m_u + w[:, None] * (m_c - m_u)
        if phi is not None:
            m = phi[:, None] * m * (m_c.std(1) / m.std(1))[:, None] + (1 - phi[:, None]) * m
        x0 = (c["x0_x"] * x + c["x0_m"] * m).clamp(-c["clip"], c["clip"])
        z = reference.normal(bits, shape[1:], step=i, stream=1, dtype=torch.float64)
        past = c["x_h1"] * h1 + c["x_h2"] * h2
        x = c["x_x"] * x + c["x_x0"] * x0 + c["x_m"] * m + past + c["x_z"] * z
        h1, h2 = x0, h1
        alpha, sigma = c["k_x"], c["k_z"]
    return x


LABELS = torch.tensor([1, 2, 3])
WEIGHTS = torch.tensor([0.0, 1.5, 7.0], dtype=torch.float64)
KWARGS = dict(model_kwargs={"label": LABELS}, unconditional_kwargs={"label": torch.zeros(3, dtype=torch.int64)})


@pytest.mark.parametrize("phi", [None, torch.tensor([0.0, 0.7, 1.0], dtype=torch.float64)])
@pytest.mark.parametrize("interval", [None, (0.3, 2.0), (0.0, math.inf)])
@pytest.mark.parametrize("table", [TABLE, solvers.ddim(SCHEDULE, 8, eta=0.5, spacing="trailing")])
def test_classifier_free_guidance_is_the_formula(table, interval, phi):
    made = Sampler(model, table, **EXACT).sample(
        (3, 10),
        seeds=4,
        guidance_scale=WEIGHTS,
        guidance_rescale=0.0 if phi is None else phi,
        guidance_interval=interval,
        **KWARGS,
    )
    expected = by_hand(table, (3, 10), 4, LABELS, WEIGHTS, phi, interval)
    assert (made - expected).abs().max() < 1e-12 * expected.abs().max()
    plain = by_hand(table, (3, 10), 4, LABELS, WEIGHTS)
    assert (interval == (0.3, 2.0) or phi is not None) == ((made - plain).abs().max() > 1e-3)


def test_the_interval_counts_its_upper_end_and_not_its_lower():
    noise = TABLE["k_z"] / np.maximum(TABLE["k_x"], 1e-9)  # behind each row
    low, high = float(noise[5]), float(noise[2])  # where rows 6 and 3 find the state
    seen = []

    def weighted(x, t, label):
        seen.append(x.shape[0])
        return model(x, t, label)

    sampler = Sampler(weighted, TABLE, **EXACT)
    made = sampler.sample((3, 10), seeds=4, guidance_scale=WEIGHTS, guidance_interval=(low, high), **KWARGS)
    assert seen == [6] * 8
    x = by_hand(TABLE, (3, 10), 4, LABELS, WEIGHTS, interval=(low, high))
    assert (made - x).abs().max() < 1e-12
    inside = by_hand(TABLE, (3, 10), 4, LABELS, WEIGHTS, interval=(low * 1.001, high * 1.001))
    assert (made - inside).abs().max() < 1e-12
    without = by_hand(TABLE, (3, 10), 4, LABELS, WEIGHTS, interval=(low * 0.999, high))
    assert (made - without).abs().max() > 1e-3


def test_the_model_is_called_once_with_both_halves_the_unconditional_one_first():
    seen = []

    def watched(x, t, label, cond, gain):
        seen.append((x.clone(), t.clone(), label.clone(), cond["y"][0].clone(), cond["shared"], gain))
        return model(x, t, label)

    shared, y = torch.arange(5.0), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    Sampler(watched, TABLE).sample(
        (2, 10),
        seeds=0,
        guidance_scale=2.0,
        model_kwargs={"label": torch.tensor([1, 2]), "cond": {"y": [y], "shared": shared}, "gain": 3},
        unconditional_kwargs={"label": 0, "cond": {"y": [torch.tensor([[7.0, 8.0]])], "shared": shared.clone()}},
    )
    assert len(seen) == 8
    for (x, t, label, both, given, gain), time in zip(seen, TABLE.timesteps, strict=True):
        assert torch.equal(x[:2], x[2:])
        assert t.tolist() == [time] * 4
        assert label.tolist() == [0, 0, 1, 2]
        assert both.tolist() == [[7, 8], [7, 8], [1, 2], [3, 4]]
        assert torch.equal(given, shared)
        assert gain == 3


def test_one_and_none_are_off_but_one_a_sample_is_never():
    calls = []

    def watched(x, t, label):
        calls.append(len(x))
        return model(x, t, label)

    sampler = Sampler(watched, TABLE)
    off = sampler.sample((3, 10), seeds=0, model_kwargs={"label": LABELS})
    assert torch.equal(sampler.sample((3, 10), seeds=0, guidance_scale=1, **KWARGS), off)
    assert set(calls) == {3}
    ones = sampler.sample((3, 10), seeds=0, guidance_scale=[1.0, 1.0, 1.0], **KWARGS)
    assert calls[-1] == 6
    assert (ones - off).abs().max() < 1e-5
    zero = sampler.sample((3, 10), seeds=0, guidance_scale=0, **KWARGS)
    nothing = sampler.sample((3, 10), seeds=0, model_kwargs={"label": torch.zeros(3)})
    assert (zero - nothing).abs().max() < 1e-5


def test_a_sample_does_not_depend_on_the_others_scales():
    """Bit for bit, in parts of two, the last one padded; and in any order."""
    sampler, seeds = Sampler(model, TABLE, batch_size=2), [5, 6, 7]
    given = dict(guidance_interval=(0.3, 2.0), unconditional_kwargs={"label": 0})
    scales, phis = [1.0, 2.5, 7.0], [0.0, 0.7, 1.0]
    made = sampler.sample(
        (3, 10),
        seeds=seeds,
        guidance_scale=scales,
        guidance_rescale=phis,
        model_kwargs={"label": LABELS},
        **given,
    )
    for picked in ([0], [2, 1], [1, 1, 0, 2]):
        again = sampler.sample(
            (len(picked), 10),
            seeds=[seeds[i] for i in picked],
            guidance_scale=[scales[i] for i in picked],
            guidance_rescale=[phis[i] for i in picked],
            model_kwargs={"label": LABELS[picked]},
            **given,
        )
        assert torch.equal(again, made[picked])
    others = sampler.sample(
        (3, 10),
        seeds=seeds,
        guidance_scale=[-3.0, 2.5, 1e3],
        guidance_rescale=[1.0, 0.7, 0.1],
        model_kwargs={"label": LABELS},
        **given,
    )
    assert torch.equal(others[1], made[1])
    assert not torch.equal(others[0], made[0])


def test_guidance_with_history_a_scaled_input_and_a_low_precision_model():
    """The second row looks back; the model's input, in bfloat16, is scaled in both halves."""
    table = solvers.step_table([1.0, 0.0], c_in=[0.5, 0.25], x0_m=1.0, x_x0=[1.0, 0.0], x_h1=[0.0, 2.0])
    inputs = []

    def watched(x, t, up):
        inputs.append(x.clone())
        return x + up[:, None].to(x.dtype)

    x_T = torch.tensor([[1.0, 2.0]])
    made = Sampler(watched, table, dtype=torch.bfloat16).sample(
        (1, 2),
        seeds=0,
        x_T=x_T,
        guidance_scale=3.0,
        model_kwargs={"up": torch.ones(1)},
        unconditional_kwargs={"up": torch.zeros(1)},
    )
    first = 0.5 * x_T + 3  # m_u + 3 (m_c - m_u), with m_c = m_u + 1
    assert inputs[0].dtype == torch.bfloat16
    assert torch.equal(inputs[0].float(), (0.5 * x_T).repeat(2, 1))
    assert torch.equal(inputs[1].float(), (0.25 * first).repeat(2, 1))
    assert torch.equal(made, 2 * first)


def test_a_learned_variance_is_the_conditional_halfs():
    table = solvers.ddpm(SCHEDULE, 8, clip=1.0, variance="learned_range")

    def learning(x, t, v):
        return torch.cat([0.3 * x, v[:, None, None].to(x.dtype).expand_as(x)], dim=1)

    kwargs = dict(model_kwargs={"v": torch.tensor([-1.0, 1.0])})
    guided = Sampler(learning, table).sample(
        (2, 3, 4), seeds=1, guidance_scale=4, unconditional_kwargs={"v": 9}, **kwargs
    )
    assert (guided - Sampler(learning, table).sample((2, 3, 4), seeds=1, **kwargs)).abs().max() < 1e-5


@pytest.mark.parametrize("half", [0, 1])
def test_what_is_not_finite_in_either_half_is_that_samples_error(half):
    def broken(x, t, label):
        out = model(x, t, label)
        if t[0] == TABLE.timesteps[3]:
            out[1 + 3 * half] = math.nan
        return out

    clean = Sampler(model, TABLE).sample((3, 10), seeds=0, guidance_scale=2.0, **KWARGS)
    with pytest.raises(NonFiniteError, match=r"sample 1 is not finite from step 3") as caught:
        Sampler(broken, TABLE).sample((3, 10), seeds=0, guidance_scale=2.0, **KWARGS)
    assert caught.value.bad.tolist() == [False, True, False]
    assert torch.equal(caught.value.samples[[0, 2]], clean[[0, 2]])


def test_trace_is_guided_as_sample_is():
    given = dict(seeds=3, guidance_scale=[1.0, 2.0, 3.0], guidance_rescale=0.5, guidance_interval=(0.1, 4), **KWARGS)
    steps = list(Sampler(model, TABLE).trace((3, 10), **given))
    assert torch.equal(steps[-1].x, Sampler(model, TABLE).sample((3, 10), **given))


LABEL = {"label": LABELS}
WRONG = [
    (dict(guidance_scale=2.0), "guidance_scale needs unconditional_kwargs"),
    (dict(unconditional_kwargs={"label": 0}), "without guidance_scale"),
    (dict(guidance_interval=(0.1, 1)), "guidance_interval is given without guidance_scale"),
    (dict(guidance_rescale=0.7), "guidance_rescale is given without guidance_scale"),
    (dict(guidance_scale=2.0, unconditional_kwargs={"label": 0.5}), r"hold 0.5, where .* torch.int64"),
    (dict(guidance_scale=2.0, unconditional_kwargs={"label": math.nan}), r"hold nan, where .* torch.int64"),
    (dict(guidance_scale=2.0, unconditional_kwargs={"label": 10**30}), r"hold 10*, where .* torch.int64"),
    (dict(guidance_scale=[1.0, 2.0], unconditional_kwargs={"label": 0}), r"guidance_scale has shape \(2,\) for 3"),
    (dict(guidance_scale=math.nan, unconditional_kwargs={"label": 0}), "guidance_scale is nan; allowed: a finite"),
    (dict(guidance_scale=True, unconditional_kwargs={"label": 0}), "guidance_scale is True"),
    (dict(guidance_scale="3", unconditional_kwargs={"label": 0}), "guidance_scale is '3'"),
    (dict(guidance_scale=2.0, unconditional_kwargs={"label": 0}, guidance_rescale=1.5), r"in 0 \.\.\. 1"),
    (dict(guidance_scale=2.0, unconditional_kwargs={"class": 0}), "have 'class', model_kwargs have not"),
    (dict(guidance_scale=2.0, unconditional_kwargs={"label": {"a": 0}}), "differ in structure"),
    (dict(guidance_scale=2.0, unconditional_kwargs={"label": torch.zeros(3)}), "hold a torch.float32 where"),
    (dict(guidance_scale=2.0, unconditional_kwargs={"label": None}), "hold a NoneType where"),
    (dict(guidance_scale=2.0, unconditional_kwargs={"label": LABELS[:2]}), r"shape \(2,\) where .* \(3,\)"),
    (dict(guidance_scale=2.0, unconditional_kwargs={"label": 0, "gain": 2.0}), "a value that has not a row a sample"),
    (dict(guidance_scale=2.0, unconditional_kwargs={"label": 0}, guidance_interval=(2, 1)), "0 <= low < high"),
    (dict(guidance_scale=2.0, unconditional_kwargs={"label": 0}, guidance_interval=3), "two numbers"),
    (dict(guidance_scale=2.0, unconditional_kwargs={"label": 0}, guidance_interval=(500, 900)), "no row is there"),
]


@pytest.mark.parametrize("arguments, words", WRONG)
def test_wrong_guidance_is_refused_in_a_line_before_the_model_runs(arguments, words):
    def silent(x, t, **kwargs):
        raise AssertionError("the model ran")

    given = dict(shape=(3, 10), seeds=0, model_kwargs={"label": LABELS, "gain": 1.0}, **arguments)
    for refused in (Sampler(silent, TABLE).sample, Sampler(silent, TABLE).trace):
        with pytest.raises(InputError, match=words) as caught:
            refused(**given)
        assert "\n" not in str(caught.value)


def test_the_unconditional_number_may_be_numpys():
    given = dict(seeds=3, guidance_scale=2.0, model_kwargs={"label": LABELS})
    made = [Sampler(model, TABLE).sample((3, 10), unconditional_kwargs={"label": u}, **given) for u in (4, np.int64(4))]
    assert torch.equal(*made)


def test_an_interval_needs_a_table_that_knows_its_levels():
    table = solvers.step_table([1.0, 0.0], x0_m=1.0, x_x0=1.0)
    with pytest.raises(InputError, match="this one has no k_x and k_z"):
        Sampler(model, table).sample((3, 10), seeds=0, guidance_scale=2.0, guidance_interval=(0, 1), **KWARGS)


# --- a classifier's gradient ------------------------------------------------------------------------------------------

MEANS, STDS, WEIGHT = [[-1.0, 0.2], [0.8, 0.5], [0.1, -0.7]], [0.2, 0.3, 0.25], [0.5, 0.2, 0.3]


def log_posterior(x, t, y):
    """log p(component y | x_t) of the mixture, from Bayes and Gaussian densities."""
    bar = torch.tensor(SCHEDULE.alphas_cumprod)[t][:, None]
    mu, s, w = (torch.tensor(v, dtype=torch.float64) for v in (MEANS, STDS, WEIGHT))
    densities = torch.distributions.Normal(bar.sqrt()[..., None] * mu, (bar * s**2 + 1 - bar).sqrt()[..., None])
    joint = w.log() + densities.log_prob(x[:, None, :].double()).sum(-1)
    return joint.log_softmax(1)[torch.arange(len(y)), y]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_classifier_makes_the_perfect_conditional_model(kind):
    """grad log p(x_t | y) = grad log p(x_t) + grad log p(y | x_t): of a mixture that is one component's own model."""
    guided = classifier_guided(
        GaussianMixture(MEANS, STDS, WEIGHT).model(SCHEDULE, kind), log_posterior, SCHEDULE, prediction_type=kind
    )
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in (0, 1, 300, 999):
        times, y = torch.full((6,), t), torch.tensor([0, 1, 2, 0, 1, 2])
        made = guided(x, times, y=y)
        for k in range(3):
            alone = GaussianMixture(MEANS[k : k + 1], STDS[k : k + 1], [1.0]).model(SCHEDULE, kind)(x, times)
            assert torch.allclose(made[y == k], alone[y == k], rtol=1e-9, atol=1e-9)


def test_the_scale_and_times_between_the_steps():
    flat = lambda x, t, y: (x * y[:, None]).sum(1)  # noqa: E731 (its gradient is y)
    guided = classifier_guided(lambda x, t: 0 * x, flat, SCHEDULE, scale=2.5)
    x, y = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([1.0, -2.0], dtype=torch.float64)
    sigma = SCHEDULE.sqrt_one_minus_alphas_cumprod
    made = guided(x, torch.tensor([10, 500]), y=y)
    assert made[:, 0].tolist() == pytest.approx([-2.5 * sigma[10], 5 * sigma[500]], rel=1e-12)
    assert not x.requires_grad
    between = guided(x, torch.tensor([10.25, 999.0]), y=y)[:, 0]
    log_sigma = np.interp(10.25, np.arange(1000), -0.5 * SCHEDULE.log_snr)
    expected = [-2.5 / math.sqrt(1 + math.exp(-2 * log_sigma)), 5 * sigma[999]]
    assert between.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_guidance_of_the_mean_shifts_it_by_the_variance_times_the_gradient(variance):
    """One row of DDPM with and without: the difference is s Sigma g, from Ho et al.'s own formulas."""
    table = solvers.ddpm(SCHEDULE, variance=variance)

    def eps_model(x, t):
        eps = torch.tanh(x)
        return torch.cat([eps, 0.6 * torch.cos(x)], dim=1) if variance == "learned_range" else eps

    def log_prob(x, t):
        return -0.5 * (x - 0.3).square().flatten(1).sum(1)  # its gradient is 0.3 - x

    guided = classifier_guided_mean(eps_model, log_prob, table, scale=3.0)
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = torch.tensor(table.with_identity())
    for i in (0, 400, 998, 999):
        t = 999 - i
        beta, bar = SCHEDULE.betas[t], SCHEDULE.alphas_cumprod[t]
        before = SCHEDULE.alphas_cumprod[t - 1] if t else 1.0
        small = (1 - before) / (1 - bar) * beta
        Sigma = {"fixed_small": small, "fixed_large": beta if t else 0.0}.get(variance)
        if variance == "learned_range":
            f = (0.6 * torch.cos(x) + 1) / 2
            Sigma = torch.exp(f * math.log(beta) + (1 - f) * math.log(small)) if t else 0.0
        cursor, times = torch.full((2,), i), torch.full((2,), t)
        plain, moved = (
            reference.reverse_step(x, m(x, times), rows, cursor, learned=table.learned).x for m in (eps_model, guided)
        )
        assert ((moved - plain) - 3.0 * Sigma * (0.3 - x)).abs().max() < 1e-11


def test_guidance_of_the_mean_is_of_the_states_gradient_where_the_input_is_scaled():
    """The classifier sees c_in x; the first row's mean moves by s Sigma d/dx log p(c_in x), the last one's stays."""
    table = solvers.step_table([5.0, 3.0], c_in=[0.25, 0.5], x0_x=1.0, x0_m=-2.0, x_x0=0.7, x_m=0.2, x_z=[0.6, 0.0])
    guided = classifier_guided_mean(lambda x, t: x, lambda x, t: x.square().sum(1), table, scale=1.5)
    x, rows = torch.tensor([[1.0, -2.0]], dtype=torch.float64), torch.tensor(table.with_identity())
    for i, sigma in ((0, 0.6), (1, 0.0)):
        at, cursor = rows[i, col.C_IN] * x, torch.tensor([i])
        plain, moved = (
            reference.reverse_step(x, m, rows, cursor).x for m in (at, guided(at, rows[i : i + 1, col.T].long()))
        )
        gradient = 2 * rows[i, col.C_IN] * at  # by the chain rule
        assert ((moved - plain) - 1.5 * sigma**2 * gradient).abs().max() < 1e-14


def test_classifier_guidance_in_the_sampler():
    """Through the loop: labels by `y`, the samples go to their components, and nothing of the gradient stays."""
    mixture = GaussianMixture(MEANS, STDS, WEIGHT)
    weight = torch.nn.Parameter(torch.ones(()))
    guided = classifier_guided(
        lambda x, t: weight * mixture.model(SCHEDULE)(x, t), lambda *a: weight * log_posterior(*a), SCHEDULE
    )
    y = torch.arange(60) % 3
    sampler = Sampler(guided, solvers.ddim(SCHEDULE, 25))
    with torch.inference_mode():
        x = sampler.sample((60, 2), seeds=0, model_kwargs={"y": y})
    assert torch.equal(mixture.component(x), y)
    assert weight.grad is None
    assert not x.requires_grad
    moved = Sampler(classifier_guided_mean(mixture.model(SCHEDULE), log_posterior, t := solvers.ddpm(SCHEDULE, 100)), t)
    to_their_own = mixture.component(moved.sample((60, 2), seeds=0, model_kwargs={"y": y})) == y
    assert to_their_own.sum() >= 57  # the mean's guidance is of first order in the step; by chance it were 20


def test_wrapped_modules_are_found_and_the_models_dtype_is_its_own():
    net, classifier = torch.nn.Linear(4, 4).bfloat16(), torch.nn.Linear(4, 3)

    def log_prob(x, t, y):
        return classifier(x.float()).log_softmax(1).gather(1, y[:, None])[:, 0]

    guided = classifier_guided(lambda x, t: net(x), log_prob, SCHEDULE)
    assert graphs.modules_of(guided) == [net, classifier]
    assert graphs.modules_of(classifier_guided(concatenated(net), log_prob, SCHEDULE)) == [net, classifier]
    made = Sampler(guided, TABLE).sample((2, 4), seeds=0, model_kwargs={"y": torch.tensor([0, 1])})
    assert made.shape == (2, 4)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: classifier_guided(model, model, SCHEDULE, math.inf), "scale is inf"),
        (lambda: classifier_guided(model, model, SCHEDULE, True), "scale is True"),
        (lambda: classifier_guided(model, None, SCHEDULE), "log_prob is a NoneType; needed: a callable"),
        (lambda: classifier_guided(3, model, SCHEDULE), "model is a int; needed: a callable"),
        (lambda: classifier_guided(model, model, SCHEDULE, prediction_type="eps"), "prediction_type is 'eps'"),
        (lambda: classifier_guided(model, model, EDMSchedule()), "needed: a NoiseSchedule"),
        (lambda: classifier_guided(model, model, SCHEDULE.rescale_zero_terminal_snr()), "alpha_bar is above 0"),
        (lambda: classifier_guided_mean(model, model, TABLE), "clips x_0"),
        (lambda: classifier_guided_mean(model, model, solvers.ddim(SCHEDULE, 8)), "adds no noise"),
        (
            lambda: classifier_guided_mean(
                model, model, solvers.step_table([1, 0], x0_m=1, x_x0=1, x_h1=[0, 0.1], x_z=[1, 0])
            ),
            "looks back",
        ),
        (
            lambda: classifier_guided_mean(model, model, repaint(SCHEDULE, 12, jump_length=4)),
            "has no whole time step of its own a row",
        ),
    ],
)
def test_what_can_not_be_guided(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_log_prob_that_is_not_one_number_a_sample():
    guided = classifier_guided(lambda x, t: x, lambda x, t: x.sum(), SCHEDULE)
    with pytest.raises(InputError, match=r"log_prob returned \(\); needed: a tensor \(2,\)"):
        Sampler(guided, TABLE).sample((2, 4), seeds=0)


def test_a_log_prob_without_a_gradient():
    guided = classifier_guided(lambda x, t: x, lambda x, t: x.detach().sum(1), SCHEDULE)
    with pytest.raises(InputError, match="log_prob returned a tensor without a gradient"):
        Sampler(guided, TABLE).sample((2, 4), seeds=0)


# --- a picture beside x -----------------------------------------------------------------------------------------------


def test_concatenated_gives_the_model_the_enlarged_picture_of_each_sample():
    seen = []

    def watched(x, t, gain):
        seen.append(x.clone())
        return gain * x[:, 2:]

    low = torch.arange(3 * 2 * 2 * 2, dtype=torch.float64).reshape(3, 2, 2, 2)
    sampler = Sampler(concatenated(watched, mode="nearest"), TABLE, batch_size=2)
    made = sampler.sample((3, 2, 4, 4), seeds=0, model_kwargs={"low_res": low, "gain": 0.1})
    assert made.shape == (3, 2, 4, 4)
    large = low.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(seen[0][:, 2:].double(), large[:2])
    assert torch.equal(seen[-1][:, 2:].double(), large[[2, 2]])
    assert seen[0].dtype == torch.float32
    same = concatenated(watched)(torch.zeros(3, 2, 2, 2), torch.zeros(3), low_res=low, gain=1.0)
    assert torch.equal(same.double(), low)
