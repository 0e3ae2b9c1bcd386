"""What an engine is doing and has done, as numbers."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Figures:
    """What the engine is doing and has done.

    Args:
        num_running, num_waiting: sequences.
        num_blocks, num_held: of the cache, and those that sequences hold.
        num_spilled: blocks whose content is in the host's memory.
        num_steps: run so far.
        num_prompt_tokens: of the prompts admitted, those included that the cache has spared.
        num_cached_tokens: of these, spared by a cached prefix.
        num_new_tokens: drawn and given out.
        num_preemptions: sequences whose keys were given up.
        num_drafts: tokens that were guessed and checked.
        num_accepted: of these, right ones.
        weights_version: of the weights.
    """

    num_running: int
    num_waiting: int
    num_blocks: int
    num_held: int
    num_spilled: int
    num_steps: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_new_tokens: int
    num_preemptions: int
    num_drafts: int
    num_accepted: int
    weights_version: int
