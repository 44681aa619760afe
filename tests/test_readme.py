"""The manual, README.md and those of the folders: its commands run in small, its tables are compared with
what prints them, its links and file names exist."""

import functools
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TIMEOUT, WAN_SMALL, call
from helpers import free_port
from safetensors.torch import save_file
from test_curate import Truth
from test_importers import RIG, nersemble_tree
from torch.distributed.run import parse_args as parse_torchrun

import train
from data import NoiseLevels
from model import DiTConfig, HarmoView
from networks.encoders import NEGATIVE_PROMPT
from networks.faces import Faces
from networks.lora import NEW_PREFIXES
from sample import BOUNDARY, SAMPLE_RECIPES, Checkpoint
from support.checkpoints import find_checkpoint
from support.script import Parser
from videos import toy
from videos.pictures import write_video

FOLDERS = ("networks", "videos", "measure", "support")
PAGES = {name: (ROOT / name).read_text() for name in
         ("README.md", *(f"{folder}/README.md" for folder in FOLDERS), "measure/CLAIMS.md")}
README, CLAIMS = PAGES["README.md"], PAGES["measure/CLAIMS.md"]


# --------------------------------------------------------------------------------------------- which commands
def blocks():
    """The code blocks of all pages."""
    parts = re.split(r"^```.*\n", "\n".join(PAGES.values()) + "\n", flags=re.M)
    assert len(parts) % 2, "a block without an end"
    return parts[1::2]


def commands():
    """The words of every command for one of our scripts, page by page: of sentences, then of blocks. `a|b` is
    two commands."""
    inline = re.findall(r"`(python \w+\.py [^`]+)`", "\n".join(PAGES.values()))
    found = [command.split() for command in inline if not command.endswith("--help")]
    for block in blocks():
        variables = {}
        for line in block.replace("\\\n", " ").splitlines() if not block.startswith("$ python") else ():
            line = line.replace("$(sed -n 3p out/look/captions.txt)", "two people")
            line = re.sub(r"\$(\w+)", lambda match: variables[match[1]], line)
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&;")
            lexer.whitespace_split = True
            for separates, words in itertools.groupby(lexer, lambda word: word in ("&&", ";")):
                words = [] if separates else list(words)
                variables |= dict(word.split("=", 1) for word in words[:1] if "=" in word)
                if any(word.endswith(".py") for word in words):
                    choices = [word.split("|") if re.fullmatch(r"\w+(\|\w+)+", word) else [word]
                               for word in words]
                    found += map(list, itertools.product(*choices))
    return found


def walk():
    """The commands from drawn videos to the real benchmark, which test_toyfaces runs."""
    return [words for words in commands()
            if {"films", "people", "others"} & {part for word in words for part in word.split("/")}]


def is_parsed_only(words):
    """Training all rows of the claims takes hours (one row is run), and public LoRAs are in test_lora.py."""
    return "FILE:0.8" in words or "claims" in words and "one-way" not in words[:4]


# ----------------------------------------------------------------------------------------------- they all run
NETWORK = dict(dim=256, ffn_dim=64, num_heads=2, num_layers=2, **WAN_SMALL)
WAN_SAMPLE = ["--steps", "1", "--size", "32x32", "--frames", "5"]
WAN_TRAIN = ["--steps", "1", "--batch", "4", "--micro-batch", "1", "--no-samples"]
SMALLER = {  # flags of sizes, behind what is printed: of Wan's networks, of own videos, of the toy
    "sample.py wan": WAN_SAMPLE, "eval.py real wan": WAN_SAMPLE, "train.py wan": WAN_TRAIN,
    "data.py curate": ["--frames", "17", "--face-side", "100", "--sharpness", "30"],
    "data.py encode": ["--size", "32x32", "32x64", "--frames", "17", "5"],
    "eval.py make-cases": ["--n", "2"],
    "eval.py claims": ["--seeds", "1", "--limit", "1", "--steps", "1", "--settings", "none", "--train",
                       "--steps 1 --clips 2 2 --batch 2"],
    "train.py": [*WAN_TRAIN, "--config", "tiny", "--clips", "2", "2"],
    "sample.py": ["--steps", "1"], "eval.py --ckpt": ["--limit", "1", "--steps", "1"],
    "data.py toy": ["--size", "32", "--frames", "3"]}


