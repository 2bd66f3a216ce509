"""Geometry of a head: what it does to the space of representations."""
