"""Settings of the recipe that trains an adapter on several devices."""

from typing import Annotated, Literal

from pydantic import Field

from custom_components.config.lora_settings import LoRASettings


class DistributedSettings(LoRASettings):
    """Settings of recipes/lora_distributed.py: those of one device, whose configs it takes, and two more."""

    parallelism: Literal["auto", "replicate", "shard"] = Field(
        "auto",
        description="replicate: every device has the whole base; shard: a share of its layers, and gathers one at a "
        "time; auto: replicate where the base fits, else shard",
    )
    collective_timeout_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        1800.0, description="a device that keeps the others waiting for longer ends the run"
    )
