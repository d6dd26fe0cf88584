"""What somebody else may ship for vlmconvert; nothing in vlmconvert knows it but by entry points."""
