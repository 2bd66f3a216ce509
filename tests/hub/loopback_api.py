"""What the loopback Hub answers about accounts, repositories and their files, as huggingface_hub 2.4 asks.

One function per route: it takes a ``Call`` and returns an ``Answer`` or raises ``Refusal``. Wording, status and
``X-Error-Code`` are those of the real Hub where the client looks at them.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode

from loopback_card import complaints, front_matter
from loopback_repo import Refusal, Repository, pointer, tree_ids

ROUTES: list[tuple[str, re.Pattern, Any]] = []
REPO = r"(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
PAGE = r"/(?P<kind>datasets/|spaces/)?(?P<name>[^/]+/[^/]+)"
PREFIXES = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}


@dataclass
class Call:
    """One request: who asks for what. Parts of the path are decoded after they were split."""

    hub: Any
    method: str
    path: str
    headers: Any
    body: bytes
    query: dict[str, list[str]]
    user: str | None
    kind: str = "models"
    name: str = ""
    rest: dict[str, str] = field(default_factory=dict)

    def json(self) -> Any:
        try:
            return json.loads(self.body or b"{}")
        except ValueError:
            raise Refusal(400, "The body is no JSON") from None

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("1", "true")

    def repository(self, *, write: bool = False) -> Repository:
        """The repository of the path, if this user may see it (and, with ``write``, change it)."""
        found = self.hub.find(self.kind, self.name)
        if found is None or (found.about["private"] and not self.hub.owns(self.user, self.name)):
            status, message = (404, "Repository not found") if self.user else (401, "Invalid username or password.")
            raise Refusal(status, message, "RepoNotFound")
        if write and not self.hub.owns(self.user, self.name):
            if self.user is None:
                raise Refusal(401, "Invalid username or password.")
            raise Refusal(403, f"Forbidden: you cannot write to {self.name}. Pass `create_pr=1` to open a pull request")
        return found

    def revision(self) -> str:
        return self.rest.get("revision") or "main"

    def address(self) -> str:
        return f"{self.hub.url}/{PREFIXES[self.kind]}{self.name}"


@dataclass
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def say(value: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(json.dumps(value).encode(), status, {"Content-Type": "application/json; charset=utf-8", **headers})


def route(methods: str, pattern: str):
    def add(function):
        for method in methods.split():
            ROUTES.append((method, re.compile(pattern + "/?"), function))
        return function

    return add


def dispatch(call: Call, path: str) -> Answer:
    for method, pattern, function in ROUTES:
        if method == call.method and (match := pattern.fullmatch(path)):
            rest = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
            call.kind = rest.pop("kind", "models").rstrip("/")
            call.name = rest.pop("name", "")
            call.rest = rest
            return function(call)
    raise Refusal(404, f"The loopback Hub has no {call.method} {path}")


# Accounts, cards


@route("GET", "/api/whoami-v2")
def whoami(call):
    if call.user is None:
        raise Refusal(401, "Invalid username or password.")
    answer = {"type": "user", "name": call.user, "fullname": call.user, "email": f"{call.user}@loopback.example"}
    answer["orgs"] = [
        {"type": "org", "name": n, "fullname": n, "roleInOrg": "write"} for n in call.hub.orgs_of(call.user)
    ]
    answer["auth"] = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
    return say(answer)


@route("POST", "/api/validate-yaml")
def validate_yaml(call):
    errors, warnings = complaints(call.json().get("content", ""))
    answer = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
    return say(answer, 400 if errors else 200)


# Repositories


@route("POST", "/api/repos/create")
def create(call):
    asked = call.json()
    if call.user is None:
        raise Refusal(401, "Invalid username or password.")
    _name(call, asked)
    what, owner = call.kind[:-1], call.name.split("/")[0]
    if not call.hub.owns(call.user, call.name):
        raise Refusal(403, f'You don\'t have the rights to create a {what} under the namespace "{owner}"')
    if call.hub.find(call.kind, call.name) is not None:
        raise Refusal(409, f"You already created this {what} repo: {call.name}", url=call.address())
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    call.hub.add(call.kind, call.name, author=call.user, private=private)
    return say({"url": call.address(), "name": call.name, "id": call.name})


@route("DELETE", "/api/repos/delete")
def delete(call):
    _name(call, call.json())
    call.repository(write=True)
    call.hub.remove(call.kind, call.name)
    return Answer(b"OK")


@route("POST", "/api/repos/move")
def move(call):
    asked = call.json()
    for end in ("toRepo", "fromRepo"):
        owner, _, name = asked[end].partition("/")
        _name(call, {"organization": owner, "name": name, "type": asked.get("type")})
        if not call.hub.owns(call.user, call.name):
            raise Refusal(403, f"You have no write access to {call.name}")
    call.repository(write=True)
    call.hub.rename(call.kind, call.name, asked["toRepo"])
    return Answer(b"OK")


@route("PUT", f"/api/{REPO}/settings")
def settings(call):
    repository, asked = call.repository(write=True), call.json()
    if "visibility" in asked or "private" in asked:
        repository.about["private"] = asked.get("visibility") == "private" or bool(asked.get("private"))
    if "gated" in asked:
        repository.about["gated"] = asked["gated"]
    repository.save()
    return say({"private": repository.about["private"], "gated": repository.about["gated"]})


def _name(call, asked):
    """Take kind and name of the repository from the body instead of the path."""
    call.kind, call.name = (
        f"{asked.get('type') or 'model'}s",
        f"{asked.get('organization') or call.user}/{asked.get('name')}",
    )
    well_formed = re.fullmatch(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", call.name)
    if not well_formed or ".." in call.name or "--" in call.name or call.kind not in PREFIXES:
        raise Refusal(400, f"Invalid repo name: {call.name}")


@route("GET", "/api/(?P<kind>models|datasets|spaces)")
def list_repositories(call):
    found = []
    for name in call.hub.names(call.kind):
        call.name = name
        about, owner = call.hub.find(call.kind, name).about, name.split("/")[0]
        asked_for = call.query.get("author", [owner])[0] == owner and call.query.get("search", [""])[0] in name
        if asked_for and (not about["private"] or call.hub.owns(call.user, name)):
            found.append(
                {"id": name, "private": about["private"], "tags": [], "createdAt": show_time(about["created"])}
            )
    return say(found)


@route("GET", f"/api/{REPO}(?:/revision/(?P<revision>[^/]+))?")
def info(call):
    repository = call.repository()
    commit = repository.read_commit(repository.resolve(call.revision()))
    siblings = [
        {"rfilename": path} | (_blob(entry, "blobId") if call.flag("blobs") else {})
        for path, entry in sorted(commit.files.items())
    ]
    readme = commit.files.get("README.md")
    card = front_matter(repository.read(readme).decode(errors="replace")) if readme else {}
    card = card if isinstance(card, dict) else {}
    tags = [t for t in [card.get("library_name"), *(card.get("tags") or [])] if isinstance(t, str)]
    about = repository.about
    answer = {
        "id": call.name,
        "modelId": call.name,
        "author": call.name.split("/")[0],
        "sha": commit.sha,
        "lastModified": show_time(commit.date),
        "createdAt": show_time(about["created"]),
        "private": about["private"],
        "gated": "auto" if about["gated"] else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags,
        "siblings": siblings,
        "usedStorage": sum(entry.size for entry in commit.files.values()),
    }
    for key in ("library_name", "pipeline_tag"):
        if key in card:
            answer[key] = card[key]
    return say(answer | ({"cardData": card} if card else {}))


@route("GET", f"/api/{REPO}/auth-check")
def auth_check(call):
    _readable(call)
    return Answer(b"OK")


# Files


@route("GET", f"/api/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
def tree(call):
    repository = call.repository()
    sha = repository.resolve(call.revision())
    entries, folder = _listing(call, repository, sha), call.rest.get("path", "").strip("/")
    inside = [e for e in entries if e["path"].startswith(folder + "/" if folder else "")]
    if folder and not inside:
        raise Refusal(404, f'"{folder}" does not exist on "{call.revision()}"', "EntryNotFound")
    if not call.flag("recursive"):
        inside = [e for e in inside if "/" not in e["path"][len(folder) :].lstrip("/")]
    limit = int(call.query.get("limit", [call.hub.page])[0])
    start = int(call.query.get("cursor", [0])[0])
    headers = {"X-Repo-Commit": sha}
    if start + limit < len(inside):
        asked = {key: values[0] for key, values in call.query.items()} | {"cursor": start + limit}
        headers["Link"] = f'<{call.hub.url}{call.path}?{urlencode(asked)}>; rel="next"'
    return say(inside[start : start + limit], **headers)


@route("POST", f"/api/{REPO}/paths-info/(?P<revision>[^/]+)")
def paths_info(call):
    repository = call.repository()
    sha = repository.resolve(call.revision())
    if "json" in call.headers.get("Content-Type", ""):
        asked = call.json()
        paths, expand = asked["paths"], asked.get("expand")
    else:
        asked = parse_qs(call.body.decode())
        paths, expand = asked.get("paths", []), asked.get("expand", ["false"])[0].lower() == "true"
    wanted = {path.strip("/") for path in paths}
    call.query["expand"] = [str(bool(expand))]
    return say([e for e in _listing(call, repository, sha) if e["path"] in wanted])


def _listing(call, repository, sha):
    """All files and folders of a revision, as the tree and paths-info endpoints describe them."""
    files = repository.read_commit(sha).files
    found = [{"type": "file", "path": path} | _blob(entry, "oid") for path, entry in files.items()]
    folders = {path: oid for path, oid in tree_ids(files).items() if path}
    found += [{"type": "directory", "path": path, "oid": oid, "size": 0} for path, oid in folders.items()]
    if call.flag("expand"):
        changes = repository.last_changes(sha)
        for e in found:
            last = changes[e["path"]]
            e["lastCommit"] = {"id": last.sha, "title": last.title, "date": show_time(last.date)}
    return sorted(found, key=lambda e: e["path"])


def _blob(entry, name):
    found = {name: entry.oid, "size": entry.size}
    if entry.sha256:
        length = len(pointer(entry.sha256, entry.size))
        found["lfs"] = {"oid": entry.sha256, "sha256": entry.sha256, "size": entry.size, "pointerSize": length}
    return found


@route("GET HEAD", f"{PAGE}/(?:resolve|raw)/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(call):
    repository = _readable(call)
    sha = repository.resolve(call.revision())
    entry = repository.read_commit(sha).files.get(call.rest["path"])
    headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
    if entry is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", headers=headers)
    name = call.rest["path"].rpartition("/")[2].replace('"', "").encode("ascii", "replace").decode()
    headers["Content-Disposition"] = f'inline; filename="{name}";'
    if entry.sha256:
        headers |= {"X-Linked-Size": str(entry.size), "X-Linked-Etag": f'"{entry.sha256}"'}
        headers["Location"] = call.hub.signed("GET", f"/{call.kind}/{call.name}/{entry.sha256}")
        return Answer(f"Found. Redirecting to {headers['Location']}".encode(), 302, headers)
    return ranged(call, repository.read(entry), {**headers, "ETag": f'"{entry.oid}"', "Content-Type": "text/plain"})


def _readable(call):
    repository = call.repository()
    if repository.about["gated"] and not call.hub.owns(call.user, call.name):
        message = f"Access to model {call.name} is restricted and you are not in the authorized list."
        raise Refusal(403 if call.user else 401, message, "GatedRepo")
    return repository


def ranged(call, data, headers):
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", ""))
    if not asked or asked.groups() == ("", ""):
        return Answer(data, 200, headers)
    first, last = asked.groups()
    start = int(first) if first else max(len(data) - int(last), 0)
    end = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= end:
        raise Refusal(416, "The requested range lies outside the file")
    return Answer(data[start:end], 206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})


def show_time(date):
    return date.replace("+00:00", "Z")
