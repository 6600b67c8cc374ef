"""Photographs MLflow's own views of a mirrored run, for docs/mlflow.md.

    adgrid mlflow sync RUN --tracking-uri sqlite:///FOLDER/mlflow.db
    python docs/make_mlflow_pictures.py sqlite:///FOLDER/mlflow.db

Starts MLflow on a free port of the loopback address and looks at it with a headless Chromium. A picture that is empty
because a page was slow is better taken again with a longer --seconds.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow import MlflowClient
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --window-size=1600,1000 --hide-scrollbars"

ASSISTANT = "[data-component-id^='mlflow.assistant'][aria-label='Close']"
"""Closes what else would cover a quarter of the page."""

COLUMNS = "[data-testid='column-selector-tree'] .du-bois-light-tree-checkbox"
"""The first group of columns on offer."""


@contextmanager
def served(tracking_uri: str) -> Iterator[str]:
    """The address of an MLflow server for a database."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", address.rpartition(":")[2]]
    process = subprocess.Popen(
        [*command, "--backend-store-uri", tracking_uri, "--workers", "1"], start_new_session=True
    )
    try:
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def wait_for(browser: webdriver.Chrome, selector: str) -> WebElement:
    """The first element of a kind, as soon as it is there."""
    return WebDriverWait(browser, 300).until(lambda opened: opened.find_element(By.CSS_SELECTOR, selector))


def show_table(browser: webdriver.Chrome) -> None:
    """Unfolds the trials of the newest space and chooses the columns of image AUROC."""
    wait_for(browser, ".ag-row [data-component-id*='runnamecellrenderer']").click()
    wait_for(browser, "[data-testid='column-selection-dropdown']").click()
    for _ in range(2):  # all attributes, then none
        wait_for(browser, COLUMNS).click()
        time.sleep(1)
    wait_for(browser, "input[placeholder='Search columns']").send_keys("image_auroc")
    time.sleep(2)
    wait_for(browser, COLUMNS).click()
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)


def show_bars(browser: webdriver.Chrome) -> None:
    """Chooses the charts of means of image AUROC."""
    wait_for(browser, "input[placeholder='Search metric charts']").send_keys("image_auroc/m")


def hide_path(browser: webdriver.Chrome) -> None:
    """Takes the line away that tells where the file lies on this machine."""
    browser.execute_script(
        "for (const one of document.querySelectorAll('div, span'))"
        "  if (one.textContent.startsWith('Path:') && one.textContent.length < 300) one.style.visibility = 'hidden';"
    )


def main() -> None:
    """Takes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tracking_uri")
    parser.add_argument("--experiment", default="adgrid")
    parser.add_argument("--seconds", type=float, default=20.0, help="a page gets this long to be drawn")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parsed = parser.parse_args()
    client = MlflowClient(parsed.tracking_uri)
    experiment = client.get_experiment_by_name(parsed.experiment).experiment_id
    parent = client.search_runs([experiment], "tags.kind = 'run'", max_results=1)[0].info.run_id
    trials = client.search_runs([experiment], f"tags.kind = 'trial' and tags.`mlflow.parentRunId` = '{parent}'")
    chosen = json.dumps([trial.info.run_id for trial in trials])
    options = webdriver.ChromeOptions()
    for flag in FLAGS.split():
        options.add_argument(flag)
    with tempfile.TemporaryDirectory() as profile, served(parsed.tracking_uri) as address:
        options.add_argument(f"--user-data-dir={profile}")
        browser = webdriver.Chrome(options=options)
        browser.set_page_load_timeout(300)
        try:
            runs = f"{address}/#/experiments/{experiment}/runs"
            pages = {
                "runs": (f"{runs}?compareRunsMode=TABLE", show_table),
                "bars": (f"{runs}?compareRunsMode=CHART", show_bars),
                "coordinates": (f"{address}/#/compare-runs?runs={chosen}&experiments=[%22{experiment}%22]", None),
                "matrix": (f"{runs}/{parent}/artifacts/matrices/image_auroc.html", hide_path),
            }
            for name, (page, act) in pages.items():
                browser.get("about:blank")
                browser.get(page)
                time.sleep(parsed.seconds)
                for panel in browser.find_elements(By.CSS_SELECTOR, ASSISTANT):
                    panel.click()
                if act is not None:
                    act(browser)
                    time.sleep(parsed.seconds)
                picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
                picture = picture.crop((200, 0, picture.width, picture.height))  # without MLflow's menu
                picture.save(parsed.out / f"mlflow_{name}.webp", quality=70, method=6)
        finally:
            browser.quit()


if __name__ == "__main__":
    main()
