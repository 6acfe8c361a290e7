"""The page in a real browser, where there is one, and requests that no page sends."""
import json
import os
import shutil
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright
from web_page import CAT, DOG, png, url, values

import p2p
from p2p.errors import NumericsError
from p2p.show.pictures import read_settings

pytestmark = pytest.mark.slow
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium")
OVER = """() => [...document.querySelectorAll('.gradio-container *')].filter(e => {
  const box = e.getBoundingClientRect(); return box.width && box.right > innerWidth + 1 &&
  getComputedStyle(e).visibility !== 'hidden'; }).map(e => e.tagName + '.' + e.className + ' to ' + e.getBoundingClientRect().right)"""


@pytest.fixture(scope="module")
def site(narrow):
    from p2p.web.serve import served

    with served(narrow) as blocks:
        yield blocks


@pytest.fixture(scope="module")
def calls(site):
    return site.fns[0].fn.__self__


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-dev-shm-usage"], timeout=120_000)
        yield browser
        browser.close()


def opened(chromium, site, width=1280, height=900):
    tab = chromium.new_page(viewport={"width": width, "height": height}, accept_downloads=True)
    tab.set_default_timeout(120_000)
    tab.faults, tab.asked = [], []
    tab.on("request", lambda request: tab.asked.append(request.url))
    tab.on("pageerror", lambda error: tab.faults.append(str(error)))
    tab.on("response", lambda answer: answer.status >= 400 and tab.faults.append(f"{answer.status} {answer.url}"))
    tab.goto(site.local_url)
    tab.wait_for_selector("#stage .said")
    return tab


def finished(tab):
    """Waits for the picture, without asking at every frame, which takes the time of what is computed."""
    tab.wait_for_function("document.querySelector('#stage .said').textContent.startsWith('done')", polling=100)


def done(tab, act):
    """Acts, and waits for the picture."""
    tab.evaluate("document.querySelector('#stage .said').textContent = 'waiting'")
    act()
    finished(tab)
    return tab.get_attribute("#stage .over", "src")


def first_edit(tab, steps="4"):
    tab.get_by_role("button", name="windows and sampling").click()
    tab.fill("#steps input[type=number]", steps)
    with tab.expect_response(lambda answer: "queue/join" in answer.url):   # a move before there is a prompt: nothing
        tab.locator("#steps input[type=number]").blur()
    tab.fill("#source textarea", CAT)
    tab.fill("#target textarea", DOG)
    return done(tab, lambda: tab.click("#run"))


@needs_browser
def test_the_seven_acts(chromium, site, calls, tmp_path):
    """Type, fade, upload, paint, download, replay; at phone width below."""
    tab = opened(chromium, site)
    typed = first_edit(tab)
    session = list(calls.visits.sessions.values())[-1]
    assert tab.locator(".fader .word span").all_inner_texts() == DOG.split() and typed.startswith("data:image/png")

    tab.locator(".fader .word").nth(2).hover()
    tab.wait_for_selector("#stage .stack.lit")
    assert tab.get_attribute("#stage .map", "src").startswith("data:image/png")
    tab.fill("#stage .at", "90")
    assert "90%" in tab.evaluate("getComputedStyle(document.querySelector('#stage .over')).clipPath")

    faded = done(tab, lambda: tab.locator(".fader input").nth(1).fill("3"))
    assert faded != typed and session.gallery[-1].asked.weights == (("red", 3.0),)

    tab.click("#stage .paint")
    box = tab.locator("#stage canvas").bounding_box()

    def paint():
        tab.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.2)
        tab.mouse.down()
        tab.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.2, steps=4)
        tab.mouse.up()
    assert done(tab, paint) != faded
    now, before = np.asarray(session.gallery[-1].image), np.asarray(session.sources.of(session.gallery[-1].asked, None).picture)
    assert (now[:16] != before[:16]).any() and (now[32:] == before[32:]).all()

    tab.locator("#gallery .thumbnail-item, #gallery .thumbnail-lg").first.click()
    tab.get_by_role("button", name="settings").click()
    tab.wait_for_selector("#settings .cm-line >> text=command")   # the file comes with the settings
    with tab.expect_download() as download:
        tab.click("#download")
    download.value.save_as(tmp_path / "down.png")
    with Image.open(tmp_path / "down.png") as picture:
        assert read_settings(tmp_path / "down.png")["targets"][0]["prompt"] == DOG
        assert (np.asarray(picture) == np.asarray(session.gallery[0].image)).all()

    assert done(tab, lambda: tab.click("#replay")) == typed
    assert tab.locator(".fader output").nth(1).inner_text() == "1.0" and tab.is_hidden("#stage .clear")

    tab.get_by_role("button", name="a picture of your own").click()
    Image.new("RGB", (300, 200), "orange").save(tmp_path / "own.png")
    tab.set_input_files("#upload input", tmp_path / "own.png")
    tab.wait_for_function("document.querySelector('#stage .said').textContent === 'your picture'")
    assert tab.inner_text("#upload .said") == "own.png" and tab.is_visible("#upload .forget")
    own = done(tab, lambda: tab.click("#run"))
    assert own != typed and session.gallery[-1].settings["inversion"]["method"] == "edit-friendly"
    done(tab, lambda: tab.click("#replay"))   # a generated one, which forgets the picture
    assert tab.inner_text("#upload .said") == "" and tab.is_hidden("#upload .forget") and session.picture is None
    assert tab.faults == [] and all(address.startswith((site.local_url, "data:", "blob:")) for address in tab.asked)
    tab.close()


