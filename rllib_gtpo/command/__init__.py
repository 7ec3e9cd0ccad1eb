"""What stands behind the `rllib` command: loading files, the run loop, its directory and its
signals."""
