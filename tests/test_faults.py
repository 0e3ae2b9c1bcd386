"""The list of deliberate faults is one that can be tried; `make faults` tries it."""

import ast

import pytest

from tests.faults import FAULTS, ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_fault_can_be_put_where_it_belongs(fault):
    text = (ROOT / fault.file).read_text()
    assert text.count(fault.right) == 1
    ast.parse(fault.text)
    file, *name = fault.test.split("::")
    tests = (ROOT / file).read_text()
    assert all(f"def {part}(" in tests for part in name)
