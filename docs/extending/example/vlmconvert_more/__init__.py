"""An example of a package that extends vlmconvert; the pages beside it explain it."""
