"""Converting a checkpoint to an artifact: open, plan, build, validate, publish."""
