"""The daily reading of the A/B test that is under way: of the release whose window is not closed yet, with the newest
ingest.

A candidate is nominated in mid-week, so its window ends in the next week, and the log of its last days comes with a
later ingest. Each run says which day is complete: yesterday where a platform delivers activity every day
(`readout.activity`), else the day before the ingest began. Until the window is complete the readout is `running`; the
first run after that closes it. Where no release is open, the run is about the week that yesterday belongs to.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG
from launch import build, parameters

from flywheel_tasks.pipeline import STAGES

daily = [stage for stage in STAGES if stage.schedule == "daily"]

with DAG(
    dag_id="ab_readout",
    dag_display_name="CharacterFlywheel: daily A/B readout",
    description="What the candidate does to engagement so far, with intervals and a sample-ratio check.",
    doc_md=__doc__,
    schedule="0 7 * * *",
    catchup=False,
    max_active_runs=1,
    params=parameters(daily),
    default_args={"owner": "flywheel", "retries": 2, "retry_delay": timedelta(seconds=30)},
    tags=["flywheel", "daily"],
) as dag:
    build(dag, daily, settled_days=1, as_of="readout.as_of")
