"""The mutator itself; the mutation test is a command, `python tests/mutate_kernels.py`."""

import subprocess
import sys
from pathlib import Path

from mutations import mutants

HERE = Path(__file__).parent


def run(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, HERE / "mutate_kernels.py", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_mutants_are_faults_and_lie_where_they_say(tmp_path):
    source = 'M0, M1 = tl.constexpr(1), tl.constexpr(2)\n\n\ndef f(a, b):\n    """1 + 1."""\n    return a * M0 + b\n'
    (tmp_path / "module.py").write_text(source)
    made = {mutant.name: mutant for mutant in mutants(tmp_path / "module.py")}
    assert set(made) == {
        f"module.f: return a * M0 + b  =>  return {changed}"
        for changed in ("a + M0 + b", "a / M0 + b", "a * M1 + b", "a * M0 - b")
    }
    for mutant in made.values():
        assert mutant.line == 6
        compile(mutant.source, "module.py", "exec")


def test_the_list_does_not_rot(tmp_path):
    (tmp_path / "list.md").write_text("## Reason\n```\nlanes.program: a  =>  b\n```\n")
    made = run("--module", "lanes", "--only", "no such text", "--list", tmp_path / "list.md")
    assert made.returncode == 1
    assert made.stdout == "listed, but there is no such mutant any more:\nlanes.program: a  =>  b\n"


def test_the_list_in_the_docs_is_of_mutants_that_are_there():
    made = run("--only", "no such text")
    assert (made.returncode, made.stdout) == (0, "")


def test_a_sample_is_killed():
    """16 that are not listed; the whole run takes over an hour."""
    made = run("--sample", 16)
    assert made.returncode == 0, made.stdout
    assert "100.0% of those not listed" in made.stdout, made.stdout
