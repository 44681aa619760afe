"""The rules of the house: lines of each file, who imports whom, and the packages. To change a rule is to
change this page, on purpose."""

import ast
import re
import sys

import pytest
from conftest import ROOT

# lines that a file may have, and our own files that it may import
FILES = {
    "rope": (105, "checkpoint"),
    "model": (420, "rope kernels lora checkpoint"),
    "data": (330, "importers manifest toy pictures encode encoders rope checkpoint"),
    "train": (610, "model data toy encode monitor muon parallel pictures kernels lora rope checkpoint"),
    "monitor": (230, "model data parallel rope checkpoint"),
    "sample": (460, "model data toy parallel pictures encoders kernels lora rope checkpoint"),
    "parallel": (245, "checkpoint"),
    "lora": (230, "checkpoint"),
    "muon": (70, "lora checkpoint"),
    "kernels": (380, "rope checkpoint"),
    "encoders": (533, "text checkpoint"),
    "text": (77, "checkpoint"),
    "checkpoint": (330, ""),
    "encode": (200, "encoders manifest parallel pictures rope checkpoint"),
    "pictures": (300, "rope checkpoint"),
    "toy": (625, "encode manifest pictures encoders rope checkpoint"),
    "manifest": (190, "pictures rope checkpoint"),
    "importers": (430, "manifest pictures rope checkpoint"),
    "curate": (400, "manifest pictures toyfaces faces rope checkpoint"),
    "faces": (540, "checkpoint"),
    "toyfaces": (150, "toy faces checkpoint"),
    "eval": (600, "sample toy data parallel report benchmark cases curate toyfaces faces pictures rope "
                  "checkpoint"),
    "report": (250, "pictures checkpoint"),
    "benchmark": (560, "report cases curate toyfaces faces manifest pictures checkpoint"),
    "cases": (235, "manifest rope checkpoint"),
    "claims": (190, "eval toy report checkpoint"),
    "bench": (180, "model train monitor muon lora sample pictures toy encoders kernels rope checkpoint"),
}
# Past the number above, and why. Nothing else may be, and these may not grow.
OVER = {
    "model": (600, "configs, files and inputs are checked before a network is built; frozen bases; one-way "
                   "references with what they keep; captions longer than their room"),
    "train": (695, "FSDP2, adapters, experts and a base, told apart by content, beside the bare loop"),
    "sample": (650, "what can be known of a job is refused before its first step; experts, rounds by rank; "
                    "a cache an expert"),
    "parallel": (264, "one-way references under Ulysses; who is here without a group"),
    "data": (353, "which clips a step draws"),
    "encode": (319, "its own command line, which stood in data.py; sets that know their networks by size"),
    "encoders": (656, "tables of the names of transformers and diffusers; finds each network in a folder by "
                      "what files hold"),
    "text": (128, "reads tokenizer.json as a sentencepiece model"),
    "lora": (268, "which of two experts a file is for"),
    "pictures": (470, "whatever a file says of its order, colours, turns and streams is read or refused"),
    "monitor": (252, "a validation refuses people of the training set"),
    "toy": (744, "captions that describe people, for a base model; films to curate, and their encoding"),
    "manifest": (401, "tables, names and folders of a user, whatever system and program they are from"),
    "report": (264, "what one case alone does not have, an interval, and where an axis ends"),
    "benchmark": (589, "what the stars of a comparison mean"),
    "faces": (569, "a crowd is bounded, damaged weights are named"),
    "claims": (316, "seeds in pairs, verdicts that can say no, results that outlive a machine"),
    "checkpoint": (1094, "every class of bad input and of damaged file is met here, once for all scripts; "
                        "releases as Wan, diffusers and ComfyUI store them; hashes by all cores"),
    "bench": (283, "dry runs of sampling and of training; one-way references side by side"),
    "curate": (901, "names what is wrong with every video; tracks, identities in bounded memory, report; "
                "refuses what is not its own, finds damaged rows, keeps what a hand has changed"),
}
METHOD = ("rope", "model", "data", "train", "sample")  # to be read in one sitting
PACKAGES = {"torch", "numpy", "safetensors", "sentencepiece", "PIL", "av", "tqdm", "triton"}
TEST_PACKAGES = {"pytest", "diffusers", "transformers", "peft", "ftfy"}


def imported(path):
    """The first words of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def lines(name):
    return len((ROOT / f"{name}.py").read_text().splitlines())


def test_every_file_has_its_place():
    assert {path.stem for path in ROOT.glob("*.py")} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_file_keeps_to_its_lines(name):
    most = OVER[name][0] if name in OVER else 1.05 * FILES[name][0]
    assert lines(name) <= most


def test_the_method_is_read_in_one_sitting():
    assert sum(map(lines, METHOD)) <= 2420


@pytest.mark.parametrize("name", FILES)
def test_imports_run_in_one_direction(name):
    ours = imported(ROOT / f"{name}.py") & set(FILES)
    assert ours <= set(FILES[name][1].split())
    assert not any(name in FILES[other][1].split() for other in ours)


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")])
def test_nothing_else_is_imported(path):
    tests = {p.stem for p in ROOT.glob("tests/*.py")} if path.parent.name == "tests" else set()
    allowed = set(FILES) | PACKAGES | set(sys.stdlib_module_names) | (tests and tests | TEST_PACKAGES)
    assert imported(path) <= allowed


def test_the_requirements_are_the_packages():
    def names(file):
        return {re.split(r"[=;]", line)[0].strip() for line in (ROOT / file).read_text().splitlines()}

    assert names("requirements.txt") == PACKAGES - {"PIL"} | {"pillow"}
    assert names("tests/requirements.txt") == TEST_PACKAGES | {"ruff"}
