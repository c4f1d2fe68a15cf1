"""``python -m milpress`` is the command line."""

from milpress.cli.root import main

if __name__ == "__main__":
    main()
