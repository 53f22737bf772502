"""Starting the command in a process of its own."""

import signal


def heed_interrupts():
    """For `preexec_fn`: undoes the ignoring of SIGINT that a shell leaves to what it starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
