"""A conversation: history, commands, a full context, and what is printed where."""

import io
import json
import os
import pty
import subprocess
import sys
import time

import pytest

from custom_components.generation.chat import chat
from custom_components.generation.chat_input import messages_of
from custom_components.generation.conversation import Conversation
from custom_components.generation.decoding import answer_messages
from custom_components.generation.incremental import made_for_inference
from custom_components.generation.sampling import Sampling
from custom_components.runtime.errors import UserError
from custom_components.transforms.chat_transform import prompt_tokens
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from tests.support.models import loaded_model
from tests.support.paths import PROJECT, TINY_LLAMA, TINY_TOKENIZER

GREEDY = Sampling()


@pytest.fixture(scope="module")
def model():
    return made_for_inference(loaded_model(TINY_LLAMA / "checkpoint", lora_attn_modules=[], apply_lora_to_mlp=False))


@pytest.fixture
def tokenizer():
    return Llama2ChatTransform(TINY_TOKENIZER)


def fresh_answer(model, tokenizer, *messages):
    """The answer to a dialog that nothing was read of before."""
    dialog = [{"role": role, "content": text} for role, text in messages]
    return answer_messages(model, tokenizer, [dialog], max_new_tokens=16, sampling=GREEDY)[0]


def said(conversation, question):
    conversation.forget_what_does_not_fit(question)
    return "".join(conversation.answer(question))


def test_every_answer_is_that_of_the_whole_dialog(model, tokenizer):
    conversation = Conversation(model, tokenizer, 16, GREEDY)
    first = said(conversation, "Which letter follows B?")
    assert first == fresh_answer(model, tokenizer, ("user", "Which letter follows B?"))
    history = [("user", "Which letter follows B?"), ("assistant", first)]
    second = said(conversation, "And F?")
    assert second == fresh_answer(model, tokenizer, *history, ("user", "And F?"))
    conversation.system_prompt = "Be brief."
    history += [("user", "And F?"), ("assistant", second)]
    third = said(conversation, "And A?")
    assert third == fresh_answer(model, tokenizer, ("system", "Be brief."), *history, ("user", "And A?"))
    assert [question for question, _ in conversation.exchanges] == ["Which letter follows B?", "And F?", "And A?"]


def test_the_oldest_exchanges_are_forgotten_when_the_context_is_full(model, tokenizer):
    conversation = Conversation(model, tokenizer, 16, GREEDY)
    num_forgotten = 0
    question = "Which letter follows B? " * 12
    for _ in range(12):
        num_forgotten += conversation.forget_what_does_not_fit(question)
        before = list(conversation.exchanges)
        answer = "".join(conversation.answer(question))
    assert num_forgotten > 0 and len(conversation.exchanges) == 12 - num_forgotten
    history = [message for asked, answered in before for message in (("user", asked), ("assistant", answered))]
    assert answer == fresh_answer(model, tokenizer, *history, ("user", question))


@pytest.mark.parametrize("num_words", range(1, 40, 3))
def test_what_is_kept_leaves_room_for_an_answer_and_no_more_is_forgotten(model, tokenizer, num_words):
    conversation, room = Conversation(model, tokenizer, 100, GREEDY), 100
    conversation.exchanges = [("word " * 20, "word " * 10)] * 30
    question = "word " * num_words

    def num_tokens(exchanges):
        messages = [message for asked, answered in exchanges for message in (("user", asked), ("assistant", answered))]
        dialog = [{"role": role, "content": text} for role, text in [*messages, ("user", question)]]
        return len(prompt_tokens(tokenizer, dialog, 10**6))

    assert conversation.forget_what_does_not_fit(question) == 30 - len(conversation.exchanges)
    assert num_tokens(conversation.exchanges) + room <= model.max_seq_len
    one_more = [*conversation.exchanges, conversation.exchanges[0]]
    assert num_tokens(one_more) + room > model.max_seq_len


def test_a_question_beyond_the_context_forgets_nothing(model, tokenizer):
    conversation = Conversation(model, tokenizer, 16, GREEDY)
    said(conversation, "Who?")
    with pytest.raises(UserError, match="leave no room for an answer in a context"):
        conversation.forget_what_does_not_fit("letter " * model.max_seq_len)
    assert len(conversation.exchanges) == 1


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(model, tokenizer):
    conversation = Conversation(model, tokenizer, 16, GREEDY)
    pieces = conversation.answer("Which letter follows B?")
    shown = next(piece for piece in pieces if piece)
    pieces.close()
    assert conversation.exchanges == [("Which letter follows B?", shown)]
    history = [("user", "Which letter follows B?"), ("assistant", shown)]
    assert said(conversation, "And F?") == fresh_answer(model, tokenizer, *history, ("user", "And F?"))


