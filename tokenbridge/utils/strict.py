"""What the files of this project are checked against."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A record that refuses unknown fields, NaN and infinity, and does not change."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)
