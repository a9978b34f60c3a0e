"""Rows as messages: every published spelling, and a ValueError for every other."""

import contextlib
import json
import string

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_components.datasets.chat import chat_dataset
from custom_components.datasets.row_formats import FORMATS, format_by_name, recognised_format, renamed
from custom_components.datasets.sources import read_rows
from custom_components.runtime.errors import UserError
from custom_components.transforms.dialogs import ChatMessage
from custom_components.transforms.templates import TEMPLATES, dialog_turns
from custom_components.transforms.turns import text_of


def converted(row: dict) -> list[tuple[str, str]]:
    messages = recognised_format(row.keys(), row).convert(row)
    return [(message.role, message.content) for message in messages]


QA = [("user", "Who?"), ("assistant", "Me.")]
HUMAN_GPT = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": r, "content": c} for r, c in QA]}, QA),
        ({"messages": [{"role": r, "content": c} for r, c in [("system", ""), *QA]]}, QA),
        ({"conversations": HUMAN_GPT, "id": "a"}, QA),
        ({"conversations": [{"from": "system", "value": "Be."}, *HUMAN_GPT], "system": "x"}, [("system", "Be."), *QA]),
        ({"conversations": [{"from": r, "value": c} for r, c in QA]}, QA),
        ({"conversations": [{"role": r, "content": c} for r, c in QA]}, QA),
        ({"instruction": "Who?", "output": "Me."}, QA),
        ({"instruction": "Who?", "input": "", "output": "Me.", "text": "Below ..."}, QA),
        ({"instruction": "Who?", "input": "x", "output": "Me."}, [("user", "Who?\n\nx"), ("assistant", "Me.")]),
        ({"instruction": "Who?", "input": None, "output": "Me.", "history": [["Who?", "Me."]]}, QA * 2),
        ({"instruction": "Who?", "output": "Me.", "history": None, "system": None}, QA),
        ({"prompt": "Who?", "completion": "Me."}, QA),
        ({"prompt": "Who?", "completion": "Me.", "system": "Be."}, [("system", "Be."), *QA]),
        ({"prompt": "Who?", "completion": "Me.", "system": " "}, QA),
        ({"text": "<s>[INST] Who? [/INST] Me. </s><s>[INST] Who? [/INST] Me."}, QA * 2),
        (
            {"text": "[INST] <<SYS>>\nBe.\n<</SYS>>\n\nWho? [/INST] Me. [INST] Who? [/INST] Me."},
            [("system", "Be.")] + QA * 2,
        ),
        ({"text": "<s>[INST]  [/INST] Me. </s>\n"}, [("user", ""), ("assistant", "Me.")]),
        ({"text": "### HUMAN:\nWho?\n\n### RESPONSE:\nMe."}, QA),
        (
            {"text": "Be.\n### Human: Who?\n### Assistant: Me.\n### Human: Who?\n### Assistant: Me."},
            [("system", "Be.")] + QA * 2,
        ),
        ({"text": "### Human: Who?### Assistant: Me.### Human: Now explain it to a dog"}, QA),
        (
            {"text": "### Instruction:\nWho?\n\n### Input:\nx\n\n### Response:\nMe."},
            [("user", "Who?\n\nx"), ("assistant", "Me.")],
        ),
        ({"text": "### System:\nBe.\n\n### User:\nWho?\n\n### Assistant:\nMe."}, [("system", "Be."), *QA]),
        (
            {"text": "### Human: Who?\n### Input: a\n### Assistant: Me."},
            [("user", "Who?\n### Input: a"), ("assistant", "Me.")],
        ),
        ({"text": "Once upon a time", "system": "x"}, [("text", "Once upon a time")]),
        ({"text": "A heading\n### Instruction: none follows"}, [("text", "A heading\n### Instruction: none follows")]),
    ],
)
def test_a_published_spelling_is_recognised_and_read(row, expected):
    assert converted(row) == expected


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": "hi"}, "'messages' holds 'hi' where a list is due"),
        ({"messages": ["hi"]}, "message 1 is 'hi' where an object"),
        ({"messages": []}, "there are no messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "message 1 is of role 'tool'"),
        ({"messages": [{"role": "user", "content": "x"}] * 2}, "message 2 is of role 'user' where 'assistant' is due"),
        ({"messages": [{"role": "user", "content": "Unanswered?"}]}, "no answer to learn: 'Unanswered\\?'"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 holds None where text is due"),
        ({"conversations": HUMAN_GPT[1:]}, "message 1 is of role 'assistant' where 'user' is due"),
        (
            {"conversations": [{"from": "observation", "value": "x"}]},
            "message 1 is of role 'observation'; calls of tools",
        ),
        (
            {"conversations": [{"from": "human"}]},
            "message 1 has the keys 'from', it needs 'role' and 'content', or 'from' and 'value'",
        ),
        ({"instruction": "", "output": "x"}, "'instruction' is empty"),
        ({"instruction": "x", "output": {"a": 1}}, "'output' holds \{'a': 1\} where text is due"),
        (
            {"instruction": "x", "output": "y", "history": [["a"]]},
            "'history' holds \\['a'\\] where \\[question, answer\\]",
        ),
        ({"instruction": "x", "output": "y", "history": 7}, "'history' holds 7 where a list"),
        ({"prompt": "x", "completion": "y", "system": {"a": 1}}, "'system' holds {'a': 1} where text is due"),
        (
            {"prompt": "x", "completion": "cut emoji \ud83d"},
            r"assistant message has half a surrogate pair, in 'cut emoji \\ud83d'",
        ),
        ({"text": "<s>[INST] a [/INST] b </s> and " + "more" * 99}, "leaves the form .* at ' and more"),
        (
            {"text": "### Human: a\n### Human: b\n### Assistant: c"},
            "message 2 is of role 'user' where 'assistant' is due",
        ),
        ({"text": None}, "'text' holds None where text is due"),
        ({"text": " "}, "'text' is empty"),
    ],
)
def test_a_bad_row_is_a_value_error_that_shows_it(row, problem):
    with pytest.raises(ValueError, match=problem) as raised:
        converted(row)
    assert len(str(raised.value)) < 200


