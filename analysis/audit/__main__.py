"""`python -m analysis.audit RESULTS`"""

import sys

from analysis.audit import main

if __name__ == "__main__":
    sys.exit(main())
