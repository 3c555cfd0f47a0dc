"""`python -m clipmini`, and `torchrun ... -m clipmini`."""

import sys

from clipmini.cli import main

sys.exit(main())
