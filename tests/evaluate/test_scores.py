"""The scores of llm-jp-eval against their definitions."""

import functools
import math
import sys

import pytest

from jaxscale.data import libraries
from jaxscale.evaluate.scores import SCORES, check_number, first_part, normalised
from jaxscale.types import InputError


def score(name, *pairs):
    answers, right = zip(*pairs, strict=True)
    return SCORES[name].of(answers, right)


def common_subsequence(one, other):
    """The length of the longest one, by its recursion."""

    @functools.cache
    def of(i, j):
        if not i or not j:
            return 0
        if one[i - 1] == other[j - 1]:
            return of(i - 1, j - 1) + 1
        return max(of(i - 1, j), of(i, j - 1))

    return of(len(one), len(other))


def test_an_answer_ends_at_its_first_empty_line_and_is_compared_in_one_form():
    assert normalised(first_part("\n ＹＥＳ　１２ \n\n### 入力:\nNO")) == "YES 12"
    assert normalised(first_part("a\nb")) == "a\nb"
    assert normalised(first_part(" \n\n ")) == ""
    assert normalised("a\n\nb") == "a\n\nb"


def test_exact_match_is_the_share_of_equal_answers():
    assert score("exact_match", ("a", "a"), ("a ", "a"), ("", ""), ("b", "a")) == 0.5


@pytest.mark.parametrize(
    ("answer", "right"),
    [("東京都", "東京"), ("ダイ・ハード", "デッドプール2"), ("abcd", "dcba"), ("x", "東京")],
)
def test_char_f1_is_the_share_of_characters_in_the_longest_common_subsequence(answer, right):
    answer, right = (text.lower().replace("・", " ") for text in (answer, right))
    answer, right = (" ".join(sorted(text.split())) for text in (answer, right))
    wanted = 2 * common_subsequence(answer, right) / (len(answer) + len(right))
    assert score("char_f1", (answer, right)) == pytest.approx(wanted, abs=1e-12)


def test_char_f1_knows_no_order_of_words_no_case_and_no_signs():
    assert score("char_f1", ("Big red!", "red, big")) == 1
    assert score("char_f1", ("", "red"), ("red", "red")) == 0.5


@pytest.mark.parametrize(
    ("answer", "right", "wanted"),
    [("a\nb", "b\n a", 1), ("a\na\nc", "a\nb", 0.5), ("c", "a", 0), ("a", "a\nb\nc", 0.5)],
)
def test_set_f1_compares_lines(answer, right, wanted):
    assert score("set_f1", (answer, right)) == wanted


def test_correlations_are_of_the_numbers_in_answers():
    right = [0.0, 1.0, 2.5, 4.0, 5.0]
    answers = ["about 1", "0.5.", "2", "none", "5 points"]
    found = [1.0, -2.0, 2.0, -2.0, 5.0]  # "0.5." is no number; it and "none" count as -2
    mean, wanted_mean = sum(found) / 5, sum(right) / 5
    of = [(x - mean, y - wanted_mean) for x, y in zip(found, right, strict=True)]
    deviations = math.sqrt(sum(x * x for x, _ in of) * sum(y * y for _, y in of))
    wanted = sum(x * y for x, y in of) / deviations
    pairs = list(zip(answers, map(str, right), strict=True))
    assert score("pearson", *pairs) == pytest.approx(wanted)
    assert score("spearman", ("1", "1"), ("2", "2"), ("9", "3")) == pytest.approx(1)
    assert score("spearman", ("3", "1"), ("2", "2"), ("1", "3")) == pytest.approx(-1)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_answers_that_are_all_the_same_correlate_with_nothing(name):
    assert score(name, ("3", "1"), ("3", "2")) == 0
    assert score(name, ("1", "3"), ("2", "3")) == 0


def test_bleu_is_the_mean_of_sentences():
    same = "The cat sat on the mat."
    assert score("bleu_en", (same, same)) == pytest.approx(1)
    assert score("bleu_en", (same, same), ("", same)) == pytest.approx(0.5)
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples and 1 of 3 fours are right.
    pair = ("the cat sat on a mat", "the cat sat on the mat")
    assert score("bleu_en", pair) == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_bleu_of_japanese_counts_words_of_mecab():
    """吾輩 は 猫 で ある 。 has 5 of 6 words, 3 of 5 pairs, 1 of 4 triples; no four is half."""
    found = score("bleu_ja", ("吾輩は猫である。", "吾輩は犬である。"))
    assert found == pytest.approx((5 / 6 * 3 / 5 * 1 / 4 * (1 / 2) / 3) ** 0.25)


def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(libraries.importlib, "import_module", missing)
    SCORES["exact_match"].check("task.json: metrics")
    with pytest.raises(InputError, match=r"pip install 'jaxscale\[evaluation\]'"):
        SCORES["char_f1"].check("task.json: metrics")


def test_an_answer_of_very_many_digits_is_no_number():
    assert score("pearson", ("9" * 400, "1"), ("2", "2"), ("3", "3")) > 0


@pytest.mark.parametrize("text", ["three", "-1.5", "1e3", "nan", "inf", "", "1.5.2"])
def test_a_right_answer_that_no_answer_can_say_is_refused(text):
    check_number("samples[0]", "１.5")
    with pytest.raises(InputError, match="a number of digits, as pearson and spearman read"):
        check_number("samples[0]", text)


@pytest.mark.parametrize("missing", ["sacrebleu", "MeCab", "ipadic"])
def test_what_bleu_of_japanese_needs_is_asked_for(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=f"no {missing}"):
        SCORES["bleu_ja"].check("task.json: metrics")
