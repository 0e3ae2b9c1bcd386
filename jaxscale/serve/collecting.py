"""What a step drew, given to the sequences, and the sequences that are open."""

from collections.abc import Sequence as List

import numpy as np

from jaxscale.data.tokenizer import Tokenizer
from jaxscale.serve.members import Member, Score
from jaxscale.serve.requests import Delta, RequestConfig, TokenLogprobs
from jaxscale.serve.runner import Launched
from jaxscale.serve.scheduler import Scheduler
from jaxscale.serve.sequences import FinishReason, Piece, Sequence, Status


class Collector:
    """Knows the open sequences, and gives them what steps drew.

    Args:
        scheduler: told of what ends.
        tokenizer: of texts; None where there are none.
    """

    def __init__(self, scheduler: Scheduler, tokenizer: Tokenizer | None):
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self.members: dict[Sequence, Member] = {}
        self._requests: dict[int, list[Member]] = {}
        self.num_new_tokens = 0
        self.num_drafts = 0
        self.num_accepted = 0

    def open(self, request: int, members: List[Member]) -> None:
        """Takes the sequences of a request in."""
        self._requests[request] = list(members)
        self.members |= {member.sequence: member for member in members}

    def cancel(self, request: int) -> None:
        """Ends those of a request that are open."""
        for member in self._requests.pop(request, ()):
            self._scheduler.finish(member.sequence, FinishReason.CANCELLED)
            del self.members[member.sequence]

    def expire(self, sequence: Sequence) -> Delta:
        """The end of a sequence whose deadline has passed."""
        return self._last_delta(self.members[sequence])

    @property
    def num_open(self) -> int:
        """Requests with a sequence that has not ended."""
        return len(self._requests)

    def collect(self, launched: Launched | None) -> list[Delta]:
        """Waits for a step, and hands out what it drew."""
        if launched is None:
            return []
        tokens = np.asarray(launched.tokens).tolist()
        logprobs = launched.logprobs and tuple(np.asarray(each) for each in launched.logprobs)
        deltas = []
        for number, piece in enumerate(launched.pieces):
            if piece.sequence.status is Status.FINISHED:
                continue
            member = self.members[piece.sequence]
            member.weights_version = launched.weights_version
            row = launched.rows[number]
            places = [(step, row) for step in range(piece.num_steps)]
            if piece.num_extra:
                places = [(0, row) for row in launched.rows_of(number)]
            if piece.is_scored:
                self._score(member, piece, [Score.at(logprobs, place) for place in places])
                places = places[-1:]
            if piece.is_drawing:
                drawn = [tokens[step][row] for step, row in places]
                deltas.append(self._take(member, piece, drawn, places, logprobs))
        return deltas

    def _take(
        self,
        member: Member,
        piece: Piece,
        drawn: list[int],
        places: list[tuple[int, int]],
        logprobs: tuple[np.ndarray, ...] | None,
    ) -> Delta:
        """Gives a sequence the tokens that a piece drew for it, until it ends."""
        if piece.drafts:
            drawn = piece.accepted(drawn)
            self.num_drafts += len(piece.drafts)
            self.num_accepted += len(drawn) - 1
            self._scheduler.settle(piece, len(drawn))
        count = None if logprobs is None else member.config.num_logprobs
        text, tokens, scores = "", [], []
        for token, place in zip(drawn, places, strict=False):
            if member.matcher and not member.matcher.allows(token):
                # The head forbids every token of the grammar, and something else was drawn.
                self._scheduler.finish(piece.sequence, FinishReason.LENGTH)
                break
            text += self._append(member, piece, token)
            tokens.append(token)
            if count is not None:
                scores.append(Score.at(logprobs, place).logprobs(count))
            if piece.sequence.status is Status.FINISHED:
                break
        is_last = piece.sequence.status is Status.FINISHED
        finish = self._last_delta if is_last else Member.delta
        return finish(member, text, tuple(tokens), tuple(scores))

    def _score(self, member: Member, piece: Piece, scores: list[Score]) -> None:
        """Takes the log-probabilities of prompt tokens, and keeps those of known blocks."""
        member.score(piece, scores)
        sequence, size = piece.sequence, self._scheduler.blocks.block_size
        if sequence.chain is None or sequence.is_scoring:
            return
        for number, digest in enumerate(sequence.chain.digests(sequence.prompt)):
            here = sequence.scores[number * size : (number + 1) * size]
            if len(here) == size:
                self._scheduler.blocks.keep_scores(digest, here)

    def _append(
        self,
        member: Member,
        piece: Piece,
        token: int,
    ) -> str:
        """Gives a token to its sequence, and ends it there if it is the last; its text."""
        sequence, text = piece.sequence, ""
        self.num_new_tokens += 1
        self._scheduler.commit(piece, (token,))
        is_end, is_cut = self._is_end(token, member.config), False
        if member.text and not is_end:
            text = member.text.add(token)
        if member.matcher:
            member.matcher.accept(token)
            is_cut = member.matcher.is_stuck and not is_end
        if is_end or is_cut or (member.text and member.text.is_stopped):
            self._scheduler.finish(sequence, FinishReason.STOP)
            # Also at the longest length. What its grammar can no longer follow is not whole.
            sequence.finish_reason = FinishReason.LENGTH if is_cut else FinishReason.STOP
        return text

    def _is_end(self, token: int, config: RequestConfig) -> bool:
        is_eos = self._tokenizer is not None and token == self._tokenizer.eos_id
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
        del self.members[member.sequence]
        siblings = self._requests[member.request]
        siblings.remove(member)
        if not siblings:
            del self._requests[member.request]
        if member.text:
            text += member.text.flush()
        return member.delta(text, tokens, logprobs)
