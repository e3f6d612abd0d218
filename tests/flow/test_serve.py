"""The live view's server: who gets an answer, what it says, and that nobody waits for it. Its page is in test_report_page.py."""

import http.client
import json
import socket
import sys
import threading
import time

import pytest

import gradkernels as gk
from tests.flow.made_up import Run, snapshot, spectrum


@pytest.fixture
def run():
    return Run()


@pytest.fixture
def server(run, monkeypatch):
    monkeypatch.setattr(sys.modules["gradkernels.flow.serve"], "SECONDS", 0.0)
    with gk.flow.serve(run) as server:
        yield server


def ask(server, path="/", method="GET", token=None, **headers):
    """(status, headers, body)."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=10)
    sign = "&" if "?" in path else "?"
    connection.request(method, f"{path}{sign}token={server.token if token is None else token}", headers=headers)
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read().decode()
    connection.close()
    return found


def data(server, seen=None):
    path = "/data" if seen is None else f"/data?seen={json.dumps(seen).replace(' ', '')}"
    status, _, body = ask(server, path)
    return status, json.loads(body) if body else None


def test_page_is_served(server, capsys):
    status, headers, body = ask(server)
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8" and "connect-src 'self'" in body
    assert headers["Cache-Control"] == "no-store" and headers["Referrer-Policy"] == "no-referrer"
    assert server.host == "127.0.0.1" and server.token not in body and len(server.token) >= 20
    assert server.url in repr(server)


def test_address_is_said_once(run, capsys):
    with gk.flow.serve(run) as server:
        ask(server)
    assert capsys.readouterr() == ("", f"gradient flow: {server.url}\n")


def test_report_can_be_taken_away(server):
    status, headers, body = ask(server, "/report.html")
    assert status == 200 and "attachment" in headers["Content-Disposition"] and "connect-src" not in body


@pytest.mark.parametrize("path", ["/", "/data", "/report.html", "/other"])
@pytest.mark.parametrize("token", ["", "wrong", "%C3%A9"])
def test_nothing_without_the_token(server, path, token):
    status, _, body = ask(server, path, token=token)
    assert status == 403 and "Model" not in body


def test_other_names_for_this_machine_are_refused(server):
    """A page of another site, whose name was made to lead here, must not read along."""
    assert ask(server, Host=f"evil.example:{server.port}")[0] == 403
    assert ask(server, Host="evil.example")[0] == ask(server, Host="")[0] == 403
    assert ask(server, Host=f"localhost:{server.port}")[0] == 200
    assert ask(server, Host="127.0.0.1:8000")[0] == 200  # through a tunnel


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_it_can_only_be_read(server, method):
    assert ask(server, method=method)[0] == 501


def test_unknown_paths_and_head(server):
    assert ask(server, "/other")[0] == 404 and ask(server, "/../flow.py")[0] == 404
    status, headers, body = ask(server, method="HEAD")
    assert status == 200 and int(headers["Content-Length"]) > 10_000 and body == ""


def test_new_steps_are_sent_and_old_ones_are_not(server, run):
    status, found = data(server)
    assert status == 200 and found["runs"][0]["have"] == 0 and found["runs"][0]["steps"] == [1, 2, 3]
    assert data(server, {"Model": [3, -1]}) == (204, None)
    run.steps = 5
    status, found = data(server, {"Model": [3, -1]})
    [one] = found["runs"]
    assert one["steps"] == [1, 2, 3, 4, 5] and one["have"] == 3 and len(one["layers"][0]["signals"]["h"]) == 2
    run.other["spectra"] = [spectrum(5)]
    assert data(server, {"Model": [5, -1]})[1]["runs"][0]["spectrum_steps"] == [5]
    assert data(server, {"Model": [5, 5]})[0] == 204


@pytest.mark.parametrize("seen", ["3", "[]", '{"Model":7}', '{"Model":["a",1]}', "{", '{"other":[1,1]}'])
def test_a_page_that_asks_oddly_gets_everything(server, seen):
    status, _, body = ask(server, f"/data?seen={seen}")
    assert status == 200 and json.loads(body)["runs"][0]["have"] == 0


def test_many_browsers_cost_one_snapshot(run, monkeypatch):
    monkeypatch.setattr(sys.modules["gradkernels.flow.serve"], "SECONDS", 3600.0)
    with gk.flow.serve(run) as server:
        before = run.looks
        threads = [threading.Thread(target=data, args=(server,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert run.looks == before + 1


def test_browsers_that_hang_hold_up_nobody(server):
    hung = [socket.create_connection((server.host, server.port)) for _ in range(5)]
    hung[0].sendall(b"GET /data HTTP/1.1\r\n")  # and no more
    # asks for a page and goes away without reading it
    hung[1].sendall(f"GET /?token={server.token} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
    hung[1].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    hung.pop(1).close()
    assert data(server)[0] == 200
    begin = time.monotonic()
    server.close()
    assert time.monotonic() - begin < 3
    for one in hung:
        one.close()


def test_a_browser_that_goes_away_is_not_an_error(server, capfd):
    for _ in range(3):
        one = socket.create_connection((server.host, server.port))
        one.sendall(f"GET /?token={server.token} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        one.close()
    assert data(server)[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_training_goes_on_while_it_is_read(monkeypatch):
    """A real monitor, read as fast as it can be while it trains: every step is taken, and the last is seen."""
    monkeypatch.setattr(sys.modules["gradkernels.flow.serve"], "SECONDS", 0.0)
    import torch

    model = gk.nn.GRU(3, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with gk.flow.watch(model, on_alert=lambda alert: None) as monitor, gk.flow.serve(monitor) as server:
        done = threading.Event()
        statuses = set()

        def read():
            while not done.is_set():
                statuses.add(data(server)[0])

        reader = threading.Thread(target=read)
        reader.start()
        for _ in range(100):
            model(torch.randn(9, 2, 3))[0].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        done.set()
        reader.join()
        _, found = data(server)
        assert statuses == {200} and found["runs"][0]["steps"] == list(range(1, 101))


def test_what_goes_wrong_is_told_to_the_browser_and_once_to_the_terminal(server, run, capfd):
    def broken():
        raise RuntimeError("lost")

    run.snapshot = broken
    for _ in range(3):
        status, _, body = ask(server, "/data")
        assert (status, body) == (500, "RuntimeError: lost\n")
    assert capfd.readouterr().err.count("Traceback") == 1
    del run.snapshot
    assert data(server)[0] == 200


def test_a_port_that_is_taken(server, run):
    with pytest.raises(OSError, match=rf"cannot listen at 127.0.0.1:{server.port}: Address already in use; port=0"):
        gk.flow.serve(run, port=server.port)


def test_a_host_that_is_not_ours(run):
    with pytest.raises(OSError, match=r"cannot listen at 192.0.2.1:0"):
        gk.flow.serve(run, host="192.0.2.1")


def test_a_port_is_free_again_after_closing(run):
    server = gk.flow.serve(run)
    server.close()
    server.close()
    assert "(closed)" in repr(server)
    with gk.flow.serve(run, port=server.port) as again:
        assert again.port == server.port and again.token != server.token and ask(again)[0] == 200


def test_waiting_ends_when_it_is_closed(run):
    server = gk.flow.serve(run)
    threading.Timer(0.1, server.close).start()
    server.wait()
    assert "(closed)" in repr(server)


def test_waiting_ends_on_ctrl_c(run, monkeypatch):
    server = gk.flow.serve(run)

    def interrupt(seconds):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(server._thread, "join", interrupt)
    server.wait()
    assert "(closed)" in repr(server)


def test_several_runs(monkeypatch):
    with gk.flow.serve({"a": snapshot(), "b": snapshot(2)}) as server:
        assert [run["name"] for run in data(server)[1]["runs"]] == ["a", "b"]
        assert data(server, {"a": [5, -1], "b": [2, -1]})[0] == 204


def test_a_comparison_is_shown_too(run):
    with gk.flow.serve(run, comparison={"title": "Before"}) as server:
        for path in ("/", "/report.html"):
            assert '"comparison":{"title":"Before"}' in ask(server, path)[2]
    with pytest.raises(TypeError, match=r"comparison: expected what gk.flow.compare returns, got int"):
        gk.flow.serve(run, comparison=3)
