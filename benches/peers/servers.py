"""The servers everything is fetched from: versitygw (S3, signed) and nginx (ranges of plain files, unsigned).

`Processes` starts them, and every mount, and ends what it started in the opposite order, whatever happens.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import http.client
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.parse
from pathlib import Path

# A mount or a server that is not there by then is a failure, not a slow start.
START_SECONDS = 30
STOP_SECONDS = 30

ACCESS_KEY, SECRET_KEY, REGION, BUCKET = "modelfs-bench", "not-a-secret-of-anyone", "us-east-1", "bench"


class Failed(Exception):
    """Something that had to be started, sealed or read did not do it; the message says what and how."""


class Processes:
    """Child processes with a log each; `stop` waits for them and then kills them."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, command: list[str], env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        with (self._logs / f"{name}.log").open("ab") as log:
            # A session of its own: Ctrl-C at the terminal reaches this program alone, which then stops the others.
            process = subprocess.Popen(
                command,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._running.append((name, process))
        return process

    def stop(self, process: subprocess.Popen[bytes], sign: int = signal.SIGTERM) -> None:
        if process.poll() is None:
            process.send_signal(sign)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running = [(name, running) for name, running in self._running if running is not process]

    def stop_all(self) -> None:
        for _, process in reversed(self._running.copy()):
            self.stop(process)

    def tail(self, name: str, lines: int = 5) -> str:
        try:
            return "\n".join((self._logs / f"{name}.log").read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""


def run(command: list[str], env: dict[str, str] | None = None, timeout: float = 900) -> str:
    """Runs to the end; its output, or `Failed` with the last lines of what it said."""
    done = subprocess.run(
        command,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise Failed(
            f"{Path(command[0]).name} {command[1] if len(command) > 1 else ''}: exit status {done.returncode}: {said}"
        )
    return done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(port: int, name: str, process: subprocess.Popen[bytes], processes: Processes) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise Failed(f"{name} does not answer on port {port}: {processes.tail(name)}")


class S3:
    """versitygw over a folder; its objects are plain files below it: so sizes are taken, and caches warmed.

    With connections kept, as the services it stands for do; it would close each after one answer.
    """

    def __init__(self, program: Path, folder: Path, processes: Processes) -> None:
        (folder / BUCKET).mkdir(parents=True)
        self.folder = folder / BUCKET
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        env = {"ROOT_ACCESS_KEY": ACCESS_KEY, "ROOT_SECRET_KEY": SECRET_KEY}
        command = [str(program), "--port", f"127.0.0.1:{self.port}", "--quiet", "--keep-alive", "posix", str(folder)]
        self.process = processes.start("versitygw", command, env)
        _wait_for_port(self.port, "versitygw", self.process, processes)

    def client_env(self) -> dict[str, str]:
        """What AWS clients, modelfs among them, take their settings from."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ALLOW_HTTP": "true",
        }

    def _signature(self, method: str, path: str, query: str, headers: dict[str, str], now: str) -> tuple[str, str]:
        """The signed headers' names and the hex signature, by AWS Signature Version 4."""
        scope = f"{now[:8]}/{REGION}/s3/aws4_request"
        names = ";".join(sorted(headers))
        lines = [
            method,
            path,
            query,
            *(f"{name}:{headers[name]}" for name in sorted(headers)),
            "",
            names,
            "UNSIGNED-PAYLOAD",
        ]
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        key = f"AWS4{SECRET_KEY}".encode()
        for word in (*scope.split("/"), "\n".join(["AWS4-HMAC-SHA256", now, scope, digest])):
            key = hmac.digest(key, word.encode(), "sha256")
        return names, key.hex()

    def put(self, key: str, file: Path) -> None:
        """Uploads one file in one request."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        path = urllib.parse.quote(f"/{BUCKET}/{key}")
        headers = {"host": f"127.0.0.1:{self.port}", "x-amz-content-sha256": "UNSIGNED-PAYLOAD", "x-amz-date": now}
        names, signature = self._signature("PUT", path, "", headers, now)
        headers["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/{now[:8]}/{REGION}/s3/aws4_request, SignedHeaders={names}, "
            f"Signature={signature}"
        )
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300, blocksize=1 << 20)
        with file.open("rb") as body:
            connection.request("PUT", path, body, {**headers, "content-length": str(file.stat().st_size)})
            answer = connection.getresponse()
            said = answer.read()
        connection.close()
        if answer.status != 200:
            raise Failed(f"PUT {key}: {answer.status} {said[:200]!r}")

    def put_tree(self, prefix: str, folder: Path) -> None:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.put(f"{prefix}/{file.relative_to(folder)}", file)

    def presigned(self, key: str) -> str:
        """A URL that a client without credentials may GET for a day."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        path = urllib.parse.quote(f"/{BUCKET}/{key}")
        query = urllib.parse.urlencode(
            {
                "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
                "X-Amz-Credential": f"{ACCESS_KEY}/{now[:8]}/{REGION}/s3/aws4_request",
                "X-Amz-Date": now,
                "X-Amz-Expires": "86400",
                "X-Amz-SignedHeaders": "host",
            },
            quote_via=urllib.parse.quote,
        ).replace("/", "%2F")
        _, signature = self._signature("GET", path, query, {"host": f"127.0.0.1:{self.port}"}, now)
        return f"{self.endpoint}{path}?{query}&X-Amz-Signature={signature}"


class Nginx:
    """nginx over a folder of plain files: the fastest server of ranges that is at hand."""

    def __init__(self, folder: Path, scratch: Path, processes: Processes) -> None:
        program = shutil.which("nginx") or "/usr/sbin/nginx"
        scratch.mkdir()
        self.port = free_port()
        user = "user root;" if os.geteuid() == 0 else ""
        (scratch / "n.conf").write_text(
            f"daemon off; worker_processes 2; {user} pid {scratch}/n.pid; error_log {scratch}/error.log;"
            "events{worker_connections 1024;}"
            f"http{{access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000;"
            f"client_body_temp_path {scratch}/b; proxy_temp_path {scratch}/p; fastcgi_temp_path {scratch}/f;"
            f"uwsgi_temp_path {scratch}/u; scgi_temp_path {scratch}/s;"
            f"server{{listen 127.0.0.1:{self.port}; root {folder};}}}}"
        )
        command = [program, "-p", str(scratch), "-e", str(scratch / "error.log"), "-c", str(scratch / "n.conf")]
        self.process = processes.start("nginx", command)
        _wait_for_port(self.port, "nginx", self.process, processes)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"
