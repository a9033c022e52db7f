"""`python -m pyruntime`."""

from pyruntime.cli.main import main

if __name__ == "__main__":
    main()
