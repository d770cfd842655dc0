"""A socket of this machine, and the server behind it until a signal comes."""

import ipaddress
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import uvicorn

from finetune.compare.generation.answerer import open_answerer
from finetune.compare.serve.app import Server
from finetune.errors import FinetuneError

ANY = ("0.0.0.0", "::")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
CLOSING_SECONDS = 5  # for the last lines of answers that a signal cut


def serve(
    refs: Sequence[str],
    address: tuple[str, int],
    most: int,
    is_open: bool,
    tell: Callable[[str], None],
) -> None:
    """Serves models until SIGTERM or SIGINT, which it hands on once all connections are closed. `tell` gets the URL when it is ready.

    `is_open` allows an address that other machines reach. FinetuneError for an address that cannot be listened on.
    """
    host, port = address
    with _bound(host, port, is_open) as listening:
        answerers = {ref: open_answerer(ref) for ref in dict.fromkeys(refs)}
        with ThreadPoolExecutor(1) as executor:
            server = Server(answerers, executor, most, lambda: running.should_exit)
            app = server.app(["*"] if is_open else [*LOOPBACK, host])
            config = uvicorn.Config(app, lifespan="off", log_level="warning", timeout_graceful_shutdown=CLOSING_SECONDS)
            running = uvicorn.Server(config)
            shown = f"[{host}]" if ":" in host else host
            tell(f"http://{shown}:{listening.getsockname()[1]}/v1")
            running.run(sockets=[listening])


def _bound(host: str, port: int, is_open: bool) -> socket.socket:
    """A listening socket. The port is this server's before its models are loaded."""
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise FinetuneError(
            f"is no address: {error.strerror}", where=host, hint="give an address of this machine"
        ) from None
    if not is_open and not ipaddress.ip_address(where[0]).is_loopback:
        said = "is an address that other machines reach, and there is no password"
        raise FinetuneError(said, where=host, hint="tunnel to 127.0.0.1 with ssh -L, or allow it with --allow-network")
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
        listening.listen()
    except OSError as error:
        listening.close()
        hint = "give another --port; 0 takes a free one"
        raise FinetuneError(f"cannot listen on port {port}: {error.strerror}", where=host, hint=hint) from None
    return listening
