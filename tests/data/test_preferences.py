"""Pairs of answers as training data: two documents of a row, of which the answers have a weight."""

import json
import logging

import pytest

from jaxscale.data.loader import DataConfig, make_loader, open_corpora
from jaxscale.data.preferences import PreferenceSource
from jaxscale.data.sources import TextSource
from jaxscale.data.tokenizer import TokenizerConfig, load_tokenizer
from jaxscale.types import InputError
from tests.data.chat_tokenizer import as_messages, write_chat_tokenizer

END = "<|end|>\n"
# (messages before, chosen, rejected)
PAIRS = [
    ([("user", "Two and two?")], "Four.", "Five, or is it six?"),
    ([("system", "Be short."), ("user", "Hi"), ("assistant", "Hi."), ("user", "So?")], "So.", "No"),
    ([("user", "Hé")], "Hi there", "Hi"),
]


def as_line(before, chosen, rejected):
    answers = {"chosen": chosen, "rejected": rejected}
    return {name: as_messages([*before, ("assistant", answer)]) for name, answer in answers.items()}


def rendered(before, answer):
    """(what is read, what is trained) by the template of the tokenizer."""
    prompt = "".join(f"<|{role}|>\n{content}{END}" for role, content in before)
    return f"{prompt}<|assistant|>\n", f"{answer}{END}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("preferences")
    write_chat_tokenizer(path)
    lines = [json.dumps(as_line(*pair)) for pair in PAIRS]
    (path / "pairs.jsonl").write_text("\n".join(lines))
    return path


def loader(folder, cache, sequence_length=256, paths=None, **fields):
    source = PreferenceSource(paths or (str(folder),), str(folder))
    config = DataConfig(
        sources=(source,),
        sequence_length=sequence_length,
        batch_size=1,
        tokenizer=TokenizerConfig("huggingface", str(folder)),
        held_out_fraction=0.0,
        cache_directory=str(cache),
        **fields,
    )
    return make_loader(config)


def documents(batch):
    """{(row, segment): (ids, weights, positions)} of a batch."""
    found = {}
    for row, segments in enumerate(batch["segments"]):
        for number in range(1, segments.max() + 1):
            here = segments == number
            found[row, number] = [
                batch[name][row][here].tolist() for name in ("tokens", "weights", "positions")
            ]
    return found


def test_a_pair_is_two_documents_of_whose_tokens_the_answers_have_a_weight(folder, tmp_path):
    tokenizer = load_tokenizer(TokenizerConfig("huggingface", str(folder)))
    wanted = []
    for before, *answers in PAIRS:
        pair = []
        for answer in answers:
            prompt, trained = rendered(before, answer)
            ids, mask = tokenizer.encode_trained(
                prompt + trained, [(len(prompt), len(prompt + trained))]
            )
            # A weight belongs to the token before the one that is predicted.
            pair.append(([*map(int, ids)], [*map(float, mask[1:]), 0.0]))
        ids, weights = pair[1]
        pair[1] = [*ids, 0, 0], [*weights, 0.0, 0.0]  # the template's end, and a document's
        wanted.append(pair)
    found = documents(next(loader(folder, tmp_path)))
    pairs = []
    for (_, number), (ids, weights, positions) in found.items():
        assert positions == list(range(len(ids)))
        if number % 2:
            pairs.append([])
        pairs[-1].append((ids, weights))
    assert len(pairs) == len(PAIRS)
    assert sorted(map(str, pairs)) == sorted(
        map(str, [[tuple(each) for each in w] for w in wanted])
    )


