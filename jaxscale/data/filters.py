"""Filters of raw text: each looks at one document, and either may drop it or edits its text.

Source: LLM-jp, arXiv 2407.03963. Names, order and thresholds of its corpora are those of the
programs that made them: v1 is llm-jp-corpus (`filters.py`, `filter_data.py`), v2 is Uzushio
(`pipeline_03a`). A docstring says so where a filter is not theirs.
"""

import dataclasses
import functools
import hashlib
import re
import unicodedata
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from jaxscale.data.files import read_bytes
from jaxscale.data.sources import Document
from jaxscale.types import InputError, check_types

Script = Literal["hiragana", "katakana", "kanji"]
# First and last character of Unicode's blocks.
BLOCKS: dict[Script, tuple[tuple[int, int], ...]] = {
    "hiragana": ((0x3041, 0x309F),),
    "katakana": ((0x30A0, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)),
    "kanji": ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)),
}
FIRST_KANA = re.compile("[ぁ-んァ-ン]")
KANA = re.compile("[\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f]")
KATAKANA = "[ァ-ヴー]"
URL = re.compile(r"https?://[\w/:%#$&?()~.=+-]+", re.ASCII)
# A match begins where such a run does: to try each of its characters takes quadratic time.
MAIL = re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+", re.ASCII)
LONG_ASCII = re.compile(r"[\x00-\x7f]{100,}")
REFERENCES = re.compile(
    r"\n(?:脚注|関連項目|日本国内の関連項目|出典|出典・脚注|参照|外部リンク|参考文献|その他関連事項"
    r"|Footnotes|See also|Further reading|Bibliography|References|Notes|Citations|Sources"
    r"|External links)\s*(?:\n|$)"
)
BRACKETS = (
    (re.compile(r"（[\s,，、;；]+"), "（"),
    (re.compile(r"(?<![\s,，、;；])[\s,，、;；]+）"), "）"),
    (re.compile("（）"), ""),
    (re.compile(r"\([\s,;]+"), "("),
    (re.compile(r"(?<![\s,;])[\s,;]+\)"), ")"),
    (re.compile(r"\s?\(\)"), ""),
)


@runtime_checkable
class Predicate(Protocol):
    """A frozen dataclass that says whether a document is dropped."""

    def objection(self, document: Document) -> str | None:
        """Why the document is dropped, with the figure that decides; None keeps it."""
        ...


@runtime_checkable
class Edit(Protocol):
    """A frozen dataclass that changes texts. One of which nothing is left is dropped."""

    def edited(self, text: str) -> str:
        """The text that takes the place of `text`."""
        ...


class Checked:
    """Checks the fields of a filter against their types, and bounds against each other."""

    def __post_init__(self):
        check_types(self)
        lowest, highest = getattr(self, "at_least", None), getattr(self, "at_most", None)
        if lowest is not None and highest is not None and not lowest <= highest:
            expected = f"at_least <= at_most = {highest}"
            raise InputError(f"{type(self).__name__}.at_least", lowest, expected)


def beyond(what: str, value: float, at_least: float | None, at_most: float | None) -> str | None:
    """The objection to a value out of bounds, which themselves are allowed."""
    shown = f"{what} {value:.4g}"
    if at_least is not None and value < at_least:
        return f"{shown} < {at_least}"
    if at_most is not None and value > at_most:
        return f"{shown} > {at_most}"
    return None


@dataclasses.dataclass(frozen=True)
class Keys(Checked):
    """Keeps documents in whose key a pattern is found: of a URL its domain, of a file its ending.

    v1 keeps pages under .jp, .com, .net, .org, .work, .info, .xyz, .biz, .me, .tv, .site, .tokyo
    and .cc but ja.wikipedia.org, and code by a list of endings.

    Args:
        pattern: regular expression that is searched for.
    """

    pattern: str

    def __post_init__(self):
        super().__post_init__()
        try:
            re.compile(self.pattern)
        except re.error as error:
            expected = f"a regular expression ({error})"
            raise InputError("Keys.pattern", self.pattern, expected) from error

    def objection(self, document: Document) -> str | None:
        """That the pattern is not found in the key."""
        return None if re.search(self.pattern, document.key) else "the key does not match"


