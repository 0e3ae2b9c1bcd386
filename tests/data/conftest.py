"""A small corpus of documents of many lengths, and configurations that read it."""

import pytest

from jaxscale.data.loader import DataConfig
from jaxscale.data.sources import TextSource

WORDS = ["alpha ", "bé ", "gamma\n", "  d", "漢字 ", "def f(x):\n", "e", "return x\n\n"]


def text_of(number: int) -> str:
    """Text of about 20 to 500 bytes that names its number and differs from all others."""
    return f"document {number}\n" + "".join(
        WORDS[(number * 7 + k * k) % len(WORDS)] for k in range(number * 13 % 90)
    )


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Two folders with 60 and 25 documents."""
    root = tmp_path_factory.mktemp("corpus")
    for name, numbers in (("one", range(60)), ("two", range(100, 125))):
        for number in numbers:
            path = root / name / f"{number % 5}" / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text_of(number))
    return str(root / "one"), str(root / "two")


@pytest.fixture(scope="session")
def make_config(folders, tmp_path_factory):
    """DataConfig over both folders, 3 to 1, in rows of 32 bytes; takes other fields."""
    cache = str(tmp_path_factory.mktemp("cache"))

    def make(**fields):
        defaults = {
            "sources": tuple(TextSource(paths=(folder,)) for folder in folders),
            "weights": (3.0, 1.0),
            "sequence_length": 32,
            "batch_size": 8,
            "held_out_fraction": 0.2,
            "cache_directory": cache,
        }
        return DataConfig(**defaults | fields)

    return make
