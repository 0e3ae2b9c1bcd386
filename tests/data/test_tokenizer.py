"""Tokenizers: round trips, training, the end of documents, bad input."""

import json
import os
import pathlib

import pytest
import sentencepiece
import tokenizers

from jaxscale.data.sources import JsonLinesSource, TextSource
from jaxscale.data.split import hash_text, is_held_out
from jaxscale.data.tokenizer import (
    TokenizerConfig,
    check_vocabulary,
    load_tokenizer,
    train_tokenizer,
)
from jaxscale.types import InputError

# Spells the special tokens, mixes line ends, repeats spaces, leaves the training alphabet.
HARD_TEXT = "  a\n\n\tb \r\n</s><s><unk><|endoftext|> é漢字🎉\0   "
KINDS = {"bpe": "huggingface", "sentencepiece": "sentencepiece"}


@pytest.fixture(scope="module", params=["byte", *KINDS])
def config(request, folders, tmp_path_factory):
    if request.param == "byte":
        return TokenizerConfig()
    output = str(tmp_path_factory.mktemp(request.param))
    sources = (TextSource(paths=folders),)
    train_tokenizer(sources=sources, output=output, vocab_size=312, kind=request.param)
    return TokenizerConfig(kind=KINDS[request.param], path=output)


def test_round_trip(config):
    tokenizer = load_tokenizer(config)
    ids = tokenizer.encode(HARD_TEXT)
    assert tokenizer.decode(ids) == HARD_TEXT
    batch = tokenizer.encode_batch([HARD_TEXT, "b"])
    assert [each.tolist() for each in batch] == [ids, tokenizer.encode("b")]
    assert max(ids) < tokenizer.vocab_size


def test_tokens_stand_for_the_bytes_of_their_text(config):
    tokenizer = load_tokenizer(config)
    for text in (HARD_TEXT, "漢字", "🎉", "é", "\ufffd", " ", "class Tokenizer:\n"):
        ids = tokenizer.encode(text)
        assert sum(map(tokenizer.num_bytes, ids)) == len(text.encode())
    assert tokenizer.num_bytes(tokenizer.eos_id) == 0


def test_no_text_ends_a_document(config):
    tokenizer = load_tokenizer(config)
    assert tokenizer.eos_id < tokenizer.vocab_size
    assert tokenizer.eos_id not in tokenizer.encode(HARD_TEXT)
    assert tokenizer.decode([*tokenizer.encode("end"), tokenizer.eos_id]) == "end"


def test_ids_beyond_the_vocabulary_decode_to_nothing(config):
    tokenizer = load_tokenizer(config)
    beyond = [tokenizer.vocab_size, tokenizer.vocab_size + 9]
    assert tokenizer.decode([*tokenizer.encode("end"), *beyond]) == "end"


def test_saved_tokenizer_is_the_same(config, tmp_path):
    tokenizer = load_tokenizer(config)
    tokenizer.save(tmp_path / "copy")
    again = load_tokenizer(TokenizerConfig(config.kind, config.path and str(tmp_path / "copy")))
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(HARD_TEXT) == tokenizer.encode(HARD_TEXT)


