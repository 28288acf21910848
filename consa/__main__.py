"""`python -m consa` runs the command line."""

from consa.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
