"""Export: what was trained, in forms that others load without this package.

`export_backbone_adapter` writes the backbone's PEFT adapter alone, `export_merged` the backbone with what was learned
merged in, `export_onnx` and `export_program` the computation x → h, z (or h → z) as a graph. None changes the model.
"""

from hfproj.export.adapter import export_backbone_adapter
from hfproj.export.graphs import export_onnx, export_program
from hfproj.export.merged import export_merged

__all__ = ["export_backbone_adapter", "export_merged", "export_onnx", "export_program"]
