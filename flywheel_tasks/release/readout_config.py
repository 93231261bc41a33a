"""Every choice of the readout, each with its default (Sec. 2.5.2)."""

from __future__ import annotations

import datetime as dt
from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, field_validator, model_validator

from flywheel_tasks.core.config import Operational, StageConfig
from flywheel_tasks.release.window import Estimand


class ReadoutConfig(StageConfig):
    experiment: str | None = Field(
        None,
        min_length=1,
        description="which experiment of the log (empty: release-CYCLE, or the only one)",
    )
    control: str = Field("control", description="the arm that receives the current baseline")
    allocation: dict[str, float] = Field(
        {}, description="planned weight of each arm (empty: as the store's expose reports them, else equal)"
    )
    start: dt.date | None = Field(
        None, description="first day of the window (empty: the later of the first exposure and the first activity)"
    )
    days: int = Field(7, ge=1, le=28, description="length of the window in days (the paper reads one week)")
    as_of: dt.date | None = Field(
        None,
        description="data is complete before this day (empty: the last day with activity, which may still be filling "
        "up; the daily DAG sets the day of its run)",
    )
    settle_days: int = Field(0, ge=0, le=14, description="days to wait after the window for late data")
    estimand: Estimand = Field("calendar_window", description="over which days a unit counts")
    time_zone: str = Field("UTC", description="zone whose calendar the days of exposure follow")
    naive_zone: str | None = Field(
        None, description="zone of exposure times that carry none (empty: such times are refused)"
    )
    missing_days: tuple[dt.date, ...] = Field(
        (), description="days without data, declared: they leave the window in every arm"
    )
    partial_share: float = Field(
        0.5, ge=0, le=1, description="a day below this share of the usual active share is refused as late"
    )
    bad_rows: Literal["refuse", "drop"] = Field(
        "refuse", description="rows with nulls or negative sends: refuse, or drop and count"
    )
    max_crossed: float = Field(
        0.01, ge=0, le=1, description="refuse the readout above this share of units seen in two arms"
    )
    alpha: float = Field(0.05, gt=0, lt=1, description="level of every interval and test")
    srm_p: float = Field(
        0.0005, gt=0, lt=1, description="the sample-ratio check fails below this p-value and blocks the readout"
    )
    pre_days: int = Field(0, ge=0, le=28, description="days before the window that feed CUPED (0: none)")
    segments: tuple[str, ...] = Field(
        (),
        description="columns of the exposure log to split by, such as locale in the store's; 'returning' splits by "
        "activity in the pre-period",
    )
    guard_pct: float = Field(
        2.0, ge=0, description="a guard whose interval reaches below minus this percentage holds the release"
    )
    exposures: tuple[str, ...] = Field((), description="globs of exposure Parquet of another experiment platform")
    activity: tuple[str, ...] = Field(
        (), description="globs of activity Parquet of another platform, or of earlier cycles"
    )
    threads: int = Field(0, ge=0, le=256, description="reader threads (0: one per core)", json_schema_extra=Operational)
    partition_bits: int = Field(
        0, ge=0, le=12, description="split the units into 2^bits parts by hash, read one at a time or on a Ray cluster",
        json_schema_extra=Operational,
    )  # fmt: skip
    scratch: str | None = Field(
        None,
        description="folder URI for rows written by part, which every worker can reach (empty: a local one)",
        json_schema_extra=Operational,
    )
    workers: int = Field(
        0, ge=0, description="Ray workers over the parts (0: this process)", json_schema_extra=Operational
    )

    @property
    def columns(self) -> tuple[str, ...]:
        """Segments that are columns of the exposure log."""
        return tuple(s for s in self.segments if s != "returning")

    @field_validator("time_zone", "naive_zone")
    @classmethod
    def _zone(cls, zone: str | None) -> str | None:
        if zone is not None:
            try:
                ZoneInfo(zone)
            except (ZoneInfoNotFoundError, ValueError) as error:
                raise ValueError(f"no time zone '{zone}': use a name like Europe/Paris") from error
        return zone

    @model_validator(mode="after")
    def _consistent(self) -> ReadoutConfig:
        if "returning" in self.segments and not self.pre_days:
            raise ValueError("segment 'returning' needs pre_days above 0")
        if self.estimand == "per_user_window" and (self.missing_days or self.pre_days):
            raise ValueError(
                "per_user_window counts days from each unit's exposure: it takes no missing_days and no pre_days"
            )
        if self.workers > 1 and not self.partition_bits:
            raise ValueError("workers need parts to work on: set partition_bits above 0")
        if any(w <= 0 for w in self.allocation.values()):
            raise ValueError("allocation: every weight must be positive")
        return self