def test_a_row_without_a_column_of_the_first_rows_format_names_both():
    with pytest.raises(ValueError, match="there is no column 'completion', but 'answer', 'prompt'"):
        FORMATS["prompt_completion"].convert({"prompt": "x", "answer": "y"})


def test_a_text_row_that_does_not_follow_the_first_rows_format_is_an_error_and_not_plain_text():
    for name in ("llama2_text", "marked_text"):
        with pytest.raises(ValueError, match="Once upon"):
            FORMATS[name].convert({"text": "Once upon a time"})


def test_weights_of_answers_are_kept():
    messages = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}] + HUMAN_GPT
    assert [m.is_supervised for m in FORMATS["sharegpt"].convert({"conversations": messages})] == [
        None,
        False,
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("row", "column_map"),
    [
        ({"question": "a", "answer": "b"}, "{prompt: question, completion: answer}"),
        ({"id": 1, "Answer": "b", "Question": "a"}, "{prompt: Question, completion: Answer}"),
        (
            {"context": "c", "question": "a", "answer": "b"},
            "{instruction: question, input: context, output: answer}",
        ),
        ({"instruction": "a", "response": "b"}, "{prompt: instruction, completion: response}"),
        ({"frage": "a", "antwort": "b"}, "{prompt: frage, completion: antwort}"),
        ({"dialog": [QA]}, "{messages: dialog}"),
        ({"content": "Once."}, "{text: content}"),
        ({"id": "7", "title": "t", "reply": "b", "question": "a"}, "{prompt: question, completion: reply}"),
        ({"my: question": "a", "2": "b"}, '{prompt: "my: question", completion: "2"}'),
    ],
)
def test_columns_of_no_format_get_the_column_map_that_names_them(row, column_map):
    with pytest.raises(ValueError) as raised:
        recognised_format(row.keys(), row)
    assert str(raised.value).endswith(f"name them: 'dataset.column_map={column_map}'")
    assert len(str(raised.value)) < 200
    ours = yaml.safe_load(column_map)
    assert recognised_format(ours.keys(), renamed(row, ours), ours).columns[0] in ours


