"""`stepdistill watch`: what its server gives, what it refuses, and the page in a browser while a run goes on."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from run_folders import write_run, write_status

from stepdistill.errors import UserError
from stepdistill.watching import site as watched
from stepdistill.watching.server import Server
from stepdistill.watching.site import Site


@contextmanager
def serving(root: Path) -> Iterator[int]:
    """The port of a server of a folder."""
    with Server(Site(root), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and content of an answer to a path as it stands."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs, a link to one, something beside them, and links out of the folder."""
    top = tmp_path_factory.mktemp("watched")
    for name, state, when in (("old", "done", 1000), ("new", "training", 3000), ("killed", "training", 2000)):
        folder = write_run(top / "runs" / name, state, stats=False, report=state == "done")
        if name == "killed":
            write_status(folder, "training", pid=2**22 + 1)
        for file in ("status.json", "report.json", "recipe.yaml"):
            if (folder / file).exists():
                os.utime(folder / file, (when, when))
    (top / "runs" / "secret.txt").write_text("secret")
    (top / "runs" / "no run").mkdir()
    (top / "runs" / "no run" / "file.txt").write_text("secret")
    (top / "secret.txt").write_text("secret")
    new = top / "runs" / "new"
    (new / ".hidden").write_text("secret")
    (new / "link.txt").symlink_to(top / "secret.txt")
    (new / "up").symlink_to(top)
    (new / "work" / "weights.bin").write_bytes(bytes(range(256)) * 5000)
    return top / "runs"


