"""The trainer; the same as `convnn-timm train`."""
from convnn_timm.train import main

main()
