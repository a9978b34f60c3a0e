"""Scores of rows and of answers, and the recipe that prints them."""

import json
import math
import sys

import pytest
import torch
import yaml
from torch import nn
from torchtune.modules.peft import disable_adapter

from custom_components.datasets.chat import chat_dataset
from custom_components.datasets.tokenized_rows import split_validation
from custom_components.evaluation.answers import exact_match, generated_answers, held_out_questions, rouge_l
from custom_components.evaluation.report import results_file, results_table
from custom_components.evaluation.scores import head_scores, scores_by_source, token_scores
from custom_components.generation.decoding import generate
from custom_components.generation.sampling import Sampling
from custom_components.runtime.errors import UserError
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.prompt_format import PromptFormat
from custom_components.weights.adapters import save_adapter
from recipes import evaluate
from tests.support.models import CPU, loaded_model, with_random_adapters
from tests.support.paths import TINY_TOKENIZER
from tests.support.recipe_runs import tune_run

QUESTIONS = ["Who?", "What is the name of the river?", "Which tree grows there?", "When?", "Why does it grow?"]


def write_rows(path, num_rows, first=0):
    with path.open("w") as file:
        for row in range(first, first + num_rows):
            question = {"role": "user", "content": QUESTIONS[row % len(QUESTIONS)]}
            answer = {"role": "assistant", "content": " ".join(["word"] * (row % 7 + 1))}
            file.write(json.dumps({"messages": [question, answer] * (row % 2 + 1)}) + "\n")
    return path


@pytest.fixture
def model(make_checkpoint):
    return with_random_adapters(loaded_model(make_checkpoint())).eval()


@pytest.fixture
def dataset(tiny_tokenizer, tmp_path):
    return chat_dataset(tiny_tokenizer, str(write_rows(tmp_path / "rows.jsonl", 11)))


@torch.no_grad()
def scores_in_transformers(theirs, dataset):
    """Row by row, without packing, in transformers' own forward and float64 from the logits on."""
    loss_sum = num_tokens = num_right = 0
    for index in range(len(dataset)):
        row = dataset[index]
        logits = theirs(torch.tensor([row["tokens"]])).logits[0, :-1].double()
        labels = torch.tensor(row["labels"][1:])
        loss_sum += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        num_tokens += int((labels != -100).sum())
        num_right += int((logits.argmax(dim=-1) == labels).sum())
    return loss_sum / num_tokens, num_right / num_tokens


