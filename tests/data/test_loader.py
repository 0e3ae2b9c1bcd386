"""The loader: batch n for any number of hosts and after any seek, epochs, mixtures, bad input."""

import collections
import itertools
import json
import os
import shutil

import numpy as np
import pytest

from jaxscale.data.loader import (
    DataConfig,
    make_loader,
    open_corpora,
    warn_of_trained_documents,
)
from jaxscale.data.sources import JsonLinesSource, TextSource
from jaxscale.data.split import hash_text, is_held_out
from jaxscale.data.tokenizer import TokenizerConfig
from jaxscale.types import InputError


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def joined(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def take(loader, num_batches):
    return list(itertools.islice(loader, num_batches))


def documents_of(batch):
    """The pieces of text in packed rows, sorted."""
    pieces = []
    for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True):
        for segment in range(1, segments.max() + 1):
            pieces.append(tuple(tokens[segments == segment].tolist()))
    return sorted(pieces)


def rows_of(batch):
    return [tuple(row) for row in batch["tokens"].tolist()]


def texts_of(config, *, is_hidden):
    """The texts of all sources that are held out, or those that are not."""
    texts = []
    for source in config.sources:
        for _, text in source.documents():
            if is_held_out([hash_text(text)], config.held_out_fraction)[0] == is_hidden:
                texts.append(text)
    return texts


@pytest.fixture
def make_epoch_loader(make_config):
    """Training loaders of sources in equal shares, with so many epochs of the first in a batch."""

    def make(epochs_per_batch=1, **fields):
        fields = {"weights": None, **fields}
        num_sources = len(fields["sources"])
        rows_per_epoch = make_loader(make_config(**fields)).rows_per_epoch[0]
        rows_per_batch = int(epochs_per_batch * rows_per_epoch)
        return make_loader(make_config(**fields, batch_size=num_sources * rows_per_batch))

    return make


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_batches_are_the_same_for_1_2_and_4_hosts(make_config, split, is_packed):
    config = make_config(is_packed=is_packed)

    def batches_of(index, count):
        host = make_loader(config, split=split, process_index=index, process_count=count)
        return take(host, 3)

    single = batches_of(0, 1)
    for count in (2, 4):
        hosts = [batches_of(index, count) for index in range(count)]
        for expected, *parts in zip(single, *hosts, strict=True):
            assert_equal(expected, joined(parts))


def test_batches_are_the_same_after_a_seek(make_config):
    config = make_config()
    loader = make_loader(config)
    batches = take(loader, 20)
    for n in (19, 0, 7):
        assert_equal(loader.batch_at(n), batches[n])
    fresh = make_loader(config)
    take(fresh, 3)
    before = make_loader(config)
    take(before, 11)
    fresh.restore(json.loads(json.dumps(before.state())))
    assert fresh.state() == before.state()
    for n in (11, 12):
        assert_equal(next(fresh), batches[n])


def test_state_counts_what_was_taken_not_what_was_read_ahead(make_config):
    loader = make_loader(make_config())
    take(loader, 5)
    state = loader.state()
    assert state["batch"] == 5
    assert sum(state["positions"]) == 5 * 8


def test_state_of_two_hosts_continues_on_one(make_config):
    config = make_config()
    host = make_loader(config, process_index=1, process_count=2)
    take(host, 4)
    single = make_loader(config)
    single.restore(host.state())
    assert_equal(next(single), make_loader(config).batch_at(4))


@pytest.mark.parametrize("is_packed", [True, False])
def test_every_row_once_per_epoch_in_another_order(make_epoch_loader, folders, is_packed):
    source = TextSource(paths=folders)
    # The second epoch begins in the first batch and ends in the second.
    loader = make_epoch_loader(1.5, sources=(source,), is_packed=is_packed, sequence_length=64)
    rows = rows_of(joined(take(loader, 2)))
    size = loader.rows_per_epoch[0]
    first, second = rows[:size], rows[size : 2 * size]
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.parametrize("is_packed", [True, False])
def test_an_epoch_predicts_all_tokens_but_the_first_of_each_document(
    make_config, make_epoch_loader, folders, is_packed
):
    fields = {"sources": (TextSource(paths=folders),), "is_packed": is_packed}
    (corpus,) = open_corpora(make_config(**fields, weights=None), "train")
    predicted = sum(len(document) - 1 for document in corpus.token_arrays())
    (batch,) = take(make_epoch_loader(**fields), 1)
    assert batch["weights"].sum() == predicted == corpus.num_tokens


