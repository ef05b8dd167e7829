"""A Ray cluster of this machine, for tests: a process that they start, tell what to do, and end for sure.

Run as a program it is that process: it takes lines of JSON, each the arguments of a `serve` command, and ends its
cluster with its input.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from stars.cli.options import shipped_pair

MARK = "STARS_TEST_CLUSTER"
"""The environment variable by which the processes of a cluster are known."""
DOCS = Path(__file__).resolve().parents[1] / "docs"
KEY = "a-key"
POLICY = {"reward_threshold": 1.0, "segment_size": 8, "max_attempts": 3}
ROUTER = {"request_router_class": "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router."
                                  "PrefixCacheAffinityRouter",
          "request_router_kwargs": {"imbalanced_threshold": 8, "do_eviction": True}}
"""What docs/scaling.md says of routing by prefixes."""
OBJECT_STORE = 100_000_000
SECONDS = 60.0


def configuration(port: int) -> dict[str, Any]:
    """The one of the docs, for the shipped pair and a small machine."""
    given = yaml.safe_load((DOCS / "serve-config.yaml").read_text(encoding="utf8"))
    model, reward = map(str, shipped_pair())
    [application] = given["applications"]
    assert {"model": "path/to/lm", "reward": "path/to/rm"}.items() <= application["args"].items()
    application["args"] |= {"model": model, "reward": reward, "set": POLICY, "deterministic": True, "api_key": [KEY],
                            "max_num_seqs": 16, "max_body_bytes": 100_000}
    given["http_options"]["port"] = port
    return given


class Cluster:
    """What a test has of it."""

    def __init__(self, process: subprocess.Popen[str], mark: str, dashboard: str):
        self.process = process
        self.mark = mark
        self.dashboard = dashboard

    def serve(self, *arguments: str) -> str:
        """Runs `serve` with these arguments; what went wrong, else an empty text."""
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def processes(self, name: str = "") -> list[int]:
        """Those whose title begins with `name`, the oldest first."""
        return sorted(int(place.name) for place in Path("/proc").glob("[0-9]*") if self._is_ours(place, name))

    def _is_ours(self, place: Path, name: str) -> bool:
        try:
            return (f"{MARK}={self.mark}\0".encode() in (place / "environ").read_bytes()
                    and (place / "cmdline").read_bytes().startswith(name.encode()))
        except OSError:  # it has ended, or is somebody else's
            return False


@contextmanager
def ray_cluster(num_cpus: int, dashboard: bool = False) -> Iterator[Cluster]:
    """A cluster that listens to this machine alone; once the block is left none of its processes is there."""
    mark, place = uuid.uuid4().hex, tempfile.mkdtemp(prefix="ray-")  # short: names of sockets are bounded
    environment = os.environ | {MARK: mark, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0",
                                "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(os.path.join(place, "errors"), "w+") as errors:
        process = subprocess.Popen([sys.executable, __file__, str(num_cpus), str(int(dashboard)), place], text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment,
                                   start_new_session=True)
        cluster = Cluster(process, mark, "")
        try:
            first = process.stdout.readline()
            assert first, Path(errors.name).read_text()[-2000:]
            cluster.dashboard = json.loads(first)
            yield cluster
        finally:
            process.stdin.close()
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            until = time.monotonic() + 10
            while (left := cluster.processes()) and time.monotonic() < until:
                time.sleep(0.1)
            for number in left:
                os.kill(number, 9)
            shutil.rmtree(place, ignore_errors=True)
    assert not left, f"{len(left)} processes of the cluster were still there"


def _main(num_cpus: int, dashboard: bool, place: str) -> None:
    import ray
    from ray import serve
    from ray.serve.scripts import cli

    context = ray.init(num_cpus=num_cpus, object_store_memory=OBJECT_STORE, include_dashboard=dashboard,
                       _temp_dir=place, log_to_driver=False, logging_level="ERROR", namespace="serve",
                       **({"dashboard_port": 0} if dashboard else {}))
    answers = os.fdopen(os.dup(1), "w")  # what the commands print goes where errors go
    os.dup2(2, 1)
    print(json.dumps(context.dashboard_url or ""), file=answers, flush=True)
    for line in sys.stdin:
        problem = ""
        try:
            cli.main(json.loads(line), standalone_mode=False)
        except (Exception, SystemExit) as error:
            problem = f"{type(error).__name__}: {error}"
        print(json.dumps(problem), file=answers, flush=True)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    _main(int(sys.argv[1]), bool(int(sys.argv[2])), sys.argv[3])
