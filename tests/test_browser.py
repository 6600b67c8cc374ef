"""The HTML report in a real browser: rendered, clicked through, used with the keyboard, without network."""

import base64
import dataclasses
import io
import shutil

import numpy as np
import pytest
from PIL import Image
from scored_rows import Scored
from toy_rows import toy_row, toy_study

from harness.html_report import render_page
from harness.tables import cell_colour

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: make .venv/.installed-dev")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="needs a browser: apt-get install -y chromium chromium-driver"
    ),
]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1200,900",
)  # fmt: skip


def webp(colour, mode="RGB"):
    packed = io.BytesIO()
    Image.new(mode, (16, 16), colour).save(packed, "webp", lossless=True)
    return base64.b64encode(packed.getvalue()).decode()


def make_page(folder):
    """Two methods on two datasets, one of two categories; a failed cell; pictures that both methods share; a study."""
    scored = Scored()
    rows = [
        dataclasses.replace(
            scored(shift + bonus, dataset=dataset, category=category, method=method, seed=seed),
            costs={"images_per_second": speed, "peak_rss_mib": 900.0, "fit_seconds": 1.0},
        )
        for method, shift, speed in (("padim", 1.0, 80.0), ("patchcore", 1.8, 20.0))
        for dataset, category, bonus in (("parts", "bolt", 0.0), ("parts", "nut", 0.8), ("cells", "mono", 0.3))
        for seed in (0, 1)
    ]
    pictures = [
        {"name": f"{label}/{place}.png", "label": label, "defect": "dent" if label else "good", "score": 2.0 - place,
         "id": f"{label}{place}", "photo": webp((40 * place, 99, 9)), "heat": webp((255, 99, 9, 120), "RGBA"),
         **({"mask": webp((255, 255, 255, 50), "RGBA")} if label else {})}
        for label in (1, 0) for place in range(3)
    ]  # fmt: skip
    rate = np.linspace(0, 1, 20)
    curves = {"false_positive_rate": rate.tolist(), "true_positive_rate": np.sqrt(rate).tolist(),
              "region_overlap": (rate**0.3).tolist()}  # fmt: skip
    details = {row.cell_id: {"curves": curves, "pictures": pictures} for row in rows}
    rows.append(toy_row(None, dataset="cells", category="mono", method="draem", backbone=None))
    study = toy_study(folder / "parallel_coordinates.png")
    Image.new("RGB", (64, 32), (9, 99, 40)).save(study[2])
    page = render_page(
        rows, scored.scores, details.__getitem__, title="toys", command="adgrid run toys.yaml", studies=[study]
    )
    return rows, page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(DRIVER))
    opened.set_page_load_timeout(120)
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    rows, page = make_page(path.parent)
    path.write_text(page, encoding="utf-8")
    return rows, path.as_uri()


@pytest.fixture
def page(browser, report):
    """The page freshly opened; afterwards nothing may have been complained of, and nothing asked of a network."""
    browser.get("about:blank")
    browser.get(report[1])
    browser.execute_script("try { localStorage.clear() } catch { }")
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    asked = [entry["message"] for entry in browser.get_log("performance") if "requestWillBeSent" in entry["message"]]
    assert not [message for message in asked if '"url":"http' in message]


def all_of(page, selector):
    return page.find_elements(By.CSS_SELECTOR, selector)


def one(page, selector):
    return page.find_element(By.CSS_SELECTOR, selector)


def click(page, element):
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    element.click()


def lines(page, table="#matrix"):
    return [line.text.splitlines()[0] for line in all_of(page, f"{table} tbody th")]


def open_cell(page, value=0, category=0):
    click(page, all_of(page, "#matrix .value")[value])
    if not one(page, "#cell").is_displayed():
        click(page, all_of(page, "#categories .value")[category])


