"""Backbones of `transformers` that a head can't be attached to, since images or texts alone do not run them."""

import inspect
from typing import Any

from hfproj.backbones.dry_run import dry_run
from hfproj.backbones.loading import main_input_of, quantization_of
from hfproj.errors import UsageError


def check_input(backbone: Any, in_dim: int | None) -> None:
    """Refuse a model that images or texts alone do not run; one who gives `in_dim` has batches with more.

    Raises:
        UsageError: If its forward requires more, or raises without more.
    """
    import transformers

    name, kind, why = main_input_of(backbone), type(backbone).__name__, list[str]()
    encoder = f"{kind.removesuffix('Model')}EncoderModel"
    if (
        name == "input_ids"
        and getattr(backbone.config, "is_encoder_decoder", False)
        and hasattr(backbone, "get_decoder")
    ):
        encoder = f"{encoder}, or " if hasattr(transformers, encoder) else ""
        raise UsageError(
            f"{kind} needs decoder inputs beside the text; attach the head to its encoder "
            f"({encoder}model.get_encoder())."
        )
    takes = inspect.signature(backbone.forward).parameters.items()
    more = [n for n, p in takes if n != name and p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    parts = [f"model.{n}" for n, part in backbone.named_children() if hasattr(part, "main_input_name")]
    hint = f"attach the head to a part ({', '.join(parts)})" if parts else "wrap it in a module that needs no more"
    expected = f"Expected a backbone that runs on images or texts alone, got {kind}"
    if more:
        raise UsageError(f"{expected}, whose forward requires {', '.join(more)} beside {name}; {hint}.")
    if in_dim is None:
        dry_run(backbone, why)
        said = why[0] if why else "nothing can be guessed for it, or a model on the meta device is asked for values"
        if quantization_of(backbone) is not None:
            hint = "layers that its files lack can't be quantized: load it without (a pooler: add_pooling_layer=False)"
        raise UsageError(
            f"{expected}, which {name} alone does not run ({said}); {hint}, or give in_dim=… if your batches hold "
            "all of its inputs."
        )
