"""Reward models of a run: what they learn by, and `score`, what they say of texts."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale.data.chat_template import read_chat_template
from jaxscale.data.chats import ASSISTANT, chat_document, checked
from jaxscale.data.encoding import encoded
from jaxscale.data.prompts import Prompt
from jaxscale.data.tokenizer import Tokenizer
from jaxscale.launch.runtime import apply_runtime
from jaxscale.models.decoder import Decoder
from jaxscale.models.values import token_values
from jaxscale.parallel.region import LossFn
from jaxscale.rlhf.reward import RewardLoss
from jaxscale.rlhf.rollouts import Answer
from jaxscale.run.huggingface import files_beside
from jaxscale.run.model import LanguageModel, load, opened
from jaxscale.run.run import Run, check_pairs
from jaxscale.types import Array, Batch, InputError, Params, check_types


def reward_loss(
    run: Run,
    *,
    compared: str = "each_token",
    centering: float = 0.0,
) -> LossFn:
    """The loss of a reward model, see `rlhf.reward.RewardLoss`.

    Args:
        run: whose model, which has a value head, learns from pairs of `PreferenceSource`.
        compared: "each_token" from the first in which the answers differ, or "last_token" of each.
        centering: weight of the square of the sum of both scores.
    Raises:
        InputError: the data are no pairs, the mesh has a pipeline, the model is not causal or has
            no value head, or a setting is out of its bounds.
    """
    check_pairs(run, "reward_loss")
    return RewardLoss(
        model=run.model,
        policy=run.policy,
        execution=run.execution,
        compared=compared,
        centering=centering,
    )


def score(
    *,
    run: Run | str | Path,
    texts: tuple[str, ...] | str,
    prompt: str | None = None,
    step: int | None = None,
) -> list[float]:
    """Prints and returns a reward model's score of each text, on one device.

    Args:
        run: the run; or the directory of one, or of Hugging Face, with a reward model.
        texts: one or more texts. A score is the value of a text's last token.
        prompt: what the texts are answers of the assistant to, by the tokenizer's chat template;
            None for texts that are scored as they stand.
        step: which checkpoint; the newest when None.
    Raises:
        InputError: the model has no value head, there is no such checkpoint or no template, or a
            text has no token, too many for the model, or spells a special token in an answer.
    """
    run = opened(run)
    apply_runtime(run.runtime, str(run.path))
    texts = (texts,) if isinstance(texts, str) else texts
    model = _load(run, step)
    if prompt is None:
        tokens = [model.tokenizer.encode(text) for text in texts]
    else:
        tokens = _answers(prompt, texts, model.tokenizer, files_beside(run))
    scores = _scores(model, tokens)
    for text, each in zip(texts, scores, strict=True):
        print(f"{each:10.4f}  {text!r}")
    return scores


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A reward of `RolloutConfig`: a reward model's value of an answer's last token.

    It reads the tokens that were written, so that both models have one tokenizer.

    Args:
        directory: of the reward model's run, or of Hugging Face.
        step: which checkpoint; the newest when None.
    Cost: the whole model on one device.
    """

    directory: str
    step: int | None = None

    def __post_init__(self):
        check_types(self)

    def check(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
    ) -> None:
        """Loads the model.

        Raises:
            InputError: as `score`, it has another tokenizer than this, or an answer to a prompt
                could be too long for it.
        """
        own = self._model.tokenizer.fingerprint
        if own != tokenizer.fingerprint:
            expected = f"a reward model with the tokenizer of the run, {tokenizer.fingerprint}"
            raise InputError("RewardModel.directory", f"{self.directory}, of {own}", expected)
        longest = max(len(prompt.tokens) for prompt in prompts)
        max_length = self._model.decoder.config.max_length
        if longest + max_new_tokens > max_length:
            expected = (
                f"a reward model with prompt + max_new_tokens <= max_length = {max_length}, here "
                f"{longest} + {max_new_tokens}"
            )
            raise InputError("RewardModel.directory", self.directory, expected)

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]:
        """The score of the answer to each prompt."""
        pairs = zip(prompts, answers, strict=True)
        return _scores(self._model, [[*prompt.tokens, *answer.tokens] for prompt, answer in pairs])

    @functools.cached_property
    def _model(self) -> LanguageModel:
        return _load(opened(self.directory), self.step)


def _load(run: Run, step: int | None) -> LanguageModel:
    if not run.model.use_value_head:
        raise InputError("ModelConfig.use_value_head", False, "True for a model that scores")
    return load(run, step=step)


def _scores(model: LanguageModel, tokens: Sequence[Sequence[int]]) -> list[float]:
    batch, last = _rows(tokens, model.decoder.config.max_length)
    values = _values(model.decoder, model.pure_params(), batch)
    return [float(value) for value in values[np.arange(len(tokens)), last]]


def _answers(
    prompt: str,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    folder: Path,
) -> list[np.ndarray]:
    """The tokens of each answer with its prompt, up to what ends it, as in training."""
    template = read_chat_template(folder)
    found = []
    for number, text in enumerate(texts):
        label, special = f"texts[{number}]", getattr(tokenizer, "special_tokens", ())
        turns = {"role": "user", "content": prompt}, {"role": ASSISTANT, "content": text}
        messages = [checked(turn, label, special) for turn in turns]
        (tokens,), (is_answer,) = encoded([chat_document(template, messages, label)], tokenizer)
        found.append(tokens[: np.flatnonzero(is_answer).max(initial=-1) + 1])
    return found


def _rows(tokens: Sequence[Sequence[int]], max_length: int) -> tuple[Batch, np.ndarray]:
    """A batch with a row for each text, and the place of the last token of each.

    Rows have a power of two of tokens, so that lengths share a compilation.
    """
    for number, each in enumerate(tokens):
        if not 0 < len(each) <= max_length:
            expected = f"1 to max_length = {max_length} tokens"
            raise InputError(f"texts[{number}]", f"{len(each)} tokens", expected)
    last = np.array([len(each) - 1 for each in tokens])
    width = min(1 << int(last.max()).bit_length(), max_length)
    rows = np.zeros((len(tokens), width), np.int32)
    for row, each in zip(rows, tokens, strict=True):
        row[: len(each)] = each
    positions = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
    return {"tokens": rows, "positions": jnp.asarray(positions)}, last


@functools.partial(jax.jit, static_argnums=0)
def _values(decoder: Decoder, params: Params, batch: Batch) -> Array:
    x, _, _ = decoder.run_layers(params, decoder.embed(params, batch), decoder.tokens(batch))
    return token_values(decoder, params, x)
