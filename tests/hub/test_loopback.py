"""The loopback Hub, by the real client: what goes up comes back, under git's names, for those who may see it."""

import hashlib
import shutil
import subprocess

import pytest
from client import CLIENT, RemoteError
from loopback_card import complaints
from loopback_repo import Entry, git_object, large, pointer, tree_ids

CARD = "---\nlicense: mit\nlibrary_name: peft\ntags: [a]\n---\n# A card\n"
WEIGHTS = bytes(range(256)) * 100


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "up"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "weights.safetensors").write_bytes(WEIGHTS)
    (folder / "sub" / "picture.png").write_bytes(b"\x89PNG\r\n\0\0")
    (folder / "sub" / "notes.txt").write_text("ü\n")
    return folder


@pytest.fixture
def api(client):
    """Methods of HfApi in the client's process."""

    def call(method, **arguments):
        return client("scripts_loopback:call", method=method, **arguments)

    return call


def uploaded(hub, client, folder, repo_id="me/x", **arguments):
    if not hub.exists(repo_id):
        hub.create(repo_id)
    return client("scripts_loopback:upload", repo_id=repo_id, folder=str(folder), **arguments)


def test_git_names():
    assert git_object("blob", b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert git_object("tree", b"") == "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
    assert tree_ids({}) == {"": "4b825dc642cb6eb9a060e54bf8d69288fbee4904"}


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_agrees(tmp_path):
    names = ["a", "a.b", "a-b/x", "a0/y", "b/c/d/e", "b/c.d", "ü/ö", "z"]
    files = {name: name.encode() * 3 for name in names} | {"w.bin": pointer("ab" * 32, 7)}
    for path, data in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "-c", "core.autocrlf=false", "add", "."], check=True)
    tree = subprocess.run([*git, "write-tree"], check=True, capture_output=True, text=True).stdout.strip()
    entries = {path: Entry(git_object("blob", data), len(data)) for path, data in files.items()}
    assert large("ab" * 32, 7).oid == entries["w.bin"].oid
    assert tree_ids(entries)[""] == tree


def test_a_folder_goes_up_and_comes_back(hub, client, folder):
    done = uploaded(hub, client, folder, commit_message="Up", commit_description="Why")
    there = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    files = hub.files("me/x")
    assert files.pop(".gitattributes")
    assert files == there
    newest, first = hub.commits("me/x")
    assert (newest.sha, newest.title, newest.description, newest.author) == (done["oid"], "Up", "Why", "me")
    assert done["url"] == f"{hub.url}/me/x/commit/{newest.sha}"
    assert newest.parents == [first.sha]
    assert hub.branches("me/x") == {"main": newest.sha}
    back = client("scripts_loopback:snapshot", repo_id="me/x")
    assert {k: v.encode("latin-1") for k, v in back.items() if k != ".gitattributes"} == there
    assert client("tests.hub.scripts_loopback:download", repo_id="me/x", filename="sub/notes.txt") == "Ã¼\n"
    # Large files went to the storage, which has seen no token; the others went with the commit.
    storage = [r for r in hub.requests if r.path.startswith("/storage/")]
    assert sorted(r.size for r in storage if r.method == "PUT") == [8, len(WEIGHTS)]
    assert {r.method for r in storage} == {"PUT", "GET"}
    assert not any("Authorization" in r.headers for r in storage)
    assert all(r.headers["Authorization"] == f"Bearer {hub.token}" for r in hub.requests if r not in storage)
    assert len(hub.bodies) == len(hub.requests)
    assert WEIGHTS in hub.bodies


def test_what_has_not_changed_is_not_sent_again(hub, client, folder):
    first = uploaded(hub, client, folder)
    (folder / "sub" / "notes.txt").write_text("other")
    hub.requests.clear()
    second = uploaded(hub, client, folder)
    assert not any(r.method == "PUT" and r.path.startswith("/storage") for r in hub.requests)
    assert hub.commits("me/x")[1].sha == first["oid"]
    assert uploaded(hub, client, folder)["oid"] == second["oid"]


