"""Filters of raw text: the verdict at each threshold and just beyond it."""

import dataclasses
import zlib

import pytest

from jaxscale.data.filters import (
    Alphanumeric,
    Compression,
    Japanese,
    KanaLines,
    Keys,
    Keywords,
    Length,
    LineLengths,
    MaskedAddresses,
    NoEmptyBrackets,
    Normalised,
    ScriptShare,
    SentenceLength,
    UntilReferences,
)
from jaxscale.data.repetition import Repetition
from jaxscale.data.sources import Document
from jaxscale.types import InputError

DOMAINS = r"^https?://(?!ja[.]wikipedia[.]org/)[^/]*[.](jp|com|tokyo)(:|/|$)"


def objection(predicate, text, key="key"):
    return predicate.objection(Document(key, text))


def words(count):
    return " ".join(f"w{number}" for number in range(count))


# Of each predicate a text that is kept and one just beyond, which is dropped, and the reason's end.
VERDICTS = [
    (Length(), "あ", " \n\u3000", "0 < 1"),
    (Length(50), "あ" * 50 + "\n", "あ" * 49 + " ", "49 < 50"),
    (Length(1, 200), "x" * 200, "x" * 201, "201 > 200"),
    (Japanese(), "漢字" * 24 + "xンx", "漢字" * 25 + "ンン", "no kana in the first 50 characters"),
    (Japanese(3), "ab\u3041", "abcあ", "first 3 characters"),
    (ScriptShare(), "ひ" + "漢" * 9, "ひ" + "漢" * 10, "of hiragana 0.09091 < 0.1"),
    (ScriptShare(("katakana",)), "ーカﾅ" + "a" * 27, "ーカﾅ" + "a" * 28, "katakana 0.09677 < 0.1"),
    (ScriptShare(("kanji",), 0.0, 0.5), "漢々a漢", "漢字a", "of kanji 0.6667 > 0.5"),
    (
        ScriptShare(("hiragana", "katakana", "kanji"), 1.0),
        "日本のカナ",
        "日本のカナ。",
        "0.8333 < 1.0",
    ),
    (SentenceLength(), "あ" * 249 + "。", "あ" * 250 + "。", "1 in 250 wanted"),
    (SentenceLength(80), ("あ" * 79 + "。") * 2, ("あ" * 79 + "。") * 2 + "a", "1 in 80 wanted"),
    (LineLengths(), "x" * 1000 + "\n" * 11, "x" * 1001 + "\n" * 11, "longest line 1001 > 1000"),
    (LineLengths(), "x" * 100 + "\n" + "y" * 100, "x" * 100 + "\n" + "y" * 101, "100.5 > 100.0"),
    (Alphanumeric(), "a = ", "a == {}", "letters and digits 0.1429 < 0.25"),
    (Alphanumeric(), "字1++++++", "字1+++++++", "0.2222 < 0.25"),
]


@pytest.mark.parametrize(("predicate", "kept", "dropped", "reason"), VERDICTS)
def test_predicates_at_the_threshold_and_beyond(predicate, kept, dropped, reason):
    assert objection(predicate, kept) is None
    assert reason in objection(predicate, dropped)


def test_english_is_not_japanese_and_chinese_is_not_hiragana():
    english = "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 3
    chinese = "我们认为这些真理是不言而喻的，人人生而平等。" * 3
    japanese = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"
    for predicate in (Japanese(), ScriptShare()):
        assert objection(predicate, japanese) is None
        assert objection(predicate, english) and objection(predicate, chinese)


def test_compression_is_deflates_and_its_bounds_are_allowed():
    text = "".join(f"{number} の二乗は {number * number} である。" for number in range(40))
    ratio = len(zlib.compress(text.encode(), 9)) / len(text.encode())
    assert objection(Compression(ratio, 1.0), text) is None
    assert objection(Compression(0.0, ratio), text) is None
    assert "< " in objection(Compression(ratio + 1e-9, 1.0), text)
    assert "> " in objection(Compression(0.0, ratio - 1e-9), text)
    assert "compressed to 0.06" in objection(Compression(), "a" * 200)
    assert "> 0.7" in objection(Compression(), "LbdJA66Ufy4Pr6ffQEIo0DL60OL7kQl6y6ohAhqYKf3laCruuR")


