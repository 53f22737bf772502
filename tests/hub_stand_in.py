"""A stand-in for the Hub's HTTP endpoint that keeps what is uploaded."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """What was uploaded.

    Attributes:
        repositories (`dict[str, dict]`): what `create` was sent, by id.
        files (`dict[str, bytes]`): of the commit, by path in the repository.
        tokens (`set[str]`): authorisation of all requests.
        commit_message (`str`): of the commit.
        refuse_uploads (`bool`): whether commits are answered with 403.
    """

    def __init__(self):
        self.repositories, self.files, self.tokens, self.commit_message = {}, {}, set(), None
        self.refuse_uploads = False
        self._large = {}

    def answer(self, method, path, body):
        """Status and JSON of a request."""
        path = path.partition("?")[0]
        if path == "/api/repos/create":
            fields = json.loads(body)
            name = "/".join(filter(None, (fields.get("organization"), fields["name"])))
            self.repositories[name] = fields
            return 200, {"url": f"{self.url}/{name}"}
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            return 200, {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{"upload": {"href": f"{self.url}/lfs/{each['oid']}"}} for each in objects]
            return 200, {
                "transfer": "basic",
                "objects": [{**each, "actions": action} for each, action in zip(objects, actions, strict=True)],
            }
        if method == "PUT":
            self._large[path.rpartition("/")[2]] = body
            return 200, {}
        if path.endswith("/commit/main"):
            if self.refuse_uploads:
                return 403, {"error": "You have no write access."}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.commit_message = value["summary"]
                elif line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self._large[value["oid"]]
            repository = path.removeprefix("/api/models/").removesuffix("/commit/main")
            return 200, {"commitUrl": f"{self.url}/{repository}/commit/1", "commitOid": "1", "hookOutput": ""}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/api/models/"):
            return 200, {
                "id": path.removeprefix("/api/models/").removesuffix("/revision/main"),
                "sha": "0",
                "siblings": [],
            }
        return 404, {"error": path}


@contextmanager
def serve_hub():
    """Yields a [`Hub`], whose `url` is on this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if "Authorization" in self.headers:
                hub.tokens.add(self.headers["Authorization"])
            status, answer = hub.answer(self.command, self.path, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_HEAD = do_POST

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
