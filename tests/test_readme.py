"""README.md's commands, run in its order on the tiny preset, and its picture and file names looked up."""

import re
import shlex
import shutil

from conftest import ROOT, call, run

from checkpoint import find_checkpoint

README = (ROOT / "README.md").read_text()
TINY = {
    # a stage's sample sheet is a process of its own, tested in test_train.py
    "train.py": ["--config", "tiny", "--out", "out/toy", "--no-samples"],
    "eval.py": ["--limit", "2", "--steps", "1"],
    "sample.py": ["--steps", "1"],
    "toy.py": ["--size", "32", "--frames", "3"],
}


def commands():
    """Every command in the README's bash blocks that starts one of our scripts, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        part.strip()
        for line in lines
        for part in line.split("  #")[0].split("&&")
        if re.search(r"\b\w+\.py\b", part)
    ]


def test_the_two_commands_stand_in_the_first_screen():
    first = "\n".join(README.splitlines()[:40])
    assert "pip install -r requirements.txt && python sample.py" in first
    assert "torchrun --nproc-per-node 2 train.py --stage all && python sample.py" in first
    assert "pip install -r requirements.txt -r tests/requirements.txt && pytest" in README


def test_every_command_runs_on_the_tiny_preset(tiny, tmp_path):
    shutil.copytree(tiny / "cache", tmp_path / "cache")
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    found = commands()
    scripts = {"train.py", "sample.py", "eval.py", "toy.py", "bench.py", "kernels.py"}
    assert scripts <= {word for c in found for word in c.split()}
    for command in found:
        words = shlex.split(command.replace("$(sed -n 3p out/look/captions.txt)", "two people"))
        launcher, script = words[0], next(w for w in words if w.endswith(".py"))
        rest = words[words.index(script) + 1 :] + TINY.get(script, [])
        if script == "train.py" and (tmp_path / "out" / "toy").exists():
            rest.append("--overwrite")
        before = words[1 : words.index(script)]
        assert launcher in ("python", "torchrun"), command
        if launcher == "torchrun":
            run("-m", "torch.distributed.run", *before, ROOT / script, *rest, cwd=tmp_path)
        else:
            assert not before, command
            call(script, *rest, cwd=tmp_path)
    assert find_checkpoint(tmp_path / "out" / "toy" / "stage4")
    assert (tmp_path / "out" / "sample.png").exists() and list((tmp_path / "out").glob("*.mp4"))


def test_the_first_table_is_the_one_beside_the_toy_that_comes_with_the_code():
    table = (ROOT / "assets" / "toy" / "benchmark.txt").read_text().splitlines()[2:11]
    assert "\n".join(table) in README


def test_every_file_is_named_and_every_named_file_exists():
    ours = {p.name for p in ROOT.glob("*.py")}
    assert ours <= set(re.findall(r"\b\w+\.py\b", README))
    assert all((ROOT / link).exists() for link in re.findall(r"\]\(((?!http)[^)#]+)\)", README))


def test_it_is_short_and_narrow():
    prose = re.sub(r"^\|.*$", "", re.sub(r"```.*?```", "", README, flags=re.S), flags=re.M)
    assert len(prose.split()) < 1400
    assert max(len(line) for line in prose.splitlines() if "](" not in line) <= 110
