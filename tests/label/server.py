"""A real MONAI Label server as a process of its own, and a client that sends what the viewers' plugins send."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# MONAI Label needs older versions than the newest of some packages, so it has an environment of its own.
PYTHON = os.environ.get("MONAI_UNLEARN_LABEL_PYTHON") or (sys.executable if find_spec("monailabel") else None)
REASON = "MONAI Label is not installed here; name the Python that has it with MONAI_UNLEARN_LABEL_PYTHON"
PATIENCE = 600  # seconds that a task may take on a busy machine


class Server:
    """The server of one folder of studies, on loopback.

    Args:
        studies: the folder; ``site.json`` and ``log.txt`` lie beside it.
        environment: further variables.
    """

    def __init__(self, studies: Path, **environment: str) -> None:
        self.studies = studies
        self.log = studies.parent / "log.txt"
        self.token: str | None = None
        self._environment = environment
        self.port = 0
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        assert PYTHON is not None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        shipped = subprocess.run(
            [PYTHON, "-m", "monai_unlearn", "path", "label_app"], capture_output=True, text=True, check=True
        ).stdout.strip()
        # A copy, as docs/monai_label.md says: MONAI Label makes folders in it, and two servers that start at the same
        # moment in one both find a folder missing, so that one of them fails to make it.
        app = self.studies.parent / "app"
        shutil.copytree(shipped, app, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        command = ["-m", "monailabel.main", "start_server", "--app", str(app), "--studies", str(self.studies)]
        command += ["--conf", "site", str(self.studies.parent / "site.json"), "--host", "127.0.0.1"]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MONAI_LABEL_AUTO_UPDATE_SCORING": "false",
            "MONAI_LABEL_SESSION_PATH": str(self.studies.parent / "sessions"),
            **self._environment,
        }
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [PYTHON, *command, "--port", str(self.port), "--access_log"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.studies.parent,
                start_new_session=True,
            )
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"The server ended: {self.log.read_text()[-3000:]}")
            try:
                urllib.request.urlopen(f"{self.url}/unlearn/page", timeout=5).close()
                return
            except OSError:
                time.sleep(0.5)
        raise TimeoutError(self.log.read_text()[-3000:])

    def kill(self) -> None:
        """End it and all its tasks at once, as a power cut does."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def call(
        self, method: str, path: str, body: Any = None, form: Mapping[str, Any] | None = None, raw: bytes | None = None
    ) -> tuple[int, Any]:
        """Status, and content: JSON where it is, else text."""
        headers, data = {}, raw
        if body is not None:
            headers["Content-Type"], data = "application/json", json.dumps(body).encode()
        elif form is not None:
            boundary = uuid.uuid4().hex
            headers["Content-Type"] = f"multipart/form-data; boundary={boundary}"
            data = (
                b"".join(_part(boundary, name, value) for name, value in form.items()) + f"--{boundary}--\r\n".encode()
            )
        elif raw is not None:
            headers["Content-Type"] = "application/json"
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, _content(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, _content(error.read())

    def get(self, path: str) -> Any:
        """Content of what has to be there."""
        status, content = self.call("GET", path)
        assert status == 200, (path, status, content)
        return content

    def infer(self, image: str, model: str = "opacity") -> dict[str, Any]:
        """Classify an image of the datastore."""
        status, content = self.call(
            "POST", f"/infer/{model}?image={urllib.parse.quote(image)}&output=json", form={"params": "{}"}
        )
        assert status == 200, content
        return content

    def train(self, model: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Start a training as 3D Slicer does, and wait for its end; returns the task."""
        status, task = self.call("POST", f"/train/{model}", dict(params or {}))
        assert status == 200, task
        return self.wait(task["id"])

    def wait(self, id: str) -> dict[str, Any]:
        """Wait for the end of a task."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            task = next((one for one in self.get("/train/?all=true") if one["id"] == id), {"status": "?"})
            if task["status"] not in ("SUBMITTED", "RUNNING"):
                return task
            time.sleep(0.5)
        raise TimeoutError(task)

    def running(self) -> dict[str, Any]:
        """Wait until a task's process is there: MONAI Label answers before it has started one."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            status, task = self.call("GET", "/train/?check_if_running=true")
            if status == 200:
                return task
            time.sleep(0.05)
        raise TimeoutError(task)

    def until(self, id: str, *states: str) -> dict[str, Any]:
        """Wait until a deletion request is in one of these states."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            request = self.get(f"/unlearn/{id}")
            if request["state"] in states:
                return request
            time.sleep(0.2)
        raise TimeoutError(request)


def _part(boundary: str, name: str, value: Any) -> bytes:
    file = isinstance(value, tuple)
    extra = f'; filename="{value[0]}"\r\nContent-Type: application/octet-stream' if file else ""
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'
    return head.encode() + (value[1] if file else str(value).encode()) + b"\r\n"


def _content(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode("utf-8", "replace")
