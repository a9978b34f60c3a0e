"""L2, L6, L27, L32: each row is judged by itself; what is left out or repaired is counted; a refusal has a way out."""

import json
import re

import pytest

from custom_components.datasets.chat import chat_dataset
from custom_components.runtime.errors import UserError
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from tests.support.paths import TINY_TOKENIZER

TRANSFORM = Llama2ChatTransform(TINY_TOKENIZER)


def read(tmp_path, *rows, tokenizer=TRANSFORM, **arguments):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return chat_dataset(tokenizer, str(path), **arguments)


def tokens_of(*texts):
    """The tokens of a dialog of these questions and answers."""
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return TRANSFORM({"messages": messages})["tokens"]


def in_format(name, *texts):
    """A row that spells questions and answers in turn."""
    roles = ("user", "assistant") * len(texts)
    turns = list(zip(roles, texts, strict=False))
    if name == "messages":
        return {"messages": [{"role": role, "content": text} for role, text in turns]}
    if name == "conversations":
        return {"conversations": [{"from": {"user": "human"}.get(role, "gpt"), "value": text} for role, text in turns]}
    if name == "prompt":
        return {"prompt": in_format("messages", *texts[:1])["messages"], "completion": in_format_rest(turns[1:])}
    if name == "[INST]":
        return {"text": "".join(f"<s>[INST] {t} [/INST]" if r == "user" else f" {t} </s>" for r, t in turns)}
    return {"text": "".join(f"### {'Human' if r == 'user' else 'Assistant'}: {t}" for r, t in turns)}


def in_format_rest(turns):
    return [{"role": role, "content": text} for role, text in turns]


DIALOG_FORMATS = ["messages", "conversations", "prompt", "[INST]", "### Human"]


@pytest.mark.parametrize("name", DIALOG_FORMATS)
def test_L32_an_open_last_question_is_left_out_and_counted(tmp_path, name):
    dataset = read(tmp_path, in_format(name, "a", "b", "c"), in_format(name, "a", "b"))
    assert [row["tokens"] for row in dataset] == [tokens_of("a", "b")] * 2
    assert "1 open last question left out" in str(dataset.summaries[0])


@pytest.mark.parametrize("name", ["messages", "conversations", "[INST]"])
def test_L06_a_question_alone_is_a_bad_row(tmp_path, name):
    with pytest.raises(UserError, match=r"rows\.jsonl:2: the last message is of role 'user', there is no answer"):
        read(tmp_path, in_format(name, "a", "b"), in_format(name, "a"))


@pytest.mark.parametrize("name", DIALOG_FORMATS)
def test_L02_an_empty_answer_in_a_dialog_is_shown_and_not_trained(tmp_path, name):
    dataset = read(tmp_path, in_format(name, "a", "", "c", "d"), in_format(name, "a", "", "c", ""))
    [row] = dataset
    assert row["tokens"] == tokens_of("a", "", "c", "d")
    first = row["tokens"].index(TRANSFORM.eos_id) + 1
    assert not any(label >= 0 for label in row["labels"][:first]) and any(label >= 0 for label in row["labels"][first:])
    assert "1 dropped (empty answer)" in str(dataset.summaries[0])
    assert "1 empty answer within a dialog shown and not trained" in str(dataset.summaries[0])
    with pytest.raises(UserError, match=r"rows\.jsonl:1: message \d.*, of role 'assistant', is empty"):
        read(tmp_path, in_format(name, "a", "", "c", "d"), on_empty_answer="error")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "a", "output": ""},
        {"instruction": "a", "input": "b", "output": " \n"},
        {"prompt": "a", "completion": ""},
        {"prompt": "a", "completion": None},
        {"instruction": "a", "output": None},
    ],
)
def test_L06_a_row_with_an_empty_answer_is_dropped_or_refused_by_its_column(tmp_path, row):
    full = row | {[*row][-1]: "b"}
    dataset = read(tmp_path, row, full)
    assert len(dataset) == 1 and "1 dropped (empty answer)" in str(dataset.summaries[0])
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: '{[*row][-1]}' is empty"):
        read(tmp_path, full, row, on_empty_answer="error")
    assert len(read(tmp_path, full, row, on_empty_answer="error", on_bad_row="skip")) == 1


