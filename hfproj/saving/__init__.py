"""Checkpoints that are whole or are not there: manifests, choosing, rotating, locks, signals, the place in the data.

What a trainer calls around its own saving; nothing here knows the trainer.
"""