def test_a_format_by_name():
    assert format_by_name("text", ["text"], FORMATS) is FORMATS["text"]
    with pytest.raises(ValueError, match="'share_gpt' is none of messages, .*; nearest is 'sharegpt'"):
        format_by_name("share_gpt", ["conversations"], FORMATS)
    with pytest.raises(ValueError, match="'alpaca' needs the column 'output', the rows have 'answer', 'instruction'"):
        format_by_name("alpaca", ["instruction", "answer"], FORMATS)


def test_renamed_columns():
    row = {"question": "Who?", "answer": "Me.", "prompt": "shadowed", "id": 7}
    column_map = {"prompt": "question", "completion": "answer"}
    assert renamed(row, column_map) == {"prompt": "Who?", "completion": "Me.", "id": 7}
    assert renamed({"prompt": "a", "completion": "b"}, {"prompt": "completion", "completion": "prompt"}) == {
        "prompt": "b",
        "completion": "a",
    }
    with pytest.raises(ValueError, match="column_map.prompt: there is no column 'question', but 'answer', 'id'"):
        renamed({"answer": "Me.", "id": 7}, column_map)


def test_mapped_columns_decide_between_formats():
    row = {"messages": [], "prompt": "a", "completion": "b"}
    assert recognised_format(row.keys(), row).name == "messages"
    assert recognised_format(row.keys(), row, ["prompt", "completion"]).name == "prompt_completion"
    with pytest.raises(ValueError, match="column_map gives 'promt'"):
        recognised_format(row.keys(), row, ["promt"])


prose = (
    st.text(string.ascii_letters + " \n#:", min_size=1).map(str.strip).filter(lambda text: text and "###" not in text)
)


@settings(deadline=None)
@given(
    st.lists(st.tuples(prose, prose), min_size=1, max_size=4), st.sampled_from(["llama2", "alpaca", "human_response"])
)
def test_what_a_template_writes_is_parsed_back(exchanges, template):
    messages = [ChatMessage("system", "Be.")]
    for question, answer in exchanges:
        messages += [ChatMessage("user", question), ChatMessage("assistant", answer)]
    turns = dialog_turns(messages, TEMPLATES[template])
    if template == "llama2":
        text = text_of(turns, "<s>", "</s>")
    else:
        text = "\n".join(text_of([turn], "", "") for turn in turns)
    assert converted({"text": text}) == [(message.role, message.content) for message in messages]


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["user", "gpt", "system", "[INST]"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "weight", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)
COLUMNS = sorted({column for f in FORMATS.values() for column in (*f.columns, *f.optional_columns)})
marked_prose = st.lists(
    st.sampled_from(["<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "\n", " ", "a"])
    | st.sampled_from(
        [f"### {mark}:" for mark in ("Human", "Assistant", "HUMAN", "RESPONSE", "Input", "System", "Response")]
    )
).map("".join)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*COLUMNS, "other"]), anything | marked_prose))
def test_nothing_but_a_value_error_comes_of_any_row(row):
    for row_format in FORMATS.values():
        try:
            messages = row_format.convert(row)
        except ValueError:
            continue
        assert all(isinstance(message.content, str) for message in messages)
    with contextlib.suppress(ValueError):
        recognised_format(row.keys(), row)


