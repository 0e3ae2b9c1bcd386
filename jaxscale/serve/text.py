"""Text of tokens as they come, and the texts at which a continuation ends."""

from collections.abc import Sequence

from jaxscale.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # at the end of a text: bytes that are no character, or none yet


class TextStream:
    """The text of one continuation, piece by piece.

    Text is held back while it may be the beginning of a stop text, or of a character. The pieces
    add up to the text of all tokens.

    Args:
        tokenizer: of the tokens.
        stop: texts before which the continuation ends.
        spelt: special tokens that the text spells; it leaves out all others.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        spelt: Sequence[str] = (),
    ):
        self._tokenizer = tokenizer
        special = getattr(tokenizer, "special_tokens", {})
        self._spelt = {special[name]: name for name in spelt if name in special}
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        # Only the last tokens are decoded; how one reads depends on those before it.
        self._window = 0  # the first that is decoded
        self._given = 0  # characters of these that were given out
        self._read = 0  # tokens that were whole when last looked at
        self._held = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """The text that can be given out now; nothing any more once a stop text was found."""
        if self.is_stopped:
            return ""
        if token in self._spelt:
            self._held += self._new_text(is_last=True) + self._spelt[token]
            self._tokens, self._window, self._given, self._read = [], 0, 0, 0
        else:
            self._tokens.append(token)
            self._held += self._new_text(is_last=False)
        found = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        if found:
            self.is_stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = self._length_of_beginning()
        text, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return text

    def flush(self) -> str:
        """What was held back, once there are no more tokens."""
        if self.is_stopped:
            return ""
        text, self._held = self._held + self._new_text(is_last=True), ""
        return text

    def _new_text(self, is_last: bool) -> str:
        text = self._tokenizer.decode(self._tokens[self._window :])
        if text.endswith(UNFINISHED) and not is_last:
            end = len(text) - 1
            new, self._given = text[self._given : end], max(self._given, end)
            return new
        new = text[self._given :]
        self._window, self._read = self._read, len(self._tokens)
        self._given = len(self._tokenizer.decode(self._tokens[self._window :]))
        return new

    def _length_of_beginning(self) -> int:
        """Characters at the end that a stop text may begin with."""
        longest = 0
        for text in self._stop:
            for length in range(min(len(text) - 1, len(self._held)), longest, -1):
                if self._held.endswith(text[:length]):
                    longest = length
                    break
        return longest
