"""What the long run puts into collators, objectives, heads, measures, public calls and command lines."""

import contextlib
import io
import itertools
import logging
import os
import shlex
import warnings

from faults import api_fuzz, feature_inputs, image_inputs, numeric_inputs
from test_redaction import FORMS, LINES, NAMED, ORDINARY, SHAPES, URLS, VALUES

from hfproj.files import command_line
from hfproj.redaction import redact, secrets_in


def counted(tries, folder):
    """Call each of (what, function, arguments), which returns what went wrong, or None; return the counts."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    os.chdir(folder)  # a path among the inputs may be written to
    tried, failures = 0, []
    for what, function, arguments in tries:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                wrong = function(*arguments)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        tried += 1
        if wrong:
            failures.append(f"{what[:120]}: {wrong[:160]}")
    return {"tried": tried, "failed": len(failures), "failures": failures}


def images(folder):
    """Broken, odd and large images, labels, places and texts."""
    return counted(image_inputs.all_tries(damages=6), folder)


def numerics(folder):
    """Rows that are zero, equal, tiny, huge or broken, through objectives and regularizers in all dtypes."""
    return counted(numeric_inputs.all_tries(), folder)


def features(folder):
    """The same through heads, diagnostics and probes."""
    return counted(feature_inputs.all_tries(), folder)


def calls(folder, seed=0, count=None):
    """Each argument of each public call with each wrong value, or `count` of them."""
    return counted(api_fuzz.all_tries(seed, count), folder)


def command_lines(folder):
    """Secrets by name, form and URL on command lines; and ordinary ones, which stay as they are."""
    return counted(_command_lines(), folder)


def _command_lines():
    for name, form, value in itertools.product(NAMED, FORMS, VALUES):
        yield f"{form} of {name}", _shown, (form.format(n=name, v=value), value)
    for secret, form in itertools.product(SHAPES, ("{}", "--x {}", "--x={}", "x={},y=1", "https://h/{}/x", '["{}"]')):
        yield f"{form} of a secret", _shown, (form.format(secret), secret)
    for url, value in itertools.product(URLS, ("Tr0ub4dor3x", "p%40ss-w0rd", "a1B2c3D4e5F6g7H8i9J0k1L2")):
        yield url, _shown, (f"a.py --url {url.format(v=value)}", value)
    for line, value in itertools.product(LINES, ("Tr0ub4dor3x", "Zq8xW2vN5tR7yU1k")):
        yield line, _shown, (line.format(v=value), value)
    for line in ORDINARY:
        yield line, _kept, (line,)


def _shown(line, secret):
    try:
        words = shlex.split(line)  # as a shell hands them on
    except ValueError:  # no line of a shell
        words = line.split()
    kept = [redact(line), command_line(["a.py", *words]) if "$'" not in line else ""]  # which shlex does not know
    return f"{kept} holds it" if any(secret in text for text in kept) or list(secrets_in(kept[0], {})) else None


def _kept(line):
    return None if redact(line) == line else f"became {redact(line)}"
