"""`python -m trimode` is the command `trimode`."""

from trimode.cli import main

if __name__ == "__main__":
    main()
