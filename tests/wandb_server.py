"""A stand-in for a W&B server on 127.0.0.1: it keeps what runs, `wandb sync` and `wandb agent` send, and can fail."""

import gzip
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any, Literal

import yaml

TEAM, PROJECT = "team", "interstack"
KEY = "a" * 40


@dataclass
class ReceivedRun:
    """What the server has of one run; ``rows`` by W&B's own row number, ``exit_code`` of its last end."""

    name: str
    display_name: str | None = None
    group: str | None = None
    sweep: str | None = None
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None
    preempting: bool = False

    @property
    def history(self) -> list[dict[str, Any]]:
        """Rows in order, without W&B's own keys."""
        rows = (self.rows[number] for number in sorted(self.rows))
        return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]

    @property
    def keys(self) -> set[str]:
        """Names of everything a panel can show; nested summaries joined by dots, as in W&B."""
        return {key for row in self.history for key in row} | set(_flat(self.summary))


@dataclass
class WandbServer:
    """State of the stand-in.

    Args:
        url: address.
        fault: how every request fails: answered after ``delay`` seconds, with status 500, or closed unanswered.
        faulty: number of requests after which the fault is over; ``None``: it stays.
        sweep: configuration of the only sweep; each point of ``points`` is handed to the agent once.
    """

    url: str = ""
    fault: Literal["none", "slow", "error", "drop"] = "none"
    delay: float = 1.0
    faulty: int | None = None
    sweep: dict[str, Any] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)
    runs: dict[str, ReceivedRun] = field(default_factory=dict)
    lock: Any = field(default_factory=Lock)

    def answer(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        """Answer a GraphQL request; one that is not known gets an empty answer, as from an older server."""
        if "upsertBucket" in query:
            return {"upsertBucket": {"bucket": self._upsert(given), "inserted": True}}
        if "createRunFiles" in query:
            urls = [{"name": name, "uploadUrl": f"{self.url}/upload/{given['run']}/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": urls}}
        if "RunResumeStatus" in query:
            return {"model": {"id": "p", "name": PROJECT, "entity": _ENTITY, "bucket": self._resumed(given["name"])}}
        if "createAgent" in query:
            return {"createAgent": {"agent": {"id": "agent"}}}
        if "agentHeartbeat" in query:
            commands = self._commands(json.loads(given["runState"]))
            return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}
        if "sweep(" in query:
            return {"project": {"sweep": self._sweep()}}
        if "viewer" in query:
            return {"viewer": _VIEWER}
        return {}

    def stream(self, run: ReceivedRun, sent: dict[str, Any]) -> None:
        """Keep one request of a run's stream of rows and summaries."""
        files = sent.get("files", {})
        history = files.get("wandb-history.jsonl", {"content": []})
        for number, line in enumerate(history["content"], history.get("offset", 0)):
            run.rows[number] = json.loads(line)
        for line in files.get("wandb-summary.json", {"content": []})["content"]:
            run.summary = json.loads(line)
        run.preempting = sent.get("preempting", run.preempting)
        if sent.get("complete"):
            run.exit_code = sent["exitcode"]

    def fault_now(self) -> str:
        """The fault of the next request."""
        with self.lock:
            if self.fault != "none" and self.faulty is not None:
                self.faulty -= 1
                if self.faulty < 0:
                    self.fault = "none"
            return self.fault

    def run(self, name: str) -> ReceivedRun:
        """The run, made at its first mention."""
        with self.lock:
            return self.runs.setdefault(name, ReceivedRun(name))

    def _upsert(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.run(given["name"])
        run.display_name = given.get("displayName") or run.display_name
        run.group, run.sweep = given.get("groupName") or run.group, given.get("sweep") or run.sweep
        run.tags = given.get("tags") or run.tags
        run.config |= json.loads(given.get("config") or "{}")
        return self._bucket(run)

    def _bucket(self, run: ReceivedRun) -> dict[str, Any]:
        return {
            "id": run.name,
            "name": run.name,
            "displayName": run.display_name,
            "description": None,
            "config": json.dumps(run.config),
            "sweepName": run.sweep,
            "project": {"id": "p", "name": PROJECT, "entity": _ENTITY},
            "historyLineCount": len(run.rows),
        }

    def _resumed(self, name: str) -> dict[str, Any] | None:
        run = self.runs.get(name)
        if run is None:
            return None
        tail = json.dumps([json.dumps(run.rows[max(run.rows)])] if run.rows else [])
        return self._bucket(run) | {
            "summaryMetrics": json.dumps(run.summary),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyTail": tail,
            "eventsTail": "[]",
            "tags": run.tags,
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }

    def _sweep(self) -> dict[str, Any]:
        return {
            "id": "sweep",
            "name": "sweep",
            "bestLoss": None,
            "config": yaml.safe_dump(self.sweep),
            "state": "RUNNING",
            "runs": {"edges": [], "pageInfo": {"hasNextPage": False, "endCursor": None}},
        }

    def _commands(self, running: dict[str, bool]) -> list[dict[str, Any]]:
        if running:
            return []
        if not self.points:
            return [{"type": "exit"}]
        point, number = self.points.pop(0), len(self.points)
        arguments = {name: {"value": value} for name, value in point.items()}
        return [{"type": "run", "run_id": f"point{number}", "program": self.sweep["program"], "args": arguments}]


_ENTITY = {"id": "e", "name": TEAM}
_VIEWER = {
    "id": "u",
    "entity": TEAM,
    "username": TEAM,
    "email": "someone@example.org",
    "flags": "{}",
    "admin": False,
    "teams": {"edges": [{"node": {"name": TEAM}}]},
}


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: WandbServer

    def log_message(self, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        body, state = self._body(), self.state
        fault = state.fault_now()
        if fault == "drop":
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(state.delay)
        if fault == "error":
            self._reply(500, {"error": "the test asked for it"})
        elif self.path == "/graphql":
            request = json.loads(body)
            self._reply(200, {"data": state.answer(request["query"], request.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            state.stream(state.run(self.path.split("/")[-2]), json.loads(body))
            self._reply(200, {})
        elif self.path.startswith("/upload/"):
            _, _, run, name = self.path.split("/", 3)
            state.run(run).files[name] = body
            self._reply(200, {})
        else:
            self._reply(404, {})

    do_GET = do_POST = do_PUT = _handle

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients close connections whenever they like."""


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """Serve on a free port until the block ends; afterwards connections are refused."""
    state = WandbServer()
    handler = type("Handler", (_Handler,), {"state": state})
    server = _Server(("127.0.0.1", 0), handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
