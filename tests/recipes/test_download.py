"""`tune download`, and data sets of the hub, against a server on this machine that speaks the hub's protocol.

The server answers what huggingface_hub asks: a repository's commit, the list of its files, and each file's headers and
bytes. As on the real hub, everyone sees the list of a gated repository, large files lie behind a redirect to a storage
elsewhere, and refusals carry a status, the headers X-Error-Code and X-Error-Message, and these very sentences.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from custom_components.models.shapes import LLAMA2_7B, shape_from_checkpoint
from custom_components.runtime.errors import UserError
from custom_components.weights.checkpoint_files import BaseCheckpoint
from tests.support.forked_tune import ForkedTune, WarmTune
from tests.support.models import loaded_model
from tests.support.paths import PROJECT, TINY_LLAMA

OPEN_MODEL = "NousResearch/Llama-2-7b-chat-hf"
GATED_MODEL = "meta-llama/Llama-2-7b-hf"
DATASET = "someone/some-dataset"
ABSENT = "someone/no-such-repository"

TOKEN_WITH_ACCESS = "hf_right"
TOKEN_WITHOUT_ACCESS = "hf_not_in_the_authorized_list"
UNKNOWN_TOKEN = "hf_wrong"

COMMIT = "c0ffee" + "0" * 34
LARGE_FILE_SUFFIXES = {".bin", ".model", ".safetensors"}
SECONDS_FOR_ONE_COMMAND = 60  # it takes 4; the rest is for a busy machine

CHECKPOINT_FILES = {path.name: path.read_bytes() for path in (TINY_LLAMA / "checkpoint").iterdir()}
MODEL_FILES = CHECKPOINT_FILES | {"pytorch_model.bin": b"the same weights again, pickled"}
CONVERSATION = [{"instruction": f"Question {number}?", "response": f"Answer {number}."} for number in range(3)]


@dataclass
class Repository:
    """Files by their names, all at the top; `gated` ones are for TOKEN_WITH_ACCESS only."""

    files: dict[str, bytes]
    gated: bool = False

    def listing(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        large_file = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        entry = {"type": "file", "path": name, "size": len(content), "oid": blob}
        return entry | ({"lfs": large_file} if Path(name).suffix in LARGE_FILE_SUFFIXES else {})


@dataclass
class Request:
    host: str  # "hub" or "storage"
    path: str
    token: str | None


@dataclass
class Hub:
    """The repositories by kind and name, the addresses that serve them, and every request that came."""

    repositories: dict[tuple[str, str], Repository]
    endpoint: str = ""
    storage: str = ""
    requests: list[Request] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    """What the hub's and the storage's answers share."""

    protocol_version = "HTTP/1.1"
    host: str
    hub: Hub

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.hub.requests.append(Request(self.host, path, token))
        self.answer_to(path, token)

    do_GET = do_HEAD = answer

    def answer_to(self, path: str, token: str | None) -> None:
        raise NotImplementedError

    def send(self, status: int, content: bytes, **headers: object) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, status: int, message: str, **headers: object) -> None:
        self.send(status, json.dumps({"error": message}).encode(), X_Error_Message=message, **headers)

    def log_message(self, *arguments: object) -> None:
        """Prints nothing; Hub.requests has it."""


class StorageHandler(Handler):
    """Large files for whoever knows the address. As storages of signed addresses do, it refuses a token on top."""

    host = "storage"

    def answer_to(self, path: str, token: str | None) -> None:
        if token is not None:
            return self.refuse(400, "Only one auth mechanism allowed")
        _, kind, owner, name, file = path.split("/")
        return self.send(200, self.hub.repositories[kind, f"{owner}/{name}"].files[file])


class HubHandler(Handler):
    host = "hub"

    def answer_to(self, path: str, token: str | None) -> None:
        if token not in (None, TOKEN_WITH_ACCESS, TOKEN_WITHOUT_ACCESS):
            return self.refuse(401, "Invalid credentials in Authorization header")
        question = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        file_request = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if question:
            kind, name = question[1], question[2]
        elif file_request:
            kind, name = "datasets" if file_request[1] else "models", file_request[2]
        else:
            return self.refuse(501, f"the test's hub does not know {self.command} {path}")
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            return self.refuse(401, "Invalid username or password.", X_Error_Code="RepoNotFound")
        if question:
            return self.describe(name, repository, question[3], question[4])
        return self.hand_out(kind, name, repository, file_request[3], token)

    def describe(self, name: str, repository: Repository, about: str | None, where: str | None) -> None:
        """The repository's commit or its list of files; gated repositories show these too."""
        if about != "tree":
            siblings = [{"rfilename": file} for file in repository.files]
            return self.send_json({"id": name, "sha": COMMIT, "siblings": siblings})
        if "/" in where:
            return self.refuse(404, "Entry not found", X_Error_Code="EntryNotFound")
        return self.send_json([repository.listing(file) for file in repository.files])

    def hand_out(self, kind: str, name: str, repository: Repository, file: str, token: str | None) -> None:
        """A file's headers and bytes; of a large file its headers and where its bytes lie."""
        restricted = f"Access to model {name} is restricted"
        if repository.gated and token is None:
            advice = "You must have access to it and be authenticated to access it. Please log in."
            return self.refuse(401, f"{restricted}. {advice}", X_Error_Code="GatedRepo")
        if repository.gated and token != TOKEN_WITH_ACCESS:
            advice = f"you are not in the authorized list. Visit https://huggingface.co/{name} to ask for access."
            return self.refuse(403, f"{restricted} and {advice}", X_Error_Code="GatedRepo")
        if file not in repository.files:
            return self.refuse(404, "Entry not found", X_Error_Code="EntryNotFound")
        listing = repository.listing(file)
        if "lfs" not in listing:
            return self.send(200, repository.files[file], X_Repo_Commit=COMMIT, ETag=f'"{listing["oid"]}"')
        return self.send(
            302,
            b"",
            Location=f"{self.hub.storage}/{kind}/{name}/{file}",
            X_Repo_Commit=COMMIT,
            X_Linked_Size=listing["size"],
            X_Linked_ETag=f'"{listing["lfs"]["oid"]}"',
        )


