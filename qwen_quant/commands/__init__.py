"""One Typer function per command: parse, call, print."""
