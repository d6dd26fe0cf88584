"""The page as a person sees it; needs Chromium."""

import io
import json

import pytest
from PIL import Image

from tests.browser import chromium, needs_chromium, show
from tests.conftest import vlmconvert

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def url(artifacts, tmp_path_factory) -> str:
    output = tmp_path_factory.mktemp("page") / "report.html"
    assert vlmconvert("report", *artifacts, "-o", output).exit_code == 0
    return output.as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_page_fits_the_window_in_both_schemes(driver, url, width, scheme):
    show(driver, url, width, scheme)
    widest, inner = driver.execute_script("return [document.scrollingElement.scrollWidth, innerWidth]")
    assert inner == width
    assert widest <= inner
    image = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("L")
    colours = image.getcolors()
    assert colours is not None
    assert len(colours) > 50, "the page is blank"
    ground = max(colours)[1]
    assert ground > 200 if scheme == "light" else ground < 60


def test_opened_details_fit_a_phone(driver, url):
    show(driver, url, 375, "light")
    driver.execute_script("document.querySelectorAll('details').forEach(item => item.open = true)")
    assert driver.execute_script("return document.scrollingElement.scrollWidth <= innerWidth")


def test_pictures_are_seen_and_nothing_is_requested(driver, url):
    driver.get_log("performance")
    show(driver, url, 1280, "light")
    broken = driver.execute_script("return [...document.images].filter(image => !image.naturalWidth).length")
    assert broken == 0
    assert driver.execute_script("return document.images.length") == 8
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    requested = {
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    }
    assert {address for address in requested if not address.startswith("data:")} == {url}


def test_text_of_the_chart_stays_readable_on_a_phone(driver, url):
    show(driver, url, 375, "light")
    sizes = driver.execute_script(
        "return [...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height)"
        ".filter(height => height)"  # a label without a number is left out there
    )
    assert sizes
    assert min(sizes) >= 12