@needs_browser
@pytest.mark.parametrize("width, height", [(390, 844), (1280, 900)])
def test_nothing_overflows(chromium, site, width, height):
    tab = opened(chromium, site, width, height)
    tab.get_by_role("button", name="where the picture").click()
    tab.get_by_role("button", name="a picture of your own").click()
    first_edit(tab)
    tab.locator("#gallery .thumbnail-item, #gallery .thumbnail-lg").first.click()
    tab.get_by_role("button", name="settings").click()
    tab.wait_for_selector("#settings .cm-line")
    assert tab.evaluate(OVER) == [] and tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator(".toast-body").count() == 0   # the number of steps was set before there was a prompt
    if shots := os.environ.get("P2P_SHOTS"):
        tab.screenshot(path=f"{shots}/web-{width}.png", full_page=True)
    tab.close()


@needs_browser
def test_moves_replace_each_other(chromium, site, calls):
    """Of many moves the last is computed, and what was begun for others is not finished."""
    tab = opened(chromium, site)
    first_edit(tab, "20")
    session = list(calls.visits.sessions.values())[-1]
    fader = tab.locator(".fader input").nth(1)
    for weight in ("1.5", "2", "2.5", "3"):
        fader.fill(weight)
        tab.wait_for_timeout(300)
    finished(tab)
    for _ in range(300):
        if session.gallery[-1].asked.weights == (("red", 3.0),):
            break
        tab.wait_for_timeout(200)
    assert session.gallery[-1].asked.weights == (("red", 3.0),) and len(session.gallery) < 5
    assert tab.faults == []
    tab.close()


@needs_browser
def test_sliders_move_by_keys_and_long_names_keep_whole_letters(chromium, site, calls, tmp_path):
    tab = opened(chromium, site)
    tab.click("#download")
    tab.wait_for_selector("text=choose a picture of this visit first")
    first_edit(tab, "2")
    session = list(calls.visits.sessions.values())[-1]
    tab.focus("#guidance input[type=range]")
    done(tab, lambda: tab.keyboard.press("ArrowRight"))
    assert session.gallery[-1].asked.guidance == session.gallery[0].asked.guidance + 0.5
    name = "x" * 199 + "\U0001f408"
    Image.new("RGB", (64, 64), "orange").save(tmp_path / f"{name}.png")
    tab.get_by_role("button", name="a picture of your own").click()
    tab.set_input_files("#upload input", tmp_path / f"{name}.png")
    tab.wait_for_function("document.querySelector('#stage .said').textContent === 'your picture'")
    assert tab.inner_text("#upload .said") == name
    done(tab, lambda: tab.click("#run"))
    assert session.gallery[-1].asked.photo == name and tab.faults == []
    tab.close()


def until(tab, true):
    for _ in range(300):
        if true():
            return True
        tab.wait_for_timeout(200)
    return False


@needs_browser
def test_a_fader_that_is_moved_while_its_words_are_not_yet_shown_stays_moved(chromium, site, calls):
    tab = opened(chromium, site)
    first_edit(tab, "20")
    session = list(calls.visits.sessions.values())[-1]
    for box, words in (("source", CAT), ("target", DOG)):
        tab.fill(f"#{box} textarea", words.replace(" on", " next to a house on"))
    tab.click("#run")
    tab.wait_for_timeout(300)   # its source is computed
    tab.locator(".fader input").nth(1).fill("3")
    assert until(tab, lambda: session.gallery[-1].asked.weights == (("red", 3.0),))
    finished(tab)
    assert len(session.gallery) == 2 and tab.locator(".fader").count() == 9
    assert tab.locator(".fader input").nth(1).input_value() == "3" and tab.locator(".fader output").nth(1).inner_text() == "3.0"
    tab.locator(".fader input").nth(8).fill("2")
    assert until(tab, lambda: dict(session.gallery[-1].asked.weights) == {"red": 3.0, "grass": 2.0})
    assert tab.faults == []
    tab.close()


