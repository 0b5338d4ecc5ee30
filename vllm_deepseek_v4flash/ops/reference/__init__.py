"""PyTorch references of the ops, one file each, named like the op they define."""
