"""What Wan's text encoder reads of a text: cleaned as ftfy cleans, then cut into pieces.

ftfy is no package of this project. fix_text does what it does to captions; tests/test_text.py compares them.
"""
import base64
import contextlib
import html
import json
import re
import struct
import sys
from pathlib import Path
from unicodedata import normalize

import sentencepiece
import torch
import torch.nn as nn

from support.script import UserError, as_user_error

# Where UTF-8 is read as Latin-1 or Windows-1252, "’" becomes "â€™": such characters, their bytes, and the
# stretches of a text that may be such, all of it or what lies between ASCII
WINDOWS = {bytes([byte]).decode("cp1252", "ignore"): byte for byte in range(0x80, 0xa0)}
BYTES = {chr(byte): byte for byte in range(256)} | WINDOWS
STRETCHES = f"^[\0-\xff{''.join(WINDOWS)}]+$", f"[\x80-\xff{''.join(WINDOWS)}]+"
# What sound text hardly has. "CAFÉ…" may be UTF-8 too, so one of these must be there.
MOJIBAKE = "[a-z](?: ?[ÂÃ] |[Â-Þ])|[ÂÃÎÐ][^ …’]|â€|[^\0-\x7fÀ-ÿ\xa0\xad‘’“”‚„…–—•‹›«»®™©·´šŠžŽœŒŸ]"
# Windows' control characters, quotes, full width and ligatures become plain; other control characters go
PLAIN = {byte: c for c, byte in WINDOWS.items()} | str.maketrans("ʼ‘’‚‛“”„‟", "'''''\"\"\"\"")
PLAIN |= {c: normalize("NFKC", chr(c)) for c in (0x3000, *range(0xfb00, 0xfb07), *range(0xff01, 0xfff0))}
PLAIN |= dict.fromkeys((*range(9), 0xb, *range(0xe, 0x20), 0x7f, 0xfeff, *range(0xfff9, 0xfffd)))


def undo_mojibake(match):
    """A stretch of text as it was before its UTF-8 was misread, if it was."""
    text = match[0].replace("Ã ", "Ã\xa0 ").replace("Â ", "Â\xa0")  # whose byte A0 is a space by now
    with contextlib.suppress(UnicodeDecodeError):
        if re.search(MOJIBAKE, match[0]):
            return bytes(map(BYTES.get, text)).decode()
    return match[0]


def fix_text(text):
    """What ftfy.fix_text makes of a text at its defaults, rarities aside. Where a step changes the text, all
    begins anew: UTF-8 may be misread twice, and quotes must stay curly while they are parts of it."""
    entities = "<" not in text  # ftfy leaves those of what looks like HTML
    while True:
        before, text = text, html.unescape(text) if entities else text
        for stretch in STRETCHES:
            text = re.sub(stretch, undo_mojibake, text) if text == before else text
        if text == before:
            text = re.sub("\x1b\\[[\\d;]*[a-zA-Z]", "", text.replace("â€\ufffd", "\ufffd")).translate(PLAIN)
            text = normalize("NFC", text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        if text == before:
            return text


def varint(number):
    """A whole number as Protocol Buffers write it."""
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def field(number, value):
    """One field of a Protocol Buffers message: an int, a float or bytes."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return (varint(number << 3 | 5) + struct.pack("<f", value) if isinstance(value, float)
            else varint(number << 3) + varint(value))


def find_value(tree, name):
    """The first value of that name anywhere in JSON, or None."""
    if isinstance(tree, dict) and tree.get(name) is not None:
        return tree[name]
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return next((found for branch in branches if (found := find_value(branch, name)) is not None), None)


def sentencepiece_of(path):
    """transformers' tokenizer.json of a T5 -> the same as a sentencepiece model, as sentencepiece_model.proto
    has it. What tokenizers do by steps of their own to white space, sentencepiece does by default."""
    tokenizer = json.loads(Path(path).read_text(encoding="utf-8"))
    model = tokenizer["model"]
    if model["type"] != "Unigram":
        raise UserError(f"{path} is a {model['type']} tokenizer, expected umT5's, a Unigram")
    kinds = {entry["content"]: 3 for entry in tokenizer["added_tokens"] if entry["special"]}  # 3: control
    kinds[model["vocab"][model["unk_id"]][0]] = 2
    bytes_too = model.get("byte_fallback", False)
    pieces = b""
    for piece, score in model["vocab"]:
        kind = kinds.get(piece, 6 if bytes_too and re.fullmatch("<0x..>", piece) else 1)
        pieces += field(1, field(1, piece.encode()) + field(2, float(score)) + field(3, kind))
    ids = {piece: i for i, (piece, _) in enumerate(model["vocab"])}
    trainer = (field(3, 1) + field(35, int(bytes_too)) + field(40, model["unk_id"])
               + field(42, ids["</s>"]) + field(43, ids["<pad>"]))
    normalizer = base64.b64decode(find_value(tokenizer["normalizer"], "precompiled_charsmap") or "")
    return pieces + field(2, trainer) + field(3, field(2, normalizer))


class Tokenizer:
    """A sentencepiece model, a file or its bytes, or a tokenizer.json -> ids and mask, with Wan's cleaning:
    fix_text, HTML unescaped twice, white space collapsed; </s> last."""
    max_len = 512  # Wan cuts a text here; sample.load puts the network's own number in its place

    def __init__(self, source):
        path = None if isinstance(source, bytes) else Path(source)
        with as_user_error(path or "the text encoder's spiece_model"):
            if path and not path.is_file():  # a pipe would never end
                raise UserError(f"{path}: no such file")
            if path:
                source = sentencepiece_of(path) if path.suffix == ".json" else path.read_bytes()
            self.model = sentencepiece.SentencePieceProcessor(model_proto=source)
        self.reported = set()

    def __call__(self, texts):
        """A list of B strings -> ids, mask int64 [B, S]; S is the longest one's length, at most max_len,
        padded with 0. Says which texts are cut."""
        texts = [" ".join(html.unescape(html.unescape(fix_text(text))).split()) for text in texts]
        rows = []
        for text, ids in zip(texts, self.model.encode(texts)):
            if len(ids) >= self.max_len and text not in self.reported:
                self.reported.add(text)
                print(f"cut to the first {self.max_len - 1} of {len(ids)} tokens, as no more are read: "
                      f"{text[:60]!r}...", file=sys.stderr, flush=True)
            rows.append(torch.tensor(ids[: self.max_len - 1] + [self.model.eos_id()]))
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()
