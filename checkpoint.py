"""What all scripts share, and every file that holds weights. Knows no network.

  errors and arguments   UserError, run_script, Parser and the types of its flags; precision
  what is printed        progress: a bar on a terminal, lines elsewhere; Printable: no control characters
  files                  atomic_file and atomic_folder: written whole or not at all; lock; check_outputs
  weight files           any .safetensors or torch.save file, read tensor by tensor; shards and foreign names
  Wan's files            a transformer or two experts, as Wan, diffusers and ComfyUI store them
  our checkpoints        a folder with safetensors and a readable checkpoint.json
"""
import argparse
import array
import atexit
import codecs
import contextlib
import errno
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn as nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: no locks there
    fcntl = None


# -------------------------------------------------------------------------------------- errors and arguments
class UserError(ValueError):
    """A wrong input. Scripts print its message as their one line and exit with 1."""


def run_script(main, less_memory="a smaller job"):
    """Run main(); turn what a user can cause into one line that begins with the script's name.
    less_memory  what to try where memory ran out"""
    script = Path(sys.argv[0]).name
    atexit.unregister(say_what_it_is)
    for name in ("stdin", "stdout", "stderr"):  # one that is closed (2>&-) would make any print an error, and
        if getattr(sys, name) is None:  # the next file that opens would get its number
            setattr(sys, name, open(os.devnull, "r+"))
    sys.stdout, sys.stderr = Printable(sys.stdout), Printable(sys.stderr)

    def fail(message, code=1):
        line = " ".join(str(message).split())
        print(f"{script}: {line if len(line) < 1500 else line[:1500] + ' ...'}", file=sys.stderr)
        sys.exit(code)
    try:
        for argument in sys.argv[1:]:
            if not is_text(argument):
                fail(f"the argument {ascii(argument)} is not valid UTF-8")
        main()
        if "TORCHELASTIC_RUN_ID" in os.environ:  # under torchrun threads of gloo, while Python shuts down,
            sys.stdout.flush()  # aborted one in ten sharded trainings that had ended well
            sys.stderr.flush()
            os._exit(0)
    except KeyboardInterrupt as stop:
        fail(str(stop) or "stopped", 130)
    except (MemoryError, torch.OutOfMemoryError) as error:
        cause = ". ".join(str(error).split(". ")[:2])
        fail(f"out of memory{cause and f' ({cause})'}; try {less_memory}")
    except (UserError, OSError, safetensors.SafetensorError) as error:
        fail(error)
    except RuntimeError as error:
        if re.search("(can't|cannot) allocate memory|bad_alloc|out of memory|ALLOC_FAILED", str(error), re.I):
            fail(f"out of memory; try {less_memory}")  # torch's words, on a CPU and on a card
        if "gloo" not in str(error) and not isinstance(error, torch.distributed.DistError):
            raise
        fail("another process of this run has ended: its own message says why")


@atexit.register
def say_what_it_is(ours=Path(__file__).resolve().parent):
    """A file of ours that is started but no script says what it holds; run_script calls this off."""
    file, words = Path(sys.argv[0]), sys.modules["__main__"].__doc__
    if file.resolve().parent == ours and words:
        words = " ".join(words.split("\n\n")[0].split())
        print(f"{file.name} is no command but a part of the others, which README.md lists: {words}")


class Printable:
    """A text stream without the control characters of a caption or a file name, which could write anything
    anywhere on a terminal, and without an error where its encoding lacks a letter. What moves a bar of tqdm
    comes on its own, or is a first \\r."""
    MOVES = re.compile(r"(\n|\x1b\[A)*")
    CONTROL = re.compile(r"(?!^\r)[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        if not self.MOVES.fullmatch(text):
            text = self.CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
        return self.stream.write(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


class progress:
    """How far something is that takes long: a bar of tqdm on a terminal, elsewhere (nohup, Slurm) a line at
    most `every` seconds, so that what takes less says nothing.

    for item in progress(items, "measuring", "videos"): ...        counts the items
    with progress(None, "encoding", "clips", total=90) as bar: bar.update(64)
    done: how many were there before; show: does this process say anything; note: stands behind the numbers
    """

    def __init__(self, items, what, unit, total=None, done=0, show=True, every=30):
        self.items, self.what, self.unit = items, what, unit
        self.total = len(items) if total is None else total
        self.done = self.first = done
        self.every = every
        self.began = self.said = time.monotonic()
        self.note, self.lines, self.bar = "", show and not sys.stderr.isatty(), None  # note: see tell
        if show and not self.lines:
            self.bar = tqdm(desc=what, unit=f" {unit}", total=self.total, initial=done, leave=None,
                            ncols=shutil.get_terminal_size().columns)  # 80 where a terminal says 0 (docker)

    def update(self, n=1):
        self.done += n
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(n)
        elif self.lines and time.monotonic() - self.said >= self.every:
            self.say()

    def tell(self, note):
        """Put words behind the numbers. Where there are lines, one comes with the next update."""
        self.note, self.said = note, -math.inf

    def say(self):
        """A line now, where there are lines."""
        if self.lines and self.done > self.first:
            self.said = time.monotonic()
            each = (self.said - self.began) / (self.done - self.first)
            left = round(each * (self.total - self.done))
            left = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
            print(f"{self.what}: {self.done} of {self.total} {self.unit}, {each:.3g} s each, {left}"
                  + (f", {self.note}" if self.note else ""), file=sys.stderr, flush=True)

    @staticmethod
    def write(text, file=None):
        """Print a line that leaves a bar whole."""
        tqdm.write(text, file or sys.stdout)
        (file or sys.stdout).flush()

    def __iter__(self):
        with self:
            for item in self.items:
                yield item
                self.update()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()


def is_text(value):
    """Is it a string that can be printed and written (no lone surrogates)."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Names a flag's default, where its help does not."""

    def _get_help_string(self, action):
        own = action.default in ([], None) or action.default is False or "(default" in action.help
        return action.help if own else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a UserError of one line, flags must be written out in full, and ~/ is the
    home also behind a = (--out=~/x, left=~/a.png), where no shell says so."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": Help, "allow_abbrev": False} | options)

    def parse_args(self, args=None, namespace=None):
        def at_home(word):
            flag, path = re.match(r"((?:[\w-]+=)?)(.*)", word, re.DOTALL).groups()
            return flag + os.path.expanduser(path) if path.startswith("~/") else word
        return super().parse_args(list(map(at_home, sys.argv[1:] if args is None else args)), namespace)

    def error(self, message):
        raise UserError(message.removeprefix("argument "))


