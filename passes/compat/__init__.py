"""The private and unstable interfaces of libraries that vlmconvert uses: one module per library.

No other module uses a private name of NNCF, OpenVINO, transformers, torch or loky. A test of each module says what breaks
when the interface changes.
"""