def run_chat(model, tokenizer, lines, capsys):
    conversation = Conversation(model, tokenizer, 16, GREEDY)
    chat(conversation, io.StringIO(lines), is_interactive=False)
    return conversation, *capsys.readouterr()


def test_a_pipe_gets_answers_and_nothing_else(model, tokenizer, capsys):
    lines = "Which letter follows B?\n\n/nonsense\nAnd F?\n/reset\nWhich letter follows B?\n/exit\nnever asked\n"
    conversation, out, err = run_chat(model, tokenizer, lines, capsys)
    first = fresh_answer(model, tokenizer, ("user", "Which letter follows B?"))
    history = [("user", "Which letter follows B?"), ("assistant", first)]
    second = fresh_answer(model, tokenizer, *history, ("user", "And F?"))
    assert out == f"{first}\n{second}\n{first}\n"
    assert "there is no command '/nonsense'" in err and "/reset" in err
    assert len(conversation.exchanges) == 1


def test_commands(model, tokenizer, capsys):
    conversation, out, _ = run_chat(model, tokenizer, "/system Be brief.\nWho?\n//system is text\n/help", capsys)
    assert conversation.system_prompt == "Be brief."
    assert [question for question, _ in conversation.exchanges] == ["Who?", "/system is text"]
    assert out.startswith(fresh_answer(model, tokenizer, ("system", "Be brief."), ("user", "Who?")) + "\n")
    conversation, _, _ = run_chat(model, tokenizer, "/system Be brief.\n/system\n", capsys)
    assert conversation.system_prompt is None


def test_a_question_that_cannot_be_asked_is_an_error_line(model, tokenizer, capsys):
    conversation, out, err = run_chat(model, tokenizer, "What is [INST]?\nWho?", capsys)
    assert "error: user message contains '[INST]'" in err
    assert out == fresh_answer(model, tokenizer, ("user", "Who?")) + "\n"
    assert len(conversation.exchanges) == 1


def test_an_answer_with_a_mark_of_the_template_does_not_end_the_conversation(model, tokenizer, capsys, monkeypatch):
    pieces = [["Say ", "[/INST]."], ["so"]]
    monkeypatch.setattr("custom_components.generation.conversation.streamed_answer", lambda *_: iter(pieces.pop(0)))
    conversation, out, err = run_chat(model, tokenizer, "What ends a question?\nAnd F?\n", capsys)
    assert out == "Say [/INST].\nso\n" and "error" not in err
    assert conversation.exchanges == [("And F?", "so")]
    assert "this exchange is forgotten" in err


def test_retry_answers_the_last_question_again_with_another_seed(model, tokenizer, capsys):
    conversation = Conversation(model, tokenizer, 16, Sampling(temperature=3.0))
    chat(conversation, io.StringIO("/retry\nWho?\nAnd F?\n/retry\n/retry\n"), is_interactive=False)
    out, err = capsys.readouterr()
    assert "there is no question to answer again" in err
    assert [question for question, _ in conversation.exchanges] == ["Who?", "And F?"]
    first, *answers = out.rstrip("\n").split("\n")
    assert len({*answers}) == 3  # all different, and drawn as a new question with that seed would be
    again = Conversation(model, tokenizer, 16, Sampling(temperature=3.0, seed=2))
    again.exchanges = [("Who?", conversation.exchanges[0][1])]
    assert said(again, "And F?") == conversation.exchanges[1][1] == answers[-1]


def test_retry_without_drawing_says_that_it_changes_nothing(model, tokenizer, capsys):
    _, out, err = run_chat(model, tokenizer, "Who?\n/retry\n", capsys)
    [first, second] = out.splitlines()
    assert first == second and "at temperature 0" in err


def test_retry_after_an_answer_that_was_not_kept_takes_nothing_else_back(model, tokenizer, capsys, monkeypatch):
    pieces = [["first"], ["Say ", "[/INST]."], ["so"]]
    monkeypatch.setattr("custom_components.generation.conversation.streamed_answer", lambda *_: iter(pieces.pop(0)))
    conversation, _, _ = run_chat(model, tokenizer, "And F?\nAnd F?\n/retry\n", capsys)
    assert conversation.exchanges == [("And F?", "first"), ("And F?", "so")]


