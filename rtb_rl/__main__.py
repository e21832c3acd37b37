"""`python -m rtb_rl ...`: the command `rtb-rl` of this interpreter."""

import sys

from rtb_rl.cli import main

if __name__ == "__main__":
    sys.exit(main())
