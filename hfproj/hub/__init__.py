"""The Hub: adapters are staged, validated, pushed and pulled; what strangers wrote is read with care.

One commit a push; nothing half-written is left. Imports `reporting` (the card), `tuner`, `backbones`, `results`.
"""

from hfproj.hub.pull import detach, from_pretrained, list_adapters, load_head
from hfproj.hub.push import push_to_hub

__all__ = ["detach", "from_pretrained", "list_adapters", "load_head", "push_to_hub"]
