"""What the tests of the loopback Hub run in the client's process: huggingface_hub as its users call it."""

import hashlib
import os
import socket
import threading
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers, get_session


def call(method: str, **arguments):
    """Any method of HfApi, with its result as far as JSON can say it."""
    return _plain(getattr(HfApi(), method)(**arguments))


def _plain(value):
    if isinstance(value, (str, bool, int, float, type(None))):
        return value if type(value) in (str, bool, int, float, type(None)) else str(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if hasattr(value, "__dict__"):
        return _plain(vars(value))
    return [_plain(v) for v in value] if hasattr(value, "__iter__") else str(value)


def upload(repo_id, folder, **arguments):
    info = HfApi().upload_folder(repo_id=repo_id, folder_path=folder, **arguments)
    return {"oid": info.oid, "url": str(info), "pr": info.pr_revision}


def download(repo_id, filename, **arguments):
    """The content of a file, as text of Latin-1."""
    return Path(HfApi().hf_hub_download(repo_id, filename, **arguments)).read_bytes().decode("latin-1")


def digest(repo_id, filename):
    return hashlib.sha256(Path(HfApi().hf_hub_download(repo_id, filename)).read_bytes()).hexdigest()


def snapshot(repo_id, **arguments):
    folder = Path(HfApi().snapshot_download(repo_id, **arguments))
    return {str(p.relative_to(folder)): p.read_bytes().decode("latin-1") for p in folder.rglob("*") if p.is_file()}


def commit(repo_id, add=None, delete=(), **arguments):
    operations = [CommitOperationAdd(path, text.encode()) for path, text in (add or {}).items()]
    operations += [CommitOperationDelete(path) for path in delete]
    return HfApi().create_commit(repo_id, operations, commit_message="One commit", **arguments).oid


def card(text, repo_id=None):
    found = ModelCard(text)
    found.validate()
    return repo_id and str(found.push_to_hub(repo_id))


def resume(repo_id, filename, have, folder):
    """Go on with a download of which ``have`` is already there."""
    path = Path(folder) / "partial"
    path.write_bytes(have.encode("latin-1"))
    with open(path, "ab") as file:
        http_get(hf_hub_url(repo_id, filename), file, resume_size=len(have), headers=build_hf_headers())
    return path.read_bytes().decode("latin-1")


def get(url, **headers):
    answer = get_session().get(url, headers=headers)
    return [answer.status_code, answer.text]


def fail(message):
    raise LookupError(message)


def reach(host):
    socket.create_connection((host, 80), timeout=1).close()


def pid():
    return os.getpid()


def hang():
    threading.Event().wait()


def leave():
    os._exit(3)
