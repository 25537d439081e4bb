"""``python -m chatlearn`` is ``chatlearn``."""

import sys

from chatlearn.entrypoint import main

sys.exit(main())
