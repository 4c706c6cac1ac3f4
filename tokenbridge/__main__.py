"""`python -m tokenbridge` is the command `tokenbridge`."""

from tokenbridge.cli.main import main

if __name__ == "__main__":
    main()
