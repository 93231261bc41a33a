"""Configuration of the two preference-model stages."""

from __future__ import annotations

from pydantic import Field

from flywheel_tasks.core.config import ModelConfig, model_of
from flywheel_tasks.style.monitor import StyleConfig
from flywheel_tasks.training.learn import LearnConfig


class PreferenceConfig(LearnConfig):
    base: ModelConfig = model_of("reward", "where training starts")
    earlier_versions: int = Field(3, ge=0, description="how many earlier versions are measured on this cycle's pairs")
    variants: bool = Field(
        False, description="also train on the three data variants of Sec. 3.4.1 and measure each (Table 9): four runs"
    )
    style: StyleConfig = Field(StyleConfig(), description="when a style feature of chosen responses counts as drift")
