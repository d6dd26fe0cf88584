"""What `vlmconvert check --json` writes: an artifact against a baseline, limit by limit."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Check", "CheckReport", "TestRecord"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TestRecord(_Record):
    """A two-sided test of whether paired scores differ."""

    __test__ = False  # not a test of pytest's

    method: str
    samples: int = Field(description="pairs of scores")
    lost: int = Field(description="samples whose score fell")
    gained: int = Field(description="samples whose score rose")
    p_value: float
    larger_than_chance: bool = Field(description="the mean fell, and p is below 0.05")


class Check(_Record):
    """One figure of both sides, and what is held against the limit."""

    name: str
    baseline: float | None = Field(description="the baseline's own figure, if it has one")
    artifact: float | None
    value: float = Field(description="drop in percentage points, KL in nats, or artifact over baseline")
    unit: Literal["points", "nats", "relative", "x"]
    limit: float | None = Field(description="greatest value that passes; null if it is only reported")
    passed: bool
    test: TestRecord | None
    note: str


class CheckReport(_Record):
    """All checks of one artifact."""

    schema_version: Literal["1.0"] = "1.0"
    artifact: str
    baseline: str
    data: str = Field(description="what the scores are from")
    checks: list[Check]
    worst_block: str | None = Field(
        description="block whose error has grown most, where a score failed and it is known"
    )

    @property
    def passed(self) -> bool:
        """Whether every limit holds."""
        return all(check.passed for check in self.checks)