@contextmanager
def served(handler: type[Handler], hub: Hub) -> Iterator[str]:
    """Serves on a free port while the context lasts; gives the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub(
        {
            ("models", OPEN_MODEL): Repository(MODEL_FILES),
            ("models", GATED_MODEL): Repository(MODEL_FILES, gated=True),
            ("datasets", DATASET): Repository(
                {"train.jsonl": "".join(json.dumps(row) + "\n" for row in CONVERSATION).encode()}
            ),
        }
    )
    with served(HubHandler, hub) as hub.endpoint, served(StorageHandler, hub) as hub.storage:
        yield hub


@pytest.fixture(scope="module")
def module_hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def hub(module_hub: Hub) -> Hub:
    """The hub, which has seen no request yet."""
    module_hub.requests.clear()
    return module_hub


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """One in which this hub is the hub, and in which there is no token, cache or proxy of the machine's user."""
    personal = ("HF_", "HUGGING", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(personal)}
    return kept | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def warm(module_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmTune]:
    warm = WarmTune(environment(module_hub, tmp_path_factory.mktemp("home")))
    yield warm
    warm.close()


def tune_download(warm: WarmTune, folder: Path, repository: str, *options: str) -> subprocess.CompletedProcess[str]:
    """`tune download` into folder/model."""
    command = ["download", repository, "--output-dir", str(folder / "model"), *options]
    return ForkedTune(*command, warm=warm).result(SECONDS_FOR_ONE_COMMAND)


def files_in(directory: Path) -> dict[str, bytes]:
    """What lies in a downloaded directory, but for what `tune download` and huggingface_hub note about it."""
    notes = {"original_repo_id.json", ".cache"}
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in notes}


@pytest.fixture(scope="module")
def open_download(
    module_hub: Hub, warm: WarmTune, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Request]]:
    """The directory of a download by the command in configs/llama2_7b_qlora.yaml, and the requests that the hub saw."""
    folder = tmp_path_factory.mktemp("open_download")
    module_hub.requests.clear()
    process = tune_download(warm, folder, OPEN_MODEL, "--ignore-patterns", "*.bin")
    assert process.returncode == 0, process.stderr
    assert "Successfully downloaded model repo" in process.stdout
    return folder / "model", list(module_hub.requests)


def test_a_download_is_the_repository_byte_for_byte_and_leaves_out_what_the_pattern_names(open_download):
    directory, requests = open_download
    assert files_in(directory) == CHECKPOINT_FILES
    assert any(request.path.endswith("/model.safetensors") for request in requests)
    assert not [request for request in requests if request.path.endswith(".bin")]