def test_L32_uneven_turns_are_refused_with_the_key_that_repairs_them(tmp_path):
    user, assistant = ({"role": role, "content": role} for role in ("user", "assistant"))
    doubled = {"messages": [user, user, assistant, assistant]}
    leading = {"messages": [assistant, user, assistant]}
    even = {"messages": [user, assistant]}
    with pytest.raises(UserError) as raised:
        read(tmp_path, even, doubled, leading)
    assert [re.sub(".*rows.jsonl", "", message) for message in raised.value.messages] == [
        ":2: message 2 is of role 'user' where 'assistant' is due; on_uneven_turns=merge joins such turns",
        ":3: message 1 is of role 'assistant' where 'user' is due; on_uneven_turns=drop_leading leaves out what comes "
        "before the first question; on_bad_row=skip leaves such rows out",
    ]
    assert read(tmp_path, even, doubled, leading, on_bad_row="skip").summaries[0].num_bad == 2
    merged = read(tmp_path, doubled, on_uneven_turns="merge")
    assert merged[0]["tokens"] == tokens_of("user\n\nuser", "assistant\n\nassistant")
    assert "2 turns joined" in str(merged.summaries[0])
    with pytest.raises(UserError, match="drop_leading"):
        read(tmp_path, leading, on_uneven_turns="merge")
    dropped = read(tmp_path, leading, doubled, on_uneven_turns="drop_leading")
    assert [row["tokens"] for row in dropped] == [tokens_of("user", "assistant"), merged[0]["tokens"]]
    assert "1 answer before the first question left out" in str(dropped.summaries[0])
    with pytest.raises(UserError, match="message 2 and message 3 are one turn, but only one is marked"):
        read(tmp_path, {"messages": [user, assistant, assistant | {"weight": 0}]}, on_uneven_turns="merge")


@pytest.mark.parametrize("roles", [("human", "gpt"), ("User", "Assistant"), ("USER", "model"), ("user", "chatgpt")])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_L27_roles_are_read_by_their_meaning(tmp_path, column, roles):
    for role_key, content_key in (("role", "content"), ("from", "value")):
        texts = [("developer", "Be."), (roles[0], "a"), (roles[1], "b")]
        dataset = read(tmp_path, {column: [{role_key: role, content_key: text} for role, text in texts]})
        assert TRANSFORM.decode(dataset[0]["tokens"]) == "[INST] <<SYS>>\nBe.\n<</SYS>>\n\na [/INST] b "


def test_L32_calls_of_tools_are_refused_by_what_they_are(tmp_path):
    for role in ("function_call", "observation", "tool", "Function"):
        turns = [{"from": name, "value": "a"} for name in ("human", role, "gpt")]
        with pytest.raises(UserError, match=rf"rows\.jsonl:1: message 2 is of role '{role}'; calls of tools .*=skip"):
            read(tmp_path, {"conversations": turns})


def test_L27_many_columns_of_no_format_are_still_one_short_line(tmp_path):
    with pytest.raises(UserError, match=r"'c7' and 24 more; name them: 'dataset.column_map=\{prompt: Question, comp"):
        read(tmp_path, {**{f"c{number}": "x" for number in range(30)}, "Question": "a", "Answer": "b"})


def test_L27_parts_of_text_are_joined_and_others_named(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "value": "b", "id": 3}, "c"]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "d"}]}
    dataset = read(tmp_path, row)
    assert dataset[0]["tokens"] == tokens_of("abc", "d")
    assert str(dataset.summaries[0]).endswith("keys of messages not used: id")
    for part, words in (
        ({"type": "image_url", "image_url": {"url": "x"}}, "message 1 has a part of type 'image_url'"),
        ({"type": "text", "text": "x", "weight": 0}, "message 1 has a part with 'weight'"),
        ({"type": "text"}, "without a text"),
    ):
        row["messages"][0]["content"] = [*parts, part]
        with pytest.raises(UserError, match=rf"rows\.jsonl:1: .*{words}"):
            read(tmp_path, row)


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("spelled", [json.dumps, repr])
def test_L27_messages_may_be_a_cell_of_text(tmp_path, column, spelled):
    row = in_format(column, "a", 'it\'s "b" \n\u00e9')
    assert [*read(tmp_path, {column: spelled(row[column])})] == [*read(tmp_path, row)]
    with pytest.raises(UserError, match="where a list is due"):
        read(tmp_path, {column: "[{'role': open('x')}]"})


