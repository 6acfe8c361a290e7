"""Models by name, against a stub of the Hub on loopback: what is asked for, what is refused, what the cache saves."""
import hashlib
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import Mock

import families
import pytest
from huggingface_hub.errors import IncompleteSnapshotError, RepositoryNotFoundError

from p2p.weights.hub import download, is_id

COMMIT = "0" * 39 + "1"
UNREACHABLE = "http://127.0.0.1:9"


class Stub(ThreadingHTTPServer):
    """Serves folders as repositories; `asked` lists the files that were downloaded."""

    def __init__(self, repos):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.asked, self.gated = repos, [], set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def _error(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _body(self, data, **headers):
        self.send_response(200)
        for k, v in headers.items():
            self.send_header(k.replace("_", "-"), v)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0].strip("/")
        if path.startswith("api/models/"):
            repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
            if repo not in self.server.repos:
                return self._error(401, "RepoNotFound")
            root = self.server.repos[repo]
            names = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
            if "/tree/" in path:
                listing = [{"type": "file", "path": n, "size": (root / n).stat().st_size, "oid": "0" * 40} for n in names]
                return self._body(json.dumps(listing).encode(), Content_Type="application/json")
            info = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names], "tags": [],
                    "private": False, "downloads": 0}
            return self._body(json.dumps(info).encode(), Content_Type="application/json")
        org, name, _, _, *rest = path.split("/")
        repo, file = f"{org}/{name}", "/".join(rest)
        if repo in self.server.gated:
            return self._error(403, "GatedRepo")
        where = self.server.repos.get(repo, None)
        if where is None or not (where / file).is_file():
            return self._error(404, "EntryNotFound")
        data = (where / file).read_bytes()
        if self.command == "GET":
            self.server.asked.append(file)
        self._body(data, ETag='"' + hashlib.sha256(data).hexdigest() + '"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    parts = families.build("sd1")
    both = families.save(parts, root / "both", "sd1")
    families.save(parts, both, "sd1", safe_serialization=False)
    (both / "handler.py").write_text("raise SystemExit('code from the Hub was run')")
    (both / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"never read")
    families.save(parts, root / "shards", "sd1", max_shard_size="300KB")
    parts["vae"].save_pretrained(root / "vae")
    (root / "several").mkdir()
    for n in "ab":
        (root / "several" / f"{n}.safetensors").write_bytes(b"0")
    return Stub({"org/both": both, "org/shards": root / "shards", "org/several": root / "several", "org/gated": both,
                 "org/vae": root / "vae", "org/whole": both})


INSPECT = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout

sys.modules["transformers"] = None   # open_clip would import it, which takes seconds
from p2p.cli.parser import main

def run(repo):
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        return main(["inspect", *repo.split()]), out.getvalue(), err.getvalue()

for repo in sys.stdin:
    print(json.dumps(run(repo)), flush=True)
"""


@contextmanager
def asking(hub, home, **env):
    """-> asks for (exit code, output, errors) of `p2p inspect` for each of some repositories, in a process of their own: the
    Hub's settings are read when huggingface_hub is imported."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))} | {
        "NO_PROXY": "localhost,127.0.0.1", "no_proxy": "localhost,127.0.0.1", "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"} | env
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", INSPECT], text=True, env=env, **pipes) as process:
        def ask(repos):
            for repo in repos:
                print(repo, file=process.stdin, flush=True)
                yield json.loads(process.stdout.readline())

        yield lambda repos: list(ask(repos))
        process.stdin.close()
    assert process.returncode == 0


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def inspect(hub, home):
    with asking(hub, home) as ask:
        yield ask


@pytest.mark.slow
def test_only_what_is_needed_is_downloaded_and_then_cached(hub, home, inspect):
    once = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
            "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json", "text_encoder/model.safetensors"]
    hub.asked.clear()
    (code, said, wrong), again = inspect(["org/both", "org/both"])
    assert code == 0 and "family      sd1" in said, wrong
    assert again[:2] == [code, said] and sorted(hub.asked) == sorted(once)
    for env in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": UNREACHABLE}):   # what is cached is used, what is not is refused
        with asking(hub, home, **env) as ask:
            here, absent = ask(["org/both", "org/several"])
        assert here[0] == 0 and "family      sd1" in here[1], here[2]
        refused(absent, "cannot be reached", "not in the local cache")


@pytest.mark.slow
def test_shards_are_followed(hub, inspect):
    hub.asked.clear()
    [(code, _, wrong)] = inspect(["org/shards"])
    assert code == 0, wrong
    assert sum("-of-" in f and f.startswith("unet") for f in hub.asked) > 1


@pytest.mark.slow
def test_of_an_autoencoder_no_more_is_fetched(hub, inspect, sd1_file):
    """From a repository of one, or that of a whole model."""
    hub.asked.clear()
    repos = ("org/vae", "org/whole")
    for repo, (code, out, wrong) in zip(repos, inspect([f"{sd1_file} --vae {repo}" for repo in repos]), strict=True):
        assert code == 0 and f"autoencoder from {repo}" in out, wrong
    assert sorted(hub.asked) == [f"{part}{name}" for part in ("", "vae/") for name in ("config.json", "diffusion_pytorch_model.safetensors")]


@pytest.mark.parametrize("error", [ConnectionError("offline"), RepositoryNotFoundError("gone", response=Mock())])
def test_what_another_program_cached_is_used(tmp_path, monkeypatch, error):
    """A part of a repository, offline or after it has gone: its listing names files that nobody fetched."""
    def incomplete(repo, **asked):
        raise IncompleteSnapshotError("README.md is missing", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", Mock(side_effect=error))
    monkeypatch.setattr("huggingface_hub.snapshot_download", incomplete)
    assert download("org/name") == tmp_path


def refused(answer, *messages):
    code, _, wrong = answer
    assert code == 3 and all(m in wrong for m in messages) and "Traceback" not in wrong, wrong


@pytest.mark.slow
def test_every_failure_has_its_message(hub, inspect):
    hub.gated = {"org/gated"}
    messages = {
        "org/absent": "no such model on the Hub", "org/gated": "gated. Accept its licence", "org/several":
        "a.safetensors, b.safetensors", "./org/both": "no such file", "org/both.safetensors": "no such file"}
    for answer, message in zip(inspect(messages), messages.values(), strict=True):
        refused(answer, message)


@pytest.mark.slow
@pytest.mark.parametrize("text, want", [
    ("org/name", True), ("stable-diffusion-v1-5/stable-diffusion-v1-5", True), ("./org/name", False), ("/org/name", False),
    ("../org/name", False), ("name", False), ("org/name/more", False), ("org/model.safetensors", False), ("org/model.CKPT", False),
    ("~/name", False), ("models/sd15--pruned", False), ("out/v1..2", False), ("modèles/sd15", False), ("models/v1.5-", False),
    ("models/.hidden", False), ("org/name.git", False)])
def test_what_counts_as_a_name(text, want):
    assert is_id(text) == want
