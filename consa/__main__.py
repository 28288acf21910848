"""`python -m consa` is the command `consa`."""

from consa.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
