"""Branches, tags, pull requests and discussions of the loopback Hub."""

from loopback_api import REPO, Answer, route, say, show_time
from loopback_repo import MAIN, Refusal


@route("GET", f"/api/{REPO}/commits/(?P<revision>[^/]+)")
def commits(call):
    history = call.repository().history(call.revision())
    found = [{"id": c.sha, "title": c.title, "message": c.description, "date": show_time(c.date)} for c in history]
    return say([c | {"authors": [{"user": commit.author}]} for c, commit in zip(found, history)])


@route("GET", f"/api/{REPO}/refs")
def list_refs(call):
    found = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
    kinds = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
    for ref, sha in call.repository().refs.items():
        start = next(start for start in kinds if ref.startswith(start))
        name = ref.removeprefix("refs/" if start == "refs/pr/" else start)
        found[kinds[start]].append({"name": name, "ref": ref, "targetCommit": sha})
    return say(found)


@route("POST", f"/api/{REPO}/branch/(?P<branch>[^/]+)")
def add_branch(call):
    return _point(call, f"refs/heads/{call.rest['branch']}", call.json().get("startingPoint") or "main")


@route("POST", f"/api/{REPO}/tag/(?P<revision>[^/]+)")
def add_tag(call):
    return _point(call, f"refs/tags/{call.json()['tag']}", call.revision())


@route("DELETE", f"/api/{REPO}/(?P<part>branch|tag)/(?P<which>[^/]+)")
def remove_ref(call):
    repository = call.repository(write=True)
    ref = f"refs/{'heads' if call.rest['part'] == 'branch' else 'tags'}/{call.rest['which']}"
    if ref == MAIN:
        raise Refusal(403, "The branch main cannot be deleted")
    if ref not in repository.refs:
        raise Refusal(404, f"Invalid rev id: {ref}", "RevisionNotFound")
    del repository.refs[ref]
    repository.save()
    return Answer(b"OK")


def _point(call, ref, start):
    repository = call.repository(write=True)
    if ref in repository.refs:
        raise Refusal(409, f"Reference {ref} already exists")
    repository.refs[ref] = repository.resolve(start)
    repository.save()
    return Answer(b"OK")


# Pull requests and discussions


def discuss(call, repository, title, description, *, pull_request, base="main", status="open"):
    """Open a discussion or a pull request, without saving it yet; returns its number."""
    if call.user is None:
        raise Refusal(401, "Invalid username or password.")
    number = len(repository.about["discussions"]) + 1
    opened = {"num": number, "title": title, "description": description, "author": call.user, "status": status}
    repository.about["discussions"].append({**opened, "isPullRequest": pull_request, "base": base, "merge": None})
    if pull_request:
        repository.refs[f"refs/pr/{number}"] = repository.resolve(base)
    return number


@route("GET", f"/api/{REPO}/discussions")
def list_discussions(call):
    found = [_discussion(call, d) for d in reversed(call.repository().about["discussions"])]
    kind, status = call.query.get("type", ["all"])[0], call.query.get("status", ["all"])[0]
    found = [d for d in found if kind == "all" or d["isPullRequest"] == (kind == "pull_request")]
    found = [d for d in found if status == "all" or (d["status"] in ("open", "draft")) == (status == "open")]
    return say({"discussions": found, "count": len(found), "start": 0})


@route("POST", f"/api/{REPO}/discussions")
def open_discussion(call):
    repository, asked = call.repository(), call.json()
    pull_request = bool(asked.get("pullRequest"))
    options = {"pull_request": pull_request, "status": "draft" if pull_request else "open"}
    number = discuss(call, repository, asked["title"], asked.get("description", ""), **options)
    repository.save()
    return say({"num": number, "url": f"{call.address()}/discussions/{number}", "pullRequest": pull_request})


def _found(call, repository):
    number = int(call.rest["number"])
    if not 0 < number <= len(repository.about["discussions"]):
        raise Refusal(404, "Discussion not found")
    return repository.about["discussions"][number - 1]


@route("GET", f"/api/{REPO}/discussions/(?P<number>[0-9]+)")
def show_discussion(call):
    return say(_discussion(call, _found(call, call.repository())))


@route("POST", f"/api/{REPO}/discussions/(?P<number>[0-9]+)/status")
def change_status(call):
    repository = call.repository(write=True)
    _found(call, repository)["status"] = call.json()["status"]
    repository.save()
    return say({"newStatus": _event(call, repository, "status-change", call.user, {"status": call.json()["status"]})})


@route("POST", f"/api/{REPO}/discussions/(?P<number>[0-9]+)/merge")
def merge(call):
    repository = call.repository(write=True)
    asked = _found(call, repository)
    if not asked["isPullRequest"] or asked["status"] != "open":
        raise Refusal(400, "This is no open pull request")
    ref = f"refs/heads/{asked['base']}"
    theirs = repository.resolve(f"refs/pr/{asked['num']}")
    known = {c.sha for c in repository.history(asked["base"])}
    onto = next(c for c in repository.history(theirs) if c.sha in known)
    ours, wanted = repository.read_commit(repository.refs[ref]).files, repository.read_commit(theirs).files
    changes = {p: wanted.get(p) for p in wanted.keys() | onto.files.keys() if wanted.get(p) != onto.files.get(p)}
    if conflicts := sorted(p for p in changes if ours.get(p) != onto.files.get(p)):
        raise Refusal(409, f"The pull request conflicts with {asked['base']} in {', '.join(conflicts)}")
    title = f"{asked['title']} (#{asked['num']})"
    asked["merge"] = repository.commit(ref, changes, title=title, author=call.user, also=[theirs])
    asked["status"] = "merged"
    repository.save()
    return say({"success": True})


def _discussion(call, d):
    repository = call.repository()
    found = {key: d[key] for key in ("num", "title", "status", "isPullRequest")}
    found |= {"author": {"name": d["author"]}, "repo": {"name": call.name, "type": call.kind[:-1]}}
    found["createdAt"] = show_time(repository.about["created"])
    comment = {"edited": False, "hidden": False, "latest": {"raw": d["description"]}}
    found["events"] = [_event(call, repository, "comment", d["author"], comment)]
    if d["isPullRequest"]:
        found["changes"] = {"base": f"refs/heads/{d['base']}", "mergeCommitId": d["merge"]}
        found |= {"filesWithConflicts": [], "diff": ""}
    return found


def _event(call, repository, kind, author, data):
    event = {"id": "0" * 24, "type": kind, "createdAt": show_time(repository.about["created"]), "data": data}
    return event | {"author": {"name": author}}
