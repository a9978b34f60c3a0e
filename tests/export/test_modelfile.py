"""The Modelfile beside a GGUF file: Ollama's prompts by it have the tokens of training."""

import random

import pytest

from custom_components.export.modelfile import modelfile, write_modelfile
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.prompt_format import PromptFormat
from custom_components.transforms.tokenizer_files import write_tokenizer
from tests.support.adapters import PROMPT_FORMAT, saved_adapter
from tests.support.dialogs import CUSTOM, DIALOGS, messages_of
from tests.support.go_template import rendered_by_go, rendered_in_python
from tests.support.modelfile import ollama_messages, ollama_prompt, read_modelfile
from tests.support.models import loaded_model, with_random_adapters
from tests.support.paths import TINY_TOKENIZER
from tests.support.recipe_runs import run_merge
from tests.support.tokenizers import control_pieces_of, exported_tokenizer

OPEN_SPACES = {"system": "{content} ", "user": "Q: {content} ", "assistant": " {content} "}
# Names its own BOS and EOS, and needs no control tokens beside them.
NAMED = {"start": "{bos}Chat\n", "user": "Q: {content}</s> ", "assistant": "{content} {eos}\n"}
PUBLISHED = ["zephyr", "vicuna", "mistral_v1"]
DESCRIPTIONS = ["llama2", "alpaca", "human_response", "none", CUSTOM, OPEN_SPACES, NAMED, *PUBLISHED]
# None, one that a Modelfile can quote, and three that it cannot.
SYSTEM_PROMPTS = [None, 'Be "kind".\n🙂\\ {{ .System }}', "", 'Say """\nno', "zero\u200bwidth\u00a0spaces"]
MORE_DIALOGS = DIALOGS | {
    "all kinds of space": [
        *(("user", " \u3000\u00a0\x85\x1c\v\fa\u2003\u2028 "), ("assistant", "\u00a0 é\u3000"), ("user", "\u205f \n")),
    ],
    "no text": [("user", ""), ("assistant", " "), ("user", "  ")],
}
PIECES = control_pieces_of(TINY_TOKENIZER)


@pytest.fixture(scope="module", params=["tiny", "llama2_tokenizer", "stories260K"])
def tokenizer_model(request, test_data):
    return TINY_TOKENIZER if request.param == "tiny" else test_data(f"{request.param}/tokenizer.model")


@pytest.fixture(scope="module")
def their_ids(tmp_path_factory, tokenizer_model):
    """Tokenizes a text with the control tokens in it, as llama.cpp does for Ollama, and puts BOS before most."""
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, exported_tokenizer(tokenizer_model), 512)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return lambda text, puts_bos: tokenizer(text, add_special_tokens=puts_bos).input_ids


@pytest.mark.parametrize("system_prompt", SYSTEM_PROMPTS)
@pytest.mark.parametrize("description", DESCRIPTIONS)
def test_L40_ollamas_prompts_have_the_tokens_of_training(their_ids, tokenizer_model, description, system_prompt):
    ours = Llama2ChatTransform(tokenizer_model, None, system_prompt, description)
    text = modelfile("x.gguf", PromptFormat(description, system_prompt, ["</s>"]), control_pieces_of(tokenizer_model))
    for name, dialog in MORE_DIALOGS.items():
        messages = messages_of(dialog)
        expected = ours({"messages": messages}, inference=dialog[-1][0] == "user")["tokens"]
        asked = ollama_prompt(text, messages, rendered_in_python)
        assert their_ids(asked, ours.begins_with_bos) == expected, name


