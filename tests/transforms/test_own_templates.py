"""The chat template that a checkpoint comes with: recognized by the ids it gives, or used itself."""

import json
import random

import pytest

from custom_components.runtime.errors import UserError
from custom_components.transforms import ChatTransform
from custom_components.transforms.jinja_template import chat_template
from custom_components.transforms.prompt_format import PromptFormat, read_prompt_format, tokenizer_with_format
from custom_components.transforms.tokenizer_files import ExportedTokenizer, write_tokenizer
from custom_components.transforms.tokenizer_fitting import fit_tokenizer
from tests.support.chat_templates import (
    CHATML_JINJA,
    LLAMA2_JINJA,
    LLAMA3_1_JINJA,
    LLAMA3_JINJA,
    SMOLLM2_JINJA,
    ZEPHYR_JINJA,
)
from tests.support.dialogs import DIALOGS, messages_of
from tests.support.models import loaded_model
from tests.support.paths import TINY_TOKENIZER
from tests.support.tokenizers import SMOLLM2_TOKENS, write_byte_level_tokenizer

# Of no built-in format: every round has its number, as ChatGLM writes it.
ROUNDS_JINJA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[Round ' ~ loop.index ~ ']\nQ: ' + message['content'] | trim + '\nA:' }}"
    "{% else %}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
# The system prompt moves to the last question, so an answered prompt is another text.
MOVING_JINJA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[Q]' + (' last ' if loop.index0 >= messages | "
    "length - 1 else '') + message['content'] }}{% else %}{{ '[A]' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)


@pytest.fixture
def with_template(tmp_path):
    """A checkpoint's directory with a tokenizer of a kind and a Jinja template."""

    def make(kind, template):
        directory = tmp_path / "checkpoint"
        if kind == "tiny":
            directory.mkdir()
            (directory / "tokenizer.model").write_bytes(TINY_TOKENIZER.read_bytes())
            (directory / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 1024, "<|im_end|>": 1025}))
        else:
            write_byte_level_tokenizer(directory, **({"control_tokens": SMOLLM2_TOKENS} if kind == "smollm2" else {}))
        if template is not None:
            (directory / "chat_template.jinja").write_text(template)
        return directory

    return make


