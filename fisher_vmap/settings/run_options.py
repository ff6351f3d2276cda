"""What is said on the command line of one process alone, and in no file: it changes nothing in the results."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from fisher_vmap.settings.setting_types import PlanRate, Share, TrueOrFalse


class RunOptions(BaseModel):
    """The flags of `fisher-vmap run` that are no settings; the fields' descriptions say what each means."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: Share = Field(
        None,
        description="i/n: compute every n-th shard from the i-th on; n such processes fill one folder (a job array).",
    )
    quiet: TrueOrFalse = Field(
        False,
        description="No bar and no lines about what is under way; what was done and what went wrong is still told.",
    )
    plan: TrueOrFalse = Field(
        False,
        description="Compute nothing: print prompts, tokens, operations, storage and memory, without loading the "
        "weights.",
    )
    plan_rate: PlanRate = Field(
        None,
        description="With --plan, for its time: tokens a second of one worker; measure: load the model and try ten "
        "seconds.",
    )
