"""The Hub's door: a real server on loopback that speaks the routes of the Hub,
and the loader in processes of its own.
"""

import contextlib
import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import torch
from checkpoints import Checkpoint, refusal
from reference import ROOT, TINY

import extras.beside
import extras.hub
import llava

# ----------------------------------------------------------------------------------------------------------------
# Names that are no repositories


def test_tiny_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert extras.hub.find("tiny") == TINY


def test_small_is_found_once_it_is_put_together(tmp_path, monkeypatch):
    monkeypatch.setitem(extras.hub.OWN, "small", str(tmp_path / "model"))
    with pytest.raises(OSError, match=r"^small is not put together yet: python small/small\.py --make$"):
        extras.hub.find("small")
    (tmp_path / "model").mkdir()
    assert extras.hub.find("small") == tmp_path / "model"


BESIDE = {"tokenizer_config.json": b"{}", "special_tokens_map.json": b"{ }", "added_tokens.json": b"{\n}"}
NEEDED = {"config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", *BESIDE}
LURES = {  # what a repository also holds, and nobody needs
    "README.md": b"# A model", ".gitattributes": b"", "pytorch_model.bin": b"pickled", "training_args.bin": b"pickled",
    "images/view.jpg": b"picture", "tokenizer.model": b"pieces", "chat_template.txt": b"of another",
    "optimizer.pt": b"pickled",
    "adapter_model.safetensors": b"another", "onnx/model.safetensors": b"another", "model.fp32.safetensors": b"another",
    "model-of-another.safetensors": b"another", "old/chat_template.jinja": b"of another",
}  # fmt: skip


class Hub(http.server.ThreadingHTTPServer):
    """repositories: id → {revision: {path: bytes}}. Large files are redirected to another host name, as the Hub's are.

    log: (method, path, Range) of each request. refusals: repository → (status, headers, "api" or "resolve").
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.refusals, self.log, self.served, self.mistakes = {}, {}, [], 0, []
        self.cut = None  # (bytes after which a large file breaks off, how many times still)
        self.stalled, self.go_on = threading.Event(), threading.Event()
        self.tokens = set()  # (host, token) of each request
        self.dropped = set()  # headers that are not sent, as by a mirror that knows nothing of them
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def add(self, repo, files, revisions=("main",)):
        self.repositories.setdefault(repo, {}).update(dict.fromkeys([*revisions, commit(files)], files))

    def asked(self, method="GET", route="resolve"):
        """The files of such requests."""
        paths = [unquote(path) for how, path, _ in self.log if how == method and f"/{route}/" in path]
        return [path.split(f"/{route}/")[1].split("/", 1)[1] for path in paths]

    def handle_error(self, request, client_address):
        """A client that hangs up is what some of the tests want; anything else is a mistake of this server."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.mistakes.append(sys.exc_info()[1])


