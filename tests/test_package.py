"""The package as an installed thing: what an import pulls in, who imports whom, and what the folders must not be."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels" / "fastddpm_kernels"
PEERS = (
    *("diffusers", "scipy", "matplotlib", "hypothesis", "k_diffusion", "guided_diffusion"),
    *("denoising_diffusion_pytorch", "lerobot", "onnxruntime", "torchsde"),
)


def run_python(code: str, *, before: tuple[Path, ...] = (), after: tuple[Path, ...] = ()) -> str:
    """Run code in a new interpreter, from another directory, with the two source roots on its path."""
    path = os.pathsep.join(map(str, (*before, ROOT, ROOT / "kernels", *after)))
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_by(code: str) -> set[str]:
    """The modules that are loaded after `code` has run."""
    return set(run_python(f"{code}\nimport sys\nprint(*sys.modules)").split())


def imports_of(source: str) -> set[str]:
    """The absolute module names that a file imports, at any depth of the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", ["fastddpm", "fastddpm_kernels"])
def test_importing_the_package_is_light(package: str) -> None:
    loaded = imported_by(f"import {package}")
    assert loaded.isdisjoint({"torch", "triton", "PIL", "tqdm", "click", *PEERS})


@pytest.mark.parametrize("module", ["fastddpm.schedule", "fastddpm.solvers", "fastddpm_kernels.columns"])
def test_schedules_and_solvers_are_numpy_alone(module: str) -> None:
    assert imported_by(f"import {module}").isdisjoint({"torch", "triton", *PEERS})


def test_the_sampler_and_the_network_need_no_triton_no_cuda_and_no_peer() -> None:
    code = (
        "import fastddpm\n"
        "fastddpm.UNet, fastddpm.Sampler, fastddpm.sample\n"
        "import torch\n"
        "if torch.cuda.is_initialized(): raise SystemExit('CUDA was initialised by an import')"
    )
    assert imported_by(code).isdisjoint({"triton", *PEERS})


def test_every_public_name_is_there() -> None:
    run_python(
        "import fastddpm, fastddpm_kernels\n"
        "for p in (fastddpm, fastddpm_kernels):\n"
        "    missing = [name for name in p.__all__ if not hasattr(p, name) or name not in dir(p)]\n"
        "    if missing or not p.__all__: raise SystemExit(f'{p.__name__}: missing: {missing}')"
    )


def test_an_unknown_name_is_an_attribute_error() -> None:
    run_python(
        "import fastddpm, fastddpm_kernels\n"
        "for p in (fastddpm, fastddpm_kernels):\n"
        "    if hasattr(p, 'no_such_name'): raise SystemExit('hasattr lies')"
    )


def test_the_kernels_never_import_the_sampler() -> None:
    files = sorted(KERNELS.rglob("*.py"))
    assert files
    for file in files:
        extra = imports_of(file.read_text()) - {"torch", "triton", "numpy"} - set(sys.stdlib_module_names)
        assert not extra, f"{file.name} imports {extra}"


def test_only_integrations_import_peers() -> None:
    for file in sorted((ROOT / "fastddpm").rglob("*.py")):
        if "integrations" not in file.parts:
            found = imports_of(file.read_text()) & (set(PEERS) - {"matplotlib"})
            assert not found, f"{file.relative_to(ROOT)} imports {found}"


def test_the_kernels_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_folder_with_code_is_a_package() -> None:
    """`namespaces = false` leaves out of the wheel what has no __init__.py."""
    for root in (ROOT / "fastddpm", KERNELS):
        for file in root.rglob("*.py"):
            assert (file.parent / "__init__.py").is_file(), f"{file.parent} has no __init__.py"
        assert (root / "py.typed").is_file()


@pytest.mark.parametrize("first", [True, False])
def test_an_installed_kernels_package_is_not_shadowed(tmp_path: Path, first: bool) -> None:
    """Hugging Face's `kernels` wins over this repository's folder of that name, wherever it stands on the path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("name = 'theirs'\n")
    where = {"before": (tmp_path,)} if first else {"after": (tmp_path,)}
    assert run_python("import kernels; print(kernels.name)", **where) == "theirs\n"
    code = "import fastddpm, fastddpm_kernels, kernels; print(kernels.name)"
    assert run_python(code, **where) == "theirs\n"


def test_the_constraints_pin_every_dependency_that_is_declared() -> None:
    def name_of(line: str) -> str:
        for mark in "<>=;[ ":
            line = line.split(mark)[0]
        return line.strip().lower().replace("_", "-")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all("==" in pin for pin in pins)
    pinned = {name_of(pin) for pin in pins}
    assert len(pinned) == len(pins)
    required = {name_of(line) for line in project["dependencies"]}
    assert required == {"torch", "triton", "numpy", "safetensors", "pillow", "tqdm", "click"}
    optional = {name_of(line) for extra in project["optional-dependencies"].values() for line in extra}
    assert required | optional <= pinned


def test_the_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run_python("import fastddpm; print(fastddpm.__version__)") == f"{version}\n"
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_has_the_two_commands_that_ci_runs() -> None:
    readme = (ROOT / "README.md").read_text()
    run, test = (
        "pip install -c constraints.txt . && fastddpm sample",
        "pip install -c constraints.txt '.[test]' && pytest -n auto",
    )
    assert f"<!-- ci: run -->\n```bash\n{run}\n```" in readme
    assert f"<!-- ci: test -->\n```bash\n{test}\n```" in readme


def test_every_check_survives_python_optimised() -> None:
    """A check that is an `assert` is gone under ``python -O``; the library has none."""
    for root in (ROOT / "fastddpm", KERNELS):
        for file in root.rglob("*.py"):
            found = [node.lineno for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Assert)]
            assert not found, f"{file.relative_to(ROOT)}: assert in lines {found}"
