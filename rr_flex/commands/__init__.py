"""The subcommands of `rr-flex`, a module each with `add_to(commands)`; listed in rr_flex.cli."""