@pytest.mark.parametrize("name", ["random", "stories260K"])
def test_loss_perplexity_and_accuracy_are_those_of_transformers(make_checkpoint, test_data, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    checkpoint = make_checkpoint() if name == "random" else test_data("stories260K/config.json").parent
    tokenizer = Llama2ChatTransform(checkpoint / "tokenizer.model", max_seq_len=120)
    dataset = chat_dataset(tokenizer, str(write_rows(tmp_path / "rows.jsonl", 20)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    loss, accuracy = scores_in_transformers(theirs, dataset)
    scores = token_scores(loaded_model(checkpoint).eval(), dataset, 3, CPU)
    assert scores.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert scores.loss == pytest.approx(loss, rel=1e-5)
    assert scores.token_accuracy == accuracy
    assert scores.num_tokens == dataset.summaries[0].num_supervised_tokens


def test_losses_are_summed_in_float64():
    """Beside a loss of 2**24 a float32 sum has steps of 2, and those of the odd number of others are lost."""
    num_positions = 1000
    logits = torch.zeros(1, num_positions, 4)
    logits[..., 0] = 1.0
    logits[0, 0] = torch.tensor([0.0, 2.0**24, -1e9, -1e9])
    log_probabilities, _ = head_scores(logits, nn.Identity(), torch.zeros(1, num_positions, dtype=torch.long))
    one = math.log(math.e + 3) - 1
    assert -log_probabilities.sum().item() == pytest.approx(2.0**24 + (num_positions - 1) * one, abs=1e-4)


def test_scores_do_not_depend_on_how_positions_are_cut(model):
    hidden_1TD, labels_1T = torch.randn(1, 20, 64), torch.randint(1024, (1, 20))
    whole, in_chunks = (head_scores(hidden_1TD, model.output, labels_1T, chunk_size=size) for size in (20, 3))
    torch.testing.assert_close(in_chunks, whole, atol=1e-6, rtol=1e-6)


def test_scores_do_not_depend_on_how_rows_are_cut(model, dataset):
    whole = token_scores(model, dataset, 11, CPU)
    in_pieces = token_scores(model, dataset, 2, CPU)
    assert in_pieces.loss == pytest.approx(whole.loss, rel=1e-6)
    assert (in_pieces.num_tokens, in_pieces.num_likeliest) == (whole.num_tokens, whole.num_likeliest)


def test_each_source_of_a_mix_has_its_scores_and_all_have_theirs(model, tiny_tokenizer, tmp_path):
    files = [str(write_rows(tmp_path / f"{name}.jsonl", num)) for name, num in (("a", 4), ("b", 9))]
    mix = chat_dataset(tiny_tokenizer, [{"source": files[0], "weight": 2.0}, {"source": files[1]}])
    scores = scores_by_source(model, mix, 3, CPU)
    alone = [token_scores(model, chat_dataset(tiny_tokenizer, file), 3, CPU) for file in files]
    assert list(scores) == [*files, "all rows"]
    assert scores[files[0]].num_tokens == 2 * alone[0].num_tokens
    assert scores[files[0]].loss == pytest.approx(alone[0].loss, rel=1e-6)
    assert scores[files[1]].loss == pytest.approx(alone[1].loss, rel=1e-6)
    assert scores["all rows"] == scores[files[0]] + scores[files[1]]
    _, validation = split_validation(mix, 0.3, seed=0)
    drawn = scores_by_source(model, validation, 3, CPU)
    assert drawn["all rows"].loss == pytest.approx(token_scores(model, validation, 5, CPU).loss, rel=1e-6)


def test_a_broken_model_is_said_to_be_broken(model, dataset):
    model.norm.scale.data[0] = float("nan")
    with pytest.raises(UserError, match="is nan: the checkpoint or the adapter is damaged"):
        token_scores(model, dataset, 3, CPU)


def test_questions_are_the_last_of_each_row(dataset, tiny_tokenizer):
    questions = held_out_questions(dataset, tiny_tokenizer, 4)
    assert len(questions) == 4
    for row, question in enumerate(questions):
        asked = {"role": "user", "content": QUESTIONS[row]}
        answered = {"role": "assistant", "content": " ".join(["word"] * (row + 1))}
        dialog = [asked, answered] * (row % 2) + [asked]
        assert question.prompt == tiny_tokenizer({"messages": dialog}, inference=True)["tokens"]
        assert question.reference == answered["content"]


def test_rows_without_a_question_or_a_whole_answer_are_no_questions(tiny_tokenizer, tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "Only a text."}))
    with pytest.raises(UserError, match="no row of the data set has a question with a whole answer"):
        held_out_questions(chat_dataset(tiny_tokenizer, str(tmp_path / "text.jsonl")), tiny_tokenizer, 3)
    cutting = Llama2ChatTransform(TINY_TOKENIZER, max_seq_len=20)
    rows = chat_dataset(cutting, str(write_rows(tmp_path / "rows.jsonl", 8)))
    assert rows.summaries[0].num_truncated > 1
    questions = held_out_questions(rows, tiny_tokenizer, 8)
    assert all(question.reference.replace("word", "").strip() == "" for question in questions)
    assert 0 < len(questions) < 8


def test_answers_do_not_depend_on_what_they_are_decoded_with(model, tiny_tokenizer, dataset):
    """One of the prompts leaves less room than the longest answer takes."""
    questions = held_out_questions(dataset, tiny_tokenizer, 11)
    longest = max(len(question.prompt) for question in questions)
    model.max_seq_len = longest + 10
    alone = [
        generate(model, [question.prompt], stop_tokens=[tiny_tokenizer.eos_id], sampling=Sampling(), max_new_tokens=12)[
            0
        ]
        for question in questions
    ]
    together = generated_answers(model, tiny_tokenizer, questions, batch_size=4, max_new_tokens=12)
    assert together == [tiny_tokenizer.decode(answer).strip() for answer in alone]
    assert {len(answer) for answer in alone} == {10, 12}


def test_exact_match_and_rouge_l():
    scoring = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    references = ["The river is called Tem.", "a b c d", "ein Ahorn"]
    answers = ["The river, the Tem, is called", "a x c d", "ein Ahorn"]
    assert exact_match(answers, references) == 1 / 3
    theirs = [
        scoring.score(reference, answer)["rougeL"].fmeasure
        for answer, reference in zip(answers, references, strict=True)
    ]
    assert rouge_l(answers, references) == pytest.approx(sum(theirs) / 3)
    assert rouge_l(["το ποτάμι"], ["το μεγάλο ποτάμι"]) == pytest.approx(0.8)


def test_the_table_fits_and_names_every_subject_once():
    measures = {"supervised_tokens": 123456789, "loss": 12.5, "perplexity": 268337.2865, "token_accuracy": 0.5}
    subjects = {
        name: {"base": measures, "tuned": measures} for name in ("a/long/folder/" * 9 + "rows.jsonl", "all rows")
    }
    lines = results_table(subjects).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) == 1 + 2 * 4
    assert lines[0].split() == ["base", "tuned"]
    assert lines[1].startswith("…") and lines[1].split()[0].endswith("/rows.jsonl")
    assert lines[6].split() == ["loss", "12.5000", "12.5000"]
    assert lines[7].split() == ["perplexity", "2.683e+05", "2.683e+05"]