def test_parsing_does_not_slow_down_on_white_space():
    """A pattern that tries every way to share spaces out would take hours here."""
    for text in ("[INST] a [/INST] b </s>" + " " * 200_000 + "x", "<s>" * 50_000 + " " * 50_000, "### Human:" * 20_000):
        for name in ("llama2_text", "marked_text"):
            with pytest.raises(ValueError):
                FORMATS[name].convert({"text": text})


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("alpaca.json", "alpaca"),
        ("openai_messages.jsonl", "messages"),
        ("sharegpt.json", "sharegpt"),
        ("prompt_completion.jsonl", "prompt_completion"),
    ],
)
def test_real_rows_of_every_format(test_data, file, name):
    rows = [row.values for row in read_rows(str(test_data(f"formats/{file}")))]
    row_format = recognised_format(rows[0].keys(), rows[0])
    assert row_format.name == name
    dialogs = [row_format.convert(row) for row in rows]
    assert len(dialogs) == 100
    originals = json.dumps(rows)
    for dialog in dialogs:
        assert [message.role for message in dialog] == ["user", "assistant"] * (len(dialog) // 2)
        assert all(json.dumps(message.content)[1:-1] in originals for message in dialog[1::2])


def test_real_rows_of_llama2_text(test_data):
    rows = [row.values for row in read_rows(str(test_data("guanaco_llama2_1k/train.parquet")))]
    row_format = recognised_format(rows[0].keys(), rows[0])
    assert row_format.name == "llama2_text"
    dialogs = [row_format.convert(row) for row in rows]
    assert len(dialogs) == 1000
    assert sum(len(dialog) > 2 for dialog in dialogs) == 353
    for row, dialog in zip(rows, dialogs, strict=True):
        turns = zip(dialog[::2], dialog[1::2], strict=True)
        rendered = "".join(f"<s>[INST] {question.content} [/INST] {answer.content} </s>" for question, answer in turns)
        assert "".join(rendered.split()) == "".join(row["text"].split())


@pytest.mark.parametrize(
    "row",
    [
        {"Instruction": "Who?", "Input": "", "Output": "Nobody."},
        {"Prompt": "Who?", " COMPLETION ": "Nobody."},
        {"Text": "<s>[INST] Who? [/INST] Nobody. </s>"},
        {"Messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]},
        {"prompt": "Who?", "Completion": "Nobody.", "Id": 3},
    ],
)
def test_L27_capitals_and_spaces_in_a_header_do_not_matter(tmp_path, tiny_tokenizer, row):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    dataset = chat_dataset(tiny_tokenizer, str(tmp_path / "rows.jsonl"))
    assert tiny_tokenizer.decode(dataset[0]["tokens"]) == "[INST] Who? [/INST] Nobody. "
    assert str(dataset.summaries[0]).partition("not used: ")[2] == ("Id" if "Id" in row else "")


def test_columns_of_a_format_as_they_are_come_before_others_in_capitals(tmp_path, tiny_tokenizer):
    row = {"prompt": "Who?", "completion": "Nobody.", "System": "Windows", "Prompt": "What?"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    dataset = chat_dataset(tiny_tokenizer, str(tmp_path / "rows.jsonl"))
    assert tiny_tokenizer.decode(dataset[0]["tokens"]) == "[INST] Who? [/INST] Nobody. "
    assert str(dataset.summaries[0]).endswith("columns not used: System, Prompt")


@pytest.mark.parametrize(
    "header", ["Question,Answer", "Question;Answer", "\ufeffQuestion;Answer;;", "sep=;\nQuestion;Answer"]
)
def test_L27_the_columns_of_a_spreadsheet_are_offered_as_they_are_spelled(tmp_path, tiny_tokenizer, header):
    separator = ";" if ";" in header else ","
    extra = separator * header.count(";;") * 2
    lines = [header, f"Who?{separator}Nobody.{extra}", f'"a{separator}b"{separator}c{extra}', separator + extra]
    (tmp_path / "rows.csv").write_text("\r\n".join(lines) + "\r\n", encoding="utf-8")
    with pytest.raises(UserError) as raised:
        chat_dataset(tiny_tokenizer, str(tmp_path / "rows.csv"))
    first_line = 2 + header.startswith("sep")
    assert f"rows.csv:{first_line}: no format has the columns 'Question', 'Answer'" in str(raised.value)
    assert "'dataset.column_map={prompt: Question, completion: Answer}'" in str(raised.value)
    mapped = chat_dataset(
        tiny_tokenizer, str(tmp_path / "rows.csv"), column_map={"prompt": "Question", "completion": "Answer"}
    )
    assert [tiny_tokenizer.decode(row["tokens"]) for row in mapped] == [
        "[INST] Who? [/INST] Nobody. ",
        f"[INST] a{separator}b [/INST] c ",
    ]
    assert str(mapped.summaries[0]).partition(": ")[2].startswith("2 rows, 2 kept, ")
