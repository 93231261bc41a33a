"""The daily reading of the running A/B test, for the week that yesterday belongs to.

Each run tells the readout that yesterday is the last complete day, so an experiment closes on the first run after its
window whose activity covers it: that of the cycle's ingest, or files that a platform delivers every day
(`readout.activity`). Until then it is `running`.
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