def test_an_epoch_holds_the_training_documents(make_config, make_epoch_loader, folders):
    fields = {"sources": (TextSource(paths=folders[:1]),), "sequence_length": 1000}
    (batch,) = take(make_epoch_loader(**fields), 1)
    config = make_config(**fields, weights=None)
    texts = texts_of(config, is_hidden=False)
    assert documents_of(batch) == sorted((*text.encode(), 256) for text in texts)
    assert texts and texts_of(config, is_hidden=True)


def test_mixture_follows_the_weights(make_config):
    loader = make_loader(make_config())
    batches = take(loader, 50)
    served = loader.state()["positions"]
    assert np.abs(np.array(served) - [300, 100]).max() <= 2
    assert joined(batches)["tokens"].shape == (400, 32)


@pytest.mark.parametrize("is_packed", [True, False])
def test_held_out_pass_predicts_each_token_once(make_config, is_packed):
    config = make_config(is_packed=is_packed)
    loader = make_loader(config, split="held_out")
    batches = list(loader)
    assert len(batches) == len(loader)
    assert [batch["tokens"].shape for batch in batches] == [(8, 32)] * len(batches)
    assert sum(int(batch["weights"].sum()) for batch in batches) == loader.num_tokens
    texts = texts_of(config, is_hidden=True)
    assert loader.num_scored_bytes == sum(len(text.encode()) - 1 for text in texts)
    # A token is a byte here; the first of a document is not predicted, the one that ends it is.
    assert loader.num_tokens == loader.num_scored_bytes + len(texts)
    for again, batch in zip(loader, batches, strict=True):
        assert_equal(again, batch)


def test_splits_do_not_share_documents_and_do_not_depend_on_the_seed(make_config):
    def hashes(seed, split):
        found = set()
        for corpus in open_corpora(make_config(seed=seed), split):
            found |= set(corpus.cache.key_hashes[corpus.documents].tolist())
        return found

    train, held_out = hashes(0, "train"), hashes(1, "held_out")
    assert not train & held_out
    assert len(train | held_out) == 85


def texts_in(config, split):
    """How often each text comes in a split, over all sources."""
    return collections.Counter(
        tuple(tokens.tolist())
        for corpus in open_corpora(config, split)
        for tokens in corpus.token_arrays()
    )


def link_folder(root):
    (root / "latest").symlink_to(root / "texts")
    return [TextSource((str(root),))]


def link_files(root):
    (root / "again").mkdir()
    for path in (root / "texts").iterdir():
        os.link(path, root / "again" / f"link {path.name}")
    return [TextSource((str(root),))]


def name_files_beside_their_folder(root):
    files = map(str, (root / "texts").iterdir())
    return [TextSource((str(root), *files, str(root)))]


def read_in_two_sources(root):
    return [TextSource((str(root),)), TextSource((str(root / "texts"),))]


def copy_files(root):
    shutil.copytree(root / "texts", root / "copy")
    return [TextSource((str(root),))]


def shard_anew(root):
    texts = [path.read_text() for path in sorted((root / "texts").iterdir())]
    sources = []
    for name, ordered in (("ascending", texts), ("descending", texts[::-1])):
        path = root / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ordered))
        sources.append(JsonLinesSource((str(path),)))
    return sources


@pytest.mark.parametrize(
    ("reach_again", "times"),
    [
        (link_folder, 1),
        (link_files, 1),
        (name_files_beside_their_folder, 1),
        (read_in_two_sources, 2),
        (copy_files, 2),
        (shard_anew, 2),
    ],
)
def test_no_text_is_in_both_splits_however_often_it_is_reached(
    make_config, tmp_path, reach_again, times
):
    (tmp_path / "texts").mkdir()
    for number in range(60):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"document {number}")
    sources = tuple(reach_again(tmp_path))
    config = make_config(sources=sources, weights=None)
    train, held_out = texts_in(config, "train"), texts_in(config, "held_out")
    assert not train & held_out
    assert held_out and len(train | held_out) == 60
    assert set((train | held_out).values()) == {times}


