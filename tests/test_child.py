"""Child processes end with their parent, and how they fail is told in words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from assay.child import run_module
from assay.errors import AssayError


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module that does what the code given to it says."""
    (tmp_path / "obedient.py").write_text("import sys\nexec(sys.argv[1])\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "obedient"


def test_a_module_reads_its_input_and_returns_its_output(module: str) -> None:
    code = "import os; print(__name__, sys.argv[2:], sys.stdin.read(), os.environ['HF_HUB_OFFLINE'])"
    assert run_module("it", module, code, "-x", "y", seconds=60, given="text") == "__main__ ['-x', 'y'] text 1\n"


def test_what_lies_in_the_working_directory_is_not_imported(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/json.py").write_text("raise ImportError('a stranger')")
    monkeypatch.chdir(tmp_path / "here")
    assert run_module("it", module, "import json; print(json.loads('1'))", seconds=60) == "1\n"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            "print('first'); sys.stderr.write('it burns'); sys.exit(3)",
            r"^the builder failed \(exit code 3\):\nfirst\nit burns$",
        ),
        ("raise ValueError('no good')", r"(?s)exit code 1\).*ValueError: no good"),
        ("import os; os.kill(os.getpid(), 9)", r"^the builder was killed by SIGKILL\. .* memory runs out"),
        ("import os; os.kill(os.getpid(), 11)", r"^the builder was killed by SIGSEGV\.$"),
        ("import time; time.sleep(60)", r"^the builder did not finish within 2 s\.$"),
    ],
)
def test_how_it_failed_is_told(module: str, code: str, words: str) -> None:
    with pytest.raises(AssayError, match=words):
        run_module("the builder", module, code, seconds=2)


def test_a_child_is_killed_with_its_parent(module: str, tmp_path: Path) -> None:
    """Though nobody could stop it: its parent was killed outright."""
    note = tmp_path / "child"
    code = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"from assay.child import run_module; run_module('it', {module!r}, {code!r}, seconds=60)"
    with subprocess.Popen([sys.executable, "-c", parent]) as process:
        while not (note.exists() and note.read_text()):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    child = int(note.read_text())
    for _ in range(250):
        if not _is_alive(child):
            return
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child outlived its parent")


def _is_alive(process: int) -> bool:
    """Running, and not only waiting for somebody to ask how it ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_finds_no_repository(module: str, tmp_path: Path) -> None:
    """Or artifacts would be other bytes after every commit to the repository around the virtual environment."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    ask = ["git", "rev-parse", "--git-dir"]
    assert subprocess.run(ask, cwd=tmp_path, check=False, capture_output=True).returncode == 0
    code = f"import subprocess; print(subprocess.run({ask}, cwd={str(tmp_path)!r}, capture_output=True).returncode)"
    assert run_module("it", module, code, seconds=60) != "0\n"