def commit(files):
    """A hash of forty digits."""
    return hashlib.sha1(
        repr(sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())).encode()
    ).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 200

    def do_GET(self):
        hub, url = self.server, urlsplit(self.path)
        hub.log.append((self.command, self.path, self.headers.get("Range")))
        hub.tokens.add((self.headers["Host"].split(":")[0], self.headers.get("Authorization")))
        path = unquote(url.path)
        if path.startswith("/cdn/"):
            return self.send_large(path.removeprefix("/cdn/"))
        match = re.fullmatch(r"(/api/models)?/([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+)/?(.*)", path)
        if match is None:
            return self.answer(404)
        api, repo, route, revision, name = match.groups()
        status, headers, where = hub.refusals.get(repo, (None, {}, "api"))
        if status and (api or where == "resolve") and (route == "resolve") == (where == "resolve"):
            return self.answer(status, headers)
        if repo not in hub.repositories:
            return self.answer(
                401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."}
            )
        if revision not in hub.repositories[repo]:
            return self.answer(
                404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"}
            )
        files = hub.repositories[repo][revision]
        sha = commit(files)
        if route == "revision":
            return self.answer_json({"id": repo, "sha": sha, "siblings": [{"rfilename": file} for file in files]})
        if route == "tree":
            assert parse_qs(url.query)["recursive"][0].lower() == "true"
            return self.answer_json([self.entry(file, data) for file, data in files.items()])
        if name not in files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        data, digest = files[name], hashlib.sha256(files[name]).hexdigest()
        if not name.endswith((".safetensors", ".bin", ".pt")):
            return self.answer(200, {"ETag": f'"{digest[:40]}"', "X-Repo-Commit": sha}, data)
        headers = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": sha}
        self.answer(302, {**headers, "Location": f"http://localhost:{hub.server_port}/cdn/{digest}"})

    do_HEAD = do_GET

    def entry(self, name, data):
        oid = hashlib.sha256(data).hexdigest()
        entry = {"type": "file", "path": name, "size": len(data), "oid": oid[:40]}
        lfs = {"oid": oid, "size": len(data), "pointerSize": 134}
        return {**entry, "lfs": lfs} if name.endswith((".safetensors", ".bin", ".pt")) else entry

    def send_large(self, digest):
        hub = self.server
        files = (
            data for revisions in hub.repositories.values() for files in revisions.values() for data in files.values()
        )
        data = next(data for data in files if hashlib.sha256(data).hexdigest() == digest)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if self.headers.get("Range"):
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.answer(206 if start else 200, headers, data[start:])

    def answer_json(self, values):
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(values).encode())

    def answer(self, status, headers=None, body=b""):
        hub = self.server
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            if name not in hub.dropped:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if hub.cut and self.path.startswith("/cdn/") and hub.cut[1] > 0:
            size, times = hub.cut
            hub.cut = size, times - 1
            self.wfile.write(body[:size])
            self.wfile.flush()
            hub.served += min(size, len(body))
            if size and times == 1:  # the last time: the line is not cut, but dead
                hub.stalled.set()
                hub.go_on.wait(200)
            self.close_connection = True
            with contextlib.suppress(OSError):  # the client may have hung up before
                self.connection.shutdown(2)
            return
        self.wfile.write(body)
        hub.served += len(body) if self.path.startswith("/cdn/") else 0

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()
    assert server.mistakes == []


@pytest.fixture
def files(checkpoints):
    """A checkpoint as a repository holds it: in one file, among others."""
    folder = checkpoints["llama"]
    return {**LURES, **BESIDE, **{file.name: file.read_bytes() for file in folder.iterdir()}}


NURSERY = """
import hashlib, json, os, signal, sys, time
# what takes time, once. The Hub's client is imported by each child, as it reads its settings then
import extras.hub, extras.speed, llava, weights
assert "huggingface_hub" not in sys.modules

def find(model, revision):
    return str(extras.hub.complete(model, extras.hub.find(model, revision)))

def poor(model, revision):  # a machine of 1,000 bytes
    extras.speed.memory.limit = lambda processes=1: (1000, "this machine")
    return load(model, revision)

def full(model, revision):  # a disk of 1,000 bytes
    usage = extras.hub.shutil.disk_usage
    extras.hub.shutil.disk_usage = lambda folder: usage(folder)._replace(free=1000)
    return load(model, revision)

def both(model, revision):  # two processes at once
    child = os.fork()
    found = [load(model, revision), load(model, revision)]
    if not child:
        os._exit(found[0] != found[1])
    return [found[0], os.waitpid(child, 0)[1]]

def load(model, revision):
    state = llava.load(model, device="cpu", dtype="float32", revision=revision)[0].state_dict()
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest()

for line in sys.stdin:
    job = json.loads(line)
    if child := os.fork():
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)
        continue
    signal.alarm(600)  # it hangs
    os.environ.update(job["environment"])
    sys.stdout, sys.stderr = open(job["stdout"], "w", 1), open(job["stderr"], "w", 1)
    # between the attempts of the Hub's client
    sleep, time.sleep = time.sleep, lambda seconds: sleep(min(seconds, 0.05))
    for action, model, revision in job["steps"]:
        try:
            print(json.dumps(["ok", globals()[action](model, revision)]))
        except (OSError, ValueError) as error:
            print(json.dumps(["error", str(error)]))
    sys.exit()
"""


