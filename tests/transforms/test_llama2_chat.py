"""The tokens and masks of a dialog. CHAT FORMAT: meta-llama/llama @689c7f2, llama/generation.py, `chat_completion`."""

import json
from dataclasses import fields

import pytest
import sentencepiece
from torchtune.data import Message

from custom_components.runtime.errors import UserError
from custom_components.transforms.dialogs import chat_messages
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.tokenizer_fitting import fit_tokenizer
from tests.support.models import loaded_model
from tests.support.paths import TINY_TOKENIZER

HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there!"}]


@pytest.fixture(scope="session")
def llama2_tokenizer(test_data):
    return Llama2ChatTransform(test_data("llama2_tokenizer/tokenizer.model"))


def test_golden_sequence(llama2_tokenizer):
    row = llama2_tokenizer({"messages": HELLO})
    prompt = [1, 518, 25580, 29962, 15043, 518, 29914, 25580, 29962]
    answer = [6324, 727, 29991, 29871, 2]
    assert row["tokens"] == prompt + answer
    assert row["mask"] == [True] * len(prompt) + [False] * len(answer)


def test_golden_system_prompt(llama2_tokenizer):
    tokens = llama2_tokenizer({"messages": [{"role": "system", "content": "You are kind."}, *HELLO]})["tokens"]
    text = " ".join(map(str, tokens))
    assert " 13 3492 " in text  # "\nYou"
    assert " 29889 13 29966 " in text  # ".\n<"
    assert " 13 13 10994 " in text  # "\n\nHello"


def test_metas_example_dialogs(llama2_tokenizer, test_data):
    cases = json.loads(test_data("chat/meta_llama_example_dialogs.json").read_text())["cases"]
    checked = 0
    for case in cases:
        if any("[INST]" in message["content"] for message in case["messages"]):
            with pytest.raises(ValueError, match="INST"):
                llama2_tokenizer({"messages": case["messages"]}, inference=True)
            continue
        assert llama2_tokenizer({"messages": case["messages"]}, inference=True)["tokens"] == case["input_ids"]
        checked += 1
    assert checked == 5


def test_torchtune_messages_and_dicts_are_the_same(tiny_tokenizer):
    messages = [Message(masked=message["role"] == "user", **message) for message in HELLO]
    assert tiny_tokenizer({"messages": messages}) == tiny_tokenizer({"messages": HELLO})


def test_inference_leaves_the_last_turn_open(tiny_tokenizer):
    """torchtune's generate adds an empty assistant message to the prompt; without it the tokens are the same."""
    question = HELLO[:1]
    open_turn = tiny_tokenizer({"messages": question}, inference=True)
    empty_answer = Message(role="assistant", content="")
    assert tiny_tokenizer({"messages": [*question, empty_answer]}, inference=True) == open_turn
    assert open_turn["tokens"] == tiny_tokenizer({"messages": HELLO})["tokens"][: len(open_turn["tokens"])]
    assert open_turn["tokens"][-1] != tiny_tokenizer.eos_id
    assert all(open_turn["mask"])


CHATML = {
    "system": "<|im_start|>system\n{content}<|im_end|>\n",
    "user": "<|im_start|>user\n{content}<|im_end|>\n",
    "assistant": "<|im_start|>assistant\n{content}<|im_end|>",
}


@pytest.mark.parametrize("template", ["llama2", "alpaca", "none", CHATML])
@pytest.mark.parametrize("started", ["Hi there", "Hi there ", "Hi"])
def test_inference_leaves_a_started_answer_open(template, started):
    """Its tokens are those of the dialog with a longer answer, up to there: what the model saw in training."""
    tokenizer = Llama2ChatTransform(TINY_TOKENIZER, prompt_template=template)
    question = [*HELLO, {"role": "user", "content": "Who?"}]
    prompt = [*question, {"role": "assistant", "content": started}]
    whole = tokenizer({"messages": [*question, {"role": "assistant", "content": "Hi there you"}]})["tokens"]
    tokens = tokenizer({"messages": prompt}, inference=True)["tokens"]
    assert tokens == whole[: len(tokens)] and tokens[-1] != tokenizer.eos_id
    assert tokenizer.decode(tokens).endswith(started.strip())
    assert tokens.count(tokenizer.eos_id) == 1  # of the first answer
    assert tokenizer.tokenize_messages(prompt, add_end_tokens=False)[0] == tokens


def test_start_and_end_tokens_are_left_out_where_torchtune_s_protocol_says_so(tiny_tokenizer):
    """add_start_tokens is of the first turn's BOS, add_end_tokens of the last turn's EOS."""
    tokens, mask = tiny_tokenizer.tokenize_messages([*HELLO, *HELLO])
    without_start = tiny_tokenizer.tokenize_messages([*HELLO, *HELLO], add_start_tokens=False)
    assert without_start == (tokens[1:], mask[1:])
    question = [*HELLO, HELLO[0]]
    tokens, mask = tiny_tokenizer.tokenize_messages(question, add_end_tokens=False)
    assert tiny_tokenizer.tokenize_messages(question, add_start_tokens=False, add_end_tokens=False) == (
        tokens[1:],
        mask[1:],
    )