def in_range(kind, low, high, expected):
    """A type for add_argument: an int or float from low to high, both included, never nan."""
    def read(text):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"got {text[:40]!r}, expected {expected}")
        return value
    return read


count = in_range(int, 1, 10**7, "a whole number from 1 to 10 million")
seed_number = in_range(int, 0, 2**63 - 1, "a whole number from 0 to 2**63 - 1")
positive = in_range(float, 1e-30, 1e6, "a number above 0, at most a million")
not_negative = in_range(float, 0, 1e6, "a number from 0 to a million")
fraction = in_range(float, 0, math.nextafter(1, 0), "a number from 0 to below 1")
frame_rate = in_range(int, 1, 240, "1 to 240 frames a second")


def nonempty(text):
    """A type for add_argument: any text but an empty one."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def is_seed(value):
    """What every generator here can be seeded with."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def uses_bf16(device, precision="auto"):
    """Are matmuls in bf16? auto: what the environment variable HARMOVIEW_PRECISION says ("bf16" or "fp32"),
    else yes on GPUs and on CPUs that multiply it in hardware (1.5x a step)."""
    precision = os.environ.get("HARMOVIEW_PRECISION", "auto") if precision == "auto" else precision
    if precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"HARMOVIEW_PRECISION={precision}: expected bf16 or fp32")
    if precision == "auto":
        return device.type == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return precision == "bf16"


def autocast(device, precision="auto"):
    """Matmuls in bf16 or fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device, precision))


# ------------------------------------------------------------------------------------------------------ files
HOST = re.sub(r"\W", "", socket.gethostname())[:40] or "host"  # machines may share a folder


def temporary_name(path, state="unfinished"):
    return path.with_name(f".{state}-{HOST}.{os.getpid()}-{path.name}")


def remove(path):
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path):
    """Give the error of a full disk the name of what was to be written: it has none, or a temporary one."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        number = re.search(r"os error (\d+)", str(error))  # safetensors' way to say it
        number = int(number[1]) if number else getattr(error, "errno", None)
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(number, os.strerror(number), str(path)) from None


@contextlib.contextmanager
def atomic_file(path):
    """Yield a name beside `path` to write to; on success the new file replaces `path`, on failure it goes.
    Where `path` is a link, what it leads to is replaced, as if it were written in place."""
    path = Path(os.path.realpath(path))
    temporary = temporary_name(path)
    try:
        with naming(path):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        remove(temporary)


