import sys

from convnn_timm.cli import main

if __name__ == '__main__':
    sys.exit(main())