def test_keywords_are_counted_and_katakana_stand_alone(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("馬鹿\nアス\nアス馬\n\n bad (word) \n馬\n")
    keywords = Keywords(str(path))
    assert objection(keywords, "馬鹿と馬鹿と馬鹿") is None
    assert objection(keywords, "馬鹿と馬鹿と馬鹿と馬") == "keywords 4 > 3"
    assert objection(Keywords(str(path), 0), "アスパラガスとリックサックと bad  (word)") is None
    assert objection(Keywords(str(path), 0), "明日はアス。") == "keywords 1 > 0"
    assert objection(Keywords(str(path), 0), "アス馬") == "keywords 1 > 0"  # one, not アス and 馬
    assert objection(Keywords(str(path), 0), "a bad (word)") == "keywords 1 > 0"
    everywhere = Keywords(str(path), 0, is_katakana_whole=False)
    assert objection(everywhere, "アスパラガス") == "keywords 1 > 0"


def test_keys_are_domains_and_endings():
    domains = Keys(DOMAINS)
    for key in ("https://a.jp/b", "http://x.y.com", "https://a.tokyo:80/b"):
        assert objection(domains, "", key) is None
    for key in (
        "https://ja.wikipedia.org/wiki/a.jp",
        "https://a.ru/b.jp/",
        "https://a.jpx/",
        "a.jp",
    ):
        assert objection(domains, "", key) == "the key does not match"
    assert objection(Keys(r"[.](py|c)$"), "", "src/a.c") is None
    assert objection(Keys(r"[.](py|c)$"), "", "src/a.cc")


@pytest.mark.parametrize(("name", "between"), [("lines", "\n"), ("paragraphs", "\n\n")])
def test_repeated_lines_and_paragraphs(name, between):
    none = {field.name: 1.0 for field in dataclasses.fields(Repetition) if field.type is float}
    ngrams = {"top_ngrams": (), "repeated_ngrams": ()}
    often = Repetition(**none | ngrams | {name: 0.3})
    assert objection(often, between.join("aaaabcdefg")) is None  # 3 of 10
    reason = objection(often, between.join("aaaabcdef"))
    assert reason == f"share of repeated {name} 0.3333 > 0.3"
    text = between.join(["123456", "123456", *"abcdefghijklmnopqr"])
    share = 6 / len(text)
    long = {"line_characters" if name == "lines" else "paragraph_characters": share}
    assert objection(Repetition(**none | ngrams | long), text) is None
    reason = objection(Repetition(**none | ngrams | long), text[:-1])
    assert f"share of characters in repeated {name}" in reason


def test_repeated_ngrams():
    """Of "a b" 10 times and other words, and of a sentence of 10 words that comes again."""
    often = " ".join(["a b"] * 10)  # 30 characters with the spaces within
    top = Repetition(repeated_ngrams=())
    rest = words(40)
    share = 30 / len(f"{often} {rest}")
    assert objection(Repetition(top_ngrams=(share,), repeated_ngrams=()), f"{often} {rest}") is None
    reason = objection(Repetition(top_ngrams=(share,), repeated_ngrams=()), f"{often} {rest[:-1]}")
    assert "share of the top 2-gram" in reason
    assert objection(top, words(300)) is None and objection(top, "one two") is None
    sentence = "the ten words of this sentence will soon come again"
    text = f"{sentence} {words(30)} {sentence}"
    share = len(sentence.replace(" ", "")) / len(text)
    assert objection(Repetition(top_ngrams=(), repeated_ngrams=(share,)), text) is None
    assert "share of repeated 5-grams" in objection(
        Repetition(top_ngrams=(), repeated_ngrams=(share - 1e-9,)), text
    )
    assert "top 4-gram" in objection(Repetition(), text)
    rare = Repetition(top_ngrams=(0.06,), repeated_ngrams=())  # the most frequent is "a b"
    assert objection(rare, f"a b a b a b {words(30)} {sentence} {sentence}") is None
    assert objection(Repetition(), f"{sentence} {words(200)} {sentence}") is None
    assert objection(Repetition(), "吾輩は猫である。名前はまだ無い。") is None


EDITS = [
    (
        KanaLines(),
        "漢字\nひらがな https://a.jp/x?y=1を見る\n" + "a" * 99 + "カ" + "b" * 100 + "\nabc",
        "ひらがな を見る" + "a" * 99 + "カ",
    ),
    (UntilReferences(), "本文\n脚注 \n一\n", "本文"),
    (UntilReferences(), "text\nSee also\n", "text"),
    (UntilReferences(), "本文\n脚注では\nReferences are", "本文\n脚注では\nReferences are"),
    (
        NoEmptyBrackets(),
        "東京（、とうきょう ）は（ ）都 (, ) or ( a; )",
        "東京（とうきょう）は都 or (a)",
    ),
    (
        MaskedAddresses(),
        "見よ http://a.b/c?d=e、a.b+c@d-e.co.jpへ。 a@b @x",
        "見よ <URL>、<MAIL>へ。 a@b @x",
    ),
    (MaskedAddresses("", "x@y"), "https://a.jpとa@b.c", "とx@y"),
    (Normalised(), "ＡＢＣ　ｶﾞ㈱①", "ABC ガ(株)1"),
]


@pytest.mark.parametrize(("edit", "text", "edited"), EDITS)
def test_edits(edit, text, edited):
    assert edit.edited(text) == edited


@pytest.mark.parametrize("edit", [KanaLines(), NoEmptyBrackets(), MaskedAddresses()])
@pytest.mark.parametrize("unit", [" ", "a", "(", "a.", "（、", "http://"])
def test_no_text_takes_quadratic_time(edit, unit):
    """A million characters are a page of a dump; they would take hours."""
    assert edit.edited("あ" + unit * (500_000 // len(unit))) is not None


@pytest.mark.parametrize(
    ("build", "parameter"),
    [
        (lambda: Length(at_least=5, at_most=4), "Length.at_least"),
        (lambda: ScriptShare(("latin",)), "ScriptShare.scripts"),
        (lambda: Keys("("), "Keys.pattern"),
        (lambda: Keywords("/dev/null").objection(Document("", "")), "Keywords.path"),
    ],
)
def test_bad_fields_are_named(build, parameter):
    with pytest.raises(InputError, match=parameter):
        build()