def test_a_large_file_in_parts(hub, client, folder):
    hub.chunk = 10_000
    uploaded(hub, client, folder)
    assert sorted(r.size for r in hub.requests if r.method == "PUT")[1:] == [5600, 10_000, 10_000]
    assert hub.files("me/x")["weights.safetensors"] == WEIGHTS


def test_listings(hub, client, api):
    hub.create("me/x")
    hub.put("me/x", {"a/b/c.txt": b"1", "a/d.txt": b"22"})
    sha = hub.put("me/x", {"w.bin": b"333", "a/d.txt": b"4444"})
    hub.page = 2
    assert api("list_repo_files", repo_id="me/x") == [".gitattributes", "a/b/c.txt", "a/d.txt", "w.bin"]
    assert sum("cursor=" in r.path for r in hub.requests) == 2
    tree = api("list_repo_tree", repo_id="me/x", path_in_repo="a", expand=True)
    assert [(t["path"], "tree_id" in t) for t in tree] == [("a/b", True), ("a/d.txt", False)]
    assert [t["last_commit"]["oid"] == sha for t in tree] == [False, True]
    [file] = api("get_paths_info", repo_id="me/x", paths=["w.bin", "missing"])
    digest = hashlib.sha256(b"333").hexdigest()
    assert file["lfs"] == {"size": 3, "sha256": digest, "pointer_size": len(pointer(digest, 3))}
    info = api("model_info", repo_id="me/x", files_metadata=True)
    assert info["sha"] == sha
    assert {s["rfilename"]: s["size"] for s in info["siblings"] if s["rfilename"] != ".gitattributes"} == {
        "a/b/c.txt": 1,
        "a/d.txt": 4,
        "w.bin": 3,
    }
    assert [api("file_exists", repo_id="me/x", filename=name) for name in ("a/d.txt", "a", "b")] == [True, False, False]
    assert [api("repo_exists", repo_id=name) for name in ("me/x", "me/y")] == [True, False]
    with pytest.raises(RemoteError, match="RemoteEntryNotFoundError"):
        api("list_repo_tree", repo_id="me/x", path_in_repo="none")


def test_revisions(hub, client, api, folder):
    first = uploaded(hub, client, folder)["oid"]
    api("create_branch", repo_id="me/x", branch="dev")
    (folder / "sub" / "notes.txt").write_text("dev")
    second = uploaded(hub, client, folder, revision="dev")["oid"]
    api("create_tag", repo_id="me/x", tag="v1.0", revision="dev")
    assert hub.branches("me/x") == {"main": first, "dev": second}
    refs = api("list_repo_refs", repo_id="me/x")
    assert {b["name"]: b["target_commit"] for b in refs["branches"]} == {"main": first, "dev": second}
    assert [(t["ref"], t["target_commit"]) for t in refs["tags"]] == [("refs/tags/v1.0", second)]
    assert [c["commit_id"] for c in api("list_repo_commits", repo_id="me/x", revision="dev")][:2] == [second, first]
    expected = {"main": "Ã¼\n", "dev": "dev", "v1.0": "dev", first: "Ã¼\n", second: "dev"}
    for revision, text in expected.items():
        arguments = {"repo_id": "me/x", "filename": "sub/notes.txt", "revision": revision}
        assert client("scripts_loopback:download", **arguments) == text
    for method, arguments in (("create_branch", {"branch": "dev"}), ("create_tag", {"tag": "v1.0"})):
        api(method, repo_id="me/x", exist_ok=True, **arguments)
        with pytest.raises(RemoteError, match="409"):
            api(method, repo_id="me/x", **arguments)
    api("delete_branch", repo_id="me/x", branch="dev")
    api("delete_tag", repo_id="me/x", tag="v1.0")
    assert set(hub.refs("me/x")) == {"refs/heads/main"}
    with pytest.raises(RemoteError, match="RevisionNotFoundError"):
        client("scripts_loopback:download", repo_id="me/x", filename="README.md", revision="dev")
    with pytest.raises(RemoteError, match="RevisionNotFoundError"):
        uploaded(hub, client, folder, revision="never-made")


