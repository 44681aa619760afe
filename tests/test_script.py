"""support/script.py: one test for each class of what a user, a full disk or a kill can do."""

import argparse
import contextlib
import errno
import fcntl
import importlib
import json
import math
import os
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import safetensors
import torch
from conftest import ROOT
from helpers import FULL_DISK, fork, hang, kill, names, wait_for
from safetensors.torch import save_file

from measure.report import Results, read_results
from support import script
from support.script import (Parser, UserError, as_user_error, atomic_file, atomic_folder, check_outputs,
                            fingerprint, lock, read_lines, run_script)


# -------------------------------------------------------------------------------------- errors and arguments
def error_line(main, monkeypatch, capsys, *arguments, less_memory="less"):
    """run_script(main) -> the exit status and its one line."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/draw.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        run_script(main, less_memory)
    out, err = capsys.readouterr()
    assert not out and err.endswith("\n") and len(err.splitlines()) == 1
    return caught.value.code, err[:-1]


@pytest.mark.parametrize(
    "error, code, line",
    [(KeyboardInterrupt(), 130, "stopped"), (UserError("no such view"), 1, "no such view"),
     (UserError("a.png\nb.png\u2028c\r\n"), 1, "a.png b.png c"),
     (FileNotFoundError(2, "No such file", "a\nb"), 1, r"[Errno 2] No such file: 'a\nb'"),
     (safetensors.SafetensorError("Error while serializing"), 1, "Error while serializing"),
     (MemoryError(), 1, "out of memory; try --batch 1"),
     (MemoryError("Cannot allocate 9 TiB"), 1, "out of memory (Cannot allocate 9 TiB); try --batch 1"),
     (torch.OutOfMemoryError("CUDA. 3 GB. Much more"), 1, "out of memory (CUDA. 3 GB); try --batch 1"),
     (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory; try --batch 1"),
     (RuntimeError("CUDA error: out of memory"), 1, "out of memory; try --batch 1")],
    ids=repr,
)
def test_what_a_user_can_cause_is_one_line(error, code, line, monkeypatch, capsys):
    def main():
        raise error

    found = error_line(main, monkeypatch, capsys, less_memory="--batch 1")
    assert found == (code, f"draw.py: {line}")


def test_a_full_card_is_no_damaged_file():
    with pytest.raises(torch.OutOfMemoryError), as_user_error("model.safetensors"):
        raise torch.OutOfMemoryError("CUDA. 3 GB. Much more")


def test_a_tensor_larger_than_memory_is_one_line(monkeypatch, capsys):
    status, line = error_line(lambda: torch.empty(2**60), monkeypatch, capsys)
    assert (status, line) == (1, "draw.py: out of memory; try less")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ZeroDivisionError(), ValueError("x")])
def test_our_own_mistakes_stay_tracebacks(error, monkeypatch):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["draw.py"])
    with pytest.raises(type(error)):
        run_script(main)


def test_an_argument_that_is_not_utf8_is_one_line_before_any_work(monkeypatch, capsys):
    started = []
    argument = os.fsdecode(b"caf\xe9")
    status, line = error_line(lambda: started.append(1), monkeypatch, capsys, "--prompt", argument)
    assert status == 1 and not started
    assert line == r"draw.py: the argument 'caf\udce9' is not valid UTF-8"


def test_success_is_silent(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["draw.py", "--prompt", "élan 人"])
    run_script(lambda: None)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--see", "1"], "unrecognized arguments: --see 1"),  # no abbreviations
        (["--seed", "x\ny"], "--seed: got 'x.*', expected a whole number from 0 to "),
        (["--seed"], "--seed: expected one argument"),
        (["--solver", "heun"], "--solver: invalid choice"),
        (["one"], "unrecognized arguments: one"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(arguments, says, monkeypatch, capsys):
    parser = Parser()
    parser.add_argument("--seed", type=script.seed_number)
    parser.add_argument("--solver", choices=("euler", "unipc"))
    with pytest.raises(UserError, match=f"^{says}"):
        parser.parse_args(arguments)
    status, line = error_line(lambda: parser.parse_args(arguments), monkeypatch, capsys)
    assert status == 1 and line.startswith("draw.py: ") and len(line) < 200


@pytest.mark.parametrize("before, after", [
    ("~/x", "HOME/x"), ("--out=~/x", "HOME/x"), ("left=~/ä b.png", "left=HOME/ä b.png"), ("a~/x", "a~/x"),
    ("~", "~"), ("~x", "~x"), ("a caption = ~/x", "a caption = ~/x"), ("a\n~/x", "a\n~/x")])
@pytest.mark.parametrize("given", [True, False])
def test_home_is_home_behind_an_equals_too(before, after, given, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of me")
    parser = Parser()
    parser.add_argument("--out")
    words = [before] if before.startswith("--") else ["--out", before]
    monkeypatch.setattr(sys, "argv", ["draw.py", *([] if given else words)])
    args = parser.parse_args(*[words] * given)
    assert args.out == after.replace("HOME", "/home/of me")


def test_help_names_a_default_once(capsys):
    parser = Parser(prog="draw.py", description="Draw.\n  two  lines")
    defaults = {"--size": 64, "--scale": 0.0, "--out": Path("out/x"), "--views": ["left", "back"],
                "--prompt": None, "--lora": []}
    for flag, value in defaults.items():
        parser.add_argument(flag, default=value, help="what it is")
    parser.add_argument("--fast", action="store_true", help="what it is")
    parser.add_argument("--wan", default="none", help="a folder (default: the checkpoint's)")
    parser.add_argument("--words", default="a b", help="given as %(default)s, no more")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    said = capsys.readouterr().out
    assert "Draw.\n  two  lines\n" in said  # a script's first lines stay as they are
    assert re.findall(r"(--\w+) .*?what it is(.*)", said) == [
        ("--size", " (default: 64)"), ("--scale", " (default: 0.0)"), ("--out", " (default: out/x)"),
        ("--views", " (default: ['left', 'back'])"), ("--prompt", ""), ("--lora", ""), ("--fast", "")]
    assert "a folder (default: the checkpoint's)\n" in said and "given as a b, no more\n" in said


# ------------------------------------------------------------------------------------------ what is printed
COMMANDS = ["kernels.py", "train.py", "sample.py", "data.py", "eval.py", "data.py toy", "data.py curate",
            "data.py import", "data.py encode", "data.py show", "eval.py real", "eval.py compare",
            "eval.py make-cases", "eval.py claims", "eval.py speed"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_commands_help_says_something(command, tmp_path, monkeypatch, capsys):
    file, *words = command.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [file])
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(file.removesuffix(".py")).main([*words, "--help"])
    said, errors = capsys.readouterr()
    assert said.startswith(f"usage: {command} ") and len(said) > 200 and not errors
    assert not list(tmp_path.iterdir())


SCRIPT = f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from support.script import UserError, progress, run_script
def main():
    EXPECTED
    open("done", "w").close()
run_script(main)
"""


