"""Files of prompts, and the recipe as a user runs it."""

import json
import os
import signal
import sys

import pytest

from custom_components.datasets.prompt_files import ANSWER, check_output_file, read_prompts, row_dialog, write_answers
from custom_components.datasets.row_formats import recognised_format
from custom_components.runtime.errors import UserError
from custom_components.transforms.prompt_format import PromptFormat
from custom_components.weights.adapters import save_adapter
from recipes.generate import recipe_main
from tests.support.forked_tune import ForkedTune
from tests.support.models import loaded_model, with_random_adapters
from tests.support.paths import PROJECT, TINY_LLAMA

USER = {"role": "user", "content": "Who?"}
ANSWERED = {"role": "assistant", "content": "Nobody."}
GENERATE = ["--config", "configs/generate.yaml", f"checkpoint_dir={TINY_LLAMA / 'checkpoint'}", "device=cpu"]


def asked(row):
    """The dialog up to the question to answer, as dicts."""
    return [{"role": message.role, "content": message.content} for message in row_dialog(row)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Who?"},
        {"prompt": "Who?", "completion": "Nobody."},
        {"messages": [USER]},
        {"messages": [USER, ANSWERED]},
        {"instruction": "Who?", "output": "Nobody."},
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Nobody."}]},
        {"text": "<s>[INST] Who? [/INST] Nobody. </s>"},
    ],
)
def test_rows_of_all_formats_ask_their_question(row):
    assert asked(row) == [USER]


def test_history_and_system_prompt_are_kept():
    assert asked({"messages": [USER, ANSWERED, USER]}) == [USER, ANSWERED, USER]
    assert asked({"prompt": "Who?", "system": "Be kind."}) == [{"role": "system", "content": "Be kind."}, USER]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWERED], "system": "Be kind."},
        {"messages": [{"role": "system", "content": " "}, USER, ANSWERED]},
        {"messages": [USER, ANSWERED, USER, ANSWERED | {"weight": 1}]},
        {"prompt": "Who?", "completion": "Nobody.", "system": None},
    ],
)
@pytest.mark.parametrize("is_answered", [True, False])
def test_a_row_is_asked_as_it_would_be_trained(row, is_answered):
    trained = recognised_format(row, row).convert(row)[:-1]
    if not is_answered:
        row = {key: value for key, value in row.items() if key != "completion"}
        if "messages" in row:
            row["messages"] = row["messages"][:-1]
    assert row_dialog(row) == trained


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": " "}, "'prompt' is empty"),
        ({"prompt": 3}, "holds 3 where text is due"),
        ({"messages": []}, "there are no messages"),
        ({"messages": "Who?"}, "where a list is due"),
        ({"messages": [ANSWERED]}, "message 1 is of role 'assistant' where 'user' is due"),
        ({"prompt": "cut emoji \ud83d"}, "half a surrogate pair"),
        ({"messages": [USER, USER]}, "message 2 is of role 'user' where 'assistant' is due"),
        ({"question": "Who?"}, "has no question in 'question'; name it 'prompt'"),
        ({"text": "Once upon a time."}, "plain text without a question"),
        ({"prompt": "Who?", "answer": "Nobody."}, "has 'answer' already"),
        ({"prompt": "[INST]"}, "contains '[INST]'"),
        ({"prompt": "word " * 600}, "leave no room for an answer in a context of 256"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, tiny_tokenizer, row, words):
    path = write_rows(tmp_path / "in.jsonl", [{"prompt": "Who?"}, row])
    with pytest.raises(UserError) as error:
        read_prompts(path, tiny_tokenizer, 256, [ANSWER])
    assert f"{path}:2: " in str(error.value) and words in str(error.value)


