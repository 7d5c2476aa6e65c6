"""`python -m common VERB COMPETITION [--flags]`."""

import sys

from common.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
