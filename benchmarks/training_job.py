"""One training run, the same for every tool that is compared: what side_by_side.py hands to each.

Kinds of runs: `lora` fine-tunes an adapter on rows, `dpo` one on pairs, `full` the model itself on rows.

Imports nothing but the standard library, so that it also runs where this package is not installed.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LORA_RANK, LORA_ALPHA = 8, 16
LEARNING_RATE = 2e-4
CLIP_GRAD_NORM = 1.0
BETA = 0.1  # DPO's


@dataclass(frozen=True)
class TrainingJob:
    """What a tool is to do.

    Attributes:
        kind: `lora`, `dpo` or `full`.
        checkpoint_dir: a Hugging Face directory.
        source, num_rows, max_seq_len: the rows, for the tool that reads and tokenizes them itself.
        rows_path: the same rows, a JSON list of `{"tokens", "labels"}`; labels are -100 where not trained on, and not
            shifted. Of pairs, of `{"chosen", "rejected"}`, each of the two such a row.
        adapter_dir: the adapter that training starts from, in PEFT's format.
        torchtune_adapter_path: the same in torchtune's parameter names, safetensors.
        batch_size: rows, or pairs, of a forward.
        gradient_accumulation_steps: forwards of an optimizer step.
        checkpointing: layers are computed again in the backward.
        work_dir: an empty directory for whatever the tool writes.
    """

    kind: str
    checkpoint_dir: str
    source: str
    num_rows: int
    max_seq_len: int
    rows_path: str
    adapter_dir: str
    torchtune_adapter_path: str
    batch_size: int
    gradient_accumulation_steps: int
    num_steps: int
    checkpointing: bool
    work_dir: str

    @property
    def step_log_path(self) -> Path:
        return Path(self.work_dir) / "steps.jsonl"

    def write(self) -> Path:
        path = Path(self.work_dir) / "job.json"
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: Path) -> "TrainingJob":
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def rows(self) -> list[dict[str, Any]]:
        return json.loads(Path(self.rows_path).read_text(encoding="utf-8"))
