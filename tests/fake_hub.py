"""The part of the hub's HTTP interface that fetching a model needs, on this machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import threading
import time
from pathlib import Path

SHA = "0123456789abcdef0123456789abcdef01234567"
REPO = "tiny/model"
REFUSED = {  # other names → what they are answered
    "tiny/gated": (403, "GatedRepo"),
    "tiny/private": (401, "RepoNotFound"),
    "tiny/forbidden": (403, ""),
    "tiny/broken": (503, ""),
}


def environment_for(url: str, folder: Path) -> dict[str, str]:
    """Variables of a process whose hub is at `url` and whose cache is in `folder`; the client reads them at import."""
    return {
        "PATH": os.environ["PATH"], "HF_ENDPOINT": url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    }  # fmt: skip


class FakeHub:
    """A hub with the files of `folder` as tiny/model at commit SHA, which the branch main is at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []  # method and path of every request
        self.served: dict[str, int] = {}
        self.chunk_delay = 0.0
        self.corrupt = ""
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format, *args):
                pass

            def do_HEAD(self):
                self.respond(body=False)

            def do_GET(self):
                self.respond(body=True)

            def respond(self, body: bool):
                path = self.path.partition("?")[0]
                hub.asked.append(f"{self.command} {path}")
                answers = {
                    f"/api/models/{REPO}": hub.listing,
                    f"/api/models/{REPO}/revision/main": hub.listing,
                    f"/api/models/{REPO}/revision/{SHA}": hub.listing,
                    f"/api/models/{REPO}/tree/{SHA}": hub.tree,
                }
                refused = next((answer for name, answer in REFUSED.items() if f"/{name}" in path), None)
                if path in answers:
                    self.reply(200, json.dumps(answers[path]()).encode(), {"Content-Type": "application/json"}, body)
                elif path.startswith(f"/{REPO}/resolve/{SHA}/"):
                    self.serve(path.rpartition("/")[2], body)
                elif refused:
                    self.reply(refused[0], b"{}", {"X-Error-Code": refused[1]} if refused[1] else {}, body)
                else:
                    missing = "RevisionNotFound" if f"/{REPO}/" in path else "RepoNotFound"
                    self.reply(404, b"{}", {"X-Error-Code": missing}, body)

            def serve(self, name: str, body: bool):
                content = (hub.folder / name).read_bytes()
                if name == hub.corrupt:
                    content = content[:-1] + bytes([content[-1] ^ 1])
                headers = {"ETag": f'"{hub.etag(name)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
                status, start = 200, 0
                wanted = self.headers.get("Range")
                if wanted and body:
                    start = int(wanted.removeprefix("bytes=").partition("-")[0])
                    status = 206
                    headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                if body:
                    hub.served[name] = hub.served.get(name, 0) + 1
                self.reply(status, content[start:], headers, body)

            def reply(self, status: int, content: bytes, headers: dict, body: bool):
                self.send_response(status)
                for key, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(key, value)
                self.end_headers()
                for start in range(0, len(content) if body else 0, 8192):
                    self.wfile.write(content[start : start + 8192])
                    time.sleep(hub.chunk_delay if len(content) > 20_000 else 0)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def etag(self, name: str) -> str:
        content = (self.folder / name).read_bytes()
        if name.endswith(".safetensors"):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def _files(self) -> list[tuple[str, int, dict | None]]:
        """Name, bytes and, of large files, what git's storage of them says."""
        found = []
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            name, size = path.relative_to(self.folder).as_posix(), path.stat().st_size
            large = {"size": size, "pointerSize": 134} if path.suffix == ".safetensors" else None
            found.append((name, size, large))
        return found

    def listing(self) -> dict:
        siblings = []
        for name, size, large in self._files():
            lfs = {"lfs": large | {"sha256": self.etag(name)}} if large else {}
            blob = "0" * 40 if large else self.etag(name)
            siblings.append({"rfilename": name, "size": size, "blobId": blob, **lfs})
        return {"_id": "1", "id": REPO, "modelId": REPO, "sha": SHA, "siblings": siblings, "tags": []}

    def tree(self) -> list[dict]:
        return [
            {"type": "file", "path": name, "size": size, "oid": "0" * 40 if large else self.etag(name)}
            | ({"lfs": large | {"oid": self.etag(name)}} if large else {})
            for name, size, large in self._files()
        ]
