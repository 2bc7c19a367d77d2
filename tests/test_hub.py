"""Downloads by huggingface_hub from a small hub on loopback, which also refuses, breaks off and lies."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

ROOT = Path(__file__).parents[1]
DEV = "black-forest-labs/FLUX.1-dev"
COMMIT = "a" * 40
TRANSFORMER = "flux1-random.safetensors"
ASK = """
import json, sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 4096  # or small files would be resumed from their beginning
from pathlib import Path
from flux.finding import find_files
from lora.finding import find_lora
for model in sys.argv[1:]:
    try:
        lora = model.partition("lora=")[2]
        result = {"file": str(find_lora(Path(lora)))} if lora else {"folder": str(find_files(model).folder)}
    except (OSError, ValueError) as error:
        result = {"error": str(error)}
    print("RESULT", json.dumps(result))
"""


@dataclass
class Hub:
    """What the server has and was asked; a repository's name says how it behaves."""

    files: dict[str, bytes]
    klein: dict[str, bytes]
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
    broken: set[str] = field(default_factory=set)
    endpoint: str = ""

    def files_of(self, repo: str) -> dict[str, bytes]:
        return self.klein if "klein" in repo else self.files

    def of(self, repo: str) -> list[tuple[str, str, str]]:
        return [request for request in self.requests if repo in request[1]]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        self.hub.requests.append((self.command, self.path, self.headers.get("Range", "")))
        path = self.path.split("?")[0]
        if path.startswith("/api/models/"):
            repo = path.removeprefix("/api/models/")
            siblings = [{"rfilename": name} for name in self.hub.files_of(repo)]
            return self.send(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode(), {})
        repo, _, file = path[1:].partition("/resolve/main/")
        if repo in (DEV, "test/forbidden"):
            status = 401 if repo == DEV else 403
            message = f"Access to model {repo} is restricted."
            return self.send(status, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": message})
        body = self.hub.files_of(repo)[file]
        etag = hashlib.sha256(body).hexdigest()
        if repo == "test/wrong" and file == TRANSFORMER:
            body = body[:-1] + bytes([body[-1] ^ 1])
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        first = int(self.headers.get("Range", "bytes=0-")[6:].rstrip("-"))
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
        ends = len(body)
        if with_body and repo == "test/breaks" and file == TRANSFORMER and not self.hub.broken:
            self.hub.broken.add(file)
            ends = len(body) // 2
            self.close_connection = True
        self.send(206 if first else 200, body[first:], headers, body[first:ends] if with_body else b"")

    def send(self, status: int, body: bytes, headers: dict[str, str], sent: bytes | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if sent is None else sent)


@pytest.fixture(scope="module")
def hub(model, klein) -> Iterator[Hub]:
    """Serve the same small model as every repository, FLUX.2 klein where its name says so."""
    models = [files_in(folder) for folder in (model, klein)]
    for files in models:
        del files["config.json"]
    hub = Hub(*models)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OurHandler", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


def ask(hub: Hub, home: Path, *models: str, **settings: str) -> tuple[list[dict], str]:
    """Find the models in a process of its own; return what came of each, and all it printed."""
    environment = {name: x for name, x in os.environ.items() if not name.startswith(("HF_", "FLUX_"))}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": hub.endpoint, "PYTHONPATH": str(ROOT)}
    environment |= {"no_proxy": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"TQDM_POSITION": "-1", **settings}  # show bars though this is no terminal
    command = [sys.executable, "-c", ASK, *models]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    results = [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]
    return results, done.stdout + done.stderr


@pytest.fixture(scope="module")
def answers(hub, home) -> dict[str, dict]:
    models = [
        "test/first",
        "test/klein",
        "klein-4b",
        "flux-dev",
        "test/forbidden",
        "test/breaks",
        "test/wrong",
    ]
    results, printed = ask(hub, home, *models)
    return dict(zip(models, results)) | {"printed": printed}


def files_in(folder: Path | str) -> dict[str, bytes]:
    return {x.relative_to(folder).as_posix(): x.read_bytes() for x in Path(folder).rglob("*") if x.is_file()}


def test_first_download(hub, answers):
    assert files_in(answers["test/first"]["folder"]) == hub.files
    size = f"{len(hub.files[TRANSFORMER]) / 1e6:,.1f} MB"
    assert f"downloading {TRANSFORMER} of test/first, {size}" in answers["printed"]
    assert "100%" in answers["printed"]  # huggingface_hub's bar


def test_a_klein(hub, answers):
    """By its name and as somebody's, whose transformer tells what else to download; no word of FLUX.1's."""
    wanted = {name: x for name, x in hub.klein.items() if name != "tokenizer/tokenizer_config.json"}
    for name, repo in (("test/klein", "test/klein"), ("klein-4b", "black-forest-labs/FLUX.2-klein-base-4B")):
        assert files_in(answers[name]["folder"]) == wanted
        assert f"downloading text_encoder/model.safetensors of {repo}, " in answers["printed"]


@pytest.mark.parametrize("settings", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["online", "offline"])
def test_what_is_cached_is_not_asked_for(settings, hub, home, answers):
    before = len(hub.requests)
    (first, never), _ = ask(hub, home, "test/first", "test/never" if settings else "test/first", **settings)
    assert first == answers["test/first"]
    assert len(hub.requests) == before
    if settings:
        assert "test/never is not whole in the hub cache and cannot be downloaded" in never["error"]
        assert "HF_HUB_OFFLINE" in never["error"]


@pytest.mark.parametrize("name, repo", [("flux-dev", DEV), ("test/forbidden", "test/forbidden")])
def test_a_gated_repository(name, repo, hub, answers):
    message = answers[name]["error"]
    for part in (
        f"{repo} is not whole in the hub cache and cannot be downloaded",
        f"Accept its licence at https://huggingface.co/{repo}, then run `hf auth login`",
        "set HF_TOKEN",
        "401" if name == "flux-dev" else "403",
    ):
        assert part in message
    assert not [request for request in hub.of(repo) if request[0] == "GET" and "/api/" not in request[1]]


def test_a_broken_connection_is_resumed(hub, answers):
    assert files_in(answers["test/breaks"]["folder"]) == hub.files
    gets = [x for x in hub.of("test/breaks") if x[0] == "GET" and x[1].endswith(TRANSFORMER)]
    assert [bool(asked) for _, _, asked in gets] == [False, True]
    resumed = int(gets[1][2].removeprefix("bytes=").rstrip("-"))
    assert 0 < resumed <= len(hub.files[TRANSFORMER]) // 2


def test_a_file_with_the_wrong_hash_is_refused_and_not_kept(hub, home, answers):
    message = answers["test/wrong"]["error"]
    right = hashlib.sha256(hub.files[TRANSFORMER]).hexdigest()
    assert f"{TRANSFORMER} has SHA-256" in message and f"not {right}" in message
    assert not list((home / "hub" / "models--test--wrong").rglob("flux1*"))
    blobs = (home / "hub" / "models--test--wrong").glob("blobs/*")
    assert all(hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name for blob in blobs)


def test_a_lora_on_the_hub(hub, home):
    """One file of a repository that has several; by the page's address, too; then without a network."""
    names = [
        "test/lora/ae.safetensors",
        "https://huggingface.co/test/lora/blob/main/ae.safetensors",
        "test/lora",
    ]
    (first, again, several), _ = ask(hub, home, *(f"lora={name}" for name in names))
    assert Path(first["file"]).read_bytes() == hub.files["ae.safetensors"] and again == first
    assert "test/lora holds several LoRAs, ae.safetensors, flux1-random.safetensors" in several["error"]
    assert several["error"].endswith("name one, as test/lora/ae.safetensors")
    (alone, none), _ = ask(hub, home, "lora=test/lora", "lora=test/none", HF_HUB_OFFLINE="1")
    assert alone == first  # the only one in the cache
    assert none["error"].startswith("test/none: not on this disk, nor to be had from the hub (")
