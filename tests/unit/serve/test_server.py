"""The socket, the lock, and what happens without gradio."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from reelquant._errors import CheckpointError, UnsupportedError
from reelquant.cli import app
from reelquant.serve import server
from reelquant.serve.folder import Folder


def listens(port: int) -> list[str]:
    """The addresses on which this process listens at a port."""
    return [one.laddr.ip for one in psutil.Process().net_connections("inet") if one.status == psutil.CONN_LISTEN and one.laddr.port == port]


def test_the_socket_listens_on_localhost_and_nowhere_else() -> None:
    with closing(server.bound("127.0.0.1", 0)) as made:
        port = made.getsockname()[1]
        assert listens(port) == ["127.0.0.1"]
        assert server.address(made) == f"http://127.0.0.1:{port}"
        with pytest.raises(UnsupportedError, match=f"cannot listen on 127.0.0.1, port {port}: .*; choose another --port"):
            server.bound("127.0.0.1", port)


def test_an_address_of_another_machine_is_one_clear_error() -> None:
    with pytest.raises(UnsupportedError, match=r"cannot listen on 192\.0\.2\.1"):
        server.bound("192.0.2.1", 0)


def test_one_server_for_a_folder(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    with server.only_one(folder), pytest.raises(CheckpointError, match="another `reelquant serve` runs"), server.only_one(folder):
        pass
    with server.only_one(folder):
        pass


@pytest.mark.parametrize(("host", "warned"), [(None, False), ("127.0.0.1", False), ("0.0.0.0", True)])
def test_other_addresses_only_if_asked_and_with_a_warning(
    host: str | None, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, int]] = []
    monkeypatch.setattr(server, "serve", lambda root, host, port, **_: asked.append((root, host, port)))
    made = CliRunner().invoke(app, ["serve", str(tmp_path), *(["--host", host] if host else []), "--port", "0"])
    assert asked == [(str(tmp_path), host or "127.0.0.1", 0)]
    assert ("whoever reaches this machine" in made.stderr) is warned


def test_without_gradio_one_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    made = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert made.exit_code == 1 and made.stdout == ""
    assert made.stderr.startswith("reelquant: the page needs gradio, which is not installed: pip install 'reelquant[serve]' (")
    assert made.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_only_the_page_imports_gradio_and_the_page_imports_no_torch() -> None:
    code = (
        "import sys, reelquant, reelquant.cli, reelquant.serve.server, reelquant.serve.plan, reelquant.serve.evaluations;"
        "sys.exit(','.join(name for name in ('gradio', 'fastapi', 'torch') if name in sys.modules) or None)"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (made.returncode, made.stderr) == (0, "")
