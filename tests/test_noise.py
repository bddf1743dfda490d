"""The noise contract: the published bits, one normal for each (seed, stream, step, element), and its statistics."""

import hashlib
import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from fastddpm_kernels import constants as const
from fastddpm_kernels import normal, philox, reference
from helpers import DEVICE, Guarded
from scipy import stats

# Random123's known answers: counter, key, words.
PI = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
ONES = ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2)
KNOWN = [
    (7, ((0,) * 4, (0,) * 2), "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, ONES, "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, PI, "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, ((0,) * 4, (0,) * 2), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, ONES, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@triton.jit
def words_kernel(counter_ptr, key_ptr, out_ptr, n, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    c0 = tl.load(counter_ptr + i, m, other=0).to(tl.uint32)
    c1 = tl.load(counter_ptr + n + i, m, other=0).to(tl.uint32)
    c2 = tl.load(counter_ptr + 2 * n + i, m, other=0).to(tl.uint32)
    c3 = tl.load(counter_ptr + 3 * n + i, m, other=0).to(tl.uint32)
    k0 = tl.load(key_ptr + i, m, other=0).to(tl.uint32)
    k1 = tl.load(key_ptr + n + i, m, other=0).to(tl.uint32)
    words = philox.philox4x32(c0, c1, c2, c3, k0, k1, (i >> 31).to(tl.uint64), ROUNDS)
    for k in tl.static_range(4):
        tl.store(out_ptr + k * n + i, words[k].to(tl.int64), m)


def triton_words(counter: torch.Tensor, key: torch.Tensor, rounds: int) -> torch.Tensor:
    out = torch.full((4, counter.shape[1]), -1, dtype=torch.int64, device=DEVICE)
    n = counter.shape[1]
    # One big block in the interpreter, where a program costs 14 ms; on a GPU it would be minutes of compilation.
    block = triton.next_power_of_2(n) if DEVICE.type == "cpu" else 1024
    words_kernel[(triton.cdiv(n, block),)](counter, key, out, n, ROUNDS=rounds, BLOCK=block)
    return out


@triton.jit
def box_muller_kernel(words_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w0, w1 = (tl.load(words_ptr + i, i < n), tl.load(words_ptr + n + i, i < n))
    z0, z1 = philox.box_muller(w0.to(tl.uint32), w1.to(tl.uint32))
    tl.store(out_ptr + i, z0, i < n)
    tl.store(out_ptr + n + i, z1, i < n)


def triton_normals(w0: torch.Tensor, w1: torch.Tensor) -> torch.Tensor:
    words = torch.stack([w0, w1]).to(DEVICE)
    out = torch.full(words.shape, math.nan, dtype=torch.float32, device=DEVICE)
    block = triton.next_power_of_2(len(w0)) if DEVICE.type == "cpu" else 1024
    box_muller_kernel[(triton.cdiv(len(w0), block),)](words, out, len(w0), BLOCK=block)
    return out.cpu()


@pytest.mark.parametrize("rounds, inputs, words", KNOWN)
def test_philox_has_the_published_bits(rounds, inputs, words):
    counter, key = inputs
    expected = [int(w, 16) for w in words.split()]
    assert [int(w) for w in reference.philox4x32(counter, key, rounds)] == expected
    made = triton_words(
        torch.tensor(counter, device=DEVICE)[:, None], torch.tensor(key, device=DEVICE)[:, None], rounds
    )
    assert made[:, 0].tolist() == expected


def test_the_twins_agree_on_random_counters():
    generator = torch.Generator().manual_seed(0)
    counter, key = (torch.randint(0, 2**32, (k, 100_000), generator=generator).to(DEVICE) for k in (4, 2))
    made = triton_words(counter, key, 10)
    assert torch.equal(made, torch.stack(reference.philox4x32(list(counter), list(key))))


def one_normal(seed: int, stream: int, step: int, element: int, n: int) -> float:
    """The contract, word for word, in Python's integers and float64."""
    q = math.ceil(math.ceil(n / 4) / 16) * 16
    part, lane = divmod(element, q)
    words = [int(w) for w in reference.philox4x32((lane, step, stream, 0), (seed & 0xFFFFFFFF, seed >> 32))]
    u = [float(np.float32(np.float32(w) * np.float32(2**-32)) + np.float32(2**-33)) for w in words]
    pair = u[0:2] if part < 2 else u[2:4]
    radius, angle = math.sqrt(-2 * math.log(pair[0])), 2 * math.pi * pair[1]
    return radius * (math.cos(angle) if part % 2 == 0 else math.sin(angle))


@pytest.mark.parametrize("n", [1, 7, 64, 65, 1000])
def test_each_element_is_the_contracts(n):
    seeds = [3, 2**64 - 1, 2**40 + 17]
    bits = torch.tensor(np.array(seeds, dtype=np.uint64).view(np.int64), device=DEVICE)
    made = normal(bits, (n,), step=5, stream=2)
    elements = sorted({0, n - 1, n // 2, n // 3, min(n - 1, 63), min(n - 1, 16)})
    for b, seed in enumerate(seeds):
        for e in elements:
            assert made[b, e].item() == pytest.approx(one_normal(seed, 2, 5, e, n), abs=4e-6)


@pytest.mark.parametrize("shape", [(1,), (13,), (3, 5, 7), (1, 28, 28), (2, 16, 16)])
def test_kernel_and_reference_agree_and_stay_inside(shape):
    seeds = torch.tensor([0, -1, 2**62 + 5], device=DEVICE)
    out = Guarded((3, *shape))
    philox.launch_normal(out.tensor, seeds, step=9, stream=1, block=64)
    assert out.intact()
    exact = reference.normal(seeds, shape, step=9, stream=1, dtype=torch.float64)
    assert (out.tensor - exact).abs().max() <= 4e-6


def test_noise_depends_on_nothing_but_seed_stream_step_and_element():
    seeds = torch.tensor([11, 22, 33, 44, 55], device=DEVICE)
    shape, n = (3, 5, 7), 105
    made = {}
    for block in (64, 256, 1024):
        made[block] = torch.full((5, *shape), math.nan, device=DEVICE)
        philox.launch_normal(made[block], seeds, step=4, stream=1, block=block)
    assert torch.equal(made[64], made[256])
    assert torch.equal(made[64], made[1024])
    together = normal(seeds, shape, step=4, stream=1)
    assert torch.equal(normal(seeds.flip(0), (n,), step=4, stream=1).flip(0), together.flatten(1))
    for slot in range(5):
        assert torch.equal(normal(seeds[slot : slot + 1], shape, step=4, stream=1)[0], together[slot])
    others = [normal(seeds, shape, step=s, stream=k) for s, k in ((4, 0), (4, 2), (5, 1))]
    assert all((made[64] != other).float().mean() > 0.99 for other in others)


def test_all_64_bits_of_a_seed_count():
    seeds = torch.tensor([7, 7 + 2**32, 7 + 2**62, 7 - 2**63], device=DEVICE)
    z = normal(seeds, (64,), step=0, stream=0)
    for i in range(4):
        for j in range(i):
            assert (z[i] != z[j]).all()


def test_no_two_draws_share_a_counter():
    lanes, steps, samples = 64, 50, 40
    blocks = set()
    for step in range(steps):
        lane = torch.arange(lanes)[None].expand(samples, -1)
        words = reference.philox4x32((lane, step, 1, 0), (torch.arange(samples)[:, None].expand(-1, lanes), 0))
        blocks.update(map(tuple, torch.stack([w.flatten() for w in words], dim=1).tolist()))
    assert len(blocks) == lanes * steps * samples
    # The careless key: seed + i + t. Nearly all blocks come again.
    careless = {(lane, sample + step) for lane in range(lanes) for step in range(steps) for sample in range(samples)}
    assert len(careless) < 0.05 * lanes * steps * samples


def test_the_stream_is_version_1():
    """A change of this hash is a breaking change: it needs a new STREAM_VERSION."""
    words = reference.philox4x32((torch.arange(1024), 3, const.STREAM_STEP, 0), (2026, 7))
    digest = hashlib.sha256(torch.stack(words).to(torch.uint32).numpy().astype("<u4").tobytes()).hexdigest()
    assert const.STREAM_VERSION == 1
    assert digest == "bb87d90eba761fe37a07e46512a4df12fc07fb3425245d25e61fe41929b7c097"


def all_kinds_of_words(count: int = 1 << 19) -> torch.Tensor:
    edges = [torch.arange(4096), 2**32 - 1 - torch.arange(4096)]
    powers = torch.cat([2**k + torch.arange(-4, 5) for k in range(3, 32)])
    return torch.cat([*edges, powers, torch.randint(0, 2**32, (count,), generator=torch.Generator().manual_seed(1))])


def test_a_normal_is_accurate_for_every_kind_of_word():
    w0 = all_kinds_of_words()
    w1 = w0[torch.randperm(len(w0), generator=torch.Generator().manual_seed(2))]
    exact = reference.box_muller(w0, w1, torch.float64)
    for twin in (reference.box_muller, triton_normals):
        for made, true in zip(twin(w0, w1), exact, strict=True):
            assert torch.isfinite(made).all()
            assert (made - true).abs().max() <= 2e-6


def test_tails_reach_6_76():
    extreme = reference.box_muller(torch.tensor([0]), torch.tensor([0]))[0].item()
    assert extreme == pytest.approx(math.sqrt(66 * math.log(2)), abs=1e-5)
    assert extreme > 6.76
    assert reference.box_muller(torch.tensor([2**32 - 1]), torch.tensor([5]))[0].item() == 0.0  # u = 1


@pytest.fixture(scope="module")
def draws() -> torch.Tensor:
    """3.1 million normals: 4 steps of 8 samples of 3 x 180 x 180."""
    seeds = torch.arange(8, device=DEVICE) * 1_000_003 + 17
    return torch.stack([normal(seeds, (3, 180, 180), step=s, stream=1) for s in range(4)]).double().cpu()


def test_moments(draws):
    z, n = draws.flatten(), draws.numel()
    assert n >= 3_100_000
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean().item() - mean) < 4 * math.sqrt(variance / n)


def test_kolmogorov_smirnov(draws):
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("bound", [3.0, 4.0, 4.5, 5.0])
def test_tail_counts(draws, bound):
    expected = draws.numel() * 2 * stats.norm.sf(bound)
    count = (draws.abs() > bound).sum().item()
    assert abs(count - expected) < 4 * math.sqrt(expected) + 1


def test_nothing_is_correlated(draws):
    """Over steps, samples, neighbouring elements, and the four normals of a lane; and their squares."""
    q = const.chunk(3 * 180 * 180)
    flat = draws.flatten(2)
    pairs = [
        (draws[:-1], draws[1:]),
        (draws[:, :-1], draws[:, 1:]),
        (flat[..., :-1], flat[..., 1:]),
        *((flat[..., i * q : i * q + q - 48], flat[..., j * q : j * q + q - 48]) for i in range(4) for j in range(i)),
    ]
    for a, b in pairs:
        for f in (lambda v: v, lambda v: v * v - 1):
            x, y = f(a).flatten(), f(b).flatten()
            n = min(len(x), len(y))
            r = (x[:n] * y[:n]).mean() / (x.std() * y.std())
            assert abs(r.item()) < 4.5 / math.sqrt(n)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(seeds=torch.zeros(2), shape=(4,)), "seeds is torch.float32"),
        (dict(seeds=torch.zeros(2, 2, dtype=torch.int64), shape=(4,)), "needed: torch.int64"),
        (dict(seeds=torch.zeros(2, dtype=torch.int64), shape=(4, 0)), "at least 1"),
        (dict(seeds=torch.zeros(2, dtype=torch.int64), shape=(4,), step=-1), "step is -1"),
        (dict(seeds=torch.zeros(2, dtype=torch.int64), shape=(4,), stream=4), "stream is 4"),
    ],
)
def test_bad_arguments(kwargs, words):
    with pytest.raises(ValueError, match=words):
        normal(**kwargs)
