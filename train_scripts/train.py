"""The trainer; the same as `convnn-timm train`."""
from convnn_timm.train.engine import main

if __name__ == '__main__':  # not in a worker process that imports this file
    main()
