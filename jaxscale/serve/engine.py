"""The engine: `step()` plans, launches, and collects what the step before it drew."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from jaxscale.data.tokenizer import Tokenizer
from jaxscale.models.decoder import Decoder
from jaxscale.parallel.region import Region
from jaxscale.serve.blocks import BlockPool
from jaxscale.serve.config import EngineConfig, num_blocks_for
from jaxscale.serve.decoding import check_prompts
from jaxscale.serve.grammar import Grammars
from jaxscale.serve.members import Member, logprobs_of
from jaxscale.serve.placement import make_placement
from jaxscale.serve.requests import Completion, Delta, RequestConfig, TokenLogprobs
from jaxscale.serve.runner import Launched, Runner
from jaxscale.serve.scheduler import Scheduler
from jaxscale.serve.sequences import FinishReason, Piece, Status
from jaxscale.serve.sequences import Sequence as Scheduled
from jaxscale.serve.text import TextStream
from jaxscale.types import InputError, Params


@dataclasses.dataclass(frozen=True)
class Figures:
    """What the engine is doing and has done.

    Args:
        num_running, num_waiting: sequences.
        num_blocks, num_held: of the cache, and those that sequences hold.
        num_steps: run so far.
        num_prompt_tokens: of the prompts admitted, those included that the cache has spared.
        num_cached_tokens: of these, spared by a cached prefix.
        num_new_tokens: drawn and given out.
        num_preemptions: sequences whose keys were given up.
        weights_version: of the weights.
    """

    num_running: int
    num_waiting: int
    num_blocks: int
    num_held: int
    num_steps: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_new_tokens: int
    num_preemptions: int
    weights_version: int


class Engine:
    """Continues prompts that may come and go at any time.

    Steps are planned while the device runs the one before: a step holds the tokens of that one
    without knowing them. Not safe to be used by several threads; `serve.worker` is.

    Source: Holmes et al. 2024, DeepSpeed-FastGen (arXiv 2401.08671).
    Args:
        decoder: the model.
        params: its parameters.
        config: sizes and policies.
        tokenizer: of texts; None for an engine that is given tokens and returns them.
        region: of a mesh over whose tensor axis the model is spread, see
            `parallel.region.make_serving_operations`; None for one device.
        clock: seconds, for timeouts.
    Raises:
        InputError: the model is not causal, or the device has no room for a page.
    """

    def __init__(
        self,
        decoder: Decoder,
        params: Params,
        *,
        config: EngineConfig = EngineConfig(),
        tokenizer: Tokenizer | None = None,
        region: Region | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        if not decoder.config.is_causal:
            raise InputError("ModelConfig.is_causal", False, "True for a model that is decoded")
        self.config = config
        self.model = decoder.config
        self.tokenizer = tokenizer
        self.grammars = Grammars(tokenizer) if tokenizer else None
        self._clock = clock
        placement = make_placement(decoder, region, block_size=config.block_size)
        num_blocks = config.num_blocks or num_blocks_for(placement, params, config)
        self._blocks = BlockPool(num_blocks, config.block_size)
        limits = config.scheduler(self.model.max_length)
        if region is not None:
            limits = dataclasses.replace(limits, steps_a_launch=1)  # only one device loops
        self._scheduler = Scheduler(limits, self._blocks)
        self._runner = Runner(
            placement,
            params,
            buckets=config.buckets(self.model.max_length),
            num_blocks=num_blocks,
            block_size=config.block_size,
            cache_dtype=decoder.policy.compute,
            num_tokens=tokenizer.vocab_size if tokenizer else self.model.vocab_size,
        )
        self._members: dict[Scheduled, Member] = {}
        self._requests: dict[int, list[Member]] = {}
        self._in_flight: Launched | None = None
        self.is_paused = False
        self._num_requests = self._num_sequences = self._num_steps = 0
        self._num_prompt_tokens = self._num_cached_tokens = self._num_new_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return not self.is_paused and (self._scheduler.has_work or self._in_flight is not None)

    def add(self, prompt: str | Sequence[int], config: RequestConfig = RequestConfig()) -> int:
        """Takes a request in; returns its number.

        Raises:
            InputError: the prompt is empty, holds unknown tokens, or is too long for the model or
                the cache with its new tokens.
        """
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        check_prompts([tokens], self.model, config.max_new_tokens)
        needs_text = [name for name in ("stop", "grammar") if getattr(config, name)]
        if needs_text and self.tokenizer is None:
            raise InputError(needs_text[0], getattr(config, needs_text[0]), "an engine with texts")
        request = self._num_requests
        timeout_s = config.timeout_s
        deadline_s = None if timeout_s is None else self._clock() + timeout_s
        members = []
        for index in range(config.num_sequences):
            sequence = Scheduled(
                number=self._num_sequences + index,
                prompt=tokens,
                max_new_tokens=config.max_new_tokens,
                priority=config.priority,
                deadline_s=deadline_s,
                is_synchronous=config.grammar is not None,
                switch_lengths=self.model.switch_lengths,
            )
            text = None
            if self.tokenizer:
                text = TextStream(self.tokenizer, config.stop, config.spelt)
            matcher = self.grammars.begin(config.grammar) if config.grammar else None
            members.append(Member(request, index, config, sequence, text, matcher))
        for member in members:
            self._scheduler.add(member.sequence)
            self._members[member.sequence] = member
        self._requests[request] = members
        self._num_requests += 1
        self._num_sequences += len(members)
        return request

    def add_all(
        self,
        prompts: Sequence[str | Sequence[int]],
        config: RequestConfig,
    ) -> list[int]:
        """Takes in a request for each prompt; arguments and errors as `add`, and then none."""
        requests: list[int] = []
        try:
            for prompt in prompts:
                requests.append(self.add(prompt, config))
        except InputError:
            for request in requests:
                self.cancel(request)
            raise
        return requests

    def cancel(self, request: int) -> None:
        """Ends a request in whatever state it is; its blocks are free at once."""
        for member in self._requests.pop(request, ()):
            self._scheduler.finish(member.sequence, FinishReason.CANCELLED)
            del self._members[member.sequence]

    def step(self) -> list[Delta]:
        """Launches the next step and returns what the one before it drew."""
        if self.is_paused:
            return []
        plan = self._scheduler.schedule(self._clock())
        for sequence in plan.admitted:
            self._admit(sequence)
        launched = None
        if plan.pieces:
            members = [self._members[piece.sequence] for piece in plan.pieces]
            pairs = zip(members, plan.pieces, strict=True)
            masks = [member.mask(piece) for member, piece in pairs]
            configs = [member.config for member in members]
            launched = self._runner.launch(plan.pieces, configs, masks)
            self._num_steps += plan.pieces[0].num_steps
        expired = [self._last_delta(self._members[sequence]) for sequence in plan.expired]
        before, self._in_flight = self._in_flight, launched
        return expired + self._collect(before)

    def swap(self, params: Params) -> list[Delta]:
        """Takes other weights; what runs goes on with them, from the tokens it has.

        Their keys are computed again, and no prefix that the old weights computed is used.

        Returns:
            What the step in flight drew, by the old weights.
        """
        deltas = self._stand_still()
        self._runner.swap(params)
        return deltas

    def pause(self) -> list[Delta]:
        """Gives the memory of the cache back; `step` does nothing until `resume`.

        Returns:
            What the step in flight drew.
        """
        deltas = [] if self.is_paused else self._stand_still()
        self._runner.free_pages()
        self.is_paused = True
        return deltas

    def resume(self) -> None:
        """Goes on after `pause`: what was running is computed again from the tokens it has."""
        if self.is_paused:
            self._runner.take_pages()
            self.is_paused = False

    def warm_up(self) -> int:
        """Compiles all that steps may need but filters, penalties and log-probabilities.

        Returns:
            How many shapes of steps there are.
        """
        return self._runner.warm_up(self._scheduler.config.steps_a_launch)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        config: RequestConfig = RequestConfig(),
    ) -> list[list[Completion]]:
        """Continues each prompt, all of them together: [prompt][sequence].

        Raises:
            InputError: as `add`; then none has been run.
        """
        requests = self.add_all(prompts, config)
        found = {
            (request, index): Completion()
            for request in requests
            for index in range(config.num_sequences)
        }
        while self.has_work:
            for delta in self.step():
                if (delta.request, delta.index) in found:
                    found[delta.request, delta.index].add(delta)
        indices = range(config.num_sequences)
        return [[found[request, index] for index in indices] for request in requests]

    def figures(self) -> Figures:
        """What the engine is doing and has done."""
        scheduler = self._scheduler
        return Figures(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            num_blocks=self._blocks.num_blocks,
            num_held=self._blocks.num_held,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_new_tokens=self._num_new_tokens,
            num_preemptions=scheduler.num_preemptions,
            weights_version=self._runner.weights_version,
        )

    def _stand_still(self) -> list[Delta]:
        """Collects the step in flight and takes slots and blocks from all that run."""
        before, self._in_flight = self._in_flight, None
        deltas = self._collect(before)
        self._scheduler.preempt_all()
        return deltas

    def _admit(self, sequence: Scheduled) -> None:
        member = self._members[sequence]
        self._runner.admit(sequence, member.config, member.index)
        if not sequence.num_preemptions:
            self._num_prompt_tokens += len(sequence.prompt)
            self._num_cached_tokens += sequence.num_cached

    def _collect(self, launched: Launched | None) -> list[Delta]:
        """Waits for a step, and hands out what it drew."""
        if launched is None:
            return []
        tokens = np.asarray(launched.tokens).tolist()
        logprobs = launched.logprobs and tuple(np.asarray(each) for each in launched.logprobs)
        deltas = []
        for piece, row in zip(launched.pieces, launched.rows, strict=True):
            for step in range(len(tokens)):
                if not piece.is_drawing or piece.sequence.status is Status.FINISHED:
                    break
                member = self._members[piece.sequence]
                member.weights_version = launched.weights_version
                of_token = logprobs_of(logprobs, (step, row), member.config.num_logprobs)
                deltas.append(self._append(piece, tokens[step][row], of_token))
        return deltas

    def _append(
        self,
        piece: Piece,
        token: int,
        logprobs: tuple[TokenLogprobs, ...],
    ) -> Delta:
        """Gives a token to its sequence, and ends it there if it is the last."""
        sequence = piece.sequence
        member = self._members[sequence]
        self._num_new_tokens += 1
        self._scheduler.commit(piece, [token])
        is_end = self._is_end(token, member.config)
        text = ""
        if member.text and not is_end:
            text = member.text.add(token)
        if member.matcher:
            member.matcher.accept(token)
            is_end |= member.matcher.is_stuck
        if is_end or (member.text and member.text.is_stopped):
            self._scheduler.finish(sequence, FinishReason.STOP)
            sequence.finish_reason = FinishReason.STOP  # also at the longest length
        if sequence.status is Status.FINISHED:
            return self._last_delta(member, text, (token,), logprobs)
        return member.delta(text, (token,), logprobs)

    def _is_end(self, token: int, config: RequestConfig) -> bool:
        is_eos = self.tokenizer is not None and token == self.tokenizer.eos_id
        goes_on = config.ignore_eos and config.grammar is None
        return (is_eos and not goes_on) or token in config.stop_ids

    def _last_delta(
        self,
        member: Member,
        text: str = "",
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> Delta:
        """The end of a sequence, with the text that was held back; forgets the sequence."""
        del self._members[member.sequence]
        siblings = self._requests[member.request]
        siblings.remove(member)
        if not siblings:
            del self._requests[member.request]
        if member.text:
            text += member.text.flush()
        return member.delta(text, tokens, logprobs)
