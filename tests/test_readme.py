"""README.md's commands, run in its order on the tiny preset or at least parsed; its tables beside what is
printed; its picture and file names looked up."""

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
from conftest import ROOT, TIMEOUT, WAN_SMALL, call, run
from helpers import free_port
from safetensors.torch import save_file
from test_curate import Truth
from test_importers import RIG, nersemble_tree
from torch.distributed.run import parse_args as parse_torchrun

import train
from measure import speed
from model import DiTConfig, HarmoView
from networks.encoders import NEGATIVE_PROMPT
from networks.faces import Faces
from networks.lora import NEW_PREFIXES
from sample import BOUNDARY, SAMPLE_RECIPES, Found
from support.checkpoints import find_checkpoint
from support.script import Parser, UserError
from videos import curate, toy
from videos.pictures import write_video

README = (ROOT / "README.md").read_text()
CLAIMS = (ROOT / "measure/CLAIMS.md").read_text()
TINY = {
    # a stage's sample sheet is a process of its own, tested in test_train.py
    "train.py": ["--config", "tiny", "--out", "out/toy", "--no-samples"],
    "eval.py": ["--limit", "2", "--steps", "1"],
    "sample.py": ["--steps", "1"],
    "data.py toy": ["--size", "32", "--frames", "3"], "eval.py speed": [],
}


def blocks(page, tag):
    """The code blocks of a page that bear this tag, "" for none. A fence that closes one looks like a fence
    that opens one without a tag, so this goes line by line."""
    found, block = [], None
    for line in page.splitlines():
        if not line.startswith("```"):
            block is None or block[1].append(line)
        elif block is None:
            block = line[3:], []
        else:
            assert line == "```", f"{line} in a block"
            found += ["\n".join(block[1])] * (block[0] == tag)
            block = None
    assert block is None, "a block without an end"
    return found


def commands():
    """Every command in the README's bash blocks that starts one of our scripts, in order."""
    lines = "\n".join(blocks(README, "bash")).replace("\\\n", " ").splitlines()
    return [
        part.strip()
        for line in lines
        for part in line.split("  #")[0].split("&&")
        if re.search(r"\b\w+\.py\b", part)
    ]


def untagged_commands():
    """The words of every command for one of our scripts in a block without a tag, or in a sentence."""
    inline = re.findall(r"`(python \w+\.py [^`]+)`", "\n".join([README, CLAIMS]))
    found = [command.split() for command in inline if not command.endswith("--help")]
    for block in [*blocks(README, ""), *blocks(CLAIMS, "")]:
        variables = {}
        for line in block.replace("\\\n", " ").splitlines() if ".py" in block else ():
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
    return [words for words in untagged_commands()
            if {"films", "people", "others"} & {part for word in words for part in word.split("/")}]


def test_every_other_command_is_one_that_its_script_takes(tmp_path, monkeypatch):
    """These need weights, data, cards or hours, so they are parsed only, also what is torchrun's own."""
    class Parsed(Exception):
        pass

    def parse(parser, *given, parse_args=Parser.parse_args):
        parse_args(parser, *given)
        raise Parsed
    monkeypatch.setattr(Parser, "parse_args", parse)
    scripts, wrong = set(), {}
    for words in untagged_commands():
        assert words[0] in ("python", "torchrun"), words
        script, *rest = words[1:]
        if words[0] == "torchrun":
            given = parse_torchrun(words[1:])
            script, rest = given.training_script, given.training_script_args
        scripts.add(script)
        try:
            call(script, *rest, cwd=tmp_path)
            wrong[" ".join(words)] = "it was not parsed"
        except UserError as error:
            wrong[" ".join(words)] = str(error)
        except Parsed:
            pass
    assert not wrong
    assert {"data.py", "eval.py", "sample.py", "train.py"} <= scripts


NETWORK = dict(dim=256, ffn_dim=64, num_heads=2, num_layers=2, **WAN_SMALL)
SMALLER = {  # flags of sizes, behind what is printed
    "train.py": ["--steps", "1", "--batch", "4", "--micro-batch", "1", "--no-samples"],
    "sample.py": ["--steps", "1", "--size", "32x32", "--frames", "5"],
    "curate": ["--frames", "17", "--face-side", "100", "--sharpness", "30"],
    "encode": ["--size", "32x32", "32x64", "--frames", "17", "5"],
    "make-cases": ["--n", "2"],
    "real": [], "compare": [], "speed": [],
    "claims": ["--seeds", "1", "--limit", "1", "--steps", "1", "--settings", "none", "--train",
    "--steps 1 --clips 2 2 --batch 2"], "eval.py": ["--limit", "2", "--steps", "1"]}