@pytest.mark.parametrize(
    ("kind", "template", "name", "system_prompt"),
    [
        ("tiny", ZEPHYR_JINJA, "zephyr", None),
        ("tiny", CHATML_JINJA, "chatml", None),
        ("tiny", LLAMA2_JINJA, "llama2", None),
        ("smollm2", CHATML_JINJA, "chatml", None),
        ("smollm2", SMOLLM2_JINJA, "chatml", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        ("llama3", LLAMA3_JINJA, "llama3", None),
        ("llama3", LLAMA3_1_JINJA, "llama3_1", None),
        # Other words, the same ids.
        (
            "tiny",
            CHATML_JINJA.replace("message['role']", "message.role").replace(" + '\n'}}", " ~ '\n'}}"),
            "chatml",
            None,
        ),
    ],
)
def test_auto_is_the_checkpoints_own_format(with_template, kind, template, name, system_prompt):
    transform = ChatTransform(with_template(kind, template))
    assert (transform.prompt_template, transform.system_prompt) == (name, system_prompt)
    assert transform.format_note == f"prompt_template: {name}, the checkpoint's own chat format"


def test_auto_is_llama2_where_there_is_none_or_another(with_template, tmp_path, make_checkpoint, capsys):
    directory = with_template("tiny", ROUNDS_JINJA)
    transform = ChatTransform(directory)
    assert transform.prompt_template == "llama2"
    model = loaded_model(make_checkpoint("model", vocab_size=1026))
    fit_tokenizer(fit_tokenizer(transform, model), model)
    said = capsys.readouterr().out
    assert said.count("prompt_template: llama2, for the checkpoint has a chat template that is none of those") == 1
    assert "prompt_template=checkpoint trains with that one" in said
    (directory / "chat_template.jinja").unlink()
    assert ChatTransform(directory).format_note == "prompt_template: llama2, for the checkpoint has no chat template"
    assert ChatTransform(directory, prompt_template="llama2").format_note == ""


@pytest.mark.parametrize(("template", "name"), [(ZEPHYR_JINJA, "is zephyr"), (ROUNDS_JINJA, "is another")])
def test_training_with_another_format_is_said(with_template, template, name):
    transform = ChatTransform(with_template("tiny", template), prompt_template="llama2")
    assert f"prompt_template: llama2; the checkpoint's own chat format {name}" in transform.format_note
    same = ChatTransform(transform.tokenizer.path.parent, prompt_template="zephyr")
    assert (same.format_note == "") is (template == ZEPHYR_JINJA)


@pytest.mark.parametrize("kind", ["tiny", "llama3"])
def test_the_checkpoints_template_itself_gives_transformers_ids_and_masks_answers(with_template, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    directory = with_template(kind, ROUNDS_JINJA)
    transform = ChatTransform(directory, prompt_template="checkpoint")
    assert transform.prompt_template == {"jinja": ROUNDS_JINJA}
    if kind == "tiny":
        write_tokenizer(tmp_path, ExportedTokenizer(transform.tokenizer, (2,), ROUNDS_JINJA), 512)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path if kind == "tiny" else directory)
    for name, dialog in DIALOGS.items():
        messages = messages_of(dialog)
        is_open = dialog[-1][0] == "user"
        expected = theirs.apply_chat_template(messages, return_dict=False, add_generation_prompt=is_open)
        assert transform({"messages": messages}, inference=is_open)["tokens"] == expected, name
    row = transform({"messages": messages_of(DIALOGS["several turns"])[:4]})
    supervised = [token for token, masked in zip(row["tokens"], row["mask"], strict=True) if not masked]
    assert transform.text_of_pieces(supervised).replace(transform.stop_pieces[0], "|") == " Hi there!| No.|"


def test_L03_a_control_token_that_a_message_spells_is_text_in_it(with_template):
    transform = ChatTransform(with_template("tiny", ROUNDS_JINJA), prompt_template="checkpoint")
    messages = messages_of([("user", "a <s> </s> \ue0000\ue001"), ("assistant", "</s> b")])
    tokens = transform({"messages": messages})["tokens"]
    assert tokens.count(1) == tokens.count(2) == 1
    assert "a <s> </s> \ue0000\ue001" in transform.decode(tokens)


def test_L25_the_template_goes_with_the_adapter(with_template):
    directory = with_template("tiny", ROUNDS_JINJA)
    transform = ChatTransform(directory, prompt_template="checkpoint")
    prompt_format = PromptFormat(transform.prompt_template, None, transform.stop_pieces)
    adapter = directory / "adapter"
    adapter.mkdir()
    for name, text in prompt_format.texts().items():
        (adapter / name).write_text(text)
    (directory / "chat_template.jinja").unlink()
    again = tokenizer_with_format(directory, read_prompt_format(adapter))
    messages = messages_of(DIALOGS["system"])
    assert again({"messages": messages}) == transform({"messages": messages})
    assert chat_template(transform.prompt_template, None, transform.tokenizer.named_pieces) == ROUNDS_JINJA


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (MOVING_JINJA, "writes the prompt of message 1 in another way once it is answered"),
        (ROUNDS_JINJA.replace("message['content'] | trim", "message['content'] | upper"), "changes the text of user"),
        (ROUNDS_JINJA.replace("{{ bos_token }}", "{{ strftime_now('%d %b %Y') }}"), "'strftime_now' is undefined"),
        ("{% for message in messages %}", "Unexpected end of template"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        (None, "there is no chat template in"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused_with_the_reason(with_template, template, words):
    directory = with_template("tiny", template)
    with pytest.raises(UserError) as error:
        ChatTransform(directory, prompt_template="checkpoint")
    assert words in str(error.value)
    assert ChatTransform(directory).prompt_template == "llama2"


def test_random_dialogs_through_a_jinja_template_are_those_of_the_built_in_one(with_template):
    directory = with_template("llama3", LLAMA3_JINJA)
    built_in = ChatTransform(directory, prompt_template="llama3")
    itself = ChatTransform(directory, prompt_template={"jinja": LLAMA3_JINJA})
    draw = random.Random(0)
    for _ in range(20):
        pairs = draw.randint(1, 4)
        roles = ["system"] * draw.randint(0, 1) + ["user", "assistant"] * pairs
        messages = messages_of(
            [(role, " ".join(draw.choices([" a", "b\n", "<|eot_id|>", "é"], k=4))) for role in roles]
        )
        assert itself({"messages": messages}) == built_in({"messages": messages})


def test_a_template_told_by_another_name_is_not_another(with_template, capsys):
    directory = with_template("tiny", None)
    trained = PromptFormat("mistral_v1", None, ["</s>"])
    assert tokenizer_with_format(directory, trained, prompt_template="mistral").prompt_template == "mistral_v1"
    assert capsys.readouterr().err == ""
    tokenizer_with_format(directory, trained, prompt_template="zephyr", system_prompt="Be.")
    said = capsys.readouterr().err
    assert "warning: prompt_template is 'zephyr', it was trained with 'mistral_v1'" in said
    assert "warning: system_prompt is 'Be.', it was trained with None" in said


def test_a_templates_eos_is_what_the_checkpoint_calls_so(with_template, tmp_path):
    """Beside a SentencePiece model whose own EOS is another, as OpenHermes has it."""
    transformers = pytest.importorskip("transformers")
    directory = with_template("tiny", ZEPHYR_JINJA)
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    assert ChatTransform(directory).prompt_template == "llama2"
    transform = ChatTransform(directory, prompt_template="checkpoint")
    assert transform.stop_pieces[0] == "<|im_end|>"
    write_tokenizer(tmp_path, ExportedTokenizer(transform.tokenizer, transform.stop_tokens, ZEPHYR_JINJA), 512)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for dialog in DIALOGS.values():
        messages, is_open = messages_of(dialog), dialog[-1][0] == "user"
        expected = theirs.apply_chat_template(messages, return_dict=False, add_generation_prompt=is_open)
        assert transform({"messages": messages}, inference=is_open)["tokens"] == expected
