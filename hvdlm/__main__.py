"""``python -m hvdlm``."""

import sys

from hvdlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