@pytest.fixture
def field(wan, tmp_path, monkeypatch):
    """A working folder with all that README's commands name, small: checkpoints, videos, sets, pictures."""
    monkeypatch.chdir(tmp_path)
    truth = Truth()
    for name, source in (("Wan2.1-T2V-1.3B", "2.1"), ("Wan2.2-T2V-A14B", "2.2")):
        shutil.copytree(wan / source, f"ckpts/{name}")
        for file in Path("ckpts", name).rglob("diffusion_pytorch_model.safetensors"):
            tensors = HarmoView(DiTConfig(**NETWORK)).state_dict()
            save_file({k: v for k, v in tensors.items() if not k.startswith(NEW_PREFIXES)}, file)
    for folder in ("VIDEOS", "FACES", "THEIRS", "bench", "assets"):
        Path(folder).mkdir()
    Path("FACES/detection_Resnet50_Final.pth").touch()
    for k, name in enumerate(("ann", "ben", "cho")):
        for take, motion in enumerate(("sweeps rightwards", "looks around")):
            wall = list(toy.BACKGROUNDS)[2 * k + take]
            write_video(f"VIDEOS/{name}{take}.mp4", truth.shoot([k], [motion], wall=wall))
    write_video("THEIRS/case-001.mp4", truth.shoot([1], ["looks around"]))
    shutil.copy("THEIRS/case-001.mp4", "THEIRS/case-002.mp4")
    toy.main(["--out", "look", "--size", "64", "--frames", "5"])
    for view in ("front", "left"):
        shutil.copy(f"look/ann_{view}.png", f"ann_{view}.png")
    Path("prompts.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog"}\n')
    shutil.copytree(ROOT / "assets/base", "assets/base")
    sets = {"mead": [f"M003/video/front/happy/level_1/00{n}.mp4" for n in (1, 2)],
            "folders": ["a.mp4"]}
    for kind, videos in sets.items():
        for video in videos:
            Path(f"SET-{kind}", video).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy("look/clip1.mp4" if video == "a.mp4" else f"look/clip{video[-5]}.mp4",
                        Path(f"SET-{kind}", video))
    Path("SET-folders/a.txt").write_text("a woman turns")
    Path("SET-folders/refs/a").mkdir(parents=True)
    shutil.copy("ann_front.png", "SET-folders/refs/a/front.png")
    shutil.copy("look/clip1.mp4", "look/front.mp4")
    nersemble_tree(Path("look"), Path("SET-nersemble"), RIG)
    for name in ("videos.curate.Faces", "measure.real.BenchmarkFaces"):
        monkeypatch.setattr(name, type("Faces", (Faces,), {"__new__": lambda *_: truth}))
    for name in ("1.3b", "14b"):
        monkeypatch.setitem(train.CONFIGS, name, DiTConfig(**NETWORK))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    Path("small.py").write_text(f"""import functools, runpy, sys, torch
sys.path.insert(0, {str(ROOT)!r})
import model
for name in ("1.3b", "14b"):
    model.CONFIGS[name] = model.DiTConfig(**{NETWORK})
torch.compile = functools.partial(torch.compile, backend="aot_eager")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
""")


def in_small(words):
    """The words of a command, its script and flags for a smaller one."""
    at = next(n for n, word in enumerate(words) if word.endswith(".py"))
    script, rest = words[at], words[at + 1:]
    more = next((flags for name, flags in SMALLER.items() if name in [script, *rest[:1]]), [])
    if "--export" in rest or "--size" in more and "assets/base" in rest:
        more = []  # a toy has one size
    if script == "train.py" and not {"1.3b", "14b"} & set(rest):
        more = [*more, "--clips", "2", "2"]
    if script == "train.py" and "--resume" not in rest:
        more = [*more, "--overwrite"]  # one card and eight are trained into one folder
    if "--cases" in rest and "--ckpt" in rest:
        more = SMALLER["sample.py"]
    rest = [f"SET-{rest[1]}" if word == "SET" else word for word in rest]
    return words[1:at], script, rest + more


def run_with_torchrun(launcher, script, rest):
    """Two processes for any number; of several machines two, of one process each."""
    machines = "--nnodes" in launcher
    numbers = {"--nproc-per-node": "1" if machines else "2", "--nnodes": "2",
               "--rdzv-endpoint": f"localhost:{free_port()}"}
    for flag, value in numbers.items():
        if flag in launcher:
            launcher[launcher.index(flag) + 1] = value
    command = [sys.executable, "-m", "torch.distributed.run", *(["--standalone"] if not machines else []),
               *launcher, "small.py", str(ROOT / script), *rest]
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if machines else os.environ
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  text=True) for _ in range(1 + machines)]
    for process in processes:
        said, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, said


