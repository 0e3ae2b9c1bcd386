"""`chat`: a conversation with a model in the terminal, by the template of its tokenizer."""

import sys
from collections.abc import Iterator

from jaxscale.convert.tokenizer import stop_ids
from jaxscale.data.chat_template import (
    TEMPLATE,
    TOKENIZER_CONFIG,
    Message,
    read_chat_template,
)
from jaxscale.launch.runtime import apply_runtime
from jaxscale.models.quantised import QuantisedConfig
from jaxscale.run.huggingface import files_beside
from jaxscale.run.model import LanguageModel, load
from jaxscale.run.run import Run
from jaxscale.serve.decoding import generate_tokens
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.types import InputError, check_positive

STREAMED = 16  # tokens between two writes
UNFINISHED = "\ufffd"  # bytes that are not yet a character


def chat(
    *,
    run: Run,
    system: str | None = None,
    max_new_tokens: int = 512,
    sampling: SamplingConfig = SamplingConfig(),
    step: int | None = None,
    tensor: int = 1,
    quantisation: QuantisedConfig | None = None,
) -> list[Message]:
    """Answers each line of standard input until it ends, and prints answers as they come.

    Args:
        run: of an imported model, beside whose checkpoint the template and the stop ids are.
        system: instruction that stands before the chat; None for none.
        max_new_tokens: longest answer.
        sampling: how tokens are drawn.
        step: which checkpoint; the newest when None.
        tensor: devices over which the model is spread.
        quantisation: of the matrices of layers, on one device; None keeps them as they are.
    Returns:
        The whole chat.
    Raises:
        InputError: the model has no template, the template fails, or the chat has become too long
            for the model.
    """
    apply_runtime(run.runtime, str(run.path))
    check_positive("max_new_tokens", max_new_tokens)
    folder = files_beside(run)
    template = read_chat_template(folder)
    if template is None:
        expected = f"a template, here or in {TEMPLATE}"
        raise InputError(f"{folder / TOKENIZER_CONFIG}: chat_template", None, expected)
    model = load(run, step=step, tensor=tensor, quantisation=quantisation)
    stops = set(stop_ids(folder)) or {model.tokenizer.eos_id}
    messages: list[Message] = []
    if system is not None:
        messages.append({"role": "system", "content": system})
    for line in _lines():
        messages.append({"role": "user", "content": line})
        prompt = template.encode(messages, model.tokenizer)
        answer = ""
        for text in stream(model, prompt, stops, max_new_tokens, sampling):
            print(text[len(answer) :], end="", flush=True)
            answer = text
        print()
        messages.append({"role": "assistant", "content": answer})
    return messages


def stream(
    model: LanguageModel,
    prompt: list[int],
    stops: set[int],
    max_new_tokens: int,
    sampling: SamplingConfig,
) -> Iterator[str]:
    """The answer's text so far, again and again as it grows.

    Draws depend on the place of a token alone, so the answer is the same however it is cut. Each
    part is decoded anew from a prefill, which costs little beside its steps.

    Args:
        model: the model.
        prompt: its tokens.
        stops: tokens that end the answer.
        max_new_tokens: longest answer.
        sampling: how tokens are drawn.
    """
    answer: list[int] = []
    while len(answer) < max_new_tokens:
        (new,) = generate_tokens(
            model.decoder,
            model.pure_params(),
            [prompt + answer],
            sampling=sampling,
            max_new_tokens=min(STREAMED, max_new_tokens - len(answer)),
            num_tokens=model.tokenizer.vocab_size,
            region=model.region,
        )
        end = next((i for i, token in enumerate(new) if token in stops), None)
        answer += new[:end]
        is_last = end is not None or len(answer) >= max_new_tokens
        text = model.tokenizer.decode(answer)
        yield text if is_last else text.rstrip(UNFINISHED)
        if is_last:
            return


def _lines() -> Iterator[str]:
    """The lines of standard input, with a sign for a person to type one."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")
