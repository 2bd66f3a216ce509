"""What recipes and commands share: errors that a user can act on end the program in one line."""

import sys
from collections.abc import Callable

from hfproj.errors import HfprojError


def run(main: Callable[[], None]) -> None:
    """Run `main`; on an error of the user's end with exit status 2 and one line instead of a traceback."""
    try:
        main()
    except HfprojError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
