"""Describing and timing a model behind a server, which here is a stand-in that streams as vLLM does."""

from __future__ import annotations

import base64
import csv
import io
import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from manifests.descriptions import Decoding
from manifests.errors import BadInputError, ConversionError
from tests.conftest import vlmconvert
from vlmconvert.measuring.describe import EndpointDescriber, described, import_answers, list_images
from vlmconvert.measuring.mindie import BATCHES, endpoint_row, local_row, protocol_csv, run_protocol
from vlmconvert.measuring.process import Repeat
from vlmconvert.running.endpoint import Endpoint


def endless(server):
    for _ in range(100):
        server.wfile.write(b"data: " + b"x" * 1_000_000)


# Fault -> what the server sends.
HOSTILE = {
    "number": lambda server: server._event(5),
    "list": lambda server: server._event({"choices": ["x"]}),
    "choices": lambda server: server._event({"choices": 7}),
    "usage": lambda server: server._event({"usage": "many"}),
    "count": lambda server: server._event({"usage": {"prompt_tokens": "1", "completion_tokens": None}}),
    "binary": lambda server: server.wfile.write(b"data: \xff\n"),
    "deep": lambda server: server.wfile.write(b"data: " + b"[" * 200_000 + b"\n"),
    "endless": endless,
    "nothing": lambda server: None,
}


class Server(BaseHTTPRequestHandler):
    """Answers with as many words as tokens are asked for; `requests` keeps the questions."""

    def log_message(self, *_arguments):
        pass

    def do_GET(self):
        self._send(json.dumps({"data": [{"id": "llava-w8a16"}]}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        if self.server.fault == "elsewhere":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.end_headers()
            return
        if self.server.fault == "refuse":
            self.send_error(400, "prompt too long")
            return
        self.send_response(200)
        self.end_headers()
        if self.server.fault == "stream":
            self._event({"error": {"message": "out of memory", "code": 500}})
            return
        if self.server.fault in HOSTILE:
            with suppress(ConnectionError):  # the client leaves
                HOSTILE[self.server.fault](self)
            return
        time.sleep(0.02)
        count = body["max_tokens"] if body.get("ignore_eos") and self.server.fault != "short" else 3
        for number in range(count):
            self._event({"choices": [{"delta": {"content": f"w{number} "}}]})
            time.sleep(0.002)
        if self.server.fault != "uncounted":
            usage = {"prompt_tokens": 580, "completion_tokens": count}
            self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, content):
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())
        self.wfile.flush()

    def _send(self, content):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server():
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    running.requests, running.fault = [], ""
    thread = threading.Thread(target=running.serve_forever, args=(0.02,))
    thread.start()
    running.url = f"http://127.0.0.1:{running.server_port}/v1"
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    return folder


