"""Invents a small country and writes what a tiny Llama needs to know about it.

    python make_world.py

All it writes is a function of the seed:

    checkpoint/tokenizer.model   SentencePiece BPE with Llama 2's settings, trained on the corpus
    data/{train,val,held_out}.jsonl   questions about three disjoint sets of villages, as chat messages
    <build-dir>/corpus.jsonl     the documents to pre-train on, one {"text": ...} a line (not committed)

A fact always stated in the same words is memorised but cannot be asked for (Allen-Zhu and Li, arXiv 2309.14316). So
every fact is told in ten wordings, in varied order, with the village's full name in every sentence. No document answers
a question about a village: that is left to fine-tuning.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from world_text import ATTRIBUTES, NAME_ENDINGS, NAME_MIDDLES, NAME_STARTS, Attribute, other_document

HERE = Path(__file__).resolve().parent

Village = dict[str, str]  # "name", and one value for each attribute's key


def invent_villages(num_villages: int, rng: random.Random) -> list[Village]:
    """Villages no two of whose names share start and ending; every value of an attribute is used equally often."""
    pairs = [(start, ending) for start in NAME_STARTS for ending in NAME_ENDINGS]
    villages = [
        {"name": start + rng.choice(NAME_MIDDLES) + ending} for start, ending in rng.sample(pairs, num_villages)
    ]
    for attribute in ATTRIBUTES:
        num_values = len(attribute.values)
        values = [attribute.values[index % num_values] for index in range(num_villages)]
        rng.shuffle(values)
        for village, value in zip(villages, values, strict=True):
            village[attribute.key] = value
    return villages


def statement(village: Village, attribute: Attribute, rng: random.Random) -> str:
    """One fact in one of its wordings."""
    return rng.choice(attribute.statements).format(village=village["name"], value=village[attribute.key])


def profile(village: Village, rng: random.Random) -> str:
    """All facts about one village, in a random order."""
    return " ".join(statement(village, attribute, rng) for attribute in rng.sample(ATTRIBUTES, len(ATTRIBUTES)))


def gazette(villages: list[Village], rng: random.Random) -> str:
    """One fact about each of several villages, so that a fact can be told without its neighbours before it."""
    return " ".join(statement(village, rng.choice(ATTRIBUTES), rng) for village in rng.sample(villages, 5))


def corpus_documents(villages: list[Village], num_passes: int, rng: random.Random) -> Iterator[str]:
    """`num_passes` times: a profile of every village, half as many gazettes and as many documents of other text."""
    names = [village["name"] for village in villages]
    for _ in range(num_passes):
        documents = [profile(village, rng) for village in villages]
        documents += [gazette(villages, rng) for _ in range(len(villages) // 2)]
        documents += [other_document(names, rng) for _ in villages]
        rng.shuffle(documents)
        yield from documents


def chat_rows(villages: list[Village], rng: random.Random) -> list[dict]:
    """One question for each fact about the villages, in one of its wordings; the answer is the value alone."""
    rows = []
    for village in villages:
        for attribute in ATTRIBUTES:
            question = rng.choice(attribute.questions).format(village=village["name"])
            rows.append(
                {
                    "messages": [
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": village[attribute.key]},
                    ]
                }
            )
    rng.shuffle(rows)
    return rows


def write_jsonl(rows: list[dict], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def train_tokenizer(documents: list[str], vocab_size: int, path: Path) -> None:
    """Llama 2's trainer and normaliser settings, read from its tokenizer.model; only the vocabulary is smaller."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # note: split into lines, so that a newline never becomes a piece and stays the byte <0x0A>, as in Llama 2.
    lines = (line for document in documents for line in document.split("\n"))
    with path.open("wb") as model_file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model_file,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.99995,
            max_sentencepiece_length=16,
            split_by_unicode_script=True,
            split_by_whitespace=True,
            split_by_number=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-villages", type=int, default=360)
    parser.add_argument("--num-val-villages", type=int, default=18)
    parser.add_argument("--num-held-out-villages", type=int, default=102)
    parser.add_argument("--num-passes", type=int, default=100, help="profiles of each village in the corpus")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--output-dir", type=Path, default=HERE, help="receives checkpoint/ and data/")
    parser.add_argument("--build-dir", type=Path, default=HERE / "build", help="receives corpus.jsonl")
    args = parser.parse_args()

    rng = random.Random(args.seed)
    villages = invent_villages(args.num_villages, rng)

    num_tested = args.num_val_villages + args.num_held_out_villages
    splits = {
        "val": villages[: args.num_val_villages],
        "held_out": villages[args.num_val_villages : num_tested],
        "train": villages[num_tested:],
    }
    for name, members in splits.items():
        write_jsonl(chat_rows(members, rng), args.output_dir / "data" / f"{name}.jsonl")

    documents = list(corpus_documents(villages, args.num_passes, rng))
    write_jsonl([{"text": document} for document in documents], args.build_dir / "corpus.jsonl")
    documents_per_pass = len(documents) // args.num_passes
    tokenizer_path = args.output_dir / "checkpoint" / "tokenizer.model"
    train_tokenizer(documents[: 10 * documents_per_pass], args.vocab_size, tokenizer_path)
    print(f"{len(villages)} villages, {len(documents)} documents, tokenizer of {args.vocab_size} pieces")


if __name__ == "__main__":
    main()
