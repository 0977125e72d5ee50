"""A stand-in for any server with OpenAI's streaming completions, already running; and the runner that attaches to it.

It tells what that interface does and no more: no timings, no token ids, no buffers, no log, no process of its own.
"""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

from moelib.catalogue.facts import EngineFacts
from moelib.engine import client
from moelib.engine.client import Answer
from moelib.measure import runner
from moelib.measure.runner import Prompt

NAME = "openai-stub"
TELLS = frozenset({"usage"})
STEP_S = 0.001  # a token
DONE = "[DONE]"


class Stub:
    """Streams `text` events of one token each. `defect`: what goes wrong with the stream.

    cut: the connection breaks; ends: it ends without [DONE]; late: tokens come after [DONE]; more: one token too many;
    error: the server says that it failed; switches: another model answers from the middle on; embeds: it completes no
    text; no-models: it has no such page; key: it asks for one; nonsense: its pages are no JSON;
    negative: it counts what cannot be.
    """

    def __init__(self, usage=True, defect=None, names=("m",)):
        self.usage, self.defect, self.names = usage, defect, names

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self.server.stub, self.port = self, self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class Answers(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def log_message(self, *_):
        pass

    def _head(self, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Connection", "close")
        self.end_headers()

    def do_GET(self):
        stub = self.server.stub
        listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in stub.names]}
        self._whole(listed, {"no-models": 404, "key": 401}.get(stub.defect, 200))

    def _whole(self, answer, status=200):
        body = b"<html>" if self.server.stub.defect == "nonsense" else json.dumps(answer).encode()
        self._head(status, Content_Length=len(body))
        self.wfile.write(body)

    def do_POST(self):
        fields, defect = json.loads(self.rfile.read(int(self.headers["content-length"]))), self.server.stub.defect
        if not fields.get("stream"):
            refused = defect == "embeds"
            answer = {"error": "embeds only"} if refused else {"choices": [{"index": 0, "text": " t"}]}
            return self._whole(answer, 400 if refused else 200)
        self._head(Content_Type="text/event-stream", Transfer_Encoding="chunked")

        def send(event):
            data = f"data: {event if isinstance(event, str) else json.dumps(event)}\r\n\r\n".encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

        n = fields["max_tokens"]
        token = {
            "object": "text_completion",
            "model": fields["model"],
            "choices": [{"index": 0, "text": " t", "finish_reason": None}],
        }
        for i in range(n + (defect == "more")):
            time.sleep(STEP_S)
            send({**token, "model": "other"} if defect == "switches" and i > n // 2 else token)
            if defect == "error" and i:
                send({"error": {"message": "no slot is free"}})
            if defect == "cut" and i == n // 2:
                return
        send({**token, "choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        if self.server.stub.usage:
            many = -n if defect == "negative" else n
            used = {"prompt_tokens": len(fields["prompt"].split()), "completion_tokens": many, "total_tokens": 0}
            send({**token, "choices": [], "usage": used})
        if defect != "ends":
            send(DONE)
        if defect == "late":
            send(token)
        self.wfile.write(b"0\r\n\r\n")


class Attached(runner.Runner):
    """A runner that starts nothing. `clock` changes the times that it takes, as a broken clock would."""

    name = NAME

    def __init__(self, port, clock=lambda t: t):
        self.port, self.clock = port, clock

    def facts(self):
        return EngineFacts(build=None, version="an OpenAI-style server", server_sha256=None, runner=NAME)

    @contextmanager
    def start(self, job, session, work):
        yield Endpoint(self.port, self.clock)


class Endpoint(runner.Server):
    connection: httpx.Client

    def __init__(self, port, clock):
        self.port, self.clock = port, clock

    @contextmanager
    def serving(self, limit_s):
        with client.connect(self.port, "no key") as self.connection:
            self.connect()
            yield None

    def prompts(self, workloads, context):
        return [Prompt(w, w.text, None) for w in workloads]

    def connect(self):
        client.answer(self.connection, "GET", "/v1/models").raise_for_status()

    def ask(self, content, tokens):
        body = {"model": "m", "prompt": content, "max_tokens": tokens, "temperature": 0, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        sent, lines = client.stream(self.connection, "/v1/completions", body, tokens)
        return sent, [(self.clock(t), line) for t, line in lines]

    def read(self, lines, tokens):
        token_s, usage, finished = [], {}, False
        for t, event in client.events(lines):
            if event is None:
                finished = True
                continue
            usage = event.get("usage") or usage
            if any(choice["text"] for choice in event["choices"]):
                token_s.append(round(t, 6))
        return Answer(
            prompt_n=usage.get("prompt_tokens"),
            cache_n=None,
            predicted_n=usage.get("completion_tokens"),
            engine_prompt_s=None,
            engine_predicted_s=None,
            token_s=tuple(token_s),
            token_n=(),
            tokens=(),
            finished=finished,
        )
