"""What the test of faults at every request runs in the client's process."""

import dataclasses
import sys
import tempfile
import warnings
from pathlib import Path

import huggingface_hub
import scripts_pull
import scripts_push
import torch
from cases import make_backbone
from peft import get_peft_model

import hfproj
from hfproj import filenames
from hfproj.hub import pull as pulling
from hfproj.hub import push as pushing
from hfproj.hub.pull import open_adapter
from hfproj.training.ema import EMA

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "faults"))
STAGED, WATCHED = {}, {"ports": None, "elsewhere": []}


def push(repo_id, *, seed=0, adapters=("default",), active=None, measured=None, queue=None, **options):
    """Push an adapter whose staged folder is made once; return the commit and the pull request."""
    key = repr((seed, adapters, active, measured, queue, sorted(options.items())))
    own = pushing.stage

    def stage(model, folder, *arguments, **more):
        if key not in STAGED:
            STAGED[key] = own(model, Path(tempfile.mkdtemp()), *arguments, **more)
        return STAGED[key]

    made = scripts_push.model("vit_nano", seed, tuple(adapters))
    made.set_adapter(active or adapters[0])
    if queue:
        options |= {"objective": scripts_push.Buffers(1.0), "ema": scripts_push.Buffers(2.0)}
        options["objective"].queue = torch.ones(queue, 16)
    if measured is not None:
        options["results"] = scripts_push.results(measured)
    options["adapters"] = options.pop("only", None)
    pushing.stage = stage
    try:
        info = hfproj.push_to_hub(made, repo_id, **options)
    finally:
        pushing.stage = own
    return {"oid": info.oid, "pr": info.pr_url}


def save_for_pulls(folder):
    """Write two backbones, adapters of them, and adapters with everything that a push sends.

    One backbone says how images are prepared, for the other one its adapter does.
    """
    folder, config = Path(folder), hfproj.ProjectionHeadConfig(**scripts_pull.PARTS)
    model = get_peft_model(hfproj.load_backbone("vit_nano"), config)
    model.add_adapter("b", config)
    for number, name in enumerate(("default", "b")):
        model.set_adapter(name)
        scripts_pull.perturb(model, number)
        objective = hfproj.create_objective("moco", out_dim=6, queue_size=8)
        more = {"objective": objective, "ema": EMA(model, momentum=(0.9, 1.0))}
        (folder / f"all-{name}").mkdir()
        results = hfproj.Results(seeds=[1])
        pushing.stage(model, folder / f"all-{name}", "me/all", results=results, adapters=[name], **more)
    images = hfproj.backbones.ImagePreprocessing(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    for name in ("backbone", "bare"):
        backbone = make_backbone("vit")
        backbone.save_pretrained(folder / name)
        on = get_peft_model(backbone, config)
        scripts_pull.perturb(on)
        on.peft_config["default"].backbone = {"library": "transformers", "id": f"me/{name}", "kwargs": {}}
        (folder / f"on-{name}").mkdir()
        pushing.stage(on, folder / f"on-{name}", f"me/on-{name}", preprocessing=images)
    (folder / "on-backbone" / filenames.PREPROCESSING).rename(folder / "backbone" / filenames.PREPROCESSING)


def pull(repo, door, *, offline=False, patience=None, header_first=False, **options):
    """Load by a door: z, how images are prepared, or with "all" the bytes of every file of an adapter."""
    constants, names = huggingface_hub.constants, ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")
    kept, kept_size = {name: getattr(constants, name) for name in (*names, "HF_HUB_OFFLINE")}, pulling.HEADER_FIRST
    try:
        constants.HF_HUB_OFFLINE = offline
        for name in names if patience else ():
            setattr(constants, name, patience)
        if door == "all":
            return _all(open_adapter(repo, **options))
        if door == "list":
            return scripts_pull.pull(repo, door=door, warned=True, **options)
        pulling.HEADER_FIRST = 1 if header_first else kept_size
        return _model(repo, **options) if door == "from_pretrained" else _head(repo, **options)
    finally:
        pulling.HEADER_FIRST = kept_size
        for name, value in kept.items():
            setattr(constants, name, value)


def _head(repo, **options):
    head = hfproj.load_head(repo, **options)
    with torch.no_grad():
        return {"found": head(torch.ones(2, head.in_dim)).tolist(), "warnings": []}


def _model(repo, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = hfproj.from_pretrained(repo, **options)
        z = scripts_pull.outputs(model)["projection"].tolist()
        images = dataclasses.asdict(hfproj.backbones.image_preprocessing(model))
    return {"found": [z, images], "warnings": [str(w.message) for w in caught if w.category is UserWarning]}


def _all(saved):
    names = (filenames.RESULTS, filenames.PREPROCESSING, filenames.OBJECTIVE, filenames.EMA)
    paths = [saved.folder / filenames.ADAPTER_CONFIG, saved.folder / filenames.ADAPTER_WEIGHTS, *map(saved.file, names)]
    return {"found": [path and path.read_bytes().hex() for path in paths], "warnings": []}


def _watch(event, arguments):
    if event == "socket.connect" and WATCHED["ports"] and isinstance(arguments[1], tuple):
        WATCHED["elsewhere"] += [list(arguments[1])] * (arguments[1][1] not in WATCHED["ports"])
    if event == "socket.getaddrinfo" and WATCHED["ports"] and arguments[0] not in ("127.0.0.1", "localhost", None):
        WATCHED["elsewhere"].append([str(arguments[0])])


class Hostile:
    """The hostile adapters one after the other, each opened from its folder."""

    now = None

    def __init__(self, folder, ports, kinds):
        import hostile_files
        from hostile import save_adapter

        self.folder, whole = Path(folder), Path(tempfile.mkdtemp())
        save_adapter(whole)
        for path in whole.iterdir():
            (self.folder / path.name).write_bytes(path.read_bytes())
        made = ((kind, getattr(hostile_files, kind)(self.folder, whole)) for kind in kinds)
        self.cases = ((f"{kind}: {name}", call) for kind, cases in made for name, call in cases)
        torch.set_num_threads(1)
        if WATCHED["ports"] is None:
            sys.addaudithook(_watch)  # it can't be removed
        WATCHED["ports"] = ports


def hostile(folder, ports, kinds):
    """Begin with the first of the hostile adapters."""
    Hostile.now = Hostile(folder, ports, kinds)


def next_hostile(step):
    """Write the next hostile adapter, after some that are left out; return its name and what opening it says."""
    for _ in range(step):
        name, Hostile.call = next(Hostile.now.cases, (None, None))
    return name and [name, _said(Hostile.call)]


def open_served(repo):
    """Make the call that opens the folder with the repository in its place; return what it says, and where it went."""
    names = Hostile.call.__code__.co_freevars
    cell = Hostile.call.__closure__[names.index("folder")]
    WATCHED["elsewhere"].clear()
    cell.cell_contents = repo
    try:
        return _said(Hostile.call), list(WATCHED["elsewhere"])
    finally:
        cell.cell_contents = Hostile.now.folder


def _said(call):
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None