class Nursery:
    """A process that has imported the loader and has a child for each request: each with settings of its own."""

    def __init__(self):
        environment = {
            name: value for name, value in os.environ.items() if "HF_" not in name and "PROXY" not in name.upper()
        }
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.process = subprocess.Popen([sys.executable, "-c", NURSERY], cwd=ROOT, env=environment, **pipes)

    def start(self, hub, home, *steps, offline=False, **environment):
        """Begin with the steps, (action, model, revision) each; returns the process id."""
        home.mkdir(exist_ok=True)
        environment |= {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_ETAG_TIMEOUT": "100", "HF_HUB_DOWNLOAD_TIMEOUT": "100",
        }  # fmt: skip
        self.stdout, self.stderr = home / "stdout", home / "stderr"
        job = {"environment": environment, "stdout": str(self.stdout), "stderr": str(self.stderr)}
        print(json.dumps({**job, "steps": [[*step, None][:3] for step in steps]}), file=self.process.stdin)
        return int(self.process.stdout.readline())

    def status(self):
        return int(self.process.stdout.readline())

    def ask(self, *arguments, **options):
        """What each step said: ["ok", …] or ["error", one sentence]."""
        self.start(*arguments, **options)
        assert self.status() == 0, self.stderr.read_text()
        said = [json.loads(line) for line in self.stdout.read_text().splitlines()]
        assert not any("\n" in text for _, text in said)
        return said


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery()
    yield nursery
    nursery.process.stdin.close()
    nursery.process.wait(30)
    nursery.process.stdout.close()


@pytest.fixture
def ask(nursery):
    return nursery.ask


def downloaded(home):
    """The names of the files in the Hub's cache, whatever snapshot they belong to."""
    return {file.name for file in home.glob("hub/models--*/snapshots/*/**/*") if not file.is_dir()}


def contents(folder):
    tensors = llava.load(str(folder), device="cpu", dtype=torch.float32)[0].state_dict().values()
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


@pytest.mark.slow
def test_a_model_is_downloaded_once_and_then_needs_no_network(hub, nursery, ask, files, checkpoints, tmp_path):
    hub.add("team/model", files)
    expected = ["ok", contents(checkpoints["llama"])]
    assert ask(hub, tmp_path, ("load", "team/model"), HF_TOKEN="hf_secret", TQDM_POSITION="-1") == [
        expected
    ]  # -1: show bars
    wanted = NEEDED | {"model.safetensors"}
    assert downloaded(tmp_path) == wanted
    assert {name for name in hub.asked()} == {name for name in hub.asked("HEAD")} == wanted
    assert sum("/cdn/" in path for _, path, _ in hub.log) == 1  # the weights, once
    assert ("127.0.0.1", "Bearer hf_secret") in hub.tokens  # the token goes to the Hub and to nobody else
    assert {token for host, token in hub.tokens if host == "localhost"} == {None}
    assert re.search(r"model\.safetensors: +\d+%", nursery.stderr.read_text())

    hub.log.clear()
    ((kind, folder),) = ask(hub, tmp_path, ("find", "team/model"))
    assert kind == "ok" and contents(folder) == expected[1]
    assert hub.asked() == hub.asked("HEAD") == []
    assert all("/revision/" in path for _, path, _ in hub.log)  # is it still the newest?

    hub.log.clear()
    there, elsewhere = ask(hub, tmp_path, ("load", "team/model"), ("find", "team/other"), offline=True)
    assert there == expected and hub.log == []
    assert elsewhere[0] == "error" and "team/other is not in the cache and HF_HUB_OFFLINE is set" in elsewhere[1]
    assert "--model tiny" in elsewhere[1]

    hub.shutdown()
    hub.server_close()
    there, elsewhere = ask(hub, tmp_path, ("find", "team/model"), ("find", "team/other"))
    assert there == [kind, folder]
    assert (
        "team/other is not in the cache and the Hub gave no answer" in elsewhere[1] and "--model tiny" in elsewhere[1]
    )


@pytest.mark.slow
def test_revisions(hub, ask, files, checkpoints, tmp_path):
    old = {
        **files,
        "README.md": b"# older",
        "model.safetensors": (checkpoints["mistral"] / "model.safetensors").read_bytes(),
    }
    hub.add("team/model", files)
    hub.add("team/model", old, ["v1", "refs/pr/1"])
    said = ask(
        hub, tmp_path, ("find", "team/model", "v1"), ("find", "team/model", commit(files)),
        ("find", "team/model", "v2"),
        ("find", "team/model", "0" * 40), ("find", "team/model"), ("find", "team/model", commit(old)[:7]),
    )  # fmt: skip
    assert [kind for kind, _ in said] == ["ok", "ok", "error", "error", "ok", "error"]
    folders = [text for _, text in said]
    assert folders[0].endswith(commit(old)) and folders[1] == folders[4] and folders[1].endswith(commit(files))
    assert "team/model has no revision v2" in folders[2] and f"team/model has no revision {'0' * 40}" in folders[3]
    assert Path(folders[0], "model.safetensors").read_bytes() == old["model.safetensors"]
    (offline,) = ask(hub, tmp_path, ("find", "team/model", "v1"), offline=True)
    assert offline == ["ok", folders[0]]


