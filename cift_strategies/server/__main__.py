"""The API and the page of a node: `python -m cift_strategies.server --link SOCKET`, started and watched by the node itself."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import typer
import uvicorn

from catalog.errors import InputError, exit_code, run_typer
from cift_strategies.priority import behind
from cift_strategies.server.app import make_app
from cift_strategies.server.guard import LOCAL, Guard, Rates, Requests, token
from cift_strategies.server.link import Reader
from cift_strategies.server.metrics import Metrics
from cift_strategies.server.mirror import Mirror
from cift_strategies.server.streams import Protocol
from cift_strategies.server.window import Windows

NICE: Final = 5  # the node goes before
SENT: Final = 256 << 10  # bytes that the system holds for one client, so that a slow one is noticed

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=__doc__)
def serve(
    link: Annotated[Path, typer.Option(help="the node's socket")],
    state: Annotated[Path, typer.Option(help="folder for the token")],
    host: Annotated[str, typer.Option(help="address to listen at; another than this machine's own needs the token for everything")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: any free one")] = 8765,
    host_name: Annotated[list[str] | None, typer.Option(help="further names by which the server may be called")] = None,
    origin: Annotated[list[str] | None, typer.Option(help="pages of other hosts that may open WebSockets: https://desk.example")] = None,
    artifacts: Annotated[Path | None, typer.Option(help="models for windows that programs send; default: the node's")] = None,
    member: Annotated[list[str] | None, typer.Option(help='members of your own that the models may hold, "package.module:Class"')] = None,
    with_parent: Annotated[bool, typer.Option("--with-parent", hidden=True, help="end when standard input ends")] = False,
) -> None:
    if with_parent:
        behind(NICE)
    secret = token(state / "token")
    listener = listen(host, port)
    where = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{listener.getsockname()[1]}"
    mirror = Mirror(later=lambda s, f: asyncio.get_running_loop().call_later(s, f))
    reader = Reader(link, mirror.take, mirror.gone, mirror.done)
    metrics = Metrics(mirror)
    routes: Any = make_app(mirror, reader, Windows(tuple(member or ())), metrics, artifacts)
    everything = host not in LOCAL
    names = (*LOCAL, host, *(host_name or ()), *(("*",) if host in ("0.0.0.0", "::") and not host_name else ()))
    guarded = metrics.meter(Guard(routes, secret, names, tuple(origin or ()), everything, Rates()))
    config = uvicorn.Config(
        guarded, log_config=None, access_log=False, lifespan="off", ws=Protocol, ws_max_size=64 << 10,
        ws_per_message_deflate=False, server_header=False, timeout_graceful_shutdown=2, http=Requests,
    )  # fmt: skip
    told = {"url": where, "token_file": str((state / "token").resolve())}
    asyncio.run(_run(_Server(config), listener, reader, told, with_parent))


def listen(host: str, port: int) -> socket.socket:
    """Raises InputError where the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, or asyncio leaves Nagle's delay (40 ms) on
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SENT)
    try:
        listener.bind((host, port))
        listener.listen(1_024)
    except OSError as e:
        listener.close()
        raise InputError(f"cannot listen at {host}:{port} ({e.strerror}): choose another --port or --host") from None
    return listener


async def _run(server: uvicorn.Server, listener: socket.socket, reader: Reader, told: dict[str, str], with_parent: bool) -> None:
    loop = asyncio.get_running_loop()

    def leave() -> None:
        server.should_exit = True

    if with_parent:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the node, which ends this process
        threading.Thread(target=lambda: (sys.stdin.buffer.read(), loop.call_soon_threadsafe(leave)), daemon=True).start()
    else:
        loop.add_signal_handler(signal.SIGINT, leave)
    loop.add_signal_handler(signal.SIGTERM, leave)
    reading = asyncio.create_task(reader.run())
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    gc.collect()
    gc.freeze()  # what is there stays: no collection between two answers has to look through it (5 ms)
    print(json.dumps(told), flush=True)
    try:
        await serving
    finally:
        reading.cancel()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are ours


if __name__ == "__main__":
    raise SystemExit(exit_code(lambda: run_typer(app)))
