"""``python -m hfproj``: the command ``hfproj``."""

from hfproj.commands.program import main

if __name__ == "__main__":
    main()
