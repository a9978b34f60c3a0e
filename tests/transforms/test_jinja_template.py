"""The chat template of a merged directory, rendered by transformers: the ids that training used."""

import random

import pytest
import sentencepiece

from custom_components.transforms.jinja_template import chat_template
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.tokenizer_files import write_tokenizer
from tests.support.dialogs import CUSTOM, DIALOGS, messages_of
from tests.support.paths import TINY_TOKENIZER
from tests.support.tokenizers import control_pieces_of, exported_tokenizer

# Names its own BOS and EOS.
NAMED = {"start": "{bos}Chat\n", "user": "Q: {content}</s> ", "assistant": "{content} {eos}\n"}


@pytest.fixture(scope="module", params=["tiny", "llama2_tokenizer", "stories260K"])
def tokenizer_model(request, test_data):
    """stories260K's joins repeated spaces and has control tokens with line breaks in their text."""
    return TINY_TOKENIZER if request.param == "tiny" else test_data(f"{request.param}/tokenizer.model")


@pytest.fixture(scope="module")
def their_tokenizer(tmp_path_factory, tokenizer_model):
    """What transformers reads from a written directory."""
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, exported_tokenizer(tokenizer_model), 512)
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def their_ids(their_tokenizer, tokenizer_model):
    """Renders messages with the template of a prompt format, and tokenizes them."""

    def ids(messages, description="llama2", system_prompt=None):
        template = chat_template(description, system_prompt, control_pieces_of(tokenizer_model))
        return their_tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, return_dict=False
        )

    return ids


@pytest.mark.parametrize("system_prompt", [None, 'Be "kind".\n🙂\\'])
@pytest.mark.parametrize(
    "description", ["llama2", "alpaca", "human_response", "none", CUSTOM, "zephyr", "vicuna", "mistral_v1", NAMED]
)
def test_L23_the_template_renders_the_ids_of_training(their_ids, tokenizer_model, description, system_prompt):
    ours = Llama2ChatTransform(tokenizer_model, None, system_prompt, description)
    for name, dialog in DIALOGS.items():
        messages = messages_of(dialog)
        expected = ours({"messages": messages}, inference=dialog[-1][0] == "user")["tokens"]
        assert their_ids(messages, description, system_prompt) == expected, name


def test_L23_the_golden_ids(test_data, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = test_data("llama2_tokenizer/tokenizer.model")
    template = chat_template("llama2", None, control_pieces_of(source))
    write_tokenizer(tmp_path, exported_tokenizer(source, template), 512)
    messages = messages_of([("user", "Hello"), ("assistant", "Hi there!")])
    golden = [1, 518, 25580, 29962, 15043, 518, 29914, 25580, 29962, 6324, 727, 29991, 29871, 2]
    # The second is what ignores tokenizer_class, and needs `legacy`.
    for tokenizer_class in (transformers.AutoTokenizer, transformers.LlamaTokenizer):
        theirs = tokenizer_class.from_pretrained(tmp_path)
        assert theirs.apply_chat_template(messages, return_dict=False) == golden


def test_L23_any_text_has_the_ids_of_sentencepiece(their_tokenizer, tokenizer_model):
    """Repeated spaces and indented code above all, which transformers' own conversion gets wrong."""
    ours = Llama2ChatTransform(tokenizer_model)
    draw = random.Random(0)
    parts = [
        *"  \n\tabcdeiorst.,'()0123",
        "the",
        "ing",
        "    ",
        " " * 17,
        "é",
        "漢",
        "🙂",
        "\u00a0",
        "def ",
        "INST",
        "ﬁ",
    ]
    for _ in range(500):
        text = "".join(draw.choices(parts, k=draw.randint(1, 40)))
        expected = ours.encode(text, add_bos=True, add_eos=False)
        assert their_tokenizer(text).input_ids == expected, text


def test_a_tokenizer_that_cannot_be_converted_is_said(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"some words and {number} more of them" for number in range(300)))
    options = {"model_type": "unigram", "vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(tmp_path / "unigram"), **options)
    write_tokenizer(tmp_path, exported_tokenizer(tmp_path / "unigram.model"), 512)
    assert "warning: no tokenizer.json is written" in capsys.readouterr().out
    assert not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("description", "text"),
    [
        *(("llama2", "a EOS b"), ("llama2", "BOS"), ("llama2", "x [/INST]"), ("llama2", "<<SYS>>")),
        *(("alpaca", "a EOS b"), ("none", "BOS")),
    ],
)
def test_L03_a_message_that_spells_a_mark_is_refused(their_ids, tokenizer_model, description, text):
    pieces = control_pieces_of(tokenizer_model)
    text = text.replace("EOS", pieces["eos_token"]).replace("BOS", pieces["bos_token"])
    for dialog in ([("user", text)], [("system", text), ("user", "a")], [("user", "a"), ("assistant", text)]):
        with pytest.raises(Exception, match="which is how the chat format marks its parts"):
            their_ids(messages_of(dialog), description)


@pytest.mark.parametrize("roles", [["assistant"], ["user", "user"], ["user", "system"], ["system", "assistant"]])
def test_roles_have_to_take_turns(their_ids, roles):
    with pytest.raises(Exception, match="take turns"):
        their_ids(messages_of([(role, "a") for role in roles]))
