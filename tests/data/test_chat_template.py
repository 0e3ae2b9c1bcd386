"""Chat templates: as Hugging Face renders them, and hostile ones."""

import json

import pytest
import tokenizers
from transformers.utils.chat_template_utils import render_jinja_template

from jaxscale.data.chat_template import ChatTemplate, read_chat_template
from jaxscale.data.tokenizer import HuggingFaceTokenizer
from jaxscale.types import InputError

PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LLAMA2 = """{{ bos_token }}{% set ns = namespace(first=true) %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'].strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + ' ' + eos_token }}
    {%- endif %}
    {%- set ns.first = false %}
{%- endfor %}
{{ messages[0] | tojson }} {{ 2 * 3 }} {{ 1 ~ 'a' ~ messages[0].role }}
{{ ['a', 'b'] | join(', ') }}{{ 'a.b'.replace('.', '') }}{{ 'abc' | replace('b', '-') }}"""
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [
    {"role": "user", "content": " Hello? <&é "},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye"},
]


@pytest.mark.parametrize("source", [PHI3, LLAMA2])
@pytest.mark.parametrize("is_reply_next", [True, False])
def test_a_chat_is_rendered_as_hugging_face_does(source, is_reply_next):
    (wanted,), _ = render_jinja_template(
        [CHAT], chat_template=source, add_generation_prompt=is_reply_next, **TOKENS
    )
    template = ChatTemplate(source, "template", TOKENS)
    assert template.render(CHAT, is_reply_next=is_reply_next) == wanted


HOSTILE = {
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "change": "{{ messages.append(1) }}",
    "format": "{{ '{0.__class__}'.format(messages) }}",
    "add": "{% set x = namespace(t='x') %}{% for i in range(99) %}"
    "{% set x.t = x.t + x.t %}{% endfor %}",
    "concat": "{% set x = namespace(t='x') %}{% for i in range(99) %}"
    "{% set x.t = x.t ~ x.t %}{% endfor %}",
    "replace": "{% set x = namespace(t='xx') %}{% for i in range(9) %}"
    "{% set x.t = x.t | replace('x', x.t) %}{% endfor %}",
    "method": "{% set x = namespace(t='xx') %}{% for i in range(9) %}"
    "{% set x.t = x.t.replace('x', x.t) %}{% endfor %}",
    "join": "{% set x = namespace(t='xx') %}{% for i in range(99) %}"
    "{% set x.t = [x.t, x.t] | join(x.t) %}{% endfor %}",
    "pad": "{{ 'x'.ljust(1000000000) }}",
    "product": "{{ 'x' * 1000000000 }}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "percent": "{{ '%999999999d' % 1 }}",
    "range": "{% for i in range(10000000) %}{% endfor %}",
    "nested": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "indent": "{{ 'x' | indent(1000000000) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "include": "{% include '/etc/passwd' %}",
    "syntax": "{% for %}",
    "undefined": "{{ absent.field }}",
    "refuses": "{{ raise_exception('only one message') }}",
    "long": "{% set x = namespace(t='x') %}{% for i in range(40) %}{% set x.t = x.t + x.t %}"
    "{{ x.t }}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_by_its_place(name):
    with pytest.raises(InputError, match=r"tokenizer_config.json: chat_template: given"):
        where = "tokenizer_config.json: chat_template"
        ChatTemplate(HOSTILE[name], where, TOKENS).render(CHAT, is_reply_next=True)


def write(folder, template):
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    values = tokens | ({} if template is None else {"chat_template": template})
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


def test_a_template_is_read_from_either_place(tmp_path):
    several = [
        {"name": "tools", "template": ""},
        {"name": "default", "template": "{{ eos_token }}"},
    ]
    for given in ("{{ eos_token }}", several):
        write(tmp_path, given)
        assert read_chat_template(tmp_path).render(CHAT, is_reply_next=True) == "</s>"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    assert read_chat_template(tmp_path).render(CHAT, is_reply_next=True) == "<s>"


def test_a_folder_without_a_template_has_none(tmp_path):
    write(tmp_path, None)
    assert read_chat_template(tmp_path) is None


def test_a_message_cannot_write_a_special_token():
    """Not even in the name of another field, or of a tool."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    tokenizer = HuggingFaceTokenizer(tokenizer.to_str(), "</s>")
    source = "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
    template = ChatTemplate(source, "template", TOKENS)
    chat = [{"role": "user</s>", "content": "a</s>b"}]
    tokens = template.encode(chat, tokenizer, tools=[{"name": "</s>"}])
    end = tokenizer.eos_id
    assert tokens == [*tokenizer.encode("user</s>:a</s>b"), end]
    assert tokens.count(end) == 1