def test_the_matrix_shows_the_numbers_in_the_colours_of_the_other_figures(page, report):
    rows, _ = report
    values = [row.metrics["image_auroc"] for row in rows if (row.method, row.dataset) == ("padim", "parts")]
    first = all_of(page, "#matrix .value")[0]
    assert first.text.splitlines()[0] == f"{100 * np.mean(values):.1f}"
    assert "–" in first.text.splitlines()[1]
    assert "±" in first.text.splitlines()[2]
    scale = page.execute_script("return [findMatrix('image_auroc', null).low, findMatrix('image_auroc', null).high]")
    colour = cell_colour(round(float(np.mean(values)), 5), tuple(scale))
    assert first.value_of_css_property("background-color").startswith(f"rgba({', '.join(map(str, colour))}, 1")
    assert lines(page) == ["padim", "patchcore", "draem"]
    assert "1 of 2 failed" in one(page, "#matrix").text or "1 of 1 failed" in one(page, "#matrix").text
    assert "ValueError: all features are NaN" in one(page, "#failures").text


def test_columns_sort_by_mouse_and_by_keyboard_and_say_so(page):
    heads = all_of(page, "#matrix thead button")
    click(page, heads[1])
    assert lines(page) == ["patchcore", "padim", "draem"]
    assert all_of(page, "#matrix thead th")[1].get_attribute("aria-sort") == "descending"
    assert page.switch_to.active_element.text == heads_text(page)[1]
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert lines(page) == ["padim", "patchcore", "draem"]  # a hole stays below
    assert all_of(page, "#matrix thead th")[1].get_attribute("aria-sort") == "ascending"
    page.switch_to.active_element.send_keys(Keys.SHIFT, Keys.TAB)
    page.switch_to.active_element.send_keys(Keys.SPACE)
    assert lines(page) == ["draem", "padim", "patchcore"]


def heads_text(page):
    return [head.text for head in all_of(page, "#matrix thead button")]


def test_another_metric_and_hidden_intervals_change_the_matrix(page):
    before = one(page, "#matrix").text
    click(page, one(page, "#controls label:has(input[value='image_ap'])"))
    assert "Image AP in percent" in one(page, "#matrix caption").text
    assert one(page, "#matrix").text != before
    click(page, one(page, "#controls input[type='checkbox']"))
    assert all_of(page, "#matrix .value small") == []


def test_a_number_leads_to_its_categories_its_cell_and_its_images(page):
    click(page, all_of(page, "#matrix .value")[0])
    assert one(page, "#drill-heading").text == "parts"
    assert [head.text for head in all_of(page, "#categories thead button")][1:] == ["bolt", "nut", "mean"]
    assert not one(page, "#cell").is_displayed()
    click(page, all_of(page, "#categories .value")[1])
    assert one(page, "#cell-heading").text.startswith("nut — padim")
    assert page.switch_to.active_element.get_attribute("id") == "cell-heading"
    assert len(all_of(page, "#cell svg")) == 3
    assert len(all_of(page, "#cell .pictures li")) == 6
    click(page, all_of(page, "#cell .stack")[0])
    viewer = one(page, "#viewer")
    assert viewer.get_attribute("open") is not None
    assert len(all_of(page, "#viewer .others li")) == 1 + 4  # the image, two methods with two seeds each
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert viewer.get_attribute("open") is None
    click(page, all_of(page, "#crumbs button")[0])
    assert not one(page, "#drill").is_displayed()


def test_a_threshold_moves_what_is_called_anomalous(page):
    open_cell(page)
    slider = one(page, "#threshold")
    best = one(page, ".threshold output").text
    assert "best F1" in best

    def confusion():
        return [int(cell.text) for cell in all_of(page, ".confusion td")]

    start = confusion()
    assert sum(start) == 100
    slider.send_keys(Keys.END)  # the highest threshold: hardly anything is called anomalous
    assert confusion()[1] <= start[1]
    assert confusion()[2] > start[2]
    assert "missed" in one(page, "#cell .pictures").text
    slider.send_keys(Keys.HOME)
    assert confusion()[2:] == [0, 60]
    assert "best F1" not in one(page, ".threshold output").text


