"""The scores of llm-jp-eval: how near answers are to the right ones, each from 0 to 1.

Source: LLM-jp 2024 (arXiv 2407.03963), section 5.1, and the format of llm-jp-eval's datasets.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from jaxscale.data.libraries import imported
from jaxscale.types import InputError

NO_NUMBER = -2.0  # stands for an answer without a number, as in llm-jp-eval
EXTRA = "evaluation"


class Score(NamedTuple):
    """A score of all answers to a task.

    Args:
        of: (answers, right answers) -> the score.
        libraries: modules that it needs.
        is_numeric: whether right answers are numbers.
    """

    of: Callable[[Sequence[str], Sequence[str]], float]
    libraries: tuple[str, ...] = ()
    is_numeric: bool = False

    def check(self, parameter: str) -> None:
        """Raises InputError, which names the parameter, where a library is missing."""
        for library in self.libraries:
            imported(library, parameter, EXTRA)


def first_part(answer: str) -> str:
    """An answer up to its first empty line, where the next worked example would begin."""
    first, *_ = answer.strip().split("\n\n")
    return first


def normalised(text: str) -> str:
    """A text as it is compared, in Unicode's form NFKC."""
    return unicodedata.normalize("NFKC", text).strip()


def exact_match(answers: Sequence[str], right: Sequence[str]) -> float:
    """The share of answers that are the right ones."""
    return _mean(answer == wanted for answer, wanted in zip(answers, right, strict=True))


def char_f1(answers: Sequence[str], right: Sequence[str]) -> float:
    """The mean share of characters in common: 2 * (longest common subsequence) / (all characters).

    Words are lower case and in alphabetical order; whatever is no letter and no digit is a blank,
    so that texts of signs alone are all the same.
    """
    fuzz = imported("rapidfuzz.fuzz", "char_f1", EXTRA)
    utils = imported("rapidfuzz.utils", "char_f1", EXTRA)

    def ratio(answer: str, wanted: str) -> float:
        percent = fuzz.token_sort_ratio(answer, wanted, processor=utils.default_process)
        return percent / 100

    return _mean(map(ratio, answers, right))


def set_f1(answers: Sequence[str], right: Sequence[str]) -> float:
    """The mean F1 of an answer's lines among those of the right answer, as sets."""

    def of_lines(answer: str, wanted: str) -> float:
        found, lines = _lines(answer), _lines(wanted)
        return 2 * len(found & lines) / (len(found) + len(lines))

    return _mean(map(of_lines, answers, right))


def pearson(answers: Sequence[str], right: Sequence[str]) -> float:
    """The linear correlation of numbers; 0 where all answers are the same."""
    return _correlation("pearsonr", answers, right)


def spearman(answers: Sequence[str], right: Sequence[str]) -> float:
    """The correlation of the numbers' ranks; 0 where all answers are the same."""
    return _correlation("spearmanr", answers, right)


def bleu_en(answers: Sequence[str], right: Sequence[str]) -> float:
    """The mean BLEU of sentences, of which words are taken apart as in WMT ("13a")."""
    return _bleu("13a", answers, right)


def bleu_ja(answers: Sequence[str], right: Sequence[str]) -> float:
    """The mean BLEU of sentences, of which MeCab finds the words."""
    return _bleu("ja-mecab", answers, right)


SCORES = {
    "exact_match": Score(exact_match),
    "char_f1": Score(char_f1, libraries=("rapidfuzz",)),
    "set_f1": Score(set_f1),
    "pearson": Score(pearson, is_numeric=True),
    "spearman": Score(spearman, is_numeric=True),
    "bleu_en": Score(bleu_en, libraries=("sacrebleu",)),
    "bleu_ja": Score(bleu_ja, libraries=("sacrebleu", "MeCab", "ipadic")),
}


def check_number(parameter: str, text: str) -> None:
    """Raises InputError unless a right answer is a number that an answer can say."""
    try:
        is_sayable = _number(normalised(text)) == float(text)
    except ValueError:
        is_sayable = False
    if not is_sayable:
        expected = "a number of digits, as pearson and spearman read no sign and no exponent"
        raise InputError(parameter, text, expected)


def _lines(text: str) -> set[str]:
    return {line.strip() for line in text.split("\n")}


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return float(sum(found) / len(found))


def _number(answer: str) -> float:
    """The digits and dots of an answer as a number, as llm-jp-eval reads them."""
    digits = re.sub(r"[^0-9.]", "", answer)
    try:
        value = float(digits)
    except ValueError:
        return NO_NUMBER
    return value if math.isfinite(value) else NO_NUMBER


def _correlation(
    name: str,
    answers: Sequence[str],
    right: Sequence[str],
) -> float:
    # It takes most of a second, which runs without tasks do without.
    from scipy import stats

    found = list(map(_number, answers))
    wanted = list(map(float, right))
    if len(set(found)) == 1 or len(set(wanted)) == 1:
        return 0.0
    return float(getattr(stats, name)(wanted, found)[0])


def _bleu(
    tokenize: str,
    answers: Sequence[str],
    right: Sequence[str],
) -> float:
    metrics = imported("sacrebleu.metrics", f"bleu by {tokenize!r}", EXTRA)
    bleu = metrics.BLEU(effective_order=True, tokenize=tokenize)

    def of_sentence(answer: str, wanted: str) -> float:
        return bleu.sentence_score(answer, [wanted]).score / 100

    return _mean(map(of_sentence, answers, right))
