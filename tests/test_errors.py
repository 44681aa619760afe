"""Wrong flags and wrong inputs of every command: one line that names what is wrong, and nothing is written.

A row is (the words of a command line, what its error says, a regular expression). Each runs in this process,
in an empty folder, which stays empty.
"""

import pytest
from conftest import ROOT, call, run

from support.script import UserError

ROWS_SUPPORT = [
    ("data.py toy --fram 5 --out x", "^unrecognized arguments: --fram 5"),  # no abbreviations
    ("train.py --seed", "^--seed: expected one argument"),
    ("sample.py one", "^unrecognized arguments: one"),
]
ROWS_TRAIN = [("train.py --stage 99", "^--stage: invalid choice: '99'")]
ROWS_SAMPLE = [("sample.py --steps 0", "^--steps: got '0', expected ")]
ROWS_MODEL = []
ROWS_TOY = [("data.py toy --frames x --out x", "^--frames: got 'x', expected ")]
ROWS_CURATE = []
ROWS_DATA = [("data.py draw", "^what: invalid choice: 'draw'")]
ROWS_MEASURE = []
ROWS_NETWORKS = []

ROWS = [*ROWS_SUPPORT, *ROWS_TRAIN, *ROWS_SAMPLE, *ROWS_MODEL, *ROWS_TOY, *ROWS_CURATE, *ROWS_DATA,
        *ROWS_MEASURE, *ROWS_NETWORKS]


@pytest.mark.parametrize("words, message", ROWS)
def test_what_is_wrong_is_named_in_one_line(words, message, tmp_path):
    script, *arguments = words.split()
    with pytest.raises(UserError, match=message) as caught:
        call(script, *arguments, cwd=tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not list(tmp_path.iterdir())


SCRIPTS = ["train.py --stage 99", "sample.py --steps 0", "eval.py --limit x", "data.py draw",
           "kernels.py one"]


@pytest.mark.parametrize("words", SCRIPTS)
def test_a_script_ends_with_that_line_and_status_1(words, tmp_path):
    script, *arguments = words.split()
    line = run(ROOT / script, *arguments, cwd=tmp_path, fails=True)
    assert line.startswith(f"{script}: ") and not list(tmp_path.iterdir())
