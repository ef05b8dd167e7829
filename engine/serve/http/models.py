"""/v1/models: the names that requests may call the model by."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter(tags=["models"])
