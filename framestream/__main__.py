"""``python -m framestream``: the console command, where scripts are not on the path."""

import sys

from framestream.cli import main

sys.exit(main())
