"""lm-eval's model interface over our model, against transformers and on small tasks of our own."""

import json
import sys

import pytest
import torch
import yaml

from custom_components.generation.incremental import IncrementalLlama
from custom_components.runtime.errors import UserError
from tests.support.checkpoints import write_checkpoint
from tests.support.models import CPU, loaded_model

Instance = pytest.importorskip("lm_eval.api.instance").Instance
transformers = pytest.importorskip("transformers")
lm_eval_model = pytest.importorskip("custom_components.evaluation.lm_eval")
LoadedTasks, task_measures = lm_eval_model.LoadedTasks, lm_eval_model.task_measures

CONTEXT_TOKENS = 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("lm_eval") / "base", max_position_embeddings=CONTEXT_TOKENS)


@pytest.fixture(scope="module")
def lm(checkpoint, tiny_tokenizer):
    return lm_eval_model.LlamaLM(loaded_model(checkpoint).eval(), tiny_tokenizer, batch_size=3, device=CPU)


@pytest.fixture(scope="module")
def theirs(checkpoint):
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def requests(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=0, metadata=("mine", index, 1))
        for index, pair in enumerate(arguments)
    ]


@torch.no_grad()
def expected(theirs, context_ids, continuation_ids):
    """The log-probability of a continuation, and whether greedy decoding gives it."""
    ids = [*context_ids, *continuation_ids]
    logits = theirs(torch.tensor([ids[:-1]])).logits[0].double()
    log_probabilities = logits.log_softmax(dim=-1)[-len(continuation_ids) :]
    labels = torch.tensor(continuation_ids)
    is_greedy = bool((log_probabilities.argmax(dim=-1) == labels).all())
    return log_probabilities.gather(1, labels[:, None]).sum().item(), is_greedy


def test_loglikelihood_is_that_of_transformers(lm, theirs, tiny_tokenizer):
    pairs = [("Which tree grows there?", " rowan"), ("The river is", " called Tem."), ("A", " b"), ("A space ", "b")]
    scores = lm.loglikelihood(requests("loglikelihood", *pairs, ("", "Who?")), disable_tqdm=True)
    for (context, continuation), (score, is_greedy) in zip(pairs, scores[:-1], strict=True):
        whole = tiny_tokenizer.encode(context + continuation, add_eos=False)
        num_context = len(tiny_tokenizer.encode(context.rstrip(), add_eos=False))
        wanted, wanted_greedy = expected(theirs, whole[:num_context], whole[num_context:])
        assert score == pytest.approx(wanted, rel=1e-5, abs=1e-4)
        assert is_greedy == wanted_greedy
    alone = tiny_tokenizer.encode("Who?", add_bos=False, add_eos=False)
    assert scores[-1][0] == pytest.approx(expected(theirs, [tiny_tokenizer.bos_id], alone)[0], rel=1e-5, abs=1e-4)


def test_a_greedy_answer_is_known_as_one(lm, theirs, tiny_tokenizer):
    prompt = tiny_tokenizer.encode("Which tree", add_eos=False)
    [greedy] = theirs.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False, eos_token_id=None).tolist()
    answer = greedy[len(prompt) :]
    other = [*answer[:2], (answer[2] + 1) % 512]
    scores = lm._loglikelihood_tokens([("", prompt, answer), ("", prompt, other)], disable_tqdm=True)
    assert [is_greedy for _, is_greedy in scores] == [True, False]


def test_a_long_context_is_cut_from_the_left(lm, theirs):
    context, continuation = list(range(100, 160)), [7, 8, 9]
    [(score, _)] = lm._loglikelihood_tokens([("", context, continuation)], disable_tqdm=True)
    num_kept = CONTEXT_TOKENS + 1 - len(continuation)
    assert score == pytest.approx(expected(theirs, context[-num_kept:], continuation)[0], rel=1e-5)
    with pytest.raises(UserError, match="an answer of 41 tokens cannot be scored in a context of 40"):
        lm._loglikelihood_tokens([("", context, [5] * 41)], disable_tqdm=True)


def test_a_text_is_scored_token_by_token_once_behind_one_bos(lm, theirs, tiny_tokenizer):
    texts = ["The river.", "Which tree grows in the square? " * 12]
    scores = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)), True)
    for text, score in zip(texts, scores, strict=True):
        ids = tiny_tokenizer.encode(text, add_eos=False)
        total, done = 0.0, 1
        while done < len(ids):
            # The first windows follow each other; the last is as long as they are and scores what is left.
            end = min(done + CONTEXT_TOKENS, len(ids))
            start = max(0, end - 1 - CONTEXT_TOKENS)
            total += expected(theirs, ids[start:done], ids[done:end])[0]
            done = end
        assert score == pytest.approx(total, rel=1e-5)
    assert len(tiny_tokenizer.encode(texts[1])) > 2 * CONTEXT_TOKENS


