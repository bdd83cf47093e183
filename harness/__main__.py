"""``python -m harness`` is ``autoresearch``."""

from harness.cli import main

if __name__ == "__main__":
    main()
