"""Pairs of answers: their formats, what of them is compared, what becomes of imperfect ones."""

import json

import pytest

from custom_components.datasets import chat_dataset, preference_dataset
from custom_components.datasets.tokenized_rows import split_validation
from custom_components.runtime.errors import UserError

QUESTION = [{"role": "user", "content": "What is up?"}]
GOOD, BAD = "The sky.", "No idea."
SHAREGPT = [{"from": "human", "value": "What is up?"}]


def said(text):
    return [{"role": "assistant", "content": text}]


FORMATS = {
    "prompt_chosen_rejected": [
        {"prompt": "What is up?", "chosen": GOOD, "rejected": BAD},
        {"prompt": QUESTION, "chosen": said(GOOD), "rejected": said(BAD)},
        {"prompt": "What is up?", "chosen": QUESTION + said(GOOD), "rejected": QUESTION + said(BAD)},
        {"prompt": QUESTION, "chosen": said(GOOD)[0], "rejected": said(BAD)[0]},
        {"prompt": "What is up?", "chosen": GOOD, "rejected": BAD, "messages": QUESTION + said(GOOD)},
    ],
    "chosen_rejected": [
        {"chosen": QUESTION + said(GOOD), "rejected": QUESTION + said(BAD)},
        {"chosen": json.dumps(QUESTION + said(GOOD)), "rejected": json.dumps(QUESTION + said(BAD))},
        {
            "chosen": f"\n\nHuman: What is up?\n\nAssistant: {GOOD}",
            "rejected": f"\n\nHuman: What is up?\n\nAssistant: {BAD}",
        },
        {
            "chosen": f"<s>[INST] What is up? [/INST] {GOOD} </s>",
            "rejected": f"<s>[INST] What is up? [/INST] {BAD} </s>",
        },
    ],
    "sharegpt_chosen_rejected": [
        {
            "conversations": SHAREGPT,
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
        {"conversations": SHAREGPT, "chosen": GOOD, "rejected": BAD},
    ],
    "messages_chosen_rejected": [{"messages": QUESTION, "chosen": said(GOOD)[0], "rejected": said(BAD)[0]}],
    "alpaca_chosen_rejected": [{"instruction": "What is up?", "input": "", "chosen": GOOD, "rejected": BAD}],
    "openai_preference": [
        {
            "input": {"messages": QUESTION, "tools": [], "parallel_tool_calls": True},
            "preferred_output": said(GOOD),
            "non_preferred_output": said(BAD),
        }
    ],
}


@pytest.fixture
def read(tiny_tokenizer, tmp_path):
    def read(*rows, dataset=preference_dataset, **settings):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return dataset(tiny_tokenizer, str(path), **settings)

    return read


def encoded(tokenizer, *messages):
    """The row that supervised fine-tuning makes of messages."""
    row = tokenizer({"messages": [*messages]})
    labels = [-100 if masked else token for token, masked in zip(row["tokens"], row["mask"], strict=True)]
    return {"tokens": row["tokens"], "labels": labels}


@pytest.mark.parametrize("name", FORMATS)
def test_L27_every_format_gives_the_same_pair_and_is_said(read, tiny_tokenizer, name):
    for row in FORMATS[name]:
        for form in (None, name):
            dataset = read(row, format=form)
            [pair] = dataset
            assert pair["chosen"] == encoded(tiny_tokenizer, *QUESTION, *said(GOOD))
            assert pair["rejected"] == encoded(tiny_tokenizer, *QUESTION, *said(BAD))
            assert f"({name}): 1 row, 1 kept" in str(dataset.summaries[0])


def test_a_system_message_is_both_dialogs(read, tiny_tokenizer):
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {"system": "Be brief.", "prompt": "What is up?", "chosen": GOOD, "rejected": BAD},
        {
            "prompt": "What is up?",
            "chosen": [system, *QUESTION, *said(GOOD)],
            "rejected": [system, *QUESTION, *said(BAD)],
        },
    ]
    for row in rows:
        [pair] = read(row)
        assert pair["chosen"] == encoded(tiny_tokenizer, system, *QUESTION, *said(GOOD))
        assert pair["rejected"] == encoded(tiny_tokenizer, system, *QUESTION, *said(BAD))


