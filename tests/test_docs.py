"""docs/: what is generated is current, the pages are all in the site, and the site builds without a word."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree

import pytest

from custom_components.config.foreign_names import FOREIGN_KEYS
from docs_pages import cards, moving, pictures, settings
from docs_pages.blocks import DOCS, blocks_of
from tests.support.paths import PROJECT

MADE_BY = "run `python -m docs_pages`"
FAST = "tinyllama_1b_chat_qlora"


def test_the_reference_of_settings_is_current():
    assert (DOCS / "settings.md").read_text() == settings.page(), MADE_BY


def test_the_names_of_other_tools_are_current():
    assert blocks_of(DOCS / "moving.md") == moving.blocks(), MADE_BY
    for names in moving.TOOLS.values():
        for name in set(names.split()) - set(moving.SAME):
            assert name in FOREIGN_KEYS or name.rpartition(".")[2] in FOREIGN_KEYS, name


def test_the_cards_tables_have_every_config_whose_sizes_are_known():
    text = (DOCS / "cards.md").read_text()
    for path in PROJECT.glob("configs/*.yaml"):
        config = path.read_text()
        if "run recipes/lora_single_device.py" in config and "lora_llama_from_config" not in config:
            assert f"| `{path.name}` |" in text or path.stem.endswith("dpo"), path


@pytest.mark.parametrize(
    "name", [FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in cards.CONFIGS if name != FAST)]
)
def test_the_cards_of_a_config_are_current(name):
    """Its row of every table, and the lines on top of the config."""
    config = cards.on_cards(name)
    texts = blocks_of(DOCS / "cards.md")
    for block, made in cards.blocks({name: config}).items():
        [row] = [line for line in made.splitlines() if line.startswith(f"| `{name}")] or [""]
        assert row in texts[block], MADE_BY
    header = (PROJECT / f"configs/{name}.yaml").read_text()
    if "\n# Memory: " in header:
        for line in cards.header_lines(name, config):
            assert f"\n{line}\n" in header, MADE_BY


def test_the_pictures_are_there_and_count_what_is_published():
    """For Llama 2 7B several users published what rank 8 and 64 on q and v train, and rank 16 on all linear layers."""
    count = pictures.adapter_parameters
    assert count(pictures.LLAMA2_7B, ("q", "v"), 8) == 4_194_304
    assert count(pictures.LLAMA2_7B, ("q", "v"), 64) == 33_554_432
    assert count(pictures.LLAMA2_7B, tuple(pictures.linear_sizes(pictures.LLAMA2_7B)), 16) == 39_976_960
    for name in pictures.PICTURES:
        assert ElementTree.parse(DOCS / f"pictures/{name}.svg").getroot().tag.endswith("svg")
        assert f"(pictures/{name}.svg)" in (DOCS / "lora.md").read_text()
    assert pictures.drawn("low_rank_update") == pictures.drawn("low_rank_update")


def test_every_page_is_in_the_site():
    nav = tomllib.loads((PROJECT / "zensical.toml").read_text())["project"]["nav"]
    assert sorted(page for entry in nav for page in entry.values()) == sorted(path.name for path in DOCS.glob("*.md"))


@pytest.mark.skipif(importlib.util.find_spec("zensical") is None, reason="zensical is not installed: `make docs` does")
def test_the_site_builds_without_a_word_and_without_an_address_outside(tmp_path):
    for name in ("docs", "custom_components"):
        shutil.copytree(PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "zensical.toml", tmp_path)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    said = (result.stdout + result.stderr).split("\n")
    assert [line for line in said if line and not re.match(r"Build (started|finished)|No issues found", line)] == []
    for page in (tmp_path / "site").glob("*.html"):
        assert not re.search(r'(src="|<link[^>]* href=")https?://', page.read_text()), page
