"""The report: one self-contained page about one artifact or several."""
