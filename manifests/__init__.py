"""What was made, from what, how, and how well it does: the manifest's model, reader and writer, and the errors that all floors share."""
