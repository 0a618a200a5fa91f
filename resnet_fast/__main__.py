"""`python -m resnet_fast`: the same as `resnet-fast`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.argv[0] = "resnet-fast"
    sys.exit(main())
