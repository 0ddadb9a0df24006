"""`python -m everseg.cli`, as version 0.1 was called by launchers; `python -m everseg` is the same."""

from everseg.cli.main import main

if __name__ == "__main__":
    main()