def test_L27_a_completion_that_repeats_the_prompt_is_the_dialog(tmp_path):
    user, answer = in_format("messages", "a", "b")["messages"]
    plain = [*read(tmp_path, in_format("messages", "a", "b"))]
    for prompt, completion in (("a", [answer]), ("a", [user, answer]), ([user], [user, answer]), ([user], "b")):
        assert [*read(tmp_path, {"prompt": prompt, "completion": completion})] == plain


@pytest.mark.parametrize(
    ("value", "text"), [(3, "3"), (-1, "-1"), (0, "0"), (0.5, "0.5"), (1e-7, "1e-07"), (True, "true"), (False, "false")]
)
def test_L27_numbers_and_truth_values_are_answers_by_their_text(tmp_path, value, text):
    for row in (
        {"prompt": "a", "completion": value},
        {"instruction": "a", "output": value},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": value}]},
    ):
        dataset = read(tmp_path, row)
        assert dataset[0]["tokens"] == tokens_of("a", text)
        assert "1 answer given as a number or as true or false, trained as text" in str(dataset.summaries[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_L27_an_answer_that_is_not_a_number_is_a_bad_row(tmp_path, value):
    """pandas writes a missing answer so."""
    with pytest.raises(UserError, match=r"rows\.jsonl:1: 'completion' holds (nan|inf) where text is due"):
        read(tmp_path, {"prompt": "a", "completion": value})


def test_L32_one_thing_is_counted_in_the_singular(tmp_path):
    open_question, row = in_format("messages", "a", "b", "c"), in_format("messages", "a", "b")
    one, two = read(tmp_path, open_question), read(tmp_path, open_question, open_question)
    assert ": 1 row, 1 kept, 1 open last question left out, " in str(one.summaries[0])
    assert ": 2 rows, 2 kept, 2 open last questions left out, " in str(two.summaries[0])
    with pytest.raises(UserError, match=r"\(and 1 more such row\); on_bad_row=skip leaves such rows out$"):
        read(tmp_path, row, {"x": 1}, {"x": 1})


# ---- The first row does not decide for all


LLAMA2 = {"text": "<s>[INST] a [/INST] b </s>"}
MARKED = {"text": "### Human: a\n### Assistant: b"}
PROSE = {"text": "Once upon a time."}


def test_L32_a_text_of_another_format_than_the_sets_is_a_bad_row(tmp_path):
    for first, other in ((PROSE, LLAMA2), (PROSE, MARKED), (LLAMA2, PROSE), (MARKED, LLAMA2)):
        with pytest.raises(
            UserError, match=r"rows\.jsonl:2: is \w+, where the set is \w+ by its first row, .*:1; name"
        ):
            read(tmp_path, first, other)
        skipped = read(tmp_path, first, other, first, on_bad_row="skip")
        assert [*skipped] == [*read(tmp_path, first, first)]
        assert read(tmp_path, first, other, format="text").summaries[0].num_kept == 2


@pytest.mark.parametrize(
    "first", [{"_meta": {"version": 1}}, {"text": ""}, {"text": None}, {"frage": "a"}, [1], '{"broken', {}]
)
def test_L27_a_bad_first_row_is_named_and_can_be_skipped(tmp_path, first):
    with pytest.raises(UserError, match=r"rows\.jsonl:1: "):
        read(tmp_path, first, MARKED)
    dataset = read(tmp_path, first, MARKED, on_bad_row="skip")
    assert [*dataset] == [*read(tmp_path, MARKED)]
    assert re.search(r"1 dropped \(bad rows\).*\n  bad: \S+rows\.jsonl:1: ", str(dataset.summaries[0]))


def test_L27_a_first_row_without_a_mapped_column_can_be_skipped(tmp_path):
    column_map = {"prompt": "q", "completion": "a"}
    dataset = read(tmp_path, {"x": 1}, {"q": "a", "a": "b"}, column_map=column_map, on_bad_row="skip")
    assert [row["tokens"] for row in dataset] == [tokens_of("a", "b")]


@pytest.mark.parametrize(
    ("mark", "text"),
    [
        ("<|im_start|>", "<|im_start|>user\na<|im_end|>"),
        ("<|start_header_id|>", "<|start_header_id|>user<|end_header_id|>\n\na"),
        ("<|user|>", "<|user|>\na</s>\n<|assistant|>\nb"),
        ("USER: ... ASSISTANT:", "A chat. USER: a ASSISTANT: b"),
        ("Human: ... Assistant:", "\n\nHuman: a\n\nAssistant: b"),
        ("### Question:", "### Question: a\n### Answer: b"),
        ("[INST]", "Be kind. [INST] a [/INST] b"),
    ],
)
def test_L32_dialog_marks_in_prose_are_warned_of_once_with_their_count(tmp_path, mark, text):
    summary = str(read(tmp_path, PROSE, {"text": text}, {"text": text}).summaries[0])
    assert "plain text, every token is trained" in summary
    [warning] = [line for line in summary.splitlines() if "warning" in line]
    assert f"{mark!r} in 2 texts, the first {tmp_path / 'rows.jsonl'}:2: " in warning
    assert "warning" not in str(read(tmp_path, PROSE).summaries[0])


def test_dialog_marks_are_looked_for_in_linear_time(tmp_path):
    for part in ("USER: ", "Human: a\n", "<|", "[INST ", "Question: \n"):
        assert len(read(tmp_path, {"text": "x" + part * 50_000}, max_rows=1)) == 1


# ---- The account of bad rows


def test_L27_all_kinds_of_bad_rows_are_named_at_once(tmp_path):
    good = {"prompt": "a", "completion": "b"}
    rows = [
        *(good, {"prompt": "x"}, {"prompt": "", "completion": "y"}, {"prompt": "y"}, '{"broken', "[1]"),
        *({"prompt": "a [/INST] b", "completion": "y"}, {"prompt": 3, "completion": "y"}, {"prompt": "z"}, good),
    ]
    with pytest.raises(UserError) as raised:
        read(tmp_path, *rows)
    lines = [message.partition("rows.jsonl:")[2] for message in raised.value.messages]
    assert [int(line.partition(":")[0]) for line in lines] == [2, 3, 5, 6, 7, 8]
    assert lines[0].endswith("(and 2 more such rows)") and not lines[1].endswith("such rows)")
    dataset = read(tmp_path, *rows, on_bad_row="skip")
    assert len(dataset) == 2 and dataset.summaries[0].num_bad == 8
    told = [line.partition("bad: ")[2] for line in str(dataset.summaries[0]).splitlines() if "bad: " in line]
    assert told == [message.removesuffix("; on_bad_row=skip leaves such rows out") for message in raised.value.messages]
    assert raised.value.messages[-1].endswith("; on_bad_row=skip leaves such rows out")


def test_L06_a_set_without_anything_to_train_on_says_why(tmp_path):
    short = Llama2ChatTransform(TINY_TOKENIZER, max_seq_len=12)
    long = {"prompt": "long " * 40, "completion": "b"}
    for rows, arguments, words in (
        ([{"prompt": "x"}] * 3, {"on_bad_row": "skip"}, "3 dropped (bad rows)"),
        ([{"prompt": "x", "completion": ""}] * 2, {}, "2 dropped (empty answer)"),
        ([{"prompt": "x", "completion": "y", "train": False}], {}, "1 dropped (marked as not trained)"),
        ([long], {"tokenizer": short, "on_overlong": "drop"}, "1 dropped (over max_seq_len)"),
        ([long], {"tokenizer": short}, "1 dropped (nothing to train on)"),
    ):
        with pytest.raises(UserError, match="no row of .* has a token to train on") as raised:
            read(tmp_path, *rows, **arguments)
        assert words in raised.value.messages[0]


def test_L34_the_account_is_the_same_from_the_cache(tmp_path):
    rows = [in_format("messages", "a", "b", "c"), {"id": 1}, {"messages": [], "x": 1}]
    rows.append(in_format("messages", "a", "b") | {"source": "web"})
    arguments = {"on_bad_row": "skip", "cache_dir": tmp_path / "cache"}
    first, second = (read(tmp_path, *rows, **arguments) for _ in range(2))
    assert str(first.summaries[0]) == str(second.summaries[0])
    assert [*first] == [*second]
