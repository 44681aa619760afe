"""support/checkpoints.py: a checkpoint is there whole or not at all, and known if damaged."""

import contextlib
import hashlib
import json
import os
import time

import pytest
import safetensors
import torch
from helpers import fork, kill, names, wait_for

from support import checkpoints, script
from support.checkpoints import check_files, find_checkpoint, load_tensors, read_meta, save_checkpoint
from support.script import UserError, lock


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
    ["", "{", "null", "3", "[]", '"config sha256"', "{}", '{"config": {}}', '{"config": [], "sha256": {}}',
     '{"config": {}, "sha256": "x"}', '{"config": {}, "sha256": {}, "step": "9"}',
     '{"config": {}, "sha256": {}, "step": 1e400}', '{"config": {}, "sha256": {}, "stage": null}',
     '{"config": {}, "sha256": {}, "finished": 1}', '{"config": {}, "sha256": {}, "world": 3}',
     '{"config": {}, "sha256": {}, "flags": []}', '{"config": {}, "sha256": {}, "wan": {}}', "[" * 100_000,
     '{"config":' * 100_000, '{"config": {}, "sha256": {}, "step": ' + "9" * 5000 + "}", b"\xff\xfe"],
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
    assert left == ["my-step-000001", "step-000000", "step-000002-good", "step-000004", "step-000010",
                    "step-best"]
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
    assert checkpoints.newest_undamaged(tmp_path) is None
    first, second, third = (save(tmp_path / f"step-{step:06d}") for step in (9, 10, 11))
    assert checkpoints.newest_undamaged(tmp_path) == third and not capsys.readouterr().err
    (third / "checkpoint.json").write_text("{")
    (second / "model.safetensors").write_bytes(b"")
    assert checkpoints.newest_undamaged(tmp_path) == first
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and str(third) in lines[0] and str(second / "model.safetensors") in lines[1]
    (first / "ema.safetensors").unlink()
    assert checkpoints.newest_undamaged(tmp_path) is None


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
