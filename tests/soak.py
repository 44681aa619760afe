"""Kill training again and again, and see that it ends in the same bits as undisturbed. Not a part of pytest.

  python tests/soak.py --kills 10 --precision bf16 --out /tmp/soak
"""

import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

from support.checkpoints import find_checkpoint  # noqa: E402
from support.script import Parser, count, probe_writable, run_script, seed_number  # noqa: E402

KILLED_WITHIN = 4  # seconds after the first new line in metrics.jsonl, drawn evenly


def progress(out):
    """Bytes of all metrics."""
    return sum(path.stat().st_size for path in out.glob("stage*/metrics.jsonl"))


def weights(out):
    """All tensors of all stages' last checkpoints."""
    tensors = {}
    for number in range(1, 5):
        folder = find_checkpoint(out / f"stage{number}")
        for file in sorted(folder.glob("*.safetensors")):
            for name, value in safetensors.torch.load_file(file).items():
                tensors[f"{number} {file.name} {name}"] = value
    return tensors


def main(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("--kills", type=count, default=10, help="times that all processes get SIGKILL")
    p.add_argument("--processes", type=count, default=2)
    p.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    p.add_argument("--steps", type=count, default=60, help="of each stage; more kills need more")
    p.add_argument("--seed", type=seed_number, default=0, help="of the moments of the kills")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(argv)
    probe_writable(args.out)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               str(args.processes), str(ROOT / "train.py"), "--steps", str(args.steps), "--save-every", "7",
               "--clips", "64", "64", "--no-samples", "--log-every", "1", "--precision", args.precision,
               "--data", str(args.out / "cache")]
    log = open(args.out / "log.txt", "w")
    start = time.perf_counter()
    subprocess.run([*command, "--out", str(args.out / "straight")], check=True, stdout=log, stderr=log)
    print(f"undisturbed: {time.perf_counter() - start:.0f} s", flush=True)
    rng, kills = random.Random(args.seed), 0
    while True:
        flags = ["--out", str(args.out / "killed"), "--resume"]
        process = subprocess.Popen([*command, *flags], stdout=log, stderr=log)
        before = progress(args.out / "killed")
        while process.poll() is None and (kills == args.kills or progress(args.out / "killed") <= before):
            time.sleep(0.05)
        try:
            process.wait(rng.uniform(0, KILLED_WITHIN))
        except subprocess.TimeoutExpired:
            # torchrun gives each process a session of its own, so their common argument finds them
            subprocess.run(["pkill", "-KILL", "-f", str(args.out / "killed")], check=True)
            process.wait()
            kills += 1
            newest = find_checkpoint(args.out / "killed")
            print(f"kill {kills}: newest checkpoint {newest and newest.relative_to(args.out)}", flush=True)
            continue
        assert process.returncode == 0, f"training failed, see {args.out}/log.txt"
        break
    straight, killed = weights(args.out / "straight"), weights(args.out / "killed")
    assert straight.keys() == killed.keys()
    different = [name for name in straight if not torch.equal(straight[name], killed[name])]
    print(f"{kills} kills, {time.perf_counter() - start:.0f} s, {args.precision}, "
          f"{len(straight)} tensors, {len(different)} of them different")
    assert not different, different[:3]


if __name__ == "__main__":
    run_script(main)
