"""`python -m kdfast.cli`, where the script `kdfast` is not on the PATH."""

import sys

from kdfast.cli import main

sys.exit(main())