def test_reset_leaves_nothing_to_retry_or_save(model, tokenizer, capsys, tmp_path):
    lines = f"Who?\n/reset\n/retry\n/save {tmp_path / 'chat.jsonl'}\n"
    _, out, err = run_chat(model, tokenizer, lines, capsys)
    assert len(out.splitlines()) == 1
    assert "no question" in err and "nothing to save" in err and not (tmp_path / "chat.jsonl").exists()


def test_save_writes_a_row_that_can_be_trained_on_and_overwrites_nothing(model, tokenizer, capsys, tmp_path):
    file = tmp_path / "my chat.jsonl"
    lines = f"/system Be brief: é.\nWho?\n/save {file}\nAnd F?\n/save {file}\n/save\n/save {tmp_path}/no/where\n"
    _, out, err = run_chat(model, tokenizer, lines, capsys)
    [row] = file.read_text(encoding="utf-8").splitlines()
    assert json.loads(row)["messages"] == [
        {"role": "system", "content": "Be brief: é."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": out.splitlines()[0]},
    ]
    assert f"saved {file}" in err and f"error: '{file}' is there already" in err
    assert "error: /save needs a file name" in err and "No such file or directory" in err


def test_what_no_longer_fits_is_saved_too(model, tokenizer):
    conversation = Conversation(model, tokenizer.with_system_prompt("Be kind."), 16, GREEDY)
    for _ in range(12):
        said(conversation, "Which letter follows B? " * 12)
    assert conversation.forgotten and len(conversation.forgotten) + len(conversation.exchanges) == 12
    roles = [message["role"] for message in conversation.messages()]
    assert roles == ["system"] + ["user", "assistant"] * 12


@pytest.mark.parametrize(
    ("lines", "messages"),
    [
        ('"""\nfirst\n\n  second\n"""\nWho?\n', ["first\n\n  second", "Who?"]),
        ('"""first\nsecond"""\n', ["first\nsecond"]),
        ('"""one line"""\n', ["one line"]),
        ('"""\n/exit\n"""\n', ["/exit"]),
        ('""""""\nWho?\n', ["Who?"]),
        ('"""\nnever closed\n', ["never closed"]),
    ],
)
def test_a_message_of_several_lines_is_between_marks(lines, messages):
    assert list(messages_of(io.StringIO(lines), is_interactive=False)) == messages


def test_bytes_that_are_not_text_do_not_end_a_chat():
    lines = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    assert list(messages_of(lines, is_interactive=False)) == ["caf\ufffd"]


TERMINAL = """\
import sys
from custom_components.generation.chat_input import messages_of
for message in messages_of(sys.stdin, is_interactive=True):
    print(repr(message), flush=True)
"""


class Terminal:
    """A terminal with a chat's input in it; what it shows is kept."""

    def __init__(self, stdout=None):
        self._end, end = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(PROJECT), "TERM": "xterm"}
        streams = {"stdin": end, "stdout": stdout or end, "stderr": end}
        self.process = subprocess.Popen([sys.executable, "-c", TERMINAL], env=environment, **streams)
        self.shown = ""

    def wait_for(self, text):
        until = time.monotonic() + 30
        while text not in self.shown and time.monotonic() < until:
            self.shown += os.read(self._end, 4096).decode()
        shown, found, self.shown = self.shown.partition(text)
        assert found, shown
        return shown + found

    def type(self, text):
        os.write(self._end, text.encode())

    def end(self):
        self.type("\x04")
        assert self.process.wait(30) == 0


def test_a_terminal_edits_its_line_recalls_earlier_ones_and_takes_a_paste_as_one_message():
    pytest.importorskip("readline")
    terminal = Terminal()
    terminal.wait_for("> ")
    terminal.type("Whu?\x1b[D\x7fo\r")  # cursor left, backspace
    terminal.wait_for("'Who?'")
    terminal.type("\x1b[A, and F?\r")  # cursor up
    terminal.wait_for("'Who?, and F?'")
    terminal.type("\x1b[200~first\n\tsecond\x1b[201~ third\r")
    terminal.wait_for(r"'first\n\tsecond third'")
    terminal.type('"""\r')
    terminal.wait_for("... ")
    terminal.type('a\rb"""\r')
    terminal.wait_for(r"'a\nb'")
    terminal.wait_for("> ")  # before the prompt, the end of input would be the terminal's, and lost
    terminal.end()


def test_prompts_stay_out_of_a_file_of_answers(tmp_path):
    with (tmp_path / "answers.txt").open("wb") as answers:
        terminal = Terminal(stdout=answers)
        terminal.wait_for("> ")
        terminal.type("Who?\r")
        terminal.wait_for("> ")
        terminal.end()
    assert (tmp_path / "answers.txt").read_text() == "'Who?'\n"
