"""A job in a shell's background inherits an ignored SIGINT; the tests of Ctrl-C need the ordinary one."""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
