"""How files reach the loopback Hub: which are large, commits, and the storage of large files by LFS."""

import base64
import fnmatch
import hashlib
import json
import re

from loopback_api import PAGE, REPO, Answer, ranged, route, say
from loopback_card import complaints
from loopback_refs import discuss
from loopback_repo import REGULAR_LIMIT, Entry, Refusal, large


@route("POST", f"/api/{REPO}/preupload/(?P<revision>[^/]+)")
def preupload(call):
    repository = call.repository(write=not call.flag("create_pr"))
    asked = call.json()
    files = repository.read_commit(repository.resolve(call.revision())).files
    ignore = asked.get("gitIgnore") or _text(repository, files, ".gitignore")
    ignored = _patterns(ignore, keep=lambda words: not words[0].startswith("#"))
    large_ones = _patterns(_text(repository, files, ".gitattributes"), keep=lambda words: "filter=lfs" in words)
    answer = []
    for file in asked["files"]:
        path, there = file["path"], files.get(file["path"])
        is_binary = b"\0" in base64.b64decode(file.get("sample", ""))
        is_large = file["size"] > REGULAR_LIMIT or is_binary or _matches(path, large_ones)
        known = {"oid": there.content} if there else {}
        mode = "lfs" if is_large else "regular"
        answer.append({"path": path, "uploadMode": mode, "shouldIgnore": _matches(path, ignored), **known})
    return say({"files": answer, "commitOid": repository.resolve(call.revision())})


def _text(repository, files, path):
    return repository.read(files[path]).decode(errors="replace") if path in files else ""


def _patterns(text, keep):
    return [words[0] for line in text.splitlines() if (words := line.split()) and keep(words)]


def _matches(path, patterns):
    names = (path, path.rpartition("/")[2])
    return any(fnmatch.fnmatchcase(name, pattern.strip("/")) for pattern in patterns for name in names)