@pytest.mark.slow
def test_what_the_hub_refuses_is_said_in_one_sentence(hub, ask, files, tmp_path):
    gated = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted."}
    cases = {
        "team/absent": (
            401,
            {"X-Error-Code": "RepoNotFound"},
            "api",
            "neither a folder here nor a repository on the Hub",
        ),
        "team/gone": (
            404,
            {"X-Error-Code": "RepoNotFound"},
            "api",
            "neither a folder here nor a repository on the Hub",
        ),
        "team/private": (401, {"X-Error-Message": "Invalid username or password."}, "api", "401"),
        "team/gated": (403, gated, "resolve", "is gated: accept its terms"),
        "team/gated-too": (401, gated, "api", "is gated: accept its terms"),
        "team/forbidden": (403, {"X-Error-Message": "no"}, "api", "403"),
        "team/forbidden-files": (403, {"X-Error-Message": "no"}, "resolve", "403"),
        "team/broken": (500, {}, "api", "500"),
        "team/broken-files": (500, {}, "resolve", "gave no answer"),
        "team/busy": (429, {}, "api", "429"),
    }
    for repo, (status, headers, where, _) in cases.items():
        hub.add(repo, files)
        hub.refusals[repo] = status, headers, where
    said = ask(hub, tmp_path, *[("find", repo) for repo in cases])
    for (repo, (*_, words)), (kind, text) in zip(cases.items(), said, strict=True):
        assert kind == "error" and repo in text and words in text and len(text) < 400, text
    assert downloaded(tmp_path) == set()


@pytest.mark.slow
def test_sharded_and_odd_repositories(hub, ask, files, checkpoints, tmp_path):
    shards = Checkpoint(checkpoints["llama"], tmp_path / "sharded").write("B", 3)
    with_index = {file: data for file, data in files.items() if file != "model.safetensors"}
    with_index |= {file.name: file.read_bytes() for file in Path(shards).iterdir()}
    hub.add("team/sharded", with_index)
    hub.add("team/both", {**with_index, "model.safetensors": files["model.safetensors"]})
    pickled = {file: data for file, data in files.items() if not file.endswith(".safetensors")}
    hub.add("team/pickled", pickled)
    hub.add("team/empty", {file: data for file, data in pickled.items() if not file.endswith((".bin", ".pt"))})
    hostile = {"weight_map": {"x": "../../../config.json"}}
    hub.add("team/hostile", {**with_index, "model.safetensors.index.json": json.dumps(hostile).encode()})
    hub.add("team/lacking", {file: data for file, data in with_index.items() if "00002" not in file})
    repositories = ["sharded", "both", "pickled", "empty", "hostile", "lacking"]
    said = dict(
        zip(
            repositories, ask(hub, tmp_path / "home", *[("find", f"team/{name}") for name in repositories]), strict=True
        )
    )
    for name in ("sharded", "both"):
        assert said[name][0] == "ok" and contents(said[name][1]) == contents(checkpoints["llama"])
    kinds = {file for file in hub.asked() if file.endswith((".safetensors", ".bin", ".pt"))}
    assert kinds == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert "pytorch_model.bin: such files are pickled" in said["pickled"][1] and "team/pickled" in said["pickled"][1]
    assert "team/empty holds no model.safetensors" in said["empty"][1]
    assert "'../../../config.json' is not the bare name" in said["hostile"][1]
    assert "team/lacking" in said["lacking"][1] and "model-00002-of-00003.safetensors" in said["lacking"][1]


def test_a_hub_that_falls_silent_while_a_missing_file_is_explained(tmp_path, monkeypatch):
    def missing(*_, **__):
        raise huggingface_hub.errors.EntryNotFoundError("404")

    def silent(*_, **__):
        raise huggingface_hub.errors.HTTPError("the line is dead")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "a" / "b" / "c"))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", missing)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", silent)
    with pytest.raises(OSError, match=r"a/b holds no model\.safetensors"):
        extras.hub.complete("a/b", extras.hub.find("a/b"))


def test_a_page_where_the_hub_should_be(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: json.loads("<html>who are you?</html>"))
    with pytest.raises(OSError, match="a/b cannot be downloaded: the answer is not from the Hub"):
        extras.hub.find("a/b")


