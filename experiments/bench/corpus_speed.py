"""Speed of each filter and of a whole corpus, and bands beside the probability that they are equal.

python experiments/bench/corpus_speed.py filters texts.jsonl
python experiments/bench/corpus_speed.py corpus texts.jsonl PROCESSES FOLDER  # a new folder
python experiments/bench/corpus_speed.py bands texts.jsonl
"""

import itertools
import resource
import sys
import time

import numpy as np

from jaxscale.data import filters
from jaxscale.data.build_corpus import build_corpus
from jaxscale.data.filtered_chunks import CorpusPart
from jaxscale.data.minhash import MinHash
from jaxscale.data.repetition import Repetition
from jaxscale.data.sources import JsonLinesSource

LONGEST, NUM_TEXTS, NUM_SEEDS = 50_000, 700, 24
RANGES = (0, 0.3, 0.5, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.01)
# Filters that drop little of such texts, so that all of them are compared.
CHAIN = (
    filters.Length(50),
    filters.ScriptShare(at_least=0.0),
    filters.Compression(0.0, 0.7),
    filters.Alphanumeric(),
    filters.MaskedAddresses(),
)


def source(path):
    """The texts, whose keys the file has."""
    return JsonLinesSource((path,), key_field="key")


def speed_of_filters(path):
    """Mcharacters and megabytes of UTF-8 a second of each filter over all documents."""
    documents = list(source(path).documents())
    size = sum(len(document.text) for document in documents) / 1e6
    bytes_a_character = sum(len(document.text.encode()) for document in documents) / size / 1e6
    for each in (*CHAIN, filters.Japanese(), filters.SentenceLength(), filters.LineLengths(),
                 filters.KanaLines(), filters.UntilReferences(), filters.NoEmptyBrackets(),
                 filters.Normalised(), Repetition(), MinHash()):  # fmt: skip
        began = time.perf_counter()
        if isinstance(each, MinHash):
            each.band_keys([document.text for document in documents])
        for document in () if isinstance(each, MinHash) else documents:
            if isinstance(each, filters.Edit):
                each.edited(document.text)
            else:
                each.objection(document)
        speed = size / (time.perf_counter() - began)
        print(f"{type(each).__name__} | {speed:.1f} | {speed * bytes_a_character:.1f}", flush=True)


def speed_of_corpus(path, num_processes, folder):
    """Seconds of the whole, and memory of this process and of the largest other one."""
    size = sum(len(document.text.encode()) for document in source(path).documents()) / 1e6
    began = time.perf_counter()
    part = CorpusPart("texts", source(path), CHAIN)
    build_corpus(parts=(part,), directory=folder, num_processes=int(num_processes))
    spent = time.perf_counter() - began
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    memory = [resource.getrusage(kind).ru_maxrss >> 10 for kind in kinds]
    print(f"{size:.1f} MB in {spent:.1f} s: {size / spent:.1f} MB/s; peak MiB {memory}")


def similarities(texts):
    """The Jaccard similarity of each pair's 5-grams, of the pairs above the diagonal."""
    numbers = {}
    columns = [
        sorted({numbers.setdefault(t[n : n + 5], len(numbers)) for n in range(len(t) - 4)})
        for t in texts
    ]
    sizes = np.array([len(each) for each in columns])
    rows, columns = np.repeat(np.arange(len(texts)), sizes), np.concatenate(columns)
    order = np.argsort(columns, kind="stable")
    rows, columns, step = rows[order], columns[order], 20_000
    common = np.zeros((len(texts), len(texts)), np.float32)
    for first in range(0, len(numbers), step):
        begin, end = np.searchsorted(columns, [first, first + step])
        block = np.zeros((len(texts), step), np.float32)
        block[rows[begin:end], columns[begin:end] - first] = 1
        common += block @ block.T
    return (common / (sizes[:, None] + sizes - common))[np.triu_indices(len(texts), 1)]


def check_bands(path):
    """Pairs with a band in common beside what the formula expects, by true similarity."""
    texts = sorted({d.text for d in source(path).documents() if 5 <= len(d.text) <= LONGEST})
    chosen = np.random.default_rng(0).choice(len(texts), NUM_TEXTS, replace=False)
    texts = [texts[number] for number in sorted(chosen)]
    true = similarities(texts).astype(np.float64)
    probability = 1 - (1 - true**10) ** 20
    above = np.triu_indices(NUM_TEXTS, 1)
    found = []
    for seed in range(1, 1 + NUM_SEEDS):
        keys = MinHash(seed=seed).band_keys(texts)
        found.append(np.any([(band[:, None] == band)[above] for band in keys.T], axis=0))
    print("similarity | pairs | expected | found, mean of seeds | its standard error")
    for low, high in itertools.pairwise(RANGES):
        is_in = (low <= true) & (true < high)
        counts = np.array(found)[:, is_in].sum(axis=1)
        error = counts.std() / NUM_SEEDS**0.5
        figures = f"{probability[is_in].sum():.1f} | {counts.mean():.1f} | {error:.1f}"
        print(f"{low} to {high} | {is_in.sum()} | {figures}")


if __name__ == "__main__":
    what = {"filters": speed_of_filters, "corpus": speed_of_corpus, "bands": check_bands}
    what[sys.argv[1]](*sys.argv[2:])
