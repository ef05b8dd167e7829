"""What a server is told when it starts: frozen, checked once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stars.arguments import integer, real, shown
from stars.calibration import Calibration
from stars.errors import RequestError
from stars.policies import POLICIES


@dataclass(frozen=True)
class ServerSettings:
    """How requests are answered. RequestError for what cannot be.

    model: the name that clients call the language model by. `model:POLICY` names a method besides, `model:plain` plain
        samples.
    policy: of requests that name none, one of `stars methods`; None: stars where the engine has a reward, else sample.
        policy_parameters: what requests of that policy have unless they say otherwise, by the policy's own names.
    calibration: threshold and beta="auto" of requests that leave the threshold out.
    api_keys: one of them must come with each request of the API; empty: none need.
    default_max_tokens: of a chat's answer where the request has none; fewer where the context leaves fewer.
    max_body_bytes: of a request. max_concurrent_requests: API requests under way, queued and running; beyond 429.
    max_connections: beyond, a connection is told 503 and closed. header_seconds: that a client may take for a request's
        head, body_seconds: for its body.
    write_seconds: that a client may leave what was sent to it unread. drain_seconds: that requests under way have from
        SIGTERM on.
    cors_origins: pages of other origins that may call, "*" for all; empty: none. allowed_hosts: names of this server
        that requests may give, against pages that rebind theirs; empty, or "*": any.
    """

    model: str
    policy: str | None = None
    policy_parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    calibration: Calibration | None = None
    api_keys: Sequence[str] = ()
    default_max_tokens: int = 512
    max_body_bytes: int = 1 << 20
    max_concurrent_requests: int = 1024
    max_connections: int = 4096
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    write_seconds: float = 60.0
    drain_seconds: float = 30.0
    cors_origins: Sequence[str] = ()
    allowed_hosts: Sequence[str] = ()
    page: bool = True
    log_requests: bool = False

    def __post_init__(self) -> None:
        if not self.model or ":" in self.model:
            raise RequestError(f"the served model's name is {shown(self.model)}, it must be a text without a colon")
        if self.policy is not None and self.policy not in POLICIES:
            raise RequestError(f"policy is {shown(self.policy)}, it must be one of {', '.join(POLICIES)}")
        for name in ("default_max_tokens", "max_body_bytes", "max_concurrent_requests", "max_connections"):
            object.__setattr__(self, name, integer(name, getattr(self, name), 1))
        for name in ("header_seconds", "body_seconds", "write_seconds"):
            object.__setattr__(self, name, real(name, getattr(self, name), "a finite number of seconds above 0",
                                                lambda value: 0.0 < value < 1e9))
        object.__setattr__(self, "drain_seconds", real("drain_seconds", self.drain_seconds,
                                                       "a finite number of seconds, 0 or above",
                                                       lambda value: 0.0 <= value < 1e9))
        for name in ("api_keys", "cors_origins", "allowed_hosts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not all(key and key.isascii() and key.isprintable() and " " not in key for key in self.api_keys):
            raise RequestError("an API key must be printable ASCII without spaces, and not empty")
