"""How light the source is to read: the width of its lines, and how much stands on one of them."""

import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_COLUMNS = 100
# Tokens on a code line: nanodo has 6.6 on average, torchtitan 5.8, equinox 6.7.
MAX_MEAN_TOKENS = 9
MAX_FILE_TOKENS = 11
MIN_CODE_LINES = 20  # shorter files may be denser: a handful of imports already makes them so
LAYOUT = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}
STATEMENT_BEGINS = {None, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
# Before Python 3.12 an f-string is a single token; so it is counted everywhere.
FSTRING_START = getattr(tokenize, "FSTRING_START", None)
FSTRING_END = getattr(tokenize, "FSTRING_END", None)


def sources(*patterns: str) -> list[Path]:
    """Files by path; jaxscale/kernels is a link to kernels/, which would be found twice."""
    return sorted({path.resolve() for pattern in patterns for path in ROOT.glob(pattern)})


LIBRARY = sources("jaxscale/**/*.py", "kernels/**/*.py")
WRITTEN = LIBRARY + sources("tests/**/*.py", "experiments/*.py")


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tokens_and_code_lines(path: Path) -> tuple[int, int]:
    """Tokens of a file and lines with one of them, without comments and docstrings."""
    num_tokens, lines = 0, set()
    before, fstring_depth = None, 0
    with path.open() as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type in (tokenize.COMMENT, tokenize.NL):
                continue
            is_docstring = token.type == tokenize.STRING and before in STATEMENT_BEGINS
            before = token.type
            is_within_fstring = fstring_depth > 0
            fstring_depth += (token.type == FSTRING_START) - (token.type == FSTRING_END)
            if token.type in LAYOUT or is_docstring or is_within_fstring:
                continue
            num_tokens += 1
            lines.add(token.start[0])
    return num_tokens, len(lines)


def test_lines_are_at_most_100_columns():
    offenders = [
        f"{shown(path)}:{number}: {len(line)} columns"
        for path in WRITTEN
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > MAX_COLUMNS
    ]
    assert not offenders, f"{len(offenders)} lines are too long:\n" + "\n".join(offenders)


@pytest.fixture(scope="module")
def counts() -> dict[str, tuple[int, int]]:
    """Tokens and code lines of each file of the library."""
    return {shown(path): tokens_and_code_lines(path) for path in LIBRARY}


def test_no_file_is_dense(counts):
    offenders = denser_than(MAX_FILE_TOKENS, counts)
    assert not offenders, f"{len(offenders)} files:\n" + "\n".join(offenders)


def test_a_line_holds_few_tokens_on_average(counts):
    num_tokens, num_lines = map(sum, zip(*counts.values()))
    mean = num_tokens / num_lines
    above = "\n".join(denser_than(MAX_MEAN_TOKENS, counts))
    assert mean <= MAX_MEAN_TOKENS, f"{mean:.2f} tokens a line; above the limit are\n{above}"


def denser_than(limit: float, counts: dict[str, tuple[int, int]]) -> list[str]:
    """A line for each file with more tokens a code line than `limit`, the densest first."""
    found = []
    for name, (num_tokens, num_lines) in counts.items():
        if num_lines >= MIN_CODE_LINES and num_tokens > limit * num_lines:
            found.append((num_tokens / num_lines, name))
    return [f"{mean:5.2f} tokens a line: {name}" for mean, name in sorted(found, reverse=True)]
