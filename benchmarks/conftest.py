"""Before torch's import: CPU threads that wait without spinning, else 2 cores measure each other's spinning."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
