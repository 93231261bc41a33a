"""The weekly cycle, from ingest to promote: every stage of the pipeline that runs once a week."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG
from launch import build, parameters

from flywheel_tasks.pipeline import STAGES

weekly = [stage for stage in STAGES if stage.schedule == "weekly"]

with DAG(
    dag_id="character_flywheel",
    dag_display_name="CharacterFlywheel: weekly cycle",
    description="One turn of the flywheel: traffic in, a better social-chat model out.",
    doc_md=__doc__,
    schedule="0 6 * * 1",
    catchup=False,
    max_active_runs=1,
    params=parameters(weekly),
    default_args={"owner": "flywheel", "retries": 2, "retry_delay": timedelta(seconds=30)},
    tags=["flywheel", "weekly"],
) as dag:
    build(dag, weekly)