def test_results_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new/results.json"
    with pytest.raises(RuntimeError), results_file(path):
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    with results_file(path) as results:
        results["loss"] = 1.5
    assert json.loads(path.read_text()) == {"loss": 1.5}
    with pytest.raises(UserError, match="output_file: .* cannot be written"), results_file(tmp_path):
        pass


@pytest.fixture
def saved(make_checkpoint, tmp_path):
    """A checkpoint, an adapter on it with a prompt format of its own, and rows."""
    checkpoint = make_checkpoint()
    model = with_random_adapters(loaded_model(checkpoint)).eval()
    save_adapter(model, tmp_path / "adapter", "a/base", PromptFormat("alpaca", None, ["</s>"]).texts())
    return model, checkpoint, tmp_path / "adapter", write_rows(tmp_path / "rows.jsonl", 6)


def run_in_process(monkeypatch, *overrides):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--config", "configs/evaluate.yaml", "cache_dir=null", *overrides])
    evaluate.recipe_main()


def test_the_recipe_shows_base_and_tuned(saved, tmp_path, monkeypatch, capsys):
    pytest.importorskip("rouge_score")
    model, checkpoint, adapter, rows = saved
    run_in_process(
        *(monkeypatch, f"checkpoint_dir={checkpoint}", f"adapter_dir={adapter}", f"dataset.source={rows}"),
        *("dtype=fp32", "device=cpu", "generate_answers=2", "max_new_tokens=3", f"output_file={tmp_path / 'r.json'}"),
    )
    dataset = chat_dataset(Llama2ChatTransform(TINY_TOKENIZER, prompt_template="alpaca"), str(rows))
    tuned = token_scores(model, dataset, 4, CPU)
    with disable_adapter(model):
        base = token_scores(model, dataset, 4, CPU)
    written = json.loads((tmp_path / "r.json").read_text())
    scores = written["results"][str(rows)]
    assert scores["tuned"]["loss"] == pytest.approx(tuned.loss, rel=1e-6)
    assert scores["base"]["loss"] == pytest.approx(base.loss, rel=1e-6)
    assert base.loss != tuned.loss
    assert written["results"]["answers"]["tuned"]["questions"] == 2
    assert [record["reference"] for record in written["answers"]] == ["word", "word word"]
    assert "### Instruction:" in written["answers"][0]["prompt"]
    assert f"{tuned.loss:.4f}" in capsys.readouterr().out


