"""The report: one file, nothing from elsewhere, used in a real browser where there is one."""
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image, ImageChops

import p2p
from p2p.cli.parser import main
from p2p.image import from_base64
from p2p.show.leakage import leakage
from p2p.show.pictures import ACCENT
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


@pytest.mark.slow
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
    assert re.sub("<span[^>]*>|</span>", "", html).count("<del>cat</del> on grass") == 1 and "point at one, or tap it" in html
    assert all(f"<summary>{what}</summary>" in html for what in ("Timings", "Settings"))   # folded away
    assert all(f"{name}<td>{seconds:.2f} s" in html for name, seconds in run.timings.items())
    assert "&quot;seed&quot;: 0" in html and "elsewhere" in html


@pytest.mark.parametrize("target, source, edit", [
    ("a dog on grass", "a <del>cat</del> on grass", "a <ins>dog</ins> on grass"), ("a cat", "a cat <del>on</del> <del>grass</del>", "a cat"),
    ("a cat on <b> grass", "a cat on grass", "a cat on <ins>&lt;b&gt;</ins> grass")])
def test_words_that_differ_are_marked(narrow, target, source, edit):
    html = report(p2p.edit(narrow, "a cat on grass", target, steps=1))
    assert f"</span> {source}</p>" in html and f"</span> {edit}</p>" in html
    assert 'class="word"' not in html and "point at one" not in html   # without maps there is nothing to hover


def test_edits_of_one_prompt_are_told_apart(narrow):
    page = report(p2p.edit(narrow, "a cat", [p2p.Edit("a cat", equalizer={"cat": c}) for c in (0.5, 2.0)], steps=1))
    assert page.count("cat \u00d7 0.5") == page.count("cat \u00d7 2") == 1


def test_maps_of_pixels_alone_are_no_maps_of_words(narrow):
    page = report(p2p.edit(narrow, "a cat on grass", "a dog on grass", steps=1, record=p2p.Record(text=0, pixels=256)))
    assert "Dotted words" not in page and "hover" not in page.split("<h1>")[1].split("<script>")[0]


def test_where_a_local_edit_may_change_the_picture_is_shown(narrow):
    mask = torch.zeros(16, 16)
    mask[:, :8] = 1
    run = p2p.edit(narrow, "a cat", ["a dog", p2p.Edit("a dog", local_blend=p2p.LocalBlend(mask=mask))], steps=1)
    html = report(run)
    assert html.count("where it may change") == 1 and html.count('data-map="2-mask"') == html.count('data-word="2-mask"') == 1
    shown = from_base64(re.search(r'data-map="2-mask" alt="" src="data:image/png;base64,([^"]+)"', html)[1]).convert("RGB")
    assert shown.getpixel((0, 0)) == ACCENT and shown.getpixel((shown.width - 1, 0)) == (0, 0, 0)


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
    for flag in ("--headless", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
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
        browser.find_elements(By.CSS_SELECTOR, "summary")[1].click()
        assert browser.find_element(By.CSS_SELECTOR, "pre").is_displayed()
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True})
        assert browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [360, 360]
        browser.save_screenshot(str(tmp_path / "phone.png"))
        assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []
    finally:
        browser.quit()


def test_a_map_is_of_the_word_that_it_is_shown_at(narrow):
    """Words without tokens have no map, nor have those that the text tower cuts off."""
    odd, long = "a \u0345 cat on grass", " ".join(["a cat"] * 60)
    r = p2p.edit(narrow, odd, long, steps=1, record=p2p.Record(text=256))
    html = report(r)
    for row, prompt in enumerate((odd, long)):
        found = re.findall(rf'<span class="word" tabindex="0" data-word="{row}-(\d+)">([^<]*)</span>', html)
        names = [name.partition("#")[0] for name, _ in r.maps.each_word(row)]
        assert [word for _, word in found] == names and all(prompt.split()[int(place)] == word for place, word in found)
        assert re.findall(rf'data-map="{row}-(\d+)"', html) == [place for place, _ in found]


@pytest.mark.slow
@pytest.mark.usefixtures("once")
def test_enlarged_pictures_are_those_of_the_report(tmp_path, capsys):
    argv = ["edit", "a cat on grass", "a dog on grass", "--steps", "1", "--upscale", "--upscale-steps", "1", "--report", "-o", str(tmp_path)]
    assert main([*argv, "--device", "cpu"]) == 0
    page = next(tmp_path.rglob("report.html")).read_text(encoding="utf-8")
    source, edit = (from_base64(found) for found in re.findall(r'class="(?:under|over)" alt="\w+" src="data:image/png;base64,([^"]+)"', page))
    assert source.size == edit.size == (256, 256) and "--ratio: 256 / 256" in page and '"upscale": {' in page.replace("&quot;", '"')
