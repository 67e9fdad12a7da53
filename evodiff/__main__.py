"""`python -m evodiff` is the command `evodiff`."""

import sys

from evodiff.cli import main

sys.exit(main())
