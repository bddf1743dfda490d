"""Fetch the data that training and the benchmarks use, into the user's cache (``~/.cache/fastddpm``).

    python benchmarks/fetch_data.py fashion-mnist

Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747; MIT licence) comes from Debian's package ``dataset-fashion-mnist``,
with apt-get and dpkg, neither of which needs root for this. Where there is no Debian, put the four idx files, gzipped
or not, into any folder and give it with ``--from``. Either way each file's content is checked by SHA-256.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastddpm"
PACKAGE = "dataset-fashion-mnist"
INSTALLED = "usr/share/datasets/fashion-mnist"
# SHA-256 of the idx files themselves, not of their compressed form
FASHION_MNIST = {
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
}


class FetchError(Exception):
    """The data can't be had, or is damaged."""


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, decompressed where its name ends in .gz."""
    digest = hashlib.sha256()
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except (OSError, EOFError) as error:
        raise FetchError(f"{path} can't be read: {error}") from error
    return digest.hexdigest()


def check(folder: Path) -> list[Path]:
    """The four files of Fashion-MNIST in `folder`, as idx or idx.gz; `FetchError` if one is missing or damaged."""
    found = []
    for name, expected in FASHION_MNIST.items():
        path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
        if path is None:
            raise FetchError(f"{folder} lacks {name} (or {name}.gz)")
        if sha256(path) != expected:
            raise FetchError(f"{path} is damaged, or of another data set: its SHA-256 is not {expected[:12]}...")
        found.append(path)
    return found


def download(folder: Path) -> Path:
    """Get Debian's package and unpack it in `folder`; returns where the idx files lie."""
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise FetchError(f"no {tool} here: get the four idx.gz files yourself and give their folder with --from")
    for command in (["apt-get", "download", "-qq", PACKAGE], ["dpkg", "-x", "*.deb", "."]):
        words = [w for word in command for w in (map(str, folder.glob(word)) if "*" in word else [word])]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise FetchError(f"'{' '.join(command)}' failed: {reason} (an 'apt-get update' may be needed)")
    return folder / INSTALLED


def fetch(target: Path, source: Path | None = None) -> Path:
    """Put Fashion-MNIST into `target`, from `source` or Debian; does nothing where it is there already."""
    try:
        check(target)
        return target
    except FetchError:
        pass
    with tempfile.TemporaryDirectory() as temporary:
        files = check(source if source is not None else download(Path(temporary)))
        target.mkdir(parents=True, exist_ok=True)
        for path in files:
            partial = target / f".{path.name}.part"
            shutil.copyfile(path, partial)
            partial.replace(target / path.name)
    check(target)
    return target


def main() -> int:
    """Run, say where the data is, return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=["fashion-mnist"])
    parser.add_argument("--from", dest="source", type=Path, help="folder with the four idx or idx.gz files")
    parser.add_argument("--to", type=Path, default=CACHE / "fashion-mnist", help="where to (the user's cache)")
    arguments = parser.parse_args()
    try:
        print(f"Fashion-MNIST is in {fetch(arguments.to, arguments.source)}")
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
