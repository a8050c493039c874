"""The trainer, `convnn-timm train`."""
