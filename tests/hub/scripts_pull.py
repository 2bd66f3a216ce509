"""What the tests of pulling run in the client's process."""

import contextlib
import os
import sys
import tempfile
import warnings

import huggingface_hub
import torch
from cases import TRAINED, perturb
from peft import AutoPeftModel, PeftModel, get_peft_model
from safetensors.torch import load_file

import hfproj
from hfproj import filenames
from hfproj.backbones.checkpoint_files import declared_pooling
from hfproj.hub import pull as pulling
from hfproj.hub import sources
from hfproj.hub.pull import open_adapter

PARTS = {
    "head": "mlp",
    "out_dim": 6,
    "head_options": {"hidden_dim": 8, "last_norm": "batch"},
    "predictor": {"head": "mlp", "hidden_dim": 4},
    "prototypes": {"count": 5, "learn_norm": True},
    "scales": {"log_temperature": 0.5},
}


def inputs_for(backbone):
    generator = torch.Generator().manual_seed(0)
    if getattr(backbone, "main_input_name", None) == "input_ids":
        ids = torch.randint(3, 50, (4, 7), generator=generator)
        return {"input_ids": ids, "attention_mask": (torch.arange(7) < (torch.arange(4) % 5 + 3)[:, None]).long()}
    name = "pixel_values" if hasattr(backbone, "config") else "x"
    return {name: torch.randn(4, 3, 32, 32, generator=generator)}


def trained_model(backbone, trained, **options):
    """A model whose every trainable tensor, and every BatchNorm statistic, is another than at the start."""
    model = get_peft_model(backbone, hfproj.ProjectionHeadConfig(**{**PARTS, **TRAINED[trained], **options}))
    perturb(model)
    return model.eval()


@torch.no_grad()
def outputs(model):
    out = model.eval()(**inputs_for(model.get_base_model()))
    return {n: out[n] for n in ("representation", "projection", "prediction", "scores")} | dict(out.scales or {})


def difference(a, b):
    assert a.keys() == b.keys()
    return max((a[n] - b[n]).abs().max().item() for n in a)


def round_trip(backbone, trained, repo, kwargs=None, auto=False):
    """Push and pull, and return max |Δ| over all outputs by every door, and from the untrained adapter."""

    def bare():
        return hfproj.load_backbone(backbone, **(kwargs or {}))

    model = trained_model(bare(), trained)
    wanted = outputs(model)
    hfproj.push_to_hub(model, repo)
    pulled = hfproj.from_pretrained(repo)
    found = {
        "hfproj": pulled,
        "peft": PeftModel.from_pretrained(bare(), repo),
        "given": hfproj.from_pretrained(repo, backbone=bare(), adapter_name="mine", low_cpu_mem_usage=True),
    }
    if auto:
        found["auto"] = AutoPeftModel.from_pretrained(repo)
    differences = {name: difference(wanted, outputs(m)) for name, m in found.items()}
    head = hfproj.load_head(repo)(wanted["representation"])
    differences["head"] = (head - wanted["projection"]).abs().max().item()
    own, kept = model.state_dict(), pulled.state_dict()
    assert own.keys() == kept.keys()
    differences["tensors"] = max((own[n].double() - kept[n].double()).abs().max().item() for n in own)
    untouched = get_peft_model(bare(), hfproj.ProjectionHeadConfig(**{**PARTS, **TRAINED[trained]}))
    changed = max((untouched.state_dict()[n].double() - own[n].double()).abs().max().item() for n in own)
    return differences, changed


def round_trips(cases):
    return [round_trip(**case) for case in cases]