def run_in_shell(tmp_path, body, shell, **environment):
    """Run a script of this body in a shell, where $RUN starts it -> bytes of stdout and stderr."""
    (tmp_path / "draw.py").write_text(SCRIPT.replace("EXPECTED", body), encoding="utf-8")
    done = subprocess.run(["bash", "-c", shell.replace("$RUN", f"{sys.executable} draw.py")], cwd=tmp_path,
                          capture_output=True, env=os.environ | environment)
    assert done.returncode == 0 and (tmp_path / "done").exists(), done.stderr
    return done.stdout, done.stderr


SHOWN = {"ESC": "\x1b[2J\x1b]0;title\x07", "backspaces": "\b\b\b", "C1": "\x9b2J",
         "return": "a\rb", "delete": "\x7f", "embedding": "\u202bx\u202c", "override": "\u202ecod.exe",
         "isolate": "\u2066x\u2069"}


@pytest.mark.parametrize("text", SHOWN.values(), ids=SHOWN)
@pytest.mark.parametrize("how", ["print({!r})", "progress.write({!r})", "print({!r}, file=sys.stderr)",
                                 "print('a', {!r}, sep='', end='')"])
def test_no_text_moves_a_terminals_cursor(text, how, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/draw.py"])
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    run_script(lambda: exec(how.format(f"1{text}2\tä\n"), {"sys": sys, "progress": script.progress}))
    said = "".join(capsys.readouterr())
    expected = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    assert said.removeprefix("a").rstrip("\n") == f"1{expected}2\tä"


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "cp1252"},
                                         {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}])
