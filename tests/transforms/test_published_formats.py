"""The chat formats of models other than Llama 2's: ids and masks are those that the models were published with."""

import json
import random

import pytest

from custom_components.datasets.chat import chat_dataset
from custom_components.runtime.errors import UserError
from custom_components.transforms import ChatTransform
from custom_components.transforms.chat_transform import prompt_tokens
from custom_components.transforms.tokenizer_files import ExportedTokenizer, write_tokenizer
from tests.support.chat_templates import CHATML_JINJA, LLAMA2_JINJA, LLAMA3_JINJA, ZEPHYR_JINJA
from tests.support.paths import TINY_TOKENIZER
from tests.support.rows import write_dialogs
from tests.support.tokenizers import (
    LLAMA3_TOKENS,
    SMOLLM2_TOKENS,
    write_byte_level_tokenizer,
    write_sentencepiece_model,
)

CHATML_TOKENS = {"<|im_start|>": 1024, "<|im_end|>": 1025}
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class Token(str):
    """A control token in a reference, by its name."""


def llama2(system, turns):
    before = "" if system is None else f"<<SYS>>\n{system}\n<</SYS>>\n\n"
    for question, answer in turns:
        yield [Token("<s>"), f"[INST] {(before + question).strip()} [/INST]"]
        yield [f" {answer.strip()} ", Token("</s>")]
        before = ""
    yield []


def zephyr(system, turns):
    start = "" if system is None else [f"<|system|>\n{system}", Token("</s>"), "\n"]
    for question, answer in turns:
        yield [*start, f"<|user|>\n{question}", Token("</s>"), "\n<|assistant|>\n"]
        yield [answer, Token("</s>")]
        start = ["\n"]
    yield start


def chatml(system, turns):
    open_, close = Token("<|im_start|>"), Token("<|im_end|>")
    start = [] if system is None else [open_, f"system\n{system}", close, "\n"]
    for question, answer in turns:
        yield [*start, open_, f"user\n{question}", close, "\n", open_, "assistant\n"]
        yield [answer, close]
        start = ["\n"]
    yield start


def llama3(system, turns):
    def header(role):
        return [Token("<|start_header_id|>"), role, Token("<|end_header_id|>"), "\n\n"]

    eot = Token("<|eot_id|>")
    start = [Token("<|begin_of_text|>")] + ([] if system is None else [*header("system"), system.strip(), eot])
    for question, answer in turns:
        yield [*start, *header("user"), question.strip(), eot, *header("assistant")]
        yield [answer.strip(), eot]
        start = []
    yield []


def vicuna(system, turns):
    """FastChat's conversation.py, SeparatorStyle.ADD_COLON_TWO."""
    start = [Token("<s>"), f"{VICUNA_SYSTEM if system is None else system} "]
    for question, answer in turns:
        yield [*start, f"USER: {question} ASSISTANT:"]
        yield [f" {answer}", Token("</s>")]
        start = []
    yield []


def mistral_v1(system, turns):
    """mistral-common, InstructTokenizerV1: every message is one encode call, and begins with a space of its own."""
    before = f"{system}\n\n" if system else ""
    start = [Token("<s>")]
    for question, answer in turns:
        yield [*start, f"[INST] {before}{question} [/INST]"]
        yield [f" {answer}", Token("</s>")]
        start, before = [], ""
    yield []


def mistral_v3(system, turns):
    """mistral-common, InstructTokenizerV3: the system prompt is in the last question."""
    start = [Token("<s>")]
    for index, (question, answer) in enumerate(turns):
        before = f"{system}\n\n" if system and index == len(turns) - 1 else ""
        yield [*start, Token("[INST]"), f"{before}{question}", Token("[/INST]")]
        yield [answer.rstrip(" "), Token("</s>")]
        start = []
    yield []


