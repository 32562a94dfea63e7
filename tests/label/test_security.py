"""Who may do what on the new routes, and what they make of nonsense."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
from server import PYTHON, REASON, Server
from studies import write_studies

pytestmark = pytest.mark.skipif(PYTHON is None, reason=REASON)

# Tokens as an identity provider gives them; MONAI Label brings the libraries.
TOKENS = """
import json, sys, time
import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
def token(roles, ends=3600):
    content = {"preferred_username": "u", "email": "e", "name": "n", "realm_access": {"roles": roles}}
    content["exp"] = time.time() + ends
    return jwt.encode(content, key, algorithm="RS256")
print(json.dumps({
    "public_key": "".join(public.decode().splitlines()[1:-1]),
    "admin": token(["monailabel-admin", "monailabel-user"]),
    "user": token(["monailabel-user"]),
    "nobody": token([]),
    "late": token(["monailabel-admin", "monailabel-user"], -60),
}))
"""


@pytest.fixture(scope="module")
def realm() -> Iterator[dict[str, str]]:
    """An identity provider that does nothing but show its key."""
    assert PYTHON is not None
    made = json.loads(subprocess.run([PYTHON, "-c", TOKENS], capture_output=True, text=True, check=True).stdout)

    class Realm(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = json.dumps({"public_key": made["public_key"], "token_endpoint": "http://127.0.0.1/none"}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Realm)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {**made, "url": f"http://127.0.0.1:{server.server_port}/realms/monailabel"}
    server.shutdown()


# MONAI Label 0.8.5 does not tell PyJWT which algorithm to expect, and so refuses every token. For roles to be tried at
# all, the server gets a PyJWT that takes it for the usual one.
MENDED = """
import jwt
plain = jwt.decode
jwt.decode = lambda token, key="", algorithms=None, **rest: plain(token, key, algorithms or ["RS256"], **rest)
"""
ADMIN = [
    ("POST", "/train/unlearn"),
    ("POST", "/train/"),
    ("DELETE", "/train/"),
    ("DELETE", "/datastore/image?id=none"),
    ("DELETE", "/datastore/?id=none"),
    ("POST", "/unlearn/r000000000000/retry"),
    ("DELETE", "/unlearn/r000000000000"),
    ("POST", "/unlearn/rollback"),
    ("POST", "/unlearn/finalise"),
    ("PUT", "/model/classifier"),
    ("DELETE", "/model/classifier"),
]
USER = [
    ("GET", "/unlearn/"),
    ("GET", "/train/"),
    ("GET", "/unlearn/r000000000000"),
    ("GET", "/unlearn/r000000000000/report.json"),
    ("GET", "/unlearn/r000000000000/report.html"),
]


def test_the_servers_own_roles_hold_on_every_route(tmp_path: Path, realm: dict[str, str]) -> None:
    write_studies(tmp_path / "studies", patients=2, size=8)
    (tmp_path / "mended").mkdir()
    (tmp_path / "mended" / "sitecustomize.py").write_text(MENDED)
    signed = {"MONAI_LABEL_AUTH_ENABLE": "true", "MONAI_LABEL_AUTH_REALM_URI": realm["url"]}
    signed["PYTHONPATH"] = str(tmp_path / "mended")
    with Server(tmp_path / "studies", **signed) as server:
        paths = server.get("/openapi.json")["paths"]
        own = {(verb.upper(), path) for path, verbs in paths.items() if "unlearn" in path for verb in verbs}
        tried = {(verb, path.replace("r000000000000", "{id}")) for verb, path in [*ADMIN, *USER]}
        tried = {(verb, path.replace("report.json", "report.{kind}")) for verb, path in tried}
        assert own - tried == {("GET", "/unlearn/page")}  # it holds nothing but what it asks for
        for who, admin, user in (
            (None, 401, 401),
            ("nonsense", 401, 401),
            (realm["late"], 401, 401),
            (realm["nobody"], 403, 403),
            (realm["user"], 403, None),
            (realm["admin"], None, None),
        ):
            server.token = who
            for routes, status in ((ADMIN, admin), (USER, user)):
                for verb, path in routes:
                    got, content = server.call(verb, path, {} if verb == "POST" else None)
                    if status is None:
                        assert got in (200, 404, 409), (verb, path, got, content)
                    else:
                        assert got == status, (verb, path, got, content)
        server.token = realm["admin"]
        assert server.get("/datastore/")["total"] == 4


@pytest.mark.skipif(find_spec("schemathesis") is None, reason="schemathesis is not installed here")
def test_nonsense_is_answered_as_the_description_says(tmp_path: Path) -> None:
    write_studies(tmp_path / "studies", patients=2, size=8)
    with Server(tmp_path / "studies") as server:
        checks = "not_a_server_error,status_code_conformance,content_type_conformance"
        for chosen in (
            ["--include-path-regex", "^/(unlearn|train/unlearn)"],
            ["--include-path", "/datastore/image", "--exclude-method-regex", "PUT|GET|HEAD"],
        ):
            command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", *chosen]
            command += [
                "--checks",
                checks,
                "--max-examples",
                "40",
                "--seed",
                "1",
                "--no-color",
                "--request-timeout",
                "60",
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
            assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert server.get("/datastore/")["total"] == 4
        assert server.get("/unlearn/")["requests"] == []