LARGE = {
    "config.json": b"{}",
    "model.safetensors": os.urandom(1000) * 24_000,
}  # the Hub's client writes in pieces of 10 MB
PIECE, HALF = 10 * 2**20, 12_000_000


@pytest.mark.slow
def test_a_broken_line_is_mended_within_the_call(hub, ask, tmp_path):
    hub.add("team/model", LARGE)
    hub.cut = HALF, 2
    hub.go_on.set()
    ((kind, folder),) = ask(hub, tmp_path, ("find", "team/model"))
    assert kind == "ok"
    assert Path(folder, "model.safetensors").read_bytes() == LARGE["model.safetensors"]
    assert [asked for _, path, asked in hub.log if "/cdn/" in path][:2] == [None, f"bytes={PIECE}-"]


@pytest.mark.slow
def test_a_download_that_was_stopped_goes_on_where_it_stopped(hub, nursery, ask, tmp_path):
    """First the user presses Ctrl-C, then the Hub goes away, and then all is well."""
    hub.add("team/model", LARGE)
    hub.cut = HALF, 1
    child = nursery.start(hub, tmp_path, ("find", "team/model"))
    assert hub.stalled.wait(300)
    part = until(lambda: list(tmp_path.glob("hub/*/blobs/*.part")))[0]
    until(lambda: part.stat().st_size >= PIECE)
    os.kill(child, signal.SIGINT)
    assert nursery.status() != 0 and "KeyboardInterrupt" in nursery.stderr.read_text()
    hub.go_on.set()
    assert "model.safetensors" not in downloaded(tmp_path)
    assert "notice: team/model: 24.0 MB to download; kept in " in nursery.stderr.read_text()

    hub.log.clear()
    hub.cut = 0, 1000
    ((kind, text),) = ask(hub, tmp_path, ("find", "team/model"))
    assert kind == "error" and "the download of team/model was interrupted" in text
    assert "run the same command to resume" in text
    assert {asked for _, path, asked in hub.log if "/cdn/" in path} == {f"bytes={PIECE}-"}

    hub.log.clear()
    hub.cut, hub.served = None, 0
    ((kind, folder),) = ask(hub, tmp_path, ("find", "team/model"))
    assert kind == "ok" and hub.served == len(LARGE["model.safetensors"]) - PIECE
    assert "24.0 MB to download, of which 10.5 MB are here from before;" in nursery.stderr.read_text()
    assert Path(folder, "model.safetensors").read_bytes() == LARGE["model.safetensors"]
    assert not list(tmp_path.glob("hub/*/blobs/*.part"))


def test_a_repository_of_something_else_is_named_before_anything_large(hub, ask, files, tmp_path):
    config = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "llava-hf/llava-1.5-7b-hf"}).encode()
    lures = {file: data for file, data in LURES.items() if not file.endswith((".bin", ".pt"))}
    small = {file: data for file, data in files.items() if file.endswith(".json")} | {"README.md": b""}
    hub.add("team/adapter", lures | {"adapter_config.json": config})
    hub.add("team/gguf", small | {"llava-v1.5-7b-Q4_K.gguf": b"GGUF" * 1000, "mmproj-f16.gguf": b"GGUF"})
    hub.add("team/mlx", {"weights.npz": b"PK", "config.json": b"{}"})
    repositories = ["adapter", "gguf", "mlx"]
    answers = ask(hub, tmp_path, *[("find", f"team/{name}") for name in repositories])
    said = {name: text for name, (_, text) in zip(repositories, answers, strict=True)}
    assert "team/adapter holds only an adapter (LORA, of 'llava-hf/llava-1.5-7b-hf')" in said["adapter"]
    assert "team/gguf holds its weights only as llava-v1.5-7b-Q4_K.gguf: GGUF" in said["gguf"]
    assert "team/mlx holds its weights only as weights.npz: MLX" in said["mlx"] and "--quantize" in said["mlx"]
    assert not [file for file in hub.asked() if file.endswith((".safetensors", ".gguf", ".npz"))]