def test_vocabulary_must_fit_the_model(config):
    tokenizer = load_tokenizer(config)
    check_vocabulary(tokenizer, tokenizer.vocab_size)
    with pytest.raises(InputError, match=r"model\.vocab_size.* >= .* does not hold"):
        check_vocabulary(tokenizer, tokenizer.vocab_size - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_repeatable_and_shortens_text(tmp_path, kind):
    source = TextSource(paths=(str(pathlib.Path(json.__file__).parent),), patterns=("*.py",))
    arguments = {"sources": (source,), "vocab_size": 500, "kind": kind}
    first = train_tokenizer(**arguments, output=str(tmp_path / "a"))
    second = train_tokenizer(**arguments, output=str(tmp_path / "b"))
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 500
    text = next(source.documents()).text
    assert len(first.encode(text)) < 0.6 * len(text)


ROOTS = [a + b for a in ("ба", "ве", "ги", "до", "жу") for b in ("ка", "ле", "ми", "но", "ру")]
WORDS = [root + end for root in ROOTS for end in ("а", "ами", "ов", "ский", "ение")]


@pytest.mark.parametrize(
    ("kind", "joint"),
    [("sentencepiece", " "), ("sentencepiece", " \u2585 "), ("bpe", " ")],
)
def test_long_lines_and_reserved_characters_train_the_tokenizer(tmp_path, kind, joint):
    line = joint.join(WORDS * 5)
    assert len(line.encode()) > 5000
    (tmp_path / "russian.txt").write_text(f"{line}\n" * 5)
    (tmp_path / "code.txt").write_text("return the_value\n" * 99)
    sources = (TextSource((str(tmp_path),)),)
    output = str(tmp_path / "output")
    tokenizer = train_tokenizer(sources=sources, output=output, vocab_size=320, kind=kind)
    text = " ".join(WORDS)
    assert len(tokenizer.encode(text)) < 0.5 * len(text)


def test_held_out_documents_do_not_train_the_tokenizer(tmp_path):
    texts = [pair * n for n in range(20, 60) for pair in ("ab", "zq")]
    for number, text in enumerate(texts):
        is_hidden = is_held_out([hash_text(text)], 0.5)[0]
        if is_hidden == text.startswith("zq"):
            (tmp_path / f"{number}.txt").write_text(text)
    assert {path.read_text()[:2] for path in tmp_path.iterdir()} == {"ab", "zq"}
    tokenizer = train_tokenizer(
        sources=(TextSource(paths=(str(tmp_path),)),),
        output=str(tmp_path / "tokenizer"),
        vocab_size=262,
        held_out_fraction=0.5,
    )
    assert len(tokenizer.encode("abab")) < 4
    assert len(tokenizer.encode("zqzq")) == 4


@pytest.mark.parametrize("is_added", [True, False])
def test_no_text_ends_a_document_whatever_the_file_says_of_the_token(tmp_path, is_added):
    vocabulary = {"a": 0, "<|endoftext|>": 1}
    content = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [])).to_str())
    if is_added:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        content["added_tokens"] = [{"id": 1, "content": "<|endoftext|>", **flags}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(TokenizerConfig("huggingface", str(tmp_path)))
    assert tokenizer.encode("a<|endoftext|>a") == [0, 0]
    assert tokenizer.encode_batch(["a<|endoftext|>a"])[0].tolist() == [0, 0]
    assert tokenizer.decode([0, 1]) == "a"


def test_a_unigram_model_takes_no_special_token_from_a_text(tmp_path):
    """Its special tokens are pieces with the best score, as in files made of SentencePiece."""
    special = {"<unk>": 0.0, "</s>": 0.0, "<mask>": 0.0}
    pieces = special | dict.fromkeys("▁</>abkmsx", -3.0)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(list(pieces.items()), unk_id=0))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.add_special_tokens(["<mask>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = TokenizerConfig("huggingface", str(tmp_path), eos_token="</s>")
    tokenizer = load_tokenizer(config)
    ids = tokenizer.encode("a</s>b <mask> é")
    assert not {1, 2} & set(ids) and 0 in ids
    assert tokenizer.decode([id for id in ids if id]) == "a</s>b <mask> "
    tokenizer.save(tmp_path / "copy")
    written = (tmp_path / "copy" / "tokenizer.json").read_bytes()
    assert written == (tmp_path / "tokenizer.json").read_bytes()


def test_an_end_that_text_can_spell_is_refused(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "end": 1}, unk_token="a"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"eos_token: given 'end'.*no text encodes to"):
        load_tokenizer(TokenizerConfig("huggingface", str(tmp_path), eos_token="end"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a word"] * 9),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        user_defined_symbols=["</s>"],
        minloglevel=2,
    )
    with pytest.raises(InputError, match=r"\.model', .*a SentencePiece model with the control"):
        load_tokenizer(TokenizerConfig("sentencepiece", str(tmp_path)))


def test_a_file_that_truncates_and_pads_loses_no_text(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<|endoftext|>": 1}, []))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(TokenizerConfig("huggingface", str(tmp_path)))
    assert loaded.encode("a" * 7) == [0] * 7
    assert [ids.tolist() for ids in loaded.encode_batch(["a" * 7, "a"])] == [[0] * 7, [0]]


def letters(**fields):
    """A model of two letters."""
    vocabulary = {"a": 0, "b": 1, "<|endoftext|>": 2, "<unk>": 3}
    return tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], **fields))