@dataclasses.dataclass(frozen=True)
class Length(Checked):
    """Bounds the characters of a text, without white space at its ends.

    v1 drops texts without a character, v2 those of fewer than 50, later 200.

    Args:
        at_least, at_most: characters; None has no bound.
    """

    at_least: int | None = 1
    at_most: int | None = None

    def objection(self, document: Document) -> str | None:
        """The number of characters where it is out of bounds."""
        length = len(document.text.strip())
        return beyond("characters", length, self.at_least, self.at_most)


@dataclasses.dataclass(frozen=True)
class Japanese(Checked):
    """Keeps texts with hiragana or katakana near their beginning.

    v1: among the first 50 characters (HojiChar's AcceptJapanese).

    Args:
        first: characters that are looked at.
    """

    first: int = 50

    def objection(self, document: Document) -> str | None:
        """That there is no kana among the first characters."""
        if FIRST_KANA.search(document.text, 0, self.first):
            return None
        return f"no kana in the first {self.first} characters"


@dataclasses.dataclass(frozen=True)
class ScriptShare(Checked):
    """Bounds the share of a text's characters that are of Japanese scripts.

    v2 keeps texts with at least 0.10, later 0.15, of hiragana.

    Args:
        scripts: that count: hiragana, katakana, kanji.
        at_least, at_most: share of all characters.
    """

    scripts: tuple[Script, ...] = ("hiragana",)
    at_least: float = 0.10
    at_most: float = 1.0

    def objection(self, document: Document) -> str | None:
        """The scripts' share of all characters where it is out of bounds."""
        codes = np.frombuffer(document.text.encode("utf-32-le"), np.uint32)
        blocks = [block for script in self.scripts for block in BLOCKS[script]]
        count = sum(np.count_nonzero(codes - first <= last - first) for first, last in blocks)
        what = f"share of {', '.join(self.scripts)}"
        return beyond(what, count / max(len(codes), 1), self.at_least, self.at_most)


@dataclasses.dataclass(frozen=True)
class Keywords(Checked):
    """Drops texts in which words of a list occur too often.

    v1 allows 10 occurrences of its words of advertisements, and 3, in its strict mode 2, of each
    of its lists of adult, discriminating and violent words. The lists are HojiChar's and its own.

    Args:
        path: text file with a word a line.
        at_most: occurrences that are allowed.
        is_katakana_whole: a word in katakana counts only where no other katakana touches it.
    """

    path: str
    at_most: int = 3
    is_katakana_whole: bool = True

    def objection(self, document: Document) -> str | None:
        """The number of occurrences where there are too many.

        Raises:
            InputError: the list cannot be read, or has no word.
        """
        count = sum(1 for _ in self._pattern.finditer(document.text))
        return beyond("keywords", count, None, self.at_most)

    def version(self) -> str:
        """A hash of the list."""
        return hashlib.sha256(read_bytes(Path(self.path).expanduser())).hexdigest()

    @functools.cached_property
    def _pattern(self) -> re.Pattern:
        """Matches any of the words; those in katakana are tried last, as in HojiChar.

        They are grouped by their first character: of a flat list of 1,500 words each would be
        tried at each character of the text.
        """
        lines = read_bytes(Path(self.path).expanduser()).decode().splitlines()
        words = [line.strip() for line in lines if line.strip()]
        if not words:
            raise InputError("Keywords.path", self.path, "a file with a word a line")
        groups = defaultdict(list)
        for is_katakana in (False, True):
            for word in words:
                if bool(re.fullmatch(f"{KATAKANA}+", word)) is is_katakana:
                    groups[word[0]].append(self._rest(word, is_katakana))
        return re.compile(
            "|".join(f"{re.escape(first)}(?:{'|'.join(rests)})" for first, rests in groups.items())
        )

    def _rest(self, word: str, is_katakana: bool) -> str:
        """Pattern of a word behind its first character."""
        rest = re.escape(word[1:])
        if is_katakana and self.is_katakana_whole:
            return f"(?<!{KATAKANA}{word[0]}){rest}(?!{KATAKANA})"
        return rest


@dataclasses.dataclass(frozen=True)
class SentenceLength(Checked):
    """Drops texts with few full stops (。) for their length.

    v1 allows 250 characters a full stop, in its strict mode 80 (HojiChar's DiscardRareKuten).

    Args:
        at_most: mean characters a full stop.
    """

    at_most: int = 250

    def objection(self, document: Document) -> str | None:
        """The numbers of full stops and of characters where the stops are too few."""
        count = document.text.count("。")
        if count * self.at_most >= len(document.text):
            return None
        return f"{count} full stops in {len(document.text)} characters, 1 in {self.at_most} wanted"


