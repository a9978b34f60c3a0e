"""Settings of the recipe that trains an adapter on several devices."""

from typing import Annotated, Literal

from pydantic import Field

from custom_components.config.lora_settings import LoRASettings


class DistributedSettings(LoRASettings):
    """Settings of recipes/lora_distributed.py: those of one device, whose configs it takes, and two more."""

    parallelism: Literal["replicate"] = Field(
        "replicate", description="replicate: every device has the whole base, and a share of a step's forwards"
    )
    collective_timeout_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        1800.0, description="a device that keeps the others waiting for longer ends the run"
    )
