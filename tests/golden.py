"""Four runs whose results must stay the same bytes while the house is rebuilt: a tiny training of all stages,
a sample and a benchmark of the shipped toy, and the tables of the claims. Prints a hash of each result.

  python tests/golden.py > before.txt       two minutes on two cores; later: diff before.txt after.txt
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import av

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"HARMOVIEW_PRECISION": "fp32", "OMP_NUM_THREADS": "1"}
# keys of a line that two equal runs differ in
TIMES = {"seconds", "tokens_per_s", "tflops_per_process", "memory_gib", "waiting", "run", "checksum"}


def run(folder, *command):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, env=ENVIRONMENT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def say(name, data):
    print(f"{hashlib.sha256(data).hexdigest()[:16]}  {name}", flush=True)


def pixels(path):
    with av.open(str(path)) as video:
        return b"".join(frame.to_ndarray(format="rgb24").tobytes() for frame in video.decode(video=0))


def lines_without_times(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
    return json.dumps(lines, sort_keys=True).encode()


def door(old, *new):
    return [ROOT / old] if (ROOT / old).exists() else [ROOT / new[0], *new[1:]]


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        run(folder, ROOT / "train.py", "--stage", "all", "--config", "tiny", "--scratch", "--clips", 8, 4,
            "--steps", 3, "--batch", 4, "--save-every", 2, "--log-every", 1, "--no-samples", "--out", "run")
        for path in sorted((folder / "run").rglob("*.safetensors")):
            say(path.relative_to(folder), path.read_bytes())
        for path in sorted((folder / "run").rglob("metrics.jsonl")):
            say(path.relative_to(folder), lines_without_times(path))
        run(folder, ROOT / "sample.py", "--ckpt", ROOT / "assets/toy", "--out", "sample")
        for path in sorted(folder.glob("sample*.mp4")):
            say(path.name, pixels(path))
        said = run(folder, ROOT / "eval.py", "--ckpt", ROOT / "assets/toy", "--limit", 4, "--out", "measured")
        lines = [line for line in said.splitlines() if not re.search(r" in \d+ s$|^checkpoint ", line)]
        say("eval.py, what it prints", "\n".join(lines).encode())
        say("eval.py, measured.jsonl", lines_without_times(folder / "measured/measured.jsonl"))
        claims = door("claims.py", "eval.py", "claims")
        tables = run(ROOT, *claims, "--seeds", 0, "--base", "assets/base", "--out", "assets/claims")
        say("claims", tables.encode())


if __name__ == "__main__":
    main()
