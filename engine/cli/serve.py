"""`stars serve`: OpenAI's API over HTTP."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import ipaddress
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stars.arguments import integer
from stars.calibration import Calibration
from stars.cli import options
from stars.errors import RequestError, StarsError
from stars.policies import POLICIES

if TYPE_CHECKING:
    from stars.serve.async_engine import AsyncEngine
    from stars.serve.http.settings import ServerSettings

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
KEYS = "STARS_API_KEY"
MAX_WAITING = 256
LIMITS = ("default_max_tokens", "max_concurrent_requests", "max_connections", "max_body_bytes", "header_seconds",
          "body_seconds", "write_seconds", "drain_seconds")
SHIPPED_NAME = "film-reviews"


def serve(args: argparse.Namespace) -> int:
    """Runs the command until a signal ends it; what can be refused is refused before a model is read."""
    for needed in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(needed) is None:
            raise StarsError(f"stars serve needs {needed}: pip install 'stars-engine[serve]'")
    from stars.serve.http.server import Server, bound_socket, room_for
    from stars.serve.http.service import Service

    settings = settings_of(args, room_for)
    if not 0 <= args.port < 1 << 16:
        raise RequestError(f"--port is {args.port}, it must be from 0 to 65535")
    try:
        listening = bound_socket(args.host, args.port)
    except OSError as error:
        raise StarsError(f"cannot listen at {args.host}, port {args.port}: {error.strerror or error}") from None
    with listening:
        _say_what_is_odd(args, settings)
        with _logging(settings.log_requests):
            Server(Service(engine_of(args), settings), listening, partial(_say_where, settings)).start()
    return 0


def _say_where(settings: ServerSettings, address: str) -> None:
    page = "page at /, " if settings.page else ""
    print(f"stars: serving {settings.model} at {address} ({page}policy {settings.policy or 'by request'})", flush=True)


def engine_of(args: argparse.Namespace) -> AsyncEngine:
    """The engine that is to answer, in a process that does nothing else."""
    from stars.serve.async_engine import AsyncEngine

    engine = AsyncEngine(options.build_engine(args, any_policy=True), max_waiting=_max_waiting(args))
    gc.collect()
    gc.freeze()  # what was imported and built stays; to look through it takes as long as a round, amid requests
    return engine


def _max_waiting(args: argparse.Namespace) -> int:
    return integer("max_waiting", MAX_WAITING if args.max_waiting is None else args.max_waiting, 1)


def settings_of(args: argparse.Namespace, room_for: Callable[[int], int]) -> ServerSettings:
    """How it is to answer. room_for: as `server.room_for`. RequestError for what does not go together."""
    from stars.serve.http.settings import ServerSettings

    _max_waiting(args)
    parameters = {name: value for name, value in options.policy_parameters(args).items()
                  if (name, value) != ("reward_threshold", "auto")}
    calibration = _calibration(args) if "reward_threshold" not in parameters else None
    if calibration is None and parameters.get("beta") == "auto":
        raise RequestError("--beta auto needs a calibration: give --calibration FILE, or a number")
    options.policy(args, 0.0 if calibration is None else calibration)  # refuses what no request could have
    given = {name: getattr(args, name) for name in LIMITS if getattr(args, name) is not None}
    given["max_connections"] = _connections(args.max_connections, room_for)
    hosts = (*LOCAL_HOSTS, args.host, *args.allowed_host) if is_local(args.host) else args.allowed_host
    return ServerSettings(
        _name(args), policy=args.policy, policy_parameters=parameters, calibration=calibration,
        api_keys=(*args.api_key, *os.environ.get(KEYS, "").split()), cors_origins=args.cors_origin, allowed_hosts=hosts,
        page=not args.no_page, log_requests=args.log_requests, **given)


def _connections(asked: int | None, room_for: Callable[[int], int]) -> int:
    """How many connections there may be: the process needs a file for each. RequestError where it may have fewer than
    were asked for."""
    from stars.serve.http.settings import ServerSettings

    wanted = ServerSettings.max_connections if asked is None else integer("max_connections", asked, 1)
    room = room_for(wanted)
    if asked is not None and room < wanted:
        raise RequestError(f"max_connections is {wanted}, and this process may have {room} beside its other files: "
                           "raise `ulimit -Hn`, or take fewer")
    return room


def _calibration(args: argparse.Namespace) -> Calibration | None:
    """Of --calibration, or what was measured of the shipped pair where that is what is served."""
    if args.calibration is not None:
        return Calibration.load(args.calibration)
    shipped = options.shipped_calibration()
    if args.model is None and not options.gives_reward(args) and shipped.is_file():
        return Calibration.load(str(shipped))
    return None


def _name(args: argparse.Namespace) -> str:
    if args.served_model_name is not None:
        return str(args.served_model_name)
    if args.model is None:
        return SHIPPED_NAME
    return (Path(args.model).resolve() if Path(args.model).exists() else Path(args.model)).name.replace(":", "-")


def _say_what_is_odd(args: argparse.Namespace, settings: ServerSettings) -> None:
    if not is_local(args.host) and not settings.api_keys:
        print(f"stars: warning: whoever reaches {args.host} may use this server: give --api-key, or set {KEYS}",
              file=sys.stderr)
    if settings.calibration is None and "reward_threshold" not in settings.policy_parameters and (
            options.needs_calibration(args)):
        print(f"stars: policy {settings.policy} has no reward_threshold: requests must bring one, unless the server is "
              "given --calibration FILE or --reward-threshold R", file=sys.stderr)
    suggested = settings.calibration.beta if args.calibration is not None and settings.calibration is not None else None
    default = getattr(POLICIES.get(settings.policy or ""), "beta", None)
    if suggested and isinstance(default, float) and "beta" not in settings.policy_parameters and (
            not 0.5 <= default / suggested <= 2.0):
        print(f"stars: policy {settings.policy} has beta {default:g} and the calibration suggests {suggested:.3g}: "
              "--beta auto takes that", file=sys.stderr)


def is_local(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def _logging(requests: bool) -> Iterator[None]:
    """What goes wrong in the server goes to stderr, and a line for each request where `requests` says so."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log, lines = logging.getLogger("stars"), logging.getLogger("stars.serve.requests")
    before = lines.level
    log.addHandler(handler)
    if requests:
        lines.setLevel(logging.INFO)
    try:
        yield
    finally:
        lines.setLevel(before)
        log.removeHandler(handler)