@contextlib.contextmanager
def atomic_folder(folder):
    """Yield a new folder to fill; on success it replaces `folder`, on failure it is deleted."""
    folder = Path(os.path.abspath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = temporary_name(folder), temporary_name(folder, "replaced")
    remove(temporary)
    try:
        with naming(folder):
            temporary.mkdir()
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
        if os.path.lexists(folder):
            os.replace(folder, old)  # lock() brings it back where a kill comes before the next line
        os.replace(temporary, folder)
        remove(old)
    finally:
        remove(temporary)


def is_running(pid):
    """Is that another process that has not ended."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return pid != os.getpid()


@functools.cache
def say_no_locks(reason):
    print(f"this file system has no locks ({reason}): see to it that no other process writes there too",
          file=sys.stderr, flush=True)


def take_lock(file, wait=True):
    """Lock an open file for this process; False where another one holds it and we do not wait. Where there
    are no locks (some NFS, Lustre, FUSE), say so once and go on."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        say_no_locks(os.strerror(error.errno))
    return True


@contextlib.contextmanager
def lock(folder, wait=False, name=""):
    """Hold `folder` for this process and delete what killed ones left unfinished below it.
    Raises UserError where another process holds it; with wait (caches), waits for that one to end. name: hold
    only files that begin so."""
    folder = Path(folder)
    probe_writable(folder)
    with open(folder / (".cache-lock" if wait else f".{name}{'.' * bool(name)}lock"), "a+") as file:
        if not take_lock(file, wait=False):
            file.seek(0)  # it is still empty where the holder has only just come
            if not wait:
                raise UserError(f"{folder / name} is in use by process {file.read() or '?'}: "
                                f"wait for it, or choose another {'--out' if name else 'folder'}")
            print(f"waiting for process {file.read() or '?'}, which uses {folder}", flush=True)
            take_lock(file)
        file.truncate(0)
        print(os.getpid(), end="", file=file, flush=True)
        for left in [*folder.glob(".*-*-*"), *folder.glob("*/.*-*-*")]:
            match = re.fullmatch(rf"\.(?P<state>unfinished|replaced)-{HOST}\.(?P<owner>\d+)-(?P<name>.+)",
                                 left.name)
            if not match or is_running(int(match["owner"])):
                continue  # the user's, or of another script, which may write here without the lock
            if match["state"] == "replaced" and not os.path.lexists(left.with_name(match["name"])):
                os.replace(left, left.with_name(match["name"]))
            else:
                remove(left)
        try:
            yield
        finally:
            if name:  # in a folder of the user's
                Path(file.name).unlink(missing_ok=True)


def probe_writable(folder):
    """Make a folder, and fail before any work where it cannot be written."""
    try:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        probe = temporary_name(folder / "probe")
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another folder") from None


def check_outputs(outputs, inputs):
    """UserError where a file to be written is one of those to be read, also through links."""
    read = {os.path.realpath(path) for path in inputs}
    for path in outputs:
        if os.path.realpath(path) in read:
            raise UserError(f"{path} is one of the inputs and would be overwritten: choose another --out")
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f"{path} is a folder or a device, expected a file to write: choose another --out")
        try:  # a name that is too long, say, is an error now
            temporary_name(Path(path)).touch()
            temporary_name(Path(path)).unlink()
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror}): choose another --out") from None


def read_lines(path):
    """The JSON objects of a .jsonl file that we wrote ourselves; a line cut off by a kill is left out."""
    lines = []
    if Path(path).is_file():  # not a pipe, which would never end
        for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError, RecursionError):
                lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


class Lines:
    """The lines of a text file, bytes, those aside that are blank; each is read when it is asked for, and in
    memory it is two numbers: where it begins, and its place among all lines, from 1 on. A file that is
    replaced meanwhile is read to its end as it was.
    text  what is in the file, where that is no UTF-8"""

    def __init__(self, path, text=None):
        self.path, self.places, self.numbers, place = Path(path), array.array("q"), array.array("q"), 0
        self.file, self.lock = open(path, "rb") if text is None else io.BytesIO(text.encode()), Lock()
        for number, line in enumerate(self.file, 1):
            if line.strip():
                self.places.append(place)
                self.numbers.append(number)
            place += len(line)

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        with self.lock:  # batches are prepared by a thread
            self.file.seek(self.places[index])
            return self.file.readline()

    def __iter__(self):
        return map(self.__getitem__, range(len(self)))


