"""python -m hpkvfs."""

from hpkvfs.cli import main

if __name__ == "__main__":
    main(prog_name="hpkvfs")
