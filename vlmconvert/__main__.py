"""Entry point of `python -m vlmconvert`."""

from vlmconvert.commands.cli import main

if __name__ == "__main__":
    main(prog_name="vlmconvert")
