"""The exit statuses of healfs, written once; healfs(1) lists them."""

SUCCESS = 0
FAILURE = 1  # it did not work, and may another time
BAD_INPUT = 2  # what was asked cannot be: nothing was changed
INTERRUPTED = 130  # Ctrl-C (mount and demo: SIGTERM, too), as shells count SIGINT
