"""engine/server/starting.py: answers while a model is being loaded, on a socket that the server then takes over."""

import socket
import time

import httpx

from engine.server.starting import answering


def ask(url, method="GET", path="/health", **how):
    return httpx.request(method, url + path, timeout=5.0, trust_env=False, **how)


def test_everyone_is_told_to_come_again():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with answering(listener):
            for method, path in (("GET", "/health"), ("GET", "/"), ("GET", "/v1/models"), ("OPTIONS", "/health")):
                answer = ask(url, method, path)
                assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1"), (method, path)
                assert (
                    answer.json()["error"]["code"] == "starting" and "is starting" in answer.json()["error"]["message"]
                )
            assert ask(url, "HEAD").status_code == 503 and ask(url, "HEAD").content == b""
            answer = ask(url, "POST", "/v1/completions", json={"prompt": "x" * 100_000})
            assert answer.status_code == 503


def test_the_socket_stays_open_for_the_server():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with answering(listener):
            pass
        with socket.create_connection(listener.getsockname()) as client:
            accepted, _ = listener.accept()
            with accepted:
                client.sendall(b"hello")
                assert accepted.recv(5) == b"hello"


def test_clients_that_say_nothing_or_nonsense_stop_nobody():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        with answering(listener), socket.create_connection(address), socket.create_connection(address) as rude:
            rude.sendall(b"\x16\x03\x01 what is this\r\n\r\n")
            begin = time.monotonic()
            assert ask(f"http://127.0.0.1:{address[1]}").status_code == 503
            assert time.monotonic() - begin < 2