def test_answers_are_greedy_and_end_at_their_stop_texts(lm, theirs, tiny_tokenizer, monkeypatch):
    def expected_answer(text, num_new):
        prompt = tiny_tokenizer.encode(text, add_eos=False)[-(CONTEXT_TOKENS - num_new) :]
        output = theirs.generate(torch.tensor([prompt]), max_new_tokens=num_new, do_sample=False, eos_token_id=2)
        return tiny_tokenizer.decode(output[0, len(prompt) :].tolist())

    prompts = ["Which tree?", "The river is called", "Who?", "word " * 100]
    asked = requests("generate_until", *((prompt, {"until": ["\n\n"], "max_gen_toks": 8}) for prompt in prompts))
    answers = lm.generate_until(asked, disable_tqdm=True)
    assert answers == [expected_answer(prompt, 8) for prompt in prompts]
    stop = answers[0][3:5]
    [cut] = lm.generate_until(requests("generate_until", (prompts[0], {"until": [stop], "max_gen_toks": 8})), True)
    assert cut == answers[0].split(stop)[0]
    num_forwards = []
    forward = IncrementalLlama.forward
    monkeypatch.setattr(IncrementalLlama, "forward", lambda *a: num_forwards.append(1) or forward(*a))
    lm.generate_until(requests("generate_until", (prompts[0], {"until": [answers[0][:1]], "max_gen_toks": 8})), True)
    assert len(num_forwards) < 8, "decoded on behind the stop text"
    with pytest.raises(UserError, match="samples its answers"):
        lm.generate_until(requests("generate_until", ("Who?", {"until": [], "do_sample": True, "temperature": 1})))


def test_a_task_without_stop_texts_is_answered_to_the_end(lm):
    settings = [{"until": until, "max_gen_toks": 8} for until in ([], None, [""])]
    answers = lm.generate_until(requests("generate_until", *(("Who?", chosen) for chosen in settings)), True)
    assert answers[0] and answers == answers[:1] * 3


CHAT = [
    *({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}),
    *({"role": "assistant", "content": "Tem </s>."}, {"role": "user", "content": "Which tree?"}),
]


def test_a_question_in_the_prompt_format_has_the_tokens_of_training(lm, theirs, tiny_tokenizer):
    """lm-eval passes it as text; what spells a control token in a message stays text."""
    prompt = tiny_tokenizer({"messages": CHAT}, inference=True)["tokens"]
    text = lm.apply_chat_template(CHAT)
    assert text.startswith("<s> [INST] <<SYS>>") and text.endswith("[/INST]")
    assert lm.tok_encode(text) == prompt
    trained = tiny_tokenizer({"messages": [*CHAT, {"role": "assistant", "content": "rowan"}]})["tokens"]
    for continuation in ("rowan", " rowan"):
        [(score, _)] = lm.loglikelihood(requests("loglikelihood", (text, continuation)), disable_tqdm=True)
        answer = trained[len(prompt) : -2]  # without the last space and EOS
        assert score == pytest.approx(expected(theirs, prompt[-(41 - len(answer)) :], answer)[0], rel=1e-5)
    [answer] = lm.generate_until(requests("generate_until", (text, {"until": None, "max_gen_toks": 5})), True)
    cut = torch.tensor([prompt[-(CONTEXT_TOKENS - 5) :]])
    output = theirs.generate(cut, max_new_tokens=5, do_sample=False, eos_token_id=2)
    assert answer == tiny_tokenizer.decode(output[0, cut.shape[1] :].tolist())
    with pytest.raises(UserError, match=r"apply_chat_template: .* contains '\[INST\]'"):
        lm.apply_chat_template([{"role": "user", "content": "[INST] x"}])


def test_an_answer_that_the_task_starts_is_continued(lm, tiny_tokenizer):
    started = [*CHAT, {"role": "assistant", "content": "The tree is"}]
    text = lm.apply_chat_template(started, add_generation_prompt=False)
    prompt, continuation = lm._encode_pair(text, " a rowan")
    assert tiny_tokenizer.eos_id not in prompt[-3:]
    whole = tiny_tokenizer({"messages": [*CHAT, {"role": "assistant", "content": "The tree is a rowan"}]})["tokens"]
    assert prompt + continuation == whole[:-2]


def test_tokenizers_of_other_formats_have_other_names(lm, checkpoint, tiny_tokenizer):
    other = tiny_tokenizer.with_system_prompt("Be kind.")
    assert lm.tokenizer_name != lm_eval_model.LlamaLM(None, other, batch_size=1, device=CPU).tokenizer_name
    assert lm.chat_template(True) == "llama2" and lm.chat_template(False) is None