def read_text(path, spare=False):
    """The text of a user's file, its lines ended by a newline: UTF-8; or UTF-16 by its mark or its zero
    bytes, which is said once a folder. One old code page cannot be told from another, so these are refused,
    with what the words would be in some of them.
    spare  bytes that are no text become \\ufffd: for files where a damaged line shall cost itself alone"""
    if not Path(path).is_file():  # a pipe would never end
        raise UserError(f"{path}: not a readable text file "
                        f"({'a folder or a device' if Path(path).exists() else 'no such file'})")
    data = Path(path).read_bytes()
    kind = encoding_of(data)
    try:
        text = data.decode("utf-8-sig" if kind == "UTF-8" else kind, "replace" if spare else "strict")
    except UnicodeDecodeError as error:
        if kind != "UTF-8":
            raise UserError(f"{path}: not a readable text file ({kind}, cut short or damaged)") from None
        line = data.count(b"\n", 0, error.start) + 1
        words = data[:error.start].split(b"\n")[-1][-12:] + data[error.start:].split(b"\n")[0][:12]
        pages = (f"{page}: {codecs.getincrementaldecoder(page)('replace').decode(words)!r}"
                 for page in ("CP1251", "CP1252", "GB18030"))
        raise UserError(f"{path}: not a readable text file (line {line} is not UTF-8; in old code pages it "
                        f"has {', '.join(pages)}): convert it, for example with "
                        f"iconv -f CP1251 -t UTF-8 {Path(path).name} > new") from None
    if kind != "UTF-8" and (Path(path).parent, kind) not in said_encodings:
        said_encodings.add((Path(path).parent, kind))
        print(f"{path}: read as {kind}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


said_encodings = set()  # (folder, encoding): ten thousand captions are one message


def encoding_of(data):
    """What the bytes of a text are in, by their mark or their zero bytes, else UTF-8."""
    for kind, marks in {"UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),  # UTF-16's begins alike
                        "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}.items():
        if data.startswith(marks):
            return kind
    zeros = data[::2].count(0), data[1::2].count(0)
    if max(zeros) > 2 * min(zeros) and 50 * sum(zeros) >= len(data):
        kind = "UTF-16-BE" if zeros[0] > zeros[1] else "UTF-16-LE"
        # of Latin text each other byte is zero; of others the spaces' only, but as UTF-8 they are nothing
        plain = 4 * sum(zeros) < len(data) and not re.search(rb"[\x01-\x08\x0e-\x1f\x80-\xff]", data)
        controls = re.search("[\0-\x08\x0e-\x1f\ufffd]", data.decode(kind, "replace"))
        return "UTF-8" if plain or controls else kind
    return "UTF-8"


def fingerprint(*parts):
    """A name for what these JSON-able parts say: equal parts, equal names, on any machine. A Path among them
    counts with the content of its file, not with its name."""
    text = json.dumps(parts, sort_keys=True, default=content_of)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def content_of(path, ends=2**20, pages=256, page=4096):
    """A hash of a file: of all of it, or, where it is large, of its length, its ends (there a torch.save file
    lists the checksums of its tensors) and so many pages between. It tells one network from another in a
    moment, and is no proof against damage."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    between = [(size * i // (pages + 1), page) for i in range(1, pages + 1)]
    parts = [(0, ends), *between, (size - ends, ends)]
    with open(path, "rb") as file:
        for start, length in parts if size > 4 * ends else [(0, size)]:
            file.seek(start)
            digest.update(file.read(length))
    return digest.hexdigest()


def source_hash(*modules):
    """A short hash of these files' text. It is a part of a cache's name, so changed code never reads an old
    cache."""
    code = b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in modules)
    return hashlib.sha256(code).hexdigest()[:8]


# ----------------------------------------------------------------------------------------------- weight files
@contextlib.contextmanager
def as_user_error(path):
    """Turn whatever a file reader raises into one UserError that names the file."""
    try:
        yield
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None
    except torch.OutOfMemoryError:  # of the card that tensors go to: the file is sound
        raise
    except Exception as error:  # safetensors, zipfile and pickle raise a dozen kinds
        cause = re.split(r"\. |\n", str(error))[0][:120]  # torch goes on with advice
        raise UserError(f"{path} cannot be read: cut short, damaged or no such file format "
                        f"({type(error).__name__}: {cause})") from None


class WeightFile(NamedTuple):
    """The named tensors of one .safetensors or torch.save file, memory-mapped."""
    path: Path
    shapes: dict  # name -> tuple
    get: Callable  # name -> tensor as stored, on the CPU; perhaps the file's own pages, so do not write to it
    refused: str = ""  # why no network can be filled from it


QUANTISED = re.compile(  # names of what goes with weights of few bits
    r"(?:.*\.)?(scaled_fp8|scale_(weight|input)|(weight|input)_scale(_\w+)?|comfy_quant|absmax)")
NESTED = "state_dict", "model_state_dict", "model", "module"  # what torch.save files hold the tensors below


def refuse_quantised(path, dtypes):
    """dtypes: {name: its dtype as text} -> why such a file is not read, or ""."""
    for name, dtype in dtypes.items():
        fp8 = re.search("float8|^F8", dtype)
        if fp8 or QUANTISED.fullmatch(name):
            other = re.sub(r"fp8(_e\dm\d\w*)?(_scaled)?", "fp16", Path(path).name)
            what = f"in {dtype}, fp8" if fp8 else "there: scaled fp8 or the like"
            return (f"{path} is quantised ({name!r} is {what}), which is not read: take the fp16 or bf16 "
                    "file" + (f", such as {other}" if other != Path(path).name else ""))
    return ""


def read_weights(path):
    """-> WeightFile; UserError in one line for a file that is missing, empty, damaged or something else."""
    with as_user_error(path):
        if not Path(path).is_file():  # a folder, or a pipe that would never end
            raise UserError(f"{path}: {'not a file' if Path(path).exists() else 'no such file'}")
        with open(path, "rb") as file:
            head = file.read(64).lstrip().lower()
        if not head:
            raise UserError(f"{path} is empty")
        if head.startswith(b"version https://git-lfs"):
            raise UserError(f"{path} is a git-LFS pointer, not the weights; run `git lfs pull` beside it")
        if head.startswith((b"<!doctype", b"<html")):
            raise UserError(f"{path} is a web page, not weights; download it again")
        if head.startswith(b"gguf"):
            raise UserError(f"{path} is a GGUF file, quantised: take the .safetensors in fp16 or bf16")
        if str(path).endswith(".safetensors"):
            file = safetensors.safe_open(path, "pt")
            slices = {name: file.get_slice(name) for name in file.keys()}
            refused = refuse_quantised(path, {name: part.get_dtype() for name, part in slices.items()})
            return WeightFile(path, {name: tuple(part.get_shape()) for name, part in slices.items()},
                              file.get_tensor, refused)
        # torch maps zip files only; those of torch < 1.6 are read whole
        with warnings.catch_warnings(action="ignore"):  # its hints at a pickle that is refused
            tensors = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        for name in NESTED:
            if isinstance(tensors, dict) and isinstance(tensors.get(name), dict):
                tensors = tensors[name]
        if not isinstance(tensors, dict) or not all(
                isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in tensors.items()):
            raise UserError(f"{path} holds a {type(tensors).__name__}, expected a dict of tensors only")
        refused = refuse_quantised(path, {name: str(tensor.dtype) for name, tensor in tensors.items()})
        return WeightFile(path, {name: tuple(t.shape) for name, t in tensors.items()}, tensors.__getitem__,
                          refused)


SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".gguf")  # the last one, to say why not
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<suffix>\.\w+)")


def shards_of(path):
    """A weight file, one of several shards, or their index -> all files of that network."""
    path = Path(path)
    shard = SHARD.fullmatch(path.name)
    if shard and 1 <= int(shard["number"]) <= int(shard["total"]) <= 1000:
        return [path.with_name(f"{shard['stem']}-{n:05d}-of-{shard['total']}{shard['suffix']}")
                for n in range(1, int(shard["total"]) + 1)]
    if not path.name.endswith(".index.json"):
        return [path]
    if not path.is_file():
        raise UserError(f"{path}: not a file")
    try:
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        if any(Path(shard).name != shard or shard in ("", "..") for shard in shards):
            raise ValueError("a shard lies outside its folder")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: no index of shards ({type(error).__name__}: {error})") from None
    return [path.with_name(shard) for shard in shards]


def weight_sets(folder, depth=0):
    """The files of each network in a folder, and in its folders to that depth: [[file, ...], ...]. Not those
    of our own checkpoints below it; .bin files, diffusers' older twins, only where no .safetensors is."""
    folder, sets = Path(folder), []
    if not folder.is_dir():
        return sets
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in entries if path.name.endswith(SUFFIXES) and path.is_file()]
    indexes = [path for path in entries if re.fullmatch(r".+\.(safetensors|bin)\.index\.json", path.name)]
    for path in [*indexes, *files]:
        if not any(path in files for files in sets):
            sets.append(shards_of(path))
    safe = any(path.suffix == ".safetensors" for path in files)
    sets = [files for files in sets if not (safe and files[0].suffix == ".bin")]
    for path in entries if depth else ():
        if not (path / "checkpoint.json").is_file():
            sets += weight_sets(path, depth - 1)
    return sets


# around all names: of wrappers, of ComfyUI's and of trainers' files
WRAPPED = re.compile(r"^(?:(?:module|_orig_mod|model|diffusion_model|dit|dinov2)\.)+")


def read_network(files, names=()):
    """The files of one network -> WeightFile with our names. names: a table of (regular expression, what
    takes its place, or None to leave the tensor out). "NAME|i" is the i-th part of NAME's rows."""
    sources, refused = {}, ""
    for file in map(read_weights, files):
        refused = refused or file.refused
        for stored, shape in file.shapes.items():
            ours = rename(stored, names)
            name, _, part = (ours or "").partition("|")
            if part in sources.get(name, ()):
                raise UserError(f"{file.path}: {stored!r} came before, in {sources[name][part][0].path}")
            if name:
                sources.setdefault(name, {})[part] = file, stored, shape
    shapes = {}
    for name, parts in sources.items():
        rows = [shape for _, _, shape in parts.values()]
        shapes[name] = rows[0] if len(rows) == 1 else (sum(shape[0] for shape in rows), *rows[0][1:])

    def get(name):
        tensors = []
        for _, (file, stored, _) in sorted(sources[name].items()):
            with as_user_error(file.path):
                tensors.append(file.get(stored))
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    path = files[0] if len(files) == 1 else files[0].parent
    return WeightFile(path, shapes, get, refused)


def rename(name, names):
    """A stored tensor's name in ours, by such a table; None where the tensor is to be left out."""
    name = WRAPPED.sub("", name)
    for pattern, ours in names:
        if ours is not None:
            name = re.sub(pattern, ours, name)
        elif re.match(pattern, name):
            return None
    return name


def check_fit(module, file, may_lack=()):
    """UserError, one line with the differences, where a WeightFile's names and shapes are not module's;
    returns the names that only module has, which all begin with one of `may_lack`. Reads no weights."""
    if file.refused:
        raise UserError(file.refused)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    absent = [name for name in expected if name.startswith(tuple(may_lack)) and name not in file.shapes]
    both = [name for name in expected if name in file.shapes and file.shapes[name] != expected[name]]
    wrong = {"missing": [repr(name) for name in expected if name not in file.shapes and name not in absent],
             "unknown": [repr(name) for name in file.shapes if name not in expected],
             "mis-shaped": [f"{name!r} {file.shapes[name]} instead of {expected[name]}" for name in both]}
    parts = [f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
             for kind, names in wrong.items() if names]
    if parts:
        raise UserError(f"{file.path} does not fit {type(module).__name__}: {len(file.shapes)} tensors came, "
                        f"{len(expected) - len(absent)} expected; " + "; ".join(parts))
    return absent


def put_tensor(module, name, tensor, dtype=None, device=None):
    """Put a copy of tensor where module has `name`, cast and moved; module may be on the meta device.
    dtype, device: None keeps the module's own (for meta, the CPU). Of a sharded module this process's part.
    A parameter is replaced, not written to: load before an optimizer is built."""
    owner, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner)
    old = getattr(owner, leaf)
    if tensor.is_floating_point() != old.is_floating_point():
        raise UserError(f"{name!r} is {tensor.dtype}, expected {old.dtype}")
    dtype = dtype if dtype and old.is_floating_point() else old.dtype
    if hasattr(old, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor
        tensor = distribute_tensor(tensor.to(old.device_mesh.device_type, dtype, copy=True), old.device_mesh,
                                   old.placements, src_data_rank=None)  # None: every process has the tensor
    else:
        tensor = tensor.to(device or ("cpu" if old.is_meta else old.device), dtype, copy=True)
    setattr(owner, leaf, nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor)


def load_weights(module, file, dtype=None, device=None, may_lack=()):
    """Fill module from a WeightFile and return it; names and shapes must agree as check_fit says.
    Tensor by tensor, as put_tensor, so no second copy of the network ever exists. UserError for a NaN."""
    check_fit(module, file, may_lack)
    for name in file.shapes:
        with as_user_error(file.path):
            tensor = file.get(name)
            if tensor.is_floating_point() and tensor.numel():
                if not torch.stack(tensor.aminmax()).isfinite().all():
                    raise UserError(f"{name!r} is not finite: the file is damaged, or its training diverged")
            put_tensor(module, name, tensor, dtype, device)
    return module


def layers_of(shapes):
    """How many blocks a network has whose tensors bear these names."""
    return len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})


