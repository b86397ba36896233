"""A local server that answers Kaggle's own command as Kaggle's server would, and keeps what was sent."""

import http.server
import json
import re
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path


class StandIn(http.server.ThreadingHTTPServer):
    """answers: method -> its answers, one after the other; the last is repeated. sent: (method, what it was sent), in order.

    Without an answer, data sets and notebooks are kept as Kaggle does, and `play` is called when a notebook is pushed:
    play(notebook's text, input folder, working folder). The input folder holds exactly what was sent: data sets, unpacked at
    Kaggle's newer mount path and packed at the older one in turns, and outputs of notebooks.
    """

    def __init__(self, folder: Path | None = None, play: Callable[[str, Path, Path], object] | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.play = folder, play
        self.answers: dict[str, list[dict]] = {}
        self.sent: list[tuple[str, dict]] = []
        self.blobs: dict[str, tuple[str, bytes]] = {}  # token -> name, content
        self.data_sets: dict[str, dict[str, bytes]] = {}  # slug -> name -> content
        self.versions = 0  # of the notebook
        self.address = f"http://127.0.0.1:{self.server_port}"

    @property
    def env(self) -> dict[str, str]:
        """With it the command finds this server. It knows a local one on port 80 alone, so this one is its proxy."""
        login = {"KAGGLE_USERNAME": "ada", "KAGGLE_KEY": "k"}
        return {"KAGGLE_API_ENVIRONMENT": "LOCALHOST", "http_proxy": self.address, **login}

    def __enter__(self) -> "StandIn":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()

    def asked(self, method: str) -> list[dict]:
        """What this method was sent, each time."""
        return [sent for name, sent in self.sent if name == method]

    # Kaggle's methods: what they were sent -> their answer

    def StartBlobUpload(self, sent: dict) -> dict:
        token = f"token-{len(self.blobs)}"
        self.blobs[token] = sent["name"], b""
        return {"token": token, "createUrl": f"{self.address}/blobs/{token}"}

    def CreateDataset(self, sent: dict) -> dict:
        self.data_sets[sent["slug"]] = dict(self.blobs[file["token"]] for file in sent["files"])
        return {"status": "ok", "url": f"https://www.kaggle.com/datasets/ada/{sent['slug']}"}

    def CreateDatasetVersion(self, sent: dict) -> dict:
        return self.CreateDataset({"slug": sent["datasetSlug"], "files": sent["body"]["files"]})

    def GetDatasetStatus(self, sent: dict) -> dict:
        return {"status": "READY"} if sent["datasetSlug"] in self.data_sets else _ABSENT

    def GetDatasetMetadata(self, sent: dict) -> dict:
        return {"info": {"datasetSlug": sent["datasetSlug"], "licenses": [{"name": "other"}]}}

    def SaveKernel(self, sent: dict) -> dict:
        self.versions += 1
        source = self.folder / f"input-{self.versions}"
        source.mkdir(parents=True)
        for name in sent.get("datasetDataSources", []):
            owner, slug = name.split("/")
            self._mount(self.data_sets.get(slug, {}), source, owner, slug)
        for name in sent.get("kernelDataSources", []):
            target = source / name.split("/")[1]
            target.mkdir(parents=True)
            for path in self._output(self.versions - 1):
                (target / path.name).write_bytes(path.read_bytes())
        self.play(sent["text"], source, self.folder / f"session-{self.versions}" / "working")
        return {"versionNumber": self.versions, "url": "https://www.kaggle.com/code/ada/x"}

    def _mount(self, files: dict[str, bytes], source: Path, owner: str, slug: str) -> None:
        unpacks = self.versions % 2
        target = source / "datasets" / owner / slug if unpacks else source / slug
        target.mkdir(parents=True)
        for name, content in files.items():
            (target / name).write_bytes(content)
            if unpacks and name.endswith(".zip"):
                zipfile.ZipFile(target / name).extractall(target / Path(name).stem)
                (target / name).unlink()

    def _output(self, version: int) -> list[Path]:
        return sorted((self.folder / f"session-{version}" / "working").iterdir())

    def GetKernelSessionStatus(self, sent: dict) -> dict:
        return {"status": "COMPLETE"} if self.versions else _ABSENT

    def ListKernelSessionOutput(self, sent: dict) -> dict:
        files = self._output(self.versions)
        return {"files": [{"fileName": path.name, "url": f"{self.address}/output/{path.name}"} for path in files]}


_ABSENT = {"code": 403, "message": "Permission 'get' was denied"}


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        name = self.path.rsplit("/", 1)[1]
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.sent.append((name, sent))
        if name == "DownloadDataset":
            self.send_response(302)
            self.send_header("Location", f"{self.server.address}/data/{sent['datasetSlug']}/{sent['fileName']}")
            self.end_headers()
            return
        answers = self.server.answers.get(name)
        if answers:
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
        else:
            answer = getattr(self.server, name, lambda _: {})(sent)
        self._send(json.dumps(answer).encode(), answer.get("code", 200))

    def do_PUT(self):
        token = self.path.rsplit("/", 1)[1]
        name, _ = self.server.blobs[token]
        self.server.blobs[token] = name, self.rfile.read(int(self.headers["Content-Length"]))
        self._send(b"{}")

    def do_GET(self):
        what, *names = re.sub(r"^http://[^/]*", "", self.path).strip("/").split("/")
        if what == "output":
            content = {path.name: path.read_bytes() for path in self.server._output(self.server.versions)}
        else:
            content = self.server.data_sets[names[0]]
        if names[-1] in content:
            self._send(content[names[-1]], kind="application/octet-stream")
        else:
            self._send(json.dumps({"code": 404, "message": "Not Found"}).encode(), 404)

    def _send(self, content: bytes, code: int = 200, kind: str = "application/json"):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass
