"""`python -m hpkvd` is the command `hpkvd`."""

from hpkvd.cli import main

main(prog_name="hpkvd")
