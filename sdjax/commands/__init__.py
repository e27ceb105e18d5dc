"""The `sdjax` command, one file a subcommand."""
