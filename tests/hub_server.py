"""A hub on loopback: the part of its HTTP interface that `huggingface_hub`, `transformers` and `datasets` use to find,
download and push repositories, in the standard library alone.

    with HubServer(folder, tokens={"hf_x": "write"}) as hub:
        hub.add("datasets", "Salesforce/wikitext", {"README.md": b"...", "wikitext-2-raw-v1/train.parquet": b"..."})
        run(..., **hub.environment(cache))
        hub.files("models", "me/x")

Repositories are folders, `folder/models/me/x/...`: one branch, `main`, and of it the newest commit alone. As on the
real one, a model may be renamed (`aliases`, a redirect), large files are stored by digest and downloaded from another
host, a private repository is not there for strangers, and a read-only token may not write. It does not speak xet.
"""

import base64
import hashlib
import json
import re
import shutil
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER = "me"  # whose tokens these are
REPO = r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)"
API = rf"/api/(?P<kind>models|datasets)/{REPO}"
LARGE_FILES = (".safetensors", ".parquet", ".png")


class HubServer:
    def __init__(self, folder, tokens, aliases=()):
        self.folder, self.tokens, self.aliases = Path(folder), dict(tokens), dict(aliases)
        self.visibility = {}  # (kind, repo): "public" or "private"
        self.commits = {}  # (kind, repo): the messages of its commits
        self.requests = []  # (method, path, status, token) of all that were answered
        self.failures = []  # (pattern of "METHOD path", how)
        self.stopping = threading.Event()

    def __enter__(self):
        hub = self

        class BoundHandler(Handler):
            server_version, protocol_version = "hub", "HTTP/1.1"

            def __init__(self, *arguments):
                self.hub = hub
                super().__init__(*arguments)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.address, self.storage = f"http://localhost:{self.port}", f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache, token=None):
        """The environment of a process that is to use this hub, and `cache` alone."""
        environment = {"HF_ENDPOINT": self.address, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
        return environment | ({"HF_TOKEN": token} if token else {})

    def fail(self, pattern, how):
        """From now on requests whose "METHOD path" has `pattern` (a regular expression) in it get the status `how`, or
        for "drop" a closed connection, or for "hang" nothing."""
        self.failures.append((pattern, how))

    def heal(self):
        self.failures.clear()

    def reset(self):
        """Well again, and without what was pushed."""
        self.heal()
        self.requests.clear()
        for kind, repo in [key for key in self.visibility if key[1].startswith(f"{USER}/")]:
            del self.visibility[kind, repo], self.commits[kind, repo]
            shutil.rmtree(self.path(kind, repo))

    def add(self, kind, repo, files, visibility="public"):
        self.visibility[kind, repo] = visibility
        self.commits[kind, repo] = ["initial commit"]
        for name, content in files.items():
            self.write(kind, repo, name, content)

    def write(self, kind, repo, name, content):
        path = self.path(kind, repo) / name
        assert self.path(kind, repo) in path.resolve().parents
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def path(self, kind, repo):
        return (self.folder / kind / repo).resolve()

    def files(self, kind, repo):
        """{path in the repository: content}"""
        root = self.path(kind, repo)
        return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}

    def sha(self, kind, repo):
        """The newest commit's id: changes with every commit."""
        return hashlib.sha1(f"{kind} {repo} {len(self.commits[kind, repo])}".encode()).hexdigest()


class Refused(Exception):
    """Ends a request with `status`; `code` is the hub's name of the error, which its client reads."""

    def __init__(self, status, message, code=None):
        self.status, self.message, self.code = status, message, code


def git_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def describe(name, content):
    """A file as the tree shows it."""
    entry = {"type": "file", "path": name, "size": len(content), "oid": git_id(content)}
    if name.endswith(LARGE_FILES):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


