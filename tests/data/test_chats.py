"""Chats as training data: which tokens are trained, by Hugging Face's own mask of a template."""

import json

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from jaxscale.data.chats import ChatSource
from jaxscale.data.loader import DataConfig, make_loader
from jaxscale.data.tokenizer import TokenizerConfig, load_tokenizer
from jaxscale.types import InputError
from tests.data.chat_tokenizer import SPECIAL, TEMPLATE, as_messages, write_chat_tokenizer

CHATS = [
    [("user", "Two and two?"), ("assistant", "Four.\n"), ("user", "So?"), ("assistant", "So.")],
    [("system", "Be short."), ("user", "Hi <there>"), ("assistant", "Hé")],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer with a template, and a file of chats."""
    path = tmp_path_factory.mktemp("chats")
    write_chat_tokenizer(path)
    lines = [json.dumps({"messages": as_messages(chat)}) for chat in CHATS]
    (path / "chats.jsonl").write_text("\n".join(lines))
    return path


def masked(folder, chat):
    """Ids, and which of them the assistant says, as transformers marks them."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token=SPECIAL[0]
    )
    of_assistant = "{% if message['role'] == 'assistant' %}"
    content = "{{ message['content'] + '<|end|>\n' }}"
    template = TEMPLATE.replace(
        f"GENERATION{content}END",
        f"{of_assistant}{{% generation %}}{content}{{% endgeneration %}}"
        f"{{% else %}}{content}{{% endif %}}",
    )
    found = tokenizer.apply_chat_template(
        as_messages(chat),
        chat_template=template,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    return found["input_ids"], found["assistant_masks"]


def loader(folder, tmp_path, is_packed=True, **source):
    config = DataConfig(
        sources=(ChatSource(**{"paths": (str(folder),), "tokenizer": str(folder)} | source),),
        sequence_length=128,
        batch_size=1,
        tokenizer=TokenizerConfig("huggingface", str(folder)),
        held_out_fraction=0.0,
        cache_directory=str(tmp_path),
        is_packed=is_packed,
    )
    return make_loader(config)


def test_the_assistants_tokens_alone_are_trained(folder, tmp_path):
    batch = next(loader(folder, tmp_path))
    tokens, weights, segments = (
        np.asarray(batch[name][0]) for name in ("tokens", "weights", "segments")
    )
    found = []
    for number in range(1, len(CHATS) + 1):
        here = segments == number
        found.append((tokens[here].tolist(), weights[here].tolist()))
    wanted = []
    for chat in CHATS:
        ids, mask = masked(folder, chat)
        # The weight of a token is that of the one it predicts; the one that ends a document is
        # behind the template's own.
        wanted.append(([*ids, 0], [*mask[1:], 0, 0]))
    assert sorted(found) == sorted(wanted)
    assert 0 < weights.sum() < (segments > 0).sum()


def test_rows_that_cut_chats_weigh_the_same_tokens(folder, tmp_path):
    packed, joined = (
        np.asarray(next(loader(folder, tmp_path, is_packed))["weights"])
        for is_packed in (True, False)
    )
    assert packed.sum() == joined.sum()


BAD = {
    "no answer": ({"messages": as_messages([("user", "a")])}, "at least one message of the ass"),
    "no field": ({"chat": []}, "a JSON object with 'messages'"),
    "no text": ({"messages": [{"role": "user", "content": 3}]}, "a role and a content of text"),
    "special": ({"messages": as_messages([("user", "a<|end|>")])}, "does not spell the special"),
    "no JSON": (3, "a JSON object with 'messages'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_chat_is_refused_with_its_line(folder, tmp_path, name):
    value, message = BAD[name]
    (tmp_path / "bad.jsonl").write_text(json.dumps(value))
    with pytest.raises(InputError, match=rf"bad.jsonl:1.*{message}"):
        loader(folder, tmp_path / "cache", paths=(str(tmp_path),))


def test_a_template_that_rewrites_what_came_before_is_refused(folder, tmp_path):
    values = {
        "eos_token": SPECIAL[0],
        "chat_template": "{{ messages | length }}{{ messages[-1].content }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    with pytest.raises(InputError, match="a chat whose answers follow what is written"):
        loader(folder, tmp_path / "cache", tokenizer=str(tmp_path))


def test_special_tokens_of_plain_text_stay_text(folder):
    tokenizer = load_tokenizer(TokenizerConfig("huggingface", str(folder)))
    text = "a<|end|>"
    ids, is_trained = tokenizer.encode_trained(text, [(1, 8)])
    assert ids[-1] == SPECIAL.index("<|end|>") and is_trained.tolist() == [False, True]
    assert SPECIAL.index("<|end|>") not in tokenizer.encode(text)
