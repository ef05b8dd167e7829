"""/score, /v1/score, /classify and /pooling: what the reward model says of texts."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter(tags=["reward"])
