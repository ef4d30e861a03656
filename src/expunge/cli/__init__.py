"""The command line: a thin reading of the library. `expunge --help`, or `python -m expunge --help`."""
