"""Tokens as text while they come: no half characters; trailing spaces are held back until more text follows."""

from custom_components.transforms.chat_transform import ChatTransform

_MAX_TOKENS_DECODED_AGAIN = 32


class TextStream:
    """The text of an answer in pieces. Joined, they are `tokenizer.decode(tokens).strip()`."""

    def __init__(self, tokenizer: ChatTransform) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._follows_text = False  # tokens before `_tokens` were given and forgotten
        self._num_given_chars = 0  # of the text of `_tokens`
        self._withheld = ""
        self._is_started = False

    def text_of(self, token: int) -> str:
        """Give the text that can be shown after this token; often none."""
        self._tokens.append(token)
        text = self._text()
        # A character that is not in the vocabulary comes byte by byte; until it is complete it decodes to U+FFFD.
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        return self._given(text)

    def rest(self) -> str:
        """Give what is left at the end of the answer."""
        return self._given(self._text())

    def _text(self) -> str:
        return self._tokenizer.tokenizer.decode(self._tokens, follows_text=self._follows_text)

    def _given(self, text: str) -> str:
        new = self._withheld + text[self._num_given_chars :]
        self._num_given_chars = len(text)
        if len(self._tokens) > _MAX_TOKENS_DECODED_AGAIN:
            self._tokens.clear()
            self._num_given_chars = 0
            self._follows_text = self._follows_text or bool(text)
        if not self._is_started:
            new = new.lstrip()
        shown = new.rstrip()
        self._withheld = new[len(shown) :]
        self._is_started = self._is_started or bool(shown)
        return shown
