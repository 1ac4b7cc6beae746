"""`python -m omega_qvla.cli`, for where the command is not on the path."""

import sys

from omega_qvla.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
