"""The PEFT method is registered when PEFT is imported, in whichever order, and `import hfproj` imports little."""

import importlib
import subprocess
import sys
import textwrap
import threading

import pytest

from hfproj import lazy

CHECK = """
import sys, peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs, PEFT_TYPE_TO_TUNER_MAPPING as tuners
assert peft.PeftType("PROJECTION_HEAD") in tuners and peft.PeftType("PROJECTION_HEAD") in configs
assert not [finder for finder in sys.meta_path if type(finder).__name__ == "_Waiting"]
assert type(peft.__loader__).__module__ != "hfproj.lazy" and peft.__spec__.loader is peft.__loader__
"""


def python(code):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_import_hfproj_imports_neither_torch_nor_peft():
    found = python(
        "import sys, hfproj; print([n for n in ('torch', 'peft', 'transformers', 'numpy') if n in sys.modules])"
    )
    assert found.strip() == "[]"


@pytest.mark.parametrize(
    "first",
    [
        pytest.param("import hfproj, peft", marks=pytest.mark.long),  # the other way round: test_layout.py
        "import hfproj; from transformers import Trainer",  # whose module imports PEFT
        # transformers imports PEFT while a room is imported that the tuner needs
        pytest.param("import hfproj.backbones", marks=pytest.mark.long),
    ],
)
def test_any_order_registers(first):
    python(f"{first}\n{CHECK}")


@pytest.mark.long
@pytest.mark.parametrize(
    "room", ["converters", "data", "features", "hub", "probes", "training", "tuner", "studies.coarse"]
)
def test_any_room_first_registers(room):
    python(f"import hfproj.{room}\n{CHECK}")


# --- the hook, on modules of its own ---


@pytest.fixture
def package(tmp_path, monkeypatch):
    """`waited`, which is waited for; `rooms.one` imports it and then `rooms.two`; `rooms.three` fails."""
    (tmp_path / "waited.py").write_text("value = 1\n")
    (tmp_path / "failing.py").write_text("raise ValueError('no')\n")
    rooms = tmp_path / "rooms"
    rooms.mkdir()
    (rooms / "__init__.py").write_text("")
    (rooms / "one.py").write_text("import waited\nfrom rooms import two\nwhole = True\n")
    (rooms / "two.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield tmp_path
    for name in [n for n in sys.modules if n.split(".")[0] in ("waited", "failing", "rooms")]:
        del sys.modules[name]


def test_it_is_called_once_and_leaves(package):
    before, found = list(sys.meta_path), []
    lazy.when_imported("waited", lambda: found.append(sys.modules["waited"].value), outside="rooms")
    assert (found, len(sys.meta_path)) == ([], len(before) + 1)
    import waited

    assert (found, sys.meta_path) == ([1], before)
    assert type(waited.__loader__).__name__ == "SourceFileLoader"
    assert waited.__spec__.loader is waited.__loader__
    del sys.modules["waited"]
    import waited

    assert found == [1]


def test_what_is_there_is_not_waited_for(package):
    import waited  # noqa: F401

    found = []
    lazy.when_imported("waited", lambda: found.append(1), outside="rooms")
    assert found == [1]


def test_not_within_the_package_but_at_its_end(package):
    found = []
    lazy.when_imported("waited", lambda: found.append(sys.modules["rooms.one"].whole), outside="rooms")
    import rooms.one  # noqa: F401

    assert found == [True]


def test_a_module_that_fails_is_waited_for_again(package):
    found = []
    lazy.when_imported("failing", lambda: found.append(1), outside="rooms")
    with pytest.raises(ValueError, match="no"):
        import failing
    (package / "failing.py").write_text("value = 2\n")
    sys.path_importer_cache.clear()
    import failing

    assert (failing.value, found) == (2, [1])


def test_what_it_raises_the_import_raises_until_it_succeeds(package):
    calls = []

    def then():
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("not yet")

    lazy.when_imported("waited", then, outside="rooms")
    with pytest.raises(RuntimeError, match="not yet"):
        import waited
    import waited  # noqa: F401

    assert len(calls) == 2


def test_two_threads(package):
    """One imports what is waited for, the other what `then` imports, which imports it too."""
    (package / "waited.py").write_text("import time\ntime.sleep(0.05)\nvalue = 1\n")
    (package / "rooms" / "one.py").write_text(
        "import time\ntime.sleep(0.02)\nimport waited\nwaited.value\nwhole = True\n"
    )
    errors = []

    def then():
        import rooms.one  # noqa: F401

    def importing(name):
        try:
            __import__(name)
        except Exception as error:
            errors.append(error)

    lazy.when_imported("waited", then, outside="rooms")
    threads = [threading.Thread(target=importing, args=(name,)) for name in ("waited", "rooms.one")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert errors == []
    assert not any(thread.is_alive() for thread in threads)
    assert sys.modules["rooms.one"].whole


@pytest.mark.parametrize(
    ("module", "name", "said"),
    [
        ("hfproj", "evalute", "module 'hfproj' has no attribute 'evalute'. Did you mean 'evaluate'?"),
        ("hfproj", "ProjectionHeadConfg", "Did you mean 'ProjectionHeadConfig'?"),
        ("hfproj", "diagnostic", "Did you mean 'diagnostics'?"),
        ("hfproj.data", "EvalImage", "module 'hfproj.data' has no attribute 'EvalImage'. Did you mean 'EvalImages'?"),
        ("hfproj", "zebra", "module 'hfproj' has no attribute 'zebra'"),
        ("hfproj", "__evaluate__", "module 'hfproj' has no attribute '__evaluate__'"),
    ],
)
def test_misspelt_names(module, name, said):
    with pytest.raises(AttributeError) as caught:
        getattr(importlib.import_module(module), name)
    assert str(caught.value).endswith(said)
