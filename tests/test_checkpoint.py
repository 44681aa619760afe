"""checkpoint.py: one test for each class of what a user, a full disk or a kill can do."""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
import weakref
from pathlib import Path

import pytest
import safetensors
import torch
from conftest import ROOT
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import eval as evaluation
from measure.report import Results, read_results
from networks.encoders import UMT5
from networks.weights import load_weights, read_network, read_wan, read_weights, wan_files, weight_sets
from support import checkpoints, script
from support.checkpoints import check_files, find_checkpoint, load_tensors, read_meta, save_checkpoint
from support.script import (Parser, UserError, as_user_error, atomic_file, atomic_folder, check_outputs,
                            fingerprint, lock, read_lines, run_script)


@torch.no_grad()
def randomise(net, seed=0):
    """Every parameter away from its starting value, at sizes that keep activations near one."""
    torch.manual_seed(seed)
    for name, p in net.named_parameters():
        if p.ndim > 1 and not name.endswith("gamma"):
            p.copy_(torch.randn_like(p) / p[0].numel() ** 0.5)
        else:
            p.copy_((0 if name.endswith("bias") else 1) + 0.1 * torch.randn_like(p))
    return net.eval()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, set()

    def freed(self, key, size):
        self.now -= size
        self.seen.discard(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.seen and storage.device.type == "cpu":
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return out


def names(folder):
    """What lies below a folder, but for its lock."""
    paths = [path for path in folder.rglob("*") if path.name not in (".lock", ".cache-lock")]
    return sorted(str(path.relative_to(folder)) for path in paths)


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
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (UserError("no such view"), 1, "no such view"),
        (UserError("a.png\nb.png\u2028c\r\n"), 1, "a.png b.png c"),
        (FileNotFoundError(2, "No such file", "a\nb"), 1, r"[Errno 2] No such file: 'a\nb'"),
        (safetensors.SafetensorError("Error while serializing"), 1, "Error while serializing"),
        (MemoryError(), 1, "out of memory; try --batch 1"),
        (MemoryError("Cannot allocate 9 TiB"), 1, "out of memory (Cannot allocate 9 TiB); try --batch 1"),
        (torch.OutOfMemoryError("CUDA. 3 GB. Much more"), 1, "out of memory (CUDA. 3 GB); try --batch 1"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory; try --batch 1"),
        (RuntimeError("CUDA error: out of memory"), 1, "out of memory; try --batch 1"),
    ],
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


def help_of(parser, action):
    """One flag's lines of --help, without any white space, as lines may break anywhere."""
    formatter = parser._get_formatter()
    formatter.add_argument(action)
    return "".join(formatter.format_help().split())


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


PARSERS = [  # of each command, the function that makes its parser
    ("kernels", "main"), ("train", "arguments"), ("sample", "arguments"), ("data", "main"), ("eval", "main"),
    ("videos.toy", "main"), ("videos.curate", "read_arguments"), ("videos.importers", "main"),
    ("videos.encode", "main"), ("measure.real", "main"), ("measure.real", "compare_main"),
    ("measure.cases", "make_cases"), ("measure.claims", "main"), ("measure.speed", "main")]


def flags_of(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for part in action.choices.values():
                yield from flags_of(part)
        else:
            yield parser, action


@pytest.mark.parametrize("module, function", PARSERS)
def test_every_flags_help_names_its_default(module, function, monkeypatch):
    made = []

    def parse(parser, arguments):
        made.append(parser)
        raise KeyboardInterrupt

    monkeypatch.setattr(Parser, "parse_args", parse)
    with pytest.raises(KeyboardInterrupt):
        getattr(importlib.import_module(module), function)([], *([evaluation] if "claims" in module else []))
    silent = []
    for parser, action in flags_of(made[0]):
        said = help_of(parser, action)
        own, value = (action.help or "").count("(default"), action.default
        if value is None or value is False or value in ([], argparse.SUPPRESS) or own:
            assert said.count("(default") == own
        elif not said.endswith("".join(f"(default: {value})".split())):
            silent.append(f"{parser.prog.split()[-1]} {action.option_strings[0]}")
    assert not silent


def test_no_parsers_help_is_forgotten():
    files = [path.relative_to(ROOT).with_suffix("") for path in [*ROOT.glob("*.py"), *ROOT.glob("[!t]*/*.py")]
             if " = Parser(" in (ROOT / path).read_text()]
    assert {".".join(file.parts) for file in files} == {module for module, _ in PARSERS}


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
    [
        ("count", {"1": 1, "٣": 3}),
        ("seed_number", {"0": 0, "1": 1, "٣": 3}),
        ("positive", {"1": 1, "0.5": 0.5, "٣": 3}),
        ("not_negative", {"0": 0, "1": 1, "0.5": 0.5, "٣": 3}),
        ("fraction", {"0": 0, "0.5": 0.5}),
        ("frame_rate", {"1": 1, "٣": 3}),
    ],
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
def fork(function, *arguments):
    """Run it in a process of its own, which shares nothing with this one."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "nothing happened for 20 seconds"
        time.sleep(0.01)


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join()


FULL_DISK = OSError(errno.ENOSPC, "No space left on device")


def hang():
    time.sleep(60)


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
    [
        b'{"a": ',
        b"",
        b"null",
        b"[1]",
        b"3",
        b'"a"',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 5000,
    ],
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


# -------------------------------------------------------------------------------------------- our checkpoints
def save(folder, value=1.0, files=(), keep=None, **meta):
    tensors = {"model": {"w": torch.full((2,), value)}, "ema": {"w": torch.full((2,), value)}}
    save_checkpoint(folder, tensors, {"config": {}, **meta}, files, keep)
    return folder


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"pieces")
    folder = save(tmp_path / "stage1" / "step-000001", 3.0, [tmp_path / "spiece.model"], step=1)
    assert names(folder) == ["checkpoint.json", "ema.safetensors", "model.safetensors", "spiece.model"]
    assert read_meta(folder)["step"] == 1 and set(read_meta(folder)["sha256"]) == set(names(folder)[1:])
    assert load_tensors(folder, "ema")["w"].tolist() == [3, 3]
    check_files(folder)
    mask = os.umask(0)
    os.umask(mask)
    assert (folder / "ema.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask  # not safetensors' 0600


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "spiece.model"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "a folder", "not in the list"])
def test_every_file_of_a_checkpoint_is_checked(name, damage, tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"pieces")
    folder = save(tmp_path / "step-000001", files=[tmp_path / "spiece.model"])
    path, content = folder / name, (folder / name).read_bytes()
    if damage == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "missing":
        path.unlink()
    elif damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        meta = read_meta(folder)
        del meta["sha256"][name]
        (folder / "checkpoint.json").write_text(json.dumps(meta))
    for asked in ([name],) if damage == "not in the list" else ([name], None):
        with pytest.raises(UserError, match=f"{name} is missing or damaged .*use another checkpoint"):
            check_files(folder, asked)
    if name == "ema.safetensors":
        with pytest.raises(UserError, match="missing or damaged"):
            load_tensors(folder, "ema")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "", ".", "..", "sub/../ema.safetensors"])
def test_a_checkpoint_names_no_file_outside_its_folder(name, tmp_path):
    folder = save(tmp_path / "step-000001")
    (tmp_path / "outside").write_bytes(b"x")
    meta = read_meta(folder)
    meta["sha256"][name] = script.sha256_of(tmp_path / "outside")
    (folder / "checkpoint.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="missing or damaged"):
        check_files(folder)


def test_a_damaged_tensor_file_with_the_right_hash_is_one_line(tmp_path):
    folder = save(tmp_path / "step-000001")
    (folder / "ema.safetensors").write_bytes(b"\xff" * 20)
    meta = read_meta(folder)
    meta["sha256"]["ema.safetensors"] = script.sha256_of(folder / "ema.safetensors")
    (folder / "checkpoint.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="ema.safetensors cannot be read"):
        load_tensors(folder, "ema")


@pytest.mark.parametrize(
    "junk",
    [
        "",
        "{",
        "null",
        "3",
        "[]",
        '"config sha256"',
        "{}",
        '{"config": {}}',
        '{"config": [], "sha256": {}}',
        '{"config": {}, "sha256": "x"}',
        '{"config": {}, "sha256": {}, "step": "9"}',
        '{"config": {}, "sha256": {}, "step": 1e400}',
        '{"config": {}, "sha256": {}, "stage": null}',
        '{"config": {}, "sha256": {}, "finished": 1}',
        '{"config": {}, "sha256": {}, "world": 3}',
        '{"config": {}, "sha256": {}, "flags": []}',
        '{"config": {}, "sha256": {}, "wan": {}}',
        "[" * 100_000,
        '{"config":' * 100_000,
        '{"config": {}, "sha256": {}, "step": ' + "9" * 5000 + "}",
        b"\xff\xfe",
    ],
    ids=lambda junk: ascii(junk[:48]),
)
def test_junk_in_checkpoint_json_is_one_short_line(junk, tmp_path):
    (tmp_path / "checkpoint.json").write_bytes(junk if isinstance(junk, bytes) else junk.encode())
    for use in (read_meta, check_files, lambda folder: load_tensors(folder, "ema")):
        with pytest.raises(UserError, match="checkpoint.json is damaged .*use another checkpoint") as caught:
            use(tmp_path)
        assert len(str(caught.value)) < 400 + len(str(tmp_path)) and "\n" not in str(caught.value)


def test_keep_removes_only_older_checkpoints(tmp_path):
    for step in range(1, 5):
        save(tmp_path / f"step-{step:06d}")
    save(tmp_path / "step-best")
    save(tmp_path / "step-000002-good")
    save(tmp_path / "my-step-000001")
    notes = tmp_path / "step-000000"  # the user's: no checkpoint.json
    notes.mkdir()
    (notes / "notes.txt").write_text("mine")
    save(tmp_path / "step-000010", keep=2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [
        "my-step-000001",
        "step-000000",
        "step-000002-good",
        "step-000004",
        "step-000010",
        "step-best",
    ]
    assert (notes / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_what_is_no_checkpoint_is_never_replaced_by_one(what, tmp_path):
    path = tmp_path / "step-000002"
    if what == "file":
        path.write_text("mine")
    else:
        place = path if what == "folder" else tmp_path / "elsewhere"
        place.mkdir()
        (place / "notes.txt").write_text("mine")
        if what == "link":
            path.symlink_to(place)
    before = names(tmp_path)
    for attempt in (save, checkpoints.check_replaceable):
        with pytest.raises(UserError, match="step-000002 is not a checkpoint .*move it away"):
            attempt(path)
    assert names(tmp_path) == before


def test_a_checkpoint_and_an_empty_folder_are_replaced(tmp_path):
    folder = tmp_path / "step-000002"
    folder.mkdir()
    for value in (1.0, 2.0):
        save(folder, value)
        assert load_tensors(folder, "model")["w"].tolist() == [value, value]
    assert names(tmp_path)[0] == "step-000002"


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    folder = save(tmp_path / "step-000002")
    before = names(tmp_path)

    def full(*_):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=f"No space left on device: '{folder}'$"):
        save(folder, 2.0, keep=1)
    assert names(tmp_path) == before
    assert load_tensors(folder, "model")["w"].tolist() == [1, 1]


def save_for_ever(folder):
    value = 1.0
    while True:
        save(folder, value, keep=1)
        value += 1


def test_a_kill_while_saving_leaves_one_whole_checkpoint(tmp_path):
    folder = save(tmp_path / "step-000001")

    def written():
        with contextlib.suppress(FileNotFoundError):  # between the two renames
            return (folder / "checkpoint.json").stat().st_mtime_ns

    for delay in (0.02, 0.05, 0.11):
        before, process = written(), fork(save_for_ever, folder)
        wait_for(lambda before=before: written() not in (before, None))
        time.sleep(delay)
        assert process.is_alive()
        kill(process)
        with lock(tmp_path):
            check_files(find_checkpoint(tmp_path))
            assert names(tmp_path)[1:] == [f"step-000001/{name}" for name in names(folder)]


def test_the_newest_checkpoint_is_found_by_number(tmp_path):
    assert find_checkpoint(tmp_path) is None and find_checkpoint(tmp_path / "nothing") is None
    for name in ("step-9", "step-000010", "step-000002", "step-best", "step-000099-good", "step-99999.old"):
        save(tmp_path / "stage1" / name)
    (tmp_path / "stage1" / "step-000500").mkdir()  # nothing in it
    (tmp_path / "stage1" / "step-000600").touch()
    newest = tmp_path / "stage1" / "step-000010"
    for place in (tmp_path, tmp_path / "stage1", newest):
        assert find_checkpoint(place) == newest


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, capsys):
    assert checkpoints.find_valid(tmp_path) is None
    first, second, third = (save(tmp_path / f"step-{step:06d}") for step in (9, 10, 11))
    assert checkpoints.find_valid(tmp_path) == third and not capsys.readouterr().err
    (third / "checkpoint.json").write_text("{")
    (second / "model.safetensors").write_bytes(b"")
    assert checkpoints.find_valid(tmp_path) == first
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and str(third) in lines[0] and str(second / "model.safetensors") in lines[1]
    (first / "ema.safetensors").unlink()
    assert checkpoints.find_valid(tmp_path) is None


def parent(folder):
    return read_meta(folder)["sha256"]["ema.safetensors"]


def test_the_last_stage_of_the_same_run_is_found(tmp_path):
    one = save(tmp_path / "stage1" / "step-000009", 1.0)
    two = save(tmp_path / "stage2" / "step-000002", 2.0, parent=parent(one))
    three = save(tmp_path / "stage3" / "step-000001", 3.0, parent=parent(two))
    four = save(tmp_path / "stage4" / "step-000001", 4.0, parent=parent(three))
    for name in ("stage4-old", "stage5x", "stage", "stage04", "old-stage4"):
        save(tmp_path / name / "step-000900", 9.0)
    assert find_checkpoint(tmp_path) == four
    save(three, 3.5, parent=parent(two))  # trained again: stage 4 is of the older run
    assert find_checkpoint(tmp_path) == three
    save(two, 2.5, parent=parent(one))
    assert find_checkpoint(tmp_path) == two
    save(three, 3.5, parent=parent(two))  # stage 4 still is of the older run
    assert find_checkpoint(tmp_path) == three


# ------------------------------------------------------------------------------------------------ Wan's files
@pytest.mark.parametrize(
    "index",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": ["x"]}}',
        '{"weight_map": {"a": "x", "b": 3}}',
        '{"weight_map": {"a": "../x.safetensors"}}',
        '{"weight_map": {"a": "/x.safetensors"}}',
        '{"weight_map": {"a": "sub/x.safetensors"}}',
        '{"weight_map": {"a": ".."}}',
        '{"weight_map": {"a": ""}}',
        "[" * 100_000,
        b"\xff\xfe",
    ],
    ids=lambda index: ascii(index[:48]),
)
def test_a_shard_index_of_junk_or_with_a_way_out_is_one_line(index, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(index if isinstance(index, bytes) else index.encode())
    for place in (path, tmp_path):
        with pytest.raises(UserError, match="model.safetensors.index.json: no index of shards") as caught:
            wan_files(place)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shard", ["absent.safetensors", "a\0b", ".", "x" * 5000])
def test_a_shard_that_cannot_be_opened_is_one_line(shard, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UserError) as caught:
        read_wan(tmp_path)
    assert "\n" not in str(caught.value)


def test_shards_and_both_styles_of_names_are_read(tmp_path):
    query = "blocks.0.attn1.to_q.weight"
    shards = {"1.safetensors": ["proj_out.weight"], "2.safetensors": [query, "proj_out.bias"]}
    weight_map = {}
    for shard, tensors in shards.items():
        save_file({name: torch.ones(1) for name in tensors}, tmp_path / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    file = read_wan(tmp_path)
    assert set(file.shapes) == {"head.head.weight", "head.head.bias", "blocks.0.self_attn.q.weight"}
    assert all(torch.equal(file.get(name), torch.ones(1)) for name in file.shapes)
    save_file({"proj_out.weight": torch.ones(1)}, tmp_path / "2.safetensors")
    with pytest.raises(UserError, match="'proj_out.weight' came before, in .*1.safetensors"):
        read_wan(tmp_path)


def test_a_folder_of_wan_without_one_network_says_what_is_expected(tmp_path):
    with pytest.raises(UserError, match="holds 0 Wan transformers; expected one, in a file or in shards"):
        wan_files(tmp_path)
    for name in "ab":
        save_file({"patch_embedding.weight": torch.ones(1), "scale_shift_table": torch.ones(1)},
                  tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"holds 2 Wan transformers \(a.safetensors, b.safetensors\); exp"):
        wan_files(tmp_path)
    (tmp_path / "high_noise_model").mkdir()
    with pytest.raises(UserError, match="two experts: give its high_noise_model or low_noise_model"):
        wan_files(tmp_path)


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


@pytest.fixture
def chunks(monkeypatch):
    monkeypatch.setattr(checkpoints, "CHUNK", 1000)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("length", [1001, 2000, 2001, 12_345])
def test_a_flipped_bit_anywhere_in_a_long_file_is_found(length, tmp_path):
    content = bytearray(os.urandom(length))
    path = tmp_path / "long"
    path.write_bytes(content)
    checksum = checkpoints.checksum_of(path)
    parts = [hashlib.sha256(content[i : i + 1000]).digest() for i in range(0, length, 1000)]
    assert checksum == "tree:" + hashlib.sha256(b"".join(parts)).hexdigest()
    plain = hashlib.sha256(content).hexdigest()
    for at in (0, 999, 1000, length // 2, length - 1):
        for expected in (checksum, plain):  # that of older checkpoints too
            os.utime(path, (1, 1))
            assert checkpoints.is_as_written(path, expected)
            content[at] ^= 4
            path.write_bytes(content)
            assert not checkpoints.is_as_written(path, expected)
            content[at] ^= 4
            path.write_bytes(content)
    for changed in (content[:-1], content + b"\0", content[1000:] + content[:1000]):
        path.write_bytes(changed)
        assert not checkpoints.is_as_written(path, checksum) and not checkpoints.is_as_written(path, plain)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("grouped, local_rank, reads", [
    (False, None, 1), (False, "1", 1), (True, "0", 1), (True, "1", 0)])
def test_a_long_file_is_read_once_and_by_one_process_of_a_machine(grouped, local_rank, reads, tmp_path,
                                                                  monkeypatch):
    folder, seen = save(tmp_path / "step-000001"), []
    big = tmp_path / "big"
    big.write_bytes(os.urandom(5000))
    folder = save(tmp_path / "step-000002", files=[big])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: grouped)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    hashes = checkpoints.checksum_of
    monkeypatch.setattr(checkpoints, "checksum_of",
                        lambda path, *how: seen.append(path.name) or hashes(path, *how))
    for _ in range(3):
        check_files(folder)
    assert seen.count("big") == reads and seen.count("model.safetensors") == 3
    big = folder / "big"
    big.unlink()
    with pytest.raises(UserError, match="big is missing or damaged"):
        check_files(folder)


@pytest.mark.usefixtures("chunks")
def test_a_checkpoint_of_before_with_plain_hashes_still_loads(tmp_path):
    (tmp_path / "big").write_bytes(os.urandom(5000))
    folder = save(tmp_path / "step-000001", files=[tmp_path / "big"])
    meta = json.loads((folder / "checkpoint.json").read_text())
    assert meta["sha256"]["big"].startswith("tree:") and len(meta["sha256"]["model.safetensors"]) == 64
    meta["sha256"] = {name: script.sha256_of(folder / name) for name in meta["sha256"]}
    (folder / "checkpoint.json").write_text(json.dumps(meta))
    check_files(folder)
    (folder / "big").write_bytes(bytes(5000))
    with pytest.raises(UserError, match="big is missing or damaged"):
        check_files(folder)


# ----------------------------------------------------------------------------------------------- weight files
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_network_that_is_not_finite_names_its_file(suffix, value, dtype, tmp_path):
    state = {name: tensor.to(dtype) for name, tensor in small().state_dict().items()}
    name = list(state)[7]
    state[name].view(-1)[3] = value
    path = write(tmp_path / f"net{suffix}", state)
    with pytest.raises(UserError, match=f"net{suffix}: '{name}' is not finite: the file is damaged"):
        load_weights(small(), read_weights(path))


FP8 = torch.float8_e4m3fn
QUANTISED = {
    "umt5_xxl_fp8_e4m3fn_scaled": ({"norm.weight": torch.ones(4).to(FP8)}, "fp8.*such as umt5_xxl_fp16.safe"),
    "wan2.1_t2v_14B_fp8_scaled": ({"scaled_fp8": torch.ones(2)}, "scaled fp8 .*as wan2.1_t2v_14B_fp16.safe"),
    "a": ({"blocks.0.ffn.0.scale_weight": torch.ones(1)}, "scaled fp8 .*take the fp16 or bf16 file"),
    "b": ({"blocks.0.ffn.0.weight_scale": torch.ones(1)}, "'blocks.0.ffn.0.weight_scale' .*scaled fp8"),
    "c": ({"x.comfy_quant": torch.ones(9).byte()}, "scaled fp8 or the like"),
    "d": ({"x": torch.ones(4).to(torch.float8_e5m2)}, "fp8"),
}


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_quantised_networks_are_refused_with_that_word_and_a_hint(name, suffix, tmp_path):
    tensors, says = QUANTISED[name]
    path = write(tmp_path / f"{name}{suffix}", tensors)
    with pytest.raises(UserError, match=says.replace(".safe", suffix)) as caught:
        load_weights(small(), read_weights(path))
    assert "quantised" in str(caught.value) and "\n" not in str(caught.value)


def test_gguf_is_said(tmp_path):
    (tmp_path / "umt5-xxl-encoder-Q8_0.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match="Q8_0.gguf is a GGUF file, quantised: take the .safetensors"):
        read_weights(tmp_path / "umt5-xxl-encoder-Q8_0.gguf")


@pytest.mark.parametrize("wrap", [lambda s: {"module." + k: v for k, v in s.items()},
                                  lambda s: {"_orig_mod." + k: v for k, v in s.items()},
                                  lambda s: {"model.diffusion_model." + k: v for k, v in s.items()},
                                  lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s, "x": "y"},
                                  lambda s: {"module": {"module." + k: v for k, v in s.items()}}])
def test_wrapped_networks_are_read(wrap, tmp_path):
    state = small().state_dict()
    torch.save(wrap(state), tmp_path / "net.pt")
    file = read_network([tmp_path / "net.pt"])
    assert file.shapes.keys() == state.keys() and all(torch.equal(file.get(k), v) for k, v in state.items())


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_without_an_index_are_read_and_a_missing_one_is_named(suffix, tmp_path):
    state = small().state_dict()
    names = list(state)
    for n in range(3):
        write(tmp_path / f"model-0000{n + 1}-of-00003{suffix}", {name: state[name] for name in names[n::3]})
    (files,) = weight_sets(tmp_path)
    assert read_network(files).shapes.keys() == state.keys()
    assert wan_files(tmp_path / f"model-00002-of-00003{suffix}") == files
    files[1].unlink()
    with pytest.raises(UserError, match=f"model-00002-of-00003{suffix}: no such file"):
        read_network(*weight_sets(tmp_path))
    write(tmp_path / f"model-00009-of-00003{suffix}", state)
    assert weight_sets(tmp_path)[-1] == [tmp_path / f"model-00009-of-00003{suffix}"]


def test_a_networks_older_twin_is_no_second_network(tmp_path):
    """diffusers' repositories hold both for a while."""
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        write(tmp_path / name, small().state_dict())
    assert weight_sets(tmp_path) == [[tmp_path / "diffusion_pytorch_model.safetensors"]]


def small():
    return randomise(UMT5(vocab=40, dim=16, ffn_dim=24, num_heads=2, num_layers=2))


def write(path, state):
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_files_load_as_saved_with_a_cast(tmp_path, suffix, dtype):
    source = small()
    path = write(tmp_path / f"net{suffix}", source.state_dict())
    with torch.device("meta"):
        meta = UMT5(vocab=40, dim=16, ffn_dim=24, num_heads=2, num_layers=2)
    for net in (meta, UMT5(vocab=40, dim=16, ffn_dim=24, num_heads=2, num_layers=2).requires_grad_(False)):
        frozen = not net.norm.weight.requires_grad
        assert load_weights(net, read_weights(path), dtype) is net
        for name, p in net.named_parameters():
            assert torch.equal(p, source.get_parameter(name).to(dtype or torch.float32)), name
            assert p.requires_grad != frozen
    path.write_bytes(b"\0" * 10)  # what was loaded does not live in the file
    net(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3))


def test_reader_and_old_files(tmp_path):
    state = small().state_dict()
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for path in (tmp_path / "old.pth", write(tmp_path / "new.safetensors", state)):
        file = read_weights(path)
        assert set(file.shapes) == set(state) and file.shapes["norm.weight"] == (16,)
        assert torch.equal(file.get("token_embedding.weight"), state["token_embedding.weight"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_loading_never_holds_two_networks(tmp_path, suffix):
    source = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(20)))
    path = write(tmp_path / f"net{suffix}", source.state_dict())
    with torch.device("meta"):
        net = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(20)))
    with LiveBytes() as live:
        load_weights(net, read_weights(path), torch.float64)
    size = sum(p.nbytes for p in net.parameters())
    mapped = size // 2 if suffix == ".pth" else 0  # all of the float32 file's tensors exist, but in its pages
    assert size <= live.peak - mapped <= size * 1.1
    old = [weakref.ref(p) for p in net.parameters()]
    load_weights(net, read_weights(path), torch.float32)
    assert not any(p() for p in old)
    file = read_weights(path)
    at, maps = file.get("0.weight").data_ptr(), Path("/proc/self/maps")
    if maps.exists():  # Linux: the tensor lies in the file's own pages
        spans = [line.split()[0].split("-") for line in maps.read_text().splitlines() if str(path) in line]
        assert any(int(start, 16) <= at < int(end, 16) for start, end in spans)