@pytest.mark.slow
def test_what_is_passed_on_when_it_is_saved_is_downloaded_too(hub, ask, files, tmp_path):
    tokens = {"pad_token": "<pad>", "chat_template": "Hi"}
    others = {name: b"{}" for name in extras.beside.TEXTS if "*" not in name}
    others |= {"tokenizer_config.json": json.dumps(tokens).encode(), "additional_chat_templates/rag.jinja": b"R"}
    hub.add("team/model", files | others)
    ((kind, folder),) = ask(hub, tmp_path, ("find", "team/model"))
    found = extras.beside.read(Path(folder))
    assert kind == "ok" and {*others} <= found.keys()
    assert found["tokenizer_config.json"] == tokens and found["additional_chat_templates/rag.jinja"] == "R"
    assert downloaded(tmp_path) == NEEDED | {"model.safetensors"} | {Path(name).name for name in others}


def until(condition, seconds=200):
    """The first true value of a condition that somebody else makes true."""
    for _ in range(int(seconds / 0.02)):
        if value := condition():
            return value
        time.sleep(0.02)
    raise TimeoutError


@pytest.mark.slow
def test_two_processes_at_once_on_one_cache(hub, ask, files, checkpoints, tmp_path):
    """Each has the whole of it, and the weights were sent once: the other waited for them."""
    hub.add("a/b", files)
    kind, (found, status) = ask(hub, tmp_path, ("both", "a/b"))[0]
    assert (kind, found, status) == ("ok", contents(checkpoints["llama"]), 0)
    assert downloaded(tmp_path) == NEEDED | {"model.safetensors"}
    assert hub.served == len(files["model.safetensors"])


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "no-such-folder", "./llava", "a/b/c", "", "../x", "http://host/model"]
)
def test_a_model_that_is_neither_a_folder_nor_a_hub_id_is_refused(name):
    assert "there is no model folder" in refusal(name) or name == ""


@pytest.mark.parametrize("name", ["nowhere/x", "nowhere/x/y", "no-such-folder", "a.gguf"])
def test_a_path_is_looked_for_as_its_name_is(name):
    """Path("nowhere/x") could be a Hub id, and is one here."""
    with pytest.raises((OSError, ValueError)) as caught:
        llava.load(Path(name))
    assert str(caught.value) == refusal(name) and name in refusal(name)


# ----------------------------------------------------------------------------------------------------------------
# Not more than is needed


def changed(files, name, **values):
    return {**files, name: json.dumps(json.loads(files[name]) | values).encode()}


@pytest.mark.slow
def test_a_repository_that_its_small_files_rule_out_costs_not_a_byte_of_weights(hub, ask, files, checkpoints, tmp_path):
    without = {name: data for name, data in files.items() if name != "preprocessor_config.json"}
    shards = Path(Checkpoint(checkpoints["llama"], tmp_path / "sharded").write("B", 3))
    sharded = {**files, **{file.name: file.read_bytes() for file in shards.iterdir()}}
    del sharded["model.safetensors"]
    text = json.loads(files["config.json"])["text_config"]
    cases = {  # what is wrong → the files, and what is said
        "kind": (changed(files, "config.json", model_type="another"), "describes a"),
        "field": (changed(files, "config.json", surprise=7), "the field surprise"),
        "json": ({**files, "config.json": b"{"}, "not valid JSON"),
        "page": ({**files, "config.json": b"<!DOCTYPE html><html></html>"}, "config.json"),
        "size": (changed(files, "config.json", text_config=text | {"hidden_size": "wide"}), "hidden_size"),
        "sharded": ({**sharded, "config.json": b"[]"}, "not a JSON object"),
        "crop": (changed(files, "preprocessor_config.json", crop_size=99), "crop_size"),
        "no-preprocessor": (without, "no preprocessor_config.json"),
        "tokenizer": ({**files, "tokenizer.json": b"{}"}, "cannot be read as a tokenizer"),
        "no-tokenizer": ({name: data for name, data in files.items() if name != "tokenizer.json"}, "tokenizer.json"),
        "image-token": (changed(files, "config.json", image_token_index=7), "<image>"),
    }
    for name, (contents, _) in cases.items():
        hub.add(f"team/{name}", contents)
    said = ask(hub, tmp_path / "home", *[("load", f"team/{name}") for name in cases])
    for (name, (_, words)), (kind, text) in zip(cases.items(), said, strict=True):
        assert kind == "error" and words in text, (name, text)
    assert hub.served == 0 and not any("safetensors" in name for name in hub.asked() if "index" not in name)