def test_pull_requests(hub, client, api, folder):
    main = hub.create("me/x")
    done = uploaded(hub, client, folder, create_pr=True, token=hub.other_token, commit_message="Please")
    assert done["pr"] == "refs/pr/1"
    assert hub.commits("me/x")[0].sha == main
    assert hub.commits("me/x", "refs/pr/1")[0].author == hub.other_user
    arguments = {"repo_id": "me/x", "filename": "weights.safetensors", "revision": "refs/pr/1"}
    assert client("scripts_loopback:download", **arguments).encode("latin-1") == WEIGHTS
    [found] = api("get_repo_discussions", repo_id="me/x")
    assert (found["title"], found["author"], found["is_pull_request"]) == ("Please", hub.other_user, True)
    hub.put("me/x", {"later.txt": b"kept"})
    api("merge_pull_request", repo_id="me/x", discussion_num=1)
    assert hub.files("me/x")["weights.safetensors"] == WEIGHTS
    assert hub.files("me/x")["later.txt"] == b"kept"
    assert len(hub.commits("me/x")[0].parents) == 2
    # The other way: first a draft, then commits to it.
    draft = api("create_pull_request", repo_id="me/x", title="A draft", description="Why")
    assert (draft["num"], draft["status"], draft["events"][0]["content"]) == (2, "draft", "Why")
    hub.put("me/x", {"later.txt": b"theirs"}, "refs/pr/2")
    hub.put("me/x", {"later.txt": b"ours"})
    with pytest.raises(RemoteError, match="400"):
        api("merge_pull_request", repo_id="me/x", discussion_num=2)
    api("change_discussion_status", repo_id="me/x", discussion_num=2, new_status="open")
    with pytest.raises(RemoteError, match="conflicts with main in later"):
        api("merge_pull_request", repo_id="me/x", discussion_num=2)
    assert hub.files("me/x")["later.txt"] == b"ours"


def test_who_may_see_and_write(hub, client, api):
    assert api("whoami")["name"] == "me"
    with pytest.raises(RemoteError, match="Invalid user token"):
        api("whoami", token="hf_wrong")
    api("create_repo", repo_id="me/secret", private=True)
    hub.put("me/secret", {"f": b"1"})
    read = {"function": "scripts_loopback:download", "repo_id": "me/secret", "filename": "f"}
    for token in (False, hub.other_token):
        with pytest.raises(RemoteError) as error:
            client(**read, token=token)
        assert error.value.type == "RepositoryNotFoundError"
        assert not api("repo_exists", repo_id="me/secret", token=token)
    assert client(**read) == "1"
    api("update_repo_settings", repo_id="me/secret", private=False, gated="auto")
    client.clear_cache()
    for token in (False, hub.other_token):
        with pytest.raises(RemoteError) as error:
            client(**read, token=token)
        assert error.value.type == "GatedRepoError"
    assert client(**read) == "1"
    api("update_repo_settings", repo_id="me/secret", gated=False)
    assert client(**read, token=hub.other_token) == "1"
    before = hub.state()
    for token, status in ((hub.other_token, "403"), (False, "401"), ("hf_wrong", "401")):
        with pytest.raises(RemoteError, match=status):
            client("scripts_loopback:commit", repo_id="me/secret", add={"f": "2"}, token=token)
        with pytest.raises(RemoteError, match=status):
            api("delete_repo", repo_id="me/secret", token=token)
    assert hub.state() == before


