import sys

from p2p.cli.parser import main

sys.exit(main())
