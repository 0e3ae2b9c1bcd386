"""The scores of llm-jp-eval: how near answers are to the right ones, each from 0 to 1.

Source: LLM-jp 2024 (arXiv 2407.03963), section 5.1, and the format of llm-jp-eval's datasets.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

from scipy import stats

from jaxscale.data.libraries import imported
from jaxscale.types import InputError

NO_NUMBER = -2.0  # stands for an answer without a number, as in llm-jp-eval
EXTRA = "evaluation"


class Score(NamedTuple):
    """A score of all answers to a task.

    Args:
        of: (answers, right answers) -> the score.
        library: module that it needs; None for none.
        is_numeric: whether right answers are numbers.
    """

    of: Callable[[Sequence[str], Sequence[str]], float]
    library: str | None = None
    is_numeric: bool = False

    def check(self, parameter: str) -> None:
        """Raises InputError, which names the parameter, where the library is missing."""
        if self.library is not None:
            imported(self.library, parameter, EXTRA)


def normalised(text: str) -> str:
    """An answer as it is compared: up to its first empty line, in Unicode's form NFKC."""
    first, *_ = text.strip().split("\n\n")
    return unicodedata.normalize("NFKC", first).strip()


def exact_match(answers: Sequence[str], right: Sequence[str]) -> float:
    """The share of answers that are the right ones."""
    return _mean(answer == wanted for answer, wanted in zip(answers, right, strict=True))


def char_f1(answers: Sequence[str], right: Sequence[str]) -> float:
    """The mean share of characters in common: 2 * (longest common subsequence) / (all characters).

    Words are lower case and in alphabetical order; whatever is no letter and no digit is a blank.
    """
    fuzz = imported("rapidfuzz.fuzz", "char_f1", EXTRA)
    utils = imported("rapidfuzz.utils", "char_f1", EXTRA)

    def ratio(answer: str, wanted: str) -> float:
        percent = fuzz.token_sort_ratio(answer, wanted, processor=utils.default_process)
        return percent / 100

    return _mean(map(ratio, answers, right))


def set_f1(answers: Sequence[str], right: Sequence[str]) -> float:
    """The mean F1 of an answer's lines among those of the right answer, in any order."""

    def of_lines(answer: str, wanted: str) -> float:
        found, lines = _lines(answer), _lines(wanted)
        return 2 * len(found & lines) / (len(found) + len(lines))

    return _mean(map(of_lines, answers, right))


def pearson(answers: Sequence[str], right: Sequence[str]) -> float:
    """The linear correlation of numbers; 0 where all answers are the same."""
    return _correlation(stats.pearsonr, answers, right)


def spearman(answers: Sequence[str], right: Sequence[str]) -> float:
    """The correlation of the numbers' ranks; 0 where all answers are the same."""
    return _correlation(stats.spearmanr, answers, right)


def bleu_en(answers: Sequence[str], right: Sequence[str]) -> float:
    """The mean BLEU of sentences, of which words are taken apart as in WMT ("13a")."""
    return _bleu("13a", answers, right)


def bleu_ja(answers: Sequence[str], right: Sequence[str]) -> float:
    """The mean BLEU of sentences, of which MeCab finds the words."""
    return _bleu("ja-mecab", answers, right)


SCORES = {
    "exact_match": Score(exact_match),
    "char_f1": Score(char_f1, library="rapidfuzz"),
    "set_f1": Score(set_f1),
    "pearson": Score(pearson, is_numeric=True),
    "spearman": Score(spearman, is_numeric=True),
    "bleu_en": Score(bleu_en, library="sacrebleu"),
    "bleu_ja": Score(bleu_ja, library="MeCab"),
}


def check_number(parameter: str, text: str) -> None:
    """Raises InputError unless a right answer is a number."""
    try:
        float(text)
    except ValueError as error:
        raise InputError(parameter, text, "a number, as pearson and spearman need") from error


def _lines(text: str) -> set[str]:
    return {line.strip() for line in text.split("\n")}


def _mean(values: object) -> float:
    found = list(values)
    return float(sum(found) / len(found))


def _number(answer: str) -> float:
    """The digits and dots of an answer as a number."""
    digits = re.sub(r"[^0-9.]", "", answer)
    try:
        return float(digits)
    except ValueError:
        return NO_NUMBER


def _correlation(
    of: Callable,
    answers: Sequence[str],
    right: Sequence[str],
) -> float:
    found = list(map(_number, answers))
    wanted = list(map(float, right))
    if len(set(found)) == 1 or len(set(wanted)) == 1:
        return 0.0
    return float(of(wanted, found)[0])


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
