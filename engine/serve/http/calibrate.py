"""/v1/calibrate: a threshold for prompts."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter(tags=["reward"])
