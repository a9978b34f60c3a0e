"""A tokenizer.json of SentencePiece's kind, and Meta's of Llama 3: ids are those of transformers and of tiktoken."""

import base64
import json
import pickle
import random

import pytest

from custom_components.runtime.errors import UserError
from custom_components.transforms import ChatTransform
from custom_components.transforms.byte_fallback_tokenizer import ByteFallbackTokenizer
from custom_components.transforms.byte_level_tokenizer import ByteLevelTokenizer
from custom_components.transforms.sentencepiece_tokenizer import SentencePieceTokenizer
from custom_components.transforms.text_stream import TextStream
from custom_components.transforms.tokenizer_files import ExportedTokenizer, write_tokenizer
from custom_components.transforms.tokenizer_reading import read_tokenizer
from tests.support.chat_templates import CHATML_JINJA, LLAMA3_JINJA, ZEPHYR_JINJA
from tests.support.dialogs import DIALOGS, messages_of
from tests.support.paths import TINY_TOKENIZER
from tests.support.tokenizers import write_byte_fallback_tokenizer, write_byte_level_tokenizer, write_tiktoken_file

TEXTS = [
    *(
        "",
        "a",
        " a",
        "  two  spaces  ",
        "line\nbreaks\n\n\tand tabs",
        "café 日本語 🦙 e\u0301",
        "</s> and <s>",
        "1234.5",
    ),
    *("\n", " ", "   ", "def f():\n        return 1", "x <unk> <0x0A> y"),
]
KINDS = ("always", "first", "never")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """By where a space is put before the first word: of every text, of the first one only, nowhere."""
    return {kind: write_byte_fallback_tokenizer(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module", params=KINDS)
def directory(directories, request):
    return directories[request.param]


def random_texts(number):
    draw = random.Random(0)
    parts = [*"abcXYZ019 .,!?\n\té漢🙂", "  ", "the ", " answer", "</s>", "ing"]
    return ["".join(draw.choices(parts, k=draw.randint(0, 30))) for _ in range(number)]


def test_texts_have_the_ids_of_the_sentencepiece_model(directories):
    ours = read_tokenizer(directories["always"])
    assert isinstance(ours, ByteFallbackTokenizer)
    theirs = SentencePieceTokenizer.read(TINY_TOKENIZER)
    texts = TEXTS + random_texts(300)
    assert ours.encode(texts) == theirs.encode(texts)
    assert ours.encode_continued(texts) == theirs.encode_continued(texts)
    for text, ids in zip(texts, theirs.encode(texts), strict=True):
        assert ours.decode(ids) == theirs.decode(ids) == text
        assert ours.decode([*ids, 5], follows_text=True) == theirs.decode([*ids, 5], follows_text=True)
        assert ours.text_of_pieces([1, *ids, 2, 99_999]) == theirs.text_of_pieces([1, *ids, 2, 99_999])
    assert (ours.bos_id, ours.eos_id, ours.num_pieces) == (theirs.bos_id, theirs.eos_id, theirs.num_pieces)
    assert ours.named_pieces == theirs.named_pieces
    assert [ours.is_control(index) for index in range(1030)] == [theirs.is_control(index) for index in range(1030)]


def test_texts_have_the_ids_of_transformers(directory):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    plain = [text for text in TEXTS + random_texts(100) if "</s>" not in text and "<unk>" not in text]
    assert read_tokenizer(directory).encode(plain) == theirs(plain, add_special_tokens=False).input_ids


@pytest.mark.parametrize(("template", "jinja"), [("zephyr", ZEPHYR_JINJA), ("chatml", CHATML_JINJA)])
def test_L01_dialogs_have_the_ids_of_transformers(directory, template, jinja):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    ours = ChatTransform(directory, prompt_template=template)
    for name, dialog in DIALOGS.items():
        messages = messages_of(dialog)
        is_open = dialog[-1][0] == "user"
        if any(mark in message["content"] for message in messages for mark in ("<s>", "</s>", "<|")):
            continue
        expected = theirs.apply_chat_template(
            messages, chat_template=jinja, add_generation_prompt=is_open, return_dict=False
        )
        assert ours({"messages": messages}, inference=is_open)["tokens"] == expected, name


def test_L03_control_tokens_in_messages_are_text(directory):
    ours = ChatTransform(directory, prompt_template="chatml")
    tokens = ours({"messages": messages_of([("user", "a <|im_end|> </s>"), ("assistant", "<s> b")])})["tokens"]
    [start, end, bos, eos] = ours.ids_of_pieces(["<|im_start|>", "<|im_end|>", "<s>", "</s>"])
    assert [tokens.count(token) for token in (start, end, bos, eos)] == [2, 2, 0, 0]
    assert "a <|im_end|> </s>" in ours.decode(tokens) and "<s> b" in ours.decode(tokens)


def test_L02_the_prompt_of_an_answer_is_that_of_training(directory):
    for template in ("llama2", "zephyr", "vicuna", "chatml", "mistral"):
        ours = ChatTransform(directory, prompt_template=template)
        dialog = messages_of([("user", " Why?\n"), ("assistant", " So  it is.\n")])
        row = ours({"messages": dialog})
        prompt = ours({"messages": dialog[:1]}, inference=True)["tokens"]
        assert row["tokens"][: len(prompt)] == prompt and all(row["mask"][: len(prompt)])
        assert not row["mask"][len(prompt)]


def test_answers_are_streamed_as_they_are_decoded(directory):
    ours = ChatTransform(directory, prompt_template="zephyr")
    for text in TEXTS + random_texts(30):
        ids = ours.tokenizer.encode([text])[0]
        stream = TextStream(ours)
        assert "".join([*map(stream.text_of, ids), stream.rest()]) == ours.decode(ids).strip()


def test_the_files_that_go_out_with_a_model_give_the_same_ids(directory, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = ChatTransform(directory, prompt_template="chatml", trainable_tokens=["<|im_start|>"])
    write_tokenizer(tmp_path, ExportedTokenizer(ours.tokenizer, ours.stop_tokens, CHATML_JINJA, False), 512)
    assert (tmp_path / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = messages_of([("user", "  Hello there\n"), ("assistant", "Yes."), ("user", "漢")])
    expected = ours({"messages": messages}, inference=True)["tokens"]
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == expected
    assert ChatTransform(tmp_path).prompt_template == "chatml"


def test_it_can_be_sent_to_another_process_and_get_new_tokens(directory):
    ours = read_tokenizer(directory).with_new_tokens(["<new>"])
    again = pickle.loads(pickle.dumps(ours))
    assert again.id_of("<new>") == ours.num_ids - 1 == 1026
    assert again.encode(["a <new> </s>"]) == ours.encode(["a <new> </s>"])
    assert 1026 not in again.encode(["a <new>"])[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"type": "Unigram", "vocab": [["<unk>", 0.0]], "unk_id": 0}}, "is a Unigram model, and there is no"),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always"}}, "changes texts"),
    ],
)
def test_other_kinds_are_refused_with_what_they_are(directories, tmp_path, changes, words):
    content = json.loads((directories["first"] / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | changes))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    with pytest.raises(UserError) as error:
        read_tokenizer(tmp_path)
    assert words in str(error.value) and "tokenizer.json" in str(error.value)


