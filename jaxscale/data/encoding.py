"""Documents as tokens, and which of them are learned to be predicted."""

import numpy as np

from jaxscale.data.sources import ChatDocument, Document
from jaxscale.data.tokenizer_kinds import HuggingFaceTokenizer, Tokenizer
from jaxscale.types import InputError

_NONE = np.zeros(0, bool)


def encoded(
    documents: list[Document] | list[ChatDocument],
    tokenizer: Tokenizer,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The tokens of documents; and of chats which are trained, the one that ends them not.

    Args:
        documents: all of one kind.
        tokenizer: that of the run.
    Raises:
        InputError: chats have another tokenizer than one of Hugging Face, or a prompt or an answer
            of a pair has no token of its own.
    """
    if not isinstance(documents[0], ChatDocument):
        texts = [document.text for document in documents]
        return tokenizer.encode_batch(texts), [_NONE]
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise InputError("TokenizerConfig.kind", type(tokenizer), "'huggingface' for chats")
    tokens = []
    trained = []
    for document in documents:
        if document.second is None:
            ids, is_trained = tokenizer.encode_trained(document.text, document.trained)
        else:
            ids, is_trained = _encoded_pair(document, tokenizer)
        tokens.append(ids)
        trained.append(np.append(is_trained, False))
    return tokens, trained


def _encoded_pair(
    document: ChatDocument,
    tokenizer: HuggingFaceTokenizer,
) -> tuple[np.ndarray, np.ndarray]:
    """Both texts one by one; the first ends with its answer, without what is written behind it."""
    place = document.second
    answer, (begin, end) = document.trained
    halves = (
        (document.text[:place], answer),
        (document.text[place:], (begin - place, end - place)),
    )
    encoded_halves = [tokenizer.encode_trained(text, [span]) for text, span in halves]
    for _, is_trained in encoded_halves:
        _check_half(document, is_trained)
    (chosen, of_chosen), (rejected, of_rejected) = encoded_halves
    size = np.flatnonzero(of_chosen)[-1] + 1
    ids = np.append(chosen[:size], rejected)
    is_trained = np.append(of_chosen[:size], of_rejected)
    return ids, is_trained


def _check_half(document: ChatDocument, is_trained: np.ndarray) -> None:
    """Raises InputError unless a prompt and, right behind it, its answer have their own tokens."""
    places = np.flatnonzero(is_trained)
    is_whole = places.size > 0 and places[-1] - places[0] == places.size - 1
    if not is_whole or places[0] == 0:
        expected = "a prompt and answers that have tokens of their own"
        raise InputError(document.key, document.text, expected)


def split_text(document: Document | ChatDocument) -> str:
    """The text whose hash says whether a document is held out: of a pair, what is answered.

    So all pairs of one prompt are on one side.
    """
    is_pair = isinstance(document, ChatDocument) and document.second is not None
    return document.text[: document.trained[0][0]] if is_pair else document.text
