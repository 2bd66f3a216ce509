"""The head, or backbone and head, as a graph: ONNX, or a program of ``torch.export``.

Both are traced from a plain module in float32 and eval mode: a copy of the backbone with what the adapter learned
merged in, the pooling, and a copy of the head. Predictor and prototypes, which belong to training, stay behind.
"""

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfproj.checking import checked
from hfproj.errors import HfprojError, UsageError, check_path, one_line
from hfproj.export.network import Batch, Traceable, staged, traceable
from hfproj.typing import OneOf

TOLERANCE = 1e-5  # of the largest value: float32 has 6e-8, and a deep network adds up a few hundred of these
_METADATA = "hfproj.json"  # in a .pt2 archive


@checked
def export_onnx(
    model: nn.Module, path: str | os.PathLike, *, part: OneOf["model", "head"] = "model", example: Tensor | None = None,
    opset: int | None = None, check: bool = True,
) -> Path:  # fmt: skip
    """Write the head, or backbone and head, as an ONNX graph in float32, of any batch size; return its path.

    Inputs and outputs have names: ``h`` → ``z`` for the head alone; ``pixel_values`` (images), ``input_ids`` and
    ``attention_mask`` (texts, of any length) or ``x`` (other modules) → ``h`` and ``z`` for the model. The metadata of
    the file says which head it is, its widths, how h is pooled, and image size, mean and std where they are known.

    Args:
        model: A model with a projection head; for ``part="head"`` a head alone will do. It is copied, not changed.
        path: ``….onnx``. Beyond 2 GB the weights go into ``….onnx.data`` beside it.
        part: ``"model"`` (x → h, z) or ``"head"`` (h → z).
        example: Images ``[batch, channels, height, width]`` of the size that the graph is to take; None takes the
            backbone's own. A module of no known family needs one.
        opset: Version of ONNX's operators, at least 18; None takes the exporter's default.
        check: Compare with onnxruntime, where it is installed, on batches of 1 and 3: no more than 1e-5 of the largest
            value may differ.

    Raises:
        UsageError: If a package is missing (``pip install "hfproj[export]"``), an option has a value that it does not
            take, or the head or the backbone can't be traced.
        HfprojError: If onnxruntime computes something else; nothing is written.
    """
    path = _checked_path(path, ".onnx")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f'ONNX export needs {" and ".join(missing)}: pip install "hfproj[export]".')
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and opset not in range(18, newest + 1):
        raise UsageError(f"Expected opset as None or a whole number from 18 to {newest}, got {opset!r}.")
    graph = traceable(model, part, example)
    program = _traced(graph)
    # One object for one name: exporters tell axes of equal size apart by it.
    dims = {name: torch.export.Dim(name) for axes in graph.axes.values() for name in axes}
    named = {name: {axis: dims[d] for axis, d in enumerate(axes)} for name, axes in graph.axes.items()}
    try:
        with _quiet():
            names: dict[str, Any] = {"output_names": list(graph.outputs), "dynamic_shapes": named}
            exported: Any = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=opset, **names)
    except Exception as error:
        raise _refused(graph, "ONNX", error) from error
    _describe(exported.model, graph.metadata)
    with staged(path.parent) as folder:
        exported.save(folder / path.name)
        if check:
            _check_onnx(folder / path.name, graph)
    return path


