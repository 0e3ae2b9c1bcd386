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
        config: whose sources are of `PromptSource`.
        num: prompts at a time.
        max_new_tokens: of an answer; a prompt that leaves less room in a row is left out.
        split: as of `make_loader`.
    Raises:
        InputError: sources have weights, or there is no prompt.
    """

    def __init__(self, config: DataConfig, num: int, max_new_tokens: int, split: Split = "train"):
        if config.weights is not None:
            raise InputError("DataConfig.weights", config.weights, "None with PromptSource")
        tokenizer = load_tokenizer(config.tokenizer)
        every = [prompt for source in config.sources for prompt in source.prompts(tokenizer)]
        hashes = [hash_text(str(prompt.tokens)) for prompt in every]
        is_other = is_held_out(hashes, config.held_out_fraction) == (split == "train")
        own = [prompt for prompt, other in zip(every, is_other, strict=True) if not other]
        # The last token of a row is a label alone.
        longest = config.sequence_length + 1 - max_new_tokens
        self.prompts = [prompt for prompt in own if len(prompt.tokens) <= longest]
        self.num_others = int(is_other.sum())
        if left_out := len(own) - len(self.prompts):
            logger.warning("%d prompts are longer than %d tokens and left out", left_out, longest)
        if not self.prompts:
            expected = f"prompts of at most {longest} tokens in the split {split!r}"
            raise InputError("DataConfig.sources", config.sources, expected)
        self._config, self._num, self._next = config, num, 0
        self._facts = {
            "sequence_length": config.sequence_length,
            "batch_size": config.batch_size,
            "held_out_fraction": config.held_out_fraction,
            "held_out_by": "text",
            "seed": config.seed,
            "tokenizer": tokenizer.fingerprint,
            "sources": _fingerprint(self.prompts),
        }

    def __next__(self) -> dict[str, np.ndarray]:
        """{"prompts": [num] numbers in `prompts`, "draws": [num] numbers that no other has}."""
        draws = self._next * self._num + np.arange(self._num)
        epochs, within = np.divmod(draws, len(self.prompts))
        numbers = [
            permute([place], len(self.prompts), seed=self._config.seed, stream=0, epoch=int(epoch))
            for epoch, place in zip(epochs, within, strict=True)
        ]
        self._next += 1
        return {"prompts": np.concatenate(numbers), "draws": draws}

    def state(self) -> dict[str, Any]:
        """As of `TrainLoader.state`."""
        return {"batch": self._next, "depends_on": self._facts}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues at `state`; raises InputError if it is of other prompts or settings."""
        for name, value in self._facts.items():
            saved = state["depends_on"].get(name)
            if saved != value:
                expected = f"{saved!r}, with which the run was begun"
                raise InputError(f"DataConfig.{name}", value, expected)
        self._next = state["batch"]


def _fingerprint(prompts: list[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.tokens, prompt.line], sort_keys=True).encode())
    return digest.hexdigest()