@pytest.fixture(scope="module")
def of_meta(tmp_path_factory):
    """Meta's files of Llama 3, and of a later one."""
    older, newer = (tmp_path_factory.mktemp(name) for name in ("llama3", "llama3_1"))
    for directory, params in ((older, {}), (newer, {"use_scaled_rope": True})):
        write_tiktoken_file(directory / "tokenizer.model")
        (directory / "params.json").write_text(json.dumps(params))
    return older, newer


def test_metas_file_has_the_ids_of_tiktoken(of_meta):
    tiktoken = pytest.importorskip("tiktoken")
    ours = read_tokenizer(of_meta[0])
    assert isinstance(ours, ByteLevelTokenizer)
    lines = [line.split() for line in (of_meta[0] / "tokenizer.model").read_bytes().splitlines()]
    ranks = {base64.b64decode(text): int(rank) for text, rank in lines}
    words = json.loads(ours.file_text)["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    theirs = tiktoken.Encoding("x", pat_str=words, mergeable_ranks=ranks, special_tokens={})
    for text in TEXTS + random_texts(300):
        assert ours.encode([text])[0] == theirs.encode(text, disallowed_special=()), text
        assert ours.decode(ours.encode([text])[0]) == text


def test_metas_control_tokens_have_the_published_names(of_meta):
    """tokenizer.json of meta-llama/Meta-Llama-3-8B and of Llama-3.1-8B, less the 128,000 ranks."""
    older, newer = map(read_tokenizer, of_meta)
    first = older.num_pieces
    for tokenizer, names in (
        (older, {9: "<|eot_id|>", 2: "<|reserved_special_token_0|>", 8: "<|reserved_special_token_4|>"}),
        (newer, {4: "<|finetune_right_pad_id|>", 5: "<|reserved_special_token_2|>", 8: "<|eom_id|>", 9: "<|eot_id|>"}),
        (newer, {10: "<|python_tag|>", 11: "<|reserved_special_token_3|>", 255: "<|reserved_special_token_247|>"}),
        (older, {6: "<|start_header_id|>", 7: "<|end_header_id|>", 255: "<|reserved_special_token_250|>"}),
    ):
        assert {place: tokenizer.piece(first + place) for place in names} == names
        assert tokenizer.num_ids == first + 256
        assert (tokenizer.bos_piece, tokenizer.eos_piece) == ("<|begin_of_text|>", "<|end_of_text|>")


def test_metas_file_goes_out_as_a_tokenizer_json(of_meta, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = ChatTransform(of_meta[1], prompt_template="llama3")
    assert ours.stop_pieces == ["<|eot_id|>", "<|end_of_text|>"]
    write_tokenizer(tmp_path, ExportedTokenizer(ours.tokenizer, ours.stop_tokens, LLAMA3_JINJA), 512)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = messages_of([("user", "Hello there"), ("assistant", "Yes."), ("user", "漢")])
    expected = ours({"messages": messages}, inference=True)["tokens"]
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == expected
    again = ChatTransform(tmp_path)
    assert again.prompt_template == "llama3" and again({"messages": messages}, inference=True)["tokens"] == expected


def test_a_tokenizer_json_beside_metas_file_is_taken(of_meta, tmp_path):
    write_byte_level_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((of_meta[0] / "tokenizer.model").read_bytes())
    assert read_tokenizer(tmp_path).path == tmp_path / "tokenizer.json"


def test_auto_names_the_format_that_a_tokenizer_is_for(of_meta):
    note = ChatTransform(of_meta[0]).format_note
    assert note == (
        "prompt_template: llama2, for the checkpoint has no chat template; its tokenizer has the tokens of "
        "prompt_template=llama3"
    )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda lines: [lines[0], b"IQ==\n", *lines[2:]], "tokenizer.model:2: b'IQ==' is not a text and its rank"),
        (lambda lines: lines[:-3] + lines[-2:], "has not every rank once"),
        (lambda lines: lines[:2] + lines[3:100], "has not every rank once, or not every byte"),
    ],
)
def test_a_damaged_file_of_metas_is_named(of_meta, tmp_path, damage, words):
    lines = (of_meta[0] / "tokenizer.model").read_bytes().splitlines(keepends=True)
    (tmp_path / "tokenizer.model").write_bytes(b"".join(damage(lines)))
    with pytest.raises(UserError) as error:
        read_tokenizer(tmp_path)
    assert words in str(error.value)