@pytest.fixture
def field(wan, tmp_path, monkeypatch):
    """A working folder with all that the commands name, small: checkpoints, videos, sets, pictures."""
    monkeypatch.chdir(tmp_path)
    tensors = HarmoView(DiTConfig(**NETWORK)).state_dict()
    for name, source in (("Wan2.1-T2V-1.3B", "2.1"), ("Wan2.2-T2V-A14B", "2.2")):
        shutil.copytree(wan / source, f"ckpts/{name}")
        for file in Path("ckpts", name).rglob("diffusion_pytorch_model.safetensors"):
            save_file({k: v for k, v in tensors.items() if not k.startswith(NEW_PREFIXES)}, file)
    for name in ("base", "toy"):
        shutil.copytree(ROOT / "assets" / name, f"assets/{name}")
    mead = Path("SET-mead/M003/video/front/happy/level_1")
    for folder in ("VIDEOS", "FACES", "THEIRS", "bench", mead, "SET-folders/refs/a"):
        Path(folder).mkdir(parents=True)
    Path("FACES/detection_Resnet50_Final.pth").touch()
    truth = Truth()
    for k, name in enumerate(("ann", "ben", "cho")):
        for take, motion in enumerate(("sweeps rightwards", "looks around")):
            wall = list(toy.BACKGROUNDS)[2 * k + take]
            write_video(f"VIDEOS/{name}{take}.mp4", truth.shoot([k], [motion], wall=wall))
    for case in (1, 2):
        write_video(f"THEIRS/case-00{case}.mp4", truth.shoot([1], ["looks around"]))
    toy.main(["--out", "look", "--size", "64", "--frames", "5"])
    for copy, of in {"ann_front.png": "ann_front.png", "ann_left.png": "ann_left.png",
                     mead / "001.mp4": "clip1.mp4", mead / "002.mp4": "clip2.mp4",
                     "SET-folders/a.mp4": "clip1.mp4", "SET-folders/refs/a/front.png": "ann_front.png",
                     "look/front.mp4": "clip1.mp4"}.items():
        shutil.copy(Path("look", of), copy)
    Path("SET-folders/a.txt").write_text("a woman turns")
    nersemble_tree(Path("look"), Path("SET-nersemble"), RIG)
    Path("prompts.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog"}\n')
    for name in ("videos.curate.Faces", "measure.real.BenchmarkFaces"):
        monkeypatch.setattr(name, type("Faces", (Faces,), {"__new__": lambda *_: truth}))
    for name in ("1.3b", "14b"):
        monkeypatch.setitem(train.CONFIGS, name, DiTConfig(**NETWORK))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    Path("small.py").write_text(f"""import functools, runpy, sys, torch
sys.path.insert(0, {str(ROOT)!r})
import model
for name in ("1.3b", "14b"):
    model.CONFIGS[name] = model.DiTConfig(**{NETWORK})
torch.compile = functools.partial(torch.compile, backend="eager")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
""")


def in_small(words):
    """The launcher's flags, the script, and its words with flags for a smaller one."""
    at = next(n for n, word in enumerate(words) if word.endswith(".py"))
    script, rest = words[at], words[at + 1:]
    name = script if script in ("train.py", "sample.py") else " ".join([script, *rest[:1]])
    is_wan = re.search(r"1\.3b|14b|ckpts/", " ".join(rest))
    if is_wan and f"{name} wan" in SMALLER:
        name += " wan"
    more = list(SMALLER.get(name, []))
    if "--export" in rest:
        more = []
    if script == "train.py" and "--resume" not in rest:
        more.append("--overwrite")  # one card and eight are trained into one folder
    if script == "train.py" and not is_wan and "--out" not in rest:
        more += ["--out", "out/toy"]
    rest = [f"SET-{rest[1]}" if word == "SET" else word for word in rest]
    return words[1:at], script, rest + more


def run_with_torchrun(flags, script, rest):
    """Two processes for any number; of several machines two, of one process each."""
    machines = "--nnodes" in flags
    numbers = {"--nproc-per-node": "1" if machines else "2", "--nnodes": "2",
               "--rdzv-endpoint": f"localhost:{free_port()}"}
    for flag in numbers.keys() & set(flags):
        flags[flags.index(flag) + 1] = numbers[flag]
    command = [sys.executable, "-m", "torch.distributed.run", *["--standalone"] * (not machines), *flags,
               "small.py", str(ROOT / script), *rest]
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if machines else os.environ
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  text=True) for _ in range(1 + machines)]
    for process in processes:
        said, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, said


def test_every_command_runs_in_small(field):
    """As printed, but for sizes, networks and numbers of processes: those of real weights, of own videos, of
    eight cards and of four machines. What needs a trained network comes after training."""
    todo = [words for words in commands() if not is_parsed_only(words) and words not in walk()]
    scripts = {"data.py", "eval.py", "kernels.py", "sample.py", "train.py"}
    assert scripts <= {word for words in todo for word in words}

    def order(words):
        later = bool({"out/1.3b", "out/14b", "compare"} & set(words))
        return "import" not in words, later, "compare" in words
    for words in sorted(todo, key=order):
        flags, script, rest = in_small(words)
        if "import" in words or "curate" in words:
            shutil.rmtree("DATA", ignore_errors=True)  # another set's
        if "--training" in rest:
            shutil.copytree("DATA/encoded", "TRAIN/encoded")
            index = Path("TRAIN/encoded/index.jsonl")
            index.write_text(index.read_text().replace("person_", "other_"))
        if words[0] == "torchrun":
            run_with_torchrun(flags, script, rest)
        else:
            assert words[0] == "python" and not flags, words
            call(script, *rest, cwd=".")
    for checkpoint in ("14b/low_noise_model", "14b/high_noise_model", "toy/stage4"):
        assert find_checkpoint(f"out/{checkpoint}")
    for file in ("both/compare.html", "sample.mp4", "sample.png", "mine.mp4", "swap.png"):
        assert Path("out", file).exists()


