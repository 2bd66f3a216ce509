"""A process with the real huggingface_hub client, pointed at the loopback Hub, that runs functions for tests.

Its environment has to be set before huggingface_hub is imported, hence a process of its own. It cannot reach any other
machine, it ends with the process that started it, and it does not wait long: sleeps of half a second or more are noted
and cut short.
"""

import importlib
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CLIENT = tuple(int(n) for n in importlib.metadata.version("huggingface_hub").split(".")[:2])


class RemoteError(Exception):
    """An exception of the client's process: its class' name, its message and its traceback as text."""

    def __init__(self, type: str, message: str, traceback: str = ""):
        super().__init__(f"{type}: {message}\n{traceback}")
        self.type, self.message, self.traceback = type, message, traceback


class Client:
    """Calls functions by name in a process that is started with the first call.

    Args:
        hub: The server.
        folder: For HF_HOME and for what the process writes to stderr.
        preload: Import torch and hfproj; without, the process is there in a blink.
        environment: Further variables, e.g. ``HF_HUB_OFFLINE="1"``.

    Attributes:
        cache: The client's cache of repositories.
        waits: The seconds that the last call wanted to sleep, e.g. before a retry.
        timeout: Seconds after which a call that does not return is given up, and its process with it.
    """

    def __init__(self, hub, folder: Path, *, preload: bool = True, **environment: str):
        from loopback import environment as settings

        self.folder, self.preload, self.timeout = Path(folder), preload, 120.0
        home = self.folder / "home"
        self.cache, self.waits, self._process = home / "hub", [], None
        ours = ("HF_", "HUGGING", "TRANSFORMERS_", "PYTEST")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ours) and not k.lower().endswith("_proxy")}
        path = [str(ROOT), str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {
            **kept,
            **settings(hub, home),
            "PYTHONPATH": os.pathsep.join(path),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_ETAG_TIMEOUT": "2",
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            **environment,
        }

    def __call__(self, function: str, **arguments):
        """Run "module:name" with these arguments; its result has to be JSON, and so have they."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        self._socket.settimeout(self.timeout)
        try:
            self._file.write(json.dumps([function, arguments]).encode() + b"\n")
            self._file.flush()
            line = self._file.readline()
        except TimeoutError:
            self.close()
            raise RemoteError("TimeoutError", f"{function} did not return within {self.timeout:g} s") from None
        except OSError:
            line = b""
        if not line:
            errors = self._errors.read_text(errors="replace")[-4000:]
            self.close()
            raise RemoteError("ProcessDied", f"the client ended while it ran {function}", errors)
        answer = json.loads(line)
        self.waits = answer["waits"]
        if "error" in answer:
            raise RemoteError(**answer["error"])
        return answer["result"]

    def clear_cache(self) -> None:
        """Delete what was downloaded, and what huggingface_hub remembers of it."""
        shutil.rmtree(self.cache, ignore_errors=True)
        if self._process is not None:
            self("client:forget")

    def close(self) -> None:
        if self._process is not None:
            for end in (self._file, self._socket):
                end.close()
            os.close(self._lifeline)
            self._process.kill()
            self._process.wait(timeout=20)
            self._process = None

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _start(self) -> None:
        self.close()
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        # Fresh enough not to be asked for: the requests that a test sees are those of the calls it made.
        (self.cache.parent / ".agent_harnesses.json").write_text('{"standardEnvVars": [], "harnesses": {}}')
        self._errors = self.folder / "stderr.txt"
        self._socket, theirs = socket.socketpair()
        self._file = self._socket.makefile("rwb")
        lifeline, self._lifeline = os.pipe()
        command = [sys.executable, str(HERE / "client.py"), str(theirs.fileno()), str(lifeline), str(int(self.preload))]
        with open(self._errors, "wb") as errors:
            options = {"stdin": subprocess.DEVNULL, "stdout": errors, "stderr": errors, "cwd": ROOT}
            self._process = subprocess.Popen(
                command, env=self.environment, pass_fds=(theirs.fileno(), lifeline), **options
            )
        theirs.close()
        os.close(lifeline)


# In the client's process

_waits: list[float] = []


def forget() -> None:
    try:
        from huggingface_hub import _tree_cache
    except ImportError:  # older versions remember no listings
        return
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()


def _end_with(lifeline: int) -> None:
    """End this process as soon as the one that holds the pipe's other end is gone, whatever is running."""
    os.read(lifeline, 1)
    os._exit(0)


def _refuse_other_machines(event: str, arguments: tuple) -> None:
    if event == "socket.connect":
        address = arguments[1]
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1"):
            raise PermissionError(f"A test tried to reach {address[0]}")
    elif event == "socket.getaddrinfo" and arguments[0] not in ("127.0.0.1", "::1", "localhost", None):
        raise PermissionError(f"A test tried to look up {arguments[0]}")


def _sleep_briefly(seconds: float, *, sleep=time.sleep) -> None:
    if seconds < 0.5:
        return sleep(seconds)
    _waits.append(seconds)
    sleep(0.01)


def _run(line: bytes) -> dict:
    _waits.clear()
    try:
        name, arguments = json.loads(line)
        module, _, attribute = name.partition(":")
        result = getattr(importlib.import_module(module), attribute)(**arguments)
        return {"result": json.loads(json.dumps(result)), "waits": list(_waits)}
    except BaseException as error:
        told = {"type": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
        return {"error": told, "waits": list(_waits)}


def main(channel: int, lifeline: int, preload: bool) -> None:
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    sys.addaudithook(_refuse_other_machines)
    time.sleep = _sleep_briefly
    sys.modules["client"] = sys.modules["__main__"]
    if preload:
        import type_checks

        type_checks.install()
        import torch

        torch.set_num_threads(1)
        import hfproj  # noqa: F401
    with socket.socket(fileno=channel) as end, end.makefile("rwb") as file:
        for line in file:
            file.write(json.dumps(_run(line)).encode() + b"\n")
            file.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1")