def test_files_that_are_not_there_or_there_already(tmp_path, tiny_tokenizer):
    with pytest.raises(UserError, match="prompts_file: there is no file"):
        read_prompts(tmp_path / "none.jsonl", tiny_tokenizer, 256, [ANSWER])
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "Who?"}\n{"prompt"\n')
    with pytest.raises(UserError, match="in.jsonl:2"):
        read_prompts(path, tiny_tokenizer, 256, [ANSWER])
    path.write_text('{"prompt"\n{"prompt": " "}\n[]\n{"prompt": "Who?"}\n')
    with pytest.raises(UserError) as error:
        read_prompts(path, tiny_tokenizer, 256, [ANSWER])
    assert [message.partition(": ")[0] for message in error.value.messages] == [f"{path}:{line}" for line in (1, 2, 3)]
    for name, text in (("in.txt", "Who?"), ("empty.jsonl", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=r"^prompts_file: "):
            read_prompts(tmp_path / name, tiny_tokenizer, 256, [ANSWER])
    with pytest.raises(UserError, match="output_file: .* exists already"):
        check_output_file(path)
    with pytest.raises(UserError, match="output_file: there is no directory"):
        check_output_file(tmp_path / "none/out.jsonl")
    with pytest.raises(UserError, match="output_file: .* cannot be written"):
        check_output_file(tmp_path / ("long" * 100))
    check_output_file(tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def num_padded(batches):
    return sum(max(batch) * len(batch) - sum(batch) for batch in batches)


def test_rows_are_answered_by_length_and_written_in_order(tmp_path, tiny_tokenizer):
    rows = [{"prompt": "word " * (number * 7 % 30 + 1), "id": number} for number in range(50)]
    prompts = read_prompts(write_rows(tmp_path / "in.jsonl", rows), tiny_tokenizer, 256, [ANSWER])
    batches = []

    def answer_batch(tokens):
        batches.append([len(prompt) for prompt in tokens])
        return {ANSWER: [str(len(prompt)) for prompt in tokens]}

    out = tmp_path / "out.jsonl"
    for _ in write_answers(prompts, out, 4, answer_batch):
        written = out.read_text()
        assert written == "" or written.endswith("}\n")
    answered = [json.loads(line) for line in out.read_text().splitlines()]
    assert answered == [row | {ANSWER: str(len(prompt.tokens))} for row, prompt in zip(rows, prompts, strict=True)]
    assert max(map(len, batches)) == 4
    lengths = [len(prompt.tokens) for prompt in prompts]
    unsorted_batches = [lengths[start : start + 4] for start in range(0, 50, 4)]
    assert num_padded(batches) < num_padded(unsorted_batches) / 3


def test_columns_that_are_no_text_are_written_as_they_were(tmp_path, tiny_tokenizer):
    rows = [{"prompt": "Who?", "note": "cut emoji \ud83d, and a whole one \N{GRINNING FACE}"}]
    prompts = read_prompts(write_rows(tmp_path / "in.jsonl", rows), tiny_tokenizer, 256, [ANSWER])
    list(write_answers(prompts, tmp_path / "out.jsonl", 4, lambda tokens: {ANSWER: ["Nobody."]}))
    assert json.loads((tmp_path / "out.jsonl").read_text()) == rows[0] | {ANSWER: "Nobody."}


def run_recipe_here(monkeypatch, *arguments):
    """The recipe without the seconds that a process of its own takes."""
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(sys, "argv", ["generate.py", *GENERATE, *arguments])
    recipe_main()


def test_recipe_with_a_file(tmp_path, monkeypatch, capsys):
    """Each row with its fields and its answer, which is that of the row asked alone."""
    questions = ["Who are you?", "Which letter follows F?", "Where?", "What colour is the stone of the hill?"]
    rows = [{"prompt": question, "id": number} for number, question in enumerate(questions)]
    rows.append({"messages": [{"role": "user", "content": questions[0]}]})
    source, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    run_recipe_here(monkeypatch, f"prompts_file={source}", f"output_file={out}", "batch_size=3", "max_new_tokens=12")
    answered = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{key: row[key] for key in row if key != "answer"} for row in answered] == rows
    assert answered[0]["answer"] == answered[4]["answer"]
    assert len({row["answer"] for row in answered}) > 1
    capsys.readouterr()
    run_recipe_here(monkeypatch, "prompt=Which letter follows F?", "max_new_tokens=12")
    assert capsys.readouterr().out == answered[1]["answer"] + "\n"


def test_comparing_needs_both_answers(tmp_path, monkeypatch, capsys):
    """The base's answers are those of the base alone, in a file and on the terminal."""
    model = with_random_adapters(loaded_model(TINY_LLAMA / "checkpoint"))
    prompt_format = PromptFormat(prompt_template="llama2", system_prompt=None, stop_tokens=["</s>"])
    save_adapter(model, tmp_path / "adapter", "tiny", prompt_format.texts())
    source, out = write_rows(tmp_path / "in.jsonl", [{"prompt": "Who?"}]), tmp_path / "out.jsonl"
    short = ["max_new_tokens=8", "dtype=fp32"]
    adapter = f"adapter_dir={tmp_path / 'adapter'}"
    run_recipe_here(monkeypatch, *short, adapter, "compare=true", f"prompts_file={source}", f"output_file={out}")
    [row] = [json.loads(line) for line in out.read_text().splitlines()]
    capsys.readouterr()
    run_recipe_here(monkeypatch, *short, adapter, "compare=true", "prompt=Who?")
    assert capsys.readouterr().out == f"base   {row['answer_base']}\ntuned  {row['answer']}\n"
    run_recipe_here(monkeypatch, *short, "prompt=Who?")
    assert capsys.readouterr().out == f"{row['answer_base']}\n"
    run_recipe_here(monkeypatch, *short, adapter, "fold_adapter=true", "prompt=Who?")
    assert capsys.readouterr().out == f"{row['answer']}\n"
    assert row["answer"] != row["answer_base"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prompt="], 'prompt: is empty; give prompt="..."'),
        (["prompt=Who?", "chat=true"], "prompt and chat are given; give one of them"),
        (["prompts_file=x.jsonl"], "output_file: missing beside prompts_file"),
        (["chat=true", "compare=true", "adapter_dir=x"], "compare: true beside chat"),
        (["chat=true", "fold_adapter=true", "adapter_dir=x", "quantize_base=true"], "fold_adapter: true beside quant"),
        (["prompt=Who?", "temperature=1e-38"], "temperature: 1e-38"),
        (["prompt=Who?", "temperature=.inf"], "temperature: "),
        (["prompt=Who?", "repetition_penalty=.inf"], "repetition_penalty: "),
        (["prompt=Who?", "repetition_penalty=1e-38"], "repetition_penalty: "),
        (["prompt=Who?", "repetition_penalty=.nan"], "repetition_penalty: "),
        (["prompt=Who?", "seed=99999999999999999999"], "seed: "),
        (["prompt=[INST] Who?"], "prompt: user message contains '[INST]'"),
        (["prompt=" + "word " * 600], "prompt: 1207 tokens leave no room for an answer"),
        (["prompts_file=none.jsonl", "output_file=x.jsonl"], "prompts_file: there is no file 'none.jsonl'"),
    ],
)
def test_bad_input_is_said_before_anything_is_loaded(monkeypatch, arguments, words):
    monkeypatch.setattr("recipes.generate.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError) as error:
        run_recipe_here(monkeypatch, *arguments)
    assert words in str(error.value)


def test_chat_in_a_pipe_answers_line_by_line_and_leaves_with_130():
    its_stdin, stdin = os.pipe()
    stdout, its_stdout = os.pipe()
    command = ["run", "recipes/generate.py", *GENERATE, "chat=true", "max_new_tokens=12"]
    process = ForkedTune(*command, stdin=its_stdin, stdout=its_stdout)
    os.close(its_stdin)
    os.close(its_stdout)
    with os.fdopen(stdin, "w") as questions, os.fdopen(stdout) as answers:
        print("Which letter follows B?", file=questions, flush=True)
        assert answers.readline().strip(), "the answer does not come before the input ends"
        process.send_signal(signal.SIGINT)
        result = process.result(timeout_seconds=60)
    assert result.returncode == 130, result.stderr
    assert "Traceback" not in result.stderr