def test_what_takes_hours_is_parsed(tmp_path, monkeypatch):
    """And what is torchrun's own in any command."""
    def parse(parser, *given, parse_args=Parser.parse_args):
        parse_args(parser, *given)
        raise KeyboardInterrupt
    monkeypatch.setattr(Parser, "parse_args", parse)
    for words in commands():
        if words[0] == "torchrun":
            assert parse_torchrun(words[1:]).training_script.endswith(".py")
    hours = [words for words in commands() if is_parsed_only(words)]
    assert len(hours) >= 5
    for words in hours:
        with pytest.raises(KeyboardInterrupt):
            call(*words[1:], cwd=tmp_path)


# ---------------------------------------------------------------------------------------------------- numbers
def table(page, start):
    """The cells of a page's first table that begins like this: those of its head, and of its rows."""
    lines = page[page.index(f"\n{start}") + 1:].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in itertools.takewhile(lambda line: line.startswith("|"), lines)]
    return rows[0], rows[2:]


def test_the_toys_table_is_the_one_beside_its_weights():
    printed = (ROOT / "assets" / "toy" / "benchmark.txt").read_text().splitlines()[2:11]
    (block,) = (block for block in blocks() if block.startswith("people, views given"))
    head, *rows = block.splitlines()
    assert head == printed[0] and len(rows) == 4 and set(rows) < set(printed)


def test_the_noise_law_is_that_of_training():
    shares = [(shift, round(100 * (1 - NoiseLevels(shift).below(0.95)))) for shift in (100, 5)]
    assert [int(part) for part in re.findall(r"k = (\d+)[^%]*?: (\d+) %", README)[0]] == [*shares[0]]
    assert f"k = {shares[1][0]}, Wan's: {shares[1][1]} %" in README
    assert train.TRAIN_RECIPES["toy"]["shift"] == 100 and train.TRAIN_RECIPES["1.3b"]["shift"] == 5


def test_the_stages_are_those_of_train():
    _, rows = table(README, "| stage |")
    steps = train.TRAIN_RECIPES["toy"]["steps"]
    assert [row[:2] for row in rows] == [
        [f"{number} {stage.name}", str(steps[number - 1])] for number, stage in train.STAGES.items()]


def test_wans_defaults_are_those_of_the_code():
    one, two = SAMPLE_RECIPES["wan2.1"], SAMPLE_RECIPES["wan2.2"]
    found = Checkpoint("", [], None, "", {})
    (height, width), (high, low) = found.size, two["guide_text"]
    assert (f"UniPC, {one['steps']} steps, shift {one['shift']:g}, guidance {one['guide_text'][0]:g} (A14B: "
            f"{two['steps']} steps, shift {two['shift']:g}, guidance {high:g} above the boundary {BOUNDARY} "
            f"and {low:g} below it), {height}x{width}, {found.frames} frames, its negative prompt"
            ) in " ".join(PAGES["networks/README.md"].split())
    assert one["solver"] == two["solver"] == "unipc" and one["negative"] == two["negative"] == NEGATIVE_PROMPT


def test_what_a_command_prints_is_what_stands_below_it(tmp_path):
    shown = [block for block in blocks() if block.startswith("$ python")]
    assert len(shown) == 2
    for line in "".join(shown).splitlines():
        if line.startswith("$ "):
            printed = call(*line.split()[2:], cwd=tmp_path).splitlines()
        else:
            assert line in printed, line


def test_the_claims_are_those_of_claims_md():
    _, rows = table(CLAIMS, "| claim | rows compared |")
    measured = [[claim, verdict, metric, in_favour.split()[0]]
                for claim, _, verdict, metric, in_favour, _ in rows]
    _, rows = table(README, "| claim | verdict |")
    assert len(rows) >= 12 and [row for row in rows if row not in measured] == []


# ------------------------------------------------------------------------------------------------------ names
@pytest.mark.parametrize("page", PAGES)
def test_files_are_named_and_what_is_named_exists(page):
    folder = (ROOT / page).parent
    if page.endswith("README.md"):
        assert {path.name for path in folder.glob("[!_]*.py")} <= set(re.findall(r"\b\w+\.py\b", PAGES[page]))
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", PAGES[page])
    assert [link for link in links if not (folder / link).exists()] == []


def test_what_is_to_be_changed_is_where_it_is_said_to_be():
    _, rows = table(README, "| what | where |")
    for what, where in rows:
        text = "".join((ROOT / name).read_text() for name in re.findall(r"[\w/]+\.py", where))
        assert [name for name in re.findall(r"`[\w.]*?(\w+)`", where) if name not in text] == [], what


def test_it_is_short():
    first = "\n".join(README.splitlines()[:40])
    assert "pip install -r requirements.txt && python sample.py" in first
    assert "torchrun --nproc-per-node 2 train.py --stage all && python sample.py" in first
    assert "pip install -r requirements.txt -r tests/requirements.txt && pytest" in README
    assert len(README.split()) <= 2000
    assert all(200 <= len(PAGES[f"{folder}/README.md"].split()) <= 500 for folder in FOLDERS)
