"""A conversation: history, commands, a full context, and what is printed where."""

import io

import pytest

from custom_components.generation.chat import Conversation, chat
from custom_components.generation.decoding import answer_messages
from custom_components.generation.incremental import made_for_inference
from custom_components.generation.sampling import Sampling
from custom_components.runtime.errors import UserError
from custom_components.transforms.llama2_chat import Llama2ChatTransform, prompt_tokens
from tests.support.models import loaded_model
from tests.support.paths import TINY_LLAMA, TINY_TOKENIZER

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
    monkeypatch.setattr("custom_components.generation.chat.streamed_answer", lambda *_: iter(pieces.pop(0)))
    conversation, out, err = run_chat(model, tokenizer, "What ends a question?\nAnd F?\n", capsys)
    assert out == "Say [/INST].\nso\n" and "error" not in err
    assert conversation.exchanges == [("And F?", "so")]
    assert "this exchange is forgotten" in err
