"""The command ``hfproj``, and what the recipes share with it.

    arguments   flags, files of arguments, and the arguments.yaml that a run leaves
    flags       what a flag is, and a page of help made of flags
    tables      the flags of the recipes and the registered names, kept in tables.json, so that --help imports no torch
    recipes     where the recipes lie; ls, cp, run
    launching   a recipe on several processes, by accelerate's launcher
    embedding   embed: h or z of a data set as a file
    sharing     report, push
    program     the command itself

Nothing here imports torch, PEFT or transformers before it is needed. This room may import every other one but
`studies`; `hfproj.cli` offers to recipes what they use of it.
"""
