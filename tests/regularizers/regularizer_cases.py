"""The table of regularizers: name of the row → (name in the registry, options).

A new regularizer adds rows here; `test_every_regularizer.py`, `distributed/methods.py` and the training tests run over
them. Rows work with a bare head as with a ``PeftModel``, and with a BatchNorm in the head.
"""

CASES = {
    "orthogonality": ("orthogonality", {}),
    "orthogonality, mean": ("orthogonality", {"side": "WWt", "reduction": "mean"}),
    "werank": ("werank", {}),
    "werank, head, squared": ("werank", {"layers": "head", "squared": True, "side": "auto", "alpha": {"head": 0.5}}),
    "sparse_head": ("sparse_head", {"normalise": True}),
    "sparse_head, all rows": ("sparse_head", {"group": "output", "layers": "all", "normalise": True}),
    "sparse_head, sparse groups": ("sparse_head", {"l1": 0.3, "normalise": True}),
    "sparse_head, weights": ("sparse_head", {"group": "weight", "normalise": True}),
    "bottleneck": ("bottleneck", {}),
    "bottleneck, alpha 1": ("bottleneck", {"alpha": 1.0}),
    "bottleneck, alpha 3": ("bottleneck", {"alpha": 3.0}),
    "wasserstein": ("wasserstein", {}),
    "wasserstein, h": ("wasserstein", {"on": "h"}),
    "koleo": ("koleo", {}),
    "koleo, z": ("koleo", {"on": "z"}),
    "vicreg_terms": ("vicreg_terms", {}),
    "vicreg_terms, h": ("vicreg_terms", {"on": "h", "variance_reduction": "sum"}),
    "sigreg": ("sigreg", {"slices": 16}),
    "sigreg, h": ("sigreg", {"on": "h", "slices": 16, "knots": 9}),
}