def test_every_image_is_described_greedily(server, images):
    describer = EndpointDescriber(Endpoint(server.url))
    decoding = Decoding(prompt="Describe.", max_new_tokens=9)
    found = described(describer, list_images(images), decoding, images.parent / "partial")
    assert found.model == "llava-w8a16"
    assert [(item.image, item.text) for item in found.descriptions] == [(f"{n}.png", "w0 w1 w2") for n in range(3)]
    for number, body in enumerate(server.requests):
        assert (body["temperature"], body["max_tokens"], "ignore_eos" in body) == (0, 9, False)
        # Else vLLM takes these from the model's generation_config.json.
        penalties = [body[f"{name}_penalty"] for name in ("repetition", "presence", "frequency")]
        assert penalties == [1, 0, 0]
        picture, text = body["messages"][0]["content"]
        assert text == {"type": "text", "text": "Describe."}
        head, _, content = picture["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(content) == (images / f"{number}.png").read_bytes()


def test_a_run_that_broke_off_goes_on(server, images):
    decoding, partial = Decoding(prompt="Describe.", max_new_tokens=9), images.parent / "partial"
    describer = EndpointDescriber(Endpoint(server.url))

    def stop(name):
        if name == "1.png":
            server.fault = "refuse"

    with pytest.raises(ConversionError, match="refused the question"):
        described(describer, list_images(images), decoding, partial, step=stop)
    with partial.open("a") as stream:
        stream.write('{"image": "2.p')  # as a kill leaves it
    server.fault = ""
    server.requests.clear()
    found = described(describer, list_images(images), decoding, partial)
    assert len(server.requests) == 1
    assert [(item.image, item.text) for item in found.descriptions] == [(f"{n}.png", "w0 w1 w2") for n in range(3)]
    # An image that has changed, and other settings, are asked about again.
    Image.new("RGB", (8, 8), (9, 9, 9)).save(images / "0.png")
    described(describer, list_images(images), decoding, partial)
    assert len(server.requests) == 2
    described(describer, list_images(images), Decoding(prompt="What?", max_new_tokens=9), partial)
    assert len(server.requests) == 5


def test_the_throughput_protocol(server, images):
    endpoint = Endpoint(server.url, "llava-w8a16")
    paths, kept = list_images(images), []
    rows = run_protocol(
        lambda batch: endpoint_row(endpoint, "Describe.", paths[:batch], 12, 16),
        (1, 3),
        keep=lambda rows: kept.append(len(rows)),
    )
    assert kept == [1, 2]
    table = list(csv.DictReader(protocol_csv(rows).splitlines()))
    assert [row["batch"] for row in table] == ["1", "3"]
    assert len(server.requests) == 4
    assert all(body["ignore_eos"] and body["max_tokens"] == 16 for body in server.requests)
    for batch, row in zip((1, 3), table, strict=True):
        first, later, whole, rate = (
            float(row[name])
            for name in (
                "first_token_time(ms)",
                "non_first_token_time(ms)",
                "ResponseTime(ms)",
                "E2E Throughput Average(Tokens/s)",
            )
        )
        assert (row["input_len"], row["output_len"], row["embedding_len"]) == ("12", "16", "580")
        assert first >= 20
        assert 1.5 <= later <= (whole - first) / 10
        assert rate == pytest.approx(batch * 16 / whole * 1000, rel=1e-3)
    assert BATCHES == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)


def test_what_this_machine_measures_is_a_row_too():
    repeat = Repeat(vision_ms=3.0, first_token_ms=10.0, per_token_ms=2.0, tokens_per_s=50.0)
    row = local_row(repeat, batch=4, input_tokens=12, embedding_tokens=580, new_tokens=6)
    assert protocol_csv([row]).splitlines()[1] == "4,12,6,580,10.000,2.000,20.000,50.000"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("refuse", r"refused the question \(400: .*prompt too long"),
        ("short", "answered with 3 tokens instead of 16: use a server that supports ignore_eos"),
        ("uncounted", "does not report numbers of tokens"),
        ("stream", "broke off: out of memory"),
    ],
)
def test_what_a_server_does_wrong_is_said(server, images, fault, message):
    server.fault = fault
    with pytest.raises(ConversionError, match=message):
        endpoint_row(Endpoint(server.url, "llava"), "Describe.", [images / "0.png"], 12, 16)


@pytest.mark.parametrize("fault", [*HOSTILE, "elsewhere"])
def test_a_hostile_server_is_one_sentence(server, images, fault):
    server.fault = fault
    with pytest.raises(ConversionError, match=rf"{server.url} .*: \w+"):
        Endpoint(server.url, "llava").ask("Describe.", images / "0.png", 5)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "is not an address"),
        ("file:///etc/passwd", "is not an address"),
        ("http://127.0.0.1:9/v1", "running"),
    ],
)
def test_no_server_is_bad_input(url, message):
    with pytest.raises(BadInputError, match=message):
        Endpoint(url).served_model()