@pytest.mark.parametrize("lacking, words", [
    ("poor", r"the weights take 0\.0 GB in float32 and the cpu has 0\.0 GB \(this machine\).*--model tiny"),
    ("full", r"team/\w+ takes \d\.\d MB more, and the disk of .*hub has 0\.0 MB: make room, or set HF_HOME"),
])  # fmt: skip
def test_no_room_no_download(hub, nursery, ask, files, checkpoints, tmp_path, lacking, words):
    """Of weights that this machine has no room for only the size is asked for. And nothing is said that is not done."""
    shards = Path(Checkpoint(checkpoints["llama"], tmp_path / "sharded").write("B", 3))
    sharded = {**files, **{file.name: file.read_bytes() for file in shards.iterdir()}}
    del sharded["model.safetensors"]
    hub.add("team/model", files)
    hub.add("team/sharded", sharded)
    for kind, text in ask(hub, tmp_path / "home", (lacking, "team/model"), (lacking, "team/sharded")):
        assert kind == "error" and re.search(words, text), text
    assert hub.served == 0 and not any(name.endswith(".safetensors") for name in hub.asked())
    assert "notice" not in nursery.stderr.read_text()


def test_what_is_downloaded_is_said_once_with_its_size(hub, nursery, ask, files, tmp_path):
    hub.add("team/model", files)
    notice = f"{len(files['model.safetensors']) / 1e6:.1f} MB to download; kept in {tmp_path}/hub, so that"
    for said in ([f"notice: team/model: {notice} it is downloaded once"], []):
        ask(hub, tmp_path, ("load", "team/model"))
        assert [line for line in nursery.stderr.read_text().splitlines() if "notice" in line] == said


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False])
def test_weights_lie_on_the_disk_once(hub, ask, files, checkpoints, tmp_path, links):
    """Also where files cannot be linked to, as on Windows."""
    shards = Path(Checkpoint(checkpoints["llama"], tmp_path / "sharded").write("B", 3))
    sharded = {**files, **{file.name: file.read_bytes() for file in shards.iterdir()}}
    del sharded["model.safetensors"]
    hub.add("team/model", files)
    hub.add("team/sharded", sharded)
    home, repositories = tmp_path / "home", {"team/model": files, "team/sharded": sharded}
    settings = {} if links else {"HF_HUB_DISABLE_SYMLINKS": "1"}
    for _ in range(2):  # the second time all is there
        said = ask(hub, home, *[("load", name) for name in repositories], **settings)
        assert said == [["ok", contents(checkpoints["llama"])]] * 2
        assert hub.served == sum(
            len(data) for files in repositories.values() for name, data in files.items()
            if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name)
        )  # fmt: skip
    kept = [file for file in home.rglob("*") if file.is_file() and not file.is_symlink()]
    assert sum(file.stat().st_size for file in kept if file.stat().st_size > 20_000) < 1.5 * hub.served
    assert not list(home.rglob("*.part"))
    assert ask(hub, home, ("load", "team/model"), offline=True, **settings) == said[:1]


@pytest.mark.slow
def test_two_processes_without_links(hub, ask, files, checkpoints, tmp_path):
    hub.add("a/b", files)
    kind, (found, status) = ask(hub, tmp_path, ("both", "a/b"), HF_HUB_DISABLE_SYMLINKS="1")[0]
    assert (kind, found, status) == ("ok", contents(checkpoints["llama"]), 0)
    assert hub.served == len(files["model.safetensors"])


@pytest.mark.parametrize("dropped", [
    ["X-Repo-Commit"], *(pytest.param(names, marks=pytest.mark.slow)
                         for names in (["X-Linked-Etag"], ["ETag"], ["X-Linked-Etag", "ETag"])),
])  # fmt: skip
def test_a_mirror_that_drops_a_header_is_named_in_one_line(hub, ask, files, tmp_path, dropped):
    hub.add("team/model", files)
    hub.dropped = set(dropped)
    ((kind, text),) = ask(hub, tmp_path, ("load", "team/model"))
    assert kind == "error" and f"http://127.0.0.1:{hub.server_port} does not say which version" in text
    assert "team/model" in text and "--model tiny" in text
    assert hub.served == 0


@pytest.mark.slow
def test_a_mirror_without_sizes_will_do(hub, nursery, ask, files, checkpoints, tmp_path):
    hub.add("team/model", files)
    hub.dropped = {"X-Linked-Size", "Accept-Ranges"}
    assert ask(hub, tmp_path, ("load", "team/model")) == [["ok", contents(checkpoints["llama"])]]
    assert "notice: team/model: weights of unknown size to download" in nursery.stderr.read_text()