def test_L02_of_several_turns_only_those_that_differ_are_compared(read, tiny_tokenizer):
    shared = [*QUESTION, *said("Clouds."), {"role": "user", "content": "And now?"}]
    longer = [*said(BAD), {"role": "user", "content": "Sure?"}, *said("No.")]
    [pair] = read({"chosen": shared + said(GOOD), "rejected": shared + longer})
    unmarked = encoded(tiny_tokenizer, *shared, *longer)
    masked = [{**message, "weight": 0} if message["content"] == "Clouds." else message for message in shared]
    assert pair["rejected"] == encoded(tiny_tokenizer, *masked, *longer)
    assert pair["rejected"]["tokens"] == unmarked["tokens"] and pair["rejected"]["labels"] != unmarked["labels"]
    assert pair["chosen"] == encoded(tiny_tokenizer, *masked, *said(GOOD))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Q", "completion": "A", "label": True}, "'label' holds 'True', which judges one answer, as in KTO"),
        ({"instruction": "Q", "output": "A", "kto_tag": False}, "'kto_tag' holds 'False', which judges one answer"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "label": 1}, "'label' holds '1', which judges the answer"),
        ({"messages": QUESTION + said("A")}, "is messages, without a worse answer; .*lora_single_device.py trains"),
        (
            {"question": "Q", "response_j": "A", "response_k": "B"},
            "'dataset.column_map={prompt: question, chosen: response_j, rejected: response_k}'",
        ),
        (
            {"instruction": "Q", "chosen_response": "A", "rejected_response": "B"},
            "'dataset.column_map={prompt: instruction, chosen: chosen_response, rejected: rejected_response}'",
        ),
        ({"prompt": "Q", "chosen": "A", "rejected": float("nan")}, "'rejected' holds nan where text is due"),
        ({"chosen": "A", "rejected": "B"}, "'chosen' is text without a question"),
        (
            {"chosen": QUESTION + said("A"), "rejected": [{"role": "user", "content": "Else?"}, *said("A")]},
            "'chosen' and 'rejected' differ before an answer: user 'What is up.', user 'Else.'",
        ),
        (
            {"chosen": QUESTION + said("A"), "rejected": QUESTION + said("A") + QUESTION + said("B")},
            "'rejected' goes on where 'chosen' ends",
        ),
        ({"chosen": QUESTION + said("A"), "rejected": QUESTION}, "there is no answer to learn"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "images": ["x.png"]}, "has 'images', which cannot be trained"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "chosen_weight": 2}, "'chosen_weight'"),
        (
            {"input": {"messages": QUESTION, "tools": [1]}, "preferred_output": [], "non_preferred_output": []},
            "'input' has 'tools'",
        ),
    ],
)
def test_L32_rows_that_are_no_pair_are_refused_with_what_they_are(read, row, message):
    with pytest.raises(UserError, match=rf"pairs\.jsonl:1: .*{message}"):
        read(row)


def test_L32_what_becomes_of_imperfect_pairs_is_counted(read):
    good = {"prompt": "What is up?", "chosen": GOOD, "rejected": BAD}
    rows = [
        good | {"score_chosen": 9.0},
        good | {"rejected": GOOD},
        good | {"rejected": " "},
        good | {"train": False},
        {"chosen": 3},
        {"prompt": QUESTION, "chosen": said(GOOD) + QUESTION, "rejected": said(BAD)},
    ]
    dataset = read(*rows, on_bad_row="skip")
    account = str(dataset.summaries[0])
    assert len(dataset) == 2 and "6 rows, 2 kept" in account
    for words in (
        "1 dropped (both answers are the same)",
        "1 dropped (empty answer)",
        "1 dropped (marked as not trained)",
        "1 dropped (bad rows)",
        "1 open last question left out",
        "columns not used: score_chosen",
    ):
        assert words in account
    with pytest.raises(UserError, match="pairs.jsonl:1: 'rejected' is empty"):
        read(good | {"rejected": " "}, on_empty_answer="error")


def test_uneven_turns_follow_the_rules(read, tiny_tokenizer):
    row = {"prompt": QUESTION + QUESTION, "chosen": said(GOOD), "rejected": said(BAD)}
    with pytest.raises(UserError, match="on_uneven_turns=merge"):
        read(row)
    dataset = read(row, on_uneven_turns="merge")
    joined = {"role": "user", "content": "What is up?\n\nWhat is up?"}
    assert dataset[0]["chosen"] == encoded(tiny_tokenizer, joined, *said(GOOD))
    assert "1 turn joined" in str(dataset.summaries[0])  # once, not for each of the two dialogs


def test_L05_each_dialog_is_cut_and_pairs_without_an_answer_left_are_dropped(read, tiny_tokenizer):
    long = " ".join(["word"] * 50)
    rows = [
        {"prompt": "What is up?", "chosen": long, "rejected": BAD},
        {"prompt": long, "chosen": GOOD, "rejected": BAD},
        {"prompt": "What is up?", "chosen": f"{long} one", "rejected": f"{long} two"},
    ]
    tokenizer = tiny_tokenizer.replace(max_seq_len=40)
    dataset = read(*rows, dataset=lambda _, source: preference_dataset(tokenizer, source))
    account = str(dataset.summaries[0])
    assert len(dataset) == 1 and "1 truncated" in account and "longest 40" in account
    assert "1 dropped (nothing to train on)" in account and "1 dropped (both answers are the same)" in account
    assert len(dataset[0]["chosen"]["tokens"]) == 40 and dataset[0]["rejected"]["tokens"][-1] == tokenizer.eos_id


def test_tokens_are_kept_for_the_next_run_apart_from_those_of_dialogs(read, tmp_path):
    rows = [{"prompt": f"What is {n}?", "chosen": GOOD, "rejected": BAD} for n in range(3)]
    first = read(*rows, cache_dir=tmp_path / "cache")
    again = read(*rows, cache_dir=tmp_path / "cache")
    assert [*again] == [*first] and again.digest == first.digest
    mapped = {"prompt": "prompt", "completion": "chosen"}
    dialogs = read(*rows, dataset=chat_dataset, cache_dir=tmp_path / "cache", column_map=mapped)
    assert dialogs[0] == first[0]["chosen"]


def test_weights_repeat_pairs_and_a_validation_draw_keeps_equal_ones_together(read, tiny_tokenizer, tmp_path):
    rows = [{"prompt": f"What is {n}?", "chosen": GOOD, "rejected": BAD} for n in range(10)]
    dataset = read(*rows)
    twice = preference_dataset(tiny_tokenizer, [{"source": str(tmp_path / "pairs.jsonl"), "weight": 2.0}])
    distinct, inverse = twice.distinct()
    assert len(twice) == 20 and [*distinct] == [*dataset]
    assert [distinct[index] for index in inverse] == [*twice]
    train, validation = split_validation(twice, 0.2, seed=0)
    assert len(train) + len(validation) == 20
    assert not {train.content_digest(i) for i in range(len(train))} & {
        validation.content_digest(i) for i in range(len(validation))
    }
