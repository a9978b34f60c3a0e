"""The commands of README.md and docs/ run as they are written, links lead somewhere, and what is named is there."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from custom_components.transforms.prompt_format import PromptFormat
from custom_components.weights.adapters import save_adapter
from tests.support.forked_tune import ForkedTune
from tests.support.models import loaded_model, with_random_adapters
from tests.support.paths import PROJECT, TINY_LLAMA
from tests.support.written_runs import step_records, write_run

README = PROJECT / "README.md"
PAGES = [README, PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]
# What a block may be instead of commands to run: output, data, code, or commands that a test cannot have.
NOT_RUN = re.compile(r'(text|json|python)$|sh title="needs [\w ]+"$')
# Commands that other tests run, or that are for people who have just arrived.
RUN_ELSEWHERE = {
    "git clone <this repository> && cd llama-lora-recipes": "",
    "make setup && source .venv/bin/activate": "",
    "make demo": "tests/recipes/test_demo.py",
    "make test": ".ci/run",
    "make docs": "tests/test_docs.py",
    "tune ls": "tests/config/test_tune_command.py",
    "tune cp recipes/lora_single_device.py recipes/my_lora.py": "tests/config/test_tune_command.py",
    "tune run recipes/my_lora.py --config configs/tiny_qlora.yaml": "tests/config/test_tune_command.py",
    "tune run recipes/lora_single_device.py --help": "tests/config/test_recipe_help.py",
    **dict.fromkeys(
        (
            "tune run --nproc_per_node 4 recipes/lora_distributed.py --config configs/llama2_70b_qlora.yaml",
            "tune run --nproc_per_node 2 recipes/lora_distributed.py --config configs/tiny_qlora.yaml device=cpu",
        ),
        "tests/recipes/test_lora_distributed.py",
    ),
}
# What a test cannot have: the real weights and the reader's own file. Later overrides win over those of the command.
IN_PLACE_OF_7B = [
    "dtype=fp32",
    *(f"model.checkpoint_dir={TINY_LLAMA}/checkpoint", f"dataset.source={TINY_LLAMA}/data/train.jsonl"),
    *("max_steps_per_epoch=1", "device=cpu", "cache_dir=null"),
]


class Block(NamedTuple):
    page: str
    kind: str
    text: str

    @property
    def commands(self) -> list[str]:
        lines = self.text.replace("\\\n", " ").splitlines()
        return [" ".join(line.partition("   #")[0].split()) for line in lines if line.strip()]


BLOCKS = [
    Block(page.name, match[1], match[2])
    for page in PAGES
    for match in re.finditer(r"^```(.*)\n((?:.*\n)*?)^```$", page.read_text(), re.MULTILINE)
]
COMMANDS = list(
    dict.fromkeys(
        command
        for block in BLOCKS
        if not NOT_RUN.match(block.kind)
        for command in block.commands
        if command.startswith("tune run ") and command not in RUN_ELSEWHERE
    )
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter on the tiny model, in the place of the one that the README's first command trains."""
    directory = tmp_path_factory.mktemp("readme") / "adapter"
    model = with_random_adapters(loaded_model(TINY_LLAMA / "checkpoint"))
    save_adapter(model, directory, "tiny", PromptFormat("llama2", None, ["</s>"]).texts())
    return directory