def test_every_other_command_runs_in_small(field):
    """As printed, but for sizes, networks and numbers of processes: those of real weights, of own videos, of
    eight cards and of four machines. What needs a trained network comes after training."""
    # claims.py trains rows like this one; public LoRAs are in test_lora.py
    commands = [words for words in untagged_commands()
                if not {"claims", "FILE:0.8"} & set(words) and words not in walk()]
    commands.append("python eval.py claims one-way --base assets/base".split())
    later = [words for words in commands if {"out/1.3b", "out/14b", "compare"} & set(words)]
    later.sort(key=lambda words: "compare" in words)
    kinds = [words for words in commands if "import" in words]
    ours = [words for words in commands if words not in later and words not in kinds]
    for words in [*kinds, *ours, *later]:
        launcher, script, rest = in_small(words)
        if "import" in words or "curate" in words:
            shutil.rmtree("DATA", ignore_errors=True)  # another set's
        if "--training" in rest:
            shutil.copytree("DATA/encoded", "TRAIN/encoded")
            index = Path("TRAIN/encoded/index.jsonl")
            index.write_text(index.read_text().replace("person_", "other_"))
        if words[0] == "torchrun":
            run_with_torchrun(launcher, script, rest)
        else:
            call(script, *rest, cwd=".")
    assert find_checkpoint("out/14b/low_noise_model") and find_checkpoint("out/14b/high_noise_model")
    assert Path("out/both/compare.html").exists() and Path("out/sample.mp4").exists()


def test_the_two_commands_stand_in_the_first_screen():
    first = "\n".join(README.splitlines()[:40])
    assert "pip install -r requirements.txt && python sample.py" in first
    assert "torchrun --nproc-per-node 2 train.py --stage all && python sample.py" in first
    assert "pip install -r requirements.txt -r tests/requirements.txt && pytest" in README


def test_every_command_runs_on_the_tiny_preset(tiny, tmp_path):
    shutil.copytree(tiny / "cache", tmp_path / "cache")
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    found = commands()
    scripts = {"train.py", "sample.py", "eval.py", "data.py", "kernels.py"}
    assert scripts <= {word for c in found for word in c.split()}
    for command in found:
        words = shlex.split(command.replace("$(sed -n 3p out/look/captions.txt)", "two people"))
        launcher, script = words[0], next(w for w in words if w.endswith(".py"))
        rest = words[words.index(script) + 1 :]
        rest += TINY.get(" ".join([script, *rest[:1]]), TINY.get(script, []))
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


# ---------------------------------------------------------------------------------------------------- numbers
def table(page, start):
    """The cells of a page's first table that begins like this: those of its head, and of its rows."""
    lines = page[page.index(f"\n{start}") + 1:].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in itertools.takewhile(lambda line: line.startswith("|"), lines)]
    return rows[0], rows[2:]


def test_wans_defaults_are_those_of_the_code():
    one, two = SAMPLE_RECIPES["wan2.1"], SAMPLE_RECIPES["wan2.2"]
    found = Found("", [], None, "", {})
    (height, width), (high, low) = found.size, two["guide_text"]
    assert (f"UniPC, {one['steps']} steps, shift {one['shift']:g}, guidance {one['guide_text'][0]:g} (A14B: "
            f"{two['steps']} steps, shift {two['shift']:g}, guidance {high:g} above the boundary {BOUNDARY} "
            f"and {low:g} below it), {height}x{width}, {found.frames} frames, its negative prompt"
            ) in " ".join(README.split())
    assert one["solver"] == two["solver"] == "unipc" and one["negative"] == two["negative"] == NEGATIVE_PROMPT


def test_the_thresholds_are_the_defaults_of_curate(tmp_path):
    for name in ("videos", "faces"):
        (tmp_path / name).mkdir()
    args = vars(curate.read_arguments([word for name in ("videos", "faces", "out")
                                       for word in (f"--{name}", str(tmp_path / name))]))
    _, rows = table(README, "| flag | default | what it does |")
    said = {}
    for flags, values, _ in rows:
        flags = re.findall(r"--([\w-]+)", flags)
        said |= zip(flags, map(float, re.findall(r"[\d.]+", values)), strict=True)
    assert said == {flag: args[flag.replace("-", "_")] for flag in curate.EXTRACT | curate.GROUP}


SAMPLING = {  # each row of README's table, and what prints it
    "1.3B, 480x832, 81 frames": ["--people", "0"],
    "the same with `--offload --tile 256`": ["--people", "0", "--offload", "--tile", "256"],
    "14B or one expert, two people with three views": ["--config", "14b", "--people", "2", "--views", "3"],
}