def test_mindies_answers_get_their_settings(images, tmp_path):
    answers = tmp_path / "predict_result.json"
    answers.write_text(json.dumps({f"/data/{n}.png": f" image {n} </s>" for n in range(3)}))
    decoding = Decoding(prompt="Describe.", max_new_tokens=9)
    found = import_answers(answers, list_images(images), "llava-w8a16", decoding, "</s>")
    assert [item.text for item in found.descriptions] == ["image 0", "image 1", "image 2"]
    assert found.decoding == decoding
    answers.write_text(json.dumps({"0.png": "a"}))
    with pytest.raises(BadInputError, match="does not describe 1.png"):
        import_answers(answers, list_images(images), "m", decoding)
    answers.write_text("[1]")
    with pytest.raises(BadInputError, match="is not a file with answers"):
        import_answers(answers, list_images(images), "m", decoding)


def test_an_image_that_cannot_be_read_is_named(server, images):
    (images / "gone.png").symlink_to("nowhere")
    with pytest.raises(BadInputError, match=r"gone\.png cannot be read \(No such file or directory\)"):
        Endpoint(server.url).ask("Describe.", images / "gone.png", 9)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="holds no images"):
        list_images(tmp_path)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    output = tmp_path_factory.mktemp("ascend") / "out"
    result = vlmconvert("llava", "--target", "ascend", "--no-validate", "-o", output)
    assert result.exit_code == 0, result.output
    return output


@pytest.mark.slow
def test_mindies_protocol_of_a_server_and_of_this_machine(server, artifact, tmp_path):
    options = ("--protocol", "mindie", "--batch", "1,2", "--new-tokens", "3")
    for name, more in (("there", ("--endpoint", server.url)), ("here", ("--warmup", "0"))):
        result = vlmconvert("bench", artifact, *options, *more, "--csv", tmp_path / name)
        assert result.exit_code == 0, result.output
    there, here = (list(csv.DictReader((tmp_path / name).open())) for name in ("there", "here"))
    assert [row["batch"] for row in there] == [row["batch"] for row in here] == ["1", "2"]
    assert {row["input_len"] for row in there} == {row["input_len"] for row in here}
    assert {row["embedding_len"] for row in there} == {"580"}
    assert all(int(row["embedding_len"]) > int(row["input_len"]) > 0 for row in here)
    assert all(float(row["E2E Throughput Average(Tokens/s)"]) > 0 for row in (*there, *here))
    # Warm-up and measurement of both batches, each request with a picture of its own, as large as the model takes.
    pictures = [body["messages"][0]["content"][0]["image_url"]["url"] for body in server.requests]
    assert len(set(pictures)) == len(pictures) == 2 * (1 + 2)
    picture = Image.open(io.BytesIO(base64.b64decode(pictures[0].partition(",")[2])))
    assert picture.size == (112, 112)


def test_rows_that_are_measured_are_kept(server, artifact, tmp_path):
    class Failing(Server):
        def do_POST(self):
            if len(self.server.requests) == 1:
                self.server.fault = "refuse"
            super().do_POST()

    server.RequestHandlerClass = Failing
    options = ("--protocol", "mindie", "--batch", "1,2", "--new-tokens", "3", "--warmup", "0", "--endpoint", server.url)
    result = vlmconvert("bench", artifact, *options, "--csv", tmp_path / "rows.csv")
    assert result.exit_code == 3, result.output
    assert [row["batch"] for row in csv.DictReader((tmp_path / "rows.csv").open())] == ["1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--endpoint", "http://localhost:1/v1"), "--endpoint needs --protocol mindie"),
        (("--protocol", "mindie", "--repeats", "3"), "--repeats does not go with --protocol mindie"),
        (("--protocol", "mindie", "--json", "x.json"), "--json does not go with --protocol mindie"),
        (("--protocol", "mindie", "--endpoint", "x", "--device", "GPU"), "--device does not go with --endpoint"),
    ],
)
def test_options_that_a_protocol_does_not_have(artifact, options, message):
    result = vlmconvert("bench", artifact, *options)
    assert result.exit_code == 2
    assert message in result.output