def broken_files(folder):
    """name -> (file, what the one line says)."""
    state, cases = small().state_dict(), {}
    good = {
        suffix: write(folder / f"good{suffix}", state).read_bytes() for suffix in (".safetensors", ".pth")
    }

    def case(name, content, says):
        (folder / name).write_bytes(content)
        cases[name] = says

    for suffix, content in good.items():
        case(f"empty{suffix}", b"", "is empty")
        case(f"lfs{suffix}", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git-LFS")
        case(f"html{suffix}", b"\n<!DOCTYPE html><html>", "web page")
        case(f"html2{suffix}", b"<HTML><body>", "web page")
        for at in (1, 7, 9, 100, len(content) // 2, len(content) - 1):
            case(f"cut{at}{suffix}", content[:at], "cannot be read")
        case(f"noise{suffix}", bytes(range(256)) * 40, "cannot be read")
    case("swapped.safetensors", good[".pth"], "cannot be read")
    case("swapped.pth", good[".safetensors"], "cannot be read")
    entry = '{"a":{"dtype":"%s","shape":%s,"data_offsets":%s}}'
    hostile = {
        "huge": b"\xff" * 8 + b"{}",
        "list": b"[]",
        "json": b'{"a":',
        "dtype": (entry % ("Q7", "[1]", "[0,4]")).encode(),
        "negative": (entry % ("F32", "[-1]", "[0,4]")).encode(),
        "beyond": (entry % ("F32", "[9]", "[0,36]")).encode(),
        "overflow": (entry % ("F32", "[4294967296,4294967296,4]", "[0,4]")).encode(),
        "backwards": (entry % ("F32", "[1]", "[4,0]")).encode(),
    }
    for name, header in hostile.items():
        content = header if name == "huge" else len(header).to_bytes(8, "little") + header + bytes(4)
        case(f"{name}.safetensors", content, "cannot be read")
    pickles = {"code": {"a": print}, "list": [1], "nested": {"step": 3, "weights": state}, "number": 3}
    pickles["numbered"] = {0: torch.ones(1)}
    for name, value in pickles.items():
        torch.save(value, folder / f"{name}.pth")
        cases[f"{name}.pth"] = "cannot be read" if name == "code" else "expected a dict of tensors"

    for suffix in good:

        def altered(name, says, suffix=suffix, **changes):
            new = {key: value for key, value in {**state, **changes}.items() if value is not None}
            write(folder / f"{name}{suffix}", new)
            cases[f"{name}{suffix}"] = says

        fc2 = "blocks.1.ffn.fc2.weight"
        altered("missing", "21 tensors came, 22 expected; 1 missing ('norm.weight')", **{"norm.weight": None})
        altered("extra", "23 tensors came, 22 expected; 1 unknown ('bias')", bias=torch.zeros(3))
        altered(
            "renamed",
            "22 tensors came, 22 expected; 1 missing ('norm.weight'); 1 unknown ('norm.gamma')",
            **{"norm.weight": None, "norm.gamma": torch.ones(16)},
        )
        altered(
            "transposed",
            f"1 mis-shaped ('{fc2}' (24, 16) instead of (16, 24))",
            **{fc2: state[fc2].T.contiguous()},
        )
        altered(
            "integers", "is torch.int64, expected torch.float32", **{"norm.weight": torch.ones(16).long()}
        )
        blank = dict.fromkeys(state)
        altered(
            "other",
            "22 missing ('token_embedding.weight', 'blocks.0.norm1.weight', '",
            x=torch.ones(1),
            **blank,
        )
    cases["absent.pth"] = "no such file"
    (folder / "folder.pth").mkdir()
    cases["folder.pth"] = "not a file"
    return cases


def test_every_bad_file_gives_one_clear_line(tmp_path):
    for name, says in broken_files(tmp_path).items():
        with pytest.raises(UserError) as caught:
            load_weights(small(), read_weights(tmp_path / name))
        line = str(caught.value)
        assert says in line and name in line and "\n" not in line and len(line) < 600, line


def test_mutated_safetensors_never_surprise(tmp_path):
    """Any flipped byte of the header: the network loads, or one UserError."""
    good, path = (
        write(tmp_path / "good.safetensors", small().state_dict()).read_bytes(),
        tmp_path / "bad.safetensors",
    )
    torch.manual_seed(0)
    refused = 0
    for at in torch.randint(0, 8 + int.from_bytes(good[:8], "little"), (150,)).tolist():
        path.write_bytes(good[:at] + bytes([good[at] ^ int(torch.randint(1, 256, ()))]) + good[at + 1 :])
        try:
            load_weights(small(), read_weights(path))
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 100
