import sys

from lte_scale.cli import main

sys.exit(main())
