"""The engine: `step()` plans, launches, and collects what the step before it drew."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import jax.numpy as jnp

from jaxscale.data.tokenizer import Tokenizer
from jaxscale.models.decoder import Decoder
from jaxscale.models.lora import Adapters, factor_table, side_by_side
from jaxscale.parallel.region import Region
from jaxscale.serve.blocks import BlockPool
from jaxscale.serve.collecting import Collector
from jaxscale.serve.config import EngineConfig, num_blocks_for, page_bytes
from jaxscale.serve.decoding import check_prompts
from jaxscale.serve.drafting import Draft, check_draft, make_drafter
from jaxscale.serve.figures import Figures
from jaxscale.serve.grammar import Grammars
from jaxscale.serve.members import Member
from jaxscale.serve.placement import check_adapters, check_shapes, make_placement, shapes_of
from jaxscale.serve.programs import FACTORS
from jaxscale.serve.requests import Completion, Delta, RequestConfig
from jaxscale.serve.runner import Launched, Runner
from jaxscale.serve.scheduler import Scheduler
from jaxscale.serve.sequences import Sequence as Scheduled
from jaxscale.serve.text import TextStream
from jaxscale.types import InputError, Params


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
        draft: a smaller model that guesses `EngineConfig.num_drafts` tokens ahead; None guesses
            them from the text itself.
        adapters: low-rank ones by name, of which each request may have one; on one device.
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
        draft: Draft | None = None,
        adapters: Mapping[str, Adapters] = MappingProxyType({}),
        clock: Callable[[], float] = time.monotonic,
    ):
        if not decoder.config.is_causal:
            raise InputError("ModelConfig.is_causal", False, "True for a model that is decoded")
        self.config = config
        self.model = decoder.config
        self.tokenizer = tokenizer
        self.grammars = Grammars(tokenizer) if tokenizer else None
        self._clock = clock
        self._compute = decoder.policy.compute
        placement = make_placement(
            decoder,
            region,
            block_size=config.block_size,
            cache_dtype=config.cache_dtype,
        )
        check_draft(draft, config, self.model)
        num_blocks = config.num_blocks or num_blocks_for(
            decoder,
            params,
            config,
            tensor=placement.tensor,
            draft=draft.decoder if draft else None,
        )
        num_places = config.host_bytes // page_bytes(decoder, config)
        self._blocks = BlockPool(num_blocks, config.block_size, num_places)
        limits = config.scheduler(self.model.max_length)
        if region is not None:
            limits = dataclasses.replace(limits, steps_a_launch=1)  # only one device loops
        self._scheduler = Scheduler(limits, self._blocks)
        num_tokens = tokenizer.vocab_size if tokenizer else self.model.vocab_size
        self.adapters = dict(adapters)
        check_adapters(placement, adapters)
        self._shapes = shapes_of(params)
        self._runner = Runner(
            placement,
            self._with_adapters(params),
            buckets=config.buckets(self.model.max_length),
            num_blocks=num_blocks,
            block_size=config.block_size,
            cache_dtype=config.cache_dtype or decoder.policy.compute,
            num_tokens=num_tokens,
            adapters=tuple(adapters),
        )
        self._drafter = make_drafter(draft, config, num_blocks=num_blocks, num_tokens=num_tokens)
        self._collector = Collector(self._scheduler, tokenizer)
        self._in_flight: Launched | None = None
        self.is_paused = False
        self._num_requests = self._num_sequences = self._num_steps = 0
        self._num_prompt_tokens = self._num_cached_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        if self.is_paused:
            return self.wait_s() == 0
        return self._scheduler.has_work or self._in_flight is not None

    def wait_s(self) -> float:
        """Seconds until an engine that is paused has to end a request; infinity for never."""
        if not self.is_paused:
            return math.inf
        return max(self._scheduler.next_deadline_s() - self._clock(), 0)

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence: what the model takes, and the cache has room for."""
        num_slots = self._blocks.num_blocks * self.config.block_size
        return min(self.model.max_length, num_slots + 1)  # the last token needs none

    def add(self, prompt: str | Sequence[int], config: RequestConfig = RequestConfig()) -> int:
        """Takes a request in; returns its number.

        Args:
            prompt: a text, or its tokens.
            config: how it is continued.
        Raises:
            InputError: the prompt is empty, holds unknown tokens, or is too long for the model or
                the cache with its new tokens.
        """
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        check_prompts([tokens], self.model, config.max_new_tokens)
        needs_text = [name for name in ("stop", "grammar") if getattr(config, name)]
        if needs_text and self.tokenizer is None:
            raise InputError(needs_text[0], getattr(config, needs_text[0]), "an engine with texts")
        if config.adapter not in (None, *self.adapters):
            raise InputError("adapter", config.adapter, f"None or one of {list(self.adapters)}")
        request = self._num_requests
        timeout_s = config.timeout_s
        now_s = self._clock()
        deadline_s = None if timeout_s is None else now_s + timeout_s
        is_scored = config.num_prompt_logprobs is not None
        members = []
        for index in range(config.num_sequences):
            sequence = Scheduled(
                number=self._num_sequences + index,
                prompt=tokens,
                max_new_tokens=config.max_new_tokens,
                priority=config.priority,
                deadline_s=deadline_s,
                is_synchronous=config.grammar is not None or self._can_speculate(config),
                salt=f"{self.config.cache_dtype}/{config.adapter!r}",
                scores=[None] if is_scored and not index else None,
                switch_lengths=self.model.switch_lengths,
            )
            text = None
            if self.tokenizer:
                text = TextStream(self.tokenizer, config.stop, config.spelt)
            matcher = self.grammars.begin(config.grammar) if config.grammar else None
            member = Member(request, index, config, sequence, text, matcher, added_s=now_s)
            members.append(member)
        for member in members:
            self._scheduler.add(member.sequence)
        self._collector.open(request, members)
        self._num_requests += 1
        self._num_sequences += len(members)
        return request

    def add_all(
        self,
        prompts: Sequence[str | Sequence[int]],
        configs: Sequence[RequestConfig],
    ) -> list[int]:
        """Takes in a request for each prompt; arguments and errors as `add`, and then none."""
        requests: list[int] = []
        try:
            for prompt, config in zip(prompts, configs, strict=True):
                requests.append(self.add(prompt, config))
        except InputError:
            for request in requests:
                self.cancel(request)
            raise
        return requests

    def cancel(self, request: int) -> None:
        """Ends a request in whatever state it is; its blocks are free at once."""
        self._collector.cancel(request)

    def step(self) -> list[Delta]:
        """Launches the next step and returns what the one before it drew."""
        if self.is_paused:
            return self._expired(self._scheduler.expire(self._clock()))
        self._propose()
        plan = self._scheduler.schedule(self._clock())
        self._runner.move(self._blocks.take_moves())
        for sequence in plan.admitted:
            self._admit(sequence)
        launched = None
        if plan.pieces:
            members = [self._collector.members[piece.sequence] for piece in plan.pieces]
            pairs = zip(members, plan.pieces, strict=True)
            masks = [member.masks(piece) for member, piece in pairs]
            configs = [member.config for member in members]
            launched = self._runner.launch(plan.pieces, configs, masks)
            self._num_steps += max(piece.num_steps for piece in plan.pieces)
        expired = self._expired(plan.expired)
        before, self._in_flight = self._in_flight, launched
        return expired + self._collector.collect(before)

    def swap(self, params: Params) -> list[Delta]:
        """Takes other weights; what runs goes on with them, from the tokens it has.

        Their keys are computed again, and no prefix that the old weights computed is used.

        Returns:
            What the step in flight drew, by the old weights.
        Raises:
            InputError: they are of another model; then the old ones stay.
        """
        check_shapes(params, self._shapes)
        deltas = self._stand_still()
        self._runner.swap(self._with_adapters(params))
        for sequence in self._collector.members:
            if sequence.is_scoring:
                del sequence.scores[1:]  # the old weights'
        return deltas

    def pause(self) -> list[Delta]:
        """Gives the memory of the cache back; until `resume` a `step` only ends what times out.

        Returns:
            What the step in flight drew.
        """
        deltas = [] if self.is_paused else self._stand_still()
        self._runner.free_pages()
        if self._drafter is not None:
            self._drafter.pause()
        self.is_paused = True
        return deltas

    def resume(self) -> None:
        """Goes on after `pause`: what was running is computed again from the tokens it has."""
        if self.is_paused:
            self._runner.take_pages()
            if self._drafter is not None:
                self._drafter.resume()
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

        Args:
            prompts: texts, or their tokens.
            config: how each of them is continued.
        Raises:
            InputError: as `add`, or the engine is paused; then none has been run.
        """
        if self.is_paused:
            raise InputError("Engine.is_paused", True, "False: resume() comes before generate()")
        requests = self.add_all(prompts, [config] * len(prompts))
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
            num_spilled=self._blocks.num_spilled,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_new_tokens=self._collector.num_new_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_drafts=self._collector.num_drafts,
            num_accepted=self._collector.num_accepted,
            weights_version=self._runner.weights_version,
        )

    def _expired(self, sequences: Sequence[Scheduled]) -> list[Delta]:
        return [self._collector.expire(sequence) for sequence in sequences]

    def _with_adapters(self, params: Params) -> Params:
        """The parameters as the programs take them."""
        adapters = list(self.adapters.values())
        if not adapters:
            return params
        table = {FACTORS: {"table": jnp.asarray(factor_table(adapters))}}
        return side_by_side(params, adapters, self._compute) | table

    def _stand_still(self) -> list[Delta]:
        """Collects the step in flight and takes slots and blocks from all that run."""
        before, self._in_flight = self._in_flight, None
        deltas = self._collector.collect(before)
        self._scheduler.preempt_all()
        return deltas

    def _can_speculate(self, config: RequestConfig) -> bool:
        """Whether drafts may be checked: penalties count what was drawn before each token."""
        return self._drafter is not None and not config.is_penalised

    def _propose(self) -> None:
        """Gives the sequences drafts whose next token has to be planned."""
        if self._drafter is None:
            return
        ready = [
            self._collector.members[sequence]
            for sequence in self._scheduler.running
            if sequence.is_decoding and not sequence.is_in_flight
        ]
        ready = [member for member in ready if self._can_speculate(member.config)]
        drafts = self._drafter.propose(ready, self.config.num_drafts)
        for member, tokens in zip(ready, drafts, strict=True):
            member.sequence.drafts = tokens

    def _admit(self, sequence: Scheduled) -> None:
        member = self._collector.members[sequence]
        if self._drafter is not None:
            self._drafter.admit(member)
        self._runner.admit(sequence, member.config, member.index)
        if not sequence.num_preemptions:
            member.waited_s = self._clock() - member.added_s
            self._num_prompt_tokens += len(sequence.prompt)
            self._num_cached_tokens += sequence.num_cached
