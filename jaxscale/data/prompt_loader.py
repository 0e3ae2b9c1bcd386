"""From prompts to those of a step."""

import hashlib
import json
import logging
from typing import Any

import numpy as np

from jaxscale.data.loader import DataConfig
from jaxscale.data.permutation import permute
from jaxscale.data.prompts import Prompt
from jaxscale.data.split import Split, hash_text, is_held_out
from jaxscale.data.tokenizer import load_tokenizer
from jaxscale.types import InputError

logger = logging.getLogger(__name__)


class PromptLoader:
    """The prompts of one split, without end; shuffled in every epoch.

    Args:
        config: whose sources are of `PromptSource`; a batch has a row for each answer.
        num_answers: to each prompt.
        max_new_tokens: of an answer; a prompt that leaves less room in a row is left out.
        split: as of `make_loader`.
    Raises:
        InputError: sources have weights or are of something else, prompts are held out by their
            keys, or there is none.
    """

    def __init__(
        self,
        config: DataConfig,
        num_answers: int,
        max_new_tokens: int,
        split: Split = "train",
    ):
        if not config.is_prompted:
            expected = "PromptSource for Run.rollouts and HeldOutRewards"
            raise InputError("DataConfig.sources", config.sources, expected)
        if config.weights is not None:
            raise InputError("DataConfig.weights", config.weights, "None with PromptSource")
        if config.held_out_by != "text":
            raise InputError("DataConfig.held_out_by", config.held_out_by, "'text' of PromptSource")
        tokenizer = load_tokenizer(config.tokenizer)
        every = [prompt for source in config.sources for prompt in source.prompts(tokenizer)]
        hashes = [hash_text(str(prompt.tokens)) for prompt in every]
        is_other = is_held_out(hashes, config.held_out_fraction) == (split == "train")
        own = [prompt for prompt, other in zip(every, is_other, strict=True) if not other]
        # The last token of a row is a label alone.
        longest = config.sequence_length + 1 - max_new_tokens
        if longest < 1:
            expected = f"at most DataConfig.sequence_length = {config.sequence_length}"
            raise InputError("RolloutConfig.max_new_tokens", max_new_tokens, expected)
        self.prompts = [prompt for prompt in own if len(prompt.tokens) <= longest]
        self.num_others = int(is_other.sum())
        if left_out := len(own) - len(self.prompts):
            logger.warning("%d prompts are longer than %d tokens and left out", left_out, longest)
        if not self.prompts:
            expected = f"prompts of at most {longest} tokens in the split {split!r}"
            raise InputError("DataConfig.sources", config.sources, expected)
        self._config, self._num_answers, self._num_served = config, num_answers, 0
        self._facts = {
            "sequence_length": config.sequence_length,
            "held_out_fraction": config.held_out_fraction,
            "held_out_by": "text",
            "seed": config.seed,
            "tokenizer": tokenizer.fingerprint,
            "sources": _fingerprint(self.prompts),
        }

    def __next__(self) -> dict[str, np.ndarray]:
        """{"prompts": [P] numbers in `prompts`, "draws": [P] numbers that no other has}."""
        draws = self._num_served + np.arange(self._config.batch_size // self._num_answers)
        epochs, within = np.divmod(draws, len(self.prompts))
        numbers = [
            permute([place], len(self.prompts), seed=self._config.seed, stream=0, epoch=int(epoch))
            for epoch, place in zip(epochs, within, strict=True)
        ]
        self._num_served += len(draws)
        return {"prompts": np.concatenate(numbers), "draws": draws}

    def state(self) -> dict[str, Any]:
        """JSON-able: how many prompts were served, and what they depend on."""
        return {
            "num_served": self._num_served,
            "num_answers": self._num_answers,
            "depends_on": self._facts,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the prompts served; with another batch size, as many more at a time.

        Raises:
            InputError: the state is of other prompts or settings; names the field.
        """
        for name, value in self._facts.items():
            saved = state["depends_on"].get(name)
            if saved != value:
                expected = f"{saved!r}, with which the run was begun"
                raise InputError(f"DataConfig.{name}", value, expected)
        if state["num_answers"] != self._num_answers:  # what is drawn would repeat
            expected = f"{state['num_answers']}, with which the run was begun"
            raise InputError("RolloutConfig.num_answers", self._num_answers, expected)
        self._num_served = state["num_served"]


def _fingerprint(prompts: list[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.tokens, prompt.line], sort_keys=True).encode())
    return digest.hexdigest()
