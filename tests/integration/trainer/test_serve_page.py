"""The page in a headless browser: a video is chosen, its frames are shown, questions are asked and answered.

Needs a Chromium or Chrome on the path.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.corpora import training_corpus as corpus
from tests.helpers.servers.answering import answering, write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome on the path")
KEY = "a-key-of-this-test"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    for number, colour in enumerate(("red", "blue")):
        corpus.write_video(folder / f"v{number}.mp4", corpus.COLOURS[colour], 9, seed=number)
    (folder / "page.mp4").write_text("<!doctype html>")
    return write_run(folder)


def test_videos_are_chosen_and_asked_about(browser, run):
    folder = run.parent
    with answering(run, max_tokens=24) as server:
        page = browser.new_page(viewport={"width": 1000, "height": 900}, color_scheme="light")
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: faults.append(request.url) if server.url not in request.url else None)
        page.goto(server.url)
        page.get_by_text("toy", exact=True).wait_for()
        chooser = page.get_by_label("Choose videos or images")
        chooser.set_input_files([folder / "v0.mp4", folder / "v1.mp4"])
        strip = page.get_by_role("list", name="Frames of v1.mp4 that the model sees").get_by_role("listitem")
        strip.nth(5).wait_for()
        strips = page.locator(".strip")
        assert strips.count() == 2 and strip.count() in (4, 8)
        times = [text.removesuffix(" s") for text in strip.locator("span").all_text_contents()]
        assert times == sorted(times, key=float) and float(times[-1]) > 3
        page.get_by_label("Your question").fill("Which colour is it?")
        page.keyboard.press("Enter")
        answer = page.locator(".talk .answer:not(.growing)")
        answer.nth(0).wait_for()
        media = [
            {"type": "file", "file": {"file_id": file["id"]}} for file in server.client.get("/v1/files").json()["data"]
        ]
        first = {"role": "user", "content": [*media, {"type": "text", "text": "Which colour is it?"}]}
        body = {"model": "toy", "messages": [first]}
        wanted = server.client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        assert answer.nth(0).text_content() == wanted
        page.get_by_label("Your question").fill("And where?")
        page.get_by_role("button", name="Ask").click()
        answer.nth(1).wait_for()
        body["messages"] += [{"role": "assistant", "content": wanted}, {"role": "user", "content": "And where?"}]
        later = server.client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        assert answer.nth(1).text_content() == later
        page.get_by_role("button", name="Remove v0.mp4").click()
        assert strips.count() == 1 and not page.locator(".talk li").count()
        assert not faults
        chooser.set_input_files(folder / "page.mp4")
        page.get_by_text("is no known video format").or_(page.get_by_text("whatever its name says")).wait_for()
        assert strips.count() == 1, "the file is not kept"
        page.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 390), ("dark", 390), ("dark", 1000)])
def test_nothing_is_wider_than_the_screen(browser, run, scheme, width):
    with answering(run, api_key=KEY) as server:
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.goto(server.url)
        page.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        page.get_by_text("toy", exact=True).wait_for()
        page.get_by_label("Choose videos or images").set_input_files(run.parent / "v0.mp4")
        page.locator(".strip img").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        text, back = page.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        brightness = [sum(map(int, color.strip("rgb()").split(", "))) for color in (text, back)]
        assert abs(brightness[0] - brightness[1]) > 400 and (brightness[0] > brightness[1]) == (scheme == "dark")
        page.close()