@route("POST", f"/api/{REPO}/commit/(?P<revision>[^/]+)")
def commit(call):
    repository = call.repository(write=not call.flag("create_pr"))
    if call.user is None:
        raise Refusal(401, "Invalid username or password.")
    try:
        lines = [json.loads(line) for line in call.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        title = header["summary"].strip()
    except (ValueError, KeyError, TypeError, StopIteration):
        raise Refusal(400, "The commit's lines are malformed") from None
    if not title:
        raise Refusal(400, "A commit needs a summary")
    target = repository.resolve(call.revision())
    ref = _writable_ref(repository, call.revision())
    if header.get("parentCommit") not in (None, target):
        if not call.flag("create_pr"):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        target = repository.resolve(header["parentCommit"])
    changes = _changes(repository, repository.read_commit(target).files, lines)
    description = header.get("description", "")
    answer = {"success": True, "hookOutput": ""}
    if call.flag("create_pr"):
        number = discuss(call, repository, title, description, base=call.revision(), pull_request=True)
        ref = f"refs/pr/{number}"
        answer["pullRequestUrl"] = f"{call.address()}/discussions/{number}"
    sha = repository.commit(ref, changes, title=title, description=description, author=call.user, onto=target)
    return say({**answer, "commitOid": sha, "commitUrl": f"{call.address()}/commit/{sha}"})


def _writable_ref(repository, revision):
    for ref in (f"refs/heads/{revision}", revision):
        if ref in repository.refs:
            return ref
    raise Refusal(400, f"{revision} is neither a branch nor a pull request: nothing can be committed to it")


def _changes(repository, files, lines):
    """The changed entries of a commit; every complaint comes before anything is changed."""
    changes: dict[str, Entry | None] = {}
    for line in lines:
        key, value = line["key"], line["value"]
        if key == "header":
            continue
        path = value["path"]
        if not path or path.startswith("/") or {"", ".", "..", ".git"} & set(path.rstrip("/").split("/")):
            raise Refusal(400, f"Invalid path in the commit: {path!r}")
        if key == "file":
            data = value["content"].encode()
            data = base64.b64decode(data) if value.get("encoding") == "base64" else data
            if len(data) > REGULAR_LIMIT:
                raise Refusal(400, f"{path} has {len(data)} bytes; beyond {REGULAR_LIMIT} it has to be a large file")
            if path == "README.md" and (errors := complaints(data.decode(errors="replace"))[0]):
                raise Refusal(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
            changes[path] = repository.store(data)
        elif key == "lfsFile":
            if not repository.has_large(value["oid"]):
                raise Refusal(400, f"{path} points to a large file that was not uploaded: {value['oid']}")
            changes[path] = large(value["oid"], repository.object(value["oid"]).stat().st_size)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [path] if path in files and key == "deletedFile" else []
            gone += [p for p in files if key == "deletedFolder" and p.startswith(path.rstrip("/") + "/")]
            if not gone:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            changes |= dict.fromkeys(gone)
        else:
            raise Refusal(400, f"Unknown operation {key!r}")
    return changes


@route("POST", f"{PAGE}\\.git/info/lfs/objects/batch")
def lfs_batch(call):
    # The ref is missing where a pull request is going to be opened, which needs no right to write.
    asked = call.json()
    repository = call.repository(write="ref" in asked)
    if call.user is None:
        raise Refusal(401, "Invalid username or password.")
    chunk, objects = call.hub.chunk if "multipart" in asked.get("transfers", []) else None, []
    for item in asked["objects"]:
        oid, size = item["oid"], item["size"]
        if not re.fullmatch("[0-9a-f]{64}", oid):
            raise Refusal(422, f"No SHA-256: {oid}")
        found = {"oid": oid, "size": size, "authenticated": True}
        path = f"/{call.kind}/{call.name}/{oid}"
        if not repository.has_large(oid):
            upload = {"href": call.hub.signed("PUT", path), "header": {}}
            if chunk and size > chunk:
                count = -(-size // chunk)
                upload["header"] = {f"{n:05d}": call.hub.signed("PUT", f"{path}/{n}") for n in range(1, count + 1)}
                upload["header"]["chunk_size"] = str(chunk)
                upload["href"] = call.hub.signed("POST", f"/lfs-complete{path}", cdn=False)
            verify = {"href": f"{call.address()}.git/info/lfs/objects/verify", "header": {}}
            found["actions"] = {"upload": upload, "verify": verify}
        objects.append(found)
    return say({"transfer": "multipart" if chunk else "basic", "objects": objects})


@route("POST", f"{PAGE}\\.git/info/lfs/objects/verify")
def lfs_verify(call):
    repository, asked = call.repository(), call.json()
    there = repository.has_large(asked["oid"]) and repository.object(asked["oid"]).stat().st_size
    if there is False or there != asked["size"]:
        raise Refusal(404, "The object does not exist or has another size")
    return say({"message": "OK"})


@route("POST", f"/lfs-complete/{REPO}/(?P<oid>[0-9a-f]{{64}})")
def lfs_complete(call):
    call.hub.check_signature(call)
    repository = call.hub.find(call.kind, call.name)
    parts = [
        call.hub.parts.pop((call.rest["oid"], part["partNumber"], part["etag"].strip('"')), None)
        for part in call.json()["parts"]
    ]
    if repository is None or None in parts:
        raise Refusal(400, "A part is missing or has another ETag")
    return _keep_large(repository, call.rest["oid"], b"".join(parts))


def _keep_large(repository, oid, data):
    if hashlib.sha256(data).hexdigest() != oid:
        raise Refusal(400, "BadDigest: the content has another SHA-256 than its name says")
    repository.store(data, as_large=True)
    return Answer(b"")


@route("PUT", f"/storage/{REPO}/(?P<oid>[0-9a-f]{{64}})(?:/(?P<part>[0-9]+))?")
def storage_put(call):
    """The large files' storage: signed addresses on another port, which must never see a token."""
    call.hub.check_signature(call)
    if part := call.rest.get("part"):
        etag = hashlib.md5(call.body).hexdigest()
        call.hub.parts[call.rest["oid"], int(part), etag] = call.body
        return Answer(b"", 200, {"ETag": f'"{etag}"'})
    repository = call.hub.find(call.kind, call.name)
    if repository is None:
        raise Refusal(404, "NoSuchBucket")
    return _keep_large(repository, call.rest["oid"], call.body)


@route("GET HEAD", f"/storage/{REPO}/(?P<oid>[0-9a-f]{{64}})")
def storage_get(call):
    call.hub.check_signature(call)
    repository = call.hub.find(call.kind, call.name)
    if repository is None or not repository.has_large(call.rest["oid"]):
        raise Refusal(404, "NoSuchKey")
    data = repository.object(call.rest["oid"]).read_bytes()
    return ranged(
        call, data, {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Content-Type": "application/octet-stream"}
    )


@route("GET", f"/api/{REPO}/xet-(?:write|read)-token/(?P<revision>[^/]+)")
def xet_token(call):
    message = "The loopback Hub has no Xet storage: set HF_HUB_DISABLE_XET=1 before huggingface_hub is imported"
    raise Refusal(404, message)
