"""Dialogs as text: the prompts a model is shown, and the answers it is to learn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from custom_components.runtime.errors import UserError
from custom_components.transforms.dialogs import PLAIN_TEXT_ROLE, ChatMessage


@dataclass(frozen=True)
class Turn:
    """A prompt and its answer as they are tokenized: BOS + prompt + answer + EOS.

    The last turn of a dialog that waits for an answer is open: its answer is None, and it has no EOS.

    Attributes:
        is_supervised: False: the answer is shown and not trained.
        is_prompt_masked: the prompt is not trained even where prompts are.
        is_continued: the answer is only started, for a model to continue: it has no EOS.
    """

    prompt: str
    answer: str | None
    is_supervised: bool = True
    is_prompt_masked: bool = False
    is_continued: bool = False


LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

PromptTemplate = Callable[[Sequence[ChatMessage]], list[Turn]]


def llama2_turns(messages: Sequence[ChatMessage]) -> list[Turn]:
    """Write a dialog in Llama 2's chat format.

    Meta's `chat_completion`, repository meta-llama/llama @689c7f2, llama/generation.py: the system prompt goes inside
    the first user message, `strip()` is applied to the result, and one space is before and after the answer.

    Raises:
        ValueError: a message contains one of the format's tags, which Meta refuses too.
    """
    for message in messages:
        if tag := next((tag for tag in LLAMA2_TAGS if tag in message.content), None):
            raise ValueError(f"{message.role} message contains {tag!r}, which is how the chat format marks its parts")
    system, exchanges = _exchanges(messages)
    turns: list[Turn] = []
    for user, answer in exchanges:
        folded = user.content if system is None or turns else f"<<SYS>>\n{system}\n<</SYS>>\n\n{user.content}"
        prompt = f"[INST] {folded.strip()} [/INST]"
        turns.append(Turn(prompt, f" {answer.content.strip()} " if answer else None))
    return turns


@dataclass(frozen=True)
class MarkedTemplate:
    """A template of marks around each message's `{content}`.

    A turn's prompt is the system part (in the first turn), the user part, and the assistant part up to `{content}`;
    the rest of the assistant part is trained with the answer.

    Attributes:
        system, user, assistant: text with one `{content}`.
        default_system: the system prompt of dialogs without one; None: they get no system part.
        user_with_input: for a question that is an instruction and its input, with `{instruction}` and `{input}`; None:
            both are joined in `user`.
        default_system_with_input: instead of `default_system` where the first question has an input.
    """

    user: str
    assistant: str
    system: str = "{content}\n\n"
    default_system: str | None = None
    user_with_input: str | None = None
    default_system_with_input: str | None = None

    @property
    def marks(self) -> dict[str, str]:
        """The text around a system prompt, before a user's message, and around an answer, by name."""
        before_system, _, after_system = self.system.partition("{content}")
        before_user, _, after_user = self.user.partition("{content}")
        before_answer, _, after_answer = self.assistant.partition("{content}")
        return {
            **{"before_system": before_system, "after_system": after_system, "before_user": before_user},
            **{"before_answer": after_user + before_answer, "after_answer": after_answer},
        }

    def __call__(self, messages: Sequence[ChatMessage]) -> list[Turn]:
        system, exchanges = _exchanges(messages)
        if system is None:
            has_input = messages[0].instruction_and_input is not None and self.default_system_with_input is not None
            system = self.default_system_with_input if has_input else self.default_system
        before_answer, _, after_answer = self.assistant.partition("{content}")
        turns: list[Turn] = []
        for user, answer in exchanges:
            prompt = "" if system is None or turns else self.system.replace("{content}", system)
            prompt += self._question(user) + before_answer
            # Spaces at the seam go with the answer: SentencePiece joins a space with the word after it.
            stripped = prompt.rstrip(" ")
            seam = prompt[len(stripped) :]
            if answer is None:
                turns.append(Turn(stripped, None))
            else:
                turns.append(Turn(stripped, seam + answer.content + after_answer))
        return turns

    def _question(self, user: ChatMessage) -> str:
        if user.instruction_and_input is None or self.user_with_input is None:
            return self.user.replace("{content}", user.content)
        instruction, further = user.instruction_and_input
        before, _, rest = self.user_with_input.partition("{instruction}")
        return before + instruction + rest.replace("{input}", further)


# Alpaca: tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT: "prompt_no_input" and "prompt_input".
_ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_ALPACA_SYSTEM_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
TEMPLATES: dict[str, PromptTemplate] = {
    "llama2": llama2_turns,
    "alpaca": MarkedTemplate(
        user="### Instruction:\n{content}\n\n",
        assistant="### Response:\n{content}",
        default_system=_ALPACA_SYSTEM,
        user_with_input="### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n",
        default_system_with_input=_ALPACA_SYSTEM_WITH_INPUT,
    ),
    "human_response": MarkedTemplate(user="### HUMAN:\n{content}\n\n", assistant="### RESPONSE:\n{content}"),
    "none": MarkedTemplate(user="{content}", assistant="{content}"),
}


def prompt_template(description: str | Mapping[str, str]) -> PromptTemplate:
    """Look up a template by its name, or make your own from `{system, user, assistant}` with `{content}` in each.

    Raises:
        UserError: an unknown name or key, or a part without exactly one `{content}`.
    """
    if isinstance(description, str):
        if description not in TEMPLATES:
            raise UserError(
                f"prompt_template: {description!r} is none of {', '.join(TEMPLATES)}; for one of your own give "
                "{system: ..., user: ..., assistant: ...} with {content} in each"
            )
        return TEMPLATES[description]
    unknown = set(description) - {"system", "user", "assistant"}
    missing = {"user", "assistant"} - set(description)
    if unknown or missing:
        raise UserError(
            f"prompt_template: has the keys {sorted(description)}; it needs user and assistant, and may have system"
        )
    for name, part in description.items():
        if part.count("{content}") != 1:
            raise UserError(f"prompt_template.{name}: {part!r} has to hold {{content}} once, where the message goes")
    return MarkedTemplate(**description)


def default_system_prompt(description: str | Mapping[str, str], system_prompt: str | None) -> str | None:
    """The system prompt of dialogs that have none of their own: the one given, else the template's own, if any.

    Raises:
        UserError: no such template.
    """
    template = prompt_template(description)
    if system_prompt is None and isinstance(template, MarkedTemplate):
        return template.default_system
    return system_prompt


def dialog_turns(messages: Sequence[ChatMessage], template: PromptTemplate) -> list[Turn]:
    """Write a dialog in a template; plain text is one answer without a prompt."""
    if messages[0].role == PLAIN_TEXT_ROLE:
        return [Turn("", message.content) for message in messages]
    turns = template(messages)
    if any(message.is_supervised is False for message in messages):
        _, exchanges = _exchanges(messages)
        turns = [
            replace(
                turn,
                is_supervised=answer is None or answer.is_supervised is not False,
                is_prompt_masked=user.is_supervised is False,
            )
            for turn, (user, answer) in zip(turns, exchanges, strict=True)
        ]
    return turns


def _exchanges(
    messages: Sequence[ChatMessage],
) -> tuple[str | None, list[tuple[ChatMessage, ChatMessage | None]]]:
    """Split a dialog into its system prompt and each user message with its answer, which the last may not have."""
    system = messages[0].content if messages[0].role == "system" else None
    rest = messages[1:] if system is not None else messages
    return system, list(zip_longest(rest[::2], rest[1::2]))
