"""What the subcommands of `dynrank` do, one file each; `dynrank_ds/cli.py` parses their arguments."""
