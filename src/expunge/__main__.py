"""`python -m expunge` is the same as `expunge`."""

from expunge.cli.main import main

if __name__ == "__main__":
    main()
