"""The ``mambify`` command: one file a subcommand, each a thin layer over a function that Python can call too."""
