"""The exit statuses of healfs, written once; healfs(1) lists them."""

SUCCESS = 0
FAILURE = 1  # it was tried and did not work
BAD_INPUT = 2  # what was asked cannot be: nothing was changed
INTERRUPTED = 130  # Ctrl-C or SIGTERM, as shells count SIGINT
