"""A server that implements as much of wandb's protocol as a run needs, and records what it receives."""

from __future__ import annotations

import gzip
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "somebody"


@dataclass
class RunOnServer:
    """What the server has of one run."""

    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Rows by line number of the file; a line that is sent again replaces the old one."""
    summary: dict[str, Any] = field(default_factory=dict)
    config: str = "{}"
    project: str = ""


@dataclass
class WandbServer:
    url: str = ""
    runs: dict[str, RunOnServer] = field(default_factory=dict)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    """GraphQL operations received, in order."""
    flows: bool = True
    """Whether lines of files are accepted; otherwise the client is asked to retry."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        history = self.runs[run_id].history
        return [history[number] for number in sorted(history)]

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL response; empty for operations that no run needs."""
        self.operations.append(operation)
        if operation == "Viewer":
            teams = {"edges": [{"node": {"name": ENTITY}}]}
            facts = {"id": "1", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": teams, "email": ""}
            return {"viewer": facts, "serverInfo": None}
        if operation == "RunResumeStatus":
            return {"model": self._model(variables["name"])}
        if operation == "UpsertBucket":
            return {"upsertBucket": self._upsert(variables)}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/storage"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if operation == "NotifyScriptableRunAlert":
            self.alerts.append(variables)
            return {"notifyScriptableRunAlert": {"success": True}}
        return {}

    def _model(self, run_id: str) -> dict[str, Any] | None:
        run = self.runs.get(run_id)
        if run is None:
            return None
        tail = json.dumps([json.dumps(row) for row in self.rows(run_id)[-1:]])
        bucket = {"id": "b", "name": run_id, "displayName": run_id, "summaryMetrics": json.dumps(run.summary)}
        bucket |= {"historyLineCount": len(run.history), "historyTail": tail, "eventsLineCount": 0, "eventsTail": "[]"}
        started = json.dumps({"t": json.loads(run.config).get("_wandb", {}).get("value", {}).get("t")})
        bucket |= {"logLineCount": 0, "config": run.config, "tags": [], "wandbConfig": started}
        return {"id": "m", "name": run.project, "entity": {"id": "e", "name": ENTITY}, "bucket": bucket}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        new = variables["name"] not in self.runs
        run = self.runs.setdefault(variables["name"], RunOnServer(project=variables.get("project") or ""))
        if variables.get("config"):
            run.config = variables["config"]
        project = {"id": "p", "name": run.project, "entity": {"id": "e", "name": ENTITY}}
        bucket = {"id": "b", "name": variables["name"], "displayName": variables.get("displayName") or ""}
        bucket |= {
            "sweepName": "",
            "description": "",
            "config": run.config,
            "project": project,
            "historyLineCount": len(run.history),
        }
        return {"bucket": bucket, "inserted": new}

    def stream(self, run_id: str, body: dict[str, Any]) -> None:
        """Store lines of files; each part says the number of its first line."""
        run = self.runs[run_id]
        files = body.get("files") or {}
        history = files.get("wandb-history.jsonl", {})
        for number, line in enumerate(history.get("content", []), history.get("offset", 0)):
            run.history[number] = json.loads(line)
        for line in files.get("wandb-summary.json", {}).get("content", []):
            run.summary = json.loads(line)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that a test kills close the connection: not an error of the server."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    state = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._answer({})

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                data = gzip.decompress(data)
            with state.lock:
                if self.path.endswith("/graphql"):
                    body = json.loads(data)
                    name = re.search(r"(?:query|mutation)\s+(\w+)", body["query"])
                    operation = body.get("operationName") or (name[1] if name else "")
                    content: Any = {"data": state.answer(operation, body.get("variables") or {})}
                elif self.path.endswith("/file_stream") and not state.flows:
                    return self._answer({}, 503)
                elif self.path.endswith("/file_stream"):
                    state.stream(self.path.split("/")[-2], json.loads(data))
                    content = {}
                else:
                    content = {}
            self._answer(content)

        def _answer(self, content: Any, status: int = 200) -> None:
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *_: Any) -> None:
            pass

    with _Server(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