def test_letters_that_stdout_lacks_are_written_as_numbers(environment, tmp_path):
    out, err = run_in_shell(tmp_path, "print('\u5f20 \U0001f600'); print('\u5f20', file=sys.stderr)", "$RUN",
                      **environment)
    assert out.decode().split() == ["\\u5f20", "\\U0001f600"] and err.decode().split() == ["\\u5f20"]


@pytest.mark.parametrize("shell", ["$RUN >&-", "$RUN 2>&-", "$RUN <&-", "$RUN <&- >&- 2>&-"])
def test_a_closed_stream_is_no_reason_not_to_work(shell, tmp_path):
    """And no file of the work gets its number."""
    body = ("file = open('video', 'w'); print('said'); print('said', file=sys.stderr); input; "
            "[0 for _ in progress([1, 2], 'a', 'b')]; file.close()")
    run_in_shell(tmp_path, body, shell)
    assert (tmp_path / "video").read_text() == ""


class Clock:
    """Instead of the module time in checkpoint.py."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.mark.parametrize("seconds, lines", [(1, []), (20, [2, 4]), (40, [1, 2, 3, 4, 5]), (7, [5])])
def test_without_a_terminal_progress_is_a_line_now_and_then(seconds, lines, monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(script, "time", clock)
    for _ in script.progress(range(5), "measuring", "videos"):
        clock.now += seconds
    left = {n: f"0:{(5 - n) * seconds // 60:02}:{(5 - n) * seconds % 60:02}" for n in range(6)}
    out, err = capsys.readouterr()
    assert not out and err.splitlines() == [
        f"measuring: {n} of 5 videos, {seconds} s each, {left[n]} left" for n in lines]


def test_progress_counts_what_was_there_before_but_not_its_time(monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(script, "time", clock)
    with script.progress(None, "encoding", "clips", total=1000, done=900) as bar:
        bar.note = "loss 0.5"
        clock.now += 40
        bar.update(10)
    with script.progress(None, "encoding", "clips", total=10, show=False) as bar:
        clock.now += 40
        bar.update(10)
    assert capsys.readouterr().err == "encoding: 910 of 1000 clips, 4 s each, 0:06:00 left, loss 0.5\n"


@pytest.mark.parametrize("columns", [0, 80])
def test_on_a_terminal_progress_is_a_bar(columns, tmp_path):
    """Also where it does not say how wide it is. Lines that are printed meanwhile
    stay whole, and what moves the bar arrives."""
    body = "[progress.write('written ' + str(n)) for n in progress(range(3), 'measuring', 'videos')]"
    (tmp_path / "draw.py").write_text(SCRIPT.replace("EXPECTED", body))
    reader, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    done = subprocess.run([sys.executable, "draw.py"], cwd=tmp_path, stdout=terminal, stderr=terminal)
    os.close(terminal)
    said = b""
    with contextlib.suppress(OSError):  # how the end of a terminal reads
        while part := os.read(reader, 4096):
            said += part
    os.close(reader)
    assert done.returncode == 0 and b"\r" in said and b"3/3" in said and b"\\x" not in said
    assert all(f"\rwritten {n}\r\n".encode() in said for n in range(3))


NUMBER_TEXTS = ("nan", "inf", "-inf", "-1", "0", "1e400", "", "x", str(10**20), "9" * 5000, "1", "0.5", "٣")


@pytest.mark.parametrize(
    "kind, accepted",
    [("count", {"1": 1, "٣": 3}), ("seed_number", {"0": 0, "1": 1, "٣": 3}),
     ("positive", {"1": 1, "0.5": 0.5, "٣": 3}), ("not_negative", {"0": 0, "1": 1, "0.5": 0.5, "٣": 3}),
     ("fraction", {"0": 0, "0.5": 0.5}), ("frame_rate", {"1": 1, "٣": 3})],
)
def test_numbers_are_finite_and_within_bounds(kind, accepted):
    values = {}
    for text in NUMBER_TEXTS:
        try:
            values[text] = getattr(script, kind)(text)
        except argparse.ArgumentTypeError as error:
            assert repr(text[:40]) in str(error) and "expected" in str(error) and len(str(error)) < 120
    assert values == accepted and all(math.isfinite(value) for value in values.values())


@pytest.mark.parametrize("text", ["", " ", "\n\u2028"])
def test_an_empty_text_is_refused(text):
    parser = Parser()
    parser.add_argument("--prompt", type=script.nonempty)
    assert parser.parse_args(["--prompt", " a "]).prompt == " a "
    with pytest.raises(UserError, match="^--prompt: is empty$"):
        parser.parse_args(["--prompt", text])


@pytest.mark.parametrize("value", [0, 1, 2**63 - 1])
def test_a_seed_is_a_whole_number(value):
    assert script.is_seed(value)


@pytest.mark.parametrize("value", [True, -1, 2**63, 1.0, "1", None, math.nan, [1]])
def test_anything_else_is_no_seed(value):
    assert not script.is_seed(value)


# ------------------------------------------------------------------------------------------------------ files
@pytest.mark.parametrize("error", [FULL_DISK, KeyboardInterrupt(), None])
@pytest.mark.parametrize("what", ["file", "link"])
def test_a_file_is_written_whole_or_not_at_all(what, error, tmp_path):
    target = tmp_path / "disk" / "video.mp4"
    target.parent.mkdir()
    target.write_text("old")
    path = target
    if what == "link":
        path = tmp_path / "video.mp4"
        path.symlink_to(target)
    before = names(tmp_path)
    with contextlib.suppress(OSError, KeyboardInterrupt), atomic_file(path) as temporary:
        assert temporary.suffix == ".mp4" and temporary.parent == target.parent
        temporary.write_text("new")
        assert target.read_text() == "old"
        if error:
            raise error
    assert target.read_text() == ("old" if error else "new") and names(tmp_path) == before
    assert path.is_symlink() == (what == "link")


@pytest.mark.parametrize("error", [FULL_DISK, KeyboardInterrupt(), None])
@pytest.mark.parametrize("what", ["folder", "link", "nothing"])
def test_a_folder_is_written_whole_or_not_at_all(what, error, tmp_path):
    target, path = tmp_path / "disk" / "cache", tmp_path / "disk" / "cache"
    if what == "link":
        path = tmp_path / "cache"
        path.symlink_to(target)
    if what != "nothing":
        target.mkdir(parents=True)
        (target / "old").touch()
    before = names(tmp_path)
    with contextlib.suppress(OSError, KeyboardInterrupt), atomic_folder(path) as build:
        (build / "new").touch()
        (build / "deeper").mkdir()
        (build / "deeper" / "file").touch()
        if error:
            raise error
    if error:
        assert set(names(tmp_path)) - set(before) <= {"disk"}
    else:
        assert names(path) == ["deeper", "deeper/file", "new"]
    assert not list(tmp_path.rglob(".unfinished-*"))


def half_a_folder(folder):
    with lock(folder.parent), atomic_folder(folder) as build:
        (build / "new").touch()
        hang()


def half_a_file(path):
    with lock(path.parent), atomic_file(path) as temporary:
        temporary.write_text("new")
        hang()


def test_a_kill_leaves_the_old_one_and_the_next_lock_sweeps_up(tmp_path):
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "old").touch()
    (tmp_path / "video").write_text("old")
    (tmp_path / ".unfinished-symphony.mp3").touch()  # the user's
    before = names(tmp_path)
    for function, path in ((half_a_folder, tmp_path / "step"), (half_a_file, tmp_path / "video")):
        process = fork(function, path)
        wait_for(lambda: len(names(tmp_path)) > len(before))
        kill(process)
        assert set(names(tmp_path)) > set(before)
        with lock(tmp_path):
            assert names(tmp_path) == before
    assert (tmp_path / "video").read_text() == "old"


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path, monkeypatch):
    folder, old = tmp_path / "step", tmp_path / f".replaced-{script.HOST}.{os.getpid()}-step"
    folder.mkdir()
    (folder / "old").touch()
    replace = os.replace

    def fails_second(source, target):
        if Path(target) == folder:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), atomic_folder(folder) as build:
        patch.setattr(os, "replace", fails_second)
        (build / "new").touch()
    assert names(tmp_path) == [old.name, f"{old.name}/old"]
    with lock(tmp_path):
        assert names(tmp_path) == ["step", "step/old"]


def test_a_lock_spares_what_a_running_script_writes_without_one(tmp_path):
    def write(path):
        with atomic_file(path) as temporary:
            temporary.write_text("new")
            hang()

    process = fork(write, tmp_path / "video")
    wait_for(lambda: names(tmp_path))
    with lock(tmp_path):
        assert len(names(tmp_path)) == 1
    kill(process)
    with lock(tmp_path):
        assert not names(tmp_path)


def hold(folder):
    with lock(folder):
        (folder / "held").touch()
        hang()


def test_a_second_process_is_told_who_holds_the_folder_until_that_is_killed(tmp_path):
    process = fork(hold, tmp_path)
    wait_for((tmp_path / "held").exists)
    with pytest.raises(UserError, match=f"in use by process {process.pid}: wait for it") as caught:
        lock(tmp_path).__enter__()
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    kill(process)
    with lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def hold_until_somebody_waits(folder, waits):
    with lock(folder, wait=True):
        (folder / "held").touch()
        wait_for(waits.exists)
        (folder / "held").unlink()


def test_a_lock_can_be_waited_for(tmp_path, monkeypatch, capsys):
    waits, flock = tmp_path / "waits", fcntl.flock
    process = fork(hold_until_somebody_waits, tmp_path, waits)
    wait_for((tmp_path / "held").exists)

    def noted(file, how):
        if how == fcntl.LOCK_EX:  # what it waits in
            waits.touch()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", noted)
    with lock(tmp_path), lock(tmp_path, wait=True):  # a run and a cache in one folder do not meet
        assert waits.exists() and not (tmp_path / "held").exists()
    process.join()
    assert capsys.readouterr().out == f"waiting for process {process.pid}, which uses {tmp_path}\n"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_once_and_used(number, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fails)
    script.say_no_locks.cache_clear()
    for wait in (False, True, False):
        with lock(tmp_path, wait):
            pass
    Results(tmp_path / "results.jsonl", ("a",)).add({"a": 1})
    Results(tmp_path / "results.jsonl", ("a",)).add({"a": 2})
    assert [line["a"] for line in read_results(tmp_path / "results.jsonl")] == [1, 2]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"this file system has no locks ({os.strerror(number)})" in said


def test_another_error_of_a_lock_is_no_silence(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fails)
    with pytest.raises(OSError, match="Input/output"), lock(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("library", [False, True])
def test_a_full_disk_names_what_could_not_be_written(number, library, tmp_path):
    """Also where the library that writes says the number only in words, as safetensors does."""
    words = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
    error = safetensors.SafetensorError(words) if library else OSError(number, os.strerror(number))
    for writes, name in ((atomic_file, "video.mp4"), (atomic_folder, "step-000001")):
        with pytest.raises(OSError, match=f"{os.strerror(number)}: '{tmp_path / name}'$"):
            with writes(tmp_path / name):
                raise error
    with pytest.raises(OSError, match="^elsewhere$"), atomic_file(tmp_path / "x"):
        raise OSError("elsewhere")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to .*file/out .*choose another folder"):
        script.probe_writable(tmp_path / "file" / "out")


def test_a_folder_without_the_right_to_write_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(UserError, match="^cannot write to .*Permission denied.*choose another folder"):
        script.probe_writable(tmp_path)


def test_no_output_is_an_input(tmp_path):
    (tmp_path / "ann.png").touch()
    (tmp_path / "link.png").symlink_to("ann.png")
    (tmp_path / "there").symlink_to(tmp_path)
    photo, link, other = tmp_path / "ann.png", tmp_path / "link.png", tmp_path / "new.png"
    roundabout = tmp_path / "there" / ".." / tmp_path.name / "ann.png"
    before = names(tmp_path)
    check_outputs([other], [photo, link])
    assert names(tmp_path) == before
    for output, source in ((photo, photo), (link, photo), (photo, link), (roundabout, link)):
        with pytest.raises(UserError, match="is one of the inputs .*choose another --out"):
            check_outputs([other, output], [source])
    for folder in (tmp_path, tmp_path / "there", "", ".", "/", ".."):
        with pytest.raises(UserError, match="is a folder or a device, expected a file"):
            check_outputs([folder], [photo])
    for impossible in (tmp_path / ("x" * 300), tmp_path / "nowhere" / "new.png", photo / "new.png"):
        with pytest.raises((OSError, UserError)):
            check_outputs([impossible], [photo])
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    "junk",
    [b'{"a": ', b"", b"null", b"[1]", b"3", b'"a"', b"\xff\xfe\x00", b"[" * 100_000, b'{"a":' * 100_000,
     b"9" * 5000],
    ids=lambda junk: ascii(junk[:8]),
)
def test_junk_lines_are_left_out(junk, tmp_path):
    path = tmp_path / "metrics.jsonl"
    first, last = {"a": 1, "name": "x\u2028y\x85z"}, {"b": 2}
    path.write_bytes(
        json.dumps(first, ensure_ascii=False).encode() + b"\n" + junk + b"\r\n" + json.dumps(last).encode()
    )
    assert read_lines(path) == [first, last]
    path.write_bytes(path.read_bytes()[:-1])  # a kill while the last line was written
    assert read_lines(path) == [first]


def test_no_lines_without_a_file(tmp_path):
    assert read_lines(tmp_path / "metrics.jsonl") == []


# ------------------------------------------------------------------------------------------- what files hold
@pytest.mark.parametrize("size, offsets", [
    (0, []), (1, [0]), (5000, [0, 2500, 4999]), (9 * 2**20, [0, 2**20 - 1, 8 * 2**20, 9 * 2**20 - 1])])
def test_files_are_told_apart_by_content_and_not_by_name_or_time(size, offsets, tmp_path):
    content = bytearray(os.urandom(size))
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(content)
    os.utime(tmp_path / "b", (1, 1))
    name = fingerprint("x", tmp_path / "a")
    assert fingerprint("x", tmp_path / "b") == name != fingerprint("y", tmp_path / "a")
    for at in offsets:
        content[at] ^= 1
        (tmp_path / "b").write_bytes(content)
        os.utime(tmp_path / "b", (2 + at, 2))
        assert fingerprint("x", tmp_path / "b") != name
        content[at] ^= 1
    (tmp_path / "b").write_bytes(content + b"1")
    assert fingerprint("x", tmp_path / "b") != name
    with pytest.raises(UserError, match="nothing: no such file"):
        fingerprint(tmp_path / "nothing")


def test_another_training_of_a_large_network_is_told_apart(tmp_path):
    """Of equal size: other tensors everywhere, one layer of thirty, and one tensor of a torch.save file."""
    torch.manual_seed(0)
    state = {f"blocks.{n}.weight": torch.randn(400, 400) for n in range(30)}
    names = []
    for n, change in enumerate((None, range(30), [17], [3])):
        other = state | {f"blocks.{i}.weight": state[f"blocks.{i}.weight"] + 0.1 for i in change or ()}
        save_file(other, tmp_path / f"{n}.safetensors")
        torch.save(other, tmp_path / f"{n}.pth")
        torch.save(other | {"blocks.9.weight": other["blocks.9.weight"].clone().fill_diagonal_(0)},
                   tmp_path / f"{n}-1.pth")
        names += [fingerprint(tmp_path / f"{n}{end}") for end in (".safetensors", ".pth", "-1.pth")]
    assert len(set(names)) == len(names) == 12
