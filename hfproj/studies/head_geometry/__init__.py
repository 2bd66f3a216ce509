"""The experiments of "The Geometry of Projection Heads" (arXiv 2605.17180), at the size of two CPU cores.

`study` says where everything is kept, `models` trains the adapters, `measures` compares h with z on them, `collapse`
has the dynamics, `analysis` describes the head of any saved adapter, `claims`, `collapse_claims` and `document` compare
the numbers with the paper's. The commands are recipes/geometry.py, recipes/collapse_geometry.py and
recipes/geometry_table.py.
"""