def test_a_runs_page_is_served_and_sent_again_only_when_there_is_something_new(
    runs: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(runs / "old", tmp_path / "copied")
    with serving(folder) as port:
        status, headers, page = ask(port, "/")
        text = page.decode()
        assert (
            status == 200
            and "copied" in text
            and "0.750" in text
            and headers["Content-Type"].startswith("text/html")
        )
        assert (
            "default-src 'none'" in headers["Content-Security-Policy"]
            and headers["Cache-Control"] == "no-store"
        )
        for name in re.findall(r'<a href="([^"]*)"', text):
            assert ask(port, f"/{name}")[0] == 200, name
        status, headers, body = ask(port, "/?body")
        assert status == 200 and body.decode() in text and not body.startswith(b"<!doctype")
        tag = headers["ETag"]
        assert ask(port, "/?body", If_None_Match=tag)[::2] == (304, b"")
        assert ask(port, "/", "HEAD")[::2] == (200, b"")
    other = Site(folder)
    first = other.answer("/?body").headers["ETag"]
    write_status(folder, "stopped", phase="it was asked to stop")
    assert other.answer("/?body").headers["ETag"] == first  # made a moment ago: not so soon
    made = other._bodies[""]
    other._bodies[""] = watched._Body(
        made.title, made.text, made.tag, made.stamp, made.made - 60, made.seconds
    )
    again = other.answer("/?body", first)
    assert again.status == 200 and "it was asked to stop" in again.text and again.headers["ETag"] != first


def test_a_folder_of_runs_lists_them_the_latest_first(runs: Path) -> None:
    assert (runs / "latest").is_symlink()
    with serving(runs) as port:
        page = ask(port, "/")[2].decode()
        assert re.findall(r'<tr><td><a href="([^"]*)/">', page) == ["new", "killed", "old"]
        cells = [re.findall(r"<td>([^<]*)</td>", line) for line in page.split("<tr>")[2:]]
        assert cells[0][:2] == ["training", "8 of 12"] and cells[1][0] == "killed"
        assert cells[2][:4] == ["finished", "8 of 12", "gap closed 0.750 at 1 step", "healthy"]
        run = ask(port, "/new/")[2].decode()
        assert "Update 8 of 12" in run and 'href="../"' in run
        assert f"stepdistill verify {runs}/old/student" in ask(port, "/old/")[2].decode()
        assert ask(port, "/new")[1]["Location"] == "/new/"
        assert ask(port, "/new/recipe.yaml")[2] == (runs / "new" / "recipe.yaml").read_bytes()
        listed = ask(port, "/new/work/")[2].decode()
        assert "weights.bin" in listed and "README.txt" in listed


@pytest.mark.parametrize(
    "path",
    [
        *("/new/../secret.txt", "/../secret.txt", "/new/%2e%2e/secret.txt", "/new/..%2f..%2fsecret.txt"),
        *(
            "/new/link.txt",
            "/new/up/secret.txt",
            "/new/up/",
            "/new/.hidden",
            "/secret.txt",
            "/no%20run/file.txt",
        ),
        *(
            "/new//recipe.yaml",
            "/new/work%5c..%5crecipe.yaml",
            "/new/a%00b",
            "/new/recipe.yaml/",
            "/new/absent",
        ),
        *("//etc/passwd", "/%2fetc/passwd", "new/recipe.yaml", "/latest/recipe.yaml", "/new/\udcff"),
    ],
)
def test_nothing_but_the_files_of_runs_is_served(path: str, runs: Path) -> None:
    """Nothing above, hidden, linked, or of what is no run."""
    answer = Site(runs).answer(path)
    assert answer.status == 404 and answer.file is None and "secret" not in answer.text


def test_requests_by_other_names_and_of_other_kinds_are_refused(runs: Path) -> None:
    """A site whose name leads to this machine reads nothing, and nothing can be written."""
    with serving(runs) as port:
        for host in (
            "evil.example",
            "localhost.evil.example",
            f"127.0.0.1.evil:{port}",
            "",
            "[::1",
            "192.168.0.1",
        ):
            assert ask(port, "/new/recipe.yaml", Host=host)[0] == 403, host
        for host in (f"localhost:{port}", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST"):
            assert ask(port, "/new/recipe.yaml", Host=host)[0] == 200, host
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(port, "/new/recipe.yaml", method)[0] == 501
        _, headers, content = ask(port, "/new/work/weights.bin")
        assert content == bytes(range(256)) * 5000 and headers["X-Content-Type-Options"] == "nosniff"
        with socket.create_connection(("127.0.0.1", port)) as plain:  # the path as no client would send it
            plain.sendall(b"GET /new/../../secret.txt HTTP/1.0\r\nHost: localhost\r\n\r\n")
            assert b" 404 " in plain.recv(100)


def test_what_cannot_be_watched_is_said_in_one_line(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place, said in (
        (tmp_path / "absent", "is not a folder"),
        (tmp_path / "empty", "is no run and has none in it"),
    ):
        with pytest.raises(UserError, match=said):
            Site(place)
    with Server(Site(runs), 0) as server:
        port = server.server_address[1]
        assert server.server_address[0] == "127.0.0.1"
        with pytest.raises(
            UserError, match=f"--port {port} is taken: give another, or 0 for any that is free"
        ):
            Server(Site(runs), port)


def test_the_command_ends_quietly_with_ctrl_c(runs: Path) -> None:
    """Also where whoever started the tests ignores it, as a shell does for what is in the background."""
    watch = [sys.executable, "-m", "stepdistill", "watch", str(runs), "--port", "0"]
    listens = (
        "import os, sys, signal as s; s.signal(s.SIGINT, s.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", listens, *watch]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        found = re.match(r"http://127\.0\.0\.1:(\d+)/  \(Ctrl-C ends it\)$", line)
        assert found, line + process.stderr.read()
        assert ask(int(found[1]), "/")[0] == 200
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(20) == 0 and process.stderr.read() == ""
        finally:
            process.kill()


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
def test_an_open_page_keeps_up_without_losing_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a browser 375 pixels wide, in the dark: nothing is cut, nothing is fetched from elsewhere, and an update
    leaves the scroll position and what is unfolded as they are."""
    playwright = pytest.importorskip("playwright.sync_api", reason="there is no playwright here")
    monkeypatch.setattr(watched, "SECONDS", 1)
    monkeypatch.setattr(watched, "_SHARE", 0)
    folder = write_run(tmp_path / "run", stats=False)
    shutil.copy(folder / "recipe.yaml", folder / "log.txt")
    with serving(folder) as port, playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 375, "height": 300}, color_scheme="dark")
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: asked.append(f"console: {message.text}"))
        page.goto(f"http://127.0.0.1:{port}/")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
        assert page.evaluate("document.documentElement.scrollWidth") == 375
        page.locator("summary").first.click()
        page.evaluate("window.scrollTo(0, 150)")
        write_status(folder, "training", update=9)
        page.get_by_text("Update 9 of 12").wait_for(timeout=20_000)
        assert page.evaluate("[window.scrollY, document.querySelector('details').open]") == [150, True]
        write_status(folder, "stopped", update=9, phase="it was asked to stop")
        page.get_by_text("it was asked to stop").wait_for(timeout=20_000)
        assert page.title() == "run: stopped"
        assert page.locator("progress").count() == 1
        assert {url.split("?")[0] for url in asked} == {f"http://127.0.0.1:{port}/"}
        browser.close()
