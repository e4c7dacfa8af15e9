"""`python -m analysis.heads`"""

import sys

from analysis.heads import main

if __name__ == "__main__":
    sys.exit(main())
