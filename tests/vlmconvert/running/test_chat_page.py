"""The page of `vlmconvert demo`, with chats that answer without a model; needs gradio, and Chromium to look at it."""

import json
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from PIL.Image import Image

from calibration.scenes import Split, draw_scene
from manifests.errors import BadInputError
from tests.browser import chromium, needs_chromium, show
from tests.conftest import vlmconvert
from vlmconvert.running.chat import Chat, ChatTimings

pytestmark = pytest.mark.slow


class FakeChat:
    """Answers with what it was asked; `go` holds back the second half of an answer."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.timings: ChatTimings | None = None
        self.turns: list[tuple[str, int]] = []
        self.go = threading.Event()
        self.go.set()

    def reset(self) -> None:
        self.turns = []

    def ask(self, prompt: str, images: Sequence[Image] = ()) -> Iterator[str]:
        if prompt == "refuse":
            raise BadInputError("this was refused")
        yield f"{self.name} "
        yield "begins, "
        self.go.wait(30)
        self.turns.append((prompt, len(images)))
        yield f"turn {len(self.turns)}, {len(images)} images: "
        yield f"{prompt} <b>&amp;"
        self.timings = ChatTimings(11.25 if images else 0.0, 24.5, 2.5, 400.0)


@pytest.fixture(scope="module")
def chats():
    return {"out-int4": FakeChat("left"), "out-fp16": FakeChat("right")}


@pytest.fixture(scope="module")
def address(chats):
    pytest.importorskip("gradio", reason="needs gradio: pip install 'vlmconvert[demo]'")
    from vlmconvert.running.chat_page import chat_page, serve

    page = chat_page(chats)
    yield serve(page, 0)
    page.close()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def page(driver, address, chats):
    driver.get_log("performance")
    show(driver, address, 1280, "light")
    wait(driver, lambda: driver.find_elements("css selector", "textarea:enabled"))
    wait(driver, lambda: not texts(driver)[0].count("turn"))
    return driver


def wait(driver, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, 20, 0.05, ignored_exceptions=Exception).until(lambda _driver: condition())


def texts(driver) -> list[str]:
    return [element.text for element in driver.find_elements("css selector", ".window")]


def ask(driver, question: str) -> None:
    from selenium.webdriver.common.keys import Keys

    wait(driver, lambda: driver.find_elements("css selector", "textarea:enabled"))
    box = driver.find_element("css selector", "textarea")
    box.send_keys(question + Keys.ENTER)


@needs_chromium
def test_answers_stream_and_stand_side_by_side(page, chats):
    chats["out-int4"].go.clear()
    ask(page, "What is this?")
    wait(page, lambda: "left begins," in texts(page)[0])
    assert "What is this?" in texts(page)[1]
    assert "right" not in texts(page)[1], "one answers after the other"
    assert not page.find_elements("css selector", "textarea:enabled")
    chats["out-int4"].go.set()
    wait(page, lambda: "right begins, turn 1, 0 images: What is this? <b>&amp;" in texts(page)[1])
    assert "left begins, turn 1, 0 images: What is this? <b>&amp;" in texts(page)[0]
    left, right = (element.rect for element in page.find_elements("css selector", ".window"))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]
    wait(page, lambda: "24.5 ms" in page.find_elements("css selector", ".clock")[-1].text)
    clock = page.find_element("css selector", ".clock").text
    assert clock == "first token 24.5 ms · then 2.5 ms/token · 400.0 tokens/s"


@needs_chromium
def test_turns_go_on_until_a_new_conversation(page, chats):
    ask(page, "one")
    wait(page, lambda: "turn 1, 0 images: one" in texts(page)[1])
    ask(page, "two")
    wait(page, lambda: "turn 2, 0 images: two" in texts(page)[1])
    assert "turn 1, 0 images: one" in texts(page)[1]
    wait(page, lambda: page.find_elements("css selector", "textarea:enabled"))
    next(button for button in page.find_elements("css selector", "button") if button.text == "New conversation").click()
    wait(page, lambda: "turn" not in texts(page)[0])
    assert chats["out-int4"].turns == []


@needs_chromium
def test_an_example_brings_its_image(page, chats):
    wait(page, lambda: page.find_elements("css selector", "button.gallery-item"))[0].click()
    wait(page, lambda: page.find_element("css selector", "textarea").get_attribute("value"))
    ask(page, "")
    wait(page, lambda: "1 images:" in texts(page)[1])
    assert [count for _prompt, count in chats["out-fp16"].turns] == [1]
    wait(page, lambda: "vision encoder 11.2 ms" in page.find_element("css selector", ".clock").text)


@needs_chromium
def test_what_a_chat_refuses_is_said_and_the_page_goes_on(page):
    ask(page, "refuse")
    wait(page, lambda: "this was refused" in page.find_element("css selector", "body").text)
    ask(page, "again")
    wait(page, lambda: "images: again" in texts(page)[1])


@needs_chromium
@pytest.mark.parametrize("width", [1280, 375])
def test_page_fits_and_asks_no_other_host(page, address, width):
    show(page, address, width, "dark")
    wait(page, lambda: page.find_elements("css selector", "textarea:enabled"))
    assert page.execute_script("return document.scrollingElement.scrollWidth <= innerWidth")
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    requested = {
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    }
    assert requested
    assert not [url for url in requested if not url.startswith((address, "data:", "blob:", "chrome:"))]


@needs_chromium
def test_two_artifacts_answer_about_a_drawn_scene(driver, address, build):
    """The whole way: artifacts, their processors, the page, the browser."""
    from vlmconvert.running.chat_page import chat_page, serve

    chats = {llm: Chat(build("--llm", llm, "--vision", "fp32")) for llm in ("fp32", "int4")}
    page = chat_page(chats)
    show(driver, serve(page, 0), 1280, "light")
    wait(driver, lambda: driver.find_elements("css selector", "button.gallery-item"))[0].click()
    wait(driver, lambda: driver.find_element("css selector", "textarea").get_attribute("value"))
    ask(driver, "")
    question = draw_scene(Split.TEST, 0).questions[0]
    for index in range(2):
        wait(driver, lambda index=index: texts(driver)[index].rstrip().endswith(question.answer))
    wait(driver, lambda: "tokens/s" in driver.find_elements("css selector", ".clock")[-1].text)
    page.close()


def test_page_is_served_to_this_machine_alone(address):
    assert address.startswith("http://127.0.0.1:")


def test_only_this_machines_names_lead_to_it(address):
    for host, status in ((None, 200), ("localhost", 200), ("rebound.example", 400)):
        headers = {} if host is None else {"Host": host}
        assert httpx.get(address, headers=headers).status_code == status


def upload(address: str, name: str, data: bytes) -> httpx.Response:
    return httpx.post(f"{address}gradio_api/upload", files={"files": (name, data, "image/png")}, timeout=60)


def test_uploads_are_bounded_and_stay_in_their_place(address):
    from gradio.utils import get_upload_folder

    assert upload(address, "large.png", bytes(26 * 2**20)).status_code == 413
    for name in (
        "../../../../evil.png",
        "/tmp/evil.png",
        "..\\..\\evil.png",
        "a" * 300 + ".png",
        "<img src=x>.png",
        "\u202egnp.exe",
    ):
        (path,) = upload(address, name, b"data").json()
        assert Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()), name
        assert Path(path).read_bytes() == b"data"


@pytest.mark.parametrize("path", ["/etc/passwd", "pyproject.toml", "/proc/self/environ", "..%2f..%2fetc/passwd"])
def test_no_other_file_is_served(address, path):
    assert httpx.get(f"{address}gradio_api/file={path}").status_code in (403, 404)


@pytest.mark.parametrize(
    ("text", "files", "why"),
    [
        ("What is it?", ["/etc/passwd"], ""),
        ("What is it?", [str(Path(__file__))], ""),
        ("x" * 20_001, [], "at most 20000 characters"),
        ("", [], "Type a question"),
    ],
)
def test_what_a_visitor_may_not_send_is_refused(address, chats, text, files, why):
    """As a program would send it, which no page holds back."""
    config = httpx.get(f"{address}config").json()
    (number,) = [
        item["id"] for item in config["dependencies"] if any(target[1] == "submit" for target in item["targets"])
    ]
    for chat in chats.values():
        chat.reset()
    message = {"text": text, "files": [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in files]}
    body = {"data": [message, [], []], "fn_index": number, "session_hash": "visitor"}
    assert httpx.post(f"{address}gradio_api/queue/join", json=body).status_code == 200
    with httpx.stream("GET", f"{address}gradio_api/queue/data?session_hash=visitor", timeout=30) as stream:
        events = [json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line.startswith("data: ")]
    ended = next(event for event in events if event["msg"] == "process_completed")
    assert not ended["success"]
    assert why in str(ended["output"].get("error"))
    assert [chat.turns for chat in chats.values()] == [[], []]


@needs_chromium
def test_a_file_name_and_a_question_of_markup_are_shown_as_text(page, tmp_path):
    draw_scene(Split.TEST, 0).image.save(tmp_path / "<img src=x onerror=document.title='name'>.png")
    (image,) = tmp_path.iterdir()
    page.find_element("css selector", "input[type=file]").send_keys(str(image))
    ask(page, "<img src=x onerror=document.title='prompt'><script>document.title='script'</script>")
    wait(page, lambda: "1 images: <img src=x onerror" in texts(page)[1])
    assert page.title == "out-int4 | out-fp16"


def test_missing_gradio_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = vlmconvert("demo", tmp_path)
    assert result.exit_code == 2, result.output
    assert "pip install 'vlmconvert[demo]'" in result.output


def test_bad_input_is_one_sentence(address, tmp_path):
    for arguments, message in (
        ((tmp_path,), "holds no manifest.json"),
        ((tmp_path, tmp_path), "is given twice"),
        ((tmp_path, "--port", "-1"), "too small"),
    ):
        result = vlmconvert("demo", *arguments)
        assert result.exit_code == 2, result.output
        assert message in result.output.replace("\n", " ")


def test_taken_port_is_one_sentence(address):
    from vlmconvert.running.chat_page import chat_page, serve

    port = int(address.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(BadInputError, match="give another port with --port"):
        serve(chat_page({"one": FakeChat("one")}), port)


def test_help_has_examples():
    result = vlmconvert("demo", "--help")
    assert result.exit_code == 0
    assert "vlmconvert demo out-fp16 out-int4-awq" in result.output