# The format, its tokenizer, its published Jinja template, if there is one that gives these tokens.
FORMATS = {
    "llama2": (llama2, "tiny", LLAMA2_JINJA),
    "zephyr": (zephyr, "tiny", ZEPHYR_JINJA),
    "chatml": (chatml, "tiny", CHATML_JINJA),
    "chatml, byte-level": (chatml, "smollm2", CHATML_JINJA),
    "llama3": (llama3, "llama3", LLAMA3_JINJA),
    "vicuna": (vicuna, "tiny", None),
    "mistral_v1": (mistral_v1, "tiny", None),
    "mistral_v3": (mistral_v3, "mistral", None),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Directories with tokenizers of every kind."""
    tiny, mistral = (tmp_path_factory.mktemp(name) for name in ("tiny", "mistral"))
    (tiny / "tokenizer.model").write_bytes(TINY_TOKENIZER.read_bytes())
    (tiny / "added_tokens.json").write_text(json.dumps(CHATML_TOKENS))
    (tiny / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": list(CHATML_TOKENS)}))
    write_sentencepiece_model(mistral / "tokenizer.model", ["[INST]", "[/INST]"])
    return {
        "tiny": tiny,
        "mistral": mistral,
        "llama3": write_byte_level_tokenizer(tmp_path_factory.mktemp("llama3"), LLAMA3_TOKENS),
        "smollm2": write_byte_level_tokenizer(tmp_path_factory.mktemp("smollm2"), SMOLLM2_TOKENS),
    }


WORDS = [
    *(
        "the",
        "answer",
        "Où",
        "漢字",
        "🙂",
        "1234",
        "don't",
        "a  b",
        "x\n\ny",
        "\t",
        "{content}",
        "{bos}",
        "é",
        ".",
        "(",
        "-",
    ),
]
SPELLED = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "[INST]", "[/INST]", "<|user|>", "{eos}"]


def drawn_dialog(draw, words, edges):
    def text(at_least=1):
        edge = draw.choice(edges), draw.choice(edges)
        return edge[0] + " ".join(draw.choices(words, k=draw.randint(at_least, 6))) + edge[1]

    return draw.choice([None, text()]), [(text(), text()) for _ in range(draw.randint(1, 6))]


def as_messages(system, turns):
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def reference(form, transform, system, turns):
    """Ids and mask: text between two control tokens is one encode call, but for the seam before an answer."""
    tokens, supervised = [], []
    follows_text = False
    for index, parts in enumerate(form(system, turns)):
        pieces = []
        for part in parts:
            if pieces and not isinstance(part, Token) and not isinstance(pieces[-1], Token):
                pieces[-1] += part
            else:
                pieces.append(part)
        for part in pieces:
            if isinstance(part, Token):
                ids = [transform.tokenizer.id_of(part)]
            else:
                [ids] = (transform.tokenizer.encode_continued if follows_text else transform.tokenizer.encode)([part])
            follows_text = not isinstance(part, Token)
            tokens += ids
            supervised += [index % 2 == 1] * len(ids)
    return tokens, [not is_supervised for is_supervised in supervised]


def check(name, checkpoints, num_dialogs):
    form, kind, _ = FORMATS[name]
    transform = ChatTransform(checkpoints[kind], prompt_template=name.partition(",")[0])
    draw = random.Random(0)
    for number in range(num_dialogs):
        # Llama 2's format refuses messages that spell its tags.
        spelled = [text for text in SPELLED if name != "llama2" or "INST" not in text]
        words = WORDS if number % 2 else WORDS + spelled
        system, turns = drawn_dialog(draw, words, ["", "", " ", "\n", "  "])
        row = transform({"messages": as_messages(system, turns)})
        assert (row["tokens"], row["mask"]) == reference(form, transform, system, turns), (system, turns)
        prompt = prompt_tokens(transform, as_messages(system, turns)[:-1], 10_000)
        assert row["tokens"][: len(prompt)] == prompt
        assert not any(row["mask"][len(prompt) : len(prompt) + 1])


@pytest.mark.parametrize("name", FORMATS)
def test_L01_L02_L03_tokens_are_the_published_ones_and_masks_the_answers(checkpoints, name):
    check(name, checkpoints, 30)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_L01_L02_L03_a_thousand_dialogs(checkpoints, name):
    check(name, checkpoints, 1000)


@pytest.mark.parametrize("num_dialogs", [30, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for name, (_, _, jinja) in FORMATS.items() if jinja])
def test_transformers_renders_the_same_ids(checkpoints, name, num_dialogs, tmp_path):
    """Where no content spells a control token, and no token spans the seam before an answer."""
    transformers = pytest.importorskip("transformers")
    _, kind, jinja = FORMATS[name]
    transform = ChatTransform(checkpoints[kind], prompt_template=name.partition(",")[0])
    directory = checkpoints[kind]
    if kind == "tiny":
        write_tokenizer(tmp_path, ExportedTokenizer(transform.tokenizer, (2,), None), 512)
        directory = tmp_path
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    draw = random.Random(1)
    for _ in range(num_dialogs):
        system, turns = drawn_dialog(draw, WORDS, [""])
        for messages in (as_messages(system, turns), as_messages(system, turns)[:-1]):
            is_open = messages[-1]["role"] == "user"
            expected = theirs.apply_chat_template(
                messages, chat_template=jinja, add_generation_prompt=is_open, return_dict=False
            )
            assert transform({"messages": messages}, inference=is_open)["tokens"] == expected, messages


def test_stop_tokens_are_a_list(checkpoints):
    def stops(kind, template):
        return ChatTransform(checkpoints[kind], prompt_template=template).stop_pieces

    assert stops("llama3", "llama3") == ["<|eot_id|>", "<|end_of_text|>"]
    assert stops("tiny", "chatml") == ["<|im_end|>", "</s>"]
    assert stops("smollm2", "chatml") == ["<|im_end|>"]
    assert stops("tiny", "zephyr") == stops("tiny", "llama2") == ["</s>"]


def test_mistral_is_that_of_the_tokenizers_version(checkpoints):
    assert ChatTransform(checkpoints["mistral"], prompt_template="mistral").prompt_template == "mistral_v3"
    assert ChatTransform(checkpoints["tiny"], prompt_template="mistral").prompt_template == "mistral_v1"


@pytest.mark.parametrize(
    ("template", "kind", "words"),
    [
        ("llama3", "tiny", "'llama3' needs <|start_header_id|> and <|end_header_id|> and <|eot_id|>, which"),
        ("chatml", "mistral", "'chatml' needs <|im_start|> and <|im_end|>, which"),
    ],
)
def test_a_template_whose_tokens_are_not_there_is_refused(checkpoints, template, kind, words):
    with pytest.raises(UserError) as error:
        ChatTransform(checkpoints[kind], prompt_template=template)
    assert words in str(error.value)


def test_train_on_all_leaves_out_bos_and_what_follows_the_last_answer(checkpoints):
    transform = ChatTransform(checkpoints["tiny"], prompt_template="zephyr", train_on="all")
    row = transform({"messages": as_messages("Be.", [("a", "b")])})
    assert transform.text_of_pieces(
        [token for token, masked in zip(row["tokens"], row["mask"], strict=True) if masked]
    ) == (" \n")
    vicuna = ChatTransform(checkpoints["tiny"], prompt_template="vicuna", train_on="all")
    row = vicuna({"messages": as_messages(None, [("a", "b"), ("c", "d")])})
    assert [token for token, masked in zip(row["tokens"], row["mask"], strict=True) if masked] == [1]


def test_rows_with_a_token_split_at_the_seam_are_counted(checkpoints, tmp_path):
    """ChatML's newline and an answer's are one token of a byte-level tokenizer; prompt and answer are encoded apart."""
    transform = ChatTransform(
        checkpoints["llama3"], prompt_template={"user": "Q {content}\n", "assistant": "A\n{content}"}
    )
    answers = ["b", "\n\nb", "\nb", " b"]
    rows = write_dialogs(tmp_path / "rows.jsonl", [("a", answer) for answer in answers])
    dataset = chat_dataset(transform, str(rows))
    assert "2 rows with a token split between prompt and answer" in str(dataset.summaries[0])
    for row, answer in zip(dataset, answers, strict=True):
        prompt = prompt_tokens(transform, [{"role": "user", "content": "a"}], 100)
        assert row["tokens"] == prompt + transform.tokenizer.encode([answer])[0] + [transform.eos_id]
    assert "split between" not in str(chat_dataset(ChatTransform(checkpoints["tiny"]), str(rows)).summaries[0])


def test_L03_a_template_s_token_that_its_file_does_not_call_special_is_text_in_a_message(tmp_path):
    """As where ChatML's tokens were added by `add_tokens`. Others stay what they are."""
    directory = write_byte_level_tokenizer(tmp_path, SMOLLM2_TOKENS)
    path = directory / "tokenizer.json"
    values = json.loads(path.read_text())
    for token in values["added_tokens"]:
        token["special"] = token["content"] == "<|endoftext|>"
    values["added_tokens"].append({**values["added_tokens"][0], "id": 400, "content": "<think>", "special": False})
    path.write_text(json.dumps(values))
    transform = ChatTransform(directory, prompt_template="chatml")
    [start, end, think] = transform.ids_of_pieces(["<|im_start|>", "<|im_end|>", "<think>"])
    tokens = transform({"messages": as_messages(None, [("a <|im_end|> <|im_start|>", "<think> b")])})["tokens"]
    assert (tokens.count(start), tokens.count(end), tokens.count(think)) == (2, 2, 1)
    assert "a <|im_end|> <|im_start|>" in transform.decode(tokens)