def test_making_moving_and_deleting(hub, api):
    assert api("create_repo", repo_id="x") == f"{hub.url}/me/x"
    assert api("create_repo", repo_id="me/x", exist_ok=True) == f"{hub.url}/me/x"
    with pytest.raises(RemoteError, match="409"):
        api("create_repo", repo_id="me/x")
    with pytest.raises(RemoteError, match="403"):
        api("create_repo", repo_id="someone-else/x")
    assert api("create_repo", repo_id="my-lab/x", private=True) == f"{hub.url}/my-lab/x"
    assert api("create_repo", repo_id="me/d", repo_type="dataset") == f"{hub.url}/datasets/me/d"
    assert hub.exists("me/d", kind="datasets")
    assert not hub.exists("me/d")
    assert [m["id"] for m in api("list_models", author="my-lab")] == ["my-lab/x"]
    assert api("list_models", author="my-lab", token=False) == []
    api("move_repo", from_id="me/x", to_id="my-lab/y")
    assert hub.exists("my-lab/y")
    with pytest.raises(RemoteError, match="409"):
        api("move_repo", from_id="my-lab/y", to_id="my-lab/x")
    api("delete_repo", repo_id="my-lab/x")
    assert not hub.exists("my-lab/x")
    api("delete_repo", repo_id="my-lab/x", missing_ok=True)
    with pytest.raises(RemoteError, match="RepositoryNotFoundError"):
        api("delete_repo", repo_id="my-lab/x")


def test_a_commit_is_all_or_nothing(hub, client, api):
    first = hub.create("me/x")
    second = hub.put("me/x", {"a/b": b"1", "a/c": b"2", "d": b"3"})
    before = hub.state()
    with pytest.raises(RemoteError, match="A file with this name doesn't exist"):
        client("scripts_loopback:commit", repo_id="me/x", add={"new": "4"}, delete=["a/b", "missing"])
    with pytest.raises(RemoteError, match="412"):
        client("scripts_loopback:commit", repo_id="me/x", add={"new": "4"}, parent_commit=first)
    with pytest.raises(RemoteError, match="400"):
        client("scripts_loopback:commit", repo_id="me/x", add={"new": "4"}, revision=second)
    assert hub.state() == before
    arguments = {"add": {"new": "4"}, "delete": ["a/", "d"], "parent_commit": second}
    client("scripts_loopback:commit", repo_id="me/x", **arguments)
    assert set(hub.files("me/x")) == {".gitattributes", "new"}
    api("delete_file", repo_id="me/x", path_in_repo="new")
    assert set(hub.files("me/x")) == {".gitattributes"}


def test_ignored_files_stay_behind(hub, client):
    hub.create("me/x")
    client("scripts_loopback:commit", repo_id="me/x", add={".gitignore": "# why\n*.log\n", "a.log": "1", "b.txt": "2"})
    assert set(hub.files("me/x")) == {".gitattributes", ".gitignore", "b.txt"}


@pytest.mark.skipif(CLIENT < (2, 1), reason="older clients validate cards at huggingface.co only")
def test_cards(hub, client, api, tmp_path):
    hub.create("me/x")
    client("scripts_loopback:card", text=CARD, repo_id="me/x")
    assert hub.files("me/x")["README.md"].decode().split("---")[2].strip() == "# A card"
    info = api("model_info", repo_id="me/x")
    assert (info["library_name"], info["tags"]) == ("peft", ["peft", "a"])
    with pytest.raises(RemoteError, match="license") as error:
        client("scripts_loopback:card", text=CARD.replace("mit", "mine"))
    assert error.value.type == "ValueError"
    before = hub.state()
    (tmp_path / "README.md").write_text("---\nbase_model: /home/me/vit\n---\n")
    with pytest.raises(RemoteError, match="base_model"):
        client("scripts_loopback:upload", repo_id="me/x", folder=str(tmp_path))
    assert hub.state() == before


