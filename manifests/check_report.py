"""The report that `vlmconvert check --json` writes: an artifact compared with a baseline, one check for each limit."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Check", "CheckReport", "TestRecord"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TestRecord(_Record):
    """A two-sided statistical test of whether the scores of the same samples differ."""

    __test__ = False  # pytest must not collect this class

    method: str
    samples: int = Field(description="number of pairs of scores")
    lost: int = Field(description="number of samples whose score fell")
    gained: int = Field(description="number of samples whose score rose")
    p_value: float
    larger_than_chance: bool = Field(description="the mean fell, and p is below 0.05")


class Check(_Record):
    """One figure of baseline and artifact, and the value that is compared with the limit."""

    name: str
    baseline: float | None = Field(description="the baseline's own figure, if it has one")
    artifact: float | None
    value: float = Field(description="drop in percentage points, KL in nats, or artifact over baseline")
    unit: Literal["points", "nats", "relative", "x"]
    limit: float | None = Field(description="maximum value that passes; null if the value is only reported")
    passed: bool
    test: TestRecord | None
    note: str


class CheckReport(_Record):
    """All checks of one artifact."""

    schema_version: Literal["1.0"] = "1.0"
    artifact: str
    baseline: str
    data: str = Field(description="source of the samples that were scored")
    checks: list[Check]
    worst_block: str | None = Field(
        description="block whose error has grown most; null unless a score failed and the blocks' errors are known"
    )

    @property
    def passed(self) -> bool:
        """Whether every limit holds."""
        return all(check.passed for check in self.checks)