# ------------------------------------------------------------------------------------------------ Wan's files
DIFFUSERS_NAMES = (
    (r"^condition_embedder\.(time|text)_embedder\.linear_1", r"\1_embedding.0"),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2", r"\1_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"^scale_shift_table", "head.modulation"), (r"\.scale_shift_table", ".modulation"),
    (r"^proj_out", "head.head"),
    (r"\.attn1\.", ".self_attn."), (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])\.", r".\1."), (r"\.to_out\.0\.", ".o."),
    (r"\.norm2\.", ".norm3."),  # diffusers numbers the norms in order of use; Wan's norm2 has no weights
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."), (r"\.ffn\.net\.2\.", ".ffn.2."))


def original_name(name):
    """A tensor's name in diffusers' style -> its name in Wan's own."""
    return rename(name, DIFFUSERS_NAMES)


# folders of Wan2.2's two experts, the one for high noise first: Wan's own names, and diffusers'
EXPERTS = ("high_noise_model", "low_noise_model"), ("transformer", "transformer_2")
ROLES = ("high", "low")  # by the noise that each works at


def role_of(path):
    """The expert that the name of a file or folder tells: "high", "low" or None."""
    if Path(path).name == EXPERTS[1][1]:  # while any single network of diffusers is a `transformer`
        return "low"
    begins = "(?:(?<![A-Za-z])|(?=[A-Z]))"  # of a word, also inside oneLikeThis
    words = {w.lower() for w in re.findall(f"{begins}((?i:high|low))[-_ ]?(?i:noise)", Path(path).name)}
    # in capitals these words need no "noise"; "high_quality" is no expert
    words = words or {w.lower() for w in re.findall("(?<![A-Za-z])(HIGH|LOW)(?![A-Za-z])", Path(path).name)}
    return words.pop() if len(words) == 1 else None


