"""Flags of `stars serve`."""

from __future__ import annotations

import argparse


def add_serving(parser: argparse.ArgumentParser) -> None:
    """How requests are answered, and whose."""
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", metavar="HOST",
                       help="the address to listen at (%(default)s: this machine alone may ask)")
    group.add_argument("--port", type=int, default=8000, metavar="P", help="(%(default)s) 0 takes a free one")
    group.add_argument("--served-model-name", metavar="NAME", help="what requests call the language model (the last "
                       "part of --model); NAME:POLICY is any method of `stars methods`, NAME:plain plain sampling")
    group.add_argument("--api-key", action="append", default=[], metavar="KEY", help="requests must have it as "
                       "Authorization: Bearer KEY, all but /, /health and /ready; may be given several times. Better "
                       "in the environment variable STARS_API_KEY, several with spaces between: others on this machine "
                       "see arguments")
    group.add_argument("--default-max-tokens", type=int, metavar="N",
                       help="tokens of a chat's answer whose request does not say (512, as far as the context allows)")
    group.add_argument("--log-requests", action="store_true", help="a line on stderr for each request: id, counts, "
                       "time and status, never its text")
    group.add_argument("--no-page", action="store_true", help="no page at /")
    group.add_argument("--cors-origin", action="append", default=[], metavar="ORIGIN", help="pages of this origin may "
                       "ask, such as https://example.com; * for all; may be given several times (none)")
    group.add_argument("--allowed-host", action="append", default=[], metavar="NAME", help="requests may call the "
                       "server by this name; may be given several times (localhost, 127.0.0.1 and [::1] where it "
                       "listens to this machine alone, else any)")
    group = parser.add_argument_group("limits of the server")
    for flag, metavar, what in (
            ("--max-waiting", "N", "requests that wait for their turn; beyond, 429 (256)"),
            ("--max-concurrent-requests", "N", "requests under way, those that wait and others; beyond, 429 (1024)"),
            ("--max-connections", "N", "open connections; beyond, those that ask nothing give way (4096)"),
            ("--max-body-bytes", "N", "of a request; beyond, 413 (1048576)")):
        group.add_argument(flag, type=int, metavar=metavar, help=what)
    for flag, metavar, what in (
            ("--header-seconds", "S", "in which a request's head must come (10)"),
            ("--body-seconds", "S", "in which its body must come (30)"),
            ("--write-seconds", "S", "that a client may leave what was sent to it unread (60)"),
            ("--drain-seconds", "S", "that requests under way have once the server is told to end (30)")):
        group.add_argument(flag, type=float, metavar=metavar, help=what)
