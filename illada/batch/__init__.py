"""Files of requests: JSON lines in, JSON lines out, each answered as `illada serve` would. Needs the extra `serve`.

`lines.py` has the formats. `application.py` is the server's application without a socket, so that a line means here
what its body means over HTTP. `answering.py` keeps that application busy and yields the answers. `output.py`
is the file of answers, which can be continued after a kill.
"""

from .answering import answer_all

__all__ = ["answer_all"]