def expert_folders(path):
    """The two networks of a Wan2.2 checkpoint, high noise first: folders, or, as ComfyUI has them, files (or
    the first shard of each). None where there is no pair; `transformer` alone is none."""
    own, diffusers = ([Path(path) / name for name in pair] for pair in EXPERTS)
    if own[0].is_dir() or own[1].is_dir():
        return own
    if diffusers[1].is_dir() or (Path(path) / "checkpoint.json").is_file():
        return diffusers if diffusers[1].is_dir() else None
    files = [network[0] for network in find_wan(path)]
    return sorted(files, key=role_of) if sorted(map(str, map(role_of, files))) == list(ROLES) else None


def boundary_of(path):
    """The noise level where Wan2.2's experts change, as diffusers noted it in model_index.json, or None."""
    try:
        boundary = json.loads((Path(path) / "model_index.json").read_text())["boundary_ratio"]
        return float(boundary) if 0 < boundary < 1 else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def release_folder(path):
    """The folder of a release that has a text encoder: path, or, of a transformer's folder or file, one or
    two levels up; path where there is none."""
    path = Path(path)
    for folder in (path, *Path(os.path.abspath(path)).parents[:2], *path.resolve().parents[:2]):
        if any(any(folder.glob(name)) for name in ("models_t5*", "*umt5*", "text_encoder*", "google/umt5*")):
            return folder
    return path


def find_wan(path):
    """The files of each Wan transformer at path, which is one of its files or a folder of them, perhaps with
    other networks. Found by name, or else by what the files hold; [] where there is none."""
    path = Path(path)
    if not path.is_dir():
        return [shards_of(path)] if path.is_file() or path.name.endswith(".index.json") else []
    here = weight_sets(path)
    named = [files for files in here if re.search(r"diffusion\w*_model", files[0].name)]
    if len(named) == 1:
        return named
    everything, found, faults = weight_sets(path, depth=2), {}, []
    if len(everything) == 1:
        return everything
    for files in everything:
        try:
            file = read_network(files, DIFFUSERS_NAMES)
            if {"patch_embedding.weight", "head.modulation"} <= file.shapes.keys():
                found[tuple(files)] = file.refused
        except UserError as error:
            faults.append(error)
    whole = [list(files) for files, refused in found.items() if not refused]
    if not found and faults:
        raise faults[0]
    return whole or [list(files) for files in found]


