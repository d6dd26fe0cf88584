"""How an artifact is started in its runtimes, as its manifest says it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["RunPlan", "RuntimePlan", "WorldSize"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WorldSize(_Record):
    """One number of cards that the model can be divided over."""

    cards: int = Field(ge=1)
    weights: int = Field(description="bytes of weights on each card")
    cache: int = Field(description="bytes of keys and values on each card, for the plan's batch and lengths")
    command: str = Field(description="launch line; $ARTIFACT and $IMAGES stand for the folders")


class RuntimePlan(_Record):
    """One runtime."""

    runtime: Literal["mindie", "vllm-ascend"]
    world_sizes: list[WorldSize]
    benchmark: str = Field(
        description="line that measures the throughput in batches of 1 to 10; of vllm-ascend, beside its server"
    )


class RunPlan(_Record):
    """Launch lines and memory for a batch of prompts of some length."""

    batch: int = Field(ge=1)
    input_tokens: int = Field(ge=1, description="longest prompt, image tokens included")
    new_tokens: int = Field(ge=1)
    runtimes: list[RuntimePlan]
    notes: list[str] = Field(description="runtimes that do not open the artifact, and why")
