"""``python -m milpress`` is the command line."""

from milpress._root import main

if __name__ == "__main__":
    main()
