"""Where samples come from, and the activations that they cause."""
