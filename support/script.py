"""What all scripts share. Knows no network and no checkpoint.

  errors and arguments   UserError, run_script, Parser and the types of its flags; precision
  what is printed        progress: a bar on a terminal, lines elsewhere; Printable: no control characters
  files                  atomic_file and atomic_folder: written whole or not at all; lock; check_outputs
  texts                  read_text: a user's file in its encoding; Lines; fingerprint and source_hash
"""
import argparse
import array
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
from pathlib import Path
from threading import Lock

import safetensors.torch
import torch
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: no locks there
    fcntl = None


ROOT = Path(__file__).resolve().parent.parent  # of the repository: its commands, and assets/


# -------------------------------------------------------------------------------------- errors and arguments
class UserError(ValueError):
    """A wrong input. Scripts print its message as their one line and exit with 1."""


def run_script(main, less_memory="a smaller job"):
    """Run main(); turn what a user can cause into one line that begins with the script's name.
    less_memory  what to try where memory ran out"""
    script = Path(sys.argv[0]).name
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
    return type(value) is int and 0 <= value < 2**63


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
        Path(folder).mkdir(parents=True, exist_ok=True)
        touch(Path(folder, "probe"))
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another folder") from None


def touch(path):
    """OSError where a file of this name cannot be written."""
    temporary_name(path).touch()
    temporary_name(path).unlink(missing_ok=True)


def check_outputs(outputs, inputs):
    """UserError where a file to be written is one of those to be read, also through links."""
    read = {os.path.realpath(path) for path in inputs}
    for path in outputs:
        if os.path.realpath(path) in read:
            raise UserError(f"{path} is one of the inputs and would be overwritten: choose another --out")
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f"{path} is a folder or a device, expected a file to write: choose another --out")
        try:
            touch(Path(path))  # a name that is too long, say, is an error now
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
    """A short hash of the text of these files of ours, such as "videos/toy". It is a part of a cache's
    name, so changed code never reads an old cache."""
    code = b"".join((ROOT / f"{name}.py").read_bytes() for name in modules)
    return hashlib.sha256(code).hexdigest()[:8]


def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


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


def save_tensors(path, tensors):
    """A safetensors file of these tensors, as readable for others as the user's other files."""
    safetensors.torch.save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, path)
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)
