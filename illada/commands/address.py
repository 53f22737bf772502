"""Where a server of the command listens."""

import socket


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound to the address and does not listen yet, so that a bad one is known before work begins.

    Raises:
        ValueError: if there is no such host on this machine, or the port is taken.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ValueError(f"`--host` must be an address of this machine, got {host!r}: {error.strerror}.") from error
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ValueError(
            f"`--host` and `--port` must be free for a server, got {host}:{port}: {error.strerror}."
        ) from error
    return bound


def drop_who_does_not_read(listener: socket.socket, seconds: float):
    """Has the system end a connection that takes nothing of what is sent to it for so long, where it can do so."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * seconds))
