"""The pictures of the README: `make demo`, then `make up` in one terminal, the same week once more from the form, and
this in another terminal (needs Chromium). After `make demo CYCLES=3` the page of the week shows three."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from flywheel_tasks.services import Endpoints, state_dir

HERE = Path(__file__).parent
SIZE = {"width": 1440, "height": 900}
MODELS_SIZE = {"width": 1440, "height": 520}
WITHOUT_PATH = (
    "const line = document.querySelector('.sub'); line.textContent = line.textContent.replace(/.*\\/store/, 'store')"
)
"""Where the store lay on whoever took the picture."""
REPORT_SIZE = {"width": 1200, "height": 1500}


def airflow(browser: Browser, at: Endpoints) -> None:
    """The runs of the weekly DAG, stage by stage."""
    page = browser.new_page(viewport=SIZE)
    page.set_default_timeout(60_000)
    page.goto(at.airflow, wait_until="domcontentloaded")
    page.fill("input[name=username]", at.user)
    page.fill("input[name=password]", at.password())
    page.keyboard.press("Enter")
    page.wait_for_url(lambda url: "login" not in url)
    page.goto(f"{at.airflow}/dags/character_flywheel", wait_until="domcontentloaded")
    page.get_by_label("Expand all task groups").click()
    page.get_by_role("link", name="Runs").first.click()
    page.wait_for_timeout(8_000)
    page.mouse.move(5, 5)
    page.screenshot(path=HERE / "airflow.png")


def mlflow(browser: Browser, at: Endpoints) -> None:
    """The models of a cycle, side by side."""
    login = {"username": at.user, "password": at.password()}
    page = browser.new_context(http_credentials=login, viewport=MODELS_SIZE).new_page()
    page.set_default_timeout(60_000)
    found = page.request.post(f"{at.mlflow}/api/2.0/mlflow/experiments/search", data={"max_results": 50}).json()[
        "experiments"
    ]
    (cycles,) = [one["experiment_id"] for one in found if one["name"] != "Default"]
    page.goto(f"{at.mlflow}/#/experiments/{cycles}/models?workflowType=machine_learning", wait_until="domcontentloaded")
    page.wait_for_timeout(8_000)
    assistant = page.get_by_text("MLflow Assistant")
    if assistant.count():
        page.locator("header, div").filter(has=assistant).last.get_by_role("button").last.click()
    page.wait_for_timeout(1_000)
    page.screenshot(path=HERE / "mlflow.png")


def report(browser: Browser) -> None:
    """The page of the week down to its third heading, and the chart under that: the weeks so far."""
    page = browser.new_page(viewport=REPORT_SIZE)
    page.goto((state_dir() / "report" / "index.html").as_uri())
    page.wait_for_timeout(1_000)
    page.evaluate(WITHOUT_PATH)
    third, fourth = (box["y"] for n in (2, 3) if (box := page.locator("h2").nth(n).bounding_box()))
    for name, top, bottom in (("report", 0, third), ("weeks", third, fourth)):
        clip = {"x": 0, "y": top, "width": REPORT_SIZE["width"], "height": bottom - top}
        page.screenshot(path=HERE / f"{name}.png", full_page=True, clip=clip)


def main() -> None:
    at = Endpoints(**json.loads((state_dir() / "services.json").read_text()))
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=chromium, args=sandbox)
        airflow(browser, at)
        mlflow(browser, at)
        report(browser)
        browser.close()


if __name__ == "__main__":
    main()