def written_apart():
    """One whose letters of other scripts are other words, so that "a" stands alone."""
    tokenizer = letters()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.UnicodeScripts()
    return tokenizer


def some_bytes():
    """One of bytes that were in its text, of which no other alphabet was asked for."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator(["a b \u00e9 \U0001f600"], trainer)
    return tokenizer


@pytest.mark.parametrize("make", [letters, written_apart, some_bytes])
def test_a_file_that_loses_unknown_characters_is_warned_of(tmp_path, caplog, make):
    file = tmp_path / "tokenizer.json"
    file.write_text(make().to_str())
    tokenizer = load_tokenizer(TokenizerConfig("huggingface", str(file)))
    assert tokenizer.decode(tokenizer.encode("a\u6f22")) == "a"
    assert f"{file} leaves characters that it does not know out of texts" in caplog.text


def test_a_file_with_a_token_for_unknown_characters_is_not_warned_of(tmp_path, caplog):
    file = tmp_path / "tokenizer.json"
    file.write_text(letters(unk_token="<unk>").to_str())
    tokenizer = load_tokenizer(TokenizerConfig("huggingface", str(file)))
    assert tokenizer.encode("a\u6f22") == [0, 3]
    assert "leaves characters" not in caplog.text


def test_a_unigram_model_without_a_token_for_unknown_characters_is_refused(tmp_path):
    vocabulary = [("a", -1.0), ("<|endoftext|>", -2.0)]
    file = tmp_path / "tokenizer.json"
    file.write_text(tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary)).to_str())
    with pytest.raises(InputError, match=r"expected a tokenizer\.json that encodes every text"):
        load_tokenizer(TokenizerConfig("huggingface", str(file)))


def test_tokenizers_that_spell_unknown_characters_are_not_warned_of(config, caplog):
    load_tokenizer(config)
    assert "leaves characters" not in caplog.text


def test_a_full_disk_is_named_and_costs_no_earlier_tokenizer(tmp_path, monkeypatch):
    def write_bytes(path, content):
        raise OSError(28, "No space left on device")

    (tmp_path / "a.txt").write_text("word " * 9)
    arguments = dict(
        sources=(TextSource((str(tmp_path),)),), output=str(tmp_path / "output"), vocab_size=260
    )
    before = train_tokenizer(**arguments).fingerprint
    monkeypatch.setattr(pathlib.Path, "write_bytes", write_bytes)
    message = r"output: given .*output', .* \(No space left on device\)"
    with pytest.raises(InputError, match=message):
        train_tokenizer(**arguments | {"vocab_size": 261})
    kept = load_tokenizer(TokenizerConfig("huggingface", arguments["output"]))
    assert kept.fingerprint == before


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece"])
def test_missing_and_bad_files_are_named(tmp_path, kind):
    with pytest.raises(InputError, match="can be read"):
        load_tokenizer(TokenizerConfig(kind, str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    message = r"path: given '.*/tokenizer\.\w+', expected a (tokenizer\.json|SentencePiece model)"
    for path in (
        tmp_path,
        next(tmp_path.glob(f"*.{'json' if kind == 'huggingface' else 'model'}")),
    ):
        with pytest.raises(InputError, match=message):
            load_tokenizer(TokenizerConfig(kind, str(path)))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe', expected a regular file"):
        load_tokenizer(TokenizerConfig(kind, str(tmp_path / "pipe")))
    with pytest.raises(InputError, match=r"nnn', expected .*\(File name too long\)"):
        load_tokenizer(TokenizerConfig(kind, str(tmp_path / ("n" * 300))))
    with pytest.raises(InputError, match="file or folder"):
        TokenizerConfig(kind)


def test_a_damaged_model_is_named(tmp_path, folders):
    output, sources = str(tmp_path), (TextSource(paths=folders),)
    train_tokenizer(sources=sources, output=output, vocab_size=312, kind="sentencepiece")
    path = tmp_path / "tokenizer.model"
    whole = path.read_bytes()
    config = TokenizerConfig("sentencepiece", output)
    for cut in range(1, len(whole), 97):
        for content in (whole[:cut], whole[:cut] + b"\xff" + whole[cut + 1 :]):
            path.write_bytes(content)
            try:
                load_tokenizer(config)  # what is left may be a model
            except InputError as error:
                assert error.parameter == "TokenizerConfig.path" and str(path) in str(error)


def test_a_byte_order_mark_is_no_part_of_a_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    model = tokenizers.models.BPE({"a": 0, "<|endoftext|>": 1}, [])
    tokenizers.Tokenizer(model).save(str(path))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_tokenizer(TokenizerConfig("huggingface", str(path))).encode("aa") == [0, 0]


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "other.model").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"a tokenizer\.json, which is text"):
        load_tokenizer(TokenizerConfig("huggingface", str(tmp_path / "other.model")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 100}, "the bytes and the special tokens"),
        ({"kind": "words"}, "one of 'bpe', 'sentencepiece'"),
        ({"vocab_size": 5000, "kind": "sentencepiece"}, "a size that the text supports"),
        (
            {"vocab_size": 5000},
            r"vocab_size: given 5000, expected a size that the text supports, at most \d+",
        ),
    ],
)
def test_bad_training_arguments_are_named(tmp_path, arguments, message):
    (tmp_path / "a.txt").write_text("word " * 9)
    defaults = {"sources": (TextSource((str(tmp_path),)),), "vocab_size": 300}
    with pytest.raises(InputError, match=message):
        train_tokenizer(**defaults | arguments, output=str(tmp_path / "output"))
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "at least one document"),
        ("half.jsonl", '{"text": "\\ud800"}\n', r"half\.jsonl:1.*text of whole characters"),
    ],
)
def test_bad_training_text_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    source_type = TextSource if path.suffix == ".txt" else JsonLinesSource
    sources = (source_type((str(path),)),)
    with pytest.raises(InputError, match=message):
        train_tokenizer(sources=sources, output=str(tmp_path / "output"), vocab_size=300)
    assert not (tmp_path / "output").exists()


def test_text_without_words_is_not_blamed_on_the_size(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n")
    arguments = dict(sources=(TextSource((str(path),)),), vocab_size=300, kind="sentencepiece")
    with pytest.raises(InputError, match=r"^sources: .*text with words in it"):
        train_tokenizer(**arguments, output=str(tmp_path / "output"))


def test_half_a_character_of_a_prompt_is_named(config):
    """As a byte of the command line that is no UTF-8 comes."""
    with pytest.raises(InputError, match=r"text: given 'a\\udcff', .*whole characters"):
        load_tokenizer(config).encode("a\udcff")


def test_output_that_is_a_file_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("word " * 9)
    with pytest.raises(InputError, match="can be written"):
        train_tokenizer(sources=(TextSource((str(path),)),), output=str(path), vocab_size=260)


def test_unknown_end_token_is_named(config):
    if config.kind == "huggingface":
        with pytest.raises(InputError, match="a token of the vocabulary"):
            load_tokenizer(TokenizerConfig(config.kind, config.path, eos_token="<none>"))