@needs_browser
def test_a_run_gives_way_to_a_move_and_half_typed_words_stop_nothing(chromium, site, calls):
    tab = opened(chromium, site)
    first_edit(tab, "60")
    session = list(calls.visits.sessions.values())[-1]
    tab.fill("#seed input, #seed textarea", "7")
    tab.click("#run")
    tab.wait_for_function("document.querySelector('#stage .said').textContent === 'the edit is coming'")
    assert tab.is_hidden("#stage .over")   # it is of another source
    tab.locator(".fader input").nth(1).fill("3")
    tab.wait_for_timeout(400)
    tab.fill("#target textarea", DOG + "x")   # without Enter
    assert until(tab, lambda: session.gallery[-1].asked.weights == (("red", 3.0),))
    assert len(session.gallery) == 2   # what was begun by the button was not finished
    finished(tab)
    assert tab.faults == []
    tab.close()


@needs_browser
def test_a_move_that_waits_for_one_that_is_refused_is_made(chromium, site, calls):
    tab = opened(chromium, site)
    first_edit(tab)
    session = list(calls.visits.sessions.values())[-1]
    tab.get_by_role("button", name="where the picture").click()
    with ThreadPoolExecutor(1) as pool:   # another visit has the model meanwhile
        other = pool.submit(answer, site, dict(target=DOG, steps=40), name="longer")
        assert until(tab, lambda: "longer" in calls.visits.sessions)
        for word in ("unicorn", "dog"):
            tab.fill("#blend textarea, #blend input", word)
            tab.press("#blend textarea, #blend input", "Enter")
            tab.wait_for_timeout(300)
        tab.get_by_text("unicorn").first.wait_for()
        assert other.result()["success"]
    assert until(tab, lambda: session.gallery[-1].asked.blend == "dog")
    tab.close()


@needs_browser
def test_what_is_typed_while_a_picture_is_replayed_stays(chromium, site):
    tab = opened(chromium, site)
    first_edit(tab, "60")
    tab.locator("#gallery .thumbnail-item, #gallery .thumbnail-lg").first.click()
    tab.wait_for_timeout(500)

    def act():
        tab.click("#replay")
        tab.wait_for_function("document.querySelector('#stage .said').textContent === 'the edit is coming'")
        assert tab.is_visible("#stage .over")   # the last edit of this source, till there is another
        tab.fill("#target textarea", "a bird")
    done(tab, act)
    tab.wait_for_timeout(500)
    assert tab.input_value("#target textarea") == "a bird"
    tab.close()


@needs_browser
def test_refusals_are_messages_on_the_page(chromium, site, tmp_path):
    tab = opened(chromium, site)
    tab.click("#run")
    tab.get_by_text("type what the picture should show").wait_for()
    tab.evaluate("document.querySelectorAll('.toast-close').forEach(x => x.click())")
    tab.fill("#source textarea", "a cat " * 400)
    tab.click("#run")
    tab.get_by_text("this page takes 2,000").wait_for()
    tab.get_by_role("button", name="a picture of your own").click()
    (tmp_path / "text.png").write_text("no picture")
    tab.set_input_files("#upload input", tmp_path / "text.png")
    tab.get_by_text("the uploaded file cannot be read").wait_for()
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(21 * 2**20)
    tab.set_input_files("#upload input", tmp_path / "large.png")
    tab.get_by_text("is larger than 20 MiB").wait_for()
    tab.click("#replay")
    tab.get_by_text("choose a picture of this visit first").wait_for()
    tab.close()


@needs_browser
def test_a_run_that_fails_midway_leaves_the_last_picture(chromium, site, monkeypatch):
    tab = opened(chromium, site)
    first_edit(tab, "2")

    def fails(*_):
        raise NumericsError("sampling step 1 gave values that are not finite")
        yield
    monkeypatch.setattr("p2p.web.session.stepped", fails)
    tab.locator(".fader input").nth(1).fill("3")
    tab.get_by_text("values that are not finite").wait_for()
    tab.wait_for_function("document.querySelector('#stage .said').textContent === 'no picture was made'")   # after the message
    assert tab.is_visible("#stage .over") and not tab.locator("#stage .stack.preview").count()
    tab.close()


@needs_browser
def test_a_tab_that_closes_mid_run_leaves_a_server_that_works(chromium, site, calls):
    tab = opened(chromium, site)
    tab.get_by_role("button", name="windows and sampling").click()
    tab.fill("#steps input[type=number]", "100")
    tab.fill("#source textarea", CAT)
    tab.fill("#target textarea", DOG)
    tab.click("#run")
    tab.wait_for_timeout(500)
    tab.close()
    assert answer(site, dict(steps=1))["success"]