def wan_files(path):
    """A weight file, its index, or a folder with either -> the files that hold the network."""
    path = Path(path)
    if not path.is_dir():
        return shards_of(path)
    if experts := expert_folders(path):
        raise UserError(f"{path} holds two experts: give its {' or '.join(f.name for f in experts)}, or "
                        "train.py's --expert")
    path = path / "transformer" if (path / "transformer").is_dir() else path  # diffusers' pipelines
    found = find_wan(path)
    if len(found) != 1:
        names = f" ({', '.join(files[0].name for files in found[:4])})" if found else ""
        raise UserError(f"{path} holds {len(found)} Wan transformers{names}; expected one, in a file or in "
                        "shards: give the file, or another folder")
    return found[0]


def read_wan(path):
    """A checkpoint with any of the known names, in any number of files -> WeightFile with Wan's own names."""
    return read_network(wan_files(path), DIFFUSERS_NAMES)._replace(path=path)


# -------------------------------------------------------------------------------------------- our checkpoints
def save_tensors(path, tensors):
    """A safetensors file of these tensors, as readable for others as the user's other files."""
    safetensors.torch.save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, path)
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def save_checkpoint(folder, tensors, meta, files=(), keep=None, shards=None):
    """Write a checkpoint folder that is either there whole or not at all, and remove all but the newest
    `keep` steps next to it, where a number is given.

    tensors  {"model": state dict, ...}, one safetensors file each
    meta     JSON-able; "sha256" of every file is added
    files    further files that the checkpoint needs, copied into it
    shards   a folder of files of torch.distributed.checkpoint, which move into it
    """
    folder = Path(folder)
    check_replaceable(folder)
    with atomic_folder(folder) as build:
        for name, state in tensors.items():
            save_tensors(build / f"{name}.safetensors", state)
        for file in files:
            shutil.copy(file, build)
        for file in shards.iterdir() if shards else ():
            os.replace(file, build / file.name)
        if shards:
            shards.rmdir()
        sha256 = {f.name: checksum_of(f) for f in sorted(build.iterdir())}
        (build / "checkpoint.json").write_text(json.dumps({**meta, "sha256": sha256}, indent=1))
    if keep:
        others = [step for step in steps_in(folder.parent) if step != folder]
        for old in others[:max(0, len(others) + 1 - keep)]:
            delete_checkpoint(old)


def delete_checkpoint(folder):
    os.replace(folder, temporary_name(folder))  # a kill must not leave half of it under its name
    remove(temporary_name(folder))


def check_replaceable(folder):
    """UserError where a checkpoint saved at `folder` would destroy what is there and is none.
    A training asks for all its names before its first step."""
    folder = Path(folder)
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not empty and not (folder / "checkpoint.json").is_file():
        raise UserError(f"{folder} is not a checkpoint and would be replaced by one: move it away")


def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


CHUNK = 2**26  # bytes that a thread hashes at a time
TREE = "tree:"  # before the hash of a longer file: the sha256 of its chunks' sha256s


def checksum_of(path, tree=None):
    """What checkpoint.json keeps of a file: its sha256, or, above CHUNK bytes, TREE and the tree's, which all
    cores compute together. tree: which of the two, whatever the length."""
    size = os.path.getsize(path)
    if not (size > CHUNK if tree is None else tree):
        return sha256_of(path)

    def hash_chunk(start):
        digest, end = hashlib.sha256(), min(start + CHUNK, size)
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while piece := file.read(min(2**20, end - file.tell())):
                digest.update(piece)
        return digest.digest()
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as threads:
        return TREE + hashlib.sha256(b"".join(threads.map(hash_chunk, range(0, size, CHUNK)))).hexdigest()


@functools.lru_cache(maxsize=1024)
def checksum_once(path, tree, *_):
    return checksum_of(path, tree)


def is_as_written(path, checksum):
    """Does a file have that checksum. A long one is read once by a process, unless its time stamp changes;
    and by one process of a machine: where that one stops, torchrun ends the others."""
    stat, tree = path.stat(), str(checksum).startswith(TREE)
    if stat.st_size <= CHUNK:
        return checksum_of(path, tree) == checksum
    if torch.distributed.is_initialized() and os.environ.get("LOCAL_RANK", "0") != "0":
        return True
    return checksum_once(path, tree, stat.st_size, stat.st_mtime_ns, stat.st_ino) == checksum


def steps_in(folder):
    """The checkpoints step-NNN of a stage's folder, oldest first; nothing else counts as one."""
    steps = [f for f in Path(folder).glob("step-*")
             if re.fullmatch(r"step-\d{1,12}", f.name) and (f / "checkpoint.json").is_file()]
    return sorted(steps, key=lambda f: int(f.name[5:]))


