"""Fingerprints of the tensors that a backbone's representation depends on, as an adapter carries them."""

import json

from hfproj.backbones import bare_tensors, feeds_representation, resolve_read_point
from hfproj.backbones.fingerprint import fingerprint, is_fingerprint


def tensors_of(backbone):
    tensors = bare_tensors(backbone)
    return {name: tensors[name] for name in feeds_representation(backbone, resolve_read_point(backbone))}


def taken(backbone):
    found = json.loads(json.dumps(fingerprint(backbone, tensors_of(backbone))))
    assert is_fingerprint(found)
    return found
