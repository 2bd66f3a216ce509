"""Transport: adapters are staged, validated, pushed to the Hub and pulled from it.

Sending: `staging` (what a push sends, and nothing private in it), `push` (one commit, or the repository as it was).
Loading: `sources` (a folder or one commit), `untrusted` (files that third parties wrote), `validation` (configuration
and tensors), `pull`. Both: `failures` (what may pass is tried again, what does not is explained). May import
`reporting` (the card) and what lies below it.
"""

from hfproj.hub.pull import from_pretrained, list_adapters, load_head
from hfproj.hub.push import push_to_hub

__all__ = ["from_pretrained", "list_adapters", "load_head", "push_to_hub"]
