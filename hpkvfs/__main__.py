"""The command `hpkvfs`, also as `python -m hpkvfs`."""

from __future__ import annotations

from hpkvfs.entry import importing


def main() -> None:
    """Run it."""
    with importing():
        from hpkvfs.cli import main as command
    command(prog_name="hpkvfs")


if __name__ == "__main__":
    main()
