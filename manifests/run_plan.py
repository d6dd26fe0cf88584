"""The run plan in a manifest: how an artifact is started in its runtimes."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["RunPlan", "RuntimePlan", "WorldSize"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WorldSize(_Record):
    """A number of cards that the model can be divided over, and what each card then holds."""

    cards: int = Field(ge=1)
    weights: int = Field(description="bytes of weights on each card")
    cache: int = Field(description="bytes of the key-value cache on each card, for the plan's batch and lengths")
    command: str = Field(description="command that starts the model; $ARTIFACT and $IMAGES stand for the folders")


class RuntimePlan(_Record):
    """How one runtime is started."""

    runtime: Literal["mindie", "vllm-ascend"]
    world_sizes: list[WorldSize]
    benchmark: str = Field(
        description="command that measures the throughput in batches of 1 to 10; with vllm-ascend, while its server runs"
    )


class RunPlan(_Record):
    """Commands and memory for a batch of prompts of limited length."""

    batch: int = Field(ge=1)
    input_tokens: int = Field(ge=1, description="maximum number of tokens of a prompt, image tokens included")
    new_tokens: int = Field(ge=1, description="maximum number of tokens of an answer")
    runtimes: list[RuntimePlan]
    notes: list[str] = Field(description="what a user should know, such as why a runtime cannot open the artifact")