def test_a_download_says_which_repository_it_came_from(open_download):
    """An adapter's `base_model_name_or_path` is read from there."""
    directory, _ = open_download
    assert json.loads((directory / "original_repo_id.json").read_text()) == {"repo_id": OPEN_MODEL}
    assert BaseCheckpoint(directory, LLAMA2_7B).name == OPEN_MODEL


def test_a_download_is_a_checkpoint_that_this_package_loads(open_download):
    """Nothing that `tune download` leaves beside the files gets in the way."""
    directory, _ = open_download
    assert shape_from_checkpoint(directory) == shape_from_checkpoint(TINY_LLAMA / "checkpoint")
    loaded_model(directory)


def test_a_gated_model_is_downloaded_with_a_token_that_goes_to_the_hub_alone(hub, warm, tmp_path):
    process = tune_download(warm, tmp_path, GATED_MODEL, "--hf-token", TOKEN_WITH_ACCESS)
    assert process.returncode == 0, process.stderr
    assert files_in(tmp_path / "model") == MODEL_FILES
    assert {request.token for request in hub.requests if request.host == "hub"} == {TOKEN_WITH_ACCESS}
    assert {request.token for request in hub.requests if request.host == "storage"} == {None}


@pytest.mark.parametrize(
    ("repository", "token", "message"),
    [
        (GATED_MODEL, None, "have access to the repository and have provided the proper Hugging Face API token"),
        (GATED_MODEL, TOKEN_WITHOUT_ACCESS, "Please ensure you have access to the repository."),
        (GATED_MODEL, UNKNOWN_TOKEN, "Invalid credentials in Authorization header"),
        (ABSENT, None, f"Repository '{ABSENT}' not found on the Hugging Face Hub."),
    ],
    ids=["no token", "token without access", "unknown token", "no such repository"],
)
def test_a_refused_download_fails_with_the_reason_and_leaves_no_checkpoint(
    hub, warm, tmp_path, repository, token, message
):
    process = tune_download(warm, tmp_path, repository, *(["--hf-token", token] if token else []))
    assert process.returncode != 0
    assert message in process.stderr
    assert "Successfully" not in process.stdout
    assert {request.token for request in hub.requests} == {token}
    assert not [request for request in hub.requests if request.host == "storage"]
    with pytest.raises(UserError, match="is not a directory|has neither config.json nor params.json"):
        shape_from_checkpoint(tmp_path / "model")


# Without the parquet export, which `datasets` asks for at datasets-server.HUB: a name to look up outside this machine.
READ_ROWS = """
import json, sys
import datasets
from custom_components.datasets.sources import find_source
from custom_components.runtime.errors import UserError

datasets.config.USE_PARQUET_EXPORT = False
for name, split in json.loads(sys.argv[1]):
    try:
        print(json.dumps([[row.location, row.values] for row in find_source(name, split).rows()]))
    except UserError as error:
        print(json.dumps(str(error)))
"""
DATA_SETS_AND_SPLITS = [(DATASET, "train"), (DATASET, "test"), (ABSENT, "train")]


@pytest.fixture(scope="module")
def rows_or_error(module_hub, tmp_path_factory):
    """The rows that come of each data set and split, or the words of the error."""
    process = subprocess.run(
        [sys.executable, "-c", READ_ROWS, json.dumps(DATA_SETS_AND_SPLITS)],
        cwd=PROJECT,
        env=environment(module_hub, tmp_path_factory.mktemp("home")),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS_FOR_ONE_COMMAND,
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()[-len(DATA_SETS_AND_SPLITS) :]
    return dict(zip(DATA_SETS_AND_SPLITS, map(json.loads, lines), strict=True))


def test_rows_of_a_data_set_on_the_hub(rows_or_error):
    expected = [[f"{DATASET} row {number}", row] for number, row in enumerate(CONVERSATION, 1)]
    assert rows_or_error[DATASET, "train"] == expected


@pytest.mark.parametrize(
    ("name", "split", "reason"),
    [
        (DATASET, "test", "Unknown split"),
        (ABSENT, "train", "doesn't exist on the Hub or cannot be accessed"),
    ],
    ids=["no such split", "no such data set"],
)
def test_a_data_set_or_split_that_the_hub_has_not_is_an_error_that_names_it(rows_or_error, name, split, reason):
    message = rows_or_error[name, split]
    assert f"{name!r} is no file here and could not be fetched from the hub, split {split!r}" in message
    assert reason in message
