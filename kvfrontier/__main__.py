"""`python -m kvfrontier`: the command `kvfrontier`."""

import sys

from kvfrontier.command import main

if __name__ == "__main__":
    sys.exit(main())
