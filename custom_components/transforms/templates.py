"""Dialogs as text: the prompts a model is shown, and the answers it is to learn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from custom_components.runtime.errors import UserError
from custom_components.transforms.dialogs import PLAIN_TEXT_ROLE, ChatMessage
from custom_components.transforms.jinja_dialogs import JinjaTemplate
from custom_components.transforms.marked_template import MarkedTemplate, template_of_parts
from custom_components.transforms.turns import BOS, EOS, Turn, exchanges

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
    system, pairs = exchanges(messages)
    turns: list[Turn] = []
    for user, answer in pairs:
        folded = user.content if system is None or turns else f"<<SYS>>\n{system}\n<</SYS>>\n\n{user.content}"
        prompt = f"[INST] {folded.strip()} [/INST]"
        turns.append(Turn((BOS, prompt), (f" {answer.content.strip()} ", EOS) if answer else None))
    return turns


# Alpaca: tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT: "prompt_no_input" and "prompt_input".
_ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_ALPACA_SYSTEM_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
# FastChat: lm-sys/FastChat, fastchat/conversation.py, "vicuna_v1.1".
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# meta-llama/llama3 @0053e6b, llama/tokenizer.py, ChatFormat.
_LLAMA3 = MarkedTemplate(
    start="{bos}",
    system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
    assistant="<|start_header_id|>assistant<|end_header_id|>\n\n{content}<|eot_id|>",
    strips="all",
    control_tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
TEMPLATES: dict[str, PromptTemplate] = {
    "llama2": llama2_turns,
    # HuggingFaceH4/zephyr-7b-beta and TinyLlama/TinyLlama-1.1B-Chat-v1.0, tokenizer_config.json.
    "zephyr": MarkedTemplate(
        start="",
        system="<|system|>\n{content}{eos}\n",
        user="<|user|>\n{content}{eos}\n",
        assistant="<|assistant|>\n{content}{eos}\n",
    ),
    # openai/openai-python, chatml.md, as transformers' templates write it: teknium/OpenHermes-2.5-Mistral-7B.
    "chatml": MarkedTemplate(
        start="",
        system="<|im_start|>system\n{content}<|im_end|>\n",
        user="<|im_start|>user\n{content}<|im_end|>\n",
        assistant="<|im_start|>assistant\n{content}<|im_end|>\n",
        control_tokens=("<|im_start|>", "<|im_end|>"),
    ),
    "vicuna": MarkedTemplate(
        start="{bos}",
        system="{content} ",
        user="USER: {content} ",
        assistant="ASSISTANT: {content}{eos}",
        default_system=_VICUNA_SYSTEM,
    ),
    # mistralai/mistral-common 1.13.1, tokens/tokenizers/instruct.py: InstructTokenizerV1, of Mistral 7B v0.1 and v0.2,
    # and InstructTokenizerV3, of v0.3.
    "mistral_v1": MarkedTemplate(
        start="{bos}",
        system="{content}\n\n",
        system_place="first_user",
        user="[INST] {content} [/INST]",
        assistant=" {content}{eos}",
    ),
    "mistral_v3": MarkedTemplate(
        start="{bos}",
        system="{content}\n\n",
        system_place="last_user",
        user="[INST]{content}[/INST]",
        assistant="{content}{eos}",
        strips="spaces_after_answers",
        control_tokens=("[INST]", "[/INST]"),
    ),
    "llama3": _LLAMA3,
    # meta-llama/Llama-3.1-8B-Instruct and Llama-3.2, tokenizer_config.json, without tools. There is always a system
    # part; its date is the one that the template has where none is given.
    "llama3_1": replace(
        _LLAMA3,
        system="<|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{content}<|eot_id|>",
        default_system="",
    ),
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

    One of your own may have `start`, see :class:`MarkedTemplate`. `{jinja: ...}` is a Jinja chat template.

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
    if description.keys() == {"jinja"}:
        return JinjaTemplate(description["jinja"])
    try:
        return template_of_parts(description)
    except ValueError as error:
        raise UserError(f"prompt_template{error}") from None


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
        return [Turn((BOS,), (message.content, EOS)) for message in messages]
    turns = template(messages)
    if any(message.is_supervised is False for message in messages):
        _, pairs = exchanges(messages)
        turns = [
            replace(
                turn,
                is_supervised=answer is None or answer.is_supervised is not False,
                is_prompt_masked=user.is_supervised is False,
            )
            for turn, (user, answer) in zip(turns, pairs, strict=True)
        ]
    return turns
