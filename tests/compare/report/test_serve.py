"""The server of a report: to this machine alone, for its own page alone, until a signal."""

import http.client
import json
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from finetune.compare.report.payload import Asked, Report
from finetune.compare.report.serve import Server, server
from finetune.errors import FinetuneError
from tests import forks
from tests.compare.made_runs import made, step, whole, write


@contextmanager
def served(*runs) -> Iterator[Server]:
    with server(Report(runs, Asked()), 0) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def ask(serving: Server, path: str, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", serving.server_port, timeout=30)
    connection.request(method, path, headers=headers)
    return connection.getresponse()


def test_it_answers_with_the_newest_data_and_says_when_there_is_nothing_new(tmp_path) -> None:
    run = made(tmp_path / "run", 9, [step(1, 3.0)])
    with served(run) as serving:
        whole_page = ask(serving, "/").read().decode()
        assert "connect-src 'self'" in whole_page.replace("&#x27;", "'") and "data-live" in whole_page
        first = ask(serving, "/data.json")
        tag = first.headers["ETag"]
        assert json.loads(first.read())["runs"][0]["recorded"] == 1
        assert ask(serving, "/data.json", **{"If-None-Match": tag}).status == 304
        write(run, [step(2, 2.0)])
        second = ask(serving, "/data.json", **{"If-None-Match": tag})
        assert (second.status, json.loads(second.read())["runs"][0]["recorded"]) == (200, 2)


def test_it_listens_on_loopback_and_refuses_other_names_paths_and_methods(tmp_path) -> None:
    with served(whole(tmp_path / "run", 8)) as serving:
        assert serving.server_address[0] == "127.0.0.1"
        assert ask(serving, "/data.json", Host="evil.example:80").status == 403
        assert ask(serving, "/data.json", Host=f"localhost:{serving.server_port}").status == 200
        assert ask(serving, "/../plan.json").status == 404
        assert ask(serving, "/", method="POST").status == 501
        assert ask(serving, "/").headers["X-Frame-Options"] == "DENY"


def test_a_silent_client_holds_nobody_up(tmp_path) -> None:
    with served(whole(tmp_path / "run", 8)) as serving, socket.create_connection(serving.server_address):
        assert ask(serving, "/data.json").status == 200


def test_a_taken_port_is_named(tmp_path) -> None:
    run = whole(tmp_path / "run", 8)
    with served(run) as serving, pytest.raises(FinetuneError, match="cannot listen: Address already in use\nhint: "):
        server(Report([run], Asked()), serving.server_port)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it(tmp_path, number, code) -> None:
    command = [sys.executable, "-m", "finetune", "report", str(whole(tmp_path / "run", 8)), "--serve", "--json"]
    with forks.Popen(command, stdout=forks.PIPE, stderr=forks.PIPE, text=True) as process:
        url = json.loads(process.stdout.readline())["path"]
        connection = http.client.HTTPConnection(url.split("/")[2], timeout=30)
        connection.request("GET", "/data.json")
        assert connection.getresponse().status == 200
        process.send_signal(number)
        assert process.wait(60) == code
