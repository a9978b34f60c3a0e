"""lm-eval's questions as dialogs: it passes prompts as text, from which the ids of a dialog cannot be read."""

import hashlib
import json
from collections.abc import Sequence

from custom_components.runtime.errors import UserError
from custom_components.transforms.chat_transform import ChatTransform


class ChatPrompts:
    """The dialogs of a run's questions by the text that stands for each.

    What spells a control token in a question's text would become one if the text itself were encoded.
    """

    def __init__(self, tokenizer: ChatTransform) -> None:
        self._tokenizer = tokenizer.replace(max_seq_len=None)
        self._dialogs: dict[str, list[dict[str, str]]] = {}

    @property
    def format_name(self) -> str:
        """Name the tokenizer and the prompt format, for lm-eval's cache of requests."""
        digest = hashlib.sha256(json.dumps(self._tokenizer.fingerprint).encode()).hexdigest()
        return f"ChatTransform-{digest[:16]}"

    def text(self, dialog: Sequence[dict[str, str]]) -> str:
        """Show a dialog as it is in the prompt; this text stands for it from now on.

        Args:
            dialog: it ends with a user's message, or with an answer that the model has to continue.

        Raises:
            UserError: it is not a dialog, or a message contains one of the template's own marks.
        """
        text = self._tokenizer.text_of_pieces(self._encoded(dialog))
        self._dialogs[text] = [*dialog]
        return text

    def ids(self, text: str) -> list[int] | None:
        """Encode the dialog that a text stands for; None: it stands for none."""
        dialog = self._dialogs.get(text)
        return None if dialog is None else self._encoded(dialog)

    def ids_with_answer(self, text: str, answer: str) -> list[int]:
        """Encode a dialog with an answer, or with the rest of the one that is started, and no end."""
        dialog = self._dialogs[text]
        if dialog[-1]["role"] == "assistant":
            *dialog, started = dialog
            answer = started["content"] + answer
        return self._encoded([*dialog, {"role": "assistant", "content": answer}])

    def _encoded(self, dialog: Sequence[dict[str, str]]) -> list[int]:
        try:
            tokens: list[int] = self._tokenizer({"messages": dialog}, inference=True)["tokens"]
        except ValueError as error:
            raise UserError(f"apply_chat_template: a question of the tasks cannot be a dialog: {error}") from None
        return tokens
