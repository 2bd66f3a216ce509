"""Export: what was trained, taken off the model or in forms that others load without this package.

`detach` copies a head. `export_backbone_adapter` writes the backbone's PEFT adapter alone and `export_merged` the
backbone with what was learned merged in (`folders`), `export_onnx` and `export_program` the computation x → h, z (or
h → z) as a graph (`graphs`, of what `network` makes). None changes the model. May import `tuner` and what lies below.
"""

from hfproj.export.folders import export_backbone_adapter, export_merged
from hfproj.export.graphs import export_onnx, export_program
from hfproj.export.network import detach

__all__ = ["detach", "export_backbone_adapter", "export_merged", "export_onnx", "export_program"]
