"""Check what a built wheel of fastddpm holds: ``python .ci/check_wheel.py WHEEL``, from the repository's root.

All files of both packages (weights and ``py.typed`` too) and nothing else: no tests, no benchmarks, no `kernels`.
"""

import sys
import zipfile
from pathlib import Path

ROOTS = {"fastddpm": Path("fastddpm"), "fastddpm_kernels": Path("kernels/fastddpm_kernels")}
MAX_WEIGHTS_BYTES = 10_000_000


def expected_files() -> set[str]:
    """The names, in a wheel, of all files of the two packages."""
    return {
        f"{package}/{path.relative_to(root).as_posix()}"
        for package, root in ROOTS.items()
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def faults(wheel: Path) -> list[str]:
    """One line for each thing that is wrong with the wheel."""
    sizes = {info.filename: info.file_size for info in zipfile.ZipFile(wheel).infolist()}
    names = {name for name in sizes if ".dist-info/" not in name}
    expected = expected_files() | {"fastddpm/py.typed", "fastddpm_kernels/py.typed"}
    found = [f"missing: {name}" for name in sorted(expected - names)]
    found += [f"should not be in it: {name}" for name in sorted(names - expected)]
    if not any(".dist-info/" in name and name.endswith("/LICENSE") for name in sizes):
        found.append("missing: LICENSE")
    weights = sum(size for name, size in sizes.items() if name.startswith("fastddpm/weights/"))
    if not 0 < weights <= MAX_WEIGHTS_BYTES:
        found.append(f"the weights have {weights} bytes; allowed: 1 to {MAX_WEIGHTS_BYTES}")
    return found


if __name__ == "__main__":
    wrong = faults(Path(sys.argv[1]))
    print("\n".join(wrong) or f"{sys.argv[1]}: contents as they should be")
    sys.exit(1 if wrong else 0)
