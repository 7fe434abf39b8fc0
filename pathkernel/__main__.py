"""``python -m pathkernel``: the command line."""

import sys

from pathkernel.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