def test_files_that_are_reached_twice_are_told(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("a")
    source = TextSource((str(tmp_path), str(tmp_path / "a.txt")))
    assert len(source.version()) == 1
    assert "TextSource.paths: 1 of 2 files are others again" in caplog.text


def test_a_run_that_held_out_by_keys_goes_on_only_so(make_config, caplog):
    """As runs did before they said by what."""
    state = make_loader(make_config(held_out_by="key")).state()
    del state["depends_on"]["held_out_by"]
    make_loader(make_config(held_out_by="key")).restore(state)
    with pytest.raises(InputError, match=r"DataConfig.held_out_by: given 'text', expected 'key'"):
        make_loader(make_config()).restore(state)
    state = make_loader(make_config(held_out_fraction=0.0)).state()
    del state["depends_on"]["held_out_by"]
    make_loader(make_config(held_out_fraction=0.0)).restore(state)
    warn_of_trained_documents(state, make_config(held_out_fraction=0.0))
    assert not caplog.text


def test_an_evaluation_by_texts_of_a_training_by_keys_is_warned_of(make_config, caplog):
    state = make_loader(make_config(held_out_by="key")).state()
    warn_of_trained_documents(state, make_config(held_out_by="key"))
    assert not caplog.text
    del state["depends_on"]["held_out_by"]
    warn_of_trained_documents(state, make_config())
    assert "DataConfig.held_out_by: 'text' is not the 'key' of the training" in caplog.text


def test_without_packing_a_row_is_one_document(make_config):
    batch = joined(take(make_loader(make_config(is_packed=False)), 3))
    assert "segments" not in batch
    assert (batch["positions"] == np.arange(32)).all()
    ends = batch["tokens"] == 256
    assert ends.any()
    assert (batch["weights"] == ~ends).all()


def test_padding_of_a_row_that_is_one_document_stands_after_its_tokens(make_epoch_loader, folders):
    """At position 0 it would be visible to the tokens before it, where positions decide."""
    loader = make_epoch_loader(sources=(TextSource(paths=folders),), is_packed=False)
    batch = loader.batch_at(0)
    ends_in_padding = (batch["weights"][:, -2:] == 0).all(1)
    assert ends_in_padding.any()
    assert (batch["positions"] == np.arange(32)).all()


def test_seed_shuffles(make_config):
    first, second = (make_loader(make_config(seed=seed)).batch_at(0) for seed in (0, 1))
    assert (first["tokens"] != second["tokens"]).any()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 1),
        ("sequence_length", 64),
        ("weights", (1.0, 1.0)),
        ("is_packed", False),
    ],
)
def test_state_of_another_configuration_is_refused(make_config, field, value):
    state = make_loader(make_config()).state()
    with pytest.raises(InputError, match=rf"DataConfig\.{field}.*with which the run was begun"):
        make_loader(make_config(**{field: value})).restore(state)


def test_another_batch_size_goes_on_with_the_next_row(make_config):
    loader = make_loader(make_config())
    take(loader, 3)
    state = loader.state()
    for size, first in ((4, 6), (12, 2), (24, 1)):  # 24 rows of 3 batches of 8
        other = make_loader(make_config(batch_size=size))
        other.restore(state)
        assert_equal(next(other), make_loader(make_config(batch_size=size)).batch_at(first))
        tokens = other.batch_at(first)["tokens"][:4]
        np.testing.assert_array_equal(tokens, next_rows(loader, 24, 4))
    with pytest.raises(InputError, match=r"here 24 % 16 = 8"):
        make_loader(make_config(batch_size=16)).restore(state)


