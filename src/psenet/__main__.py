"""`python -m psenet` is the command line."""

from psenet.cli.main import main

if __name__ == "__main__":
    main()
