"""What the processes of `runs.start` have imported before they are forked."""

import runs  # noqa: F401  sets the path
import small  # noqa: F401
import transformers.trainer  # noqa: F401

import hfproj.training  # noqa: F401
