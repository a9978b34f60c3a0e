"""Runs side by side: what differs, what came of each, as text in 80 columns and as a page that fetches nothing."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from custom_components.models.token_rows import train_token_rows
from custom_components.runs.comparison import difference_rows, measure_rows
from custom_components.runs.comparison_page import ComparisonPage
from custom_components.runs.comparison_plot import loss_curves
from custom_components.runs.comparison_table import comparison_table
from custom_components.runs.recorded_run import names_apart, open_recorded_runs
from custom_components.runtime.errors import UserError
from custom_components.weights.adapters import save_adapter
from custom_components.weights.trained_counts import num_adapter_parameters
from tests.support.models import loaded_model
from tests.support.paths import PROJECT
from tests.support.written_runs import step_records, write_run


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(PROJECT)


@pytest.fixture
def runs_of(tmp_path):
    """Write runs, each of overrides and further arguments, and open them; their names are letters."""

    def opened(*runs):
        paths = [
            write_run(tmp_path / name, *overrides, **more)
            for name, (overrides, more) in zip("abcdefghijkl", runs, strict=False)
        ]
        return open_recorded_runs(paths)

    return opened


def differences(runs):
    return {row.label: row.cells for row in difference_rows(runs)}


def measures(runs):
    return [(row.label.strip(), row.cells) for row in measure_rows(runs)]


# ---- What differs


def test_a_key_that_nodes_follow_is_listed_once_and_places_are_not(runs_of):
    runs = runs_of((["lora_rank=8", "learning_rate=1e-4"], {}), (["lora_rank=64", "cache_dir=null"], {}))
    assert differences(runs) == {"lora_rank": ("8", "64"), "learning_rate": ("0.0001", "0.001")}


def test_equal_runs_do_not_differ(runs_of):
    runs = runs_of(([], {}), ([], {}))
    assert differences(runs) == {} and differences(runs[:1]) == {}


def test_a_node_with_a_value_of_its_own_differs_by_it(runs_of):
    runs = runs_of((["model.lora_dropout=0.5"], {}), ([], {}))
    assert differences(runs) == {"model.lora_dropout": ("0.5", "0.05")}


def test_values_are_written_short_where_that_tells_them_apart(runs_of):
    cosine = "lr_scheduler._component_=custom_components.training.schedules."
    runs = runs_of(
        ([f"{cosine}linear", "lora_attn_modules=[q_proj,v_proj]", "dataset.source=data/a/rows.jsonl"], {}),
        ([f"{cosine}constant", "lora_attn_modules=[q_proj]", "dataset.source=data/b/rows.jsonl"], {}),
    )
    assert differences(runs) == {
        "lora_attn_modules": ("q_proj, v_proj", "q_proj"),
        "dataset.source": ("…/a/rows.jsonl", "…/b/rows.jsonl"),
        "lr_scheduler._component_": ("linear", "constant"),
    }


def test_runs_of_different_recipes_differ_by_what_is_trained_and_by_keys_with_an_effect(runs_of):
    found = differences(runs_of(([], {}), ([], {"config": "tiny_full"}), ([], {"config": "tiny_dpo"})))
    assert found["trains"] == ("an adapter", "the model", "an adapter, on pairs")
    assert found["lora_rank"] == ("16", "-", "16") and found["loss.beta"] == ("-", "-", "0.1")
    assert not {"use_dora", "train_only", "model._component_", "dataset._component_"} & found.keys()


def test_a_run_of_before_a_key_has_its_default(runs_of, tmp_path):
    runs = runs_of(([], {}), (["use_rslora=true"], {}))
    path = tmp_path / "a/config.yaml"
    path.write_text(re.sub(r"(?m)^ *(use_rslora|neftune_noise_alpha):.*\n", "", path.read_text()))
    assert differences(open_recorded_runs([run.path for run in runs])) == {"use_rslora": ("false", "true")}


# ---- What came of them


def test_measures_of_a_finished_a_stopped_a_going_and_an_empty_run(runs_of):
    validated = [{"step": step, "val_loss": loss} for step, loss in ((1, 3.0), (2, 1.5), (3, None), (4, 1.5))]
    losses = step_records([4.0, 3.0, None, 2.0])
    runs = runs_of(
        ([], {"records": [*losses, *validated], "num_planned_steps": 4}),
        ([], {"records": losses, "num_planned_steps": 9}),
        ([], {"records": [{**record, "peak_memory_gib": None} for record in losses]}),
        ([], {}),
    )
    assert measures(runs) == [
        ("trained parameters", ("10", "10", "-", "-")),
        ("optimizer steps", ("4", "4 of 9, stopped", "4 so far", "none yet")),
        ("peak memory, GiB", ("1.04", "1.04", "-", "-")),
        ("tokens per second", ("200", "200", "200", "-")),
        ("best val loss", ("1.5000", "-", "-", "-")),
        ("after step", ("2", "-", "-", "-")),
    ]


def test_a_run_that_went_on_after_its_adapter_was_saved_is_not_called_stopped(runs_of, tmp_path):
    [run] = runs_of(([], {"records": step_records([3.0, 2.0]), "num_planned_steps": 9}))
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_records([3.0, 2.0, 1.0])[-1]) + '\n{"step": 4, "lo')
    [run] = open_recorded_runs([run.path])
    assert run.progress_words == "3 so far" and run.steps[-1]["loss"] == 1.0


def test_losses_of_pairs_have_rows_and_pictures_of_their_own(runs_of):
    pairs = step_records([0.7, 0.6], reward_margin=0.1)
    runs = runs_of(
        ([], {"records": [*step_records([3.0, 2.0]), {"step": 2, "val_loss": 2.5}]}),
        ([], {"config": "tiny_dpo", "records": [*pairs, {"step": 2, "val_loss": 0.5}]}),
    )
    assert ("best val loss", ("2.5000", "-")) in measures(runs)
    assert ("best val loss per pair", ("-", "0.5000")) in measures(runs)
    page = ComparisonPage()
    page.add_curves(runs)
    pictures = re.findall(r'alt="(.*?)"', page.parts[-1])
    assert pictures == [f"Loss over {axis} of {run}" for run in "ab" for axis in ("optimizer steps", "tokens")]


def test_trained_parameters_are_counted_as_the_model_counts_them(make_checkpoint, tmp_path):
    model = loaded_model(make_checkpoint(), use_dora=True)
    train_token_rows(model, range(1020, 1024))
    save_adapter(model, tmp_path / "adapter", "base", {})
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert num_adapter_parameters(tmp_path / "adapter") == trained > 0


# ---- As text


@pytest.mark.parametrize("num_runs", [1, 3, 9])
def test_the_table_has_everything_in_80_columns(runs_of, num_runs):
    folder = "a_folder_with_a_name_of_some_length/" * 3
    runs = runs_of(*(([f"lora_rank={2 + n}", f"dataset.source={folder}{n:x}.jsonl"], {}) for n in range(num_runs)))
    rows = [*difference_rows(runs), *measure_rows(runs)]
    names = [f"a_very_long_name_of_an_experiment_{run.name}" for run in runs]
    table = comparison_table(names, rows)
    assert max(map(len, table.splitlines())) <= 80
    if num_runs > 1:
        ranks = [number for line in table.splitlines() if line.startswith("lora_rank") for number in line.split()[1:]]
        assert ranks == [str(2 + n) for n in range(num_runs)]
    assert table.count("none yet") == num_runs


def test_names_are_the_shortest_ends_that_tell_paths_apart(tmp_path):
    paths = [tmp_path / name for name in ("a/run", "b/run", "b/other")]
    assert names_apart(paths[1:]) == ["run", "other"]
    assert names_apart(paths) == ["a/run", "b/run", "b/other"]


# ---- What is no run


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent", None, "is not there; name the output_dir of a run"),
        ("a/config.yaml", None, "is a file; name the output_dir of a run"),
        ("", None, "it has no config.yaml; those in it, a, b, are named by '{}/*'"),
        ("a/adapter", None, "it has no config.yaml; name '{}/a', which it is in"),
        ("other/nothing", "", "it has no config.yaml; name the output_dir of one"),
        ("other/config.yaml", "checkpoint_dir: a\n", "is not the config of a training run"),
        ("other/config.yaml", "a: [", "cannot be read"),
        ("other/config.yaml", "", "is not the config of a training run"),
        ("b/metrics.jsonl", "mine\n", "is not as a run writes it; leave that run out"),
        ("b/samples.jsonl", '{"step": 1}\n', "is not as a run writes it; leave that run out"),
        ("a/adapter/adapter_model.safetensors", "torn", "not a whole safetensors file"),
        ("*/nothing*", None, "names no directory of a run"),
    ],
)
def test_what_is_not_a_run_is_one_line(tmp_path, name, content, words):
    write_run(tmp_path / "a", records=step_records([1.0]), num_planned_steps=1)
    write_run(tmp_path / "b")
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        path = tmp_path / name.partition("/")[0]
    with pytest.raises(UserError) as error:
        open_recorded_runs([path])
    [message] = error.value.messages
    assert words.format(tmp_path) in message and str(tmp_path) in message


def test_a_run_is_named_once(tmp_path):
    write_run(tmp_path / "a")
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(UserError, match=r"link' is the run '.*/a', which is named already; name it once"):
        open_recorded_runs([tmp_path / "a", tmp_path / "link"])


def test_a_glob_leaves_out_folders_without_a_run(tmp_path):
    for name in ("b", "a"):
        write_run(tmp_path / f"runs/{name}")
    (tmp_path / "runs/no run").mkdir()
    assert [run.name for run in open_recorded_runs([tmp_path / "runs/*"])] == ["a", "b"]


# ---- As a page


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


def test_L28_a_page_fetches_nothing_and_shows_text_as_it_is(runs_of):
    evil = '<script src="https://example.com/a.js">"&</script>'
    records = [*step_records([3.0, 2.0]), {"step": 2, "val_loss": 2.5}]
    runs = runs_of(([f"tokenizer.system_prompt={evil}"], {"records": records}), ([], {}))
    page = ComparisonPage()
    page.add_curves(runs)
    page.add_table([run.name for run in runs], difference_rows(runs), measure_rows(runs))
    page.add_answers(evil, {evil: evil, "b": ""})
    tags = Tags("".join(page.parts))
    assert "script" not in tags.tags and tags.tags.count("img") == 2 and tags.text.count(evil) == 4
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in tags.attributes
    addresses = [value for name, value in tags.attributes if name in ("src", "href")]
    for address in addresses:
        kind, _, data = address.partition(",")
        assert kind == "data:image/svg+xml;base64"
        svg = base64.b64decode(data).decode()
        assert re.findall(r'(?:href|src)="(?!#)', svg) == [] and "url(http" not in svg and "@import" not in svg


def test_the_curves_have_every_loss_at_its_step_or_token(runs_of, monkeypatch):
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (saved.append(figure), save(figure, *a, **k))[1])
    records = [*step_records([3.0, None, 2.0]), {"step": 3, "val_loss": 2.5}]
    [run] = runs_of(([], {"records": records}))
    for over_tokens, scale in ((False, 1), (True, 100)):
        loss_curves({0: run}, over_tokens=over_tokens)
        training, validation = saved.pop().axes[0].lines
        assert [*training.get_xdata()] == [scale, 3 * scale] and [*training.get_ydata()] == [3.0, 2.0]
        assert [*validation.get_xdata()] == [3 * scale] and [*validation.get_ydata()] == [2.5]


def test_a_page_is_the_same_every_time(runs_of):
    [run] = runs_of(([], {"records": step_records([3.0, 2.0])}))
    assert loss_curves({0: run}, over_tokens=True) == loss_curves({0: run}, over_tokens=True)
    assert loss_curves({}, over_tokens=True) is None
