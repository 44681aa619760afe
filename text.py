"""What Wan's text encoder reads of a text: cleaned as ftfy cleans, then cut into pieces.

ftfy is no package of this project. fix_text does what it does to captions; tests/test_text.py compares them.
"""
import contextlib
import html
import re
import sys
from pathlib import Path
from unicodedata import normalize

import sentencepiece
import torch
import torch.nn as nn

from checkpoint import UserError, as_user_error

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


class Tokenizer:
    """sentencepiece model file -> ids and mask, with Wan's cleaning: fix_text, HTML unescaped twice, white
    space collapsed; </s> last."""
    max_len = 512  # Wan cuts a text here

    def __init__(self, path):
        with as_user_error(path):
            if not Path(path).is_file():  # a pipe would never end
                raise UserError(f"{path}: no such file")
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.reported = set()

    def __call__(self, texts):
        """A list of B strings -> ids, mask int64 [B, S]; S is the longest one's length, at most max_len,
        padded with 0. Says which texts are cut."""
        texts = [" ".join(html.unescape(html.unescape(fix_text(text))).split()) for text in texts]
        rows = []
        for text, ids in zip(texts, self.model.encode(texts)):
            if len(ids) >= self.max_len and text not in self.reported:
                self.reported.add(text)
                print(f"cut to the first {self.max_len - 1} of {len(ids)} tokens, as Wan does: "
                      f"{text[:60]!r}...", file=sys.stderr, flush=True)
            rows.append(torch.tensor(ids[: self.max_len - 1] + [self.model.eos_id()]))
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()