@dataclasses.dataclass(frozen=True)
class Compression(Checked):
    """Bounds how well deflate (zlib, level 9) compresses the text's UTF-8 bytes.

    v1: 0.30 to 0.70, in its strict mode 0.375 to 0.70. Little is left of a text that repeats
    itself; much is left of lists, code and short texts.

    Args:
        at_least, at_most: compressed bytes over bytes.
    """

    at_least: float = 0.30
    at_most: float = 0.70

    def objection(self, document: Document) -> str | None:
        """The ratio of compression where it is out of bounds."""
        content = document.text.encode()
        ratio = len(zlib.compress(content, 9)) / max(len(content), 1)
        return beyond("compressed to", ratio, self.at_least, self.at_most)


@dataclasses.dataclass(frozen=True)
class LineLengths(Checked):
    """Drops code with long lines; v1: a line of more than 1,000 characters, or 100 on average.

    Args:
        at_most: characters of the longest line.
        mean_at_most: mean characters of a line.
    """

    at_most: int = 1_000
    mean_at_most: float = 100.0

    def objection(self, document: Document) -> str | None:
        """The characters of the longest line, else of the mean one, where they are too many."""
        lengths = list(map(len, document.text.splitlines())) or [0]
        mean = sum(lengths) / len(lengths)
        longest = beyond("longest line", max(lengths), None, self.at_most)
        return longest or beyond("mean line", mean, None, self.mean_at_most)


@dataclasses.dataclass(frozen=True)
class Alphanumeric(Checked):
    """Drops code with few letters and digits; v1: less than 0.25 of all characters.

    Args:
        at_least: share of all characters.
    """

    at_least: float = 0.25

    def objection(self, document: Document) -> str | None:
        """The share of letters and digits where it is too small."""
        count = sum(map(str.isalnum, document.text))
        share = count / max(len(document.text), 1)
        return beyond("share of letters and digits", share, self.at_least, None)


@dataclasses.dataclass(frozen=True)
class KanaLines(Checked):
    """Keeps the lines with kana, joined without line ends, less addresses and long runs of ASCII.

    v1's last step on its web pages. A run is of 100 characters or more. An address ends here
    where ASCII does; v1's takes the Japanese text that follows it too.
    """

    def edited(self, text: str) -> str:
        """The lines with kana, joined."""
        lines = (line for line in text.split("\n") if KANA.search(line))
        return "".join(LONG_ASCII.sub("", URL.sub("", line)) for line in lines)


@dataclasses.dataclass(frozen=True)
class UntilReferences(Checked):
    """Cuts a text at the first heading of notes, references or links; v1's step on Wikipedia."""

    def edited(self, text: str) -> str:
        """The text before the heading; all of it where there is none."""
        found = REFERENCES.search(text)
        return text[: found.start()] if found else text


@dataclasses.dataclass(frozen=True)
class NoEmptyBrackets(Checked):
    """Takes separators from the edges of brackets, and empty brackets out; v1's on Wikipedia."""

    def edited(self, text: str) -> str:
        """The text with brackets that begin and end with what they hold."""
        for pattern, replacement in BRACKETS:
            text = pattern.sub(replacement, text)
        return text


@dataclasses.dataclass(frozen=True)
class MaskedAddresses(Checked):
    """Puts marks in the place of web and mail addresses. LLM-jp takes web addresses out instead.

    Args:
        url, mail: the marks.
    """

    url: str = "<URL>"
    mail: str = "<MAIL>"

    def edited(self, text: str) -> str:
        """The text with a mark for each address."""
        without_urls = URL.sub(lambda _: self.url, text)
        return MAIL.sub(lambda _: self.mail, without_urls)


@dataclasses.dataclass(frozen=True)
class Normalised(Checked):
    """Unicode's NFKC form, as of HojiChar's DocumentNormalizer; LLM-jp normalises nothing."""

    def edited(self, text: str) -> str:
        """The text in NFKC."""
        return unicodedata.normalize("NFKC", text)


Filters = tuple[Predicate | Edit, ...]
