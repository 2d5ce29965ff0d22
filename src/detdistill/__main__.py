"""``python -m detdistill``."""

from detdistill.cli import main

if __name__ == "__main__":
    main()