@pytest.mark.slow
def test_L40_go_renders_the_templates_alike(tmp_path):
    """Go's own text/template, on dialogs with spaces drawn at random as well."""
    draw = random.Random(0)
    parts = ["", *" \n\t\u00a0\u3000\x85\x1cx é", "{{ x }}", "</s>", '"']

    def text_drawn() -> str:
        return "".join(draw.choices(parts, k=draw.randint(0, 8)))

    dialogs = [messages_of(dialog) for dialog in MORE_DIALOGS.values()]
    for _ in range(100):
        roles = ["system"] * draw.randint(0, 1) + ["user", "assistant"] * draw.randint(1, 3)
        dialogs.append([{"role": role, "content": text_drawn()} for role in roles[: -draw.randint(0, 1) or None]])
    # What is not a dialog here: Ollama cuts long ones at the front, and has more roles.
    dialogs.append(messages_of([("system", "s"), ("assistant", "a"), ("user", "b"), ("tool", "t"), ("user", "c")]))
    texts = [modelfile("x", PromptFormat(d, s, []), PIECES) for d in DESCRIPTIONS for s in SYSTEM_PROMPTS]
    cases = [
        (dict(read_modelfile(text))["TEMPLATE"], ollama_messages(text, messages))
        for text in texts
        for messages in dialogs
    ]
    rendered = rendered_by_go(tmp_path, cases)
    different = [(case, go) for case, go in zip(cases, rendered, strict=True) if rendered_in_python(*case) != go]
    assert not different, f"{len(different)} of {len(cases)}: {different[0]}"


def test_an_answer_that_a_long_dialog_begins_with_is_left_out():
    """Ollama cuts a dialog that is longer than the context at the front, wherever that is."""
    text = modelfile("x", PromptFormat("llama2", None, []), PIECES)
    cut = messages_of([("system", "s"), ("assistant", "a"), ("user", "b")])
    whole = messages_of([("system", "s"), ("user", "b")])
    assert ollama_prompt(text, cut, rendered_in_python) == ollama_prompt(text, whole, rendered_in_python)


def test_the_instructions():
    text = modelfile("a model-f16.gguf", PromptFormat("alpaca", "Be kind.", ["</s>", "<|im_end|>"]), PIECES)
    instructions = read_modelfile(text)
    assert ("FROM", "./a model-f16.gguf") in instructions
    assert ("SYSTEM", "Be kind.") in instructions
    assert [value for name, value in instructions if name == "PARAMETER stop"] == ["</s>", "<|im_end|>"]
    assert "".join(character for character in text if not character.isprintable()).strip("\n") == ""


def test_a_template_of_ones_own_default_is_the_system_instruction():
    without, of_alpaca = (
        dict(read_modelfile(modelfile("x", PromptFormat(description, None, []), PIECES)))
        for description in ("llama2", "alpaca")
    )
    assert "SYSTEM" not in without
    assert of_alpaca["SYSTEM"].startswith("Below is an instruction")


@pytest.mark.parametrize("states_its_format", [True, False])
def test_a_gguf_file_has_a_modelfile_beside_it(make_checkpoint, tmp_path, states_its_format):
    pytest.importorskip("gguf")
    checkpoint = make_checkpoint()
    adapter = saved_adapter(with_random_adapters(loaded_model(checkpoint)), tmp_path / "adapter")
    if not states_its_format:
        (adapter / "prompt_format.yaml").unlink()
    output = tmp_path / "merged"
    code, out, err = run_merge(
        checkpoint_dir=checkpoint, adapter_dir=adapter, output_dir=output, format="gguf", prove="false"
    )
    assert code == 0, err
    assert ("no Modelfile is written" in out) is not states_its_format
    assert (output / "Modelfile").exists() is states_its_format
    if states_its_format:
        instructions = dict(read_modelfile((output / "Modelfile").read_text()))
        assert (output / instructions["FROM"]).is_file()
        assert instructions["SYSTEM"] == PROMPT_FORMAT.system_prompt
    card = (output / "README.md").read_text()
    assert "library_name: gguf" in card and "llama-server -m merged-f16.gguf" in card
    assert ("ollama create" in card) is states_its_format
    assert "from_pretrained" not in card


@pytest.mark.parametrize(
    ("name", "prompt_format", "words"),
    [("x.gguf", None, "no prompt format is stated"), ("x\n.gguf", PromptFormat("llama2", None, []), "cannot name")],
)
def test_what_cannot_be_said_is_a_line_and_not_a_guess(tmp_path, capsys, name, prompt_format, words):
    write_modelfile(tmp_path, name, prompt_format, PIECES)
    assert words in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
