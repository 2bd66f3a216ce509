"""What the processes of `forked` have imported before they are forked."""

import small  # noqa: F401
import transformers.trainer  # noqa: F401

import hfproj.probes
import hfproj.training  # noqa: F401
