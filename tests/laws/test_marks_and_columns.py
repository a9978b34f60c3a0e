"""L32: what a row says of its training is done, named as unused, or an error with its place; L2: never another mask."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchtune.data import Message
from torchtune.datasets import alpaca_dataset
from torchtune.datasets import chat_dataset as torchtune_chat_dataset

from custom_components.datasets.chat import chat_dataset
from custom_components.runtime.errors import UserError
from custom_components.runtime.terminal import visible
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from tests.support.paths import TINY_TOKENIZER

TRANSFORM = Llama2ChatTransform(TINY_TOKENIZER)
TRAINS_ALL = Llama2ChatTransform(TINY_TOKENIZER, train_on="all")

USER = {"role": "user", "content": "Who?"}
ANSWER = {"role": "assistant", "content": "Nobody."}
HUMAN = {"from": "human", "value": "Who?"}
GPT = {"from": "gpt", "value": "Nobody."}

TRUE_TRAINS = ["weight", "train", "training", "trainable", "loss", "loss_weight", "lossWeight", "loss_mask"]
TRUE_MASKS = ["masked", "mask", "is_masked"]
NOT_TRAINED = [(key, value) for key in TRUE_TRAINS for value in (0, 0.0, False, "false", "0")] + [
    (key, value) for key in TRUE_MASKS for value in (1, True, "true")
]
TRAINED = [(key, value) for key in TRUE_TRAINS for value in (1, 1.0, True, "True", None)] + [
    (key, value) for key in TRUE_MASKS for value in (0, False, "false", None)
]


def read(tmp_path, *rows, tokenizer=TRANSFORM, **arguments):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return chat_dataset(tokenizer, str(path), **arguments)


def supervised(row):
    return [label >= 0 for label in row["labels"]]


def dialog(column, marks, second_answer):
    """A row of two turns, the first answer with marks."""
    if column == "messages":
        return {"messages": [USER, ANSWER | marks, USER, ANSWER | second_answer]}
    return {"conversations": [HUMAN, GPT | marks, HUMAN, GPT | second_answer]}


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_L32_an_answer_marked_as_not_trained_is_shown_and_not_trained(tmp_path, column):
    plain = read(tmp_path, dialog(column, {}, {}))[0]
    num_first_turn = plain["tokens"].index(TRANSFORM.eos_id) + 1
    for key, value in NOT_TRAINED:
        dataset = read(tmp_path, dialog(column, {key: value}, {}))
        assert dataset[0]["tokens"] == plain["tokens"]
        assert not any(supervised(dataset[0])[:num_first_turn]), (key, value)
        assert supervised(dataset[0])[num_first_turn:] == supervised(plain)[num_first_turn:]
        assert "1 answer marked as not trained" in str(dataset.summaries[0])
    for key, value in TRAINED:
        assert read(tmp_path, dialog(column, {key: value}, {}))[0] == plain, (key, value)


ROWS = {
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [HUMAN, GPT]},
    "alpaca": {"instruction": "Who?", "output": "Nobody."},
    "prompt_completion": {"prompt": "Who?", "completion": "Nobody."},
    "llama2_text": {"text": "<s>[INST] Who? [/INST] Nobody. </s>"},
    "marked_text": {"text": "### Human: Who?\n### Assistant: Nobody."},
    "text": {"text": "Once upon a time."},
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("tokenizer", [TRANSFORM, TRAINS_ALL], ids=["answers", "all"])
def test_L32_a_row_marked_as_not_trained_is_left_out_and_counted(tmp_path, name, tokenizer):
    row = ROWS[name]
    plain = read(tmp_path, row, tokenizer=tokenizer)
    for key, value in NOT_TRAINED:
        dataset = read(tmp_path, row, row | {key: value}, tokenizer=tokenizer)
        assert [*dataset] == [*plain], (key, value)
        assert "1 dropped (marked as not trained)" in str(dataset.summaries[0])
    for key, value in TRAINED:
        assert [*read(tmp_path, row | {key: value}, tokenizer=tokenizer)] == [*plain], (key, value)
        assert "not used" not in str(dataset.summaries[0])


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        ({"weight": 0.5}, "'weight': 0.5; an answer is trained whole or not at all"),
        ({"weight": 2}, "'weight': '2', which is neither 0 nor 1"),
        ({"train": "maybe"}, "'train': 'maybe', which is neither"),
        (
            {"training_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]},
            "'training_detail', which may say",
        ),
        ({"train_on_input": True}, "'train_on_input', which may say"),
        ({"assistant_masks": [0, 1]}, "'assistant_masks', which may say"),
        ({"sample_weights": 1}, "'sample_weights', which may say"),
        ({"weight": 1, "train": False}, "'weight': 1, 'train': False"),
        ({"masked": True, "train": True}, "marks that contradict each other"),
    ],
)
def test_L32_a_mark_that_cannot_be_honoured_is_an_error_with_its_place(tmp_path, mark, words):
    for row, name in ((dialog("messages", mark, {}), "message 2 has "), (ROWS["alpaca"] | mark, "the row has ")):
        with pytest.raises(UserError) as raised:
            read(tmp_path, ROWS["messages"] if "messages" in row else ROWS["alpaca"], row)
        assert f"rows.jsonl:2: {name}" in str(raised.value) and words in str(raised.value)


def test_L32_a_prompt_marked_to_be_trained_needs_train_on_all(tmp_path):
    row = {"messages": [USER | {"train": True}, ANSWER]}
    with pytest.raises(
        UserError,
        match=r"rows\.jsonl:1: message 1, of role 'user', is marked to be trained by 'train', and.*train_on: all",
    ):
        read(tmp_path, row)
    assert all(supervised(read(tmp_path, row, tokenizer=TRAINS_ALL)[0])[1:])
    masked = {"messages": [USER | {"train": False}, ANSWER]}
    assert read(tmp_path, masked, tokenizer=TRAINS_ALL)[0] == read(tmp_path, masked)[0]
    with pytest.raises(UserError, match="they are one prompt"):
        read(tmp_path, {"messages": [{"role": "system", "content": "Be."}, *masked["messages"]]}, tokenizer=TRAINS_ALL)


def test_L32_a_row_and_its_message_cannot_contradict_each_other(tmp_path):
    with pytest.raises(UserError, match="is marked as not trained, and one of its messages as trained"):
        read(tmp_path, {"messages": [USER, ANSWER | {"weight": 1}], "train": False})


# ---- torchtune's masks


def masks_by_role(transform, messages):
    row = transform({"messages": messages})
    prompt = transform({"messages": messages[:1]}, inference=True)["tokens"]
    return set(row["mask"][1 : len(prompt)]), set(row["mask"][len(prompt) :])


def torchtune_dialog(question_is_masked, answer_is_masked=False):
    return [
        Message(role="user", content="Who?", masked=question_is_masked),
        Message(role="assistant", content="Nobody.", masked=answer_is_masked),
    ]


def test_L32_torchtunes_masks_are_honoured_or_refused():
    assert masks_by_role(TRANSFORM, torchtune_dialog(True)) == ({True}, {False})
    assert masks_by_role(TRANSFORM, torchtune_dialog(True, True)) == ({True}, {True})
    assert masks_by_role(TRAINS_ALL, torchtune_dialog(False)) == ({False}, {False})
    assert masks_by_role(TRAINS_ALL, torchtune_dialog(False, True)) == ({False}, {True})
    with pytest.raises(ValueError, match="marked to be trained.*train_on: all"):
        TRANSFORM({"messages": torchtune_dialog(False)})
    with pytest.raises(ValueError, match="is masked, and train_on: all trains prompts"):
        TRAINS_ALL({"messages": torchtune_dialog(True)})


@pytest.mark.parametrize("train_on_input", [True, False])
def test_L32_train_on_input_of_torchtunes_data_sets_through_our_transform(tmp_path, monkeypatch, train_on_input):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, row in (("chat", {"messages": [USER, ANSWER]}), ("alpaca", ROWS["alpaca"] | {"input": ""})):
        source = tmp_path / f"{name}.json"
        source.write_text(json.dumps([row]))
        arguments = {"source": "json", "data_files": str(source), "split": "train", "train_on_input": train_on_input}
        for trains_all in (False, True):
            transform = TRAINS_ALL if trains_all else TRANSFORM

            def first_row(name=name, arguments=arguments, transform=transform):
                if name == "alpaca":
                    return alpaca_dataset(transform, **arguments)[0]
                style = {"conversation_column": "messages", "conversation_style": "openai"}
                return torchtune_chat_dataset(transform, **style, **arguments)[0]

            if train_on_input == trains_all:
                row_labels = [int(label) for label in first_row()["labels"]]
                assert all(label >= 0 for label in row_labels[1:]) == trains_all
                assert any(label >= 0 for label in row_labels)
            else:
                with pytest.raises(ValueError, match="train_on_input"):
                    first_row()


# ---- Columns


def test_L32_preferences_and_judged_answers_are_refused_with_what_they_are(tmp_path):
    pair = {"prompt": "Who?", "chosen": "Nobody.", "rejected": "You."}
    for row in (pair, ROWS["prompt_completion"] | pair, ROWS["messages"] | {"chosen": [ANSWER], "rejected": [ANSWER]}):
        with pytest.raises(UserError, match=r"rows\.jsonl:1: 'chosen' and 'rejected' are a pair .*lora_dpo_single"):
            read(tmp_path, row)
    column_map = {"prompt": "prompt", "completion": "chosen"}
    dataset = read(tmp_path, pair, column_map=column_map)
    assert [*dataset] == [*read(tmp_path, ROWS["prompt_completion"])]
    assert str(dataset.summaries[0]).endswith("columns not used: rejected")
    for label in (False, True, "False"):
        with pytest.raises(UserError, match=r"rows\.jsonl:1: 'label' holds .* as in KTO's sets; .*lora_dpo_single"):
            read(tmp_path, ROWS["prompt_completion"] | {"label": label})


@pytest.mark.parametrize("name", ROWS)
def test_L32_what_cannot_be_trained_is_an_error_with_its_place(tmp_path, name):
    row = ROWS[name]
    for column, value in (("images", ["a.png"]), ("tools", [{"name": "f"}]), ("tool_calls", "[{}]")):
        with pytest.raises(UserError, match=rf"rows\.jsonl:2: has '{column}', which cannot be trained"):
            read(tmp_path, row, row | {column: value})
        assert (
            [*read(tmp_path, row | {column: None})] == [*read(tmp_path, row | {column: []})] == [*read(tmp_path, row)]
        )
        spelled = read(tmp_path, row | {column: " [] "})
        assert [*spelled] == [*read(tmp_path, row)]
        assert str(spelled.summaries[0]).endswith(f"columns not used: {column}")
    if name in ("messages", "sharegpt"):
        for key, value in (("tool_calls", [{"id": 1}]), ("thinking", "Hm."), ("images", ["a.png"])):
            [(column, (question, answer))] = row.items()
            with pytest.raises(UserError, match=rf"rows\.jsonl:1: message 2 has '{key}', which cannot be trained"):
                read(tmp_path, {column: [question, answer | {key: value}]})
            assert len(read(tmp_path, {column: [question, answer | {key: value[:0]}]})) == 1
            assert len(read(tmp_path, {column: [question, answer | {key: "[]"}]})) == 1


@pytest.mark.parametrize("name", ROWS)
def test_L32_columns_that_are_not_used_are_named_once(tmp_path, name):
    rows = [ROWS[name] | {"id": 1, "source": "web", "empty": None}, ROWS[name] | {"id": 2, "context": "c"}]
    assert str(read(tmp_path, *rows).summaries[0]).endswith("\n  columns not used: id, source, context")
    assert "not used" not in str(read(tmp_path, ROWS[name]).summaries[0])


def test_L32_keys_of_messages_that_are_not_used_are_named_once(tmp_path):
    metadata = {"id": 7, "timestamp": 1.5, "name": "Ann", "annotations": None, "thinking": ""}
    for column, question, answer in (("messages", USER, ANSWER), ("conversations", HUMAN, GPT)):
        plain = read(tmp_path, {column: [question, answer]})
        dataset = read(tmp_path, *[{column: [question, answer | metadata]}] * 2)
        assert [*dataset] == [*plain, *plain]
        [line] = [line for line in str(dataset.summaries[0]).splitlines() if "keys of messages" in line]
        assert sorted(line.partition(": ")[2].split(", ")) == ["id", "name", "timestamp"]


def test_L32_a_renamed_column_that_hides_another_is_named(tmp_path):
    row = {"question": "Who?", "answer": "Nobody.", "prompt": "An essay."}
    dataset = read(tmp_path, row, column_map={"prompt": "question", "completion": "answer"})
    assert [*dataset] == [*read(tmp_path, ROWS["prompt_completion"])]
    assert str(dataset.summaries[0]).endswith("columns not used: prompt")


@pytest.mark.parametrize(
    "pair", [("input", "output"), ("question", "answer"), ("prompt", "response"), ("instruction", "response")]
)
def test_L32_a_text_beside_a_question_and_its_answer_asks_which_is_trained(tmp_path, pair):
    question, answer = pair
    row = {"text": "An article.", question: "Who?", answer: "Nobody."}
    with pytest.raises(UserError) as raised:
        read(tmp_path, row)
    assert f"rows.jsonl:1: has 'text' beside {question!r} and {answer!r}" in str(raised.value)
    assert f"'dataset.column_map={{prompt: {question}, completion: {answer}}}'" in str(raised.value)
    mapped = read(tmp_path, row, column_map={"prompt": question, "completion": answer})
    assert [*mapped] == [*read(tmp_path, ROWS["prompt_completion"])]
    assert str(read(tmp_path, row, format="text").summaries[0]).endswith(f"columns not used: {question}, {answer}")
    assert len(read(tmp_path, {"text": "An article.", question: None, answer: None})) == 1


def test_L32_null_messages_beside_other_columns_are_not_the_format(tmp_path):
    row = ROWS["prompt_completion"] | {"messages": None, "text": None}
    assert [*read(tmp_path, row)] == [*read(tmp_path, ROWS["prompt_completion"])]


# ---- Any key, in any row


@st.composite
def rows_and_messages(draw):
    """A row of any format with a random dialog, and the messages in it, which the row shares."""
    name = draw(st.sampled_from([*ROWS]))
    words = st.text(st.sampled_from("ab \u00e9?"), min_size=1, max_size=8).filter(str.strip)
    num_turns = draw(st.integers(1, 3)) if name in ("messages", "sharegpt", "llama2_text", "marked_text") else 1
    turns = [(draw(words), draw(words)) for _ in range(num_turns)]
    question, answer = turns[0]
    if name == "messages":
        spelled = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns]
    elif name == "sharegpt":
        spelled = [[{"from": "human", "value": q}, {"from": "gpt", "value": a}] for q, a in turns]
    else:
        row = {
            "alpaca": {"instruction": question, "input": draw(st.sampled_from(["", "x"])), "output": answer},
            "prompt_completion": {"prompt": question, "completion": answer},
            "llama2_text": {"text": "".join(f"<s>[INST] {q} [/INST] {a} </s>" for q, a in turns)},
            "marked_text": {"text": "\n".join(f"### Human: {q}\n### Assistant: {a}" for q, a in turns)},
            "text": {"text": question},
        }[name]
        return row, []
    messages = [message for turn in spelled for message in turn]
    return {{"messages": "messages", "sharegpt": "conversations"}[name]: messages}, messages


values = (
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats(0, 1) | st.text(max_size=5) | st.just([]) | st.just([1])
)
keys = st.one_of(
    st.text(min_size=1, max_size=12),
    st.sampled_from([*TRUE_TRAINS, "loss_scale", "Train"]),
    st.sampled_from(TRUE_MASKS),
    st.sampled_from(
        [
            *("id", "label", "context", "images", "my_train", "Weights", "lossy", "unmask", "chosen", "rejected"),
            *("name", "thinking", "tool_calls", "kto_tag"),
        ]
    ),
)


def says_nothing(value):
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def answer_spans(row, tokenizer):
    """The places of each answer in a row: from its first supervised token to its EOS."""
    spans, begin = [], None
    for index, label in enumerate(row["labels"]):
        if label >= 0 and begin is None:
            begin = index
        if begin is not None and row["tokens"][index] == tokenizer.eos_id:
            spans.append(range(begin, index + 1))
            begin = None
    return spans


@settings(deadline=None, max_examples=300)
@given(drawn=rows_and_messages(), key=keys, value=values, place=st.integers(-1, 5))
def test_L02_L32_an_unknown_key_never_gives_another_mask(tmp_path_factory, drawn, key, value, place):
    """In a row or in any of its messages it changes nothing and is named as unused, is an error, or is a known mark."""
    tmp_path = tmp_path_factory.getbasetemp()
    plain, messages = drawn
    [expected] = read(tmp_path, plain)
    row = json.loads(json.dumps(plain))
    in_message = bool(messages) and place >= 0
    if in_message:
        place %= len(messages)
        [column] = row
        target = row[column][place]
    else:
        target = row
    if key in target or key.strip().lower() in ("messages", "conversations", "text", "system", "input", "history"):
        return
    if key.strip().lower() in ("role", "content", "from", "value", "instruction", "output", "prompt", "completion"):
        return
    target[key] = value
    try:
        dataset = read(tmp_path, plain, row)
    except UserError as error:
        assert "rows.jsonl:2: " in str(error) and repr(key) in str(error)
        return
    summary = str(dataset.summaries[0])
    if says_nothing(value):
        assert [*dataset] == [expected, expected] and "not used" not in summary
    elif not re.search("train|loss|weight|mask", key, re.IGNORECASE):
        assert [*dataset] == [expected, expected]
        assert "not used: " in summary and visible(key) in summary
    elif is_trained(key, value):
        assert [*dataset] == [expected, expected] and "not used" not in summary
    elif not in_message:
        assert [*dataset] == [expected] and "1 dropped (marked as not trained)" in summary
    elif place % 2 == 0:  # a question, which is not trained anyway
        assert [*dataset] == [expected, expected]
    elif len(messages) == 2:
        assert [*dataset] == [expected] and "1 dropped (nothing to train on)" in summary
    else:
        masked = answer_spans(expected, TRANSFORM)[place // 2]
        labels = [-100 if index in masked else label for index, label in enumerate(expected["labels"])]
        assert [*dataset] == [expected, {"tokens": expected["tokens"], "labels": labels}]


def is_trained(key, value):
    """What a mark that was taken says; a plain spelling for each key that is known."""
    says_yes = value in (1, True) or str(value).strip().lower() in ("true", "yes", "1")
    return says_yes != ("mask" in key.lower() and key.lower() != "loss_mask")
