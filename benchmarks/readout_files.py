"""Where the readout benchmark keeps its inputs."""

from __future__ import annotations


def files(folder: str, layout: bool) -> tuple[str, str]:
    if layout:
        return f"{folder}/layout/units.parquet", f"{folder}/layout/activity-*.parquet"
    return f"{folder}/exposures.parquet", f"{folder}/activity.parquet"