def find_checkpoint(path):
    """The checkpoint folder at `path`, or the newest one below it (of a stage, or of a run's last stage),
    or None. A stage whose predecessor was trained again since then does not count: it is of an older run."""
    path = Path(path)
    if (path / "checkpoint.json").is_file():
        return path
    newest = (steps_in(path) or [None])[-1]
    before = None
    stages = [f for f in path.glob("stage*") if re.fullmatch(r"stage[1-9]\d?", f.name)]
    for stage in sorted(stages, key=lambda f: int(f.name[5:])):
        steps = steps_in(stage)
        if steps and before and read_meta(steps[-1]).get("parent") not in (None, parent_of(before)):
            break
        before = steps[-1] if steps else None
        newest = before or newest
    return newest


def find_valid(folder):
    """The newest checkpoint of a stage's folder whose files are all as they were written, or None. Names
    those that are not."""
    for step in reversed(steps_in(folder)):
        try:
            check_files(step)
            return step
        except UserError as error:
            print(f"{error}; going on from the one before, if there is one", file=sys.stderr)
    return None


def parent_of(folder):
    """What a stage's checkpoint.json records of the checkpoint that it started from."""
    return read_meta(folder)["sha256"].get("ema.safetensors")


def read_meta(folder):
    """What checkpoint.json of a checkpoint folder holds; its config is for model.DiTConfig to check."""
    path = Path(folder) / "checkpoint.json"
    try:
        meta = json.loads(path.read_text())
        kinds = {"config": dict, "sha256": dict, "world": dict, "flags": dict, "step": int, "stage": int,
                 "name": str, "preset": str, "finished": bool, "wan": str, "base": dict, "expert": dict}
        for name in ("config", "sha256", *meta):
            if name in kinds and type(meta[name]) is not kinds[name]:
                raise ValueError(f"{name} is {str(meta[name])[:40]!r}")
        named = re.fullmatch(r"step-(\d{1,12})", path.parent.name)
        if named and meta.setdefault("step", int(named[1])) != int(named[1]):
            raise ValueError(f"step {str(meta['step'])[:40]} in {path.parent.name}")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected the folder of a checkpoint") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): "
                        "delete its folder, or use another checkpoint") from None
    return meta


def check_files(folder, names=None):
    """UserError where a file of a checkpoint is not what was written there. names: None for all of them."""
    sha256 = read_meta(folder)["sha256"]
    for name in sha256 if names is None else names:
        path = Path(folder) / name
        if Path(name).name != name or not path.is_file() or not is_as_written(path, sha256.get(name)):
            raise UserError(f"{path} is missing or damaged (its sha256 is not the one in checkpoint.json): "
                            "delete its folder, or use another checkpoint")


def load_tensors(folder, name):
    """One tensor file of a checkpoint folder, checked against the sha256 that was written with it."""
    check_files(folder, [f"{name}.safetensors"])
    path = Path(folder) / f"{name}.safetensors"
    with as_user_error(path):
        return safetensors.torch.load_file(path)


def check_base(base):
    """UserError where the network that adapters were trained on is another one by now. base: as in
    checkpoint.json; one older than 2026-12-01 does not say which release it was."""
    path = Path(base["path"])
    if base["sha256"]:  # a folder of train.py
        if not path.is_dir() or read_meta(path)["sha256"].get("ema.safetensors") != base["sha256"]:
            raise UserError(f"the frozen network that this was trained on, {path}, is gone or was trained "
                            "again")
        return
    came, expected = fingerprint(wan_files(path)), base.get("content")
    if expected not in (None, came):
        raise UserError(f"{base['path']}, the frozen network that this was trained on, is another one now: "
                        f"its content is {came}, expected {expected}; put the old files back")


def moved_base(source, base, wan):
    """What checkpoint.json of `source` says of its frozen base, once --wan was given: wan is its place now.
    UserError where another network is there."""
    if base["sha256"] or not base.get("content") or wan == base["path"]:
        return base
    if fingerprint(wan_files(wan)) != base["content"]:
        raise UserError(f"{source} was trained on {base['path']}, and --wan {wan} holds another network: "
                        "give the one that it had")
    return base | {"path": wan}


def compare(checkpoint, stored, current):
    """UserError where a checkpoint's config or flags differ from these."""
    differences = [f"{name} {str(value)[:40]} there, {current[name]} here" for name, value in stored.items()
                   if name in current and current[name] != value]
    if differences:
        raise UserError(f"{checkpoint} was trained otherwise ({'; '.join(differences)}): "
                        "give the same flags, or another --out")


def pack_optimizers(optimizers):
    """The optimizers' states as a flat dict of tensors, for safetensors; unpack_optimizers puts them back."""
    return {f"{o}.{p}.{name}": value for o, optimizer in enumerate(optimizers)
            for p, state in optimizer.state_dict()["state"].items() for name, value in state.items()}


def unpack_optimizers(optimizers, packed):
    states = [{} for _ in optimizers]
    for key, value in packed.items():
        o, p, name = key.split(".")
        groups = optimizers[int(o)].param_groups
        parameter = [parameter for group in groups for parameter in group["params"]][int(p)]
        if value.shape not in ((), parameter.shape) or not value.is_floating_point():
            raise UserError(f"{key} is {value.dtype} {list(value.shape)}; expected {list(parameter.shape)}")
        states[int(o)].setdefault(int(p), {})[name] = value
    for optimizer, state in zip(optimizers, states):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