def test_the_memory_of_sampling_is_what_plan_prints(tmp_path):
    (_, *columns), rows = table(README, "| GiB | umT5 | references |")
    phases = ["VAE encode" if column == "references" else column for column in columns]
    assert [name for name, *_ in rows] == list(SAMPLING)
    for name, *cells in rows:
        said = call("eval.py", "speed", "plan", *SAMPLING[name], cwd=tmp_path)
        printed = dict(re.findall(r"^  ([\w ]+), \w+ +([\d.]+) GiB$", said, re.M))
        assert cells == [printed[phase] for phase in phases], name


def test_the_memory_of_training_is_what_plan_prints(tmp_path):
    (_, *columns), rows = table(README, "| | 1 card | 2 cards, `--shard` |")
    columns = [re.match(r"\d+|TFLOP", column)[0] for column in columns]
    said = {config: call("eval.py", "speed", "plan", "--config", config, cwd=tmp_path)
            for config in ("1.3b", "14b")}
    for name, *cells in rows:
        config, what = re.fullmatch(r"(\S+), `--train (\w+)`", name).groups()
        assert "81 frames of 480x832, 1 person(s) of 4 views" in said[config]
        (printed,) = re.findall(rf"^{what} +\S+ +(.*)$", said[config], re.M)
        printed = dict(zip(("TFLOP", "1", *map(str, speed.SHARDS)), printed.split(), strict=True))
        assert cells == [printed[column] for column in columns], name
    assert len(rows) == 4


FROM, PLAIN = "<!-- toy-from-base -->", "<!-- toy-from-base-plain -->"  # the tables of CLAIMS.md
CROSSTALK = "Jump-RoPE lowers crosstalk"
CLAIMED = {  # each row of README's table, and the rows of CLAIMS.md that it tells of, in its order
    "MFI raises identity": [(FROM, "MFI raises identity", "psnr"), (PLAIN, "MFI raises identity", "psnr")],
    "proxies unify one to four views": [
        (FROM, "proxies unify one to four views", "psnr"), (PLAIN, "proxies unify one to four views", "psnr"),
        (FROM, "proxies unify one to four views, append", "psnr")],
    "proxies help where the generated view has no reference": [
        (FROM, "proxies help where the generated view has no reference", "unseen")],
    CROSSTALK: [(FROM, CROSSTALK, "margin"), (FROM, CROSSTALK, "swaps %")],
    "... without proxies": [(FROM, f"{CROSSTALK}, without proxies", "margin")],
    "(ours) Jump-RoPE is better than all references at one time before the video": [
        (FROM, "Jump-RoPE is better than one time before the video", "psnr")],
    "the curriculum beats direct training": [(FROM, "the curriculum beats direct training", "psnr")],
    "the curriculum keeps the prior": [(FROM, "the curriculum keeps the prior better", "loss")],
    "several views beat one at large yaw": [(FROM, "several views beat one at large yaw", "side")],
    "region masking lowers copy-paste": [(FROM, "region masking lowers copy-paste", "copied %")],
    "RD-RoPE makes motion more natural": [(FROM, "RD-RoPE makes motion more natural", "jitter")],
    "(ours) one-way references cost nothing": [(FROM, "one-way references cost nothing", "psnr")],
}


def test_the_claims_are_those_of_claims_md():
    measured = {}
    for base in (FROM, PLAIN):
        _, rows = table(CLAIMS[CLAIMS.index(base):], "| claim | rows compared |")
        measured |= {(base, claim, metric): (verdict, in_favour.split()[0])
                     for claim, _, verdict, metric, in_favour, _ in rows}
    _, rows = table(README, "| claim | verdict | in favour |")
    assert [claim for claim, *_ in rows] == list(CLAIMED)
    for claim, verdict, in_favour in rows:
        verdicts, figures = zip(*(measured[row] for row in CLAIMED[claim]))
        assert tuple(re.findall("holds|does not hold|no effect|not decided", verdict)) == verdicts, claim
        for said, figure in zip(re.findall(r"[+-]?\d+(?:\.\d+)?", in_favour), figures, strict=True):
            places = len(said.partition(".")[2])  # one without a sign is said in words to be more or less
            figure = f"{float(figure):+.{places}f}" if said[0] in "+-" else f"{abs(float(figure)):.{places}f}"
            assert said == figure, claim


# ------------------------------------------------------------------------------------------------------ names
def test_every_file_is_named_and_every_named_file_exists():
    ours = {p.name for p in ROOT.glob("*.py")}
    assert ours <= set(re.findall(r"\b\w+\.py\b", README))
    assert all((ROOT / link).exists() for link in re.findall(r"\]\(((?!http)[^)#]+)\)", README))


def test_it_is_short_and_narrow():
    prose = re.sub(r"^\|.*$", "", re.sub(r"```.*?```", "", README, flags=re.S), flags=re.M)
    assert len(prose.split()) < 1400
    assert max(len(line) for line in prose.splitlines() if "](" not in line) <= 110
