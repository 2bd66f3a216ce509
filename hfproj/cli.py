"""What recipes use of the command: flags, options as text, and errors of the user's as one line.

    cli.start(__file__)                         first of all: --help without importing torch
    recipe, args = cli.parse(Recipe, Training)  flags of dataclasses; options = cli.arguments(parser) those of a parser
    cli.run(main)                               errors of the user's are one line

See `hfproj.commands`, where they are.
"""

from hfproj.commands.arguments import arguments, leave_arguments, parse, write_arguments
from hfproj.commands.options import is_adapter, options, preset_flags
from hfproj.commands.outcome import run
from hfproj.commands.recipes import results_folder, start

__all__ = [
    "arguments", "is_adapter", "leave_arguments", "options", "parse", "preset_flags", "results_folder", "run", "start",
    "write_arguments",
]  # fmt: skip