def test_a_pair_that_is_longer_than_a_row_is_left_out_whole(folder, tmp_path, caplog):
    lengths = {}
    for (row, number), (ids, _, _) in documents(next(loader(folder, tmp_path))).items():
        lengths[row, (number - 1) // 2] = lengths.get((row, (number - 1) // 2), 0) + len(ids)
    shorter = sorted(lengths.values())[1]
    with caplog.at_level(logging.WARNING):
        short = loader(folder, tmp_path, sequence_length=shorter)
        assert "1 of 3 pairs are longer than sequence_length" in caplog.text
    assert short.num_documents == 2 and short.num_tokens == sum(sorted(lengths.values())[:2])
    seen = [documents(short.batch_at(n)) for n in range(sum(short.rows_per_epoch))]
    assert sum(len(each) for each in seen) == 4
    with pytest.raises(InputError, match=r"DataConfig\.sequence_length: given 8"):
        loader(folder, tmp_path, sequence_length=8)


ANSWER = [("user", "a"), ("assistant", "b")]
BAD = {
    "no answer": (
        {"chosen": as_messages(ANSWER[:1])},
        "the assistant's answer to them, for no other",
    ),
    "other prompt": (
        {"rejected": as_messages([("user", "c"), ("assistant", "b")])},
        r"rejected\[0\]: given {'role': 'user', 'content': 'c'}, expected that of `chosen`",
    ),
    "more turns": (
        {"rejected": as_messages([*ANSWER, *ANSWER])},
        "given '4 messages', expected 2, as many as `chosen` has",
    ),
    "no field": ({"rejected": None}, "a list of messages"),
    "text": ({"chosen": "b"}, "a list of messages, each with a role"),
    "special": ({"rejected": as_messages([*ANSWER[:1], ("assistant", "<|end|>")])}, "spell"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_pair_is_refused_with_its_line(folder, tmp_path, name):
    changes, message = BAD[name]
    line = {"chosen": as_messages(ANSWER), "rejected": as_messages(ANSWER)} | changes
    (tmp_path / "bad.jsonl").write_text(json.dumps(line))
    with pytest.raises(InputError, match=rf"bad.jsonl:1: .*{message}"):
        loader(folder, tmp_path / "cache", paths=(str(tmp_path),))


def test_pairs_want_packed_rows(folder, tmp_path):
    with pytest.raises(InputError, match=r"DataConfig\.is_packed: given False"):
        loader(folder, tmp_path, is_packed=False)


TEMPLATES = {
    "an answer": "{{ messages | map(attribute='content') | join }}",
    "a prompt": "{% for message in messages[1:] %}{{ message['content'] }}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pair_without_tokens_of_its_own_for_each_part_is_refused(folder, tmp_path, name):
    """By templates without special tokens: "wo" ends a token of its prompt, or there is none."""
    values = json.loads((folder / "tokenizer_config.json").read_text())
    values["chat_template"] = TEMPLATES[name]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    (tmp_path / "one.jsonl").write_text(json.dumps(as_line([("user", "T")], "wo", "x")))
    with pytest.raises(InputError, match="a prompt and answers that have tokens of their own"):
        loader(tmp_path, tmp_path / "cache")


def test_a_template_that_rewrites_earlier_answers_is_taken(folder, tmp_path):
    """As one that strips earlier thoughts: of a pair the last answer alone is trained."""
    values = json.loads((folder / "tokenizer_config.json").read_text())
    shown = "message['content'] if loop.last else message['content'].split('|')[-1]"
    values["chat_template"] = (
        "{% for message in messages %}<|{{ message['role'] }}|>{{ " + shown + " }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    before = [("user", "Hi"), ("assistant", "a thought|Hi"), ("user", "So?")]
    (tmp_path / "one.jsonl").write_text(json.dumps(as_line(before, "So.", "Four.")))
    batch = next(loader(tmp_path, tmp_path / "cache"))
    tokenizer = load_tokenizer(TokenizerConfig("huggingface", str(folder)))
    weights, labels = batch["weights"][0], batch["labels"][0]
    assert tokenizer.decode(labels[weights > 0]) == "So.Four."


def test_a_pair_with_the_same_answer_twice_is_left_out(folder, tmp_path, caplog):
    before, *_ = PAIRS[0]
    lines = [as_line(before, "So.", "So."), as_line(before, "So.", "Four.")]
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with caplog.at_level(logging.WARNING):
        batch = next(loader(folder, tmp_path / "cache", paths=(str(tmp_path),)))
    assert batch["segments"].max() == 2
    assert "1 pairs have the same answer twice and are left out" in caplog.text


def test_pairs_of_one_prompt_are_all_trained_or_all_held_out(folder, tmp_path):
    (tmp_path / "many.jsonl").write_text(
        "\n".join(
            json.dumps(as_line([("user", f"Hi {number % 4}")], f"So. {number}", "Four."))
            for number in range(40)
        )
    )
    source = PreferenceSource((str(tmp_path / "many.jsonl"),), str(folder))
    config = DataConfig(
        sources=(source,),
        sequence_length=256,
        batch_size=1,
        tokenizer=TokenizerConfig("huggingface", str(folder)),
        held_out_fraction=0.5,
        cache_directory=str(tmp_path / "cache"),
    )
    trained, held_out = (open_corpora(config, split)[0] for split in ("train", "held_out"))
    assert len(trained.documents) + len(held_out.documents) == 40
    assert 0 < len(trained.documents) < 40 and len(trained.documents) % 10 == 0


def test_pairs_and_texts_are_not_mixed(folder, tmp_path):
    sources = (PreferenceSource((str(folder),), str(folder)), TextSource((str(tmp_path),)))
    with pytest.raises(InputError, match="PreferenceSource alone, or none"):
        DataConfig(sources=sources, sequence_length=256, batch_size=4)