def in_place(command, adapter, tmp_path):
    """Overrides that bring a command to the tiny model, and what it reads from standard input."""
    recipe = Path(recipe_of(command)).stem
    if recipe == "compare_runs":
        runs = [write_run(tmp_path / name, records=step_records([3.0, 2.0])) for name in ("first", "second")]
        page = [f"output_file={tmp_path / 'report.html'}"] if "output_file" in command else []
        return [f"run_dirs=[{', '.join(map(str, runs))}]", "evaluations=[]", *page]
    overrides = [f"checkpoint_dir={TINY_LLAMA}/checkpoint"]
    if recipe in ("generate", "evaluate", "merge"):
        overrides += [f"adapter_dir={adapter}"]
    if recipe == "generate":
        overrides += ["max_new_tokens=5", "device=cpu"]
        if "prompts_file" in command:
            (tmp_path / "questions.jsonl").write_text('{"prompt": "Who are you?"}\n')
            overrides += [f"prompts_file={tmp_path / 'questions.jsonl'}", f"output_file={tmp_path / 'answers.jsonl'}"]
    elif recipe == "evaluate":
        overrides += [f"dataset.source={TINY_LLAMA}/data/val.jsonl", f"output_file={tmp_path / 'results.json'}"]
        overrides += ["dataset.max_rows=8", "device=cpu", "cache_dir=null"]
    elif recipe == "merge":
        overrides += [f"output_dir={tmp_path / 'merged'}"]
    elif recipe == "lora_dpo_single_device":
        overrides += ["init_adapter_from=null", "max_steps=1", "dataset.max_rows=8", "device=cpu", "cache_dir=null"]
        overrides += [f"output_dir={tmp_path / 'out'}"]
    else:
        if recipe == "full_single_device":
            # note: compiling the config's optimizer takes a minute.
            overrides += ["optimizer={_component_: torch.optim.AdamW, lr: 2e-5}"]
        builder = "llama_from_config" if recipe == "full_single_device" else "lora_llama_from_config"
        overrides += [f"model._component_=custom_components.models.{builder}"]
        overrides += [*IN_PLACE_OF_7B, f"output_dir={tmp_path / 'out'}"]
        if ".csv" in command:
            (tmp_path / "faq.csv").write_text("question,answer\nWho?,Nobody.\nWhere?,Here.\n")
            overrides += [f"dataset.source={tmp_path / 'faq.csv'}"]
    if recipe == "preview" and "output_file" in command:
        overrides += [f"output_file={tmp_path / 'rows.html'}"]
    return overrides


def recipe_of(command):
    return next(word for word in command.split() if word.endswith(".py"))


def test_the_commands_are_found():
    recipes = {path.stem for path in (PROJECT / "recipes").glob("*.py")} - {"__init__"}
    assert {recipe_of(command) for command in COMMANDS} == {f"recipes/{recipe}.py" for recipe in recipes}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_as_written(command, adapter, tmp_path):
    arguments = [*shlex.split(command)[1:], *in_place(command, adapter, tmp_path)]
    result = ForkedTune(*arguments, input="Hello\n").result()
    assert result.returncode == 0, result.stderr


def test_every_other_command_is_run_by_a_test_or_marked():
    others = {
        command
        for block in BLOCKS
        if not NOT_RUN.match(block.kind) and block.page != "CONTRIBUTING.md"
        for command in block.commands
        if command not in COMMANDS and not (block.page == "README.md" and command.startswith("tune download "))
    }
    results = {command for command in others if command.startswith("exact match on ")}
    assert others - results == set(RUN_ELSEWHERE)
    for test in RUN_ELSEWHERE.values():
        assert (PROJECT / test).exists(), test


def test_the_example_in_python_runs(monkeypatch):
    monkeypatch.chdir(PROJECT)
    [example] = [block.text for block in BLOCKS if (block.page, block.kind) == ("api.md", "python")]
    names: dict[str, object] = {}
    exec(example, names)
    row = names["row"]
    assert row["tokens"][0] == 1 and row["labels"][0] == -100 and row["labels"][-1] == row["tokens"][-1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path) if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


def anchors(page):
    """A heading's anchor, as GitHub and the site make it: lower case, words joined by dashes, no other marks."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_what_the_tree_and_the_pages_name_is_there():
    text = "\n".join(page.read_text() for page in PAGES if page.name != "moving.md")
    names = set(re.findall(r"[\w/*]+\.(?:py|yaml)\b", text)) - {
        *("prompt_format.yaml", "config.yaml", "recipes/my_lora.py", "recipes/NAME.py", "tests/recipes/test_NAME.py"),
        *("NAME.py", "generation.py", "train.py"),
    }
    assert len(names) > 30
    for name in names:
        assert any(PROJECT.rglob(name)), name


def test_no_figure_is_left_to_fill_in():
    known = {"GOMP_SPINCOUNT", "PIP_INSTALL_ARGS"}
    assert set(re.findall(r"\b[A-Z0-9]+_[A-Z_]+\b", README.read_text())) <= known


def test_the_readme_is_two_screens_and_the_tree():
    text, tree = README.read_text().split("## Where things are")
    assert len(text.splitlines()) <= 90 and len(tree.splitlines()) <= 45