@checked
def export_program(
    model: nn.Module, path: str | os.PathLike, *, part: OneOf["model", "head"] = "model", example: Tensor | None = None,
    check: bool = True,
) -> Path:  # fmt: skip
    """Write the head, or backbone and head, as a program of ``torch.export``; return its path.

    It is loaded without this package by ``torch.export.load(path).module()``, which takes the inputs of `export_onnx`
    by name and returns a dict of its outputs. PyTorch runs what a ``.pt2`` file holds: load only those you trust.

    Args:
        model: A model with a projection head; for ``part="head"`` a head alone will do. It is copied, not changed.
        path: ``….pt2``.
        part: ``"model"`` (x → h, z) or ``"head"`` (h → z).
        example: Images of the size that the program is to take, see `export_onnx`.
        check: Load the file again and compare on batches of 1 and 3: no more than 1e-5 of the largest value may differ.

    Raises:
        UsageError: If an option has a value that it does not take, or the head or the backbone can't be traced.
        HfprojError: If the program computes something else; nothing is written.

    Example:
        >>> import tempfile, hfproj
        >>> head = hfproj.create_head("linear", in_dim=4, out_dim=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     program = torch.export.load(export_program(head, f"{folder}/head.pt2", part="head"))
        >>> program.module()(h=torch.ones(5, 4))["z"].shape
        torch.Size([5, 2])
    """
    path = _checked_path(path, ".pt2")
    graph = traceable(model, part, example)
    program = _traced(graph)
    with staged(path.parent) as folder:
        torch.export.save(program, folder / path.name, extra_files={_METADATA: json.dumps(graph.metadata)})
        if check:
            again = torch.export.load(folder / path.name).module()
            _compare(graph, lambda batch: again(**batch), "the saved program", "report it as a fault of torch.export")
    return path


def _checked_path(path: str | os.PathLike, suffix: str) -> Path:
    check_path("path", path)
    path = Path(path)
    if path.suffix != suffix or path.is_dir():
        raise UsageError(f"Expected path as the name of a file that ends with {suffix}, got {str(path)!r}.")
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what exporters say of their own internals: faults are errors, or found by the check."""
    optimizer = logging.getLogger("onnxscript")
    level = optimizer.level
    optimizer.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optimizer.setLevel(level)


def _traced(graph: Traceable) -> Any:
    """Return the exported program, without the paths of this machine that its nodes carry."""
    free = {name: dict.fromkeys(range(len(axes)), torch.export.Dim.DYNAMIC) for name, axes in graph.axes.items()}
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(graph.module, (), graph.batch(2), dynamic_shapes=free, strict=False)
    except UsageError:
        raise
    except Exception as error:  # tracing runs the module's own code, which may fail in any way
        raise _refused(graph, "torch.export", error) from error
    program.example_inputs = None
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def _refused(graph: Traceable, way: str, error: Exception) -> UsageError:
    what = f"The head {graph.metadata['head']!r}" + (" and its backbone" if "h" in graph.outputs else "")
    return UsageError(
        f"{what} can't be exported by {way}: {one_line(error)}. Its forward must be made of tensor operations that do "
        "not depend on the tensors' values."
    )


def _describe(model: Any, metadata: dict[str, str]) -> None:
    """Put `metadata` in place of what the exporter noted of this machine and of itself."""
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    for graph in (model.graph, *model.functions.values()):
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()


def _check_onnx(file: Path, graph: Traceable) -> None:
    if importlib.util.find_spec("onnxruntime") is None:
        words = 'The graph is not compared with the model, since onnxruntime is missing: pip install "hfproj[export]".'
        return warnings.warn(words, stacklevel=3)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes, which share no base
        what = f"onnxruntime {onnxruntime.__version__} can't load the graph: {one_line(error)}. Nothing was written"
        raise HfprojError(f"{what}; try an older opset, or check=False for another runtime.") from error

    def run(batch: Batch) -> Batch:
        values = session.run(list(graph.outputs), {name: tensor.numpy() for name, tensor in batch.items()})
        return {name: torch.from_numpy(value) for name, value in zip(graph.outputs, values, strict=True)}

    _compare(graph, run, "onnxruntime", "try another opset, or check=False if you can live with it")


def _compare(graph: Traceable, run: Callable[[Batch], Batch], who: str, hint: str) -> None:
    for rows in (1, 3):
        batch = graph.batch(rows)
        with torch.no_grad():
            expected, got = graph.module(**batch), run(batch)
        for name in graph.outputs:
            largest = expected[name].abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            difference = ((got[name] - expected[name]).abs().max() / largest).item()
            if not difference <= TOLERANCE:  # NaN is no agreement
                raise HfprojError(
                    f"{who} gives another {name} for {rows} row{'s' if rows > 1 else ''}: max |Δ{name}| is "
                    f"{difference:.1e} of the largest value, allowed are {TOLERANCE:.0e}. Nothing was written; {hint}."
                )
