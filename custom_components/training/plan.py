"""The steps of a run, from its config."""

from custom_components.config.training_settings import TrainingSettings
from custom_components.datasets.batching import BatchPlan


def batch_plan(settings: TrainingSettings, max_seq_len: int | None) -> BatchPlan:
    """Read how rows become steps from a config whose `batch_size` is a number; a pack holds `max_seq_len` tokens."""
    assert settings.batch_size != "auto"
    return BatchPlan(
        settings.batch_size,
        settings.gradient_accumulation_steps,
        settings.shuffle,
        settings.seed,
        pack_capacity_tokens=max_seq_len if settings.packed else None,
        group_by_length=settings.group_by_length,
        max_steps_per_epoch=settings.max_steps_per_epoch,
    )