@pytest.mark.parametrize(
    "front",
    [
        "license: mine",
        "base_model: ./local",
        "base_model: [a/b/c]",
        "datasets: [1]",
        "base_model_relation: child",
        "tags: [1]",
        "pipeline_tag: [a]",
        "a: [",
        "- a",
        "model-index: {}",
        "model-index: [{name: x}]",
        "model-index: [{name: x, results: [{task: {type: t}, dataset: {type: d, name: n}}]}]",
        "model-index: [{name: x, results: [{task: {type: t}, metrics: [{type: m, value: 1}]}]}]",
        "model-index: [{name: x, results: [{task: {type: t}, dataset: {type: d, name: n}, metrics: [{type: m}]}]}]",
    ],
)
def test_front_matter_that_the_hub_refuses(front):
    assert complaints(f"---\n{front}\n---\n")[0]


def test_front_matter_that_the_hub_takes():
    assert complaints("# No front matter") == ([], ["empty or missing yaml metadata in repo card"])
    result = "{task: {type: t}, dataset: {type: d, name: n}, metrics: [{type: m, value: 1}]}"
    card = f"---\nlicense: other\nbase_model: [a/b, c]\nmodel-index: [{{name: x, results: [{result}]}}]\n---\n"
    assert complaints(card) == ([], [])


def test_any_path_can_be_put(hub, client, api):
    hub.create("me/x")
    paths = ["../../up", "/etc/x", "a//b", "a/../../c", "\\back", "nul\tü"]
    hub.put("me/x", {path: path.encode() for path in paths})
    assert set(api("list_repo_files", repo_id="me/x")) == {".gitattributes", *paths}
    assert {p.name for p in hub.folder.iterdir()} == {"models"}
    hub.put("me/x", dict.fromkeys(paths))
    assert set(hub.files("me/x")) == {".gitattributes"}


def test_empty_files(hub, client, tmp_path):
    for name in ("empty.bin", "empty.txt"):
        (tmp_path / name).touch()
    uploaded(hub, client, tmp_path)
    hub.put("me/x", {"put.bin": b"", "put.txt": b""})
    assert {k: v for k, v in hub.files("me/x").items() if k != ".gitattributes"} == dict.fromkeys(
        ["empty.bin", "empty.txt", "put.bin", "put.txt"], b""
    )
    back = client("scripts_loopback:snapshot", repo_id="me/x")
    assert [back[name] for name in ("empty.bin", "put.bin", "put.txt")] == ["", "", ""]


def test_the_storage_wants_a_signature_and_no_token(hub, client):
    hub.create("me/x")
    hub.put("me/x", {"w.bin": b"1"})
    path = f"/models/me/x/{hashlib.sha256(b'1').hexdigest()}"
    good = hub.signed("GET", path)
    assert client("scripts_loopback:get", url=good) == [200, "1"]
    assert client("scripts_loopback:get", url=good, Authorization=f"Bearer {hub.token}")[0] == 400
    assert client("scripts_loopback:get", url=f"{hub.storage_url}/storage{path}")[0] == 403
    assert client("scripts_loopback:get", url=hub.signed("PUT", path))[0] == 403
    assert client("scripts_loopback:get", url=f"{hub.url}/storage{path}")[0] == 404
    url, token = f"{hub.url}/me/x/resolve/main/w.bin", f"Bearer {hub.token}"
    assert client("scripts_loopback:get", url=url, Authorization=token) == [200, "1"]


def test_a_download_goes_on_where_it_stopped(hub, client, tmp_path):
    hub.create("me/x")
    for name in ("w.bin", "t.txt"):
        hub.put("me/x", {name: WEIGHTS})
        arguments = {"filename": name, "have": WEIGHTS[:1000].decode("latin-1"), "folder": str(tmp_path)}
        assert client("scripts_loopback:resume", repo_id="me/x", **arguments).encode("latin-1") == WEIGHTS
        assert hub.requests[-1].headers["range"] == "bytes=1000-"
