"""text.py beside ftfy itself, which Wan's tokenizer begins with."""

import html
import random

import ftfy
import pytest
import torch

from networks.encoders import NEGATIVE_PROMPT
from networks.text import Tokenizer, fix_text
from videos import toy


def windows(text):
    """UTF-8 read as Windows-1252, where a byte that it does not know stays what it is."""
    return "".join(bytes([b]).decode("cp1252", "ignore") or chr(b) for b in text.encode())


def latin(text):
    return text.encode().decode("latin-1")


CAPTIONS = [
    "A woman’s portrait in a café, smiling; “hello,” she says — and waves…",
    "He wears a T‑shirt that reads “CAFÉ” in red, 50 % off, size 5½.",
    "A sign: ‘OPEN’. Two people talk – one’s the other’s double.",
    "Pokémon™ and Nestlé®, © 2024 Zoë; 20 °C, €20, £5, 5×4 film, m², ±2, § 5, № 7",
    "Une femme âgée regarde à gauche, près de la fenêtre, l’air rêveur…",
    "Il dit : « déjà\xa0! » ; C’EST L’ÉTÉ\xa0! RÉSUMÉ\xa0: À LA CARTE, ÇA VA ?",
    "Ein Mann mit grünem Schal läuft über die Straße – „Größe“, sagt er, ‚klein‘.",
    "MÜNCHENS ÄPFEL, „SÜSS“ und „GRÜN“; MENÜ… Ü’s",
    "El niño corre por la montaña. ¿Dónde está? ¡Aquí! 1ª vez, nº 5",
    "Homem na praia, pôr do sol; coração, mãe e irmã à mesa, MAÇÃ e MANHÃ",
    "Девушка улыбается в камеру, «крупный план» — мягкий свет. ПРИВЕТ…",
    "Η γυναίκα χαμογελά στην κάμερα.",
    "Kobieta uśmiecha się do kamery, żółta ściana; „Żółć”, Łódź",
    "Žena se směje, žlutý svetr, šťastný pes. PAŘÍŽ, SPÍŠ",
    "Kadın gülümsüyor, ışık yumuşak. İstanbul’da güneş",
    "En kvinna ler på bryggan, Åsa säger ”hej” och går. SMÅ",
    "Người phụ nữ mỉm cười trước ống kính.",
    "一个女人在咖啡馆里微笑，看着镜头。“你好，”她说——然后挥手……",
    "一位（年轻）女性；《电影》风格，８Ｋ、ＨＤ！　特写",
    "カメラに向かって微笑む女性。「こんにちは」と言う。ﾀﾞﾝｽ",
    "한 여성이 카메라를 보고 웃는다.",
    "ผู้หญิงยิ้มให้กล้อง",
    "😀 A man 👍🏽 gives thumbs up 👩‍👩‍👧 ❤️ ✨",
    "ＬＯＵＤ　ＮＯＩＳＥＳ！ the ﬁrst ﬂower of the oﬃce",
    NEGATIVE_PROMPT,
]
ODD = [
    *("", " ", "plain words", "é", "…", "Ã", "Â«", "à\xa0»", "Ä›"),
    "a <b>bold</b> move &amp; “more” &ldquo;x&rdquo;",
    "&lt;b&gt; &ldquo;live&rdquo; &#39;90s",
    "rock &amp;amp; roll, fish & chips, R&D; AT&T",
    "&eacute;t&eacute; &hellip; &nbsp; &#8217; &#146; &#x2019;",
    "red \x1b[31mwords\x1b[0m here",
    "a\x00b\x0bc\x1fd\x7f",
    "\ufeffa caption\ufffc",
    "one\r\ntwo\u2028three\x0cfour\x85",
    "\x93quoted\x94 \x96 it\x92s 20 \x80",
    "\ud83d\ude00 smiles, \ud83d alone, \ude00 too",
    "cafe\u0301 and A\u030angstro\u0308m",
    "voilÃ  la femme, dÃ©jÃ  vu",
    "20Â °C, 5Â km",
    "â€œHello,â€\ufffd she says",
    "Itâ€™s a mixed “text” — 微笑，JosÃ©â€™s",
    *("CAFÉ…", "CAFÉ™ – OLÉ’S", "blasé”… “Tâ”…", "“É” “Ü“ ß”", "MANHÃ… IRMÃ’S"),  # these could be UTF-8
]


def clean(fix, text):
    """As Wan's tokenizer cleans."""
    return " ".join(html.unescape(html.unescape(fix(text))).split())


@pytest.mark.parametrize("text", [*CAPTIONS, *ODD], ids=ascii)
def test_a_caption_is_cleaned_as_ftfy_cleans(text):
    assert clean(fix_text, text) == clean(ftfy.fix_text, text)


@pytest.mark.parametrize("misread", [windows, latin])
@pytest.mark.parametrize("text", CAPTIONS, ids=ascii)
def test_utf8_that_was_misread_once_or_twice_comes_back(text, misread):
    for garbled in (misread(text), misread(misread(text))):
        assert garbled != text
        assert clean(fix_text, garbled) == clean(ftfy.fix_text, garbled) == clean(ftfy.fix_text, text)


def test_sound_text_keeps_its_letters():
    """Words of all these captions in any order: nothing but quotes, widths and ligatures changes."""
    rng, words = random.Random(0), [word for text in CAPTIONS for word in text.split()]
    for _ in range(300):
        text = " ".join(rng.sample(words, 12))
        assert clean(fix_text, text) == " ".join(clean(ftfy.fix_text, word) for word in text.split())


def test_any_text_ends():
    """Characters that mojibake is made of, at random: it ends, and nothing is left to be done."""
    rng = random.Random(0)
    for _ in range(2000):
        odd = "aé ÂÃâ€™“”\x80\x9d\xa0ðŸ˜€ï¼Œ&lt;amp#<\x1b[m\ud83d\ufffdﬁ！"
        text = "".join(rng.choices(odd, k=rng.randrange(30)))
        assert fix_text(fix_text(text)) == fix_text(text)


def test_the_tokenizer_sees_the_cleaned_text(tmp_path):
    toy.train_tokenizer(tmp_path / "spiece.model")
    tokenizer = Tokenizer(tmp_path / "spiece.model")
    plain, _ = tokenizer(["the person's head, \"a close-up\""])
    for text in ("the person’s head, “a close-up”", windows("the person’s head, “a close-up”"),
                 "ｔｈｅ　ｐｅｒｓｏｎ＇ｓ head， &ldquo;a close-up&rdquo;"):
        assert torch.equal(tokenizer([text])[0], plain)
