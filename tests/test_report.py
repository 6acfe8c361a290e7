"""The report: one file, nothing from elsewhere, used in a real browser where there is one."""
import re
import shutil
from html.parser import HTMLParser

import pytest
from PIL import Image, ImageChops

import p2p
from p2p.show.leakage import leakage
from p2p.show.report import report

HOSTILE = 'a <script>document.title="owned"</script> cat & "dog" </p>'


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)


@pytest.fixture(scope="module")
def run(narrow):
    return p2p.edit(narrow, "a cat on grass", ["a dog on grass", "a cat on grass at night"], steps=4, record=p2p.Record(text=256))


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(report(run, [leakage(run, 1), leakage(run, 2)]), encoding="utf-8")
    return file


def test_nothing_comes_from_elsewhere(page):
    """Every address in the file is a picture inside it."""
    html = page.read_text()
    found = re.findall(r"""(?:src|href|action)\s*=\s*["']?([^"'\s>]+)""", html)
    assert found and all(a.startswith("data:image/png;base64,") for a in found)
    assert not re.search(r"https?:|@import|url\(|<link|<iframe", html) and "default-src 'none'" in html


def test_prompts_are_escaped(narrow):
    r = p2p.edit(narrow, HOSTILE, HOSTILE.replace("cat", "fox"), steps=1, record=p2p.Record(text=256))
    for html in (report(r), report(r, [leakage(r)])):
        parser = Tags()
        parser.feed(html)
        assert parser.seen.count("script") == 1 and 'document.title="owned"' not in html


def test_settings_timings_and_words_are_there(run, page):
    html = page.read_text()
    assert html.count("<figure>") == 2 and html.count('class="word"') == 4 + 4 + 4 + 6
    assert all(f"{name}<td>{seconds:.2f} s" in html for name, seconds in run.timings.items())
    assert "&quot;seed&quot;: 0" in html and "elsewhere" in html


def test_without_maps_there_are_no_words_to_hover(narrow):
    assert 'class="word"' not in report(p2p.edit(narrow, "a cat", "a dog", steps=1))


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs chromium and chromedriver")
def test_in_a_browser(page, tmp_path, monkeypatch):
    """The slider moves the edge between source and edit; a word shows its map while the mouse is on it."""
    from selenium import webdriver
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync", "--window-size=1100,900", f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.get(page.as_uri())
        stack, slider = browser.find_element(By.CSS_SELECTOR, ".stack"), browser.find_element(By.CSS_SELECTOR, "input[type=range]")

        def shot(name):
            stack.screenshot(str(tmp_path / name))
            return Image.open(tmp_path / name).convert("RGB")

        def shown():
            return browser.execute_script("return getComputedStyle(document.querySelector('.over')).clipPath")

        middle, at_first = shot("middle.png"), shown()
        ActionChains(browser).move_to_element_with_offset(slider, slider.size["width"] // 2 - 4, 0).click().perform()
        assert shown() != at_first and ImageChops.difference(middle, shot("source.png")).getbbox()
        word = browser.find_elements(By.CSS_SELECTOR, ".word")[1]
        assert word.text == "cat"
        before = shot("off.png")
        ActionChains(browser).move_to_element(word).pause(0.4).perform()
        assert browser.find_element(By.CSS_SELECTOR, ".map.on").get_attribute("data-map") == word.get_attribute("data-word")
        assert ImageChops.difference(before, shot("map.png")).getbbox()
        ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).pause(0.4).perform()
        assert not browser.find_elements(By.CSS_SELECTOR, ".map.on")
        assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []
    finally:
        browser.quit()
