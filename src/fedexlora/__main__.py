"""The command line as ``python -m fedexlora``, for an interpreter without its scripts."""

from fedexlora.cli import main

if __name__ == "__main__":
    main()
