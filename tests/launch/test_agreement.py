"""What the processes of a run were given is compared by name."""

import pytest

from jaxscale.launch import agreement
from jaxscale.launch.agreement import check_agreement, first_difference

FACTS = {"a": "1", "b": "2"}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([FACTS], None),
        ([FACTS, dict(FACTS)], None),
        ([FACTS, FACTS, FACTS | {"b": "3"}], ("b", "3", 2, "2")),
        ([FACTS, {"a": "1"}], ("b", "(absent)", 1, "2")),
        ([{"a": "1"}, FACTS], ("b", "2", 1, "(absent)")),
    ],
)
def test_the_first_fact_that_differs_is_found(given, wanted):
    assert first_difference(given) == wanted


def test_a_run_of_one_process_asks_nobody(monkeypatch):
    asked = []
    monkeypatch.setattr(agreement, "process_index", lambda: asked.append("who am I"))
    check_agreement(FACTS)
    assert not asked
