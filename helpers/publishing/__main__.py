"""`python -m helpers.publishing`: see `command`."""

import sys

from helpers.publishing.command import main

sys.exit(main())
