"""``python -m handler``."""

from handler.cli import main

if __name__ == "__main__":
    main()