@pytest.fixture
def write_task(tmp_path):
    """Writes a task and its data; returns the YAML file."""

    def write(name, docs, **config):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        data = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(tmp_path / f"{name}.jsonl")},
                "cache_dir": str(tmp_path / "datasets"),
            },
            "test_split": "test",
            **config,
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(data))
        return str(tmp_path / f"{name}.yaml")

    return write


CHOICES = [" rowan", " oak", " called Tem."]


@pytest.fixture
def choice_task(write_task, lm):
    """A task whose right answers are what the model finds likeliest, but for one of four."""
    questions = ["Which tree grows there?", "Who?", "The river is", "What?"]
    docs = []
    for index, question in enumerate(questions):
        scores = lm.loglikelihood(requests("loglikelihood", *((question, choice) for choice in CHOICES)), True)
        best = max(range(len(CHOICES)), key=lambda choice: scores[choice][0])
        docs.append({"question": question, "label": best if index else (best + 1) % len(CHOICES)})
    return write_task(
        "trees",
        docs,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice=CHOICES,
        doc_to_target="{{label}}",
        target_delimiter="",
        metric_list=[{"metric": "acc"}],
    )


def test_a_task_of_ones_own(lm, choice_task, write_task):
    tasks = LoadedTasks([choice_task])
    measures = task_measures(tasks, lm, num_fewshot=None, max_rows=None)
    assert measures["trees"]["acc"] == 0.75
    assert task_measures(tasks, lm, num_fewshot=None, max_rows=1)["trees"]["acc"] == 0.0
    [answer] = lm.generate_until(requests("generate_until", ("Who?", {"until": ["\n"], "max_gen_toks": 6})), True)
    answer_task = write_task(
        "answers",
        [{"question": "Who?", "answer": answer}, {"question": "What?", "answer": "none"}],
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 6},
        metric_list=[{"metric": "exact_match"}],
    )
    assert task_measures(LoadedTasks([answer_task]), lm, num_fewshot=0, max_rows=None)["answers"]["exact_match"] == 0.5


def test_a_task_asked_in_the_prompt_format(lm, write_task, tiny_tokenizer, monkeypatch):
    """Solved questions are earlier turns of the dialog."""
    docs = [{"question": question, "label": 0} for question in ("Who?", "What?")]
    path = write_task(
        "chats",
        docs,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice=CHOICES,
        doc_to_target="{{label}}",
        metric_list=[{"metric": "acc"}],
        fewshot_split="test",
        fewshot_config={"sampler": "first_n"},
    )
    scored = []
    score = lm._loglikelihood_tokens
    monkeypatch.setattr(lm, "_loglikelihood_tokens", lambda rows, **_: scored.extend(rows) or score(rows, True))
    measures = task_measures(LoadedTasks([path]), lm, num_fewshot=1, max_rows=1, apply_chat_template=True)
    assert set(measures["chats"]) >= {"acc"}
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "rowan"}]
    prompt = tiny_tokenizer({"messages": [*turns, {"role": "user", "content": "Who?"}]}, inference=True)["tokens"]
    assert [ids for _, ids, _ in scored] == [prompt] * len(CHOICES)
    assert [tiny_tokenizer.decode(answer) for _, _, answer in scored] == [choice.strip() for choice in CHOICES]


def test_tasks_that_cannot_be_loaded(tmp_path, write_task):
    (tmp_path / "broken.yaml").write_text("task: broken\ndataset_path: json\n")
    with pytest.raises(UserError, match=r"tasks: .*broken\.yaml cannot be loaded \("):
        LoadedTasks([str(tmp_path / "broken.yaml")])


def test_the_recipe_prints_tasks_beside_the_rows(checkpoint, choice_task, tmp_path, monkeypatch, capsys):
    from recipes.evaluate import recipe_main

    arguments = ["--config", "configs/evaluate.yaml", f"checkpoint_dir={checkpoint}", "dataset=null", "dtype=fp32"]
    arguments += [f"tasks=['{choice_task}']", f"output_file={tmp_path / 'results.json'}", "device=cpu"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    recipe_main()
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("trees"))
    assert line.split() == ["trees", "acc", "0.7500"]
    assert json.loads((tmp_path / "results.json").read_text())["results"]["trees"]["base"]["acc"] == 0.75


@pytest.mark.slow
def test_an_unknown_task_is_named():
    """Slow: lm-eval's index of its own tasks takes ten seconds to build."""
    with pytest.raises(UserError, match="tasks: 'no_such_task' is not a task of lm-eval or a YAML file"):
        LoadedTasks(["no_such_task"])
