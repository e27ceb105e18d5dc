"""The `sdjax` command, also as `python -m sdjax`."""


def main() -> None:
    """Runs the command."""
    from sdjax.commands import signals

    signals.leave_at_signals()  # before what takes long to import
    from sdjax.commands.main import main

    main()


if __name__ == "__main__":
    main()