def push(backbone, repo, seed=0, names=("default",), trained="head", **options):
    """Push adapters of these names, and return z of each and the commit."""
    model, found = None, {}
    for name in names:
        config = hfproj.ProjectionHeadConfig(**{**PARTS, **TRAINED[trained]})
        if model is None:
            model = get_peft_model(hfproj.load_backbone(backbone), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        perturb(model, seed + len(found))
        found[name] = outputs(model)["projection"].tolist()
    return found, hfproj.push_to_hub(model, repo, **options).oid


def push_with_everything(backbone, repo, name):
    """Push a head with a queue, a moving average, results and preprocessing, and see what is fetched of it."""
    from hfproj.training.ema import EMA

    config = hfproj.ProjectionHeadConfig(**PARTS)
    model = get_peft_model(hfproj.load_backbone(backbone), config, adapter_name=name)
    perturb(model)
    objective = hfproj.create_objective("moco", out_dim=6, queue_size=8)
    hfproj.push_to_hub(
        model, repo, results=hfproj.Results(seeds=[1]), objective=objective, ema=EMA(model, momentum=(0.9, 1.0))
    )
    folder = open_adapter(repo, adapter=name).folder
    first = sorted(p.name for p in folder.iterdir())
    saved = open_adapter(repo, adapter=name)
    for file in (filenames.RESULTS, filenames.PREPROCESSING, filenames.OBJECTIVE, filenames.EMA):
        assert saved.file(file).parent == saved.folder == folder
    rows = load_file(saved.file(filenames.OBJECTIVE))["queues.0.rows"]
    return first, sorted(p.name for p in folder.iterdir()), torch.equal(rows, objective.state_dict()["queues.0.rows"])


def pull(repo, door="load_head", warned=False, given=None, **options):
    """Load what is in a repository, with z of a fixed h or image, as `push` returns it."""
    with warnings.catch_warnings(record=warned) as caught:
        if door == "fetch":
            found = str(open_adapter(repo, **options).folder)
        elif door == "list":
            found = {name: config.out_dim for name, config in hfproj.list_adapters(repo, **options).items()}
        elif door == "load_head":
            with torch.no_grad():
                found = hfproj.load_head(repo, **options)(torch.ones(2, 16)).tolist()
        elif door == "peft":
            found = outputs(PeftModel.from_pretrained(hfproj.load_backbone(given), repo, **options))[
                "projection"
            ].tolist()
        else:
            found = outputs(hfproj.from_pretrained(repo, **options))["projection"].tolist()
    return {"found": found, "warnings": [str(w.message) for w in caught or () if w.category is UserWarning]}


def pull_without_token(repo, **options):
    """As `pull` where no token is set."""
    kept = os.environ.pop("HF_TOKEN")
    try:
        return pull(repo, **options)
    finally:
        os.environ["HF_TOKEN"] = kept


def pull_offline(repo, **options):
    """As `pull`, with HF_HUB_OFFLINE=1."""
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        return pull(repo, **options)
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = False


def impatient(repo, **options):
    """As `pull`, by a client that waits a fifth of a second for an answer."""
    constants, names = huggingface_hub.constants, ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")
    kept = {name: getattr(constants, name) for name in names}
    try:
        for name in names:
            setattr(constants, name, 0.2)
        return pull(repo, **options)
    finally:
        for name, value in kept.items():
            setattr(constants, name, value)


def pull_from_a_liar(repo, size):
    """Load from a Hub that says the tensors had another size than it sends."""
    own = sources.Remote.size
    sources.Remote.size = lambda self, file: size if file.endswith(".safetensors") else own(self, file)
    try:
        return errors([["pull", {"repo": repo}]])[0]
    finally:
        sources.Remote.size = own


def pull_header_first(repo, **options):
    """As `pull`, with tensors of any size looked at before they are downloaded."""
    kept, pulling.HEADER_FIRST = pulling.HEADER_FIRST, 1
    try:
        return pull(repo, **options)
    finally:
        pulling.HEADER_FIRST = kept


def pull_while_pushed(repo, backbone):
    """Load an adapter of which a new version arrives between its configuration and its tensors."""
    get, pushed = sources.Remote.get, []

    def interrupted(self, file, size):
        path = get(self, file, size)
        if not pushed:
            pushed.append(push(backbone, repo, seed=5))
        return path

    sources.Remote.get = interrupted
    try:
        found = pull(repo, door="from_pretrained")["found"]
    finally:
        sources.Remote.get = get
    return found, pushed[0][0]["default"]


def errors(calls):
    """Run functions of this module and return type and message of what each raises, or None."""
    found = []
    for name, arguments in calls:
        try:
            globals()[name](**arguments)
            found.append(None)
        except Exception as error:
            found.append([type(error).__name__, str(error)])
    return found


def preprocessing(repo):
    """What the data pipeline takes for a model that was pulled."""
    model = hfproj.from_pretrained(repo)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = hfproj.backbones.image_preprocessing(model)
    return [found.size, list(found.mean), list(found.std), found.interpolation, [str(w.message)[:60] for w in caught]]


def pooling(backbone):
    """The pooling that a text model declares; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return declared_pooling(hfproj.load_backbone(backbone))


_events = None  # what was run and written while a hostile repository is looked at


def _watch(event, arguments):
    if _events is None:
        return
    if event in ("os.system", "subprocess.Popen", "pickle.find_class"):
        _events.append(event)
    elif event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        _events.extend([arguments[0]] * (not arguments[0].startswith(huggingface_hub.constants.HF_HUB_CACHE)))


@contextlib.contextmanager
def _inside(folder):  # contextlib.chdir is newer than the oldest Python
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def look_at(repo):
    """Try to load a hostile repository, and return what was said, what was run or written, and what is left here."""
    global _events
    if not hasattr(sys, "_hfproj_watched"):
        sys.addaudithook(_watch)  # it can't be removed
        sys._hfproj_watched = True
    said = []
    with tempfile.TemporaryDirectory() as folder, _inside(folder):
        _events = seen = []
        for door in ("load_head", "from_pretrained", "fetch"):
            try:
                pull(repo, door=door)
                said.append(None)
            except Exception as error:
                said.append([type(error).__name__, str(error)])
        _events = None
        return said, seen, os.listdir(folder)
