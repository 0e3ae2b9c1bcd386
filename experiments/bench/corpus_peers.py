"""Our filters beside HojiChar's and datatrove's, our near duplicates beside datasketch's.

python experiments/bench/corpus_peers.py filters texts.jsonl  # of every tenth text, and of /ja/
python experiments/bench/corpus_peers.py duplicates texts.jsonl  # of texts up to LONGEST
Needs hojichar, datatrove, datasketch.
"""

import collections
import itertools
import sys
import time

import datasketch
import numpy as np
from datatrove.data import Document as TroveDocument
from datatrove.pipeline.filters import gopher_repetition_filter as gopher
from hojichar import Document as HojiDocument
from hojichar.filters import document_filters as hoji
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from jaxscale.data import filters
from jaxscale.data.minhash import MinHash, firsts_of_clusters
from jaxscale.data.repetition import Repetition
from jaxscale.data.sources import JsonLinesSource

LONGEST = 50_000
REPEATED = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)  # Gopher's of 5-grams to 10-grams
RANGES = (0, 0.5, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.01)


def filter_pairs():
    """By name: our predicate, and the peer's verdict of a text."""
    words = {
        "adult words": "adult_keywords_ja.txt",
        "discriminating words": "discrimination_keywords_ja.txt",
        "violent words": "violence_keywords_ja.txt",
    }
    yield "first kana", filters.Japanese(), rejected_by(hoji.AcceptJapanese())
    for most in (80, 250):
        peer = hoji.DiscardRareKuten(max_average_sentence_length=most)
        yield f"full stops {most}", filters.SentenceLength(most), rejected_by(peer)
    for least in (50, 200):
        peer = hoji.DocumentLengthFilter(min_doc_len=least)
        yield f"length {least}", filters.Length(least), rejected_by(peer)
    path = str(hoji.BASE_PATH / "dict/advertisement_keywords_ja.txt")
    ads = filters.Keywords(path, 10, is_katakana_whole=False)
    yield "advertisements", ads, rejected_by(hoji.DiscardAds(max_allowed_num=10))
    for name, file in words.items():
        path = str(hoji.BASE_PATH / "dict" / file)
        # HojiChar rejects at the first word; with `ignore_confused` as LLM-jp has it.
        peer = hoji.NgWordsFilterJa(path, ignore_confused=True)
        yield name, filters.Keywords(path, 0), rejected_by(peer)
        yield f"{name}, 4 or more", filters.Keywords(path, 3), more_than(peer.keyword_pat, 3)
    gopher.split_into_words = lambda text, language: text.split()
    off = {"top_n_grams": (), "dup_n_grams": ()}
    top, repeated = ((2, 0.2), (3, 0.18), (4, 0.16)), tuple(zip(range(5, 11), REPEATED))
    lines = {f"dup_{name}_frac": None for name in ("line", "para", "line_char", "para_char")}
    ours = dict.fromkeys(("lines", "paragraphs", "line_characters", "paragraph_characters"), 1.0)
    for name, mine, theirs in (
        ("repeated lines, paragraphs", {"top_ngrams": (), "repeated_ngrams": ()}, off),
        ("top n-grams", ours | {"repeated_ngrams": ()}, off | lines | {"top_n_grams": top}),
        ("repeated n-grams", ours | {"top_ngrams": ()}, off | lines | {"dup_n_grams": repeated}),
    ):
        yield name, Repetition(**mine), is_repetitive(gopher.GopherRepetitionFilter(**theirs))


def is_repetitive(peer):
    """Whether a filter of datatrove rejects a text; it looks at the text's ends too."""
    return lambda text: peer.filter(TroveDocument(text.strip(), "")) is not True


def rejected_by(peer):
    """Whether a filter of HojiChar rejects a text."""
    return lambda text: peer.apply(HojiDocument(text)).is_rejected


def more_than(pattern, most):
    """As LLM-jp changes the filter."""
    return lambda text: len(pattern.findall(text)) > most


