"""The embedded demo checkpoints, and the scripts that train them."""