def test_other_columns_are_kept(tiny_tokenizer):
    assert tiny_tokenizer({"messages": HELLO, "source": "here"})["source"] == "here"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "no messages"),
        ([{"role": "system", "content": "x"}], "nothing else"),
        ([{"role": "robot", "content": "x"}], "message 1 is of role 'robot'"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": "y"}], "message 2 is of role 'user'"),
        ([HELLO[0], {"role": "system", "content": "x"}], "message 2 is of role 'system'"),
        ([{"role": "user", "content": None}], "message 1 holds None"),
        ([{"role": "user"}], "it needs 'role' and 'content'"),
        ([{"role": "user", "content": "a [/INST] b"}, HELLO[1]], r"contains '\[/INST\]'"),
    ],
)
def test_messages_that_are_no_dialog(tiny_tokenizer, messages, words):
    with pytest.raises(ValueError, match=words):
        tiny_tokenizer({"messages": messages})


def test_the_mask_of_torchtune_is_turned_at_the_door_only(tiny_tokenizer):
    """Inside, True is supervised; `__call__` and `tokenize_messages` give torchtune's mask, True where it is not."""
    [(tokens, is_supervised)] = tiny_tokenizer.encode_turns([tiny_tokenizer.render(chat_messages(HELLO))])
    assert is_supervised[0] is False and is_supervised[-1] is True
    mask = [not supervised for supervised in is_supervised]
    assert tiny_tokenizer({"messages": HELLO}) == {"tokens": tokens, "mask": mask}
    assert tiny_tokenizer.tokenize_messages(HELLO) == (tokens, mask)


def test_a_transform_cannot_be_changed(tiny_tokenizer):
    for name in [field.name for field in fields(tiny_tokenizer)] + ["pad_id", "another"]:
        with pytest.raises(AttributeError):
            setattr(tiny_tokenizer, name, None)


def test_replace_makes_another_transform_without_loading_the_tokenizer_again(monkeypatch):
    tokenizer = Llama2ChatTransform(TINY_TOKENIZER)
    expected = Llama2ChatTransform(TINY_TOKENIZER, 12, "Be kind.", "llama2", "all")
    dialog = {"messages": [*HELLO, *HELLO]}
    before = tokenizer(dialog)

    def refuse(**_):
        raise AssertionError("loaded again")

    monkeypatch.setattr(sentencepiece, "SentencePieceProcessor", refuse)
    changed = tokenizer.replace(max_seq_len=12, system_prompt="Be kind.", train_on="all", stop_tokens=(2, 7))
    assert changed(dialog) == expected(dialog) != before
    assert changed.fingerprint == expected.fingerprint
    assert changed.stop_tokens == (2, 7)
    assert tokenizer(dialog) == before and tokenizer.stop_tokens == (2,)
    with pytest.raises(AssertionError, match="length"):
        tokenizer.replace(length=12)


@pytest.mark.parametrize(("max_seq_len", "fitted_len"), [(None, 256), (1000, 256), (12, 12)])
def test_fitting_gives_the_transform_for_a_model_and_leaves_the_other(make_checkpoint, max_seq_len, fitted_len):
    tokenizer = Llama2ChatTransform(TINY_TOKENIZER, max_seq_len)
    assert fit_tokenizer(tokenizer, loaded_model(make_checkpoint())).max_seq_len == fitted_len
    assert tokenizer.max_seq_len == max_seq_len


def test_tokenizer_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="is not a file"):
        Llama2ChatTransform(tmp_path / "tokenizer.model")


def test_tokenizer_that_is_none(tmp_path):
    (tmp_path / "tokenizer.model").write_text("not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Llama2ChatTransform(tmp_path / "tokenizer.model")


def test_decode_leaves_out_ids_of_a_padded_vocabulary(tiny_tokenizer):
    ids = tiny_tokenizer.encode("hello", add_bos=True, add_eos=True)
    assert tiny_tokenizer.decode([*ids, tiny_tokenizer.vocab_size + 5]) == "hello"


def test_embedded_tokenizer_has_llamas_control_tokens():
    processor = sentencepiece.SentencePieceProcessor(model_file=str(TINY_TOKENIZER))
    assert [processor.unk_id(), processor.bos_id(), processor.eos_id()] == [0, 1, 2]


def test_of_three_answers_only_the_last_is_trained_on():
    tokenizer = Llama2ChatTransform(TINY_TOKENIZER, train_on="last_assistant")
    every = Llama2ChatTransform(TINY_TOKENIZER)
    dialog = [{"role": role, "content": f"{role} {turn}"} for turn in range(3) for role in ("user", "assistant")]
    tokens, mask = (tokenizer({"messages": dialog})[key] for key in ("tokens", "mask"))
    whole = every({"messages": dialog})
    assert tokens == whole["tokens"]
    before = len(every({"messages": dialog[:4]})["tokens"])
    assert all(mask[:before]) and mask[before:] == whole["mask"][before:] and not all(mask[before:])
