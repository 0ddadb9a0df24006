"""`python -m everseg` is the command `everseg`, for launchers such as torchrun."""

from everseg.cli.main import main

if __name__ == "__main__":
    main()