def test_the_rows_kept_for_validation(saved, monkeypatch, capsys):
    _, checkpoint, _, rows = saved
    run_in_process(monkeypatch, f"checkpoint_dir={checkpoint}", f"dataset.source={rows}", "val_fraction=0.4", "seed=3")
    _, validation = split_validation(chat_dataset(Llama2ChatTransform(TINY_TOKENIZER), str(rows)), 0.4, seed=3)
    assert f"{len(validation)} rows are drawn" in capsys.readouterr().out


def test_the_rows_kept_for_validation_are_those_that_the_run_kept(saved, tmp_path, monkeypatch, capsys):
    """What decides a row's tokens and mask decides the draw."""
    _, checkpoint, adapter, rows = saved
    run = {"val_fraction": 0.4, "seed": 3, "max_seq_len": 100, "train_on": "all", "on_overlong": "truncate"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run))
    tokenizer = Llama2ChatTransform(TINY_TOKENIZER, 100, prompt_template="alpaca", train_on="all")
    _, validation = split_validation(chat_dataset(tokenizer, str(rows)), 0.4, seed=3)
    scored = []

    def recorded_scores(model, dataset, *others):
        scored.append(dataset.digest)
        return scores_by_source(model, dataset, *others)

    monkeypatch.setattr(evaluate, "scores_by_source", recorded_scores)
    keys = (f"checkpoint_dir={checkpoint}", f"adapter_dir={adapter}", f"dataset.source={rows}", "compare=false")
    run_in_process(monkeypatch, *keys, "val_fraction=0.4", "seed=3")
    assert scored == [validation.digest]
    assert "kept for validation" in capsys.readouterr().out
    for override in ("val_fraction=0.5", "seed=4", "max_seq_len=99", "on_overlong=drop", "prompt_template=llama2"):
        with pytest.raises(UserError, match=f"^{override.partition('=')[0]}: .* draws other rows"):
            run_in_process(monkeypatch, *keys, "val_fraction=0.4", "seed=3", override)
    run_in_process(monkeypatch, *keys, "seed=4")


def test_bad_input_is_one_line_and_exit_2(saved, make_checkpoint, tmp_path):
    _, _, adapter, rows = saved
    result = tune_run(
        *("--config", "configs/evaluate.yaml", f"checkpoint_dir={make_checkpoint('wider', hidden_size=128)}"),
        *(f"adapter_dir={adapter}", f"dataset.source={rows}", "cache_dir=null", f"output_file={tmp_path}/out/r.json"),
        recipe="evaluate",
    )
    assert result.returncode == 2, result.stderr
    [error] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "does not fit this model" in error
    assert not (tmp_path / "out/r.json").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dataset.source=nowhere.jsonl"], "there is no file 'nowhere.jsonl'"),
        (["dataset=null"], "dataset: null without tasks"),
        (["dataset=null", "tasks=[x]", "generate_answers=2"], "generate_answers: 2 without a dataset"),
        (["max_seq_len=8"], "has a token to train on within max_seq_len 8"),
        (["generate_answer=2"], "did you mean 'generate_answers'"),
        (["adapter_dir=configs"], "has no adapter_config.json"),
        (["output_file=configs"], "output_file: 'configs' cannot be written"),
    ],
)
def test_what_a_user_can_mend(saved, monkeypatch, overrides, words):
    _, checkpoint, _, rows = saved
    with pytest.raises(UserError, match=words):
        run_in_process(monkeypatch, f"checkpoint_dir={checkpoint}", f"dataset.source={rows}", *overrides)
