"""W8A16 weights for Ascend NPUs."""
