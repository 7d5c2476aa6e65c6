"""A fake Kaggle server on loopback: an HTTP proxy that answers the kaggle program and simulates faults on request."""

import io
import json
import threading
import time
import zipfile
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SLUG = "toy-competition"
USER, KEY, TOKEN = "someone", "planted-key-0123456789", "planted-token-9876543210"


def archive(files: dict[str, bytes | str], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as out:
        for name, content in files.items():
            out.writestr(name, content)
    return stream.getvalue()


@dataclass
class Reply:
    """An answer other than status 200 with JSON; with `message` its body is a JSON error as Kaggle sends it."""

    status: int = 200
    message: str | None = None
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


HANG, DROP = "hang", "drop"  # send no answer and keep the connection open, or close it


class Kaggle(ThreadingHTTPServer):
    """The server with its state and its faults.

    `on[name]` overrides the answer to an API method (or to PUT, GET): a dict (JSON), a Reply, HANG, DROP, a function of
    the request's body, or a list of such answers, used one after the other; the last one is then repeated.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, files: dict[str, bytes] | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files or {"train.csv": b"id,label\n1,0\n", "sample_submission.csv": b"id,label\n1,0\n2,0\n"}
        self.listing = {name: len(content) for name, content in self.files.items()}
        self.archive = archive(self.files)
        self.blobs: dict[str, bytes] = {}  # further files by path
        self.on: dict = {}
        self.asked: list[tuple[str, dict, dict]] = []  # method or "GET path", body, headers
        self.uploads: list[bytes] = []
        self.submissions: list[dict] = []
        self.polls_until_score = 1
        self.public, self.private = "0.9", "0.8"
        self.outcome, self.reason = "COMPLETE", ""
        self.allowed_now = 9
        self.cut_after: list[int] = []  # bytes after which the connection is closed, one entry per request
        self.stall_after: int | None = None
        self.bytes_per_second: float = 0
        self.sent = 0  # bytes of files, all downloads together
        self.leaderboard = [0.99, 0.9, 0.5]
        self.kernel_states = ["RUNNING", "COMPLETE"]
        self.kernel_failure = ""
        self.kernel_files: dict[str, bytes] = {}
        self.released = threading.Event()
        self.counts: dict[str, int] = defaultdict(int)
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    @property
    def port(self) -> int:
        return self.server_address[1]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """Ignore errors: clients that tests kill leave broken pipes behind."""

    def calls(self, name: str) -> list[dict]:
        return [body for asked, body, _ in self.asked if asked == name]

    # Answers of the API without faults.

    def ListDataFiles(self, body: dict) -> dict:
        size, start = body.get("pageSize", 20), int(body.get("pageToken") or 0)
        names = list(self.listing)
        files = [{"name": name, "ref": name, "totalBytes": self.listing[name]} for name in names[start : start + size]]
        return {"files": files, "nextPageToken": str(start + size) if start + size < len(names) else ""}

    def DownloadDataFiles(self, body: dict) -> Reply:
        return self.redirect(f"/storage/{body['competitionName']}/archive.zip")

    def DownloadDataFile(self, body: dict) -> Reply:
        if body["fileName"] not in self.files:
            return Reply(404, "Not Found")
        return self.redirect(f"/storage/files/{body['fileName']}")

    def redirect(self, path: str) -> Reply:
        return Reply(302, headers={"Location": f"http://localhost{path}?sig=signed-secret"})

    def StartSubmissionUpload(self, body: dict) -> dict:
        return {"token": "t", "createUrl": "http://localhost/upload/t"}

    def CreateSubmission(self, body: dict) -> dict:
        return self.submitted(body["submissionDescription"], "submission.csv")

    def CreateCodeSubmission(self, body: dict) -> dict:
        return self.submitted(body["submissionDescription"], body["fileName"])

    def submitted(self, description: str, name: str) -> dict:
        ref = 1000 + len(self.submissions)
        date = "2026-01-02T03:04:05.000Z"
        row = {"ref": ref, "description": description, "fileName": name, "date": date, "polls": 0}
        self.submissions.insert(0, row)
        return {"message": "Successfully submitted to Toy", "ref": ref}

    def GetSubmissionLimits(self, body: dict) -> dict:
        return {"numToday": 1, "numTotal": 10, "numAllowedNow": self.allowed_now}

    def ListSubmissions(self, body: dict) -> dict:
        rows = []
        for submission in self.submissions:
            submission["polls"] += 1
            row = {key: value for key, value in submission.items() if key != "polls"}
            if "status" not in row:
                scored = submission["polls"] >= self.polls_until_score
                row["status"] = self.outcome if scored else "PENDING"
                if scored and self.outcome == "COMPLETE":
                    row |= {"publicScore": self.public, "privateScore": self.private}
                if scored and self.reason:
                    row["errorDescription"] = self.reason
            rows.append(row)
        size, page = body.get("pageSize", 20), body.get("page", 1)
        return {"submissions": rows[size * (page - 1) : size * page], "nextPageToken": ""}

    def DownloadLeaderboard(self, body: dict) -> Reply:
        lines = ["Rank,TeamId,TeamName,LastSubmissionDate,Score,SubmissionCount,TeamMemberUserNames"]
        lines += [f"{n + 1},{n},team {n},2026-01-01,{s},1,x" for n, s in enumerate(self.leaderboard)]
        content = archive({f"{body['competitionName']}-publicleaderboard.csv": "\n".join(lines) + "\n"})
        return Reply(200, body=content, headers={"Content-Type": "application/zip"})

    def IntrospectToken(self, body: dict) -> dict | Reply:
        return {"active": True, "username": USER} if body["token"] == TOKEN else Reply(404, "Not Found")

    def GetDatasetStatus(self, body: dict) -> dict | Reply:
        return {"status": "READY"} if self.counts["CreateDataset"] else Reply(404, "Not Found")

    def StartBlobUpload(self, body: dict) -> dict:
        return {"token": f"blob-{body['name']}", "createUrl": f"http://localhost/upload/{body['name']}"}

    def CreateDataset(self, body: dict) -> dict:
        return {"url": "https://www.kaggle.com/datasets/x", "status": "ok", "ref": "x"}

    CreateDatasetVersion = CreateDataset

    def SaveKernel(self, body: dict) -> dict:
        return {"ref": body["slug"], "url": f"https://www.kaggle.com/code/{body['slug']}", "versionNumber": 3}

    def GetKernelSessionStatus(self, body: dict) -> dict:
        state = self.kernel_states[min(self.counts["GetKernelSessionStatus"], len(self.kernel_states)) - 1]
        failure = {"failureMessage": self.kernel_failure} if state == "ERROR" and self.kernel_failure else {}
        return {"status": state, **failure}

    def ListKernelSessionOutput(self, body: dict) -> dict:
        files = [{"fileName": n, "url": f"http://localhost/storage/kernel/{n}"} for n in self.kernel_files]
        return {"files": files, "log": "the notebook's log", "nextPageToken": ""}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Kaggle

    def log_message(self, *args) -> None:
        """Discard the log lines."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        self.answer(urlsplit(self.path).path.rsplit("/", 1)[-1], body)

    def do_PUT(self) -> None:
        if self.server.on.get("PUT") == DROP:  # before the body is read
            self.server.asked.append(("PUT", {}, dict(self.headers)))
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.server.uploads.append(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        self.answer("PUT", {})

    def do_GET(self) -> None:
        self.answer("GET", {"path": urlsplit(self.path).path})

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, name: str, body: dict) -> None:
        server = self.server
        server.asked.append((name, body, dict(self.headers)))
        server.counts[name] += 1
        fault = server.on.get(name)
        if isinstance(fault, list):
            fault = fault.pop(0) if len(fault) > 1 else fault[0]
        usual = {"GET": self.storage, "PUT": lambda _: Reply()}
        reply = fault if fault is not None else usual.get(name) or getattr(server, name)
        if callable(reply):
            reply = reply(body)
        if reply is None:  # `storage` has already sent the answer
            return
        if reply == HANG:
            server.released.wait(60)
            self.close_connection = True
            return
        if reply == DROP:
            self.close_connection = True
            self.connection.shutdown(2)
            return
        if isinstance(reply, dict):
            reply = Reply(200, body=json.dumps(reply).encode(), headers={"Content-Type": "application/json"})
        if reply.message is not None:
            text = json.dumps({"code": reply.status, "message": reply.message}).encode()
            reply = Reply(reply.status, body=text, headers={"Content-Type": "application/json", **reply.headers})
        self.send_response(reply.status)
        for header, value in reply.headers.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        self.wfile.write(reply.body)

    def content(self, path: str) -> bytes | None:
        server = self.server
        if path in server.blobs:
            return server.blobs[path]
        if path.endswith("/archive.zip"):
            return server.archive
        if "/kernel/" in path:
            return server.kernel_files.get(path.rsplit("/", 1)[-1])
        return server.files.get(path.partition("/files/")[2])

    def storage(self, body: dict) -> Reply | None:
        """Send a file, honouring Range and If-Range, cut or stalled by the server's `cut_after` and `stall_after`."""
        server, content = self.server, self.content(body["path"])
        if content is None:
            return Reply(404)
        etag = f'"{hash(content) & 0xFFFFFFFF:x}"'
        start, wanted = 0, self.headers.get("Range")
        if wanted and self.headers.get("If-Range", etag) == etag:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            if start >= len(content):
                return Reply(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for header, value in (
            ("Content-Length", str(len(content) - start)),
            ("ETag", etag),
            ("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT"),
            ("Accept-Ranges", "bytes"),
        ):
            self.send_header(header, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        stop = len(content)
        if server.cut_after:
            stop = min(stop, start + server.cut_after.pop(0))
        if server.stall_after is not None:
            stop = min(stop, start + server.stall_after)
        step = 1 << 20 if not server.bytes_per_second else max(1, int(server.bytes_per_second / 20))
        for position in range(start, stop, step):
            self.wfile.write(content[position : min(stop, position + step)])
            server.sent += min(stop, position + step) - position
            if server.bytes_per_second:
                time.sleep(0.05)
        if stop < len(content):
            self.wfile.flush()
            if server.stall_after is not None:
                server.released.wait(60)
            self.close_connection = True
            self.connection.shutdown(2)
        return None
