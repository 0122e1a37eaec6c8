"""The command `hpkvd`, also as `python -m hpkvd`."""

from __future__ import annotations

from hpkvfs.entry import importing


def main() -> None:
    """Run it."""
    with importing():
        from hpkvd.cli import main as command
    command(prog_name="hpkvd")


if __name__ == "__main__":
    main()
