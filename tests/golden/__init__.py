"""What conversions of the demo checkpoints give, byte by byte: no change may alter it unknowingly."""
