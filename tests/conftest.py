"""What the tests share: the repository's root on the path, and one run of all stages on the tiny preset."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def run(*command, cwd, fails=False):
    """Run a script of the repository in `cwd`; where it must fail, return its one line of error."""
    command = [sys.executable, *(str(c) for c in command)]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if not fails:
        assert done.returncode == 0, done.stderr
        return done.stdout
    assert done.returncode not in (0, None) and "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with cache/ and out/tiny/ as `python train.py --config tiny` leaves them, all four stages."""
    folder = tmp_path_factory.mktemp("tiny")
    run(ROOT / "train.py", "--config", "tiny", "--no-samples", cwd=folder)
    return folder
