"""``python -m pathkernel``: the command line."""

import sys

from pathkernel.cli import main

if __name__ == "__main__":
    sys.exit(main())