def next_rows(loader, first, number):
    """Rows of the stream, from its batches of 8."""
    batches = [loader.batch_at(n)["tokens"] for n in range((first + number) // 8 + 1)]
    return np.concatenate(batches)[first : first + number]


def test_state_of_as_many_other_documents_is_refused(make_config, folders, tmp_path):
    state = make_loader(make_config()).state()
    other = shutil.copytree(folders[0], tmp_path / "other")
    edited = next(other.rglob("*.txt"))
    edited.write_text(edited.read_text().swapcase())
    sources = (TextSource((str(other),)), TextSource(folders[1:]))
    with pytest.raises(InputError, match=r"DataConfig\.sources: .*with which the run was begun"):
        make_loader(make_config(sources=sources)).restore(state)


def test_each_source_is_shuffled_by_itself(make_epoch_loader, folders):
    """Two sources of the same text take turns; each goes through all of it in another order."""
    loader = make_epoch_loader(sources=(TextSource(folders[:1]),) * 2)
    rows = rows_of(loader.batch_at(0))
    first, second = rows[::2], rows[1::2]
    assert sorted(first) == sorted(second)
    assert first != second


def test_state_continues_where_the_same_text_lies_elsewhere(make_config, folders, tmp_path):
    loader = make_loader(make_config())
    take(loader, 2)
    state = loader.state()
    sources = []
    for number, folder in enumerate(folders):
        copy = shutil.copytree(folder, tmp_path / str(number), copy_function=shutil.copy)
        sources.append(TextSource(paths=(str(copy),)))
    elsewhere = make_loader(make_config(sources=tuple(sources)))
    elsewhere.restore(state)
    assert_equal(next(elsewhere), next(loader))


def test_state_of_another_format_or_tokenizer_is_refused(make_config):
    loader = make_loader(make_config())
    state = loader.state()
    for name, value in (("format", 2), ("tokenizer", "other")):
        forged = state | {"depends_on": state["depends_on"] | {name: value}}
        with pytest.raises(InputError, match=f"DataConfig.{name}: .*with which the run was begun"):
            loader.restore(forged)


def test_state_from_before_format_and_tokenizer_were_recorded_is_restored(make_config):
    loader = make_loader(make_config())
    take(loader, 2)
    state = loader.state()
    for name in ("format", "tokenizer"):
        del state["depends_on"][name]
    resumed = make_loader(make_config())
    resumed.restore(state)
    assert_equal(next(resumed), next(loader))


def test_state_of_other_text_and_a_forged_state_are_refused(make_config, folders):
    loader = make_loader(make_config())
    state = loader.state()
    swapped = make_config(sources=(TextSource(folders[1:]), TextSource(folders[:1])))
    with pytest.raises(InputError, match=r"DataConfig\.sources"):
        make_loader(swapped).restore(state)
    with pytest.raises(InputError, match="positions"):
        loader.restore(state | {"batch": 3})
    with pytest.raises(InputError, match=r"DataConfig\..*with which the run was begun"):
        loader.restore({})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sources": ()}, "at least one source"),
        ({"sources": ("text.txt",)}, r"DataConfig\.sources"),
        ({"weights": (1.0,)}, "1 == 2 does not hold"),
        ({"weights": (1.0, -1.0)}, "positive numbers"),
        ({"sequence_length": 0}, r"DataConfig\.sequence_length"),
        ({"batch_size": "8"}, r"DataConfig\.batch_size"),
        ({"held_out_fraction": 1.0}, "0 <= fraction < 1"),
        ({"held_out_fraction": 0.999999}, r"leaves documents in the split 'train'"),
        ({"sources": (TextSource(paths=("/none/at/all",)),), "weights": None}, "exists"),
        ({"tokenizer": TokenizerConfig("huggingface", "/none")}, "can be read"),
    ],
)
def test_bad_configurations_are_named(make_config, fields, message):
    with pytest.raises(InputError, match=message):
        make_loader(make_config(**fields))


def test_bad_calls_are_named(make_config):
    with pytest.raises(InputError, match=r"8 % 3 = 2, not 0"):
        make_loader(make_config(), process_count=3)
    with pytest.raises(InputError, match=r"leaves documents in the split 'held_out'"):
        make_loader(make_config(held_out_fraction=0.0), split="held_out")
    with pytest.raises(InputError, match="one of 'train', 'held_out'"):
        make_loader(make_config(), split="test")


def test_defaults_need_only_sources_and_shape(folders):
    config = DataConfig(sources=(TextSource(paths=folders),), sequence_length=8, batch_size=2)
    assert config.tokenizer == TokenizerConfig()