def front_matter_errors(content):
    """What is wrong with a card's metadata, by the rules that the hub documents."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata is no mapping"]
    errors = []
    for name in ("base_model", "datasets"):
        values = data.get(name, [])
        for value in values if isinstance(values, list) else [values]:
            if not re.fullmatch(REPO, str(value)):
                errors.append(f'"{name}" with value "{value}" is not valid')
    for name in ("license", "license_name", "license_link", "library_name", "pipeline_tag"):
        if not isinstance(data.get(name, ""), str):
            errors.append(f'"{name}" must be a string')
    if not all(re.fullmatch(r"[a-z]{2,3}|code|multilingual", value) for value in as_list(data.get("language"))):
        errors.append('"language" must be codes of two or three letters')
    for name in ("tags", "language", "license"):
        if not all(isinstance(value, str) for value in as_list(data.get(name))):
            errors.append(f'"{name}" must be text')
    for model in data.get("model-index", []):
        for result in model["results"]:
            task, dataset = result.get("task", {}), result.get("dataset", {})
            if not (model.get("name") and task.get("type") and dataset.get("type") and dataset.get("name")):
                errors.append('"model-index": name, task.type, dataset.type and dataset.name are required')
            if not all(m.get("type") and isinstance(m.get("value"), (int, float)) for m in result["metrics"]):
                errors.append('"model-index": a metric needs a type and a value')
    return errors


def as_list(value):
    return [] if value is None else value if isinstance(value, list) else [value]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def handle_any(self):
        split = urlsplit(self.path)
        self.route, self.query = unquote(split.path), split.query
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        for pattern, how in self.hub.failures:
            if re.search(pattern, f"{self.command} {self.route}"):
                return self.misbehave(how)
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            self.body = b"".join(chunks)
        else:
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            for method, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, self.route)
                if match and self.command in method:
                    named = {name: value for name, value in match.groupdict().items() if value}
                    if named.get("repo") in self.hub.aliases and named.get("kind", "models") == "models":
                        renamed = self.path.replace(named["repo"], self.hub.aliases[named["repo"]], 1)
                        return self.answer(b"", 307, {"Location": renamed})
                    return answer(self, **named)
            raise Refused(404, f"no such page: {self.command} {self.route}")
        except Refused as refused:
            headers = {"X-Error-Message": refused.message}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            self.answer({"error": refused.message}, refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def misbehave(self, how):
        self.hub.requests.append((self.command, self.route, how, self.token))
        self.close_connection = True
        if how == "hang":
            self.hub.stopping.wait(600)
        elif how != "drop":
            reason = {401: "Invalid credentials in Authorization header", 403: "you may not"}.get(how, "out of order")
            self.answer({"error": reason}, how, {"X-Error-Message": reason, "Connection": "close"}, log=False)
        if how in ("hang", "drop"):
            self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, content, status=200, headers=(), log=True):
        if log:
            self.hub.requests.append((self.command, self.route, status, self.token))
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **dict(headers)}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def need_token(self, write=False):
        if self.token not in self.hub.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        if write and self.hub.tokens[self.token] != "write":
            raise Refused(403, "You don't have the rights to write: this token is read-only")

    def need_repo(self, kind, repo):
        """As on the real hub, a repository that may not be seen and one that does not exist look the same."""
        visibility = self.hub.visibility.get((kind, repo))
        if visibility is None or (visibility == "private" and self.token not in self.hub.tokens):
            raise Refused(404 if self.token in self.hub.tokens else 401, "Repository not found", "RepoNotFound")

    def need_revision(self, kind, repo, revision):
        self.need_repo(kind, repo)
        if revision not in ("main", self.hub.sha(kind, repo)):
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def whoami(self):
        self.need_token()
        auth = {"accessToken": {"displayName": "test", "role": self.hub.tokens[self.token]}}
        self.answer({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": auth})

    def create(self):
        self.need_token(write=True)
        wish = json.loads(self.body)
        kind, repo = f"{wish.get('type', 'model')}s", f"{wish.get('organization') or USER}/{wish['name']}"
        if not repo.startswith(f"{USER}/"):
            raise Refused(403, f"You don't have the rights to create a model under the namespace {repo.split('/')[0]}")
        url = {"url": f"{self.hub.address}/{'' if kind == 'models' else kind + '/'}{repo}"}
        if (kind, repo) in self.hub.visibility:
            return self.answer({"error": "You already created this repo", **url}, 409)
        self.hub.add(kind, repo, {".gitattributes": b"*.safetensors filter=lfs\n"}, wish.get("visibility", "public"))
        self.answer(url)

    def validate_card(self):
        errors = front_matter_errors(json.loads(self.body)["content"])
        self.answer({"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200)

    def preupload(self, kind, repo, revision):
        self.need_token(write=True)
        self.need_revision(kind, repo, revision)
        present = self.hub.files(kind, repo)
        entries = []
        for file in json.loads(self.body)["files"]:
            name = file["path"]
            entry = {"path": name, "shouldIgnore": False}
            entry["uploadMode"] = "lfs" if name.endswith(LARGE_FILES) else "regular"
            if name in present:
                known = describe(name, present[name])
                entry["oid"] = known["lfs"]["oid"] if "lfs" in known else known["oid"]
            entries.append(entry)
        self.answer({"files": entries})

    def lfs_batch(self, repo):
        self.need_token(write=True)
        self.need_repo("models", repo)
        objects = []
        for wish in json.loads(self.body)["objects"]:
            entry = {"oid": wish["oid"], "size": wish["size"]}
            if not (self.hub.folder / "lfs" / wish["oid"]).is_file():
                entry["actions"] = {"upload": {"href": f"{self.hub.storage}/lfs/{wish['oid']}"}}
            objects.append(entry)
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "the content is not of this digest")
        (self.hub.folder / "lfs").mkdir(parents=True, exist_ok=True)
        (self.hub.folder / "lfs" / oid).write_bytes(self.body)
        self.answer(b"")

    def lfs_get(self, oid):
        """The storage's host: the hub's token has no business here."""
        if self.token:
            raise Refused(400, "a token of the hub was sent to the storage")
        self.answer((self.hub.folder / "lfs" / oid).read_bytes())

    def commit(self, kind, repo, revision):
        self.need_token(write=True)
        self.need_revision(kind, repo, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.hub.write(kind, repo, value["path"], base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                stored = self.hub.folder / "lfs" / value["oid"]
                if not stored.is_file():
                    raise Refused(400, f"{value['path']} was not uploaded")
                self.hub.write(kind, repo, value["path"], stored.read_bytes())
            elif line["key"] != "header":
                raise Refused(400, f"unknown operation {line['key']}")
        self.hub.commits[kind, repo].append(lines[0]["value"]["summary"])
        sha = self.hub.sha(kind, repo)
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.address}/{repo}/commit/{sha}"})

    def info(self, kind, repo, revision="main"):
        self.need_revision(kind, repo, revision)
        self.answer(
            {
                "_id": "0" * 24,
                "id": repo,
                "sha": self.hub.sha(kind, repo),
                "private": self.hub.visibility[kind, repo] == "private",
                "gated": False,
                "disabled": False,
                "tags": [],
                "lastModified": "2026-01-01T00:00:00.000Z",
                "siblings": [{"rfilename": name} for name in self.hub.files(kind, repo)],
            }
        )

    def tree(self, kind, repo, revision, folder=""):
        self.need_revision(kind, repo, revision)
        prefix = folder and folder.strip("/") + "/"
        inside = {n: c for n, c in self.hub.files(kind, repo).items() if n.startswith(prefix)}
        if prefix and not inside:
            raise Refused(404, f"{folder} does not exist on main", "EntryNotFound")
        entries = {}
        recursive = parse_qs(self.query).get("recursive", ["false"])[0].lower() in ("true", "1")
        for name, content in inside.items():
            *parents, _ = name[len(prefix) :].split("/")
            for depth in range(len(parents) if recursive else min(1, len(parents))):
                path = prefix + "/".join(parents[: depth + 1])
                entries[path] = {"type": "directory", "path": path, "size": 0, "oid": git_id(path.encode())}
            if recursive or not parents:
                entries[name] = describe(name, content)
        self.answer(list(entries.values()))

    def paths_info(self, kind, repo, revision):
        self.need_revision(kind, repo, revision)
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode())["paths"]
        files, entries = self.hub.files(kind, repo), []
        for path in (path.strip("/") for path in paths):
            if path in files:
                entries.append(describe(path, files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                entries.append({"type": "directory", "path": path, "size": 0, "oid": git_id(path.encode())})
        self.answer(entries)

    def resolve(self, repo, revision, name, kind="models"):
        self.need_revision(kind, repo, revision)
        files = self.hub.files(kind, repo)
        headers = {"X-Repo-Commit": self.hub.sha(kind, repo)}
        if name not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        content = files[name]
        if name.endswith(LARGE_FILES):
            digest = hashlib.sha256(content).hexdigest()
            (self.hub.folder / "lfs").mkdir(parents=True, exist_ok=True)
            (self.hub.folder / "lfs" / digest).write_bytes(content)
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            return self.answer(b"", 302, {**headers, "Location": f"{self.hub.storage}/lfs/{digest}"})
        headers["ETag"] = f'"{git_id(content)}"'
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            part = content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
            return self.answer(part, 206, headers)
        self.answer(content, 200, headers)


ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_card),
    ("POST", rf"{API}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("GET HEAD", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_get),
    ("POST", rf"{API}/commit/(?P<revision>.+)", Handler.commit),
    ("POST", rf"{API}/paths-info/(?P<revision>.+)", Handler.paths_info),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", Handler.tree),
    ("GET", rf"{API}/revision/(?P<revision>.+)", Handler.info),
    ("GET", API, Handler.info),
    (
        "GET HEAD",
        rf"/(?:(?P<kind>datasets)/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)",
        Handler.resolve,
    ),
]


if __name__ == "__main__":  # by hand: a hub to try things with
    import sys

    with HubServer(sys.argv[1], {"hf_write": "write", "hf_read": "read"}) as hub:
        print(f"HF_ENDPOINT={hub.address} HF_TOKEN=hf_write HF_HUB_DISABLE_XET=1", flush=True)
        while True:
            time.sleep(3600)