def test_heat_maps_and_masks_can_be_taken_off(page):
    open_cell(page)
    assert one(page, "#cell .heat").is_displayed()
    boxes = all_of(page, "#cell input[type='checkbox']")
    click(page, boxes[0])
    assert not one(page, "#cell .heat").is_displayed()
    assert one(page, "#cell .mask").is_displayed()
    loaded = page.execute_script(
        "return [...document.querySelectorAll('#cell img')].filter(i => i.complete && !i.naturalWidth)"
    )
    assert loaded == []


def test_another_seed_shows_its_own_numbers(page):
    open_cell(page)
    before = one(page, "#cell .figures").text
    select = one(page, "#cell select")
    select.send_keys(Keys.ARROW_DOWN)
    assert one(page, "#cell .figures").text != before


def test_the_theme_follows_the_system_and_the_switch(page):
    root = one(page, "html")
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    try:
        # The page hears of it a moment later.
        WebDriverWait(page, 20).until(lambda _: root.get_attribute("data-theme") == "dark")
        dark = one(page, "body").value_of_css_property("background-color")
        one(page, "#theme").send_keys(Keys.ENTER)
        assert (one(page, "#theme").text, root.get_attribute("data-theme")) == ("Light", "light")
        assert one(page, "body").value_of_css_property("background-color") != dark
        one(page, "#theme").send_keys(Keys.ENTER)
        assert (one(page, "#theme").text, root.get_attribute("data-theme")) == ("Dark", "dark")
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_cost_is_a_picture_whose_points_lead_to_their_numbers(page):
    points = all_of(page, "#pareto .point")
    assert len(points) == 2
    assert "on the Pareto front" in points[0].get_attribute("aria-label")
    page.execute_script("arguments[0].focus()", points[0])
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert one(page, "#drill-heading").text == "parts"


def test_a_study_shows_its_picture_and_its_trials_sort(page):
    (picture,) = all_of(page, "#studies img")
    assert page.execute_script("return arguments[0].naturalWidth", picture) == 64
    assert [line.text for line in all_of(page, "#studies tbody th")] == ["1", "0", "2"]
    ratio, score = all_of(page, "#studies thead button")[1:3]
    click(page, ratio)
    click(page, ratio)  # 0.05, 0.1, 0.25
    assert [line.text for line in all_of(page, "#studies tbody th")] == ["2", "0", "1"]
    click(page, score)  # 90.0, 80.0, stopped
    assert [line.text for line in all_of(page, "#studies tbody th")] == ["1", "0", "2"]


def test_the_address_leads_back_to_the_same_place(page, report):
    open_cell(page, category=1)
    heading, address = one(page, "#cell-heading").text, page.current_url
    page.get("about:blank")
    page.get(address)
    assert one(page, "#cell-heading").text == heading
    page.get("about:blank")
    page.get(report[1] + "#metric=nonsense&protocol=9")
    assert len(lines(page)) == 3


def test_a_phone_needs_no_sideways_scrolling_of_the_page(page):
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.refresh()
        open_cell(page)
        assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_everything_that_can_be_pressed_has_a_name_and_every_table_a_caption(page):
    open_cell(page)
    nameless = page.execute_script(
        "return [...document.querySelectorAll('button, input, select, [role=button], [role=region]')].filter(e => "
        "!(e.textContent.trim() || e.ariaLabel || e.labels?.length || e.closest('label'))).map(e => e.outerHTML)"
    )
    assert nameless == []
    assert (
        page.execute_script("return document.querySelectorAll('table:not(.confusion):not(:has(caption))').length") == 0
    )
    doubled = page.execute_script(
        "const ids = [...document.querySelectorAll('[id]')].map(e => e.id);"
        "return ids.filter((id, place) => ids.indexOf(id) != place)"
    )
    assert doubled == []
    assert page.execute_script("return [...document.images].filter(i => !i.hasAttribute('alt')).length") == 0
