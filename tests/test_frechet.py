"""The Frechet distance of the benchmark against its definition, and the extractor's shape; no download."""

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from benchmarks import fetch_data, frechet


def definition(a: np.ndarray, b: np.ndarray) -> float:
    """Equation 6 of Heusel et al. with SciPy's matrix square root."""
    s1, s2 = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(s1 @ s2)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s1 + s2 - 2 * root.real))


@pytest.mark.parametrize("n, m, d", [(200, 300, 8), (100, 90, 2), (64, 64, 32)])
def test_distance_is_the_definition(n: int, m: int, d: int) -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
    b = rng.normal(0.3, 1, size=(m, d)) @ rng.normal(size=(d, d))
    assert frechet.frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(definition(a, b), rel=1e-9)


def test_distance_of_shifted_sets_and_of_singular_ones() -> None:
    a = torch.randn(30, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # rank 29 of 64
    assert frechet.frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert frechet.frechet_distance(a, a + 0.5) == pytest.approx(64 * 0.25, abs=1e-5)


def test_extractor_has_the_published_shape() -> None:
    model = frechet.MobileNetV2().eval()
    # 3,504,872 parameters in all (torchvision), of which the classifier has 1280 x 1000 + 1000
    assert sum(p.numel() for p in model.parameters()) == 3_504_872 - 1_281_000
    names = model.state_dict().keys()
    assert {"features.0.0.weight", "features.1.conv.1.weight", "features.17.conv.3.bias"} <= names
    assert frechet.extract(model, torch.zeros(3, 1, 32, 32, dtype=torch.uint8), batch=2).shape == (3, 1280)


def test_fetch_checks_content_and_keeps_nothing_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {"a-ubyte": b"first", "b-ubyte": b"second"}
    monkeypatch.setattr(fetch_data, "FASHION_MNIST", {k: hashlib.sha256(v).hexdigest() for k, v in contents.items()})
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "a-ubyte").write_bytes(b"first")
    with pytest.raises(fetch_data.FetchError, match="lacks b-ubyte"):
        fetch_data.fetch(target, source)
    (source / "b-ubyte.gz").write_bytes(gzip.compress(b"changed"))
    with pytest.raises(fetch_data.FetchError, match="damaged"):
        fetch_data.fetch(target, source)
    assert not target.exists()
    (source / "b-ubyte.gz").write_bytes(gzip.compress(b"second"))
    fetch_data.fetch(target, source)
    assert sorted(p.name for p in target.iterdir()) == ["a-ubyte", "b-ubyte.gz"]
    assert fetch_data.fetch(target, tmp_path / "absent") == target  # there already
