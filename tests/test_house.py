"""The rules of the house: which files there are, their lines, who imports whom, and the packages. To change a
rule is to change this page, on purpose."""

import ast
import importlib
import re
import sys

import pytest
from conftest import ROOT

METHOD = {"rope": 100, "model": 480, "data": 225, "train": 510, "sample": 400}  # to be read in one sitting
LINES = METHOD | {"kernels": 345, "eval": 480, "networks": 1440, "videos": 2150,
                  "measure": 1400, "support": 800}
NOW = {"support": 1395, "rope": 104, "kernels": 377, "networks": 2112, "model": 577, "videos": 3481,
       "data": 354, "train": 757, "sample": 532, "measure": 1623, "eval": 474}  # shrinks to LINES, then goes
# rooms, the lowest first, and what each may import
ROOMS = {"support": "", "rope": "", "kernels": "rope support", "networks": "rope support",
         "model": "rope kernels networks support", "videos": "rope networks support",
         "data": "rope networks videos support",
         "train": "rope kernels networks support model videos data",
         "sample": "rope kernels networks support model videos data",
         "measure": "rope kernels networks support model videos data train sample",
         "eval": "rope networks support model videos data sample measure"}
PACKAGES = {"torch", "numpy", "safetensors", "sentencepiece", "PIL", "av", "tqdm", "triton"}
TEST_PACKAGES = {"pytest", "diffusers", "transformers", "peft", "ftfy"}


def files_of(room):
    return [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).glob("*.py"))


def imported(path):
    """The first words of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_the_top_is_the_card():
    files = {path.stem for path in ROOT.glob("*.py")}
    assert files == {room for room in ROOMS if files_of(room)[0].parent == ROOT}
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests"}
    assert folders == set(ROOMS) - files


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_keeps_to_its_lines(room):
    lines = sum(len(path.read_text().splitlines()) for path in files_of(room))
    assert lines <= 1.03 * max(LINES[room], NOW[room])


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_downwards(room):
    rooms, found = list(ROOMS), set()
    for path in files_of(room):
        found |= imported(path) & set(rooms) - {room}
    assert found <= set(ROOMS[room].split())
    assert all(rooms.index(other) < rooms.index(room) for other in found)


@pytest.mark.parametrize("room", [room for room in ROOMS if files_of(room)[0].parent != ROOT])
def test_a_folder_says_what_it_is_and_no_package_takes_its_name(room):
    init = ast.parse((ROOT / room / "__init__.py").read_text())
    assert len(init.body) == 1 and ast.get_docstring(init)
    assert importlib.import_module(room).__file__ == str(ROOT / room / "__init__.py")


@pytest.mark.xfail(reason="until the cuts are done")
def test_no_name_is_in_two_files():
    owners = {}
    for path in (path for room in ROOMS for path in files_of(room)):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                owners.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    assert not {name: files for name, files in owners.items() if len(files) > 1 and name != "main"}


OURS = [path for room in ROOMS for path in files_of(room)]


@pytest.mark.parametrize("path", [*OURS, *ROOT.glob("tests/*.py")])
def test_nothing_else_is_imported(path):
    tests = {p.stem for p in ROOT.glob("tests/*.py")} if path.parent.name == "tests" else set()
    allowed = set(ROOMS) | PACKAGES | set(sys.stdlib_module_names) | (tests and tests | TEST_PACKAGES)
    assert imported(path) <= allowed


def test_the_requirements_are_the_packages():
    def names(file):
        return {re.split(r"[=;]", line)[0].strip() for line in (ROOT / file).read_text().splitlines()}

    assert names("requirements.txt") == PACKAGES - {"PIL"} | {"pillow"}
    assert names("tests/requirements.txt") == TEST_PACKAGES | {"ruff"}
