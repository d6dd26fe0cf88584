"""Components, processors and references that several families share."""
