"""What `python -m vlmconvert` runs."""

from vlmconvert.cli import main

if __name__ == "__main__":
    main(prog_name="vlmconvert")
