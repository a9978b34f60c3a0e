"""Tokens as text while they come: no half characters; trailing spaces are held back until more text follows."""

from custom_components.transforms.llama2_chat import Llama2ChatTransform

_MAX_TOKENS_DECODED_AGAIN = 32


class TextStream:
    """The text of an answer in pieces. Joined, they are `tokenizer.decode(tokens).strip()`."""

    def __init__(self, tokenizer: Llama2ChatTransform) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._num_given_chars = 0  # of the text of `_tokens`
        self._withheld = ""
        self._is_started = False

    def text_of(self, token: int) -> str:
        """Give the text that can be shown after this token; often none."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        # A character that is not in the vocabulary comes byte by byte; until it is complete it decodes to U+FFFD.
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        return self._given(text)

    def rest(self) -> str:
        """Give what is left at the end of the answer."""
        return self._given(self._tokenizer.decode(self._tokens))

    def _given(self, text: str) -> str:
        new = self._withheld + text[self._num_given_chars :]
        self._num_given_chars = len(text)
        if len(self._tokens) > _MAX_TOKENS_DECODED_AGAIN:
            # SentencePiece drops the space before the first token, so the next one is decoded after this one.
            del self._tokens[:-1]
            self._num_given_chars = len(self._tokenizer.decode(self._tokens))
        if not self._is_started:
            new = new.lstrip()
        shown = new.rstrip()
        self._withheld = new[len(shown) :]
        self._is_started = self._is_started or bool(shown)
        return shown