def answer(site, moved, call="run", data=None, name="test"):
    """What the server says to a request of anybody's making; a message on the page is an error too."""
    number = next(i for i, fn in site.fns.items() if fn.name == call)
    body = json.dumps({"data": values(moved) if data is None else data, "fn_index": number, "session_hash": name}).encode()
    base = site.local_url + "gradio_api/queue/"
    request = urllib.request.Request(base + "join", body, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(request, timeout=120).read()
    except urllib.error.HTTPError as refusal:
        return {"success": False, "error": str(refusal)}
    said = None
    with opener.open(f"{base}data?session_hash={name}", timeout=300) as events:
        for event in (json.loads(line[5:]) for line in events if line.startswith(b"data:")):
            said = event["log"] if event["msg"] == "log" else said
            if event["msg"] == "process_completed":
                error = said or (event.get("output") or {}).get("error")
                return event | {"success": event["success"] and said is None, "error": str(error)}


NAN = float("nan")
HOSTILE = [dict(source="a" * 10**6), dict(source=""), dict(cross=NAN), dict(self_=float("inf")), dict(guidance=-1), dict(steps=10**9),
           dict(steps="many"), dict(seed="-1e9"), dict(seed={"path": "/etc/passwd"}), dict(layers="up"), dict(blend="unicorn", target=DOG),
           dict(hand=5), dict(hand={"mask": "/etc/passwd"}, target=DOG), dict(method="nothing"), dict(usual=None), dict(target="(" * 1999),
           dict(cross="a lot"),
           dict(hand={"path": "http://127.0.0.1:1/x.png", "meta": {"_type": "gradio.FileData"}}),
           dict(hand={"weights": {"cat": NAN}}), dict(target="[cat:dog:0.4]"), dict(source="\x00" * 2001)]


def test_hostile_values_are_refused_and_the_server_lives(site):
    for moved in HOSTILE:
        said = answer(site, moved)
        assert not said["success"] and said["error"] not in ("None", "") and len(said["error"]) < 700, (moved, said)
    assert answer(site, dict(steps=1))["success"]


def test_hostile_uploads_are_refused_and_the_server_lives(site):
    for value in (url(b"text"), url(b"<svg/>", "svg+xml"), "/etc/passwd", "http://127.0.0.1:1/x.png", {"path": "/etc/passwd"},
                  {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, None, 7):
        said = answer(site, {}, "upload", [value])
        assert not said["success"] and "root:" not in str(said), value
    assert answer(site, {}, "upload", [url(png(Image.new("L", (5000, 4000))))])["success"]   # 20 megapixels
    assert answer(site, {}, data=[])["success"] is False and answer(site, {}, data=[1] * 99)["success"] is False
    assert answer(site, dict(steps=1), name="other")["success"]


def test_requests_are_bounded_and_no_files_are_taken_or_given(site, calls):
    at = urlsplit(site.local_url)
    assert at.hostname == "127.0.0.1" and site.share_url is None and site.config["analytics_enabled"] is False

    def status(method, path, body=None, headers=()):
        connection = HTTPConnection(at.hostname, at.port, timeout=60)
        connection.request(method, path, body, dict(headers))
        code = connection.getresponse().status
        connection.close()
        return code
    assert status("POST", "/gradio_api/upload", b"x", {"Content-Type": "multipart/form-data; boundary=b"}) == 403
    assert status("POST", "/gradio_api/queue/join", None, {"Content-Length": str(10**12)}) == 413
    assert status("POST", "/gradio_api/queue/join", b"x", {"Content-Length": "many"}) in (400, 413)
    answer(site, dict(target=DOG, steps=1), name="visit")
    session = calls.visits.sessions["visit"]
    own = session.download(session.choose(0))   # of one visit, as long as it lasts
    for path in ("/etc/passwd", os.path.abspath("setup.cfg"), "../../setup.cfg", own, "http://127.0.0.1:1/x.png"):
        for route in ("file=", "file/", "file%2F"):
            assert status("GET", f"/gradio_api/{route}{path}") in (403, 404)
    assert status("POST", "/gradio_api/queue/join", iter([b"x" * 2**20] * 48), {"Content-Type": "application/json"}) >= 400
    assert status("GET", "/") == 200


def test_a_model_without_text_is_refused():
    from p2p.errors import UsageError
    from p2p.web.serve import served

    with pytest.raises(UsageError, match="reads no text"):
        with served(p2p.load("emoji-upscaler")):
            pass


def test_a_taken_port_is_said(site, narrow):
    from p2p.errors import UsageError
    from p2p.web.serve import served

    with pytest.raises(UsageError, match="cannot listen there"):
        with served(narrow, port=site.server_port):
            pass


