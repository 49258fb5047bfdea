"""The server: one socket, one folder, one process of this kind for each folder."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from reelquant._errors import CheckpointError, UnsupportedError
from reelquant.serve.comparisons import Comparisons
from reelquant.serve.folder import Folder
from reelquant.serve.guard import App, Guard
from reelquant.serve.work import Launch, Queue, launch

LOCAL = ("127.0.0.1", "localhost", "::1")
NEEDS = "the page needs gradio, which is not installed: pip install 'reelquant[serve]'"
OFF = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}  # read when gradio is imported
GOODBYE = 2  # seconds that open connections have when the server ends


def check_installed() -> None:
    """Refuse to begin without gradio.

    Raises:
        UnsupportedError: with the command that installs it.
    """
    os.environ.update(OFF)
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(f"{NEEDS} ({error})") from None


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens on one address.

    Args:
        host: a name or an address of this machine.
        port: 0 for any free one.

    Raises:
        UnsupportedError: if the address or port cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UnsupportedError(f"--host '{host:.80}' is not an address of this machine ({error})") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(128)
    except OSError as error:
        made.close()
        raise UnsupportedError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another --port, or 0 for any free one"
        ) from None
    return made


@contextmanager
def only_one(folder: Folder) -> Iterator[None]:
    """One server for a folder at a time: two would run each other's jobs. The lock ends with the process, however it ends.

    Raises:
        CheckpointError: if another process has it, or the folder takes no files.
    """
    place = folder.own("lock")
    try:
        place.parent.mkdir(exist_ok=True)
        handle = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        raise CheckpointError(f"cannot write '{place}' ({error.strerror}); serve a folder that takes files") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"another `reelquant serve` runs on '{folder.root}'; use its page, or end it") from None
        yield
    finally:
        os.close(handle)


def application(folder: Folder, queue: Queue, host: str, start: Launch = launch) -> App:
    """Everything that answers requests.

    Args:
        folder: the served one.
        queue: its jobs.
        host: what the server binds to.
        start: starts the process of a plan.
    """
    check_installed()
    os.environ["GRADIO_TEMP_DIR"] = str(folder.own("gradio"))
    import gradio as gr

    from reelquant.serve import page, routes

    served = routes.Served(folder, queue, Comparisons(folder))
    fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="zinc", font=fonts[0], font_mono=fonts[1])
    theme.set(body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400")  # readable where small
    app = gr.mount_gradio_app(
        routes.application(served),
        page.blocks(served, start),
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css=routes.asset("page.css"),
        head=routes.script_tags(),
    )
    return Guard(app, host)


def serve(root: str, host: str, port: int, *, tell: Callable[[str], None], start: Launch = launch) -> None:
    """Serve until the process is asked to stop. Jobs that have not ended then can be started again.

    Args:
        root: the folder.
        host: where to listen.
        port: 0 for any free one.
        tell: gets the address of the page.
        start: starts the processes of jobs.

    Raises:
        ReelQuantError: if gradio is absent, or the folder or the address cannot be had.
    """
    check_installed()
    import uvicorn

    folder = Folder(root)
    with only_one(folder), closing(bound(host, port)) as listening, closing(Queue(folder, start)) as queue:
        app = application(folder, queue, host, start)
        config = uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=GOODBYE)
        tell(address(listening))
        uvicorn.Server(config).run(sockets=[listening])


def address(listening: socket.socket) -> str:
    """The address of the page, for the browser."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
