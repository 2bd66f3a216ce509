"""Transport: adapters are staged, validated, pushed to the Hub and pulled from it.

Sending: `staging` (what a push sends), `outgoing` (nothing private in it), `push` (one commit, or the repository as it
was). Loading: `sources` (a folder or one commit), `untrusted` (files that third parties wrote), `validation` and
`tensors` (configuration and tensors), `fetch` (all of that for one adapter), `pull`. Both: `failures` (what may pass
is tried again, what does not is explained). May import `reporting` (the card) and what lies below it.
"""

from hfproj.hub.pull import detach, from_pretrained, list_adapters, load_head
from hfproj.hub.push import push_to_hub

__all__ = ["detach", "from_pretrained", "list_adapters", "load_head", "push_to_hub"]