def compare_filters(documents):
    """A row a filter: what both drop, what one drops, and the speeds."""
    number = itertools.count()
    documents = [each for each in documents if "/ja/" in each.key or next(number) % 10 == 0]
    size = sum(len(document.text) for document in documents) / 1e6
    print(f"{len(documents)} texts, {size:.1f} Mcharacters")
    print("filter | both drop | we alone | peer alone | Mcharacters/s | peer's")
    for name, ours, peer in filter_pairs():
        began = time.perf_counter()
        mine = [ours.objection(document) is not None for document in documents]
        between = time.perf_counter()
        theirs = [bool(peer(document.text)) for document in documents]
        ended = time.perf_counter()
        both, we, they = (
            sum(a == wanted and b == other for a, b in zip(mine, theirs))
            for wanted, other in ((True, True), (True, False), (False, True))
        )
        speeds = f"{size / (between - began):.1f} | {size / (ended - between):.1f}"
        print(f"{name} | {both} | {we} | {they} | {speeds}", flush=True)


def shingles(text):
    """The set of its 5-grams."""
    return {text[place : place + 5] for place in range(len(text) - 4)}


def band_pairs(keys):
    """Pairs of numbers with an equal band, of bands of any hashable kind."""
    found = set()
    for band in zip(*keys):
        groups = collections.defaultdict(list)
        for number, key in enumerate(band):
            groups[key].append(number)
        for group in groups.values():
            found |= set(itertools.combinations(group, 2))
    return found


def compare_duplicates(documents):
    """Pairs with a band in common by true similarity, and the documents that are dropped."""
    texts = sorted({d.text for d in documents if 5 <= len(d.text) <= LONGEST})
    size = sum(map(len, texts)) / 1e6
    began = time.perf_counter()
    ours = MinHash().band_keys(texts)
    between = time.perf_counter()
    hashes = []
    for text in texts:
        minhash = datasketch.MinHash(num_perm=200, seed=1)
        minhash.update_batch([each.encode() for each in shingles(text)])
        hashes.append([tuple(row) for row in minhash.hashvalues.reshape(20, 10).tolist()])
    ended = time.perf_counter()
    print(f"{len(texts)} different texts, {size:.1f} Mcharacters")
    print(f"Mcharacters/s {size / (between - began):.2f}, peer's {size / (ended - between):.2f}")
    mine, theirs = band_pairs(ours.tolist()), band_pairs(hashes)
    sets = {number: shingles(texts[number]) for number in set(itertools.chain(*mine | theirs))}
    pairs = sorted(mine | theirs)
    true = [len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in pairs]
    print("similarity | pairs that either finds | ours | peer's")
    for low, high in itertools.pairwise(RANGES):
        rows = [(pair, s) for pair, s in zip(pairs, true) if low <= s < high]
        counts = [sum(pair in found for pair, _ in rows) for found in (mine, theirs)]
        print(f"{low} to {high} | {len(rows)} | {counts[0]} | {counts[1]}")
    first = dropped(pairs=mine, count=len(texts))
    assert (first == (firsts_of_clusters(ours) != np.arange(len(texts)))).all()
    second = dropped(pairs=theirs, count=len(texts))
    print(f"dropped: both {(first & second).sum()}, we alone {(first & ~second).sum()}, ", end="")
    print(f"peer alone {(~first & second).sum()}, neither {(~first & ~second).sum()}")


def dropped(pairs, count):
    """Whether each text has one before it in its cluster."""
    rows, columns = np.array(sorted(pairs)).T
    edges = coo_array((np.ones(len(rows)), (rows, columns)), (count, count))
    _, labels = connected_components(edges, directed=False)
    _, firsts = np.unique(labels, return_index=True)
    return firsts[labels] != np.arange(count)


if __name__ == "__main__":
    what = {"filters": compare_filters, "duplicates": compare_duplicates}[sys.argv[1]]
    what(list(JsonLinesSource((sys.argv[2],), key_field="key").documents()))
