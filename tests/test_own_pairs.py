"""examples/own_pairs: a hundred pairs that a reader can take as a model, none a repetition of another."""

import json
import re
from collections import Counter, defaultdict

from tests.support.paths import PROJECT

PAIRS = [json.loads(line) for line in (PROJECT / "examples/own_pairs/pairs.jsonl").read_text().splitlines()]
REPEATED_WORDS = 6  # a run of words that two pairs may not share


def words(text):
    return re.findall(r"[\w']+", text.lower())


def test_there_are_104_pairs_of_a_prompt_and_a_completion():
    assert len(PAIRS) == 104
    assert [path.name for path in PROJECT.glob("examples/own_pairs/*.jsonl")] == ["pairs.jsonl"]
    for pair in PAIRS:
        assert list(pair) == ["prompt", "completion"]
        assert all(text == text.strip() and text for text in pair.values()), pair
        assert not any(mark in text for text in pair.values() for mark in ("###", "[INST]", "<s>")), pair


def test_no_pair_repeats_another():
    pairs_with = defaultdict(set)
    for number, pair in enumerate(PAIRS):
        spoken = words(pair["prompt"] + " " + pair["completion"])
        for start in range(len(spoken) - REPEATED_WORDS + 1):
            pairs_with[tuple(spoken[start : start + REPEATED_WORDS])].add(number)
    assert {run: numbers for run, numbers in pairs_with.items() if len(numbers) > 1} == {}
    assert len({tuple(words(pair["prompt"])) for pair in PAIRS}) == len(PAIRS)


def test_forms_and_lengths_vary():
    openings = Counter(tuple(words(pair["completion"])[:2]) for pair in PAIRS)
    assert max(openings.values()) <= 3
    assert max(Counter(tuple(words(pair["prompt"])[:2]) for pair in PAIRS).values()) <= 6
    lengths = sorted(len(words(pair["completion"])) for pair in PAIRS)
    assert lengths[0] < 20 and lengths[len(lengths) // 2] > 40 and lengths[-1] > 90
    completions = [pair["completion"] for pair in PAIRS]
    for form in (r"^- ", r"^1\. ", r"^\| ", r"^```", r"^Subject: "):
        assert any(re.search(form, completion, re.MULTILINE) for completion in completions), form
